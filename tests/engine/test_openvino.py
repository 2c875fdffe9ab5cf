"""OpenVINO behind the same engine: integers, one width per request, and nearly the same logits."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cifar10_nets import ResNet8
from engine.handmade import BIT_WIDTHS, images
from graph.nets import prepared
from graph.packed import IMAGES, NETS, Packed

import plyweight
from plyweight.engine import openvino_session
from plyweight.errors import EngineError, GraphError

INTEGERS = {"i8", "u8"}
PRODUCTS = {"Convolution", "FullyConnected", "MatMul"}
# OpenVINO takes the stride of a 1 x 1 convolution before the quantizer that a block and its
# shortcut share at 8 bits, and then no longer sees that the convolution reads integers.
IN_FLOAT = {("SmallResNet", 8): 1}
# Of the logits' spread. They are equal to 1e-7, but where a value beside a threshold falls to its
# other side: 1e-4 for one of these networks at 8 bits. Unrounded sums are 0.004 and more for two.
BOUND = 0.002
CLIPS = {"Clamp", "Maximum", "Minimum"}


def open_here(path, **options):
    return plyweight.open(path, threads=1, backend="openvino", **options)


@pytest.fixture(scope="module")
def logits(path):
    """Those of each bit-width, from engines that hold no more."""
    found = {}
    for bit_width in BIT_WIDTHS:
        with open_here(path, bit_width=bit_width) as engine:
            found[bit_width] = engine.run({"input": images()})["logits"]
    return found


def answered(engine, logits):
    """The one bit-width whose logits an engine gives, bit for bit."""
    found = engine.run({"input": images()})["logits"]
    (bit_width,) = [b for b, expected in logits.items() if np.array_equal(found, expected)]
    return bit_width


def infos(engine):
    """What OpenVINO says of the nodes that it executes."""
    nodes = engine._warm.current.session._compiled.get_runtime_model().get_ops()
    return [node.get_rt_info() for node in nodes]


def executed(engine):
    """Which kinds of nodes are passes of their own."""
    return {info["layerType"].astype(str) for info in infos(engine)}


def precisions(engine, kinds):
    """What the nodes of these kinds compute with."""
    return [
        info["runtimePrecision"].astype(str)
        for info in infos(engine)
        if info["layerType"].astype(str) in kinds
    ]


@pytest.mark.parametrize("net", NETS)
def test_it_answers_nearly_as_onnx_runtime_does_with_integers(net, packed_nets):
    packed = packed_nets(net)
    (port,), (output,) = packed.graph.inputs, packed.graph.outputs
    feeds = {port.name: IMAGES.numpy()}
    with plyweight.open(packed.path, threads=1) as engine, open_here(packed.path) as other:
        for bit_width in engine.bit_widths:
            engine.set_bit_width(bit_width)
            other.set_bit_width(bit_width)
            expected = engine.run(feeds)[output.name]
            found = other.run(feeds)[output.name]
            assert np.abs(found - expected).mean() < BOUND * expected.std()
            assert not executed(other) & CLIPS
            in_float = [p for p in precisions(other, PRODUCTS) if p not in INTEGERS]
            assert len(in_float) == IN_FLOAT.get((net, bit_width), 0)


@pytest.fixture(scope="module")
def resnet8(tmp_path_factory):
    """A net whose blocks OpenVINO fuses as it does those of larger ones."""
    torch.manual_seed(0)
    model = prepared(ResNet8(), IMAGES[:16], bit_widths=(2, 4))
    return Packed(model, IMAGES[:16], tmp_path_factory.mktemp("resnet8"))


@pytest.mark.parametrize("bit_width", [2, 4])
def test_blocks_of_a_resnet_are_rounded_as_the_graph_says(bit_width, resnet8):
    """At 2 bits OpenVINO would leave roundings out, at 4 bits the clip of one grid on its like.

    Either moves the logits of nearly all images, by 0.1 of their spread and more.
    """
    (port,), (output,) = resnet8.graph.inputs, resnet8.graph.outputs
    feeds = {port.name: IMAGES.numpy()}
    with plyweight.open(resnet8.path, bit_width=bit_width, threads=1) as engine:
        expected = engine.run(feeds)[output.name]
    with open_here(resnet8.path, bit_width=bit_width) as engine:
        found = engine.run(feeds)[output.name]
    apart = np.abs(found - expected).max(axis=1)
    # Of most images no value is beside a threshold; what is left is float noise.
    assert np.median(apart) < 1e-4 * expected.std()


def test_products_are_those_of_integers_at_every_width(path):
    with open_here(path) as engine:
        for bit_width in BIT_WIDTHS:
            engine.set_bit_width(bit_width)
            found = precisions(engine, PRODUCTS)
            assert len(found) == 4
            assert set(found) <= INTEGERS


def test_it_switches_upgrades_and_downgrades_as_the_other_does(path, logits):
    with open_here(path, bit_width=2) as engine:
        assert answered(engine, logits) == 2
        engine.upgrade(4)
        assert (engine.bit_widths, answered(engine, logits)) == ((2, 4), 4)
        engine.upgrade()
        for bit_width in (2, 8, 4):
            engine.set_bit_width(bit_width)
            assert answered(engine, logits) == bit_width
        report = engine.report()
        assert (report.backend, report.providers) == ("openvino", ("CPU",))
        assert [warm.bit_width for warm in report.warm] == [4, 8, 2]
        engine.downgrade(2)
        assert (engine.bit_widths, answered(engine, logits)) == ((2,), 2)
        assert engine.report().resident_bytes < report.resident_bytes


def test_eight_threads_get_one_width_each_while_a_ninth_switches(path, logits):
    done = threading.Event()
    with open_here(path) as engine:

        def infer():
            seen = set()
            while not done.is_set():
                seen.add(answered(engine, logits))
            return seen

        def switch():
            try:
                for number in range(60):
                    engine.set_bit_width(BIT_WIDTHS[number % 3])
            finally:
                done.set()

        with ThreadPoolExecutor(9) as threads:
            requests = [threads.submit(infer) for _ in range(8)]
            threads.submit(switch).result()
            seen = [request.result() for request in requests]
    assert len(set.union(*seen)) > 1


def test_answers_of_earlier_requests_stay_as_they_are_and_inputs_may_be_read_only(path):
    x, y = images(), images(seed=6)
    x.setflags(write=False)
    with open_here(path) as engine:
        first = engine.run({"input": x})["logits"]
        kept = first.copy()
        second = engine.run({"input": y})["logits"]
        np.testing.assert_array_equal(first, kept)
        assert not np.array_equal(first, second)


def test_batches_of_any_size_follow_one_another(path):
    x = images(5)
    with open_here(path) as engine:
        whole = engine.run({"input": x})["logits"]
        for size in (1, 5, 2):
            np.testing.assert_array_equal(engine.run({"input": x[:size]})["logits"], whole[:size])


def test_providers_are_refused_for_it_has_none(path):
    with pytest.raises(EngineError, match="OpenVINO has none, and computes on the CPU"):
        open_here(path, providers=["CPUExecutionProvider"])


def test_without_openvino_it_says_how_to_install_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r'pip install "plyweight\[openvino\]"'):
        open_here(path)


def test_what_the_runtime_cannot_compute_is_an_error_in_one_sentence(path):
    with open_here(path) as engine:
        session = engine._warm.current.session
        with pytest.raises(GraphError, match="OpenVINO failed to compute the graph"):
            session.run({"input": np.zeros((1, 5, 9, 9), np.float32)})


def test_this_processor_is_asked_and_one_that_saturates_is_refused(path, monkeypatch):
    import openvino

    assert openvino_session.does_saturate(openvino) in (False, True)
    monkeypatch.setattr(openvino_session, "does_saturate", lambda _: True)
    with pytest.raises(EngineError, match=r'wrong sums of products of bytes.*"onnxruntime"'):
        open_here(path)
