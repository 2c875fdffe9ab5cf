"""Every kernel that runs here computes what the reference says, and refuses what is wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels.weights import ON_CPU, drawn, levels_of, matrix_of, require

from plyweight.codec import to_planes
from plyweight.errors import BitWidthError, KernelError
from plyweight.kernels import MAX_GROUP_INPUTS, MODES, pick
from plyweight.kernels.native_matrix import NativeMatrix
from plyweight.kernels.reference import error_bound, float_product, int8_product

kernels = pytest.mark.parametrize("kernel", ON_CPU)
SHAPES = [(1, 1), (3, 7), (10, 33), (17, 130), (33, 16), (64, 64), (65, 257), (100, 512)]


def assert_is_the_product(matrix, x, codes, scale, bit_width, mode, num_threads):
    levels = levels_of(codes, bit_width)
    y = matrix.product(x, scale, bit_width, mode=mode, num_threads=num_threads)
    assert y.dtype == np.float32
    assert y.shape == (len(x), len(codes))
    if mode == "int8":
        assert np.array_equal(y, int8_product(x, levels, scale, matrix.group_size), equal_nan=True)
    else:
        exact = float_product(x, levels, scale, matrix.group_size)
        bound = error_bound(x, levels, scale, matrix.group_size)
        assert (abs(y.astype(np.float64) - exact) <= bound).all()


@kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_reference(kernel, mode, group_size, shape):
    require(kernel)
    for m in (1, 2, 4, 7, 16, 33):
        x, codes, scale = drawn(m, *shape, m=m, group_size=group_size)
        matrix = matrix_of(kernel, codes, group_size=group_size)
        for bit_width in range(1, 9):
            assert_is_the_product(matrix, x, codes, scale, bit_width, mode, 1 + m % 3)


@kernels
@given(
    seed=st.integers(0, 2**32 - 1),
    out=st.sampled_from([1, 2, 3, 10, 17, 31, 32, 40]),
    num_inputs=st.integers(1, 200),
    m=st.integers(1, 9),
    group_size=st.sampled_from([None, 1, 3, 8, 16, 24, 32, 64, 128, 1000]),
    num_planes=st.integers(1, 8),
    num_threads=st.integers(1, 4),
    mode=st.sampled_from(MODES),
)
def test_any_shape_group_and_number_of_threads_gives_the_product(
    kernel, seed, out, num_inputs, m, group_size, num_planes, num_threads, mode
):
    require(kernel)
    x, codes, scale = drawn(seed, out, num_inputs, m=m, group_size=group_size)
    matrix = matrix_of(kernel, codes, group_size=group_size, num_planes=num_planes)
    for bit_width in range(1, num_planes + 1):
        assert_is_the_product(matrix, x, codes, scale, bit_width, mode, num_threads)


@kernels
@pytest.mark.parametrize("mode", MODES)
def test_a_product_is_the_same_with_any_number_of_threads_and_any_rows_beside_it(kernel, mode):
    require(kernel)
    x, codes, scale = drawn(0, 300, 384, m=19, group_size=64)
    matrix = matrix_of(kernel, codes, group_size=64)
    for bit_width in (1, 2, 4, 7, 8):
        y = matrix.product(x, scale, bit_width, mode=mode)
        for num_threads in (2, 3, 8):
            again = matrix.product(x, scale, bit_width, mode=mode, num_threads=num_threads)
            assert np.array_equal(again, y)
        alone = [matrix.product(x[i : i + 1], scale, bit_width, mode=mode) for i in range(len(x))]
        if mode == "int8":
            assert np.array_equal(np.concatenate(alone), y)


@kernels
def test_activations_at_the_edges_of_float32_are_answered_as_the_reference_does(kernel):
    require(kernel)
    x, codes, scale = drawn(3, 9, 48, m=8, group_size=16)
    x[0, 5], x[1, 20], x[2] = np.nan, np.inf, 0
    x[3], x[4], x[5] = 1e-45, x[5] * np.float32(1e-40), 3e38
    x[6, ::2], x[7] = -0.0, np.tile([0.5, 1.5, 2.5, 127], 12)
    matrix = matrix_of(kernel, codes, group_size=16)
    for bit_width in (1, 3, 8):
        y = matrix.product(x, scale, bit_width, mode="int8")
        with np.errstate(all="ignore"):
            expected = int8_product(x, levels_of(codes, bit_width), scale, 16)
        assert np.array_equal(y, expected, equal_nan=True)
        for row in range(len(x)):
            alone = matrix.product(x[row : row + 1], scale, bit_width, mode="int8")
            assert np.array_equal(alone, y[row : row + 1], equal_nan=True)


@kernels
@pytest.mark.parametrize("m", [1, 6])
def test_the_largest_sums_fit(kernel, m):
    require(kernel)
    codes = np.full((2, MAX_GROUP_INPUTS), 127, np.uint8)
    codes[1] |= 128
    x = np.ones((m, MAX_GROUP_INPUTS), np.float32)
    x[-1] *= -1
    matrix = matrix_of(kernel, codes)
    for bit_width in (1, 2, 8):
        y = matrix.product(x, np.ones(2, np.float32), bit_width, mode="int8")
        levels = levels_of(codes[:, :1], bit_width)
        assert np.array_equal(y, int8_product(x, levels.repeat(x.shape[1], 1), np.ones(2, "f4")))


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_and_levels_come_out_as_they_went_in(kernel, shape):
    require(kernel)
    _, codes, _ = drawn(1, *shape)
    for group_size in (None, 16, 24):
        matrix = matrix_of(kernel, codes, group_size=group_size)
        for index, plane in enumerate(to_planes(codes, 8)):
            assert np.array_equal(matrix.plane(index), plane)
        for bit_width in range(1, 9):
            levels = matrix.levels(bit_width)
            assert levels.dtype == np.int8
            assert np.array_equal(levels, levels_of(codes, bit_width))
            start, stop = shape[0] // 3, max(shape[0] // 2, 1)
            assert np.array_equal(matrix.levels(bit_width, start, stop), levels[start:stop])


@kernels
def test_planes_come_and_go_at_the_end_and_take_memory_only_while_they_are_there(kernel):
    require(kernel)
    x, codes, scale = drawn(2, 64, 512)
    planes = to_planes(codes, 8)
    matrix = matrix_of(kernel, codes, num_planes=2)
    one = matrix.nbytes // 2
    assert planes[0].nbytes <= one <= 1.1 * planes[0].nbytes + 64
    for step in (1, 1, 1, -1, 1, 1, -1, -1, 1, 1, 1, 1):
        if step > 0:
            matrix.add_plane(planes[matrix.num_planes])
        else:
            matrix.drop_plane()
        assert matrix.nbytes == one * matrix.num_planes
        assert_is_the_product(matrix, x, codes, scale, matrix.num_planes, "int8", 1)
        assert_is_the_product(matrix, x, codes, scale, 2, "int8", 1)
    assert matrix.num_planes == 8


@kernels
def test_a_plane_that_was_made_ready_is_added_at_once_and_changes_nothing_before(kernel):
    require(kernel)
    _, codes, _ = drawn(4, 40, 100)
    planes = to_planes(codes, 8)
    matrix = matrix_of(kernel, codes, num_planes=3)
    adders = [matrix.ready(planes[i], i) for i in range(3, 8)]
    assert matrix.num_planes == 3
    for add in adders:
        add()
    assert np.array_equal(matrix.levels(8), levels_of(codes, 8))
    with pytest.raises(ValueError, match="ready as number 3; the next one is 8"):
        adders[0]()  # a KernelError, or the library's own
    with pytest.raises(KernelError, match="has planes of uint8"):
        matrix.ready(planes[0][1:], 1)
    for index in (-1, 8, 1.0):
        with pytest.raises(KernelError, match="cannot be made ready"):
            matrix.ready(planes[0], index)
    with pytest.raises(KernelError, match="cannot be made ready: 0 planes are held"):
        matrix_of(kernel, codes, num_planes=0).ready(planes[1], 1)


@pytest.mark.parametrize("kernel", [name for name in ON_CPU if name != "reference"])
def test_a_plane_that_was_made_ready_is_for_the_signs_that_were_held(kernel):
    require(kernel)
    _, codes, _ = drawn(4, 40, 100)
    planes = to_planes(codes, 8)
    matrix = matrix_of(kernel, codes, num_planes=1)
    add = matrix.ready(planes[1], 1)
    matrix.drop_plane()
    matrix.add_plane(planes[0])
    with pytest.raises(ValueError, match="other signs"):
        add()
    assert matrix.num_planes == 1


@kernels
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_scale_that_was_made_ready_gives_the_same_products(kernel, group_size):
    require(kernel)
    x, codes, scale = drawn(5, 45, 100, m=9, group_size=group_size)
    matrix = matrix_of(kernel, codes, group_size=group_size)
    ready = matrix.ready_scale(scale)
    for mode in MODES:
        for bit_width in (1, 5, 8):
            y = matrix.product(x, ready, bit_width, mode=mode)
            assert np.array_equal(y, matrix.product(x, scale, bit_width, mode=mode))
            gained = matrix.product(x, ready, bit_width, mode=mode, gain=0.7, num_threads=2)
            by_hand = matrix.product(x, scale * np.float32(0.7), bit_width, mode=mode)
            assert np.array_equal(gained, by_hand)
    with pytest.raises(KernelError, match="the gain is 2; give a float"):
        matrix.product(x, ready, 1, mode="float", gain=2)
    with pytest.raises(KernelError, match="the scale is float64"):
        matrix.ready_scale(scale.astype(np.float64))
    with pytest.raises(KernelError, match="the scale is not C-contiguous"):
        matrix.ready_scale(np.repeat(scale, 2, axis=0)[::2])
    other = matrix_of(kernel, codes[:44], group_size=group_size)
    with pytest.raises(KernelError, match=r"made ready for a \w+ with scales \(44"):
        matrix.product(x, other.ready_scale(scale[:44]), 3, mode="int8")


@kernels
def test_eight_threads_multiply_with_one_matrix_at_once(kernel):
    require(kernel)
    x, codes, scale = drawn(5, 130, 200, m=2, group_size=32)
    matrix = matrix_of(kernel, codes, group_size=32)
    expected = [int8_product(x, levels_of(codes, b), scale, 32) for b in range(1, 9)]

    def compute(bit_width):
        return all(
            np.array_equal(
                matrix.product(x, scale, bit_width, mode="int8", num_threads=2),
                expected[bit_width - 1],
            )
            for _ in range(50)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(compute, range(1, 9)))


@kernels
def test_no_rows_of_activations_give_no_rows(kernel):
    require(kernel)
    _, codes, scale = drawn(0, 5, 8)
    for mode in MODES:
        y = matrix_of(kernel, codes).product(np.empty((0, 8), np.float32), scale, 3, mode=mode)
        assert y.shape == (0, 5)


x_, codes_, scale_ = drawn(0, 10, 24, m=4, group_size=8)


@kernels
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": x_.astype(np.float64)}, r"activations are float64 \(4, 24\).*takes float32 \(m, 24"),
        ({"x": x_[:, :23]}, r"activations are float32 \(4, 23\)"),
        ({"x": x_[0]}, r"activations are float32 \(24,\)"),
        ({"x": x_.tolist()}, "activations are a list"),
        ({"x": np.asfortranarray(x_)}, "activations are not C-contiguous"),
        ({"x": np.repeat(x_, 2, axis=0)[::2]}, "activations are not C-contiguous"),
        ({"x": np.frombuffer(b"-" + x_.tobytes(), "f4", 96, 1).reshape(4, 24)}, "not .* aligned"),
        ({"x": x_.astype(">f4")}, "activations are >f4"),
        ({"scale": scale_[:, :2].copy()}, r"scale is float32 \(10, 2\).*takes float32 \(10, 3\)"),
        ({"scale": scale_[:, 0].copy()}, r"the scale is float32 \(10,\)"),
        ({"scale": scale_.astype(np.float16)}, "the scale is float16"),
        ({"scale": np.asfortranarray(scale_)}, "the scale is not C-contiguous"),
        ({"mode": "int4"}, "the mode is 'int4'; give one of float, int8"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_threads": 1.0}, "num_threads is 1.0"),
        ({"num_threads": 2**40}, "num_threads is 1099511627776; give an integer from 1 to"),
        ({"num_threads": True}, "num_threads is True"),
        ({"x": [[1.0, 2.0], [3.0]]}, "activations are a list"),
        ({"x": np.float32(1)}, "activations are a float32"),
    ],
)
def test_what_a_product_cannot_take_is_refused(kernel, change, words):
    require(kernel)
    matrix = matrix_of(kernel, codes_, group_size=8)
    arguments = {"x": x_, "scale": scale_, "mode": "float", "num_threads": 1} | change
    with pytest.raises(KernelError, match=words):
        matrix.product(arguments.pop("x"), arguments.pop("scale"), 3, **arguments)


@kernels
def test_a_width_of_which_planes_are_missing_is_refused(kernel):
    require(kernel)
    matrix = matrix_of(kernel, codes_, group_size=8, num_planes=3)
    for wrong in (0, 4, 9, -1, True, "3", None):
        for compute in (
            lambda b: matrix.product(x_, scale_, b, mode="int8"),
            lambda b: matrix.levels(b),
        ):
            with pytest.raises(BitWidthError):
                compute(wrong)
    for wrong in (3, -1, 1.0, "1", None, True):
        with pytest.raises(KernelError, match=f"plane {wrong!r} was asked for; 3 are held"):
            matrix.plane(wrong)
    for start, stop in ((1.5, 3), (1, 3.0), (-1, 3), (3, 1), ("1", 3), (None, 3), (2**70, 2**70)):
        with pytest.raises(KernelError, match="there are 10"):
            matrix.levels(2, start, stop)
    with pytest.raises(KernelError, match="channels 4 to 11 were asked for; there are 10"):
        matrix.levels(2, 4, 11)


@kernels
def test_planes_that_do_not_fit_are_refused_and_change_nothing(kernel):
    require(kernel)
    matrix = matrix_of(kernel, codes_, group_size=8)
    plane = to_planes(codes_, 8)[0]
    with pytest.raises(KernelError, match="more than 8"):
        matrix.add_plane(plane)
    matrix.drop_plane()
    for wrong in (plane[:-1], plane.view(np.int8), plane[None], np.append(plane, plane[:1]), b"12"):
        with pytest.raises(KernelError, match=r"has planes of uint8 \(30,\)"):
            matrix.add_plane(wrong)
    assert matrix.num_planes == 7
    strided = np.repeat(to_planes(codes_, 8)[7], 2)[::2]
    matrix.add_plane(strided)  # it is copied anyway
    assert np.array_equal(matrix.levels(8), levels_of(codes_, 8))
    for _ in range(8):
        matrix.drop_plane()
    with pytest.raises(KernelError, match="no plane to drop"):
        matrix.drop_plane()


@kernels
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((0, 4), None),
        ((4, 0), None),
        ((4, 4, 4), None),
        ((4.0, 4), None),
        ((4, 4), 0),
        ((4, 4), "4"),
        ((4, 4), 2**70),
        ((4, 4), True),
        (3, None),
        ("44", None),
        (None, None),
        ((2**31, 1), None),
        ((1, 2**31 + 1), None),
        ((2**70, 1), None),
    ],
)
def test_matrices_that_cannot_be_are_refused(kernel, shape, group_size):
    require(kernel)
    words = "a plane matrix of shape" if group_size is None else "group_size is"
    with pytest.raises(KernelError, match=words):
        pick(kernel).matrix(shape, group_size=group_size)


@kernels
def test_a_shape_may_be_any_sequence_and_is_a_tuple_then(kernel):
    require(kernel)
    matrix = pick(kernel).matrix([3, 3])
    assert matrix.shape == (3, 3)
    assert type(matrix.shape) is tuple


def test_what_is_no_variant_is_refused():
    with pytest.raises(KernelError, match="'reference' is no variant of the native library"):
        NativeMatrix((3, 3), variant="reference")
    with pytest.raises(KernelError, match="avx1024"):
        NativeMatrix((3, 3), variant="avx1024")


@kernels
def test_more_inputs_than_an_int32_can_sum_need_groups(kernel):
    require(kernel)
    wide = MAX_GROUP_INPUTS + 8
    codes, x = np.zeros((1, wide), np.uint8), np.ones((1, wide), np.float32)
    matrix = matrix_of(kernel, codes, num_planes=1)
    with pytest.raises(KernelError, match="share a scale"):
        matrix.product(x, np.ones(1, np.float32), 1, mode="int8")
    y = matrix.product(x, np.ones(1, np.float32), 1, mode="float")
    assert y.tolist() == [[64.0 * wide]]
    matrix = matrix_of(kernel, codes, num_planes=1, group_size=MAX_GROUP_INPUTS + 1)
    with pytest.raises(KernelError, match=f"{MAX_GROUP_INPUTS + 1} inputs share a scale"):
        matrix.product(x, np.ones((1, 2), np.float32), 1, mode="int8")


@kernels
def test_bits_after_the_last_weight_change_nothing(kernel):
    require(kernel)
    x, codes, scale = drawn(6, 3, 7)
    matrix, dirty = matrix_of(kernel, codes, num_planes=0), to_planes(codes, 8).copy()
    dirty[:, -1] |= 0b11100000  # 21 weights are 3 bytes but for 3 bits
    for plane in dirty:
        matrix.add_plane(plane)
    for index, plane in enumerate(to_planes(codes, 8)):
        assert np.array_equal(matrix.plane(index)[:-1], plane[:-1])
        assert matrix.plane(index)[-1] & 0b11111 == plane[-1]
    for bit_width in (1, 4, 8):
        assert_is_the_product(matrix, x, codes, scale, bit_width, "int8", 1)
