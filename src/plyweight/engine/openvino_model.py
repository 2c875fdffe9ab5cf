"""OpenVINO models: roundings written so that its CPU kernels fuse them, and round where they say.

    fused(model)        changes a model in place; what it computes stays the same

The graph rounds an activation of fewer than 8 bits to bytes and clips them:

    FakeQuantize (256 levels) -> Convert (u8) -> Maximum, Minimum -> Convert -> Subtract, Multiply

OpenVINO fuses the FakeQuantize into the convolution before it, and the clip is a pass of its own
over the bytes. Where sums are clamped before they are rounded, both are fused. An activation that
was on another grid before has its kernel already, which takes no clamp: OpenVINO clamps its bytes
instead, and rounds the bounds to whole levels of the old grid. It becomes a FakeQuantize of 16
levels, which are OpenVINO's too (other numbers below 255 are not, and would stay floats), or of 256
levels of which the lowest are never reached, for nothing is negative: they end at 255. A
FakeQuantize of 16 levels on a grid of the same step is taken for one that changes nothing, with all
levels above the highest left in, so there is none. All else keeps its clip.

A convolution that has a FakeQuantize, an addition and a FakeQuantize fused after it leaves out the
rounding of the first one, for speed (OpenVINO 2026.4.1, the composer of oneDNN's post-operations in
its CPU plugin). Then a fifth of a residual block's levels are one off. It does so only where that
FakeQuantize is the first that is fused, so a PReLU of slope 1, which changes nothing and costs one
multiplication, stands before it.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["fused"]

LEVELS, FEW_LEVELS = 256, 16  # that OpenVINO has kernels on bytes for
HIGHEST = LEVELS - 1
CONVOLUTIONS = frozenset(("Convolution", "GroupConvolution"))
SUMS = CONVOLUTIONS | {"MatMul", "Parameter"}  # a parameter is what it is given, as sums are
MAX_DEPTH = 8  # of what is computed from constants alone: a bound is four deep
TOLERANCE = 1e-5  # of a step: a range and the step it was made of are rounded to float32
SAME_STEP = 1e-2  # of a step; generous, for what OpenVINO takes for the same is not documented

Array = NDArray[Any]


def fused(model: Any) -> None:
    """Rewrite the roundings of ``model``, an ``openvino.Model``."""
    operators = importlib.import_module("openvino.opset13")
    found = [_clipped(node) for node in model.get_ordered_ops() if _type(node) == "Minimum"]
    for clipped in found:
        if clipped is not None:
            _rewrite(operators, clipped)
    for node in model.get_ordered_ops():
        if _type(node) == "FakeQuantize" and _is_left_unrounded(node):
            slope = np.ones(1, np.float32)
            same = operators.prelu(_source(node, 0), slope)
            node.input(0).replace_source_output(same.output(0))
    model.validate_nodes_and_infer_types()


@dataclass(frozen=True)
class _Clipped:
    """Floats that become levels, of which none is above ``highest``.

    Attributes:
        node: that gives the levels, bytes.
        x: the floats.
        low, high: what becomes level 0 and level 255.
        highest: of 1 to 254.
    """

    node: Any
    x: Any
    low: float
    high: float
    highest: int

    @property
    def step(self) -> float:
        """Between two levels."""
        return (self.high - self.low) / HIGHEST

    @property
    def end(self) -> float:
        """What becomes the highest level, a float32."""
        return float(np.float32(self.low + self.highest * self.step))


def _clipped(node: Any) -> _Clipped | None:
    """What a Minimum clips, if it is levels of one grid, and a bound that is known."""
    parts = _data_and_constant(node)
    if parts is None:
        return None
    (levels, highest), low = parts, 0.0
    if _type(levels.get_node()) == "Maximum":
        parts = _data_and_constant(levels.get_node())
        if parts is None:
            return None
        levels, low = parts
    rounding = levels.get_node()
    if low != 0 or not 1 <= highest < HIGHEST or _type(rounding) != "Convert":
        return None
    if rounding.get_element_type().get_type_name() != "u8":
        return None
    quantize = _source(rounding, 0).get_node()
    if _type(quantize) != "FakeQuantize" or quantize.get_attributes()["levels"] != LEVELS:
        return None
    ends = [_scalar(_source(quantize, index)) for index in range(1, 5)]
    low_in, high_in, low_out, high_out = ends
    if low_in is None or high_in is None or (low_out, high_out) != (0.0, float(HIGHEST)):
        return None
    x = _source(quantize, 0)
    if not low_in <= 0 < high_in < np.inf or _constant(x) is not None:
        return None
    if not _has_same_shape(node.output(0), x):
        return None
    return _Clipped(node, x, low_in, high_in, int(highest))


def _rewrite(operators: Any, clipped: _Clipped) -> None:
    """Put in place of clipped levels what gives the same and is fused."""
    bytes_ = (np.float32(0), np.float32(clipped.highest))
    low, end = np.float32(clipped.low), np.float32(clipped.end)
    grid = _dequantized(clipped.x)
    if grid is None and _is_of_sums(clipped.x):
        clamped = operators.clamp(clipped.x, float(low), float(end))
        high = np.float32(clipped.high)
        ends = np.float32(0), np.float32(HIGHEST)
        quantize = operators.fake_quantize(clamped, low, high, *ends, LEVELS)
    elif grid is None:
        return
    elif clipped.highest == FEW_LEVELS - 1 and not _is_near(grid[0], clipped.step, SAME_STEP):
        quantize = operators.fake_quantize(clipped.x, low, end, *bytes_, FEW_LEVELS)
    else:
        lowest = np.float32((clipped.highest - HIGHEST) * clipped.step)
        # A zero point of 0: nothing is negative. By an odd number of levels moved, what is between
        # two of them would become the other one.
        is_movable = grid[1] == 0 and clipped.highest % 2
        if outputs := _values_after(clipped) if is_movable else []:
            quantize = operators.fake_quantize(clipped.x, lowest, end, lowest, end, LEVELS)
            for output in outputs:
                output.replace(quantize.output(0))
        return
    levels = operators.convert(quantize, np.uint8)
    clipped.node.output(0).replace(levels.output(0))


def _values_after(clipped: _Clipped) -> list[Any]:
    """What the levels are made into: multiples of their step. Empty if something else reads them.

    Their zero point is 0.
    """
    found = []
    for reader in _readers(clipped.node):
        values = _values_of(reader)
        if values is None:
            return []
        output, step, zero_point = values
        if zero_point or clipped.low or not _is_near(step, clipped.step, TOLERANCE):
            return []
        if not _has_same_shape(output, clipped.x):
            return []
        found.append(output)
    return found


def _values_of(convert: Any) -> tuple[Any, float, float] | None:
    """The output of ``(levels - zero point) * step`` after a Convert, its step and zero point."""
    if _type(convert) != "Convert":
        return None
    node, zero_point = convert, 0.0
    readers = list(_readers(node))
    if [_type(reader) for reader in readers] == ["Subtract"]:
        node, subtracted = readers[0], _scalar(_source(readers[0], 1))
        if subtracted is None or _source(node, 0).get_node() != convert:
            return None
        zero_point, readers = subtracted, list(_readers(node))
    if [_type(reader) for reader in readers] != ["Multiply"]:
        return None
    parts = _data_and_constant(readers[0])
    if parts is None or not parts[1] > 0:
        return None
    return readers[0].output(0), parts[1], zero_point


def _dequantized(values: Any) -> tuple[float, float] | None:
    """The step and zero point of the levels that ``values`` are made of; None if they are not."""
    node, zero_point = values.get_node(), 0.0
    parts = _data_and_constant(node) if _type(node) == "Multiply" else None
    if parts is None:
        return None
    output, step = parts
    if _type(output.get_node()) == "Subtract":
        subtracted = _scalar(_source(output.get_node(), 1))
        if subtracted is None:
            return None
        output, zero_point = _source(output.get_node(), 0), subtracted
    convert = output.get_node()
    if _type(convert) != "Convert" or not step > 0:
        return None
    if _source(convert, 0).get_element_type().get_type_name() != "u8":
        return None
    return step, zero_point


def _has_same_shape(output: Any, other: Any) -> bool:
    """Whether no constant on the way, of one number and several dimensions, added some."""
    return bool(output.get_partial_shape() == other.get_partial_shape())


def _is_near(step: float, other: float, tolerance: float) -> bool:
    return abs(step - other) <= tolerance * step


def _is_of_sums(values: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether floats are sums or inputs, and not bytes of a grid that were moved, as by a pooling.

    OpenVINO moves the step of a grid behind all that moves bytes, and would clamp these.
    """
    node = values.get_node()
    kind = _type(node)
    if kind == "Relu" and depth:
        return _is_of_sums(_source(node, 0), depth - 1)
    if kind == "Add" and depth:
        terms = [t for t in (_source(node, 0), _source(node, 1)) if _is_computed(t)]
        return len(terms) == 2 or any(_is_of_sums(term, depth - 1) for term in terms)
    return kind in SUMS


