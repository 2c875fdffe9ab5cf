"""What layered and packed modules compute: the float module's function on quantized operands.

Both forms share these lines, so a loaded model runs the very operations that were trained.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.quantizers import ActivationQuantizer

__all__ = ["InputQuantizer", "QuantizedConv1d", "QuantizedConv2d", "QuantizedLinear"]

InputQuantizer = ActivationQuantizer | nn.Identity  # identity: activations stay float


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
