"""How modules compute whose inputs are floats: the form that is reported, and the answer."""

import dataclasses

import numpy as np
import onnx
import pytest
from engine import reference
from engine.weight_only import ALL, NUM_ROWS, WeightOnly, slot
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import plyweight
from plyweight.artifact import GRAPH_NAME, ArtifactReader, Graph, Module
from plyweight.codec import spread
from plyweight.engine import onnxruntime_session
from plyweight.engine.backends import ONNX_RUNTIME_CPU, OPENVINO, PORTABLE
from plyweight.engine.forms import loaded
from plyweight.engine.onnxruntime_session import OnnxRuntimeSession
from plyweight.engine.session import SessionOptions
from plyweight.engine.values import SlotValues
from plyweight.errors import GraphError

UNIT = 2.0**-24  # of rounding to float32
LARGEST_CODE = 16 * 8 + 8 + 8  # of a level, in units of its scale, whose parts are added apart


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.layered.safetensors"


def layers_of(path):
    reader = ArtifactReader(path)
    return reader.header, [reader.read_layer(i) for i in range(len(reader.header.layers))]


def ready(path, bit_width, runtime):
    """The model and values that a runtime is given, and the forms."""
    header, layers = layers_of(path)
    graph = Graph.from_bytes(layers[0][GRAPH_NAME].data)
    values = SlotValues(header, graph, layers, bit_width)
    return loaded(graph, graph.model_for(bit_width), values, runtime)


def inputs(net, batch, seed=3):
    rng = np.random.default_rng(seed)
    feeds = {"x": rng.normal(size=(batch, net.shape[1])).astype(np.float32)}
    if "rows" in net.modules:
        feeds["ids"] = rng.integers(0, NUM_ROWS, batch)
    return feeds


def expected(path, bit_width, feeds):
    """The answer in float64 from the decoded weights, and how far float32 may be from it."""
    header, layers = layers_of(path)
    graph = Graph.from_bytes(layers[0][GRAPH_NAME].data)
    values = SlotValues(header, graph, layers, bit_width)
    weight = values.decoded_weight("fc")
    scale = spread(weight.scale.astype(float), weight.levels.shape, weight.group_size)
    bias, x = values.of("fc.bias").astype(float), feeds["x"].astype(float)
    y = x @ (weight.levels * scale).T + bias
    most = np.abs(x) @ np.broadcast_to(LARGEST_CODE * scale, weight.levels.shape).T + np.abs(bias)
    if "ids" in feeds:
        rows = values.decoded_weight("rows").numpy()[feeds["ids"]]
        y, most = y + rows, most + np.abs(rows)
    # A rounding for each product and sum, and some for the parts that are added last.
    return y, (x.shape[1] + 8) * UNIT * most


@pytest.mark.parametrize("group_size", [None, 16, 32, 64, 128, 48, 24, 5])
@pytest.mark.parametrize("shape", [(1, 1), (33, 3), (130, 10), (300, 17)])
@pytest.mark.parametrize("is_gemm", [False, True])
def test_every_bit_width_is_as_near_as_float32_can_be(path, shape, group_size, is_gemm):
    net = WeightOnly(*shape, group_size, is_gemm=is_gemm, has_embedding=is_gemm)
    net.write(path)
    in_groups = group_size is not None and group_size < shape[0]
    kind = "float" if in_groups and group_size % 16 else "nibbles"
    with plyweight.open(path, threads=1) as engine:
        for bit_width in (*ALL, 2, 8, 4):  # there, and back
            engine.set_bit_width(bit_width)
            forms = engine.report().forms
            assert forms["fc"].kind == kind
            if is_gemm:
                assert forms["rows"].kind == "rows"
            for batch in (1, 4):
                feeds = inputs(net, batch)
                y, most = expected(path, bit_width, feeds)
                assert (np.abs(engine.run(feeds)["y"] - y) <= most).all()


