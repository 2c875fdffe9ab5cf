"""ONNX nodes: those of a model's graph, and the model with others in their place.

    rewritten(data, {}, dropped=(), added={}) == data

Only what a rewriting has to know of a node is read; all else is copied byte by byte.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from plyweight.artifact.strict_json import shown
from plyweight.engine.onnx_constants import (
    ATTRIBUTE_INTEGERS,
    ATTRIBUTE_NAME,
    constant_of,
    integers_of,
)
from plyweight.engine.onnx_model import (
    ATTRIBUTE_GRAPHS,
    DTYPES,
    ENTRY_KEY,
    ENTRY_VALUE,
    EXTERNAL,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    GRAPH_SPARSE,
    MODEL_GRAPH,
    NODE_ATTRIBUTE,
    NODE_OP_TYPE,
    SLOTS,
    SPARSE_TENSORS,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_EXTERNAL,
    TENSOR_LOCATION,
    TENSOR_NAME,
    Declared,
    external_initializers,
    slot_name,
)
from plyweight.engine.protobuf import (
    Part,
    counted,
    fields,
    fields_and_bytes,
    float_of,
    integer_field,
    integer_of,
    message_of,
    text_field,
    text_of,
)
from plyweight.errors import GraphError

__all__ = ["Node", "Nodes", "OnnxModel", "rewritten"]

NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_DOMAIN = 1, 2, 3, 7
ATTRIBUTE_FLOAT, ATTRIBUTE_INTEGER, ATTRIBUTE_TEXT, ATTRIBUTE_TYPE = 2, 3, 4, 20
FLOAT_TYPE, INTEGER_TYPE, TEXT_TYPE, INTEGERS_TYPE = 1, 2, 3, 7
GRAPH_INPUT, GRAPH_OUTPUT = 11, 12
PORT_NAME = 1
MODEL_OPSET, OPSET_DOMAIN, OPSET_VERSION = 8, 1, 2
NUMBERS = {name: number for number, name in DTYPES.items()}

Attribute = int | float | bytes | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the main graph.

    Attributes:
        op_type, domain: of its operator.
        inputs, outputs: names; "" for one that is left out.
        attributes: numbers, texts as bytes, and of a node that is made lists of integers; None for
            what is none of them.
    """

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""


