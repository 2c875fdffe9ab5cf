"""The grid of an edge: what the next module reads is what it would have read without it."""

import numpy as np
import pytest

from plyweight.graph.ranges import Grid, Sample, best_grid

RELU = np.maximum(np.random.default_rng(0).standard_normal(20_000), 0).astype(np.float32)


def sample_of(values):
    sample = Sample()
    sample.add(values, num_batches=1)
    return sample


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_a_learned_grid_alone_is_not_disturbed(width):
    learned = Grid(float(np.float32(2.5 / (1 << width))), 0, (1 << width) - 1)
    edge = best_grid(sample_of(RELU), [learned], is_read_as_float=True)
    assert np.array_equal(learned.round(edge.round(RELU)), learned.round(RELU))
    assert learned.step / edge.step == pytest.approx(round(learned.step / edge.step))
    assert round(learned.step / edge.step) % 2 == 1


def test_at_8_bits_the_learned_grid_is_taken_where_it_covers_the_values():
    learned = Grid(float(np.float32(RELU.max() / 255)), 0)
    assert best_grid(sample_of(RELU), [learned], is_read_as_float=True) == learned


def test_values_of_both_signs_are_covered():
    values = np.concatenate([RELU, -0.5 * RELU])
    grid = best_grid(sample_of(values), [], is_read_as_float=True)
    assert 70 < grid.zero_point < 100  # a third of the levels is below 0
    assert np.abs(grid.round(values) - values).mean() < grid.step


def test_an_edge_that_is_always_0_has_a_grid():
    zeros = np.zeros(10, np.float32)
    assert best_grid(sample_of(zeros), [], is_read_as_float=True).step > 0


def test_a_sample_knows_the_ends_of_what_it_does_not_keep():
    values = np.zeros(1_000_000, np.float32)
    values[12345], values[54321] = -2, 7
    sample = sample_of(values)
    assert (sample.lowest, sample.largest) == (-2, 7)
    assert sample.values().size <= 400_000
