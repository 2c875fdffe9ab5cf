"""Moments: mean and variance of every channel, and what brings them back to those of another.

    k = std(y) / std(y_b),   d = mean(y) - k * mean(y_b):      k * y_b + d has the moments of y

Moments are merged (Chan, Golub and LeVeque, 1983) instead of summing squares, which would lose a
small variance beside a large mean.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from plyweight.errors import LayeringError

__all__ = ["Moments", "correction"]

# Of a standard deviation. Past that, rounding has left nothing of the channel to be stretched.
LARGEST_RATIO = 8.0


class Moments:
    """Of every channel over all that was added.

    Attributes:
        num: values per channel.
        mean: float64 ``(channels,)``; an empty tensor at first.
        deviation: float64 ``(channels,)``, the sum of squared distances from the mean.
    """

    def __init__(self) -> None:
        self.num = 0
        self.mean = self.deviation = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor, channel_dim: int, where: str) -> None:
        """Take in ``values``, whose channels lie along ``channel_dim``.

        Those of one dimension are a single sample: one value of each channel.

        Raises:
            LayeringError: If there are none, or they are not finite.
        """
        if values.dim() == 1:  # no dimensions to reduce, which torch would read as all of them
            values, channel_dim = values.unsqueeze(0), -1
        other = Moments()
        other.num = values.numel() // max(values.shape[channel_dim], 1)
        if not other.num:
            raise LayeringError(f"a batch is empty at {where}; give batches with samples in them.")
        others = [d for d in range(values.dim()) if d != channel_dim % values.dim()]
        # float32 is enough inside a batch, for torch computes a variance about its own mean.
        var, mean = torch.var_mean(values.float(), dim=others, correction=0)
        if not bool(var.isfinite().all()):
            raise LayeringError(
                f"activations at {where} are NaN or infinite; give batches that the float model "
                "can compute."
            )
        other.mean, other.deviation = mean.double(), var.double() * other.num
        self.merge(other)

    def merge(self, other: "Moments") -> None:
        """Take in all that ``other`` has seen."""
        if not self.num:
            self.num, self.mean, self.deviation = other.num, other.mean, other.deviation
        elif other.num:
            total = self.num + other.num
            between = other.mean - self.mean
            self.deviation = (
                self.deviation + other.deviation + between**2 * (self.num * other.num / total)
            )
            self.mean = self.mean + between * (other.num / total)
            self.num = total

    @classmethod
    def pooled(cls, parts: Iterable["Moments"]) -> "Moments":
        """Those of all ``parts`` together."""
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole


def correction(reference: Moments, quantized: Moments) -> tuple[Tensor, Tensor]:
    """``k`` and ``d``, float64 ``(channels,)``: ``k * quantized + d`` has the reference's moments.

    ``k`` is 1 for a channel that is constant on either side, and never below 1/8 or above 8.
    """
    variance = reference.deviation / reference.num, quantized.deviation / quantized.num
    is_signal = (variance[0] > 0) & (variance[1] > 0)
    ratio = torch.where(is_signal, variance[0] / variance[1], 1.0).sqrt()
    ratio = ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    return ratio, reference.mean - ratio * quantized.mean
