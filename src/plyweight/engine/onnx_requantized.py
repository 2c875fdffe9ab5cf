"""Levels of one grid rounded to another one: a single pass over bytes in ONNX Runtime.

Where a module with a quantizer of its own reads what is on a grid already, the graph says

    DequantizeLinear -> QuantizeLinear -> Clip

which ONNX Runtime computes as it stands: to floats, back to bytes, and over the bytes again. It is
a map from 256 levels to others, though, and there is a kernel on bytes that computes such maps,

    QLinearAdd(levels, a zero of the same grid)

and takes a third of the time. Its arithmetic is not that of the other two, so a chain is replaced
only where *both give the same for each of the 256 levels*, which is computed here before.

No Clip is left where the map does not reach the levels that it would clip, or can be moved up
until its highest level is 255, above which nothing can be: then the zero point moves with it.
"""

import functools
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.engine.onnx_model import (
    ATTRIBUTE_GRAPHS,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    MODEL_GRAPH,
    NODE_ATTRIBUTE,
    NODE_OP_TYPE,
    slot_name,
)
from plyweight.engine.onnx_writing import tensor
from plyweight.engine.protobuf import Part, counted, fields_and_bytes

__all__ = ["requantized"]

MODEL_OPSET, OPSET_DOMAIN, OPSET_VERSION_1 = 8, 1, b"\x10\x01"
GRAPH_OUTPUT, VALUE_NAME = 12, 1
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_DOMAIN = 1, 2, 3, 7
CONTRIB = b"com.microsoft"
LEVELS = np.arange(256)
# The kernel for Arm multiplies in fixed point, which is not computed here.
MACHINES = ("x86_64", "AMD64")

Values = Mapping[str, NDArray[Any]]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class _Grid:
    """The names of a step and a zero point."""

    step: str
    zero_point: str

    def values(self, values: Values) -> tuple[np.float32, np.float32]:
        return np.float32(values[self.step]), np.float32(values[self.zero_point])


@dataclass(frozen=True)
class _Node:
    op_type: str
    inputs: tuple[str, ...]
    output: str

    @property
    def grid(self) -> _Grid:
        """Of a node that quantizes or dequantizes."""
        return _Grid(*self.inputs[1:3])


@dataclass(frozen=True)
class _Chain:
    """DequantizeLinear, QuantizeLinear, perhaps Clip, and all that read the levels: indices.

    ``highest`` is the name of the level that Clip leaves.
    """

    before: int
    quantize: int
    clip: int | None
    highest: str | None
    readers: tuple[int, ...]


@dataclass
class _Model:
    """An ONNX model taken apart: everything that is not of interest stays bytes."""

    head: list[Part] = field(default_factory=list)
    graph: list[Part] = field(default_factory=list)  # its fields
    nodes: dict[int, _Node] = field(default_factory=dict)  # by index into ``graph``
    chains: list[_Chain] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)  # likewise
    num_readers: Counter[str] = field(default_factory=Counter)
    has_contrib: bool = False


def requantized(data: bytes, values: Values) -> tuple[bytes, Values]:
    """The ONNX model ``data`` with its second roundings on bytes, where that changes no level.

    Args:
        data: a model that :func:`~plyweight.engine.onnx_model.external_initializers` accepted.
        values: of its slots.

    Returns:
        The model, and the values of the slots that are left in it.
    """
    if platform.machine() not in MACHINES:
        return data, values
    model = _taken_apart(data)
    edits = _Edits(model, values)
    for chain in model.chains:
        edits.add(chain)
    return edits.written() if edits.fields else (data, values)


