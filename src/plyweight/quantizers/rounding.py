"""Straight-through estimators: exact values forward, a useful gradient backward.

Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons
for Conditional Computation" (arXiv 1308.3432): the derivative of a rounding is taken as 1.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["floor_ste", "round_ste"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, exact: Tensor) -> Tensor:
        # Not `values + (exact - values).detach()`: that sum need not round to `exact`.
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def round_ste(values: Tensor) -> Tensor:
    """``values.round()`` (half to even) whose gradient is that of ``values``."""
    return _straight_through(values, values.detach().round())


def floor_ste(values: Tensor) -> Tensor:
    """``values.floor()`` whose gradient is that of ``values``."""
    return _straight_through(values, values.detach().floor())


def _straight_through(values: Tensor, exact: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(values, exact)  # type: ignore[no-untyped-call]
    return result