@pytest.mark.parametrize("group_size", [None, 16, 48, 5])
@pytest.mark.parametrize("runtime", [ONNX_RUNTIME_CPU, PORTABLE, OPENVINO])
def test_what_a_runtime_is_given_is_the_graph_as_the_reference_reads_it(path, group_size, runtime):
    net = WeightOnly(50, 3, group_size, is_gemm=True, has_embedding=True)
    net.write(path)
    feeds = inputs(net, 3)
    for bit_width in ALL:
        given = ready(path, bit_width, runtime)
        found = reference.run(given.model.data, given.values, feeds)["y"]
        y, _ = expected(path, bit_width, feeds)
        np.testing.assert_allclose(found, y, rtol=1e-6, atol=1e-6)
        assert given.model.slots == tuple(given.values)


@pytest.mark.parametrize(
    ("runtime", "kinds"),
    [
        (ONNX_RUNTIME_CPU, ["nibbles", "nibbles", "nibbles", "float"]),
        (PORTABLE, ["dequantized"] * 4),
        (OPENVINO, ["dequantized", "dequantized", "float", "float"]),
    ],
)
def test_each_runtime_has_its_form_and_the_reason(path, runtime, kinds):
    found = []
    for group_size in (None, 16, 48, 7):  # 96 inputs are 6, 2 and 13.7 of them
        WeightOnly(96 if group_size != 48 else 100, 3, group_size).write(path)
        found.append(ready(path, 8, runtime).forms["fc"])
    assert [form.kind for form in found] == kinds
    if runtime is ONNX_RUNTIME_CPU:
        assert "two products of 4-bit codes" in found[0].reason
        assert found[3].reason.startswith("a group of 7 inputs is no multiple of 16")
    else:
        assert all("no products of 4-bit codes" in form.reason for form in found)


@pytest.mark.parametrize("bit_width", ALL)
def test_nibbles_take_half_a_byte_to_4_bits_and_a_byte_above(path, bit_width):
    net = WeightOnly(512, 64)
    net.write(path)
    values = ready(path, bit_width, ONNX_RUNTIME_CPU).values
    codes = sum(value.nbytes for name, value in values.items() if name.endswith(".codes"))
    assert codes == 512 * 64 // (2 if bit_width <= 4 else 1)
    assert not any(name.endswith(("levels", "values")) for name in values)
    assert sum(value.nbytes for value in values.values()) < 1.2 * codes


def test_a_pinned_weight_has_the_form_of_its_own_bit_width(path):
    net = WeightOnly(64, 3, pinned=6)
    net.write(path)
    reasons = [ready(path, b, ONNX_RUNTIME_CPU).forms["fc"].reason[:1] for b in ALL]
    assert reasons == ["6"] * 6 + ["7", "8"]
    with plyweight.open(path, bit_width=2) as engine:
        feeds = inputs(net, 2)
        y, most = expected(path, 2, feeds)
        assert (np.abs(engine.run(feeds)["y"] - y) <= most).all()


def read_by_an_addition(net):
    net.nodes.insert(1, helper.make_node("Mul", ["w", "w"], ["square"]))
    net.nodes.append(helper.make_node("ReduceSum", ["square"], ["total"], keepdims=0))
    net.nodes[-2].output[0] = "before"
    net.nodes.append(helper.make_node("Add", ["before", "total"], ["y"]))


def another_axis(net):
    net.nodes[0] = helper.make_node("DequantizeLinear", ["fc.levels", "fc.scale"], ["w"], axis=0)


def a_zero_point(net):
    net.slots.append(slot("fc.zero_point", TensorProto.INT8, net.shape[:1]))
    net.nodes[0].input.append("fc.zero_point")


def a_node_of_another_kind(net):
    net.nodes[0] = helper.make_node("Cast", ["fc.levels"], ["cast"], to=TensorProto.FLOAT)
    net.nodes.insert(1, helper.make_node("Mul", ["cast", "fc.scale"], ["w"]))