def _is_computed(output: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether it is more than constants and a few operators on them."""
    node = output.get_node()
    if not depth or _type(node) == "Parameter":
        return True
    return any(_is_computed(_source(node, i), depth - 1) for i in range(len(node.inputs())))


def _is_left_unrounded(quantize: Any) -> bool:
    """Whether a FakeQuantize is between a convolution and an addition that may be fused into it."""
    node = _source(quantize, 0).get_node()
    if _type(node) == "Clamp":  # which becomes part of the FakeQuantize
        node = _source(node, 0).get_node()
    if _type(node) == "Add":  # of a bias
        node = _source(node, 0).get_node()
    if _type(node) not in CONVOLUTIONS:
        return False
    nodes, seen = [quantize], 0
    while nodes and seen < LEVELS:
        node, seen = nodes.pop(), seen + 1
        for reader in _readers(node):
            if _type(reader) == "Add":
                return True
            if _type(reader) in ("Convert", "Maximum", "Minimum", "Subtract", "Multiply"):
                nodes.append(reader)
    return False


def _data_and_constant(node: Any) -> tuple[Any, float] | None:
    """Of the two inputs of a node that which is computed, and the other one, a known number."""
    first, second = _source(node, 0), _source(node, 1)
    for data, other in ((first, second), (second, first)):
        value = _scalar(other)
        if value is not None and _constant(data) is None:
            return data, value
    return None


def _scalar(output: Any) -> float | None:
    """A number that is known."""
    value = _constant(output)
    return None if value is None or value.size != 1 else float(value.reshape(-1)[0])


def _constant(output: Any, depth: int = MAX_DEPTH) -> Array | None:
    """What is computed from constants alone by the few operators of a bound; None for all else."""
    node = output.get_node()
    kind = _type(node)
    if kind == "Constant":
        value: Array = node.data
        return value
    if kind not in ("Convert", "FakeQuantize", "Minimum") or not depth:
        return None
    inputs = []
    for index in range(len(node.inputs())):
        value_of = _constant(_source(node, index), depth - 1)
        if value_of is None or value_of.size != 1:
            return None
        inputs.append(value_of.astype(np.float64))
    if kind == "Minimum":
        return np.minimum(*inputs)
    if kind == "Convert":
        return inputs[0] if _is_whole(inputs[0]) else None
    x, low_in, high_in, low_out, high_out = inputs
    if node.get_attributes()["levels"] != LEVELS or [
        float(low_out.item()),
        float(high_out.item()),
    ] != [0.0, float(HIGHEST)]:
        return None
    if not low_in <= 0 < high_in < np.inf:
        return None
    levels: Array = np.rint(((x - low_in) / (high_in - low_in) * HIGHEST).clip(0, HIGHEST))
    return levels


def _is_whole(value: Array) -> bool:
    """Whether a conversion to a byte, or from one, leaves it what it is."""
    return bool((value == np.rint(value)).all() and (value >= 0).all() and (value < LEVELS).all())


def _readers(node: Any) -> Iterator[Any]:
    for target in node.output(0).get_target_inputs():
        yield target.get_node()


def _source(node: Any, index: int) -> Any:
    return node.input(index).get_source_output()


def _type(node: Any) -> str:
    return str(node.get_type_name())
