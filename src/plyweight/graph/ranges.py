"""Ranges: the grids of edges, one for each bit-width, from values that were seen.

An edge has 8 bits, ``x' = step * (clamp(round(x / step) + z, 0, 255) - z)``. Of the steps that are
tried it takes the one with the least

    sum over who reads it    |R(x) - R(x')|^2 / |x|^2

where ``R`` is what the reader does first: a learned quantizer rounds to its own grid, and whoever
computes in float (an addition, a pooling) does nothing.

Two families of steps are tried. Fractions of the range of ``x``; and odd fractions ``t / k`` of
the step ``t`` of each learned quantizer that reads the edge. With an odd ``k`` no edge value lies
halfway between two levels of the learned grid, so that ``round(round(x k / t) / k) =
round(x / t)``: what the next convolution reads is what it would have read without the edge. At 8
bits ``k = 1`` often wins, and edge and quantizer are one.

Measured without ``fit_edges`` (``python benchmarks/agreement.py --grids packed whole fractions``):
a trained ResNet-8, 10,000 held-out images of
CIFAR-10, 512 others to calibrate on; top-1 equal to torch's in %.

    bit-width                                8       6       4       3       2
    the whole range                      99.15   98.73   97.44   96.00   92.50
    fractions of the range               99.25   98.56   98.18   96.52   93.88
    odd fractions of learned steps too   99.41   98.81   98.13   97.27   94.28
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["EDGE_LEVELS", "Grid", "Sample", "best_grid"]

EDGE_LEVELS = 256
# Fractions of the range; a range is rarely worth cutting by more than half at 8 bits.
FRACTIONS = np.linspace(0.4, 1.0, 31)
LEAST_FRACTION = 0.4
# Values kept of each edge; a step changes in its third digit if there are ten times more.
MAX_VALUES = 200_000

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """Where a value is rounded to: ``step * (clamp(round(x / step) + z, 0, highest) - z)``."""

    step: float  # a float32
    zero_point: int
    highest: int = EDGE_LEVELS - 1

    def round(self, values: Values) -> Values:
        """``values`` on the grid, in float32 as ONNX Runtime computes them."""
        step = np.float32(self.step)
        levels = np.rint(values / step) + np.float32(self.zero_point)
        clamped = np.clip(levels, 0, self.highest) - np.float32(self.zero_point)
        on_grid: Values = (clamped * step).astype(np.float32)
        return on_grid


class Sample:
    """Values of one edge at one bit-width: evenly drawn, and the least and largest of all."""

    def __init__(self) -> None:
        self._parts: list[Values] = []
        self.lowest, self.largest = 0.0, 0.0  # 0 is a level of every grid

    def add(self, values: Values, *, num_batches: int) -> None:
        """Take what a batch has, one of ``num_batches``."""
        self.lowest = min(self.lowest, float(values.min(initial=0)))
        self.largest = max(self.largest, float(values.max(initial=0)))
        flat = values.reshape(-1)
        room = max(MAX_VALUES // max(num_batches, 1), 1)
        # An odd stride, for an even one would stay in a few columns or channels.
        stride = max(flat.size // room, 1) | 1
        self._parts.append(flat[::stride].copy())

    def values(self) -> Values:
        """Those that were drawn."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)


def best_grid(sample: Sample, learned: Sequence[Grid], *, is_read_as_float: bool) -> Grid:
    """The grid of an edge.

    Args:
        sample: what it takes.
        learned: grids of the learned quantizers that read it.
        is_read_as_float: whether something else does, too.
    """
    values = sample.values()
    energy = float(np.mean(np.square(values, dtype=np.float64))) if values.size else 0.0
    if energy == 0.0:
        return learned[0] if learned and learned[0].highest == EDGE_LEVELS - 1 else Grid(1.0, 0)
    rounded = [grid.round(values) for grid in learned]

    def cost(grid: Grid) -> float:
        edge = grid.round(values)
        costs = [_mean_square(g.round(edge) - r) for g, r in zip(learned, rounded, strict=True)]
        if is_read_as_float or not learned:
            costs.append(_mean_square(edge - values))
        return sum(costs) / energy

    return min(_candidates(sample, learned), key=cost)  # of equal ones the first: a learned one


def _candidates(sample: Sample, learned: Sequence[Grid]) -> list[Grid]:
    spread = sample.largest - sample.lowest
    found = [grid for grid in learned if grid.highest == EDGE_LEVELS - 1]
    for grid in learned:
        most = grid.step * (EDGE_LEVELS - 1) / (LEAST_FRACTION * spread)
        found += [
            _grid(np.float32(grid.step) / np.float32(k), sample)
            for k in range(1, int(min(most, EDGE_LEVELS)) + 1, 2)
        ]
    found += [_grid(np.float32(f * spread / (EDGE_LEVELS - 1)), sample) for f in FRACTIONS]
    return found


def _grid(step: np.float32, sample: Sample) -> Grid:
    """The grid of ``step`` that covers the sample, or cuts both of its ends alike."""
    covered = float(step) * (EDGE_LEVELS - 1)
    share = min(covered / (sample.largest - sample.lowest), 1.0)
    zero_point = round(-sample.lowest * share / float(step))
    return Grid(float(step), min(max(zero_point, 0), EDGE_LEVELS - 1))


def _mean_square(values: Values) -> float:
    return float(np.mean(np.square(values, dtype=np.float64)))


Grids = Mapping[str, Grid]
