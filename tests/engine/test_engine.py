"""An artifact answers at any of its bit-widths, exactly as its graph says."""

import numpy as np
import onnx
import onnxruntime
import pytest
from engine import reference
from engine.handmade import BIT_WIDTHS, images, residual_graph, write

import plyweight
from plyweight.artifact import ArtifactReader
from plyweight.engine.values import SlotValues


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "net.layered.safetensors"
    write(path, residual_graph())
    return path


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
