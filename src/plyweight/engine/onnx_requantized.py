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

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.engine.onnx_model import MICROSOFT, Declared
from plyweight.engine.onnx_nodes import Node, Nodes, OnnxModel, rewritten
from plyweight.engine.onnx_shortcuts import shortcuts

__all__ = ["requantized"]

LEVELS = np.arange(256)
# The kernel for Arm multiplies in fixed point, which is not computed here.
MACHINES = ("x86_64", "AMD64")
# Of steps: their quotients are numbers to compute with, and the levels of one grid on the other
# are int32, which the kernel rounds to.
LEAST_STEP, LARGEST_STEP, LARGEST_RATIO = 2.0**-100, 2.0**100, 2.0**20
PLAIN = frozenset(("axis", "saturate"))  # attributes that mean nothing on one grid of bytes

Values = Mapping[str, NDArray[Any]]
Levels = NDArray[np.int64]
Grid = tuple[np.float32, np.float32]  # a step and a zero point


@dataclass(frozen=True)
class _Chain:
    """DequantizeLinear, QuantizeLinear, perhaps Clip, and all that read the levels: indices."""

    before: int
    quantize: int
    clip: int | None
    readers: tuple[int, ...]


def requantized(onnx: OnnxModel, values: Values) -> tuple[bytes, Values]:
    """The model with its second roundings on bytes, and its ``shortcuts`` as convolutions.

    Both only where that changes no level.

    Args:
        onnx: the model.
        values: of its slots.

    Returns:
        The model's data, and the values of the slots that are left in it.

    Raises:
        GraphError: If it is no model, or has names of the engine's own.
    """
    if platform.machine() not in MACHINES or not values:
        return onnx.data, values
    nodes = onnx.nodes
    change = _Change(nodes, values)
    for chain in _chains(nodes):
        change.take(chain)
    new: dict[str, NDArray[Any]]
    new = {name: np.asarray(value, np.uint8) for value, name in change.zero_points.items()}
    for shortcut in shortcuts(onnx):
        change.put_all(shortcut.replaced)
        new |= shortcut.values
    if not change.replaced:
        return onnx.data, values
    left = change.num_readers_left()
    dropped = {name for name in values if name in onnx.slots and not left[name]}
    added = {name: Declared(value.dtype.name, value.shape) for name, value in new.items()}
    nodes.check_new_names(change.replaced, added)
    data = rewritten(onnx.data, change.replaced, dropped=dropped, added=added)
    kept = {name: value for name, value in values.items() if name not in dropped}
    return data, kept | new


class _Change:
    """What is different from the model.

    Attributes:
        replaced: what stands in place of nodes, by their index.
        zero_points: names of the slots that are added, by their value.
    """

    def __init__(self, nodes: Nodes, values: Values) -> None:
        self._nodes, self._values = nodes, values
        self.replaced: dict[int, tuple[Node, ...]] = {}
        self.zero_points: dict[int, str] = {}
        self._read: set[int] = set()  # nodes whose inputs others have taken over
        self._made: dict[tuple[str, bytes, bytes], tuple[str, str]] = {}
        self._left = nodes.num_readers.copy()

    def take(self, chain: _Chain) -> None:
        """Replace a chain, if its levels stay what they are."""
        if not self._read.isdisjoint(chain.readers):  # nodes in no order that they can run in
            return
        before, quantize = self._now(chain.before), self._nodes.all[chain.quantize]
        source, target = self._grid(before), self._grid(quantize)
        highest = 255 if chain.clip is None else self._byte(self._nodes.all[chain.clip].inputs[2])
        if source is None or target is None or highest is None:
            return
        ratio = float(source[0]) / float(target[0])
        if not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
            return
        wanted = np.minimum(_by_floats(source, target), highest)
        zero_point = int(target[1])
        # Without a Clip as it is; moved up to 255; with its Clip.
        for shift, keeps_clip in ((0, False), (255 - highest, False), (0, True)):
            moved = target[0], np.float32(zero_point + shift)
            found = [levels - shift for levels in _by_addition(source, moved)]
            if keeps_clip:
                found = [np.minimum(levels, highest) for levels in found]
            if zero_point + shift <= 255 and all((f == wanted).all() for f in found):
                self._replace(chain, target, zero_point + shift, wanted, keeps_clip=keeps_clip)
                return

    def put_all(self, replaced: Mapping[int, tuple[Node, ...]]) -> None:
        """Replace nodes of another kind than those of chains."""
        for index, nodes in replaced.items():
            self._put(index, *nodes)

    def num_readers_left(self) -> Mapping[str, int]:
        """How many times each name is read in the model as it is then."""
        return self._left

    def _now(self, index: int) -> Node:
        """A node that is still there; as the reader of another chain it may have other inputs."""
        return self.replaced.get(index, (self._nodes.all[index],))[0]

    def _value(self, name: str) -> NDArray[Any] | None:
        """That of a slot, one of the model's or one that is added."""
        for value, added in self.zero_points.items():
            if name == added:
                return np.array(value, np.uint8)
        return self._values.get(name) if self._nodes.num_makers[name] == 1 else None

    def _byte(self, name: str) -> int | None:
        """The value of a slot, if it is one byte."""
        value = self._value(name)
        return None if value is None or value.shape or value.dtype != np.uint8 else int(value)

    def _grid(self, node: Node) -> Grid | None:
        """That of a node, if it is one grid of bytes from the slots, its step one to divide by."""
        step, zero_point = self._value(node.inputs[1]), self._byte(node.inputs[2])
        if zero_point is None or step is None or step.shape or step.dtype != np.float32:
            return None
        if not LEAST_STEP < float(step) < LARGEST_STEP:
            return None
        return np.float32(step), np.float32(zero_point)

    def _replace(
        self, chain: _Chain, target: Grid, zero_point: int, wanted: Levels, *, keeps_clip: bool
    ) -> None:
        nodes = self._nodes.all
        before, quantize = self._now(chain.before), nodes[chain.quantize]
        self._read.add(chain.before)
        (output,), (_, step, shifted) = quantize.outputs, quantize.inputs
        self._put(chain.quantize)
        if chain.clip is not None and not keeps_clip:
            (output,) = nodes[chain.clip].outputs
            self._put(chain.clip)
        if zero_point != int(target[1]):
            shifted = self.zero_points.setdefault(
                zero_point, f"{len(self.zero_points)}/moved zero point"
            )
        made = output, shifted
        if not keeps_clip:
            # Readers with equal grids, as two convolutions have before training, share the levels.
            # (The zero point is the level of 0, which is among those of any grid, and not clipped.)
            key = before.inputs[0], wanted.tobytes(), target[0].tobytes()
            made = self._made.setdefault(key, made)
        if made == (output, shifted):
            zero = before.inputs[2], *before.inputs[1:]
            addition = Node(
                op_type="QLinearAdd",
                inputs=(*before.inputs, *zero, step, shifted),
                outputs=(output,),
                domain=MICROSOFT,
            )
            self._put(chain.quantize, addition)
        for index in () if keeps_clip else chain.readers:
            reader = nodes[index]
            self._put(index, replace(reader, inputs=(made[0], reader.inputs[1], made[1])))
        if not self._left[before.outputs[0]]:
            self._put(chain.before)

    def _put(self, index: int, *nodes: Node) -> None:
        """Those, or none, in place of a node."""
        for old in self.replaced.get(index, (self._nodes.all[index],)):
            self._left.subtract(old.inputs)
        for new in nodes:
            self._left.update(new.inputs)
        self.replaced[index] = nodes


