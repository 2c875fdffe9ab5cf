"""A code is a sign and seven bits of magnitude; fewer bits are a prefix, with the half cell."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from laws import formula_levels

from plyweight.codec import codes_at, decode, encode, inner_levels, spread

torch = pytest.importorskip("torch")

ALL_CODES = np.arange(256, dtype=np.uint8)
bit_widths = st.integers(1, 8)
small_shapes = hnp.array_shapes(max_dims=4, max_side=6)
codes_8bit = hnp.arrays(np.uint8, small_shapes)
finite = st.floats(-1e6, 1e6, width=32)
weights = hnp.arrays(np.float32, small_shapes, elements=finite)
positive = st.floats(2.0**-40, 2.0**40, width=32)


def as_torch(array):
    return torch.from_numpy(np.array(array))  # a copy, for hypothesis may give a read-only one


@pytest.mark.parametrize("bit_width", range(1, 9))
def test_every_code_decodes_to_the_formula(bit_width):
    codes = codes_at(ALL_CODES, bit_width)
    levels = decode(codes, bit_width)
    assert levels.dtype == np.int8
    assert np.array_equal(levels, formula_levels(codes, bit_width))


@pytest.mark.parametrize(
    ("bit_width", "levels"),
    [
        (1, {-64, 64}),
        (2, {-96, -32, 32, 96}),
        (3, {-112, -80, -48, -16, 16, 48, 80, 112}),
        (7, set(range(-127, 128, 2))),
        (8, set(range(-127, 128))),
    ],
)
def test_the_levels_of_a_bit_width_are_those_that_the_rule_names(bit_width, levels):
    assert set(decode(codes_at(ALL_CODES, bit_width), bit_width).tolist()) == levels


@given(codes=codes_8bit, data=st.data())
def test_dropping_one_bit_at_a_time_is_dropping_all_at_once(codes, data):
    bit_width = data.draw(bit_widths)
    cascade = codes
    for step in range(8, bit_width, -1):
        cascade = codes_at(cascade, step - 1, from_bit_width=step)
    assert np.array_equal(cascade, codes_at(codes, bit_width))
    assert np.array_equal(decode(cascade, bit_width), decode(codes_at(codes, bit_width), bit_width))


@given(codes=codes_8bit, bit_width=st.integers(1, 7))
def test_an_arriving_bit_moves_a_level_by_a_quarter_of_its_cell(codes, bit_width):
    """Upgrades are in place: only the 1000... tail becomes a real bit."""
    now = decode(codes_at(codes, bit_width), bit_width).astype(int)
    then = decode(codes_at(codes, bit_width + 1), bit_width + 1).astype(int)
    cell = 1 << (8 - bit_width)
    # The last step has no half cell of its own: cells of 2 become single levels.
    assert set(np.abs(then - now).flat) <= ({cell // 4} if bit_width < 7 else {0, 1})


@given(weight=weights, scale=positive)
def test_a_code_is_the_sign_and_the_rounded_saturated_magnitude(weight, scale):
    scale = np.float32(scale)
    codes = encode(weight, scale)
    assert codes.dtype == np.uint8
    assert np.array_equal(codes >> 7, weight < 0)
    with np.errstate(over="ignore"):
        expected = np.minimum(np.rint(np.abs(weight) / scale), 127)
    assert np.array_equal(codes & 127, expected)


def test_codes_that_a_human_can_check():
    weight = np.array([0.0, -0.0, 1.0, -1.0, 2.5, 3.5, 126.6, -500.0], np.float32)
    # Halves round to even; -0.0 is not below zero; magnitudes end at 127.
    codes = [0, 0, 1, 0x81, 2, 4, 127, 0xFF]
    assert encode(weight, np.float32(1)).tolist() == codes
    assert encode(weight * 4, np.float32(4)).tolist() == codes


@given(weight=weights, scale=positive)
def test_at_8_bits_a_weight_inside_the_clip_is_half_a_step_away_at_most(weight, scale):
    scale = np.float32(scale)
    levels = decode(encode(weight, scale), 8)
    with np.errstate(over="ignore"):
        ratio = weight.astype(np.float64) / np.float64(scale)
    inside = np.abs(ratio) < 127
    # The float32 quotient, from which the code is rounded, is within 2^-24 of the exact one.
    assert np.all(np.abs(levels - ratio)[inside] <= 0.5 + 127 * 2.0**-24)


@given(codes=codes_8bit, bit_width=bit_widths, scale=positive)
def test_inner_levels_encode_to_the_codes_they_came_from(codes, bit_width, scale):
    held, scale = codes_at(codes, bit_width), np.float32(scale)
    latent = inner_levels(held, bit_width) * scale
    assert latent.dtype == np.float32
    again = codes_at(encode(latent, scale), bit_width)
    assert np.array_equal(again, held)
    twice = inner_levels(again, bit_width) * scale
    assert np.array_equal(twice, latent)


def test_inner_levels_keep_the_sign_of_a_zero():
    codes = np.array([0x00, 0x80], np.uint8)  # +0 and -0, which 7 bits tell apart
    assert decode(codes, 8).tolist() == [0, 0]
    assert inner_levels(codes, 8).tolist() == [0.25, -0.25]
    assert encode(inner_levels(codes, 8), np.float32(1)).tolist() == [0x00, 0x80]


@given(weight=weights, scale=positive, bit_width=bit_widths)
def test_torch_and_numpy_compute_the_same(weight, scale, bit_width):
    scale = np.float32(scale)
    codes = encode(weight, scale)
    torch_codes = encode(as_torch(weight), torch.tensor(scale))
    assert torch_codes.dtype == torch.uint8
    assert np.array_equal(torch_codes.numpy(), codes)
    held, torch_held = codes_at(codes, bit_width), codes_at(torch_codes, bit_width)
    assert np.array_equal(torch_held.numpy(), held)
    levels = decode(torch_held, bit_width)
    assert levels.dtype == torch.int8
    assert np.array_equal(levels.numpy(), decode(held, bit_width))
    assert np.array_equal(
        inner_levels(torch_held, bit_width).numpy(), inner_levels(held, bit_width)
    )


@pytest.mark.parametrize("bit_width", range(1, 9))
def test_a_bit_width_may_be_a_tensor(bit_width):
    codes, as_tensor = as_torch(ALL_CODES), torch.tensor(bit_width, dtype=torch.uint8)
    held = codes_at(codes, bit_width)
    for one, other in (
        (codes_at(codes, as_tensor), held),
        (decode(held, as_tensor), decode(held, bit_width)),
        (inner_levels(held, as_tensor), inner_levels(held, bit_width)),
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_codes_are_computed_in_float32_whatever_the_dtype(dtype):
    weight, scale = torch.randn(64, 9).to(dtype), torch.rand(64, 1) * 0.1 + 0.01
    assert torch.equal(encode(weight, scale), encode(weight.float(), scale))


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("scale_shape", "shape", "group_size", "spread_shape"),
    [
        ((3,), (3, 5), None, (3, 1)),
        ((3,), (3, 5, 2, 2), None, (3, 1, 1, 1)),
        ((3,), (3, 5), 2, (3, 1)),  # one gain per channel under groups
        ((3, 3), (3, 5), 2, (3, 5)),
        ((3, 1), (3, 5), 8, (3, 5)),
        ((3, 2), (3, 4, 7), 2, (3, 4, 1)),
        ((1,), (3, 5, 7), None, (1, 1, 1)),
    ],
)
def test_a_scale_spreads_to_a_shape_that_broadcasts(
    make, scale_shape, shape, group_size, spread_shape
):
    scale = np.arange(1, 1 + np.prod(scale_shape), dtype=np.float32).reshape(scale_shape)
    wide = spread(make(scale), shape, group_size)
    assert tuple(wide.shape) == spread_shape
    full = np.broadcast_to(np.asarray(wide), shape)
    for index in np.ndindex(*shape):
        own = 0 if scale_shape == (1,) else index[0]
        expected = scale[own, index[1] // group_size] if scale.ndim == 2 else scale[own]
        assert full[index] == expected


def test_the_codec_imports_no_torch():
    code = "import sys, plyweight.codec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
