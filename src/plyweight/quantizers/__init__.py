"""From float to code and back, with a gradient (torch)."""

from plyweight.quantizers.activation import ActivationQuantizer, ActivationWidths
from plyweight.quantizers.rounding import floor_ste, round_ste
from plyweight.quantizers.switchable import Switchable, checked_bit_widths
from plyweight.quantizers.weight import WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "ActivationWidths",
    "Switchable",
    "WeightQuantizer",
    "checked_bit_widths",
    "floor_ste",
    "round_ste",
]
