"""What happens when a kernel, a tensor of its weight, or the world around a product changes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from kernels.loaded import (
    IDS,
    assert_linear_modules_compute_the_product,
    choices,
    kernels,
    loaded,
    packed_net,
    weights_of,
)
from kernels.weights import require
from nets import ALL_BIT_WIDTHS, with_rows
from torch import nn

import plyweight
from plyweight.artifact import MemorySource
from plyweight.errors import KernelError, LayeringError
from plyweight.kernels import MODES, available
from plyweight.loading import downgrade, load, upgrade
from plyweight.nn import choosing, kernel_weight, set_bit_width
from plyweight.nn.choosing import set_kernel
from plyweight.nn.kernel_weight import KernelWeight
from plyweight.nn.packed import PackedWeight
from plyweight.packing import pack

modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    return packed_net(tmp_path_factory.mktemp("grouped"), group_size=8)


def assert_computes_with(net, kernel):
    for packed in weights_of(net).values():
        assert packed.kernel.name == kernel
        assert packed._matrix.kernel == kernel
        assert packed.kernel_name.startswith(f"{kernel} (")


@modes
def test_one_kernel_takes_over_from_another(grouped, mode):
    net = loaded(grouped, bit_width=5, kernel=available()[0], mode="int8")
    weight = net.first.weight
    for _, kernel in pairwise([*available(), *available()]):
        if (kernel, mode) == ("reference", "float"):
            continue
        set_kernel(net, kernel, mode=mode)
        assert_computes_with(net, kernel)
        with torch.no_grad():
            for bit_width in (1, 5, 2):
                set_bit_width(net, bit_width)
                assert_linear_modules_compute_the_product(net, mode)
        set_bit_width(net, 5)
        assert torch.equal(net.first.weight, weight)
        upgrade(net, MemorySource(grouped), bit_width=8)
        downgrade(net, 5)


def test_eight_threads_compute_while_one_kernel_takes_over_from_another(grouped):
    two = available()[:2]  # the last is the reference, so there are two with the native library
    if len(two) < 2:
        pytest.skip("only the reference runs here")
    net = loaded(grouped, kernel=two[0], mode="int8")
    with torch.no_grad():
        expected = net(IDS)  # bit for bit whatever the kernel

    def compute(_):
        with torch.no_grad():
            return all(torch.equal(net(IDS), expected) for _ in range(40))

    def change():
        for _ in range(5):
            for kernel in two[::-1]:
                set_kernel(net, kernel, mode="int8")
                assert_computes_with(net, kernel)

    with ThreadPoolExecutor(9) as threads:
        changing = threads.submit(change)
        assert all(threads.map(compute, range(8)))
        changing.result()
    assert_computes_with(net, two[0])


@modes
def test_auto_is_picked_anew_and_says_why(grouped, mode, monkeypatch):
    fast = [name for name in available() if name != "reference"]
    if len(fast) < 2:
        pytest.skip("one native kernel at most runs here")
    net = loaded(grouped, kernel="auto", mode=mode)
    assert_computes_with(net, fast[0])
    monkeypatch.setenv("PLYWEIGHT_KERNEL", fast[1])
    set_kernel(net, "auto", mode=mode)
    assert_computes_with(net, fast[1])
    assert f"kernel={fast[1]} (PLYWEIGHT_KERNEL demands it), mode={mode})" in repr(net)
    matrix = net.first.packed_weight._matrix
    set_kernel(net, fast[1], mode=mode)  # the same, for another reason
    assert f"kernel={fast[1]} (it was asked for), mode={mode})" in repr(net)
    assert net.first.packed_weight._matrix is matrix


@kernels
def test_no_memory_for_the_second_weight_leaves_all_with_the_kernel_they_had(
    grouped, kernel, monkeypatch
):
    require(kernel)
    for is_leased, before in (
        (True, {}),
        (True, {"kernel": "reference", "mode": "int8"}),
        (False, {}),
    ):
        net = loaded(grouped, **before)
        given = net if is_leased else nn.ModuleList(net.children())
        with torch.no_grad():
            expected = net(IDS)
        take, taken = KernelWeight.take.__func__, []

        def fails(packed, asked, mode, take=take, taken=taken):
            taken.append(asked)
            if len(taken) == 2:
                raise MemoryError
            take(KernelWeight, packed, asked, mode)

        with monkeypatch.context() as patch:
            patch.setattr(KernelWeight, "take", fails)
            with pytest.raises(MemoryError):
                set_kernel(given, kernel)
        assert taken[:2] == [kernel, kernel]
        names = {packed.kernel_name.split()[0] for packed in weights_of(net).values()}
        assert names == {"reference"}
        with torch.no_grad():
            assert torch.equal(net(IDS), expected)


@kernels
def test_parts_with_leases_of_their_own_are_all_changed_or_none(grouped, kernel, monkeypatch):
    require(kernel)
    parts = nn.ModuleList([loaded(grouped), loaded(grouped)])
    choose, told = kernel_weight.choose, []

    def fails(packed, asked, mode):
        told.append(asked)
        if packed is parts[1].first.packed_weight and asked == kernel:
            raise MemoryError
        choose(packed, asked, mode)

    with monkeypatch.context() as patch:
        patch.setattr(choosing, "choose", fails)
        with pytest.raises(MemoryError):
            set_kernel(parts, kernel)
    assert told.count(kernel) == 4  # the three of the first part, and one more
    with plyweight.lease(parts[1]), pytest.raises(LayeringError, match="holds a lease"):
        set_kernel(parts, kernel)
    assert {type(packed) for packed in weights_of(parts).values()} == {PackedWeight}
    set_kernel(parts, kernel)
    assert {type(packed) for packed in weights_of(parts).values()} == {KernelWeight}


def test_a_weight_that_a_kernel_cannot_hold_is_refused_before_anything_moves(grouped, monkeypatch):
    pick = kernel_weight.pick

    class OfGroups:
        name, reason, device = "triton", "", "cpu"

        def matrix(self, shape, *, group_size, device):
            if shape == (24, 40):
                raise KernelError(f"no groups of {group_size}")

    def picked(kernel, **options):
        return OfGroups() if kernel == "triton" else pick(kernel, **options)

    net = loaded(grouped, kernel="reference", mode="int8")
    before = {name: packed._matrix for name, packed in weights_of(net).items()}
    monkeypatch.setattr(kernel_weight, "pick", picked)
    with pytest.raises(KernelError, match="no groups of 8"):
        set_kernel(net, "triton")
    assert all(packed._matrix is before[name] for name, packed in weights_of(net).items())


@choices
def test_gains_come_and_go_at_one_width(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    packed = net.first.packed_weight
    gain = packed.gain_8
    assert not torch.equal(gain, torch.ones_like(gain))
    x = torch.randn(3, 24)
    with torch.no_grad():
        first = net.first(x)
        downgrade(net, 2)
        assert_linear_modules_compute_the_product(net, mode)
        upgrade(net, MemorySource(grouped), bit_width=8)
        assert torch.equal(net.first(x), first)
        downgrade(net, 7)
        for one in weights_of(net).values():  # another artifact's
            one.hold(7, torch.zeros_like(one.planes_of(6)), gain * 2 if one is packed else None)
        set_bit_width(net, 8)
        assert torch.equal(packed.scale_at(8), packed.scale * gain * 2)
        assert_linear_modules_compute_the_product(net, mode)


@choices
def test_a_model_of_another_dtype_computes_with_its_own_scale(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    other = loaded(grouped).half()
    set_kernel(other, kernel, mode=mode)
    x = torch.randn(3, 24)
    with torch.no_grad():
        float32 = net.first(x)
        net.half()
        assert net.first.packed_weight.gain_8.dtype == torch.float16
        assert torch.equal(net.first(x.half()), other.first(x.half()))
        assert not torch.equal(net.first(x.half()).float(), float32)


@choices
def test_a_state_that_cannot_be_loaded_leaves_the_kernel(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    state = net.state_dict()

    class Uncopyable:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    state["first.packed_weight.scale"] = Uncopyable()
    with torch.no_grad():
        expected = net(IDS)
        with pytest.raises(KeyboardInterrupt):
            net.load_state_dict(state)
        assert_computes_with(net, kernel)
        assert torch.equal(net(IDS), expected)


@choices
def test_a_scale_is_made_ready_once_for_widths_that_share_it_or_take_turns(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    made = []
    # The gains of one are one number each; those of the other have the size of the scale.
    for module, widths, num_scales in ((net.second, ALL_BIT_WIDTHS, 1), (net.first, (2, 8), 2)):
        packed = module.packed_weight
        assert (packed.gain_2.numel() == 1) == (num_scales == 1)
        x, ready = torch.randn(3, module.in_features), packed._matrix.ready_scale
        packed._matrix.ready_scale = lambda scale, ready=ready: (made.append(1), ready(scale))[1]
        with torch.no_grad():
            for bit_width in widths * 3:
                set_bit_width(net, bit_width)
                module(x)
        assert len(made) == num_scales
        made.clear()
        assert len(packed._scales._scales) <= 2
    downgrade(net, 3)
    with torch.no_grad():
        assert_linear_modules_compute_the_product(net, mode)


@choices
def test_a_gain_that_is_one_number_is_computed_with_as_it_is(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    set_bit_width(net, 2)
    gain = net.second.packed_weight.gain_2
    x = torch.randn(3, 40)
    with torch.no_grad():
        y = net.second(x)
        gain.mul_(2)
        assert torch.equal(net.second(x), 2 * y)
        net.second.packed_weight.gain_2 = gain * 2
        assert torch.equal(net.second(x), 4 * y)
        assert_linear_modules_compute_the_product(net, mode)


@choices
def test_a_scale_that_was_exchanged_or_written_to_is_computed_with(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    x = torch.randn(3, 24)
    name = "packed_weight.scale"
    with torch.no_grad():
        first, weight = net.second(torch.randn(3, 40)), net.first.weight
        y = net.first(x) - net.first.bias
        twice = {name: net.first.packed_weight.scale * 2}
        other = torch.func.functional_call(net.first, twice, (x,))
        assert torch.allclose(other - net.first.bias, 2 * y, rtol=1e-5, atol=1e-6)
        assert torch.equal(net.first(x) - net.first.bias, y)
        net.first.packed_weight.scale.mul_(2)
        assert torch.allclose(net.first(x) - net.first.bias, 2 * y, rtol=1e-5, atol=1e-6)
        assert torch.equal(net.first.weight, 2 * weight)
        net.first.packed_weight.gain_8.mul_(2)
        assert torch.allclose(net.first(x) - net.first.bias, 4 * y, rtol=1e-5, atol=1e-6)
        assert_linear_modules_compute_the_product(net, mode)
        assert first.shape == (3, 24)
        packed = net.head.packed_weight
        row = torch.ops.plyweight.rows(
            torch.tensor(3), packed.scale * 2, packed.row, packed._like, packed._number
        )
        assert torch.equal(row, 2 * net.embedding(torch.tensor(3)))


@choices
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of torch's own jvp
def test_forward_mode_derivatives_are_refused(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    x = torch.randn(2, 24)
    words = r"a forward-mode derivative .*set_kernel\(model, 'reference'\)"
    with fwd.dual_level():
        with pytest.raises(KernelError, match=words):
            net.first(fwd.make_dual(x, x))
        with torch.no_grad(), pytest.raises(KernelError, match=words):
            net.first(fwd.make_dual(x, x))
        with pytest.raises(KernelError, match=words):
            F.linear(
                x,
                torch.func.functional_call(
                    net.first.packed_weight,
                    {"scale": fwd.make_dual(net.first.packed_weight.scale, x.new_ones(40, 3))},
                    (),
                ),
            )
        assert net.first(x).shape == (2, 40)
    for derivative in (
        lambda: torch.func.jvp(net.first, (x,), (x,)),
        lambda: torch.func.jacfwd(net.first)(x),
    ):
        with pytest.raises(KernelError, match=words):
            derivative()
    with pytest.raises(KernelError, match="a gradient"):
        torch.func.vjp(net.first, x)


@choices
def test_a_bias_may_be_trained_beside_a_kernel(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, bit_width=8, kernel=kernel, mode=mode)
    net.first._parameters["bias"].requires_grad_()
    net.first(torch.randn(3, 24)).sum().backward()
    assert float(net.first._parameters["bias"].grad.sum()) == 3 * 40


@choices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_results_have_the_dtype_of_the_reference(grouped, kernel, mode, dtype):
    require(kernel)
    net, plain = loaded(grouped, kernel=kernel, mode=mode), loaded(grouped)
    x = torch.randn(4, 24)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=dtype):
            for given in (x, x.bfloat16(), x.half()):
                assert net.first(given).dtype == plain.first(given).dtype == dtype
            y = net.first(x)
        by_float32 = net.first(x.to(dtype).float())  # with its bias
        assert torch.equal(y, by_float32.to(dtype))  # rounded once
        with torch.autocast("cpu", enabled=False):
            assert net.first(x).dtype == torch.float32


@choices
def test_a_bias_is_added_before_the_one_rounding_and_widens_nothing(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        net.first.packed_weight.bfloat16()  # its bias stays float32
        packed = net.first.packed_weight
        exact = packed.product_of(x.float(), packed.scale, None) + net.first.bias
        y = net.first(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, exact.bfloat16())
        twice = (exact - net.first.bias).bfloat16() + net.first.bias.bfloat16()
        assert not torch.equal(y, twice)


@choices
def test_activations_of_another_dtype_than_the_models_are_refused_as_torch_does(
    grouped, kernel, mode
):
    require(kernel)
    net, plain = loaded(grouped, kernel=kernel, mode=mode), loaded(grouped)
    with torch.no_grad():
        for model, wrong in (
            (torch.float32, torch.float64),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ):
            for one in (net, plain):
                one.to(model)
            x = torch.randn(2, 24, dtype=wrong)
            with pytest.raises(RuntimeError):
                plain.first(x)
            with pytest.raises(KernelError, match=f"are {wrong}.* of the model's {model}"):
                net.first(x)


@choices
def test_an_exported_program_says_that_its_kernel_is_gone(grouped, kernel, mode):
    require(kernel)
    net = loaded(grouped, kernel=kernel, mode=mode)
    with torch.no_grad():
        program = torch.export.export(net, (IDS,), strict=False).module()
        expected = program(IDS)
        set_kernel(net, "reference")
        with pytest.raises(KernelError, match=r"held by no kernel any more.*export again"):
            program(IDS)
        net.load_state_dict(net.state_dict())
        assert expected.shape == (3, 4, 11)


def test_a_plain_weight_that_was_unpickled_keeps_nothing_of_a_kernel(grouped, monkeypatch):
    net = loaded(grouped, kernel="auto")
    if net.first.packed_weight.kernel_name.startswith("reference"):
        pytest.skip("auto is the reference here")
    written = pickle.dumps(net)
    monkeypatch.setenv("PLYWEIGHT_KERNEL", "reference")
    for other in (pickle.loads(written), copy.deepcopy(net)):
        plain = loaded(grouped)
        for name, packed in weights_of(other).items():
            kept = set(vars(packed)) - {"kernel_reason"}
            assert kept == set(vars(plain.get_submodule(name))) - {"kernel_reason"}
            assert packed.kernel_name == "reference (PLYWEIGHT_KERNEL demands it)"
        with torch.no_grad():
            assert torch.equal(other(IDS), plain(IDS))


@choices
def test_a_state_is_read_under_a_lease_while_another_thread_upgrades(tmp_path, kernel, mode):
    require(kernel)
    net = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    model = plyweight.prepare(net, ALL_BIT_WIDTHS, activations=None, group_size=8)
    pack(with_rows(model), tmp_path / "net")
    held = load(tmp_path / "net", net, kernel=kernel, mode=mode)

    def change():
        for _ in range(20):
            downgrade(held, 2)
            upgrade(held, tmp_path / "net")

    with ThreadPoolExecutor(1) as threads:
        changing = threads.submit(change)
        while not changing.done():
            with plyweight.lease(held):
                state, copied = held.state_dict(), copy.deepcopy(held)
            for i in (0, 1):
                num = sum(name.startswith(f"{i}.packed_weight.planes_") for name in state)
                assert num == copied[i].packed_weight.num_held
        changing.result()
