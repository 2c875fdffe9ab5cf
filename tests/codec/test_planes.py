"""The first b planes are the b-bit code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from laws import assert_planes_nest

from plyweight import native
from plyweight.codec import (
    codes_at,
    decode,
    from_planes,
    levels_from_planes,
    plane_bytes,
    to_planes,
)
from plyweight.codec.planes import (
    BLOCK_BYTES,
    from_planes_reference,
    to_planes_reference,
)
from plyweight.errors import KernelError

torch = pytest.importorskip("torch")

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
codes_8bit = hnp.arrays(np.uint8, shapes)
kernels = pytest.mark.parametrize("kernel", native.available())


@given(codes=codes_8bit)
def test_the_first_planes_are_the_narrower_code(codes):
    assert_planes_nest(codes)


@given(codes=codes_8bit, bit_width=st.integers(1, 8))
def test_from_planes_inverts_to_planes_at_every_bit_width(codes, bit_width):
    held = codes_at(codes, bit_width)
    planes = to_planes(held, bit_width)
    assert len(planes) == bit_width
    assert np.array_equal(from_planes(planes, codes.shape), held)


@given(codes=codes_8bit, bit_width=st.integers(1, 8))
def test_torch_and_numpy_planes_give_the_same_codes(codes, bit_width):
    planes = to_planes(codes, 8)[:bit_width]
    rebuilt = from_planes(torch.from_numpy(planes.copy()), codes.shape)
    assert rebuilt.dtype == torch.uint8
    assert tuple(rebuilt.shape) == codes.shape
    assert np.array_equal(rebuilt.numpy(), from_planes(planes, codes.shape))


@given(codes=codes_8bit, bit_width=st.integers(1, 7))
def test_the_bit_dropped_between_two_widths_is_the_next_plane(codes, bit_width):
    dropped = codes_at(codes, bit_width + 1) & 1
    plane = to_planes(codes, 8)[bit_width]
    assert np.array_equal(to_planes(dropped, 1)[0], plane)
    narrower = codes_at(codes, bit_width)
    assert np.array_equal(narrower << 1 | dropped, codes_at(codes, bit_width + 1))


@kernels
@given(codes=codes_8bit, bit_width=st.integers(1, 8))
def test_packing_and_unpacking_equal_their_definitions(kernel, codes, bit_width):
    held = codes_at(codes, bit_width)
    planes = to_planes_reference(held, bit_width)
    assert np.array_equal(to_planes(held, bit_width, kernel=kernel), planes)
    assert np.array_equal(from_planes(planes, codes.shape, kernel=kernel), held)
    assert np.array_equal(from_planes_reference(planes, codes.shape), held)


@kernels
@pytest.mark.parametrize("bit_width", range(1, 9))
def test_every_length_around_what_a_kernel_works_on_at_once_equals_its_definition(
    kernel, bit_width
):
    rng = np.random.default_rng(bit_width)
    for num_codes in (*range(150), 511, 512, 513, 1000):
        codes = rng.integers(0, 2**bit_width, num_codes, dtype=np.uint8)
        planes = to_planes_reference(codes, bit_width)
        assert np.array_equal(to_planes(codes, bit_width, kernel=kernel), planes)
        assert np.array_equal(from_planes(planes, codes.shape, kernel=kernel), codes)
        levels = levels_from_planes(planes, codes.shape, kernel=kernel)
        assert levels.dtype == np.int8
        assert np.array_equal(levels, decode(codes, bit_width))


@kernels
@pytest.mark.parametrize("extra", [-9, -8, -1, 0, 1, 7, 8, 8 * BLOCK_BYTES + 3])
def test_more_codes_than_a_block_equal_their_definitions(kernel, extra):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, 8 * BLOCK_BYTES + extra, dtype=np.uint8)
    planes = to_planes(codes, 8, kernel=kernel)
    assert np.array_equal(planes, to_planes_reference(codes, 8))
    for bit_width in (1, 3, 8):
        rebuilt = from_planes(planes[:bit_width], codes.shape, kernel=kernel)
        levels = levels_from_planes(planes[:bit_width], codes.shape, kernel=kernel)
        assert np.array_equal(levels, decode(rebuilt, bit_width))
        assert np.array_equal(rebuilt, codes_at(codes, bit_width))


@kernels
def test_codes_and_planes_need_not_be_contiguous_nor_aligned_nor_writable(kernel):
    rng = np.random.default_rng(0)
    codes = np.broadcast_to(rng.integers(0, 256, (5, 1, 9), dtype=np.uint8), (5, 4, 9))
    planes = to_planes(codes.transpose(2, 0, 1), 8, kernel=kernel)
    assert np.array_equal(planes, to_planes_reference(codes.transpose(2, 0, 1).copy(), 8))
    spaced = np.repeat(planes, 2, axis=1)[:, ::2]
    spaced.setflags(write=False)
    rebuilt = from_planes(spaced, (9, 5, 4), kernel=kernel)
    assert np.array_equal(rebuilt, codes.transpose(2, 0, 1))
    odd = rng.integers(0, 256, 1001, dtype=np.uint8)[1:]
    planes = to_planes(odd, 8, kernel=kernel)
    assert np.array_equal(planes, to_planes_reference(odd, 8))
    shifted = [np.concatenate([[7], row]).astype(np.uint8)[1:] for row in planes]
    assert np.array_equal(from_planes(shifted, odd.shape, kernel=kernel), odd)


def test_planes_that_a_human_can_check():
    # Signs first, the first weight in the lowest bit; nine weights need two bytes.
    codes = np.array([0b100, 0b011, 0b101, 0, 0, 0, 0, 0, 0b111], np.uint8)
    assert to_planes(codes, 3).tolist() == [[0b101, 1], [0b010, 1], [0b110, 1]]


@pytest.mark.parametrize(
    ("shape", "size"), [((), 1), ((0, 3), 0), ((8,), 1), ((9,), 2), ((3, 3, 3), 4)]
)
def test_a_plane_has_a_bit_per_weight_in_whole_bytes(shape, size):
    assert plane_bytes(shape) == size


@kernels
def test_padding_is_zero(kernel):
    planes = to_planes(np.full(9, 255, np.uint8), 8, kernel=kernel)
    assert planes[:, 1].tolist() == [1] * 8


@pytest.mark.parametrize("num_planes", [0, 9])
def test_a_code_has_1_to_8_planes(num_planes):
    planes = np.zeros((num_planes, 1), np.uint8)
    with pytest.raises(ValueError, match=f"{num_planes} planes were given; a code has 1 to 8"):
        from_planes(planes, (8,))


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_a_plane_of_the_wrong_length_is_refused(make):
    planes = [make(np.zeros(2, np.uint8)), make(np.zeros(3, np.uint8))]
    with pytest.raises(ValueError, match=r"a plane of shape \(3,\); \(3, 4\) needs \(2,\)"):
        from_planes(planes, (3, 4))


@kernels
@pytest.mark.parametrize("num_codes", [2, 100, 201])
def test_a_code_that_does_not_fit_is_refused_wherever_it_stands(kernel, num_codes):
    for place in (0, num_codes // 2, num_codes - 1):
        codes = np.ones(num_codes, np.uint8)
        codes[place] = 8
        with pytest.raises(ValueError, match="a code of 8 does not fit in 3 bits"):
            to_planes(codes, 3, kernel=kernel)


@kernels
def test_codes_that_are_not_bytes_are_refused(kernel):
    with pytest.raises(ValueError, match="codes are int64; planes are cut from uint8 codes"):
        to_planes(np.array([1, 8]), 8, kernel=kernel)


@kernels
def test_planes_that_are_not_bytes_are_refused(kernel):
    with pytest.raises(ValueError, match="a plane is int8; planes are uint8"):
        from_planes(np.zeros((2, 1), np.int8), (8,), kernel=kernel)


@kernels
@pytest.mark.parametrize("bit_width", [-1, 0, 9])
def test_codes_are_cut_into_1_to_8_planes(kernel, bit_width):
    with pytest.raises(ValueError, match=f"{bit_width} planes were asked for; a code has 1 to 8"):
        to_planes(np.zeros(8, np.uint8), bit_width, kernel=kernel)


def test_a_kernel_that_does_not_run_here_is_refused_whatever_the_planes_are():
    with pytest.raises(KernelError, match="the call demands the kernel 'sse9', but what runs here"):
        to_planes(np.zeros(8, np.uint8), 1, kernel="sse9")
    with pytest.raises(KernelError, match="the call demands the kernel 'sse9', but what runs here"):
        from_planes(torch.zeros((1, 1), dtype=torch.uint8), (8,), kernel="sse9")
