"""An artifact answers at any of its bit-widths, exactly as its graph says."""

import dataclasses
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from engine import reference
from engine.handmade import BIT_WIDTHS, answers, images, residual_graph, write

import plyweight
from plyweight.artifact import ArtifactReader, MemorySource
from plyweight.engine import onnx_nodes
from plyweight.engine.backends import BACKENDS
from plyweight.engine.onnx_nodes import Nodes
from plyweight.engine.values import SlotValues
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    EngineError,
)

PATIENCE_S = 60  # for what takes milliseconds, on however busy a machine


def slots_of(path, bit_width):
    """Model and slot values of a bit-width."""
    reader = ArtifactReader(path)
    layers = [reader.read_layer(i) for i in range(len(reader.held_bit_widths))]
    graph = residual_graph()
    return graph.model_for(bit_width), SlotValues(reader.header, graph, layers, bit_width).all()


def optimized(model, values, folder):
    """The nodes that ONNX Runtime runs, as an ONNX graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    wrapped = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in values.values()]
    options.add_external_initializers(list(values), wrapped)
    onnxruntime.InferenceSession(model.data, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_the_engine_equals_the_integer_reference_bit_for_bit(path, bit_width):
    x = images(20)
    model, slots = slots_of(path, bit_width)
    expected = reference.run(model.data, slots, {"input": x})["logits"]
    with plyweight.open(path, bit_width=bit_width, threads=1) as engine:
        np.testing.assert_array_equal(engine.run({"input": x})["logits"], expected)


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_convolutions_additions_and_products_run_as_integers(path, bit_width, tmp_path):
    graph = optimized(*slots_of(path, bit_width), tmp_path)
    kinds = [node.op_type for node in graph.node]
    assert [kinds.count(kind) for kind in ("QLinearConv", "QLinearAdd", "QGemm")] == [3, 1, 1]
    assert not {"Conv", "Add", "Gemm", "FusedConv"} & set(kinds)


def test_it_says_what_it_takes_and_gives_and_what_the_artifact_says_of_it(path):
    with plyweight.open(path, bit_width=2) as engine:
        (port,) = engine.inputs
        assert (port.name, port.dtype, port.shape) == ("input", "float32", ("batch", 3, 9, 9))
        assert [port.name for port in engine.outputs] == ["logits"]
        assert engine.io["labels"][3] == "class 3"
        assert "holding 2 bits" in repr(engine)


def test_it_switches_among_the_bit_widths_it_holds(path, expected):
    with plyweight.open(path, threads=1) as engine:
        assert engine.bit_width == 8
        assert engine.bit_widths == engine.stored_bit_widths == BIT_WIDTHS
        for bit_width in (2, 8, 4, 2):
            engine.set_bit_width(bit_width)
            assert engine.bit_width == bit_width
            assert answers(engine, expected) == bit_width


def test_a_warm_width_is_the_session_from_before_and_a_cold_one_is_made(path, monkeypatch):
    made = []
    backend = BACKENDS["onnxruntime"]

    def counting(graph, ready, options):
        made.append(ready.model.bit_widths)
        return backend.session(graph, ready, options)

    counted = dataclasses.replace(backend, session=counting)
    monkeypatch.setitem(BACKENDS, "onnxruntime", counted)
    with plyweight.open(path, threads=1) as engine:
        for bit_width in (4, 8, 4, 8):
            engine.set_bit_width(bit_width)
        assert len(made) == 2
    made.clear()
    with plyweight.open(path, threads=1, warm_bytes=0) as engine:
        for bit_width in (4, 8, 4, 8):
            engine.set_bit_width(bit_width)
            assert [warm.bit_width for warm in engine.report().warm] == [bit_width]
        assert len(made) == 5


def test_the_least_recently_used_width_leaves_first(path):
    with plyweight.open(path, threads=1) as engine:
        one = engine.report().warm[0].num_bytes
    with plyweight.open(path, threads=1, warm_bytes=one + one // 2) as engine:
        for bit_width in (4, 8, 2):
            engine.set_bit_width(bit_width)
        assert [warm.bit_width for warm in engine.report().warm] == [2, 8]


def test_an_upgrade_reads_only_the_layers_that_are_missing(path, expected):
    source = MemorySource(path.read_bytes())
    header = ArtifactReader(source).header
    with plyweight.open(source, bit_width=2, threads=1) as engine:
        assert engine.bit_widths == (2,)
        assert answers(engine, expected) == 2
        source.reads.clear()
        engine.upgrade(4)
        assert engine.bit_widths == (2, 4)
        assert answers(engine, expected) == 4
        data = [read for read in source.reads if read.start >= header.data_start]
        assert data == [header.layers[1].byte_range]
        engine.upgrade()
        assert (engine.bit_width, answers(engine, expected)) == (8, 8)
        engine.upgrade(4)  # held already: nothing is read, nothing is given back
        assert (engine.bit_width, engine.bit_widths) == (4, BIT_WIDTHS)


def test_a_downgrade_gives_back_layers_and_sessions(path, expected):
    with plyweight.open(path, threads=1) as engine:
        engine.set_bit_width(4)
        before = engine.report()
        engine.downgrade(2)
        after = engine.report()
        assert (engine.bit_width, engine.bit_widths) == (2, (2,))
        assert answers(engine, expected) == 2
        assert [warm.bit_width for warm in after.warm] == [2]
        assert after.held_bytes == ArtifactReader(path).header.prefix_bytes(2)
        assert after.resident_bytes < before.resident_bytes
        engine.upgrade(8)
        assert answers(engine, expected) == 8


def test_a_downgrade_and_closing_free_what_was_held(path):
    engine = plyweight.open(path, threads=1)
    layers = [weakref.ref(view.data.obj) for view in list(engine._layers[2].values())[:1]]
    sessions = [weakref.ref(engine._warm.current.session)]
    engine.downgrade(2)
    assert [reference() for reference in (*layers, *sessions)] == [None, None]
    last = weakref.ref(engine._warm.current.session)
    engine.close()
    assert last() is None


def test_the_report_says_what_is_held_and_why(path):
    with plyweight.open(path, bit_width=4, threads=1) as engine:
        engine.set_bit_width(2)
        report = engine.report()
        assert report.artifact_id == ArtifactReader(path).header.artifact_id
        assert report.resident_bytes == report.held_bytes + sum(w.num_bytes for w in report.warm)
        text = str(report)
    assert "2 bits on onnxruntime (CPUExecutionProvider)" in text
    assert "layers of 2, 4 bits (of 2, 4, 8 that are stored)" in text
    assert "session of 2 bits, which answers now" in text
    assert "session of 4 bits, used before" in text


def test_eight_threads_get_one_width_each_while_a_ninth_goes_up_and_down(path, expected):
    source = MemorySource(path.read_bytes())
    done = threading.Event()
    with plyweight.open(source, bit_width=2, threads=1, warm_bytes=30_000) as engine:

        def infer():
            seen = set()
            while not done.is_set():
                seen.add(answers(engine, expected))
            return seen

        def go_up_and_down():
            try:
                for number in range(40):
                    engine.upgrade((8, 4)[number % 2])
                    engine.set_bit_width(2)
                    engine.set_bit_width(4)
                    engine.downgrade(2)
            finally:
                done.set()

        with ThreadPoolExecutor(9) as threads:
            requests = [threads.submit(infer) for _ in range(8)]
            threads.submit(go_up_and_down).result()
            seen = [request.result() for request in requests]
    assert len(set.union(*seen)) > 1


def test_closing_waits_for_requests_under_way_and_lets_no_other_in(path):
    engine = plyweight.open(path, threads=1)
    started, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    session = engine._warm.current.session
    compute = session.run

    def slow(feeds):
        started.set()
        assert go_on.wait(PATIENCE_S)
        assert not closed.is_set()
        return compute(feeds)

    session.run = slow
    with ThreadPoolExecutor(2) as threads:
        request = threads.submit(engine.run, {"input": images()})
        assert started.wait(PATIENCE_S)
        closing = threads.submit(lambda: (engine.close(), closed.set()))
        assert not closing.done()
        go_on.set()
        assert request.result()["logits"].shape == (3, 10)
        closing.result()
    with pytest.raises(EngineError, match="the engine is closed; open the artifact again"):
        engine.run({"input": images()})
    for use in (
        lambda: engine.bit_width,
        lambda: engine.set_bit_width(2),
        engine.upgrade,
        lambda: engine.downgrade(2),
        engine.report,
    ):
        with pytest.raises(EngineError, match="closed"):
            use()
    engine.close()


def test_an_upgrade_from_another_artifact_is_refused_and_changes_nothing(tmp_path, expected):
    path = tmp_path / "net"
    write(path, residual_graph())
    with plyweight.open(path, bit_width=2, threads=1) as engine:
        write(path, residual_graph(), seed=1)
        with pytest.raises(ArtifactError, match="open the other one anew instead"):
            engine.upgrade(8)
        assert engine.bit_widths == (2,)
        assert answers(engine, expected) == 2


def test_a_damaged_layer_leaves_the_engine_as_it_was(path, expected):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with plyweight.open(MemorySource(data), bit_width=4, threads=1) as engine:
        with pytest.raises(ArtifactError, match=r"layer 2 \(8 bits\)"):
            engine.upgrade(8)
        assert (engine.bit_widths, answers(engine, expected)) == ((2, 4), 4)


def test_a_width_that_is_not_held_says_whether_it_can_be_had(path):
    with plyweight.open(path, bit_width=4, threads=1) as engine:
        with pytest.raises(BitWidthError, match=r"the engine stores 2, 4\. Call upgrade\(8\) firs"):
            engine.set_bit_width(8)
        with pytest.raises(BitWidthError, match=r"The artifact stores 2, 4, 8\."):
            engine.set_bit_width(3)
        with pytest.raises(BitWidthError, match="the bit-width is True, a bool"):
            engine.downgrade(True)
        with pytest.raises(BitWidthError, match="3 bits were asked for"):
            engine.upgrade(3)
    with pytest.raises(BitWidthError, match="3 bits were asked for, but residual stores 2, 4, 8"):
        plyweight.open(path, bit_width=3)


def test_what_was_read_of_a_model_goes_with_the_engine(path, monkeypatch):
    read = []

    class Counted(Nodes):
        def __init__(self, data):
            super().__init__(data)
            read.append(weakref.ref(self))

    monkeypatch.setattr(onnx_nodes, "Nodes", Counted)
    with plyweight.open(path, threads=1) as engine:
        for bit_width in BIT_WIDTHS:
            engine.set_bit_width(bit_width)
        assert len(read) <= len(residual_graph().models)  # once for all of its bit-widths
    assert all(nodes() is None for nodes in read)
