"""Shortcuts that leave pixels out and add empty channels: one convolution in ONNX Runtime.

Where a residual block makes its input smaller and has no weights for it, the graph says

    Slice -> Slice -> Pad       rows, columns, channels; on levels

which ONNX Runtime computes one after the other, byte by byte. A convolution of ones is one pass
that all cores share, and gives the same bytes on every machine: every sum has one product at most,
``level - z``, and all scales are 1.

    QLinearConv(levels, ones, z) == Pad(levels[:, :, ::rows, ::columns], channels, z)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plyweight.engine.onnx_model import Declared
from plyweight.engine.onnx_nodes import Node, OnnxModel

__all__ = ["Shortcut", "shortcuts"]

# A convolution takes as many products for a byte as there are channels: with 16 it takes a third
# of the time, from some hundreds on more than copying does.
MOST_CHANNELS = 64
TO_THE_END = 2**31 - 1  # an end that no length reaches
MOST_NODES = 64  # on the way from a value to the convolutions that say how many channels it has
ROWS, COLUMNS = 2, 3
BEFORE, AFTER = 1, 5  # of channels, among the eight numbers of a Pad
ONE, ZERO = "shortcut/one", "shortcut/zero"
SAME_SHAPE = ("QuantizeLinear", "DequantizeLinear", "Relu", "Clip")


@dataclass(frozen=True)
class Shortcut:
    """What stands in place of nodes, by their index, and the slots that it reads."""

    replaced: Mapping[int, tuple[Node, ...]]
    values: Mapping[str, NDArray[np.generic]]


def shortcuts(onnx: OnnxModel) -> Iterator[Shortcut]:
    """Each of the model's, as a convolution.

    Raises:
        GraphError: If it is no model.
    """
    nodes = onnx.nodes.all
    pads = [i for i, node in enumerate(nodes) if (node.op_type, node.domain) == ("Pad", "")]
    if pads:
        yield from filter(None, map(_Finder(onnx).of, pads))


class _Finder:
    def __init__(self, onnx: OnnxModel) -> None:
        self._nodes, self._slots = onnx.nodes, onnx.slots
        self._makers = {
            name: index
            for index, node in enumerate(self._nodes.all)
            for name in node.outputs
            if self._nodes.num_makers[name] == 1
        }

    def of(self, pad: int) -> Shortcut | None:
        """That which ends with a Pad, if it is one."""
        end = self._nodes.all[pad]
        channels = self._padded_channels(end)
        if channels is None:
            return None
        strides = {ROWS: 1, COLUMNS: 1}
        replaced: dict[int, tuple[Node, ...]] = {}
        name = end.inputs[0]
        while (index := self._makers.get(name)) is not None:
            node = self._nodes.all[index]
            if node.op_type != "Slice" or node.domain or self._nodes.num_readers[name] != 1:
                break
            steps = self._steps(node)
            if steps is None:
                break
            for axis, step in steps.items():
                strides[axis] *= step
            replaced[index] = ()
            name = node.inputs[0]
        num_channels = self._num_channels(name)
        if not replaced or num_channels is None or num_channels > MOST_CHANNELS:
            return None
        before, after = channels
        ones = np.eye(before + num_channels + after, num_channels, -before, dtype=np.int8)
        weight, zero_point = f"{end.outputs[0]}/ones", end.inputs[2]
        replaced[pad] = (
            Node(
                op_type="QLinearConv",
                inputs=(name, ONE, zero_point, weight, ONE, ZERO, ONE, zero_point),
                outputs=end.outputs,
                attributes={"strides": tuple(strides.values())},
            ),
        )
        values = {weight: ones[:, :, None, None], ONE: np.float32(1), ZERO: np.int8(0)}
        return Shortcut(replaced, {n: np.asarray(value) for n, value in values.items()})

    def _padded_channels(self, pad: Node) -> tuple[int, int] | None:
        """How many go before and after, if it adds nothing else, and the zero point of bytes."""
        if len(pad.inputs) != 3 or pad.attributes.get("mode", b"constant") != b"constant":
            return None
        zero_point = self._slots.get(pad.inputs[2])
        is_one = self._nodes.num_makers[pad.inputs[2]] == 1
        if not is_one or zero_point != Declared("uint8", ()):
            return None
        pads = self._nodes.integers(pad.inputs[1])
        if pads is None or len(pads) != 8 or min(pads) < 0:
            return None
        before, after = pads[BEFORE], pads[AFTER]
        is_of_channels = sum(pads) == before + after <= MOST_CHANNELS
        return (before, after) if is_of_channels else None

    def _steps(self, node: Node) -> Mapping[int, int] | None:
        """By axis, if all else is left in place."""
        lists = [self._nodes.integers(name) for name in node.inputs[1:]]
        if len(lists) == 3:
            lists.append((1,) * len(lists[2] or ()))
        known = [numbers for numbers in lists if numbers is not None]
        if (
            len(lists) != 4
            or len(known) != 4
            or {len(numbers) for numbers in known} != {len(known[-1])}
        ):
            return None
        found = {}
        for start, end, axis, step in zip(*known, strict=True):
            if start or end < TO_THE_END or axis not in range(4) or step < 1:
                return None
            if axis in (ROWS, COLUMNS):
                found[axis] = step
            elif step != 1:
                return None
        return found

    def _num_channels(self, name: str) -> int | None:
        """Those of a value ``(batch, channels, rows, columns)``; None where that is not known.

        A convolution of more than one channel that is a term of it decides: others have as many,
        or one for all.
        """
        ahead, seen = [name], {name}
        while ahead and len(seen) <= MOST_NODES:
            index = self._makers.get(ahead.pop())
            node = None if index is None else self._nodes.all[index]
            if node is None or node.domain:
                continue
            if node.op_type == "Conv" and len(node.inputs) > 1:
                num_channels = self._num_outputs(node)
                if num_channels is not None and num_channels > 1:
                    return num_channels
            elif node.op_type in (*SAME_SHAPE, "Add"):
                inputs = node.inputs if node.op_type == "Add" else node.inputs[:1]
                ahead += [value for value in inputs if value not in seen]
                seen.update(inputs)
        return None

    def _num_outputs(self, convolution: Node) -> int | None:
        """Channels that a convolution with a weight of integers gives."""
        index = self._makers.get(convolution.inputs[1])
        weight = None if index is None else self._nodes.all[index]
        if weight is None or weight.op_type != "DequantizeLinear" or not weight.inputs:
            return None
        levels = self._slots.get(weight.inputs[0])
        return levels.shape[0] if levels is not None and len(levels.shape) == 4 else None