def read_inside_a_node(net):
    """A branch multiplies with the weight too."""
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    inner = [helper.make_node("MatMul", ["x", "w"], ["inner"])]
    branch = helper.make_graph(inner, "branch", [], [output])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    net.nodes[1:2] = [
        helper.make_node("Constant", [], ["yes"], value=yes),
        helper.make_node("If", ["yes"], ["one"], then_branch=branch, else_branch=branch),
        helper.make_node("MatMul", ["x", "w"], ["other"]),
        helper.make_node("Sub", ["one", "other"], ["nothing"]),
        helper.make_node("Add", ["nothing", "other"], ["product"]),
    ]


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (read_by_an_addition, "float"),
        (read_inside_a_node, "float"),
        (another_axis, "dequantized"),
        (a_zero_point, "dequantized"),
        (a_node_of_another_kind, "dequantized"),
    ],
)
def test_only_a_weight_that_is_exactly_levels_times_scale_is_rewritten(path, edit, kind):
    """A graph that says something else is computed as it says."""
    net = WeightOnly(12, 12, edit=edit)
    net.write(path)
    feeds = inputs(net, 3)
    for bit_width in (2, 4, 8):
        given = ready(path, bit_width, ONNX_RUNTIME_CPU)
        assert given.forms["fc"].kind == kind
        if edit is read_inside_a_node:  # which the reference does not know
            y, most = expected(path, bit_width, feeds)
        else:
            plain = ready(path, bit_width, PORTABLE)
            y = reference.run(plain.model.data, plain.values, feeds)["y"]
            most = 1e-5 * np.abs(y).max()
        with plyweight.open(path, bit_width=bit_width) as engine:
            assert (np.abs(engine.run(feeds)["y"] - y) <= most).all()


def test_a_slot_of_another_shape_is_refused_although_it_is_not_filled(path):
    def wrong(net):
        net.slots[0] = slot("fc.levels", TensorProto.INT8, (7, 4))

    WeightOnly(12, 4, edit=wrong).write(path)
    with pytest.raises(GraphError, match=r"int8 of shape \[7, 4\] for 'fc\.levels'.*\[12, 4\]"):
        plyweight.open(path)


def test_a_slot_called_as_the_engines_own_is_refused(path):
    def taken(net):
        net.weights["fc.nibbles0.weight"] = net.weights["fc.weight"]
        net.modules["fc.nibbles0"] = Module(param="fc.nibbles0.weight", is_transposed=True)
        net.slots += [
            slot("fc.nibbles0.levels", TensorProto.INT8, (12, 4)),
            slot("fc.nibbles0.scale", TensorProto.FLOAT, (4,)),
        ]

    WeightOnly(12, 4, edit=taken).write(path)
    with pytest.raises(GraphError, match="of the engine's own"):
        plyweight.open(path)


def inline(name):
    """An initializer that has its values."""

    def edit(proto):
        proto.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [1], [3.0]))

    return edit


def given_by_a_node(name):
    return lambda proto: proto.node.append(helper.make_node("Identity", ["x"], [name]))


def given_in_a_branch(name):
    def edit(proto):
        inner = helper.make_node("Constant", [], [name], value_float=3.0)
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [])
        branch = helper.make_graph([inner], "branch", [], [output])
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        proto.node.append(helper.make_node("Constant", [], ["yes"], value=yes))
        choice = helper.make_node("If", ["yes"], ["one"], then_branch=branch, else_branch=branch)
        proto.node.append(choice)

    return edit


