"""A model's nodes are read without the onnx package, and others put in their place."""

import onnx
import pytest
from engine.handmade import residual_model
from onnx import TensorProto, helper

from plyweight.engine.onnx_model import Declared, external_initializers
from plyweight.engine.onnx_nodes import Node, Nodes, rewritten
from plyweight.engine.protobuf import counted, integer_field, text_field
from plyweight.errors import GraphError


@pytest.mark.parametrize("is_clipped", [False, True])
def test_without_a_change_the_model_stays_as_it_is(is_clipped):
    data, _ = residual_model(is_clipped=is_clipped)
    assert rewritten(data, {}, dropped=(), added={}) == data


def test_nodes_are_what_onnx_reads():
    data, _ = residual_model(is_clipped=True)
    read = Nodes(data).all
    nodes = onnx.load_from_string(data).graph.node
    assert [node.op_type for node in read] == [node.op_type for node in nodes]
    assert [list(node.inputs) for node in read] == [list(node.input) for node in nodes]
    assert [list(node.outputs) for node in read] == [list(node.output) for node in nodes]
    assert [set(node.attributes) for node in read] == [{a.name for a in n.attribute} for n in nodes]


def test_attributes_are_numbers_or_texts_or_nothing():
    values = {"alpha": 0.5, "transB": 1, "other": -3, "text": "t", "list": [1, 2]}
    node = helper.make_node("Gemm", ["a", "b"], ["y"], **values)
    graph = helper.make_graph([node], "g", [], [])
    (read,) = Nodes(helper.make_model(graph).SerializeToString()).all
    assert read.attributes == values | {"text": b"t", "list": None}


@pytest.mark.parametrize(
    "number",
    [
        integer_field(2, 1),
        text_field(2, "four"),  # as long as a float, but no fixed number of bytes
        text_field(2, ""),
        bytes([2 << 3 | 1, *bytes(8)]),  # a double
        text_field(3, "1"),
        bytes([3 << 3 | 5, *bytes(4)]),
    ],
)
def test_an_attribute_of_another_wire_type_is_refused(number):
    node = b"".join(counted(1, counted(5, [text_field(1, "alpha"), number])))
    with pytest.raises(GraphError, match="something else stands where"):
        Nodes(b"".join(counted(7, [node])))


def test_what_is_put_in_has_names_that_are_free():
    data, _ = residual_model(is_clipped=False)
    nodes = Nodes(data)
    index = next(i for i, node in enumerate(nodes.all) if node.op_type == "Gemm")
    gemm = nodes.all[index]
    (stranger,) = nodes.all[0].outputs

    def identity(name):
        return {index: (Node(op_type="Identity", inputs=gemm.inputs[:1], outputs=(name,)),)}

    nodes.check_new_names(identity(gemm.outputs[0]), {"new"})  # its own may stay
    nodes.check_new_names(identity("free"), ())
    for replaced, added in (
        (identity(stranger), ()),
        (identity("new"), {"new"}),
        (identity("input"), ()),
        ({}, {"fc.levels"}),
        ({}, gemm.outputs),
    ):
        with pytest.raises(GraphError, match="of the engine's own"):
            nodes.check_new_names(replaced, added)


def test_readers_inside_of_nodes_and_outputs_count():
    inner = helper.make_graph(
        [helper.make_node("Relu", ["w"], ["r"]), helper.make_node("Add", ["r", "w"], ["s"])],
        "inner",
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("s", "w")],
    )
    outer = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["w"]),
            helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
            helper.make_node("Mul", ["w", "w"], ["z"]),
        ],
        "outer",
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("z", "w")],
    )
    nodes = Nodes(helper.make_model(outer).SerializeToString())
    assert nodes.num_readers["w"] == 2 * 3 + 2 + 1  # in two branches, by Mul, as an output
    assert nodes.readers("w") == [2]
    assert nodes.num_readers["never"] == 0


def test_other_nodes_and_slots_are_in_the_model():
    data, slots = residual_model(is_clipped=False)
    before = onnx.load_from_string(data)
    index = next(i for i, n in enumerate(before.graph.node) if n.op_type == "Gemm")
    gemm = before.graph.node[index]
    nodes = (
        Node(
            op_type="MatMulNBits",
            inputs=(gemm.input[0], "codes", "scale", "", ""),
            outputs=("product",),
            attributes={"K": 16, "N": 10, "bits": 4, "block_size": 16, "negative": -1},
            domain="com.microsoft",
        ),
        Node(op_type="Add", inputs=("product", gemm.input[2]), outputs=tuple(gemm.output)),
    )
    added = {"codes": Declared("uint8", (10, 1, 8)), "scale": Declared("float32", (10, 1))}
    found = rewritten(data, {index: nodes}, dropped={"fc.levels"}, added=added)
    declared = external_initializers(found)
    assert {name: declared[name] for name in added} == added
    assert declared.keys() == set(slots) - {"fc.levels"} | added.keys()
    model = onnx.load_from_string(found)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17), ("com.microsoft", 1)]
    first, second = model.graph.node[index : index + 2]
    assert (first.op_type, first.domain) == ("MatMulNBits", "com.microsoft")
    attributes = {a.name: helper.get_attribute_value(a) for a in first.attribute}
    assert attributes == nodes[0].attributes
    assert list(first.input) == list(nodes[0].inputs)
    assert list(second.output) == list(gemm.output)
    assert len(model.graph.node) == len(before.graph.node) + 1
    # Once only, where the model knows the operators already.
    again = onnx.load_from_string(rewritten(found, {index: nodes}, dropped=(), added={}))
    assert len(again.opset_import) == 2
