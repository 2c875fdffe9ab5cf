"""What the Triton kernels must hold, wherever they run; `test_triton.py` runs this file.

In Triton's interpreter on tensors of the CPU, or where TRITON_INTERPRET is not 1, on a GPU.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels.weights import drawn, levels_of
from nets import ALL_BIT_WIDTHS
from torch import nn

import plyweight
from plyweight.codec import spread, to_planes
from plyweight.errors import BitWidthError, KernelError
from plyweight.kernels import pick, triton_launch
from plyweight.kernels.reference import error_bound
from plyweight.kernels.triton_matrix import TritonMatrix
from plyweight.nn.kernel_weight import KernelWeight

DEVICE = "cpu" if triton_launch.EMULATED else "cuda"
# The interpreter takes a second for some products; what is slow here is slow for no other reason.
SHAPES = [(1, 1), (3, 7), (10, 77), *(pytest.param(s, marks=pytest.mark.slow) for s in
          [(16, 256), (17, 300), (33, 520)])]  # fmt: skip
GROUPS = [None, 32, 64, 128]
some_groups = pytest.mark.parametrize(
    "group_size", [None, 128, *(pytest.param(g, marks=pytest.mark.slow) for g in (32, 64))]
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def matrix_of(codes, group_size=None, num_planes=8):
    matrix = pick("triton", device=DEVICE).matrix(codes.shape, group_size=group_size)
    assert isinstance(matrix, TritonMatrix)
    for plane in torch.from_numpy(to_planes(codes, 8)[:num_planes]).to(DEVICE):
        matrix.add_plane(plane)
    return matrix


def on_device(array, dtype=torch.float32):
    return torch.from_numpy(array).to(DEVICE, dtype)


def rounded(values, dtype):
    """float32 ``values`` as the device rounds them; the interpreter cuts bits off for bfloat16."""
    if dtype == torch.bfloat16 and triton_launch.EMULATED:
        return (values.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return values.to(dtype)


def assert_is_the_product(y, x, levels, scale, group_size):
    """Within what float32 sums may lose, and half a unit, or one cut off, of the result."""
    seen = x.float().cpu().numpy()
    values = levels.astype(np.float64) * spread(scale, levels.shape, group_size)
    exact = seen.astype(np.float64) @ values.T
    terms = 3 if x.dtype == torch.float32 else 1  # a float32 is multiplied as three bfloat16
    bound = terms * error_bound(seen, levels, scale, group_size)
    # A tensor core keeps a bit less than float32 while it adds; no law of arithmetic says so.
    bound *= 1 if triton_launch.EMULATED else 2
    short = 2.0**-7 if triton_launch.EMULATED else 2.0**-8
    unit = {torch.float16: 2.0**-11, torch.bfloat16: short, torch.float32: 2.0**-24}[y.dtype]
    bound += unit * (abs(exact) + bound) + 2.0**-24  # the last: what float16 has below 2**-14
    assert y.dtype == x.dtype
    assert tuple(y.shape) == exact.shape
    assert (abs(y.double().cpu().numpy() - exact) <= bound).all()


@some_groups
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_reference(shape, group_size):
    for m, dtype in zip((1, 3, 16, 17), (*DTYPES, torch.float16), strict=True):
        x, codes, scale = drawn(m, *shape, m=m, group_size=group_size)
        matrix, x, scales = matrix_of(codes, group_size), on_device(x, dtype), on_device(scale)
        for bit_width in range(1, 9) if shape[0] < 33 else (2, 3, 6, 8):
            y = matrix.product(x, scales, bit_width, mode="float")
            assert_is_the_product(y, x, levels_of(codes, bit_width), scale, group_size)


@some_groups
@pytest.mark.parametrize("m", [1, pytest.param(8, marks=pytest.mark.slow), 64])
def test_integers_whose_sums_a_float32_holds_are_multiplied_exactly(m, group_size):
    _, codes, scale = drawn(m, 17, 300, group_size=group_size)
    rng = np.random.default_rng(m)
    scale = (2.0 ** rng.integers(-7, -1, scale.shape)).astype(np.float32)
    x = rng.integers(-7, 8, (m, 300))  # 300 * 7 * 127 * 2**5 < 2**24, of which 2**5 are scales'
    matrix = matrix_of(codes, group_size)
    for bit_width in range(1, 9):
        values = levels_of(codes, bit_width) * spread(scale, codes.shape, group_size)
        exact = on_device(x @ values.T)
        for dtype in DTYPES:
            y = matrix.product(on_device(x, dtype), on_device(scale), bit_width, mode="float")
            assert torch.equal(y, rounded(exact, dtype))


def test_what_was_made_ready_computes_the_same_and_fits_one_place():
    x, codes, scale = drawn(1, 10, 77, group_size=32)
    matrix, planes = matrix_of(codes, 32, num_planes=2), to_planes(codes, 8)
    x, scale = on_device(x), on_device(scale)
    adders = [matrix.ready(torch.from_numpy(planes[i]).to(DEVICE), i) for i in (0, 2, 3)]
    with pytest.raises(KernelError, match="ready as number 3; the next one is 2"):
        adders[2]()
    adders[1]()
    adders[2]()
    assert all(np.array_equal(matrix.plane(i).cpu(), planes[i]) for i in range(4))
    ready = matrix.ready_scale(scale)
    for bit_width in (2, 4):
        y = matrix.product(x, ready, bit_width, mode="float")
        assert torch.equal(y, matrix.product(x, scale, bit_width, mode="float"))
        values = matrix.values(ready, bit_width, torch.float32)
        assert torch.equal(values, matrix.values(scale, bit_width, torch.float32))
        y = matrix.product(x, ready, bit_width, mode="float", gain=0.5)
        assert torch.equal(y, matrix.product(x, scale * 0.5, bit_width, mode="float"))
    with pytest.raises(KernelError, match="the gain is 2; give a float"):
        matrix.product(x, ready, 2, mode="float", gain=2)
    for _ in range(4):
        matrix.drop_plane()
    adders[0]()
    assert np.array_equal(matrix.plane(0).cpu(), planes[0])
    second = matrix.ready(torch.from_numpy(planes[1]).to(DEVICE), 1)
    matrix.drop_plane()
    adders[0]()
    second()  # of the same signs
    assert np.array_equal(matrix.plane(1).cpu(), planes[1])
    matrix.drop_plane()
    second = matrix.ready(torch.from_numpy(planes[1]).to(DEVICE), 1)
    matrix.drop_plane()
    matrix.add_plane(torch.from_numpy(planes[1]).to(DEVICE))
    with pytest.raises(KernelError, match="other signs"):
        second()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_levels_and_values_come_out_as_they_went_in(shape):
    for group_size in (None, 64):
        _, codes, scale = drawn(1, *shape, group_size=group_size)
        matrix, planes = matrix_of(codes, group_size), to_planes(codes, 8)
        for bit_width in range(1, 9):
            assert np.array_equal(matrix.plane(bit_width - 1).cpu(), planes[bit_width - 1])
            levels = levels_of(codes, bit_width)
            start, stop = shape[0] // 3, max(shape[0] // 2, 1)
            cut = matrix.levels(bit_width, start, stop)
            assert cut.dtype == torch.int8
            assert np.array_equal(cut.cpu(), levels[start:stop])
            values = levels.astype(np.float32) * spread(scale, shape, group_size)
            for dtype in DTYPES:
                decoded = matrix.values(on_device(scale), bit_width, dtype)
                assert torch.equal(decoded, rounded(on_device(values), dtype))


def test_a_weight_of_several_blocks_is_brought_into_the_layout_block_by_block(monkeypatch):
    monkeypatch.setattr("plyweight.kernels.triton_layout.BLOCK_WEIGHTS", 2 * 16 * 77)
    _, codes, _ = drawn(0, 70, 77)
    matrix, planes = matrix_of(codes), to_planes(codes, 8)
    for index in range(8):
        assert np.array_equal(matrix.plane(index).cpu(), planes[index])
    assert np.array_equal(matrix.levels(8).cpu(), levels_of(codes, 8))


@pytest.mark.parametrize("tile_is_wide", [False, True])
@pytest.mark.parametrize("is_wide", [False, True])
def test_either_order_of_a_lanes_weights_gives_the_product(is_wide, tile_is_wide, monkeypatch):
    monkeypatch.setattr(triton_launch, "IS_WIDE", is_wide)
    monkeypatch.setattr(triton_launch, "_tile_is_wide", lambda _: tile_is_wide)
    for group_size in GROUPS:
        for m in (2, 20):
            x, codes, scale = drawn(m, 20, 400, m=m, group_size=group_size)
            matrix, x = matrix_of(codes, group_size), on_device(x, torch.float16)
            y = matrix.product(x, on_device(scale), 4, mode="float")
            assert_is_the_product(y, x, levels_of(codes, 4), scale, group_size)


@pytest.mark.parametrize(
    ("m", "group_size"),
    [(5, None), (33, None), *(pytest.param(m, 64, marks=pytest.mark.slow) for m in (5, 33))],
)
def test_every_plan_gives_the_product_and_gives_it_again(m, group_size):
    x, codes, scale = drawn(m, 50, 1500, m=m, group_size=group_size)
    matrix, x, scales = matrix_of(codes, group_size), on_device(x, torch.float16), on_device(scale)
    planes = matrix._planes[:3]
    plans = triton_launch.candidates(x, planes, 50)
    assert len(plans) > 2
    for plan in {replace(plan, stages=2) for plan in plans}:
        y, again = (
            triton_launch.product(x, planes, scales, 50, group_size, plan) for _ in range(2)
        )
        assert_is_the_product(y, x, levels_of(codes, 3), scale, group_size)
        assert torch.equal(y, again)


def test_tuning_keeps_the_fastest_plan_for_that_shape_and_width_alone(monkeypatch):
    monkeypatch.setattr(triton_launch, "_tuned", {})
    x, codes, scale = drawn(0, 40, 600, m=2)
    matrix, x, scales = matrix_of(codes), on_device(x, torch.float16), on_device(scale)
    seconds = iter([3.0, 1.0, *[2.0] * 30])

    matrix.tune(x, 3, lambda _: next(seconds))
    second = triton_launch.candidates(x, matrix._planes[:3], 40)[1]
    assert list(triton_launch._tuned.values()) == [second]
    launched = []
    monkeypatch.setattr(triton_launch, "plan_for", lambda *_: launched.append(1) or second)
    matrix.product(x, scales, 3, mode="float")
    assert not launched
    matrix.product(x, scales, 4, mode="float")
    assert launched


@pytest.mark.parametrize("group_size", [None, 32])
def test_more_rows_than_are_fused_are_multiplied_with_the_decoded_weight(group_size):
    x, codes, scale = drawn(0, 20, 40, m=65, group_size=group_size)
    matrix = matrix_of(codes, group_size)
    for dtype in DTYPES:
        rows, scales = on_device(x, dtype), on_device(scale)
        y = matrix.product(rows, scales, 5, mode="float")
        assert torch.equal(y, F.linear(rows, matrix.values(scales, 5, dtype)))


def test_rows_that_are_not_contiguous_and_no_rows_at_all_are_taken():
    x, codes, scale = drawn(0, 10, 40, m=6)
    matrix, rows, scales = matrix_of(codes), on_device(x), on_device(scale)
    y = matrix.product(rows, scales, 3, mode="float")
    assert torch.equal(matrix.product(rows.T.contiguous().T, scales, 3, mode="float"), y)
    assert torch.equal(matrix.product(rows[::2], scales, 3, mode="float"), y[::2])
    assert matrix.product(rows[:0], scales, 3, mode="float").shape == (0, 10)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is numpy
def test_what_is_not_finite_stays_that():
    x, codes, scale = drawn(0, 10, 40, m=4)
    x[1, 3], x[2, 5] = np.nan, np.inf
    for dtype in DTYPES:
        y = matrix_of(codes).product(on_device(x, dtype), on_device(scale), 3, mode="float")
        assert y.isfinite().all(dim=1).tolist() == [True, False, False, True]
        assert not y[1:3].isfinite().any()


def test_planes_come_and_go_at_the_end_and_take_memory_only_while_they_are_there():
    x, codes, scale = drawn(2, 64, 512, m=2)
    planes = torch.from_numpy(to_planes(codes, 8)).to(DEVICE)
    matrix, x, scales = matrix_of(codes, num_planes=2), on_device(x), on_device(scale)
    one = planes[0].nbytes  # whole blocks, so nothing is padded
    narrow = matrix.product(x, scales, 2, mode="float")
    kept = matrix._planes[0].data_ptr()
    for step in (1, 1, -1, 1, 1, 1, -1, -1, 1, 1, 1, 1):
        if step > 0:
            matrix.add_plane(planes[matrix.num_planes])
        else:
            matrix.drop_plane()
        assert matrix.nbytes == one * matrix.num_planes
        y = matrix.product(x, scales, matrix.num_planes, mode="float")
        assert_is_the_product(y, x, levels_of(codes, matrix.num_planes), scale, None)
        assert torch.equal(matrix.product(x, scales, 2, mode="float"), narrow)
    assert matrix.num_planes == 8
    assert matrix._planes[0].data_ptr() == kept
    with pytest.raises(KernelError, match="more than 8"):
        matrix.add_plane(planes[0])


x_, codes_, scale_ = drawn(0, 10, 64, m=4, group_size=32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": on_device(x_, torch.float64)}, r"activations: torch.float64 \(4, 64\) .*\(4, 64\)"),
        ({"x": on_device(x_)[:, :63]}, r"activations: torch.float32 \(4, 63\)"),
        ({"x": on_device(x_)[0]}, r"activations: torch.float32 \(64,\)"),
        ({"x": on_device(x_, torch.float16).to("meta")}, r"activations: .* on meta where .* on c"),
        ({"scale": on_device(scale_)[:, :1]}, r"the scale: .*\(10, 1\).*torch.float32 \(10, 2\)"),
        ({"scale": on_device(scale_, torch.float16)}, "the scale: torch.float16"),
        ({"mode": "int8"}, "'triton' has the mode 'float' only, not 'int8'"),
    ],
)
def test_what_a_product_cannot_take_is_refused(change, words):
    matrix = matrix_of(codes_, 32)
    arguments = {"x": on_device(x_), "scale": on_device(scale_), "mode": "float"} | change
    with pytest.raises(KernelError, match=words):
        matrix.product(arguments["x"], arguments["scale"], 3, mode=arguments["mode"])


def test_planes_groups_and_widths_that_do_not_fit_are_refused():
    matrix = matrix_of(codes_, 32, num_planes=3)
    plane = torch.from_numpy(to_planes(codes_, 8)[3]).to(DEVICE)
    for wrong in (plane[:-1], plane.view(torch.int8), plane[None], plane.tolist()):
        with pytest.raises(KernelError, match=r"a plane: .* takes torch.uint8 \(80,\)"):
            matrix.add_plane(wrong)
    for wrong in (0, 4, True, None):
        with pytest.raises(BitWidthError):
            matrix.product(on_device(x_), on_device(scale_), wrong, mode="float")
        with pytest.raises(BitWidthError):
            matrix.values(on_device(scale_), wrong, torch.float32)
    with pytest.raises(KernelError, match="float64 was asked for"):
        matrix.values(on_device(scale_), 3, torch.float64)
    with pytest.raises(KernelError, match=r"groups of 32, 64 and 128 .* has groups of 48"):
        pick("triton", device=DEVICE).matrix((4, 96), group_size=48)
    assert matrix.num_planes == 3


def test_a_loaded_model_multiplies_with_it_at_every_width(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10, bias=False))
    prepared = plyweight.prepare(model, bit_widths=ALL_BIT_WIDTHS, activations=None)
    plyweight.pack(prepared, tmp_path / "net")
    x = torch.randn(3, 5, 40, device=DEVICE)
    loaded = plyweight.load(str(tmp_path / "net"), model, bit_width=8).to(DEVICE).eval()
    outputs = {}
    for kernel in ("reference", "triton"):
        plyweight.set_kernel(loaded, kernel)
        for bit_width in ALL_BIT_WIDTHS:
            plyweight.set_bit_width(loaded, bit_width)
            with torch.no_grad():
                outputs[kernel, bit_width] = loaded(x)
    assert sum(isinstance(module, KernelWeight) for module in loaded.modules()) == 2
    for bit_width in ALL_BIT_WIDTHS:
        ours, torchs = outputs["triton", bit_width], outputs["reference", bit_width]
        # Sums of 40 and 24 terms in another order, at most 3 times each: 2**-24 of their size.
        assert (ours - torchs).abs().max() <= 200 * 2.0**-24 * torchs.abs().max()
    with pytest.raises(KernelError, match="the mode 'float' only"):
        plyweight.set_kernel(loaded, "triton", mode="int8")


@pytest.mark.skipif(DEVICE == "cpu", reason="captures a CUDA graph")
def test_products_are_captured_in_a_cuda_graph():
    for m in (1, 40):
        x, codes, scale = drawn(m, 512, 2048, m=m)
        matrix, x, scales = matrix_of(codes), on_device(x, torch.float16), on_device(scale)
        for bit_width in (2, 5, 8):
            expected = matrix.product(x, scales, bit_width, mode="float")  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = matrix.product(x, scales, bit_width, mode="float")
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)
