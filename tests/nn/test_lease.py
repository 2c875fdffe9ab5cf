"""Whoever computes with a model holds a lease, and who changes it waits for them, not for ever."""

import copy
import inspect
import io
import pickle
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from plyweight.errors import LayeringError
from plyweight.nn import at_bit_width, bit_widths_of, prepare, set_bit_width
from plyweight.nn.bit_width import lease
from plyweight.nn.lease import Leases, change, grant_leases, leases_of
from plyweight.nn.packed import PackedLinear, PackedWeight
from plyweight.quantizers import Switchable

PATIENCE_S = 60  # until a thread that should have ended is called stuck


@pytest.fixture
def leases():
    return Leases()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def wait_until_closed(leases):
    """Until a change has the gate: it waits for leases, or is under way."""
    stop = time.monotonic() + PATIENCE_S
    while leases._gate.acquire(blocking=False):
        leases._gate.release()
        assert time.monotonic() < stop
        time.sleep(0)


class _CountedGate:
    """A gate that says when somebody asks to pass."""

    def __init__(self, gate):
        self.gate, self.asked = gate, threading.Semaphore(0)

    def __enter__(self):
        self.asked.release()
        return self.gate.__enter__()

    def __exit__(self, *error):
        return self.gate.__exit__(*error)


def test_a_change_waits_for_the_leases_under_way_and_later_ones_wait_for_it(leases, threads):
    order, go_on = [], threading.Event()
    holding = threading.Barrier(4)

    def hold():
        holding.wait(PATIENCE_S)
        assert go_on.wait(PATIENCE_S)
        order.append("held before")

    held = [threads.submit(leases.run, hold) for _ in range(3)]
    holding.wait(PATIENCE_S)
    assert leases.num_under_way == 3
    changed = threads.submit(leases.change, lambda: order.append("change"))
    wait_until_closed(leases)
    gate = leases._gate = _CountedGate(leases._gate)
    later = [threads.submit(leases.run, order.append, "asked later") for _ in range(8)]
    for _ in later:
        assert gate.asked.acquire(timeout=PATIENCE_S)
    assert order == []  # all have asked, and none went by
    go_on.set()
    for future in (changed, *held, *later):
        future.result(PATIENCE_S)
    assert order == ["held before"] * 3 + ["change"] + ["asked later"] * 8
    assert leases.num_under_way == 0


def test_a_thread_that_holds_a_lease_takes_further_ones_although_a_change_waits(leases, threads):
    order, go_on, has_lease = [], threading.Event(), threading.Event()

    def request():
        with leases.hold():
            has_lease.set()
            assert go_on.wait(PATIENCE_S)
            with leases.hold():
                leases.run(order.append, "nested")
                assert leases.num_under_way == 2
            order.append("outer")

    requested = threads.submit(request)
    assert has_lease.wait(PATIENCE_S)
    changed = threads.submit(leases.change, lambda: order.append("change"))
    wait_until_closed(leases)
    go_on.set()
    requested.result(PATIENCE_S)
    changed.result(PATIENCE_S)
    assert order == ["nested", "outer", "change"]


def test_leases_of_one_thread_may_end_in_any_order(leases, threads):
    # As those of coroutines do, which take turns in one thread.
    first, second = leases.hold(), leases.hold()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    order = []
    changed = threads.submit(leases.change, lambda: order.append("change"))
    wait_until_closed(leases)
    order.append("second ends")
    second.__exit__(None, None, None)
    changed.result(PATIENCE_S)
    assert order == ["second ends", "change"]