class _Edits:
    """What is to be written instead of some fields of a graph.

    Attributes:
        fields: by index, what stands there now.
    """

    def __init__(self, model: _Model, values: Values) -> None:
        self._model, self._values = model, values
        self.fields: dict[int, list[Part]] = {}
        self._zero_points: dict[int, str] = {}  # by value: the initializers that are added
        self._left = model.num_readers.copy()
        self._made: dict[tuple[str, bytes, bytes], tuple[str, str]] = {}

    def add(self, chain: _Chain) -> None:
        """Replace a chain, if its levels stay what they are."""
        nodes = self._model.nodes
        before, quantize = nodes[chain.before], nodes[chain.quantize]
        if not all(map(self._is_known, (before.grid, quantize.grid))):
            return
        if chain.highest is not None and chain.highest not in self._values:
            return
        zero_point = int(self._values[quantize.grid.zero_point])
        highest = 255 if chain.highest is None else int(self._values[chain.highest])
        source, target = before.grid.values(self._values), quantize.grid.values(self._values)
        wanted = np.minimum(_by_floats(source, target), highest)
        # Without a Clip as it is; moved up to 255; with its Clip.
        for shift, keeps_clip in ((0, False), (255 - highest, False), (0, True)):
            moved = target[0], np.float32(zero_point + shift)
            found = [levels - shift for levels in _by_addition(source, moved)]
            if keeps_clip:
                found = [np.minimum(levels, highest) for levels in found]
            if zero_point + shift <= 255 and all((f == wanted).all() for f in found):
                self._replace(chain, zero_point + shift, wanted, keeps_clip=keeps_clip)
                return

    def _is_known(self, grid: _Grid) -> bool:
        """Whether it is one grid of bytes, its step a number to divide by, from the slots."""
        step, zero_point = (self._values.get(n) for n in (grid.step, grid.zero_point))
        if step is None or zero_point is None or step.shape or zero_point.shape:
            return False
        is_bytes = step.dtype == np.float32 and zero_point.dtype == np.uint8
        return is_bytes and bool(1e-30 < step < 1e30)

    def written(self) -> tuple[bytes, Values]:
        """The whole model, and the values of its slots."""
        model = self._model
        unread = {name for name in model.slots if not self._left[name]}
        for name in unread:
            self.fields[model.slots[name]] = []
        parts = [
            part for index, raw in enumerate(model.graph) for part in self.fields.get(index, [raw])
        ]
        for value, name in self._zero_points.items():
            parts += counted(GRAPH_INITIALIZER, tensor(name, np.array(value, np.uint8)))
        imports = counted(MODEL_OPSET, [*counted(OPSET_DOMAIN, [CONTRIB]), OPSET_VERSION_1])
        head = [*model.head, *([] if model.has_contrib else imports)]
        values = {name: value for name, value in self._values.items() if name not in unread}
        return b"".join([*head, *counted(MODEL_GRAPH, parts)]), values

    def _replace(self, chain: _Chain, zero_point: int, wanted: Levels, *, keeps_clip: bool) -> None:
        nodes = self._model.nodes
        before, quantize = nodes[chain.before], nodes[chain.quantize]
        output, shifted = quantize.output, quantize.grid.zero_point
        self._drop(chain.quantize)
        if chain.clip is not None and not keeps_clip:
            output = nodes[chain.clip].output
            self._drop(chain.clip)
        if zero_point != int(self._values[shifted]):
            shifted = self._zero_points.setdefault(
                zero_point, f"{len(self._zero_points)}/moved zero point"
            )
        # Readers with equal grids, as two convolutions have before any training, share the levels.
        key = before.inputs[0], wanted.tobytes(), self._values[quantize.grid.step].tobytes()
        made = (output, shifted)
        if not keeps_clip:
            made = self._made.setdefault(key, made)
        if made == (output, shifted):
            source = [before.inputs[0], before.grid.step, before.grid.zero_point]
            zero = [before.grid.zero_point, before.grid.step, before.grid.zero_point]
            inputs = [*source, *zero, quantize.grid.step, shifted]
            self._left.update(inputs)
            self.fields[chain.quantize] = _addition(inputs, output)
        for reader in () if keeps_clip else chain.readers:
            self._drop(reader)
            levels, shifted = made
            step = nodes[reader].grid.step
            self._left.update([levels, step, shifted])
            self.fields[reader] = _with_inputs(self._model.graph[reader], {0: levels, 2: shifted})
        if not self._left[before.output]:
            self._drop(chain.before)

    def _drop(self, index: int) -> None:
        """Leave a node out."""
        self.fields[index] = []
        self._left.subtract(self._model.nodes[index].inputs)


def _by_floats(source: tuple[np.float32, ...], target: tuple[np.float32, ...]) -> Levels:
    """What DequantizeLinear and QuantizeLinear make of each level of ``source``."""
    (step, zero_point), (new_step, new_zero_point) = source, target
    values = (LEVELS.astype(np.float32) - zero_point) * step
    return _saturated(np.rint(values / new_step) + new_zero_point)


def _by_addition(
    source: tuple[np.float32, ...], target: tuple[np.float32, ...]
) -> Iterator[Levels]:
    """What QLinearAdd makes of each level and a zero; without fused multiplications, and with.

    Source: MlasQLinearAddKernelHelper in onnxruntime/core/mlas/lib/qladd.cpp.
    """
    (step, zero_point), (new_step, new_zero_point) = source, target
    ratio = step / new_step
    offset = new_zero_point - (ratio * zero_point + ratio * zero_point)
    levels = LEVELS.astype(np.float32)
    yield _saturated(np.rint(levels * ratio + (zero_point * ratio + offset)))
    wide = np.float64(ratio)  # which holds products, and here their sums, exactly
    inner = np.float32(np.float64(zero_point) * wide + np.float64(offset))
    yield _saturated(np.rint((LEVELS * wide + np.float64(inner)).astype(np.float32)))


