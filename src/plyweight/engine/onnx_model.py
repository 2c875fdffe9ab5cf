"""ONNX models: what has to be known of one before a runtime is given it, read from its bytes.

An artifact may come from anybody, and a model can ask its runtime to read files: a tensor may say
that its values are in one ("external data"). Here such tensors are the slots and nothing else:

    external_initializers(data) == {slot: (dtype, shape)}      and every other tensor is in `data`

Protocol buffers are read as far as that takes, without the onnx package: see
https://protobuf.dev/programming-guides/encoding, and onnx/onnx.proto3 in
https://github.com/onnx/onnx, whose field numbers are the constants below.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from plyweight.artifact.strict_json import shown
from plyweight.errors import GraphError

__all__ = ["Declared", "external_initializers", "fields_and_bytes", "slot_name"]

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

VARINT, EIGHT_BYTES, COUNTED, FOUR_BYTES = 0, 1, 2, 5  # wire types; groups (3, 4) are long gone
FIXED_BYTES = {EIGHT_BYTES: 8, FOUR_BYTES: 4}
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
    for number, value in _fields(memoryview(data)):
        if number == MODEL_GRAPH:
            _walk_graph(_message(value), found, MAX_DEPTH)
        elif number == MODEL_TRAINING:
            for inner, graph in _fields(_message(value)):
                if inner in TRAINING_GRAPHS:
                    _walk_graph(_message(graph), None, MAX_DEPTH)
        elif number == MODEL_FUNCTIONS:
            for inner, part in _fields(_message(value)):
                if inner == FUNCTION_NODE:
                    _walk_node(_message(part), MAX_DEPTH)
                elif inner == FUNCTION_ATTRIBUTE:
                    _walk_attribute(_message(part), MAX_DEPTH)
    return found


def slot_name(tensor: int | memoryview) -> str | None:
    """The name of an initializer that is to be filled in; None for one that has its values."""
    found: dict[str, Declared] = {}
    _take_tensor(_message(tensor), found)
    return next(iter(found), None)


def _walk_graph(graph: memoryview, found: dict[str, Declared] | None, depth: int) -> None:
    """Look at every tensor; slots go to ``found``, and are refused where that is None."""
    if not depth:
        raise _refused("it nests graphs too deeply")
    for number, value in _fields(graph):
        if number == GRAPH_NODE:
            _walk_node(_message(value), depth)
        elif number == GRAPH_INITIALIZER:
            _take_tensor(_message(value), found)
        elif number == GRAPH_SPARSE:
            _walk_sparse(_message(value))


def _walk_node(node: memoryview, depth: int) -> None:
    for number, value in _fields(node):
        if number == NODE_ATTRIBUTE:
            _walk_attribute(_message(value), depth)
        elif number == NODE_OP_TYPE and _text(value) in FORBIDDEN_OPS:
            raise _refused(f"it has a node {_text(value)}, which reads a file")


def _walk_attribute(attribute: memoryview, depth: int) -> None:
    for number, value in _fields(attribute):
        if number in ATTRIBUTE_TENSORS:
            _take_tensor(_message(value), None)
        elif number in ATTRIBUTE_GRAPHS:
            _walk_graph(_message(value), None, depth - 1)
        elif number in ATTRIBUTE_SPARSE:
            _walk_sparse(_message(value))


def _walk_sparse(sparse: memoryview) -> None:
    for number, value in _fields(sparse):
        if number in SPARSE_TENSORS:
            _take_tensor(_message(value), None)


def _take_tensor(tensor: memoryview, found: dict[str, Declared] | None) -> None:
    """Put a slot into ``found``; a tensor whose values are in the model is left alone."""
    name, dtype, location, shape = "", 0, 0, []
    external: list[tuple[str, str]] = []
    for number, value in _fields(tensor):
        if number == TENSOR_NAME:
            name = _text(value)
        elif number == TENSOR_DTYPE:
            dtype = _number(value)
        elif number == TENSOR_LOCATION:
            location = _number(value)
        elif number == TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else list(_packed(value))
        elif number == TENSOR_EXTERNAL:
            external.append(_entry(_message(value)))
    if location != EXTERNAL and not external:
        return
    if found is None or [value for key, value in external if key == "location"] != [SLOTS]:
        raise _refused(f"its tensor {shown(name)} has its values in a file")
    if name in found or dtype not in DTYPES:
        raise _refused(f"its slot {shown(name)} is there twice, or of unknown dtype {dtype}")
    found[name] = Declared(DTYPES[dtype], tuple(shape))


def _entry(message: memoryview) -> tuple[str, str]:
    """A ``StringStringEntryProto``."""
    key = value = ""
    for number, item in _fields(message):
        if number == ENTRY_KEY:
            key = _text(item)
        elif number == ENTRY_VALUE:
            value = _text(item)
    return key, value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Every field of a message: its number, and an integer or the bytes of it."""
    for number, value, _ in fields_and_bytes(message):
        yield number, value


def fields_and_bytes(message: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """The same, and all the bytes that the field takes, its number and length among them.

    Raises:
        GraphError: If the message is none.
    """
    offset, stop = 0, len(message)
    while offset < stop:
        start = offset
        tag, offset = _varint(message, offset)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, offset = _varint(message, offset)
            yield number, value, message[start:offset]
            continue
        if wire_type == COUNTED:
            size, offset = _varint(message, offset)
        elif wire_type in FIXED_BYTES:
            size = FIXED_BYTES[wire_type]
        else:
            raise _refused(f"a field has wire type {wire_type}")
        if size > stop - offset:
            raise _refused("it ends inside a field")
        yield number, message[offset : offset + size], message[start : offset + size]
        offset += size


def _packed(message: memoryview) -> Iterator[int]:
    """The integers of a packed repeated field."""
    offset = 0
    while offset < len(message):
        value, offset = _varint(message, offset)
        yield value


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    """An integer of seven bits per byte, the lowest first; and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            raise _refused("it ends inside a number")
        byte = message[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise _refused("a number has more than 64 bits")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _refused("a number stands where a message belongs")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _refused("a message stands where a number belongs")
    return value


def _text(value: int | memoryview) -> str:
    try:
        return bytes(_message(value)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"a name is no UTF-8 ({error})") from error


def _refused(reason: str) -> GraphError:
    return GraphError(f"the graph's ONNX model is refused: {reason}; pack the model again.")
