"""StepSearch: the step of a module's input at each bit-width with the least squared error.

Tried is a fixed row of steps, in ratios of the one whose grid just reaches the largest input of
the first batch; their errors are added up over all batches. The inputs are those that the *layered*
network has at that bit-width.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from plyweight.errors import LayeringError
from plyweight.quantizers import ActivationQuantizer
from plyweight.quantizers.activation import kind_of

__all__ = ["StepSearch"]

# From an eleventh to one and a half times, for later batches may reach further than the first.
RATIOS = torch.cat((torch.logspace(-3.5, -1, 20, base=2.0), torch.linspace(0.51, 1.5, 60)))
MAX_SAMPLES = 2**16  # of one batch


class StepSearch:
    """For one quantizer, which takes the best step so far after each batch."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self._lowest, self._largest = math.inf, 0.0
        self._is_chosen = False
        self._errors: dict[int, Tensor] = defaultdict(lambda: torch.zeros(len(RATIOS)).double())

    def see(self, inputs: Tensor, where: str) -> None:
        """Take in float inputs of the first batch, which the kind of grid follows from.

        Raises:
            LayeringError: If there are none, or they are not finite.
        """
        if inputs.numel() == 0:
            raise LayeringError(f"a batch is empty at {where}; give batches with samples in them.")
        lowest, largest = (float(end) for end in inputs.float().aminmax())
        if not (math.isfinite(lowest) and math.isfinite(largest)):
            raise LayeringError(
                f"inputs of {where} are NaN or infinite; give batches that the float model can "
                "compute."
            )
        if not self._is_chosen:
            self._lowest = min(self._lowest, lowest)
            self._largest = max(self._largest, -lowest, largest)

    def choose_kind(self) -> None:
        """Set the kind of grid, if inputs were seen and this is the first time."""
        if self._is_chosen or self._lowest == math.inf:
            return
        self._is_chosen = True
        self.quantizer.set_kind(kind_of(self._lowest, self._largest))

    def add(self, inputs: Tensor, bit_width: int) -> None:
        """Take in inputs at ``bit_width`` (of the model), and set its step to the best so far."""
        if not self._is_chosen or self._largest == 0:
            return  # zeros say nothing of a step
        flat = inputs.detach().reshape(-1)
        # An odd stride, so that it does not fall into step with the size of an image.
        values = flat[:: flat.numel() // MAX_SAMPLES | 1].float()
        low, high, half = self.quantizer.levels_at(bit_width)
        offset = self._lowest if self.quantizer.kind == "offset" else 0.0
        reaching = (self._largest - offset) / max(high + half, 1)
        steps = (RATIOS * reaching).tolist()
        zero_points = [round(min(-offset / step, high)) if offset else 0 for step in steps]
        own = max(bit_width, int(self.quantizer.pinned))
        for index, (step, zero) in enumerate(zip(steps, zero_points, strict=True)):
            levels = ((values / step - half).round_() + half).clamp_(low - zero, high - zero)
            self._errors[own][index] += float((levels * step - values).square_().sum())
        best = int(self._errors[own].argmin())
        self.quantizer.set_step(bit_width, steps[best], zero_points[best])