def _saturated(rounded: NDArray[Any]) -> Levels:
    return rounded.clip(0, 255).astype(np.int64)


@functools.lru_cache(maxsize=4)  # the models of an artifact, each for several bit-widths
def _taken_apart(data: bytes) -> _Model:
    model = _Model()
    outputs: set[str] = set()
    has_subgraphs = False
    for number, value, raw in fields_and_bytes(memoryview(data)):
        if number != MODEL_GRAPH:
            model.head.append(raw)
            model.has_contrib |= number == MODEL_OPSET and CONTRIB in bytes(raw)
            continue
        for inner, content, whole in fields_and_bytes(value):  # type: ignore[arg-type]
            if inner == GRAPH_NODE:
                has_subgraphs |= _has_subgraph(content)  # type: ignore[arg-type]
                node = _node(content)  # type: ignore[arg-type]
                model.nodes[len(model.graph)] = node
                model.num_readers.update(node.inputs)
            elif inner == GRAPH_INITIALIZER:
                slot = slot_name(content)
                if slot is not None:
                    model.slots[slot] = len(model.graph)
            elif inner == GRAPH_OUTPUT:
                outputs |= set(_texts(content, VALUE_NAME))  # type: ignore[arg-type]
            model.graph.append(whole)
    if not has_subgraphs:  # which may read any value
        model.chains = list(_chains(model, outputs))
    return model


def _chains(model: _Model, outputs: set[str]) -> Iterator[_Chain]:
    makers = {node.output: index for index, node in model.nodes.items() if node.output}
    readers: dict[str, list[int]] = {}
    for index, node in model.nodes.items():
        for name in dict.fromkeys(node.inputs):
            readers.setdefault(name, []).append(index)
    for index, node in model.nodes.items():
        before = makers.get(node.inputs[0]) if node.inputs else None
        if node.op_type != "QuantizeLinear" or before is None or node.output in outputs:
            continue
        if model.nodes[before].op_type != "DequantizeLinear":
            continue
        if model.nodes[before].inputs[0] not in makers or model.nodes[before].output in outputs:
            continue
        clip, highest, output = None, None, node.output
        if [model.nodes[i].op_type for i in readers.get(output, ())] == ["Clip"]:
            (clip,) = readers[output]
            inputs = model.nodes[clip].inputs
            if len(inputs) != 3 or inputs[1] or model.nodes[clip].output in outputs:
                continue
            highest, output = inputs[2], model.nodes[clip].output
        ends = readers.get(output, [])
        if ends and all(_dequantizes(model.nodes[i], output, node.grid) for i in ends):
            yield _Chain(before, index, clip, highest, tuple(ends))


def _dequantizes(node: _Node, levels: str, grid: _Grid) -> bool:
    return node.op_type == "DequantizeLinear" and node.inputs == (
        levels,
        grid.step,
        grid.zero_point,
    )


def _node(message: memoryview) -> _Node:
    """With no output where it has none or several: it is of no interest then."""
    inputs = tuple(_texts(message, NODE_INPUT))
    outputs = list(_texts(message, NODE_OUTPUT))
    (op_type,) = list(_texts(message, NODE_OP_TYPE)) or [""]
    return _Node(op_type, inputs, outputs[0] if len(outputs) == 1 else "")


def _has_subgraph(node: memoryview) -> bool:
    return any(
        inner in ATTRIBUTE_GRAPHS
        for number, attribute, _ in fields_and_bytes(node)
        if number == NODE_ATTRIBUTE
        for inner, _, _ in fields_and_bytes(attribute)  # type: ignore[arg-type]
    )


def _texts(message: memoryview, wanted: int) -> Iterator[str]:
    for number, value, _ in fields_and_bytes(message):
        if number == wanted:
            yield bytes(value).decode()


def _addition(inputs: Sequence[str], output: str) -> list[Part]:
    """A node QLinearAdd, as a field of a graph."""
    named = [(NODE_INPUT, name) for name in inputs]
    named += [(NODE_OUTPUT, output), (NODE_NAME, output), (NODE_OP_TYPE, "QLinearAdd")]
    parts = [part for number, text in named for part in counted(number, [text.encode()])]
    return counted(GRAPH_NODE, [*parts, *counted(NODE_DOMAIN, [CONTRIB])])


def _with_inputs(raw: Part, names: Mapping[int, str]) -> list[Part]:
    """The field of a node with other names at some of its inputs."""
    ((_, message, _),) = fields_and_bytes(memoryview(raw))
    parts: list[Part] = []
    index = 0
    for number, _, whole in fields_and_bytes(message):  # type: ignore[arg-type]
        if number == NODE_INPUT:
            parts += counted(number, [names[index].encode()]) if index in names else [whole]
            index += 1
        else:
            parts.append(whole)
    return counted(GRAPH_NODE, parts)