@pytest.mark.parametrize("edit", [inline, given_by_a_node, given_in_a_branch])
@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        ("fc.values", 5),
        ("fc.nibbles0.codes", None),
        ("fc.nibbles1.scale", None),
        ("fc.nibbles.half", None),
        ("nibbles.sums.48.48", None),
        ("product/nibbles0", None),
        ("product/sums", None),
        ("product/half", None),
        ("product/sum0", None),
    ],
)
def test_a_name_of_the_engines_own_is_refused_wherever_it_stands(path, name, group_size, edit):
    """It would be computed with in place of what the engine puts there, or the other way round."""
    net = WeightOnly(48, 5, group_size)
    (model,) = net.graph.models
    proto = onnx.load_from_string(model.data)
    edit(name)(proto.graph)
    changed = dataclasses.replace(model, data=proto.SerializeToString())
    net.graph = dataclasses.replace(net.graph, models=(changed,))
    net.write(path)
    with pytest.raises(GraphError, match=f"'{name}' of the engine's own"):
        plyweight.open(path, bit_width=8)


@pytest.mark.parametrize("group_size", [None, 16, 5])
@pytest.mark.parametrize("is_gemm", [False, True])
def test_values_beside_the_model_are_as_those_inside_of_it(path, group_size, is_gemm, monkeypatch):
    """As a model has them that is too large for one message."""
    net = WeightOnly(48, 17, group_size, is_gemm=is_gemm)
    net.write(path)
    feeds = inputs(net, 3)
    for bit_width in ALL:
        with plyweight.open(path, bit_width=bit_width, threads=1) as engine:
            inside, size = engine.run(feeds)["y"], engine.report().warm[0].num_bytes
        with monkeypatch.context() as changed:
            changed.setattr(onnxruntime_session, "MAX_MESSAGE_BYTES", 0)
            with plyweight.open(path, bit_width=bit_width, threads=1) as engine:
                np.testing.assert_array_equal(engine.run(feeds)["y"], inside)
                assert engine.report().warm[0].num_bytes > 1.3 * size


def test_weights_alone_are_held_once_on_any_provider(path):
    net = WeightOnly(512, 64)
    net.write(path)
    one = ready(path, 8, PORTABLE)
    assert one.forms["fc"].kind == "dequantized"
    assert not one.is_integer
    session = OnnxRuntimeSession(net.graph, one, SessionOptions(None, 1))
    assert session.num_bytes < 1.1 * 512 * 64


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Header, graph and layers of a small artifact."""
    path = tmp_path_factory.mktemp("forms") / "net"
    WeightOnly(20, 3, 16, is_gemm=True, has_embedding=True, bit_widths=(2, 8)).write(path)
    header, layers = layers_of(path)
    return header, Graph.from_bytes(layers[0][GRAPH_NAME].data), layers


@given(data=st.data())
def test_changed_bytes_of_a_model_are_refused_or_give_another_one(parts, data):
    header, graph, layers = parts
    (model,) = graph.models
    raw = bytearray(model.data)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    broken = dataclasses.replace(model, data=bytes(raw))
    values = SlotValues(header, graph, layers, 8)
    try:
        changed = loaded(graph, broken, values, ONNX_RUNTIME_CPU)
    except GraphError:
        return
    assert changed.model.slots == tuple(changed.values)


@pytest.mark.parametrize("group_size", [None, 16, 48, 5, 6, 8])
def test_openvino_gives_nearly_the_same_for_any_rows(path, group_size):
    """With groups of 5 or 6 its own kernel is wrong for few rows, so it is given floats."""
    net = WeightOnly(120, 17, group_size)
    net.write(path)
    with plyweight.open(path, backend="openvino", threads=1) as engine:
        for bit_width in ALL:
            engine.set_bit_width(bit_width)
            for batch in (1, 2, 6):
                feeds = inputs(net, batch)
                y, most = expected(path, bit_width, feeds)
                assert (np.abs(engine.run(feeds)["y"] - y) <= most).all()


def test_the_report_counts_modules_by_form(path):
    WeightOnly(48, 17, has_embedding=True).write(path)
    with plyweight.open(path, bit_width=3) as engine:
        text = str(engine.report())
    assert "  1 x nibbles: 3 bits are a product of 4-bit codes\n" in text + "\n"
    assert "  1 x rows: an embedding reads a few rows of bytes\n" in text + "\n"
