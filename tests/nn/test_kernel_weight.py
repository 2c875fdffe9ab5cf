"""A kernel changes how a loaded model multiplies, and nothing else about it."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels.loaded import (
    IDS,
    Net,
    assert_linear_modules_compute_the_product,
    choices,
    kernels,
    loaded,
    packed_net,
    weights_of,
)
from kernels.weights import require
from nets import ALL_BIT_WIDTHS, ConvNet, ZooNet, batch, trained, with_rows
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import plyweight
from plyweight import native
from plyweight.artifact import ArtifactReader, MemorySource
from plyweight.errors import KernelError, LayeringError
from plyweight.kernels import Kernel
from plyweight.loading import downgrade, load, upgrade
from plyweight.loading.held import HeldLayers
from plyweight.nn import kernel_weight, set_bit_width
from plyweight.nn.choosing import set_kernel
from plyweight.nn.kernel_weight import KernelWeight
from plyweight.nn.packed import PackedWeight
from plyweight.packing import pack


@pytest.fixture(
    scope="module",
    params=[{}, {"group_size": 8}, {"group_size": 16, "pinned": {"second": 4}, "rows": False}],
    ids=str,
)
def data(request, tmp_path_factory):
    return packed_net(tmp_path_factory.mktemp("net"), **request.param)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    return packed_net(tmp_path_factory.mktemp("grouped"), group_size=8)


@choices
def test_linear_modules_multiply_with_the_kernel_at_every_width(data, kernel, mode):
    require(kernel)
    net = loaded(data, kernel=kernel, mode=mode)
    with torch.no_grad():
        for bit_width in ALL_BIT_WIDTHS:
            set_bit_width(net, bit_width)
            assert_linear_modules_compute_the_product(net, mode)


@choices
def test_the_weight_itself_and_what_embeds_it_stay_what_was_trained(data, kernel, mode):
    require(kernel)
    plain, net = loaded(data), loaded(data, kernel=kernel, mode=mode)
    for bit_width in ALL_BIT_WIDTHS:
        set_bit_width(net, bit_width)
        set_bit_width(plain, bit_width)
        for name, packed in weights_of(net).items():
            assert torch.equal(packed(), plain.get_submodule(name)())
        assert torch.equal(net.embedding(IDS), plain.embedding(IDS))
        assert torch.equal(net.embedding(IDS), nn.functional.embedding(IDS, plain.head.weight))
    assert net.head.packed_weight is net.embedding.packed_weight


@choices
@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_that_are_embedded_are_those_of_the_weight(kernel, mode, group_size, tmp_path):
    require(kernel)
    net = nn.Sequential(nn.Embedding(300, 24), nn.Linear(24, 300, bias=False))
    net[1].weight = net[0].weight
    model = plyweight.prepare(net, (2, 4, 8), activations=None, group_size=group_size)
    pack(with_rows(model), tmp_path / "net")
    held = load(tmp_path / "net", net, kernel=kernel, mode=mode)
    plain = load(tmp_path / "net", net)
    several = [torch.tensor([[299, 0, 7], [7, 31, 32]]), torch.arange(300), torch.tensor(5)]
    for ids in [*several, torch.empty(2, 0, dtype=torch.long)]:
        for bit_width in (2, 4, 8):
            set_bit_width(held, bit_width)
            set_bit_width(plain, bit_width)
            expected = nn.functional.embedding(ids, plain[1].weight)
            assert torch.equal(plain[0](ids), expected)
            assert torch.equal(held[0](ids), expected)
    for wrong in (300, -1):
        for one in (held, plain):
            with pytest.raises((IndexError, RuntimeError), match="range"):
                one[0](torch.tensor([wrong]))


@choices
def test_planes_are_held_once_in_the_kernel_alone(data, kernel, mode):
    require(kernel)
    net = loaded(data, kernel=kernel, mode=mode)
    assert not [name for name, _ in net.named_buffers() if ".planes_" in name]
    for packed in weights_of(net).values():
        assert type(packed) is KernelWeight
        assert packed.kernel_bytes >= 8 * packed.shape[0] * packed.shape[1] // 8


@choices
def test_kernels_are_changed_there_and_back_in_place(grouped, kernel, mode):
    require(kernel)
    net, plain = loaded(grouped), loaded(grouped)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        for _ in range(2):
            set_kernel(net, kernel, mode=mode)
            assert_linear_modules_compute_the_product(net, mode)
            set_kernel(net, "reference", mode="int8")
            assert_linear_modules_compute_the_product(net, "int8")
            set_kernel(net, "reference")
            assert torch.equal(net(IDS), plain(IDS))
    after = net.state_dict()
    assert set(after) == set(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert {type(packed) for packed in weights_of(net).values()} == {PackedWeight}


@choices
def test_a_state_dict_is_in_the_layout_of_the_wire_whatever_the_kernel(grouped, kernel, mode):
    require(kernel)
    plain, net = loaded(grouped), loaded(grouped, kernel=kernel, mode=mode)
    state, expected = net.state_dict(), plain.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    other = loaded(grouped, kernel=kernel, mode=mode)
    with torch.no_grad():
        for name in state:
            if ".planes_" in name:
                state[name] = ~state[name]
        other.load_state_dict(state)
        plain.load_state_dict(state)
        assert all(type(packed) is KernelWeight for packed in weights_of(other).values())
        assert_linear_modules_compute_the_product(other, mode)
        assert torch.equal(other.first.weight, plain.first.weight)
        assert not torch.equal(other.first.weight, net.first.weight)


@choices
def test_copies_and_pickles_compute_the_same_and_change_alone(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, bit_width=4, kernel=kernel, mode=mode)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    others = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(saved, weights_only=False),
    ]
    with torch.no_grad():
        expected = net(IDS)
        for other in others:
            assert torch.equal(other(IDS), expected)
            downgrade(other, 2)
            upgrade(other, MemorySource(grouped), bit_width=8)
            assert_linear_modules_compute_the_product(other, mode)
            assert other.head.packed_weight is other.embedding.packed_weight
        assert torch.equal(net(IDS), expected)
        assert plyweight.bit_widths_of(net) == (1, 2, 3, 4)


@choices
def test_layers_come_and_go_in_the_kernel(data, kernel, mode):
    require(kernel)
    net = loaded(data, bit_width=2, kernel=kernel, mode=mode)
    first = net.first.packed_weight
    one = first.kernel_bytes // 2
    with torch.no_grad():
        for target in (5, 3, 8, 1, 2):
            if target > plyweight.bit_widths_of(net)[-1]:
                upgrade(net, MemorySource(data), bit_width=target)
            else:
                downgrade(net, target)
            assert first.kernel_bytes == one * target
            assert_linear_modules_compute_the_product(net, mode)


@choices
def test_an_upgrade_moves_no_plane_that_is_there(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, bit_width=2, kernel=kernel, mode=mode)
    added, matrix = [], net.first.packed_weight._matrix
    ready = matrix.ready
    matrix.ready = lambda plane, index: (added.append(index), ready(plane, index))[1]
    upgrade(net, MemorySource(grouped), bit_width=4)
    assert net.first.packed_weight._matrix is matrix
    assert added == [2, 3]
    assert matrix.num_planes == 4


@choices
@pytest.mark.parametrize(
    ("bit_widths", "pinned"),
    [((2, 4, 8), {"second": 5, "first": 3}), ((1, 3, 6), {"first": 6}), ((2, 7), {})],
    ids=str,
)
def test_layers_of_several_planes_and_of_none_are_added_as_they_are_numbered(
    kernel, mode, bit_widths, pinned, tmp_path
):
    require(kernel)
    torch.manual_seed(0)
    model = plyweight.prepare(
        Net(), bit_widths=bit_widths, activations=None, group_size=8, pinned=pinned
    )
    pack(model, tmp_path / "net")
    whole = load(tmp_path / "net", Net(), kernel=kernel, mode=mode)
    net = load(tmp_path / "net", Net(), bit_width=bit_widths[0], kernel=kernel, mode=mode)
    with torch.no_grad():
        for bit_width in bit_widths[1:]:
            upgrade(net, tmp_path / "net", bit_width=bit_width)
            set_bit_width(whole, bit_width)
            assert torch.equal(net(IDS), whole(IDS))
        downgrade(net, bit_widths[0])
        upgrade(net, tmp_path / "net")
        for bit_width in bit_widths:
            set_bit_width(net, bit_width)
            set_bit_width(whole, bit_width)
            assert torch.equal(net(IDS), whole(IDS))


@choices
def test_a_kernel_that_changes_while_an_upgrade_is_read_takes_the_planes_too(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, bit_width=2, kernel=kernel, mode=mode)
    layers = HeldLayers.of(net)
    reader = ArtifactReader(MemorySource(grouped))
    ready = {i: layers.ready(i, reader.read_layer(i)) for i in (2, 3)}
    set_kernel(net, "reference")
    set_kernel(net, kernel, mode=mode)  # another matrix
    assert layers.grow(ready, 4, lambda: None)
    with torch.no_grad():
        assert_linear_modules_compute_the_product(net, mode)


@kernels
@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_an_upgrade_that_is_interrupted_leaves_the_kernel_as_it_was(
    grouped, kernel, after, monkeypatch
):
    require(kernel)
    net = loaded(grouped, bit_width=3, kernel=kernel, mode="int8")
    matrix = type(net.first.packed_weight._matrix)
    with torch.no_grad():
        expected = net(IDS)
    calls, ready = [], matrix.ready

    def interrupted(self, plane, index):
        add = ready(self, plane, index)

        def then_interrupt():
            calls.append(plane)
            add()
            if len(calls) == after:
                raise KeyboardInterrupt

        return then_interrupt

    monkeypatch.setattr(matrix, "ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upgrade(net, MemorySource(grouped))
    monkeypatch.undo()
    assert plyweight.bit_widths_of(net) == (1, 2, 3)
    with torch.no_grad():
        assert torch.equal(net(IDS), expected)
        upgrade(net, MemorySource(grouped))
        assert_linear_modules_compute_the_product(net, "int8")


@choices
def test_the_matrix_goes_with_its_model(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    gone = weakref.ref(net.first.packed_weight)
    del net
    gc.collect()
    assert gone() is None


@choices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_outputs_have_the_dtype_of_the_activations(grouped, kernel, mode, dtype):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    with torch.no_grad():
        expected = net(IDS)
        y = net.to(dtype)(IDS)
        assert y.dtype == dtype
        assert torch.allclose(y.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
        x = torch.randn(4, 24, dtype=dtype)
        assert torch.equal(net.first(x[:, None])[:, 0], net.first(x))


@choices
def test_eight_threads_compute_while_a_ninth_changes_width_and_kernel(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    expected = {}
    with torch.no_grad():
        for bit_width in (2, 5, 8):
            set_bit_width(net, bit_width)
            expected[bit_width] = net(IDS)

    def compute(_):
        with torch.no_grad():
            for _ in range(40):
                y = net(IDS)
                assert any(torch.equal(y, one) for one in expected.values())

    def change():
        for _ in range(5):
            for bit_width in (2, 5, 8):
                set_bit_width(net, bit_width)
            downgrade(net, 5)
            upgrade(net, MemorySource(grouped), bit_width=8)

    with ThreadPoolExecutor(9) as threads:
        changing = threads.submit(change)
        list(threads.map(compute, range(8)))
        changing.result()


@choices
def test_compiled_it_is_one_graph_that_serves_every_width(grouped, kernel, mode):
    require(kernel)
    torch._dynamo.reset()
    net = loaded(grouped, kernel=kernel, mode=mode)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for bit_width in ALL_BIT_WIDTHS:
            set_bit_width(net, bit_width)
            assert torch.equal(compiled(IDS), net(IDS))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@kernels
@pytest.mark.slow
def test_inductor_compiles_a_whole_model_around_its_kernels(grouped, kernel):
    require(kernel)
    torch._dynamo.reset()
    net = loaded(grouped, kernel=kernel, mode="int8")
    compiled = torch.compile(net)
    with torch.no_grad():
        for bit_width in (2, 8):
            set_bit_width(net, bit_width)
            assert torch.allclose(compiled(IDS), net(IDS), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@choices
def test_fake_tensors_go_through_and_only_shapes_are_followed(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        y = net.first(torch.empty(2, 3, 24))
        assert y.shape == (2, 3, 40)
        assert net.second.weight.shape == (24, 40)
        with pytest.raises(KernelError, match=r"takes floats \(..., 24\)"):
            net.first(torch.empty(2, 25))


@choices
def test_an_exported_program_computes_beside_its_model_and_nowhere_else(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    with torch.no_grad():
        program = torch.export.export(net, (IDS,), strict=False).module()
        assert torch.equal(program(IDS), net(IDS))
        del net
        gc.collect()
        with pytest.raises(KernelError, match="not in this process"):
            program(IDS)


@choices
def test_a_gradient_is_refused(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    x = torch.randn(2, 24, requires_grad=True)
    with pytest.raises(KernelError, match=r"a gradient .*set_kernel\(model, 'reference'\)"):
        net.first(x)
    with torch.no_grad():
        assert net.first(x).shape == (2, 40)
    assert not net.first(x.detach()).requires_grad
    with torch.inference_mode():
        assert net.first(torch.randn(2, 24)).shape == (2, 40)


@choices
@pytest.mark.parametrize(
    "x", [torch.zeros(2, 23), torch.zeros(()), torch.zeros(2, 24, dtype=torch.long)], ids=str
)
def test_activations_that_do_not_fit_are_refused(grouped, kernel, mode, x):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    with pytest.raises(KernelError, match=r"a weight \(40, 24\) takes floats"):
        net.first(x)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_multiplied_with_the_decoded_weight_where_that_is_faster(
    grouped, kernel, dtype, monkeypatch
):
    require(kernel)
    plain, net = (loaded(grouped, **options).to(dtype) for options in ({}, {"kernel": kernel}))
    x = torch.randn(5, 40).to(dtype)
    exact = F.linear(x.double(), plain.second.weight.double())
    with torch.no_grad():
        monkeypatch.setattr(kernel_weight, "DENSE_ROWS", {(kernel, dtype): 5})
        assert torch.equal(net.second(x), plain.second(x))
        set_kernel(net, kernel, mode="int8")
        assert not torch.equal(net.second(x), plain.second(x))
        set_kernel(net, kernel)
        monkeypatch.setattr(kernel_weight, "DENSE_ROWS", {(kernel, dtype): 6})
        by_kernel = net.second(x)
    scale = float(exact.abs().max())
    assert torch.allclose(by_kernel.double(), exact, atol=scale * 10 * torch.finfo(dtype).eps)


@kernels
def test_activations_may_be_strided_and_empty(grouped, kernel):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode="int8")
    x = torch.randn(24, 6)
    with torch.no_grad():
        assert torch.equal(net.first(x.T), net.first(x.T.contiguous()))
        assert net.first(torch.empty(2, 0, 24)).shape == (2, 0, 40)
        assert net.first(torch.randn(24)).shape == (40,)


def test_a_kernel_that_is_not_there_is_an_error_and_changes_nothing(grouped):
    net = loaded(grouped)
    for wrong, words in (("avx1024", "there is no kernel 'avx1024'"), ("triton", "on 'cpu'")):
        with pytest.raises(KernelError, match=words):
            set_kernel(net, wrong)
        with pytest.raises(KernelError, match=words):
            loaded(grouped, kernel=wrong)
    with pytest.raises(KernelError, match="the mode is 'int4'; give one of float, int8"):
        set_kernel(net, "reference", mode="int4")
    assert {type(packed) for packed in weights_of(net).values()} == {PackedWeight}


@choices
def test_a_device_that_the_kernel_is_not_for_is_refused_before_anything_moves(
    grouped, kernel, mode
):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    packed = net.second.packed_weight
    with pytest.raises(KernelError, match="on 'meta'"):
        packed.to("meta")
    assert packed.scale.device.type == "cpu"
    with torch.no_grad():
        assert_linear_modules_compute_the_product(net, mode)
    set_kernel(net, "reference")
    assert packed.to("meta").planes_of(0).is_meta


def test_a_model_that_moves_to_a_device_of_the_same_type_takes_its_planes_along(
    grouped, monkeypatch
):
    require("portable")
    net = loaded(grouped, kernel="portable")
    packed = net.second.packed_weight
    codes = [packed.planes_of(layer).clone() for layer in range(packed.num_held)]
    asked = []
    matrix = Kernel.matrix

    def recorded(self, *args, device, **options):
        asked.append(device)
        return matrix(self, *args, device=device, **options)

    monkeypatch.setattr(Kernel, "matrix", recorded)
    packed.to(torch.float64)
    assert asked == []  # it stays where it is
    # As on a machine with two GPUs; torch has one device of this type only.
    packed._like = torch.empty(0, device="meta")
    packed._apply(lambda tensor: torch.zeros(0) if tensor.is_meta else tensor)
    assert asked == ["cpu"]
    for layer, planes in enumerate(codes):
        assert torch.equal(packed.planes_of(layer), planes)


def test_models_without_packed_linear_modules_are_refused(grouped):
    for wrong in (Net(), loaded(grouped, form="fake-quantized")):
        with pytest.raises(LayeringError, match="no packed linear module"):
            set_kernel(wrong, "reference")
    with pytest.raises(LayeringError, match="only packed models"):
        loaded(grouped, form="fake-quantized", kernel="reference", mode="int8")


def test_a_change_of_kernel_waits_for_no_lease_of_its_own_thread(grouped):
    net = loaded(grouped)
    with plyweight.lease(net), pytest.raises(LayeringError, match="holds a lease"):
        set_kernel(net, "reference", mode="int8")
    assert {type(packed) for packed in weights_of(net).values()} == {PackedWeight}


@choices
def test_printing_shows_what_computes_and_why(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped)
    assert "kernel=reference)" in repr(net)
    set_kernel(net, kernel, mode=mode)
    assert f"kernel={kernel} (it was asked for), mode={mode})" in repr(net)


def test_where_auto_is_the_reference_weights_are_decoded_and_the_reason_is_shown(
    grouped, monkeypatch
):
    net, plain = loaded(grouped, kernel="reference", mode="int8"), loaded(grouped)
    monkeypatch.setenv("PLYWEIGHT_KERNEL", "reference")
    set_kernel(net, "auto")
    assert {type(packed) for packed in weights_of(net).values()} == {PackedWeight}
    assert "kernel=reference (PLYWEIGHT_KERNEL demands it))" in repr(net)
    with torch.no_grad():
        assert torch.equal(net(IDS), plain(IDS))
    set_kernel(net, "auto", mode="int8")
    assert {packed.kernel.name for packed in weights_of(net).values()} == {"reference"}


@pytest.mark.parametrize("net", [ConvNet, ZooNet])
def test_convolutions_and_what_else_decodes_are_left_alone(net, tmp_path):
    pack(trained(net()), tmp_path / "net")
    plain, other = (load(tmp_path / "net", net()) for _ in range(2))
    set_kernel(other, "auto")
    images = batch()[0]
    with torch.no_grad():
        for bit_width in (2, 8):
            set_bit_width(plain, bit_width)
            set_bit_width(other, bit_width)
            expected = plain(images)
            atol = 1e-4 * float(expected.abs().max())
            assert torch.allclose(other(images), expected, rtol=1e-4, atol=atol)
    for packed in weights_of(other).values():
        assert (type(packed) is KernelWeight) <= (len(packed.shape) == 2)
    assert any(type(p) is KernelWeight for p in weights_of(other).values()) == (
        native.missing_because() is None
    )


def test_a_numbers_weight_is_found_by_its_number_alone(grouped):
    net, other = (loaded(grouped, kernel="reference", mode="int8") for _ in range(2))
    numbers = [packed._number for one in (net, other) for packed in weights_of(one).values()]
    assert len(set(numbers)) == len(numbers)
    x = torch.zeros(1, 24)
    packed = net.first.packed_weight
    with pytest.raises(KernelError, match="weight 0 are not in this process"):
        torch.ops.plyweight.product(x, packed.scale, packed.row, None, 0)
    assert np.array_equal(packed.planes_of(0), other.first.packed_weight.planes_of(0))
