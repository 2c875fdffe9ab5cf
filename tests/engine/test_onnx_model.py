"""A model from a stranger's artifact makes no runtime read a file."""

import contextlib

import numpy as np
import pytest
from engine.handmade import residual_graph, residual_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from plyweight.engine import onnx_model
from plyweight.engine.onnx_model import Declared, external_initializers
from plyweight.engine.protobuf import counted
from plyweight.engine.session import check_model
from plyweight.errors import GraphError, PlyweightError


def model(*, nodes=(), initializers=(), functions=()):
    graph = helper.make_graph(nodes, "g", [], [], initializers)
    return helper.make_model(graph, functions=functions)


def in_a_file(name="w", location="slots", data_type=TensorProto.INT8, dims=(2, 3)):
    tensor = TensorProto(name=name, data_type=data_type, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_slots_are_found_with_dtype_and_shape_and_other_tensors_are_left_alone():
    here = numpy_helper.from_array(np.arange(5), "here")
    found = external_initializers(
        model(
            initializers=[in_a_file(), here, in_a_file("s", data_type=TensorProto.FLOAT, dims=())]
        ).SerializeToString()
    )
    assert found == {"w": Declared("int8", (2, 3)), "s": Declared("float32", ())}


@pytest.mark.parametrize("is_clipped", [False, True])
def test_the_slots_of_a_model_are_those_that_the_graph_lists(is_clipped):
    data, slots = residual_model(is_clipped=is_clipped)
    assert set(external_initializers(data)) == set(slots)


def inside(tensor):
    """A branch that holds ``tensor``."""
    branch = helper.make_graph([], "branch", [], [], [tensor])
    return helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)


def constant(tensor):
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.add(name="value", type=4).t.CopyFrom(tensor)
    return node


HOSTILE = {
    "another file": model(initializers=[in_a_file(location="/etc/passwd")]),
    "no location": model(initializers=[TensorProto(name="w", data_type=3, data_location=1)]),
    "in a branch": model(nodes=[inside(in_a_file())]),
    "in a constant": model(nodes=[constant(in_a_file())]),
    "a compiled model": model(nodes=[helper.make_node("EPContext", [], ["y"])]),
    "in a function": model(
        functions=[helper.make_function("d", "f", [], ["y"], [constant(in_a_file())], [])]
    ),
    "twice": model(initializers=[in_a_file(), in_a_file()]),
    "a dtype of no slot": model(initializers=[in_a_file(data_type=TensorProto.STRING)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tensor_that_is_in_a_file_is_refused_wherever_it_stands(name):
    with pytest.raises(GraphError, match="the graph's ONNX model is refused"):
        external_initializers(HOSTILE[name].SerializeToString())


def test_two_locations_of_one_tensor_are_refused():
    tensor = in_a_file()
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(GraphError, match="'w' has its values in a file"):
        external_initializers(model(initializers=[tensor]).SerializeToString())


def test_graphs_that_nest_for_ever_are_refused():
    node = inside(numpy_helper.from_array(np.zeros(1), "w"))
    for _ in range(20):
        node = helper.make_node(
            "If", ["c"], ["y"], then_branch=helper.make_graph([node], "b", [], [])
        )
    with pytest.raises(GraphError, match="nests graphs too deeply"):
        external_initializers(model(nodes=[node]).SerializeToString())


def test_a_model_of_more_nodes_or_fields_than_are_read_is_refused(monkeypatch):
    nodes = [inside(in_a_file(location="here")) for _ in range(3)]
    del nodes[0].attribute[:], nodes[1].attribute[:]
    data = model(nodes=nodes[:2]).SerializeToString()
    monkeypatch.setattr(onnx_model, "MAX_NODES", 2)
    assert external_initializers(data) == {}
    with pytest.raises(GraphError, match="it has more than 2 nodes"):
        external_initializers(model(nodes=nodes).SerializeToString())
    monkeypatch.setattr(onnx_model, "MAX_FIELDS", 10)
    with pytest.raises(GraphError, match="it has more than 10 fields"):
        external_initializers(data)


def test_the_nodes_of_branches_and_functions_count(monkeypatch):
    constants = [helper.make_node("Constant", [], [f"{i}"], value_int=i) for i in range(3)]
    branch = helper.make_graph(constants, "branch", [], [])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch)
    function = helper.make_function("d", "f", [], ["0"], constants, [])
    for one in (model(nodes=[choice]), model(functions=[function])):
        external_initializers(one.SerializeToString())
        with monkeypatch.context() as changed:
            changed.setattr(onnx_model, "MAX_NODES", 2)
            with pytest.raises(GraphError, match="more than 2 nodes"):
                external_initializers(one.SerializeToString())


def test_four_hundred_thousand_nodes_are_refused_before_all_of_them_are_read():
    """In a file of 0.9 MB, once it is compressed, they took 40 s."""
    node = helper.make_node("A", ["x"], ["y"]).SerializeToString()
    data = b"".join(counted(7, counted(1, [node]) * 400_000))
    with pytest.raises(GraphError, match="it has more than 50,000 nodes"):
        external_initializers(data)


def test_a_second_graph_or_a_slot_that_has_its_values_too_is_refused():
    data = model(initializers=[in_a_file()]).SerializeToString()
    with pytest.raises(GraphError, match="it has two graphs"):
        external_initializers(data + data)
    both = model(initializers=[in_a_file(), numpy_helper.from_array(np.arange(5), "w")])
    with pytest.raises(GraphError, match="'w' is there twice"):
        external_initializers(both.SerializeToString())


@pytest.mark.parametrize(
    "data", [b"\x3a\x05abc", b"\x3b", b"\xff" * 11, b"\x38\x01", b"\x3a\x02\x2a\x00\x09"]
)
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(GraphError, match="refused"):
        external_initializers(data)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data):
    with contextlib.suppress(PlyweightError):
        external_initializers(data)


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_what_onnx_reads_agrees(at, byte):
    data = bytearray(residual_model(is_clipped=True)[0])
    data[at % len(data)] = byte
    try:
        found = external_initializers(bytes(data))
    except GraphError:
        return
    try:
        parsed = ModelProto.FromString(bytes(data))
    except Exception:  # refused there for what is not looked at here
        return
    # Either of the two makes a runtime look for a file, so either is enough here.
    tensors = parsed.graph.initializer
    external = {t.name for t in tensors if t.data_location == 1 or t.external_data}
    assert external == set(found)


def test_values_of_another_dtype_or_shape_than_declared_never_reach_the_runtime():
    graph = residual_graph()
    declared = external_initializers(graph.models[0].data)
    values = {n: np.zeros(d.shape, d.dtype) for n, d in declared.items()}
    check_model(declared, values)
    for wrong in (np.zeros((16, 3, 3, 4), np.int8), np.zeros((16, 3, 3, 3), np.uint8)):
        with pytest.raises(GraphError, match=r"int8 of shape \[16, 3, 3, 3\] for 'stem.levels'"):
            check_model(declared, values | {"stem.levels": wrong})
    with pytest.raises(GraphError, match="list has a slot 'more', but its model has not"):
        check_model(declared, values | {"more": np.zeros(1)})
    del values["stem.levels"]
    with pytest.raises(GraphError, match=r"model has a slot 'stem\.levels'"):
        check_model(declared, values)
