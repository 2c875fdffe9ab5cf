"""ONNX models: what has to be known of one before a runtime is given it, read from its bytes.

An artifact may come from anybody, and a model can ask its runtime to read files: a tensor may say
that its values are in one ("external data"). Here such tensors are the slots and nothing else:

    external_initializers(data) == {slot: (dtype, shape)}      and every other tensor is in `data`

Read without the onnx package; the numbers of the fields below are those of onnx/onnx.proto3 in
https://github.com/onnx/onnx.
"""

from dataclasses import dataclass

from plyweight.artifact.strict_json import shown
from plyweight.engine.protobuf import fields, integer_of, message_of, packed, refused, text_of

__all__ = ["Declared", "external_initializers", "slot_name"]

SLOTS = "slots"  # the "file" that stands for what the engine fills in
MAX_DEPTH = 16  # of graphs inside nodes
EXTERNAL = 1
DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}

MODEL_GRAPH, MODEL_TRAINING, MODEL_FUNCTIONS = 7, 20, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
TRAINING_GRAPHS = (1, 2)
FUNCTION_NODE, FUNCTION_ATTRIBUTE = 7, 11
NODE_OP_TYPE, NODE_ATTRIBUTE = 4, 5
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
SPARSE_TENSORS = (1, 2)
TENSOR_DIMS, TENSOR_DTYPE, TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2

FORBIDDEN_OPS = ("EPContext",)  # names a file with a compiled model


@dataclass(frozen=True)
class Declared:
    """What a model says of an initializer that it has not itself.

    Attributes:
        dtype: as numpy spells it.
        shape: of the tensor; empty for a scalar.
    """

    dtype: str
    shape: tuple[int, ...]


def external_initializers(data: bytes) -> dict[str, Declared]:
    """The initializers of the ONNX model ``data`` that are to be filled in, by name.

    Raises:
        GraphError: If it is no such model, or would have a runtime read a file.
    """
    found: dict[str, Declared] = {}
    for number, value in fields(memoryview(data)):
        if number == MODEL_GRAPH:
            _walk_graph(message_of(value), found, MAX_DEPTH)
        elif number == MODEL_TRAINING:
            for inner, graph in fields(message_of(value)):
                if inner in TRAINING_GRAPHS:
                    _walk_graph(message_of(graph), None, MAX_DEPTH)
        elif number == MODEL_FUNCTIONS:
            for inner, part in fields(message_of(value)):
                if inner == FUNCTION_NODE:
                    _walk_node(message_of(part), MAX_DEPTH)
                elif inner == FUNCTION_ATTRIBUTE:
                    _walk_attribute(message_of(part), MAX_DEPTH)
    return found


def slot_name(tensor: int | memoryview) -> str | None:
    """The name of an initializer that is to be filled in; None for one that has its values."""
    found: dict[str, Declared] = {}
    _take_tensor(message_of(tensor), found)
    return next(iter(found), None)


def _walk_graph(graph: memoryview, found: dict[str, Declared] | None, depth: int) -> None:
    """Look at every tensor; slots go to ``found``, and are refused where that is None."""
    if not depth:
        raise refused("it nests graphs too deeply")
    for number, value in fields(graph):
        if number == GRAPH_NODE:
            _walk_node(message_of(value), depth)
        elif number == GRAPH_INITIALIZER:
            _take_tensor(message_of(value), found)
        elif number == GRAPH_SPARSE:
            _walk_sparse(message_of(value))


def _walk_node(node: memoryview, depth: int) -> None:
    for number, value in fields(node):
        if number == NODE_ATTRIBUTE:
            _walk_attribute(message_of(value), depth)
        elif number == NODE_OP_TYPE and text_of(value) in FORBIDDEN_OPS:
            raise refused(f"it has a node {text_of(value)}, which reads a file")


def _walk_attribute(attribute: memoryview, depth: int) -> None:
    for number, value in fields(attribute):
        if number in ATTRIBUTE_TENSORS:
            _take_tensor(message_of(value), None)
        elif number in ATTRIBUTE_GRAPHS:
            _walk_graph(message_of(value), None, depth - 1)
        elif number in ATTRIBUTE_SPARSE:
            _walk_sparse(message_of(value))


def _walk_sparse(sparse: memoryview) -> None:
    for number, value in fields(sparse):
        if number in SPARSE_TENSORS:
            _take_tensor(message_of(value), None)


def _take_tensor(tensor: memoryview, found: dict[str, Declared] | None) -> None:
    """Put a slot into ``found``; a tensor whose values are in the model is left alone."""
    name, dtype, location, shape = "", 0, 0, []
    external: list[tuple[str, str]] = []
    for number, value in fields(tensor):
        if number == TENSOR_NAME:
            name = text_of(value)
        elif number == TENSOR_DTYPE:
            dtype = integer_of(value)
        elif number == TENSOR_LOCATION:
            location = integer_of(value)
        elif number == TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else list(packed(value))
        elif number == TENSOR_EXTERNAL:
            external.append(_entry(message_of(value)))
    if location != EXTERNAL and not external:
        return
    if found is None or [value for key, value in external if key == "location"] != [SLOTS]:
        raise refused(f"its tensor {shown(name)} has its values in a file")
    if name in found or dtype not in DTYPES:
        raise refused(f"its slot {shown(name)} is there twice, or of unknown dtype {dtype}")
    found[name] = Declared(DTYPES[dtype], tuple(shape))


def _entry(message: memoryview) -> tuple[str, str]:
    """A ``StringStringEntryProto``."""
    key = value = ""
    for number, item in fields(message):
        if number == ENTRY_KEY:
            key = text_of(item)
        elif number == ENTRY_VALUE:
            value = text_of(item)
    return key, value
