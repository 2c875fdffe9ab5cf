"""A second rounding on bytes gives the levels that one through floats gives, all 256 of them."""

import platform
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from graph.packed import IMAGES, NETS
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from plyweight.engine.exactness import does_saturate
from plyweight.engine.onnx_filled import filled
from plyweight.engine.onnx_model import external_initializers
from plyweight.engine.onnx_nodes import OnnxModel
from plyweight.engine.onnx_requantized import MACHINES, requantized
from plyweight.nn import bit_widths_of

pytestmark = pytest.mark.skipif(
    platform.machine() not in MACHINES, reason="nothing is replaced on this kind of machine"
)
ALL_LEVELS = np.arange(256, dtype=np.uint8)


def grid(name, step, zero_point=0):
    return {f"{name}.step": np.float32(step), f"{name}.zero": np.uint8(zero_point)}


def pair(name):
    return [f"{name}.step", f"{name}.zero"]


def chain_model(values, *, readers=("out",), clip=("", "out.highest"), more=(), outputs=None):
    """Levels on the grid "in", read by quantizers ``readers``."""
    nodes = [
        helper.make_node("Identity", ["levels"], ["moved"]),
        helper.make_node("DequantizeLinear", ["moved", *pair("in")], ["source"]),
    ]
    for name in readers:
        nodes.append(helper.make_node("QuantizeLinear", ["source", *pair(name)], [f"{name}.q"]))
        if clip:
            bounds = [bound.replace("out.", f"{name}.") for bound in clip]
            nodes.append(helper.make_node("Clip", [f"{name}.q", *bounds], [f"{name}.c"]))
        levels = f"{name}.c" if clip else f"{name}.q"
        nodes.append(helper.make_node("DequantizeLinear", [levels, *pair(name)], [f"{name}.y"]))
    slots = []
    for name, value in values.items():
        dtype = helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype)
        slot = TensorProto(name=name, data_type=dtype, data_location=TensorProto.EXTERNAL)
        slot.external_data.add(key="location", value="slots")
        slots.append(slot)
    outputs = [f"{name}.y" for name in readers] if outputs is None else outputs
    ports = [helper.make_tensor_value_info("levels", TensorProto.UINT8, ["n"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in outputs]
    graph = helper.make_graph([*nodes, *more], "g", ports, ends, slots)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    ).SerializeToString()


def run(data, values, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if does_saturate(onnxruntime):
        options.add_session_config_entry("session.x64quantprecision", "1")
    data = filled(data, {name: np.asarray(value) for name, value in values.items()})
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def as_arrays(values):
    return {name: np.asarray(value) for name, value in values.items()}


def changed(data, values):
    return requantized(OnnxModel(data), values)


def operators(data):
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


def assert_same(data, values):
    """Whether something was replaced, once it is known to give the same."""
    found, left = changed(data, as_arrays(values))
    assert set(external_initializers(found)) == set(left)
    feeds = {"levels": ALL_LEVELS}
    for new, old in zip(run(found, left, feeds), run(data, values, feeds), strict=True):
        np.testing.assert_array_equal(new, old)
    return found


steps = st.floats(2**-10, 8, width=32)
bytes_ = st.integers(0, 255)


@given(step=steps, new=steps, zero=bytes_, new_zero=bytes_, highest=bytes_)
def test_no_level_ever_changes(step, new, zero, new_zero, highest):
    values = grid("in", step, zero) | grid("out", new, new_zero) | {"out.highest": highest}
    values["out.highest"] = np.uint8(highest)
    assert_same(chain_model(values), values)


@pytest.mark.parametrize(
    ("zero_point", "new_zero_point", "highest", "clips_left"),
    [
        (0, 0, 15, 0),  # moved up to 255
        (0, 0, 1, 0),
        (128, 8, 15, 1),  # signed: two ends are needed, and only one can be that of a byte
        (0, 0, 200, 0),  # never reached
    ],
)
def test_a_clip_is_left_only_where_the_end_of_a_byte_cannot_stand_for_it(
    zero_point, new_zero_point, highest, clips_left
):
    values = grid("in", 0.013, zero_point) | grid("out", 0.0171, new_zero_point)
    values["out.highest"] = np.uint8(highest)
    found = operators(assert_same(chain_model(values), values))
    assert found["QLinearAdd"] == 1
    assert found["Clip"] == clips_left
    assert found["DequantizeLinear"] == 1  # nobody else reads the first


@pytest.mark.parametrize("new", [0.02, 0.04, 0.1])
def test_a_chain_whose_levels_would_change_stays(new):
    # Of every other level the quotient is the middle of two, and the last bit of it decides.
    values = grid("in", 0.01) | grid("out", new)
    found = assert_same(chain_model(values, clip=()), values)
    assert operators(found)["QLinearAdd"] == 0


def test_readers_with_equal_grids_share_their_levels():
    values = grid("in", 0.013)
    for name in ("a", "b", "c"):
        step = 0.02 if name == "c" else 0.0171
        values |= grid(name, step) | {f"{name}.highest": np.uint8(15)}
    found = operators(assert_same(chain_model(values, readers=("a", "b", "c")), values))
    assert found["QLinearAdd"] == 2


def test_what_is_read_elsewhere_stays():
    values = grid("in", 0.013) | grid("out", 0.0171) | {"out.highest": np.uint8(15)}
    data = chain_model(values, outputs=["source", "out.y"])
    assert changed(data, as_arrays(values))[0] == data
    more = [helper.make_node("Relu", ["source"], ["seen"])]
    found = operators(
        assert_same(chain_model(values, more=more, outputs=["seen", "out.y"]), values)
    )
    assert found["DequantizeLinear"] == 2
    assert found["QLinearAdd"] == 1


def test_what_is_not_known_stays(monkeypatch):
    values = grid("in", 0.013) | grid("out", 0.0171) | {"out.highest": np.uint8(15)}
    data = chain_model(values)
    arrays = as_arrays(values)
    for name in values:
        assert changed(data, {n: v for n, v in arrays.items() if n != name})[0] == data
    for name, wrong in (("in.step", np.ones(3, np.float32)), ("out.zero", np.array(0, np.int8))):
        assert changed(data, arrays | {name: wrong})[0] == data
    below = chain_model(values, clip=("in.zero", "out.highest"))
    assert changed(below, arrays)[0] == below
    branch = helper.make_graph(
        [helper.make_node("Identity", ["out.q"], ["inside"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.UINT8, ["n"])],
    )
    condition = helper.make_node(
        "Constant", [], ["yes"], value=helper.make_tensor("", TensorProto.BOOL, (), [True])
    )
    choice = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    nested = chain_model(values, more=[condition, choice])
    assert changed(nested, arrays)[0] == nested
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert changed(data, arrays)[0] == data


@pytest.mark.parametrize("net", NETS)
def test_networks_answer_the_same_and_go_through_no_floats(net, packed_nets):
    packed = packed_nets(net)
    for bit_width in bit_widths_of(packed.model):
        values = packed.slots(bit_width)
        data = packed.graph.model_for(bit_width).data
        found, left = changed(data, values)
        feeds = {packed.graph.inputs[0].name: IMAGES.numpy()}
        for new, old in zip(run(found, left, feeds), run(data, values, feeds), strict=True):
            np.testing.assert_array_equal(new, old)
        onnx.checker.check_model(onnx.load_from_string(filled(found, left)))
        if bit_width < 8 and net != "SmallSqueezeNet":
            assert operators(found)["QLinearAdd"] > 0
            assert operators(found)["Clip"] < operators(data)["Clip"]
