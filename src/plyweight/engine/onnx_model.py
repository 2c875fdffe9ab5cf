"""ONNX models: what has to be known of one before a runtime is given it, read from its bytes.

An artifact may come from anybody, and a model can ask its runtime to read files: a tensor may say
that its values are in one ("external data"). Here such tensors are the slots and nothing else:

    external_initializers(data) == {slot: (dtype, shape)}      and every other tensor is in `data`

Read without the onnx package; the numbers of the fields below are those of onnx/onnx.proto3 in
https://github.com/onnx/onnx.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from plyweight.artifact.strict_json import shown
from plyweight.engine.protobuf import (
    Value,
    fields,
    integer_of,
    message_of,
    packed,
    refused,
    text_of,
)

__all__ = ["MAX_FIELDS", "MAX_NODES", "Declared", "external_initializers", "slot_name"]

SLOTS = "slots"  # the "file" that stands for what the engine fills in
MAX_DEPTH = 16  # of graphs inside nodes
# A node takes as little as two bytes and microseconds to read, and a runtime takes longer: a file
# of 0.9 MB had 400,000 and took 40 s. Large networks have some thousands.
MAX_NODES = 50_000
MAX_FIELDS = 2_000_000  # of all messages that are looked into: inputs, attributes, initializers
MAX_DIMS = 64  # that are read of a tensor; the runtimes have fewer
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
FUNCTION_NAME, FUNCTION_NODE, FUNCTION_DOMAIN, FUNCTION_ATTRIBUTE = 1, 7, 10, 11
NODE_OP_TYPE, NODE_ATTRIBUTE = 4, 5
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
SPARSE_TENSORS = (1, 2)
TENSOR_DIMS, TENSOR_DTYPE, TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 13, 14
TENSOR_RAW = 9  # values as they lie in memory, little-endian
ENTRY_KEY, ENTRY_VALUE = 1, 2

FORBIDDEN_OPS = ("EPContext",)  # names a file with a compiled model
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
OPERATOR_DOMAINS = ("", "ai.onnx", MICROSOFT)  # whose operators the engine reads or writes


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
        GraphError: If it is no such model, has more parts than are read, or would have a runtime
            read a file.
    """
    walk = _Walk()
    walk.model(memoryview(data))
    for name in sorted(walk.found.keys() & walk.inline):
        raise refused(f"its initializer {shown(name)} is there twice")
    return walk.found


def slot_name(tensor: Value) -> str | None:
    """The name of an initializer that is to be filled in; None for one that has its values."""
    walk = _Walk()
    walk.tensor(message_of(tensor), may_be_slot=True)
    return next(iter(walk.found), None)


class _Walk:
    """A look at every tensor and node of a model, as far as ``MAX_NODES`` and ``MAX_FIELDS``.

    Attributes:
        found: the slots.
        inline: names of the initializers beside them that have their values.
    """

    def __init__(self) -> None:
        self.found: dict[str, Declared] = {}
        self.inline: set[str] = set()
        self._num_fields = self._num_nodes = 0

    def model(self, model: memoryview) -> None:
        num_graphs = 0
        for number, value in self._fields(model):
            if number == MODEL_GRAPH:
                num_graphs += 1
                if num_graphs > 1:
                    raise refused("it has two graphs")
                self._graph(message_of(value), MAX_DEPTH, is_main=True)
            elif number == MODEL_TRAINING:
                for inner, graph in self._fields(message_of(value)):
                    if inner in TRAINING_GRAPHS:
                        self._graph(message_of(graph), MAX_DEPTH, is_main=False)
            elif number == MODEL_FUNCTIONS:
                self._function(message_of(value))

    def tensor(self, tensor: memoryview, *, may_be_slot: bool) -> None:
        """Note a slot, which is refused where none may be; leave alone what has its values."""
        shape: list[int] = []
        name, dtype, location = "", 0, 0
        external: list[tuple[str, str]] = []
        for number, value in self._fields(tensor):
            if number == TENSOR_NAME:
                name = text_of(value)
            elif number == TENSOR_DTYPE:
                dtype = integer_of(value)
            elif number == TENSOR_LOCATION:
                location = integer_of(value)
            elif number == TENSOR_DIMS:
                if isinstance(value, int):
                    shape.append(value)
                else:
                    shape += islice(packed(message_of(value)), MAX_DIMS)
            elif number == TENSOR_EXTERNAL:
                external.append(_entry(message_of(value)))
        if location != EXTERNAL and not external:
            if may_be_slot:
                self.inline.add(name)
            return
        if not may_be_slot or [v for key, v in external if key == "location"] != [SLOTS]:
            raise refused(f"its tensor {shown(name)} has its values in a file")
        if name in self.found or dtype not in DTYPES:
            raise refused(f"its slot {shown(name)} is there twice, or of unknown dtype {dtype}")
        self.found[name] = Declared(DTYPES[dtype], tuple(shape))

    def _graph(self, graph: memoryview, depth: int, *, is_main: bool) -> None:
        if not depth:
            raise refused("it nests graphs too deeply")
        for number, value in self._fields(graph):
            if number == GRAPH_NODE:
                self._node(message_of(value), depth)
            elif number == GRAPH_INITIALIZER:
                self.tensor(message_of(value), may_be_slot=is_main)
            elif number == GRAPH_SPARSE:
                self._sparse(message_of(value))

    def _function(self, function: memoryview) -> None:
        name = domain = ""
        for number, value in self._fields(function):
            if number == FUNCTION_NODE:
                self._node(message_of(value), MAX_DEPTH)
            elif number == FUNCTION_ATTRIBUTE:
                self._attribute(message_of(value), MAX_DEPTH)
            elif number == FUNCTION_NAME:
                name = text_of(value)
            elif number == FUNCTION_DOMAIN:
                domain = text_of(value)
        if domain in OPERATOR_DOMAINS:  # a node of that name would mean something else
            raise refused(f"it defines the operator {shown(name)} of a runtime's own anew")

    def _node(self, node: memoryview, depth: int) -> None:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise refused(f"it has more than {MAX_NODES:,} nodes")
        for number, value in self._fields(node):
            if number == NODE_ATTRIBUTE:
                self._attribute(message_of(value), depth)
            elif number == NODE_OP_TYPE and text_of(value) in FORBIDDEN_OPS:
                raise refused(f"it has a node {text_of(value)}, which reads a file")

    def _attribute(self, attribute: memoryview, depth: int) -> None:
        for number, value in self._fields(attribute):
            if number in ATTRIBUTE_TENSORS:
                self.tensor(message_of(value), may_be_slot=False)
            elif number in ATTRIBUTE_GRAPHS:
                self._graph(message_of(value), depth - 1, is_main=False)
            elif number in ATTRIBUTE_SPARSE:
                self._sparse(message_of(value))

    def _sparse(self, sparse: memoryview) -> None:
        for number, value in self._fields(sparse):
            if number in SPARSE_TENSORS:
                self.tensor(message_of(value), may_be_slot=False)

    def _fields(self, message: memoryview) -> Iterator[tuple[int, Value]]:
        for field in fields(message):
            self._num_fields += 1
            if self._num_fields > MAX_FIELDS:
                raise refused(f"it has more than {MAX_FIELDS:,} fields")
            yield field


def _entry(message: memoryview) -> tuple[str, str]:
    """A ``StringStringEntryProto``."""
    key = value = ""
    for number, item in fields(message):
        if number == ENTRY_KEY:
            key = text_of(item)
        elif number == ENTRY_VALUE:
            value = text_of(item)
    return key, value
