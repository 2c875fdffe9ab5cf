"""What layered and packed modules compute: the float module's function on quantized operands.

Both forms share these lines, so a loaded model runs the very operations that were trained.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.quantizers import ActivationQuantizer, Switchable

__all__ = [
    "BiasByBitWidth",
    "InputQuantizer",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedLinear",
]

InputQuantizer = ActivationQuantizer | nn.Identity  # identity: activations stay float


class BiasByBitWidth(nn.Module):
    """A module whose bias may have a row for each bit-width of the model.

    The parameter ``bias`` is ``(out,)``, one for all, or ``(bit-widths, out)``: quantization moves
    the mean of an output by another amount at each bit-width, and where no batch norm follows it
    is the bias that takes it back (Nagel et al., "Data-Free Quantization", ICCV 2019). The rows
    are those of the *model's* bit-widths: the weight of a pinned module stays, its inputs do not.
    """

    def switch_of_bias(self) -> Switchable:
        """What knows the current bit-width."""
        raise NotImplementedError

    def _bias(self) -> Tensor | None:
        """The bias at the current bit-width, ``(out,)``; None where there is none."""
        bias = self._parameters.get("bias")
        if bias is None or bias.dim() == 1:
            return bias
        try:
            row: Tensor = self.switch_of_bias().model_row_of(bias)
        except AttributeError as error:
            # Let through, nn.Module would answer with the parameter of that name: all the rows.
            raise RuntimeError(f"the bias cannot be chosen: {error}") from error
        return row

    bias: Any = property(_bias)  # torch declares a parameter in one class, a tensor in another

    @property
    def has_bias_rows(self) -> bool:
        """Whether the bias has a row for each bit-width."""
        bias = self._parameters.get("bias")
        return bias is not None and bias.dim() == 2

    def give_bias_rows(self) -> nn.Parameter:
        """Let the bias have a row for each bit-width, all as it is now; the new parameter.

        The parameter is another one afterwards, so make the optimizer after that.
        """
        bias = self._parameters["bias"]
        assert bias is not None
        if bias.dim() == 1:
            num_rows = len(self.switch_of_bias().model_bit_widths)
            rows = bias.detach().expand(num_rows, -1).clone()
            bias = nn.Parameter(rows, requires_grad=bias.requires_grad)
            self._parameters["bias"] = bias
        return bias


class QuantizedLinear(nn.Linear):
    """``(..., in)`` to ``(..., out)``."""

    input_quantizer: InputQuantizer

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T + bias``, both operands on their grids."""
        return F.linear(self.input_quantizer(inputs), self.weight, self.bias)


class QuantizedConv1d(nn.Conv1d):
    """``(batch, in, length)`` to ``(batch, out, length)``."""

    input_quantizer: InputQuantizer

    def forward(self, inputs: Tensor) -> Tensor:
        """The convolution, both operands on their grids."""
        inputs = self.input_quantizer(inputs)
        outputs: Tensor = self._conv_forward(inputs, self.weight, self.bias)
        return outputs


class QuantizedConv2d(nn.Conv2d):
    """``(batch, in, height, width)`` to ``(batch, out, height, width)``."""

    input_quantizer: InputQuantizer

    def forward(self, inputs: Tensor) -> Tensor:
        """The convolution, both operands on their grids."""
        inputs = self.input_quantizer(inputs)
        outputs: Tensor = self._conv_forward(inputs, self.weight, self.bias)
        return outputs
