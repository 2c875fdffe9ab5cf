"""A second rounding on bytes gives the levels that one through floats gives, all 256 of them."""

import contextlib
import platform
from collections import Counter

import numpy as np
import onnx
import pytest
from engine.running import run
from graph.packed import IMAGES, NETS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from plyweight.engine.onnx_filled import filled
from plyweight.engine.onnx_model import external_initializers
from plyweight.engine.onnx_nodes import OnnxModel
from plyweight.engine.onnx_requantized import MACHINES, requantized
from plyweight.engine.protobuf import counted, fields_and_bytes, integer_field, text_field
from plyweight.errors import GraphError
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


def ordinary():
    return grid("in", 0.013) | grid("out", 0.0171) | {"out.highest": np.uint8(15)}


def edited(edit, values=None):
    """A model with one chain, changed."""
    model = onnx.load_from_string(chain_model(ordinary() if values is None else values))
    edit(model.graph)
    return model.SerializeToString()


def with_node(raw):
    """A model with one chain and a node of these bytes."""
    parts = []
    for number, value, whole in fields_and_bytes(memoryview(chain_model(ordinary()))):
        parts += counted(7, [value, *counted(1, [raw])]) if number == 7 else [whole]
    return b"".join(parts)


@pytest.mark.parametrize(
    "raw",
    [
        text_field(4, "Relu") + b"\x0a\x02\xff\xfe",  # an input that is no UTF-8
        text_field(4, "Relu") + integer_field(1, 2**40),
        integer_field(4, 5),
    ],
)
def test_a_node_that_is_none_is_refused(raw):
    with pytest.raises(GraphError, match="refused"):
        changed(with_node(raw), as_arrays(ordinary()))


def test_an_operator_that_is_given_twice_is_the_last_one():
    twice = text_field(4, "Neg") + text_field(4, "Relu") + text_field(1, "source")
    found = operators(changed(with_node(twice), as_arrays(ordinary()))[0])
    assert found["Relu"] == found["QLinearAdd"] == 1


def without_inputs(index, count):
    return lambda graph: [graph.node[index].input.pop() for _ in range(count)]


def with_attribute(index, name, value):
    return lambda graph: graph.node[index].attribute.append(helper.make_attribute(name, value))


def of_another_domain(index):
    return lambda graph: setattr(graph.node[index], "domain", "my")


def also_an_input(name):
    port = helper.make_tensor_value_info(name, TensorProto.UINT8, [])
    return lambda graph: graph.input.append(port)


@pytest.mark.parametrize(
    "edit",
    [
        without_inputs(1, 1),  # no zero point, which ONNX allows: it is 0
        without_inputs(2, 1),
        without_inputs(4, 1),
        without_inputs(1, 2),
        without_inputs(1, 3),
        without_inputs(2, 3),
        without_inputs(3, 1),
        of_another_domain(1),
        of_another_domain(2),
        of_another_domain(3),
        of_another_domain(4),
        with_attribute(2, "precision", TensorProto.FLOAT16),
        with_attribute(1, "output_dtype", TensorProto.FLOAT),
        with_attribute(2, "axis", 0.5),
        with_attribute(2, "axis", "text"),
        also_an_input("out.zero"),  # which a caller may give another value
        also_an_input("out.highest"),
        lambda graph: graph.node.append(graph.node[1]),
    ],
)
def test_a_chain_that_says_something_else_stays(edit):
    data = edited(edit)
    assert changed(data, as_arrays(ordinary()))[0] == data


@pytest.mark.parametrize(
    "highest",
    [np.array([15], np.uint8), np.array([15, 16], np.uint8), np.float32(np.nan), np.int8(-4)],
)
def test_a_highest_level_that_is_no_byte_leaves_the_chain_alone(highest):
    data = chain_model(ordinary())
    assert changed(data, as_arrays(ordinary() | {"out.highest": highest}))[0] == data


