"""The definition, by values that a human can check and by what follows from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels.weights import drawn

from plyweight.codec import decode, to_planes
from plyweight.kernels import ReferenceMatrix
from plyweight.kernels.reference import (
    error_bound,
    float_product,
    int8_product,
    quantize_rows,
)


def test_a_product_that_a_human_can_check():
    x = np.array([[127, -127, 63.5]], np.float32)  # scale 1: codes 127, -127, 64 (half to even)
    levels = np.array([[1, 0, 2], [-64, -64, 32]], np.int8)
    scale = np.array([0.5, 1], np.float32)
    assert float_product(x, levels, scale).tolist() == [[127.0, 2032.0]]
    assert int8_product(x, levels, scale).tolist() == [[127.5, 2048.0]]


def test_activations_are_rounded_half_to_even_by_row_and_group():
    x = np.array([[127, 0.5, 1.5, -2.5], [2, 0, -1, 254]], np.float32)
    codes, scales = quantize_rows(x, 3)
    assert scales.tolist() == [[1, np.float32(2.5) / np.float32(127)], [np.float32(2) / 127, 2]]
    assert codes.tolist() == [[127, 0, 2, -127], [127, 0, -64, 127]]


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 5e-44])
def test_what_is_as_good_as_zero_stays_in_range(value):
    codes, scales = quantize_rows(np.full((1, 4), value, np.float32), None)
    assert np.isfinite(scales).all()
    assert (abs(codes.astype(int)) <= 127).all()


def test_a_row_with_a_value_that_is_not_finite_is_nan_and_no_other_row():
    x, codes, scale = drawn(0, 5, 8, m=4, group_size=4)
    x[1, 2], x[2, 7] = np.nan, -np.inf
    levels = decode(codes, 8)
    y = int8_product(x, levels, scale, 4)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, True, False]
    assert np.array_equal(y[3], int8_product(x[3:], levels, scale, 4)[0])


@given(
    seed=st.integers(0, 2**32 - 1),
    out=st.sampled_from([1, 3, 10, 17]),
    num_inputs=st.integers(1, 40),
    group_size=st.sampled_from([None, 1, 4, 32]),
    bit_width=st.integers(1, 8),
)
def test_a_common_power_of_two_may_be_left_out_of_the_levels(
    seed, out, num_inputs, group_size, bit_width
):
    x, codes, scale = drawn(seed, out, num_inputs, group_size=group_size)
    levels = decode(codes >> (8 - bit_width), bit_width)
    common = 2 ** max(7 - bit_width, 0)
    assert not (levels % common).any()
    y = int8_product(x, levels, scale, group_size)
    assert np.array_equal(
        y, int8_product(x, levels // common, scale * np.float32(common), group_size)
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    num_inputs=st.integers(1, 300),
    group_size=st.sampled_from([None, 4, 32]),
    bit_width=st.integers(1, 8),
)
def test_sums_in_float32_are_within_the_bound_in_any_order(seed, num_inputs, group_size, bit_width):
    x, codes, scale = drawn(seed, 3, num_inputs, group_size=group_size)
    levels = decode(codes >> (8 - bit_width), bit_width)
    exact = float_product(x, levels, scale, group_size)
    bound = error_bound(x, levels, scale, group_size)
    groups = np.arange(num_inputs) // (group_size or num_inputs)
    factors = scale.reshape(3, -1)[:, groups]
    order = np.random.default_rng(seed).permutation(num_inputs)
    terms = x[:, None, :] * (levels.astype(np.float32) * factors)
    one_by_one = np.cumsum(terms[..., order], axis=-1, dtype=np.float32)[..., -1]
    assert (abs(one_by_one.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_a_matrix_computes_at_the_width_asked_whatever_it_holds(mode):
    x, codes, scale = drawn(1, 10, 33)
    matrix = ReferenceMatrix((10, 33))
    product = int8_product if mode == "int8" else float_product
    for held, plane in enumerate(to_planes(codes, 8), start=1):
        matrix.add_plane(plane)
        for bit_width in range(1, held + 1):
            levels = decode(codes >> (8 - bit_width), bit_width)
            assert np.array_equal(matrix.levels(bit_width), levels)
            assert np.array_equal(
                matrix.product(x, scale, bit_width, mode=mode), product(x, levels, scale)
            )
