"""The modules that ``print(model)`` shows, and how to choose their bit-width (torch)."""

from plyweight.nn.attention import UnfusedAttention
from plyweight.nn.bit_width import at_bit_width, bit_widths_of, set_bit_width
from plyweight.nn.layered import LayeredConv1d, LayeredConv2d, LayeredEmbedding, LayeredLinear
from plyweight.nn.norm import SwitchableBatchNorm1d, SwitchableBatchNorm2d
from plyweight.nn.report import Report, report
from plyweight.nn.swap import prepare

__all__ = [
    "LayeredConv1d",
    "LayeredConv2d",
    "LayeredEmbedding",
    "LayeredLinear",
    "Report",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
    "UnfusedAttention",
    "at_bit_width",
    "bit_widths_of",
    "prepare",
    "report",
    "set_bit_width",
]