class Nodes:
    """The nodes of a model's main graph, in their order.

    Args:
        data: a model that :func:`~plyweight.engine.onnx_model.external_initializers` accepted.

    Attributes:
        all: of them.
        num_readers: how many times each name is read: by nodes, by graphs inside of nodes, and as
            an output of the graph.
        num_makers: how many times each name is given: by nodes, by initializers, as an input of
            the graph, and the same in graphs inside of nodes.

    Raises:
        GraphError: If something else stands where a name belongs.
    """

    def __init__(self, data: bytes) -> None:
        self.all: list[Node] = []
        self.num_readers: Counter[str] = Counter()
        self.num_makers: Counter[str] = Counter()
        self._readers: dict[str, list[int]] = {}
        self._integers: dict[str, tuple[int, ...] | None] = {}
        for graph in _messages(memoryview(data), (MODEL_GRAPH,)):
            self._add_names(graph)
            for tensor in _messages(graph, (GRAPH_INITIALIZER,)):
                self._integers.update(
                    dict.fromkeys(_texts(tensor, TENSOR_NAME), integers_of(tensor))
                )
            for message in _messages(graph, (GRAPH_NODE,)):
                node = _node(message)
                if (node.op_type, node.domain, len(node.outputs)) == ("Constant", "", 1):
                    self._integers[node.outputs[0]] = constant_of(message)
                for name in dict.fromkeys(node.inputs):
                    self._readers.setdefault(name, []).append(len(self.all))
                self.all.append(node)
                self._add_node(node, message)

    def readers(self, name: str) -> list[int]:
        """The indices of the nodes that read ``name``."""
        return list(self._readers.get(name, ()))

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The short list of integers that ``name`` always is; None where it is something else."""
        return self._integers.get(name) if self.num_makers[name] == 1 else None

    def check_new_names(
        self, replaced: Mapping[int, Sequence[Node]], added: Collection[str]
    ) -> None:
        """Whether nodes and slots that are put into the model have names that are free there.

        Args:
            replaced: what stands in place of nodes, by their index; they may give what those gave.
            added: slots.

        Raises:
            GraphError: If not: something of the model would become something else.
        """
        makers = self.num_makers.copy()
        for index in replaced:
            makers.subtract(self.all[index].outputs)
        given = [name for nodes in replaced.values() for node in nodes for name in node.outputs]
        for name in (*added, *given):
            makers[name] += 1
            if makers[name] > 1:
                raise GraphError(
                    f"the graph has a name {shown(name)} of the engine's own; pack the model again."
                )

    def _add_names(self, graph: memoryview) -> None:
        """Those of inputs, outputs and initializers."""
        for number, value in fields(graph):
            if number == GRAPH_OUTPUT:
                self.num_readers.update(_texts(message_of(value), PORT_NAME))
            elif number == GRAPH_INPUT:
                self.num_makers.update(_texts(message_of(value), PORT_NAME))
            elif number == GRAPH_INITIALIZER:
                self.num_makers.update(_texts(message_of(value), TENSOR_NAME))
            elif number == GRAPH_SPARSE:
                for values in _messages(message_of(value), SPARSE_TENSORS[:1]):
                    self.num_makers.update(_texts(values, TENSOR_NAME))

    def _add_node(self, node: Node, message: memoryview) -> None:
        """What it reads and makes; the model is known not to nest too deeply."""
        self.num_readers.update(node.inputs)
        self.num_makers.update(name for name in node.outputs if name)
        for attribute in _messages(message, (NODE_ATTRIBUTE,)):
            for graph in _messages(attribute, ATTRIBUTE_GRAPHS):
                self._add_names(graph)
                for inner in _messages(graph, (GRAPH_NODE,)):
                    self._add_node(_node(inner), inner)


class OnnxModel:
    """A model that is read once, for all of its bit-widths.

    Args:
        data: its message.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data

    @cached_property
    def slots(self) -> Mapping[str, Declared]:
        """What it declares its slots to be, by name.

        Raises:
            GraphError: If it is no model, or one that is refused.
        """
        return external_initializers(self.data)

    @cached_property
    def nodes(self) -> Nodes:
        """Of its main graph.

        Raises:
            GraphError: The same.
        """
        _ = self.slots
        return Nodes(self.data)


def rewritten(
    data: bytes,
    replaced: Mapping[int, Sequence[Node]],
    *,
    dropped: Collection[str],
    added: Mapping[str, Declared],
) -> bytes:
    """The model ``data`` with other nodes and slots.

    Args:
        data: a model that :func:`~plyweight.engine.onnx_model.external_initializers` accepted.
        replaced: what stands in place of nodes, by their index.
        dropped: slots that are not there any more.
        added: slots that are.
    """
    domains = {node.domain for nodes in replaced.values() for node in nodes}
    parts: list[Part] = []
    for number, value, raw in fields_and_bytes(memoryview(data)):
        if number == MODEL_GRAPH:
            graph = message_of(value)
            parts += counted(MODEL_GRAPH, list(_graph(graph, replaced, dropped, added)))
        else:
            parts.append(raw)
            if number == MODEL_OPSET:
                domains -= {_domain(message_of(value))}
    for domain in sorted(domains - {""}):
        opset = [text_field(OPSET_DOMAIN, domain), integer_field(OPSET_VERSION, 1)]
        parts += counted(MODEL_OPSET, opset)
    return b"".join(parts)


def _graph(
    graph: memoryview,
    replaced: Mapping[int, Sequence[Node]],
    dropped: Collection[str],
    added: Mapping[str, Declared],
) -> Iterator[Part]:
    index = 0
    for number, value, raw in fields_and_bytes(graph):
        if number == GRAPH_NODE:
            if index in replaced:
                for node in replaced[index]:
                    yield from counted(GRAPH_NODE, _node_parts(node))
            else:
                yield raw
            index += 1
        elif number != GRAPH_INITIALIZER or slot_name(value) not in dropped:
            yield raw
    for name, declared in added.items():
        yield from counted(GRAPH_INITIALIZER, _slot_parts(name, declared))


