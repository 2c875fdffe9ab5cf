"""The reference says what ONNX Runtime's integer kernels compute, for every kind of them we use."""

import platform

import numpy as np
import onnxruntime
import pytest
from engine import reference
from onnx import TensorProto, helper, numpy_helper

from plyweight.engine.exactness import does_saturate

CHANNELS, SIDE = 8, 11


def grid(name, step, zero_point):
    return {f"{name}.step": np.float32(step), f"{name}.zero": np.uint8(zero_point)}


def quantized(nodes, x, name):
    """``x`` on that grid and back."""
    pair = [f"{name}.step", f"{name}.zero"]
    nodes.append(helper.make_node("QuantizeLinear", [x, *pair], [f"{x}.q"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{x}.q", *pair], [f"{x}.d"]))
    return f"{x}.d"


def weight(nodes, values, rng, name, shape, x_step, *, has_bias=True):
    """Names of a dequantized weight and bias whose values are added to ``values``."""
    out = shape[0]
    values[f"{name}.levels"] = rng.integers(-127, 128, shape).astype(np.int8)
    values[f"{name}.scale"] = (rng.uniform(0.5, 2, out) / np.prod(shape[1:])).astype(np.float32)
    values[f"{name}.zero"] = np.zeros(out, np.int8)
    names = [f"{name}.levels", f"{name}.scale", f"{name}.zero"]
    nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}.d"], axis=0))
    if not has_bias:
        return [f"{name}.d"]
    values[f"{name}.bias"] = rng.integers(-3000, 3000, out).astype(np.int32)
    values[f"{name}.unit"] = np.float32(x_step) * values[f"{name}.scale"]
    names = [f"{name}.bias", f"{name}.unit"]
    nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}.b"], axis=0))
    return [f"{name}.d", f"{name}.b"]


def compare(nodes, values, x, output, *, num_distinct):
    """The runtime and the reference give the same, and so many different numbers at least."""
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
        helper.make_tensor_value_info(output, TensorProto.FLOAT, None),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if does_saturate(onnxruntime):
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.enable_profiling = False
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (found,) = session.run([output], {"x": x})
    expected = reference.run(data, values, {"x": x})[output]
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > num_distinct


@pytest.mark.parametrize("zero_point", [0, 37])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"pads": [0, 1, 2, 1]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"group": CHANNELS, "pads": [1, 1, 1, 1]},
        {"group": 2},
    ],
)
def test_convolutions(attributes, zero_point):
    rng = np.random.default_rng(3)
    values = grid("in", 0.02, zero_point) | grid("out", 0.3, 0)
    nodes = []
    x = quantized(nodes, "x", "in")
    shape = (2 * CHANNELS, CHANNELS // attributes.get("group", 1), 3, 3)
    names = weight(nodes, values, rng, "w", shape, 0.02)
    nodes.append(helper.make_node("Conv", [x, *names], ["y"], **attributes))
    nodes.append(helper.make_node("Relu", ["y"], ["r"]))
    output = quantized(nodes, "r", "out")
    compare(nodes, values, picture(rng), output, num_distinct=40)


@pytest.mark.parametrize("has_bias", [True, False])
def test_products_with_a_quantized_and_with_a_float_result(has_bias):
    rng = np.random.default_rng(4)
    for is_quantized in (True, False):
        values, nodes = grid("in", 0.02, 128) | grid("out", 0.5, 100), []
        x = quantized(nodes, "x", "in")
        names = weight(nodes, values, rng, "w", (30, 20), 0.02, has_bias=has_bias)
        nodes.append(helper.make_node("Gemm", [x, *names], ["y"], transB=1))
        output = quantized(nodes, "y", "out") if is_quantized else "y"
        x = rng.normal(size=(5, 20)).astype(np.float32)
        compare(nodes, values, x, output, num_distinct=30)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="Arm adds in fixed point")
@pytest.mark.parametrize("zero_points", [(0, 0, 0), (120, 0, 0), (120, 130, 90)])
def test_additions(zero_points):
    rng = np.random.default_rng(5)
    a, b, out = zero_points
    values = grid("a", 0.021, a) | grid("b", 0.033, b) | grid("out", 0.037, out)
    nodes = [helper.make_node("Relu", ["x"], ["p"])]
    names = [quantized(nodes, "x", "a"), quantized(nodes, "p", "b")]
    nodes.append(helper.make_node("Add", names, ["y"]))
    if not out:
        nodes.append(helper.make_node("Relu", ["y"], ["r"]))
    output = quantized(nodes, "y" if out else "r", "out")
    compare(nodes, values, picture(rng), output, num_distinct=60)


def test_pooling_of_the_largest_and_a_narrower_grid():
    rng = np.random.default_rng(6)
    values = grid("in", 0.02, 0) | grid("out", 0.3, 0) | {"highest": np.uint8(7)}
    nodes = []
    x = quantized(nodes, "x", "in")
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes.append(helper.make_node("MaxPool", [x], ["p"], **pool))
    pair = ["out.step", "out.zero"]
    nodes.append(helper.make_node("QuantizeLinear", ["p", *pair], ["q"]))
    nodes.append(helper.make_node("Clip", ["q", "", "highest"], ["c"]))
    nodes.append(helper.make_node("DequantizeLinear", ["c", *pair], ["d"]))
    compare(nodes, values, picture(rng), "d", num_distinct=5)


def picture(rng):
    return rng.normal(size=(2, CHANNELS, SIDE, SIDE)).astype(np.float32)