def _by_floats(source: Grid, target: Grid) -> Levels:
    """What DequantizeLinear and QuantizeLinear make of each level of ``source``."""
    (step, zero_point), (new_step, new_zero_point) = source, target
    values = (LEVELS.astype(np.float32) - zero_point) * step
    return _saturated(np.rint(values / new_step) + new_zero_point)


def _by_addition(source: Grid, target: Grid) -> Iterator[Levels]:
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


def _chains(nodes: Nodes) -> Iterator[_Chain]:
    makers = {name: index for index, node in enumerate(nodes.all) for name in node.outputs}
    for index, node in enumerate(nodes.all):
        if not _is_on_grid(node, "QuantizeLinear") or node.inputs[0] not in makers:
            continue
        before = makers[node.inputs[0]]
        source = nodes.all[before]
        if not _is_on_grid(source, "DequantizeLinear") or source.inputs[0] not in makers:
            continue
        clip, output = None, node.outputs[0]
        readers = nodes.readers(output)
        if [_operator(nodes.all[i]) for i in readers] == ["Clip"]:
            (clip,) = readers
            if not _is_upper_bound(nodes.all[clip], output) or not _is_plain(nodes, output):
                continue
            (output,) = nodes.all[clip].outputs
            readers = nodes.readers(output)
        names = source.outputs[0], output
        is_given_once = nodes.num_makers[source.inputs[0]] == 1
        if readers and is_given_once and all(_is_plain(nodes, name) for name in names):
            grid = output, *node.inputs[1:]
            ends = [nodes.all[i] for i in readers]
            if all(_is_on_grid(end, "DequantizeLinear") and end.inputs == grid for end in ends):
                yield _Chain(before, index, clip, tuple(readers))


def _is_plain(nodes: Nodes, name: str) -> bool:
    """Whether it is given once, and only nodes of the main graph read it, each once."""
    is_read_elsewhere = nodes.num_readers[name] != len(nodes.readers(name))
    return nodes.num_makers[name] == 1 and not is_read_elsewhere


def _is_on_grid(node: Node, op_type: str) -> bool:
    """Whether it is of that operator, with a step and a zero point and nothing else to heed."""
    return (
        _operator(node) == op_type
        and len(node.inputs) == 3
        and all(node.inputs)
        and len(node.outputs) == 1
        and bool(node.outputs[0])
        and all(n in PLAIN and isinstance(v, int) for n, v in node.attributes.items())
    )


def _is_upper_bound(clip: Node, levels: str) -> bool:
    """Whether a Clip has a highest value only."""
    return (
        len(clip.inputs) == 3
        and clip.inputs[:2] == (levels, "")
        and len(clip.outputs) == 1
        and bool(clip.outputs[0])
        and not clip.attributes
    )


def _operator(node: Node) -> str:
    """The operator, if it is one of ONNX itself."""
    return "" if node.domain else node.op_type