@pytest.mark.parametrize(
    ("step", "new"), [(1e29, 1e-29), (1e-29, 1e29), (1e-40, 1.0), (3e38, 1.0), (np.nan, 1.0)]
)
def test_steps_too_far_apart_to_compute_with_leave_the_chain_alone(step, new):
    values = grid("in", step, 3) | grid("out", new, 5) | {"out.highest": np.uint8(15)}
    data = chain_model(values)
    assert changed(data, as_arrays(values))[0] == data


@pytest.mark.parametrize("step", [2.0**-90, 2.0**90])
def test_steps_of_any_size_may_be_replaced_where_their_quotient_is_one_to_compute_with(step):
    values = grid("in", 0.013 * step, 3) | grid("out", 0.0171 * step, 5)
    values["out.highest"] = np.uint8(15)
    assert operators(assert_same(chain_model(values), values))["QLinearAdd"] == 1


def test_a_function_of_the_graphs_own_is_not_replaced():
    """It is called as an operator of ONNX and computes something else."""
    model = onnx.load_from_string(edited(of_another_domain(2)))
    body = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("BitwiseNot", ["q"], ["r"]),
    ]
    opset = [helper.make_opsetid("", 18)]
    args = ("QuantizeLinear", ["a", "s", "z"], ["r"], body, opset)
    model.functions.append(helper.make_function("my", *args))
    model.opset_import.add(domain="my", version=1)
    assert_same(model.SerializeToString(), ordinary())
    for domain in ("", "ai.onnx", "com.microsoft"):
        model.functions[0].domain = domain
        with pytest.raises(GraphError, match="defines the operator 'QuantizeLinear'"):
            changed(model.SerializeToString(), as_arrays(ordinary()))


def test_an_operator_of_the_domain_by_its_long_name_is_the_same():
    data = edited(lambda graph: setattr(graph.node[2], "domain", "ai.onnx"))
    assert operators(assert_same(data, ordinary()))["QLinearAdd"] == 1


def test_a_slot_that_is_an_output_stays():
    def edit(graph):
        for name in ("out.zero", "out.highest"):
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, []))

    found = assert_same(edited(edit), ordinary())
    assert {"out.zero", "out.highest"} < set(external_initializers(found))


def inline(graph):
    graph.initializer.append(helper.make_tensor("0/moved zero point", 2, [], [7]))


def given_by_a_node(graph):
    graph.node.append(helper.make_node("Identity", ["moved"], ["0/moved zero point"]))


def as_an_input(graph):
    graph.input.append(helper.make_tensor_value_info("0/moved zero point", 2, []))


@pytest.mark.parametrize("edit", [inline, given_by_a_node, as_an_input])
def test_a_name_of_the_zero_points_that_are_added_is_refused(edit):
    with pytest.raises(GraphError, match="'0/moved zero point' of the engine's own"):
        changed(edited(edit), as_arrays(ordinary()))


def test_a_chain_that_begins_where_another_ends_reads_its_moved_levels():
    values = grid("in", 0.013) | grid("a", 0.0171) | grid("b", 0.0437)
    values |= {"a.highest": np.uint8(15), "b.highest": np.uint8(3)}
    more = [
        helper.make_node("QuantizeLinear", ["a.y", *pair("b")], ["b.q"]),
        helper.make_node("Clip", ["b.q", "", "b.highest"], ["b.c"]),
        helper.make_node("DequantizeLinear", ["b.c", *pair("b")], ["b.y"]),
    ]
    data = chain_model(values, readers=("a",), more=more, outputs=["b.y"])
    found = operators(assert_same(data, values))
    assert found["QLinearAdd"] == 2
    assert found["DequantizeLinear"] == 1


@settings(max_examples=400)
@given(data=st.data())
def test_changed_bytes_are_refused_or_give_a_model_whose_slots_have_values(data):
    values = as_arrays(ordinary())
    raw = bytearray(chain_model(values))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        external_initializers(bytes(raw))
    except GraphError:
        return
    with contextlib.suppress(GraphError):
        found, left = changed(bytes(raw), values)
        if found != bytes(raw):
            assert set(external_initializers(found)) & set(values) <= set(left)


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