def test_a_lease_may_end_in_another_thread_or_with_its_generator(leases, threads):
    def tokens():
        with leases.hold():
            yield from range(3)

    stream = tokens()
    assert threads.submit(next, stream).result() == 0
    assert leases.num_under_way == 1
    stream.close()
    assert leases.change(lambda: "changed") == "changed"
    stream = tokens()
    next(stream)
    del stream
    assert leases.change(lambda: "changed") == "changed"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_lease_ends_with_the_error_of_its_request(leases, error):
    def fail():
        raise error

    with pytest.raises(error):
        leases.run(fail)
    with pytest.raises(error), leases.hold():
        fail()
    assert leases.num_under_way == 0
    with pytest.raises(error):
        leases.change(fail)
    assert leases.change(lambda: leases.num_under_way) == 0
    assert leases.run(lambda: leases.num_under_way) == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_a_keyboard_interrupt_at_any_moment_leaves_no_lease(leases):
    def interrupt(_, frame):
        while frame:
            if frame.f_globals["__name__"].partition(".")[0] == "coverage":
                # Which would keep a lock of its own for ever; a little later then.
                signal.setitimer(signal.ITIMER_REAL, 20e-6)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def in_a_block():
        with leases.hold():
            pass

    requests = [lambda: leases.run(int), lambda: leases.change(int), in_a_block]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(600):
            request = requests[number % 3]
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(20e-6, 400e-6))
                while True:
                    request()
            except KeyboardInterrupt as error:
                kept = error  # a traceback keeps what its frames refer to
            if request is in_a_block:
                kept = None
            assert leases.num_under_way == 0
            assert leases.change(lambda: "changed") == "changed"
            del kept
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # No other thread is kept out either.
    thread = threading.Thread(target=leases.change, args=(int,), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_change_by_the_thread_that_holds_a_lease_is_refused(leases):
    words = "this thread holds a lease of the model, .* change it outside of its calls"
    with leases.hold(), pytest.raises(LayeringError, match=words):
        leases.change(int)
    with pytest.raises(LayeringError, match=words):
        leases.run(leases.change, int)
    assert leases.change(int) == 0


def test_a_signal_handler_may_change_the_model_at_any_moment_outside_of_a_lease(leases):
    changed = []

    class Interrupted(dict):
        def __setitem__(self, lock, thread):  # where the gate is held
            if not changed:
                changed.append(leases.change(lambda: "changed"))
            super().__setitem__(lock, thread)

    leases._under_way = Interrupted()
    assert leases.run(lambda: "computed") == "computed"
    assert changed == ["changed"]


# --- models --------------------------------------------------------------------------------------


class Net(nn.Module):
    """What ``load`` makes is like this: packed modules, and leases for the whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, inputs, *, scale=1.0):
        """Two layers."""
        return self.second(self.first(inputs).relu()) * scale


def pack_in_place(module):
    weight = PackedWeight(
        tuple(module.weight.shape), torch.rand(len(module.weight)), (2, 4, 8), dtype=torch.float32
    )
    for layer, planes in enumerate((2, 2, 4)):
        num_bytes = -(-module.weight.numel() // 8)
        weight.hold(layer, torch.randint(256, (planes, num_bytes)).to(torch.uint8), None)
    PackedLinear.from_float(module, weight)
    return module.requires_grad_(False)


def leased(net=None):
    net = (net or Net()).eval()
    for module in list(net.modules()):
        if type(module) is nn.Linear:
            pack_in_place(module)
    grant_leases(net)
    return net


INPUTS = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [Net, lambda: nn.Linear(6, 5), lambda: nn.Sequential(Net())])
def test_a_call_of_the_model_holds_a_lease_hooks_and_all(make):
    net, seen = leased(make()), []
    for register in (net.register_forward_pre_hook, net.register_forward_hook):
        register(lambda *_: seen.append(leases_of(net).num_under_way))
    net(INPUTS)
    assert seen == [1, 1]
    assert leases_of(net).num_under_way == 0


def test_the_model_is_still_of_its_class(tmp_path):
    net = leased()
    assert isinstance(net, Net)
    assert (type(net).__name__, type(net).__module__) == ("Net", Net.__module__)
    assert type(net) is type(leased())
    assert repr(net).startswith("Net(\n  (first): PackedLinear(")
    assert type(net).__doc__ == Net.__doc__
    assert inspect.signature(net.forward) == inspect.signature(Net().forward)
    assert torch.equal(net(INPUTS, scale=2.0), 2 * net(INPUTS))
    assert not [name for name in net.state_dict() if "lease" in name]


def test_a_model_is_freed_with_its_last_reference():
    net = leased()
    freed = []
    net.first.packed_weight.register_buffer("watched", _Watched(torch.ones(1), freed))
    net(INPUTS)
    del net
    assert freed == [True]  # not only when the garbage collector looks for cycles


class _Watched(torch.Tensor):
    def __new__(cls, tensor, freed):
        self = tensor.as_subclass(cls)
        self.freed = freed
        return self

    def __del__(self):
        self.freed.append(True)


def _saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        _saved,
        *(lambda net, p=p: pickle.loads(pickle.dumps(net, p)) for p in (1, 2, 5)),
    ],
)
@pytest.mark.parametrize("make", [Net, lambda: nn.Linear(6, 5)])
def test_a_copy_has_fresh_leases_of_its_own(copied, make):
    net = leased(make())
    with lease(net):
        twin = copied(net)
        set_bit_width(twin, 2)  # its lease is another one
        assert leases_of(net).num_under_way == 1
    assert leases_of(twin) is not leases_of(net)
    assert type(twin) is type(net)
    set_bit_width(net, 2)
    assert torch.equal(twin(INPUTS), net(INPUTS))
    seen = []
    twin.register_forward_hook(lambda *_: seen.append(leases_of(twin).num_under_way))
    twin(INPUTS)
    assert seen == [1]


def test_a_shallow_copy_shares_weights_and_leases():
    net = leased()
    assert leases_of(copy.copy(net)) is leases_of(net)


def test_other_ways_to_use_a_module_still_work():
    net = leased()
    expected = net(INPUTS)
    assert torch.equal(torch.func.functional_call(net, dict(net.named_buffers()), INPUTS), expected)
    assert torch.equal(nn.Sequential(net, nn.Identity())(INPUTS), expected)
    assert torch.equal(torch.export.export(net, (INPUTS,)).module()(INPUTS), expected)
    assert copy.deepcopy(net).to(torch.bfloat16)(INPUTS.bfloat16()).dtype == torch.bfloat16
    assert net.train().training
    assert not net.eval().training


def test_a_replica_computes_with_its_own_weights_and_waits_for_nobody(threads):
    net = leased()
    with lease(nn.DataParallel(net)):
        replica = net._replicate_for_data_parallel()
        replica.first = pack_in_place(nn.Linear(6, 5))
        changed = threads.submit(set_bit_width, net, 2)
        wait_until_closed(leases_of(net))
        outputs = threads.submit(replica, INPUTS).result(PATIENCE_S)
        assert not torch.equal(outputs, net(INPUTS))
    changed.result(PATIENCE_S)
    assert torch.equal(nn.DataParallel(net)(INPUTS), net(INPUTS))


def test_a_traced_function_module_is_leased_too():
    net = leased(torch.fx.symbolic_trace(Net()))
    seen = []
    net.second.register_forward_hook(lambda *_: seen.append(leases_of(net).num_under_way))
    net(INPUTS)
    assert seen == [1]
    assert torch.equal(copy.deepcopy(net)(INPUTS), net(INPUTS))


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_one_graph_for_each_width_without_a_break():
    net, counter = leased(), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    around = torch.compile(lambda x: net(x) + 1, backend="eager", fullgraph=True)
    for bit_width in (2, 4, 8):
        set_bit_width(compiled, bit_width)
        expected = net(INPUTS)
        with lease(compiled) as held:
            assert held == bit_width
            for _ in range(2):
                assert torch.equal(compiled(INPUTS), expected)
        assert torch.equal(around(INPUTS), expected + 1)
    assert counter.frame_count == 3


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_model_that_is_compiled_in_place_goes_on_holding_leases(monkeypatch):
    net, counter, seen = leased(), CompileCounter(), []
    expected = net(INPUTS)
    net.compile(backend=counter, fullgraph=True)
    run = Leases.run

    def counted(self, *args, **kwargs):
        seen.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Leases, "run", counted)
    assert torch.equal(net(INPUTS), expected)
    assert counter.frame_count == 1
    assert seen == [leases_of(net)]


def test_a_lease_keeps_a_model_at_its_width_over_several_calls(threads):
    net = leased()
    set_bit_width(net, 2)
    at_2 = net(INPUTS)
    set_bit_width(net, 8)
    at_8 = net(INPUTS)
    with lease(net) as bit_width:
        assert bit_width == 8
        changed = threads.submit(set_bit_width, net, 2)
        wait_until_closed(leases_of(net))
        assert all(torch.equal(net(INPUTS), at_8) for _ in range(3))
    changed.result(PATIENCE_S)
    with lease(net) as bit_width:
        assert bit_width == 2
    assert torch.equal(net(INPUTS), at_2)


def test_only_a_loaded_model_has_leases():
    layered = prepare(nn.Sequential(nn.Linear(3, 2)), (2, 8))
    for wrong in (nn.Linear(3, 2), layered, nn.Sequential(leased()), None, "net"):
        words = f"this {type(wrong).__name__} has no leases; give the very model"
        with pytest.raises(LayeringError, match=words), lease(wrong):
            raise AssertionError


def test_another_bit_width_is_refused_inside_of_a_lease_and_of_a_call():
    net = leased()
    for choose in (set_bit_width, lambda net, b: at_bit_width(net, b).__enter__()):
        with lease(net), pytest.raises(LayeringError, match="this thread holds a lease"):
            choose(net, 2)
        handle = net.second.register_forward_pre_hook(lambda *_, choose=choose: choose(net, 2))
        with pytest.raises(LayeringError, match="this thread holds a lease"):
            net(INPUTS)
        handle.remove()
    with lease(net) as bit_width:
        assert bit_width == 8


def test_loaded_models_inside_of_another_are_switched_with_it(threads):
    first, second = leased(), leased()
    layered = prepare(nn.Linear(3, 2), (2, 4, 8))
    pipeline = nn.ModuleList([first, layered, second])
    order = []
    with lease(second):
        changed = threads.submit(set_bit_width, pipeline, 2)
        changed.add_done_callback(lambda _: order.append("changed"))
        wait_until_closed(leases_of(second))
        # It has the first by now, and does not keep it from others.
        assert threads.submit(first, INPUTS).result(PATIENCE_S).shape == (3, 4)
        order.append("lease ends")
    changed.result(PATIENCE_S)
    assert order == ["lease ends", "changed"]
    assert {m.bit_width for m in pipeline.modules() if isinstance(m, Switchable)} == {2}
    assert bit_widths_of(pipeline) == (2, 4, 8)


def test_an_interrupted_switch_leaves_all_modules_at_one_width(monkeypatch):
    net, switch, calls = leased(), Switchable.switch, []

    def interrupted(self, bit_width):
        calls.append(bit_width)
        if len(calls) == 2:
            raise KeyboardInterrupt
        switch(self, bit_width)

    monkeypatch.setattr(Switchable, "switch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_bit_width(net, 2)
    assert calls == [2, 2, 8, 8]
    assert {m.bit_width for m in net.modules() if isinstance(m, Switchable)} == {8}


def test_a_change_waits_for_the_accelerator_before_and_after(monkeypatch):
    net, order = leased(), []
    device = net.first.packed_weight.row.device
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(torch.accelerator, "synchronize", order.append)
    change(net, lambda: order.append("change"))
    assert order == [device, "change", device]