def _node(message: memoryview) -> Node:
    op_type = domain = ""
    inputs, outputs = [], []
    attributes: dict[str, Attribute] = {}
    for number, value in fields(message):
        if number == NODE_INPUT:
            inputs.append(text_of(value))
        elif number == NODE_OUTPUT:
            outputs.append(text_of(value))
        elif number == NODE_OP_TYPE:
            op_type = text_of(value)
        elif number == NODE_DOMAIN:
            domain = text_of(value)
        elif number == NODE_ATTRIBUTE:
            name, scalar = _attribute(message_of(value))
            attributes[name] = scalar
    return Node(
        op_type=op_type,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        attributes=attributes,
        domain="" if domain == "ai.onnx" else domain,
    )


def _attribute(message: memoryview) -> tuple[str, Attribute]:
    name, kind = "", 0
    whole, fraction, text = 0, 0.0, b""  # which a writer may leave out
    for number, value in fields(message):
        if number == ATTRIBUTE_NAME:
            name = text_of(value)
        elif number == ATTRIBUTE_TYPE:
            kind = integer_of(value)
        elif number == ATTRIBUTE_INTEGER:
            whole = integer_of(value)
            whole -= 2**64 if whole >= 2**63 else 0
        elif number == ATTRIBUTE_FLOAT:
            fraction = float_of(value)
        elif number == ATTRIBUTE_TEXT:
            text = bytes(message_of(value))
    found: Mapping[int, Attribute] = {INTEGER_TYPE: whole, FLOAT_TYPE: fraction, TEXT_TYPE: text}
    return name, found.get(kind)


def _messages(message: memoryview, wanted: Collection[int]) -> Iterator[memoryview]:
    for number, value in fields(message):
        if number in wanted:
            yield message_of(value)


def _texts(message: memoryview, wanted: int) -> Iterator[str]:
    for number, value in fields(message):
        if number == wanted:
            yield text_of(value)


def _domain(opset: memoryview) -> str:
    return ["", *_texts(opset, OPSET_DOMAIN)][-1]


def _node_parts(node: Node) -> list[Part]:
    parts: list[Part] = [text_field(NODE_INPUT, name) for name in node.inputs]
    parts += [text_field(NODE_OUTPUT, name) for name in node.outputs]
    parts += [text_field(NODE_NAME, f"node_{node.outputs[0]}")]
    parts += [text_field(NODE_OP_TYPE, node.op_type), text_field(NODE_DOMAIN, node.domain)]
    for name, value in node.attributes.items():
        assert isinstance(value, int | tuple)  # none of those that are made has another one
        if isinstance(value, int):
            kind, numbers = INTEGER_TYPE, [integer_field(ATTRIBUTE_INTEGER, value)]
        else:
            kind, numbers = INTEGERS_TYPE, [integer_field(ATTRIBUTE_INTEGERS, v) for v in value]
        attribute = [text_field(ATTRIBUTE_NAME, name), *numbers]
        attribute.append(integer_field(ATTRIBUTE_TYPE, kind))
        parts += counted(NODE_ATTRIBUTE, attribute)
    return parts


def _slot_parts(name: str, declared: Declared) -> list[Part]:
    num_bytes = np.dtype(declared.dtype).itemsize * int(np.prod(declared.shape, dtype=np.int64))
    external = {"location": SLOTS, "offset": "0", "length": str(num_bytes)}
    parts: list[Part] = [integer_field(TENSOR_DIMS, length) for length in declared.shape]
    parts += [integer_field(TENSOR_DTYPE, NUMBERS[declared.dtype]), text_field(TENSOR_NAME, name)]
    for key, value in external.items():
        entry = [text_field(ENTRY_KEY, key), text_field(ENTRY_VALUE, value)]
        parts += counted(TENSOR_EXTERNAL, entry)
    return [*parts, integer_field(TENSOR_LOCATION, EXTERNAL)]
