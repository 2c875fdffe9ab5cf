"""The parameters that have a row for each bit-width: what a bit-width has of its own.

Gains, activation clips and offsets, the affine parameters of batch norms, biases of calibrated
modules. Training treats them apart: they are no common ground of the bit-widths, do not decay,
and may learn at rates of their own.
"""

from dataclasses import dataclass

from torch import nn

from plyweight.nn.quantized import BiasByBitWidth
from plyweight.quantizers import Switchable

__all__ = ["RowParameter", "row_parameters"]


@dataclass(frozen=True)
class RowParameter:
    """One of them.

    Attributes:
        parameter: ``(rows, ...)``.
        bit_widths: for each row the widest bit-width of the model that takes it. A single one
            means that all bit-widths share the row.
    """

    parameter: nn.Parameter
    bit_widths: tuple[int, ...]


def row_parameters(model: nn.Module) -> list[RowParameter]:
    """Those of ``model``, in the order of its modules, those that are shared once."""
    found: dict[int, RowParameter] = {}
    for module in model.modules():
        if isinstance(module, Switchable):
            # No tensor is read: on a GPU each would be waited for, in every step.
            users = {module.own_bit_width(b): b for b in module.available_bit_widths}
            widths = tuple(users[own] for own in module.own_bit_widths)
            for parameter in module.row_parameters():
                found.setdefault(id(parameter), RowParameter(parameter, widths))
        if isinstance(module, BiasByBitWidth) and module.has_bias_rows:
            bias = module._parameters["bias"]
            assert bias is not None
            found.setdefault(
                id(bias), RowParameter(bias, module.switch_of_bias().available_bit_widths)
            )
    return list(found.values())
