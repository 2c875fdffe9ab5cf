"""Loaded models change their width while other threads compute with them."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from nets import ALL_BIT_WIDTHS, ConvNet, batch, trained

import plyweight
from plyweight.artifact import MemorySource
from plyweight.errors import BitWidthError, DigestError, LayeringError
from plyweight.loading import downgrade, load, start_upgrade, upgrade
from plyweight.nn import bit_widths_of
from plyweight.nn.lease import leases_of
from plyweight.packing import pack

PATIENCE_S = 60  # for what takes milliseconds, on however busy a machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("threads") / "net"
    pack(trained(ConvNet()), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def expected(data):
    """The logits of each bit-width, from a model that holds no more than that."""
    images, _ = batch()
    with torch.no_grad():
        return {b: load(MemorySource(data), ConvNet(), bit_width=b)(images) for b in ALL_BIT_WIDTHS}


def width_of(logits, expected):
    """The one bit-width whose logits these are, bit for bit."""
    found = [b for b, reference in expected.items() if torch.equal(logits, reference)]
    assert len(found) == 1, "the logits are those of no bit-width"
    return found[0]


@pytest.mark.slow
def test_row_28_eight_threads_compute_at_one_width_each_while_a_ninth_goes_up_and_down(
    data, expected
):
    images, _ = batch()
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    done = threading.Event()

    def infer():
        seen = set()
        with torch.no_grad():
            while not done.is_set():
                seen.add(width_of(model(images), expected))
        return seen

    def go_up_and_down():
        try:
            for number in range(1000):
                widest = (8, 4, 3, 6)[number % 4]
                upgrade(model, MemorySource(data), bit_width=widest)
                downgrade(model, (2, 1)[number % 2])
        finally:
            done.set()

    with ThreadPoolExecutor(9) as threads:
        requests = [threads.submit(infer) for _ in range(8)]
        threads.submit(go_up_and_down).result()
        seen = [request.result() for request in requests]
    assert len(set.union(*seen)) > 1
    assert bit_widths_of(model) == (1,)
    with torch.no_grad():
        assert torch.equal(model(images), expected[1])


def test_a_lease_keeps_the_planes_that_another_thread_gives_back(data, expected):
    images, _ = batch()
    model = load(MemorySource(data), ConvNet())
    with ThreadPoolExecutor(1) as threads, torch.no_grad():
        with plyweight.lease(model) as bit_width:
            down = threads.submit(downgrade, model, 2)
            assert bit_width == 8
            assert all(torch.equal(model(images), expected[8]) for _ in range(3))
        down.result(PATIENCE_S)
        assert torch.equal(model(images), expected[2])
    assert bit_widths_of(model) == (1, 2)


class Slow:
    """A source whose later layers come only when they are let go."""

    def __init__(self, data, stop):
        self._inner, self._stop = MemorySource(data), stop
        self.name, self.asked, self.go_on = "slow", threading.Event(), threading.Event()

    def size(self):
        return self._inner.size()

    def read(self, byte_range):
        if byte_range.start >= self._stop:
            self.asked.set()
            assert self.go_on.wait(PATIENCE_S)
        return self._inner.read(byte_range)


@pytest.fixture
def slow(data):
    stop = plyweight.artifact.inspect(MemorySource(data)).layers[1].total_bytes
    source = Slow(data, stop)
    yield source
    source.go_on.set()


def test_a_slow_upgrade_keeps_neither_requests_nor_a_downgrade_waiting(data, slow, expected):
    images, _ = batch()
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    future = start_upgrade(model, slow, bit_width=4)
    assert slow.asked.wait(PATIENCE_S)
    with torch.no_grad():
        assert torch.equal(model(images), expected[2])
    downgrade(model, 1)  # what the upgrade has assumed is gone, so it reads that again
    slow.go_on.set()
    assert future.result(PATIENCE_S) == 4
    with torch.no_grad():
        assert torch.equal(model(images), expected[4])


def test_an_upgrade_in_the_background_calls_back_with_what_came_of_it(data):
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    called, futures = threading.Event(), []

    def callback(future):
        futures.append(future)
        called.set()

    future = start_upgrade(model, MemorySource(data), bit_width=6, callback=callback)
    assert called.wait(PATIENCE_S)
    assert futures == [future]
    assert future.result() == 6
    assert bit_widths_of(model)[-1] == 6


def test_a_failure_in_the_background_is_the_futures_and_leaves_the_model(data, caplog):
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    damaged = bytearray(data)
    damaged[-1] ^= 1
    logged = start_upgrade(model, MemorySource(bytes(damaged)))
    with pytest.raises(DigestError):
        logged.result(PATIENCE_S)
    with pytest.raises(BitWidthError):
        start_upgrade(model, MemorySource(data), bit_width=9).result(PATIENCE_S)
    assert bit_widths_of(model) == (1, 2)
    with pytest.raises(LayeringError, match="holds no artifact"):
        start_upgrade(ConvNet(), MemorySource(data))


def test_an_upgrade_can_be_cancelled_until_the_model_changes(data, slow):
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    future = start_upgrade(model, slow, bit_width=4)
    assert slow.asked.wait(PATIENCE_S)
    assert future.cancel()
    slow.go_on.set()
    with pytest.raises(CancelledError):
        future.result(PATIENCE_S)
    upgrade(model, MemorySource(data), bit_width=3)  # nothing is left locked
    assert bit_widths_of(model) == (1, 2, 3)


def test_changes_from_inside_a_lease_are_refused_at_once(data):
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    for change in (
        lambda: upgrade(model, MemorySource(data)),
        lambda: downgrade(model, 1),
    ):
        with plyweight.lease(model), pytest.raises(LayeringError, match="holds a lease"):
            change()
    assert leases_of(model).num_under_way == 0
