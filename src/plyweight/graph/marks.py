"""Marks: where activations are rounded to a grid, and how that becomes QuantizeLinear.

While the graph is being rewritten, a mark is one node ``plyweight::Round(x)`` that names its
quantizer. At the end it is expanded, as ONNX Runtime fuses it:

    QuantizeLinear (uint8) -> Clip(uint8, lowest, highest) -> DequantizeLinear

Clip only where the grid has fewer than 256 levels, or where a ReLU or ReLU6 went before: rounding
is monotone, so ``round(clamp(x, a, b)) = clamp(round(x), round(a), round(b))``, and what clamped
floats clamps levels. For ReLU on a grid that begins at 0 nothing is left of it.

What moves values and computes none (MaxPool, Concat, Slice, ...) works on levels between the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from plyweight.graph.slots import FLOAT, UINT8, Slots, new_node

__all__ = [
    "Bounds",
    "absorb_clamps",
    "constant_of",
    "expand_marks",
    "is_mark",
    "is_moving",
    "bounds_of",
    "clamp_again",
    "clamp_first",
    "clamp_of",
    "mark",
    "mark_source",
    "marks_of",
    "moved_inputs",
    "prefix_of",
]

DOMAIN = "plyweight"
# Operators that move values or choose among them, whatever these are.
_MOVING = (
    *("MaxPool", "Slice", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand"),
    *("Concat", "Split", "Pad", "DepthToSpace", "SpaceToDepth"),
)


@dataclass(frozen=True)
class Bounds:
    """What clamped the values before they are rounded; None where nothing did."""

    lowest: float | None = None
    largest: float | None = None


def mark(node: ir.Node, index: int, prefix: str, *, name: str) -> ir.Value:
    """Let ``node`` read its input ``index`` through quantizer ``prefix``."""
    value = node.inputs[index]
    assert value is not None
    marked = new_node(node, "Round", [value], name, {"prefix": prefix}, domain=DOMAIN, like=value)
    node.replace_input_with(index, marked)
    return marked


def mark_source(graph: ir.Graph, value: ir.Value, prefix: str, *, name: str) -> None:
    """Let all who read ``value`` read it through quantizer ``prefix``."""
    marked = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=value.shape)
    value.replace_all_uses_with(marked, replace_graph_outputs=True)
    node = ir.node(
        "Round", [value], {"prefix": prefix}, domain=DOMAIN, outputs=[marked], name=f"node_{name}"
    )
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)


def is_mark(node: ir.Node | None) -> bool:
    """Whether ``node`` is a mark."""
    return node is not None and node.domain == DOMAIN


def marks_of(graph: ir.Graph) -> list[ir.Node]:
    """All marks, in the order of execution."""
    return [node for node in graph if is_mark(node)]


def prefix_of(node: ir.Node) -> str:
    """The quantizer that a mark names."""
    return node.attributes["prefix"].as_string()


def bounds_of(node: ir.Node) -> Bounds:
    """What clamped the values before this mark."""
    found = {
        key: node.attributes[key].as_float()
        for key in ("lowest", "largest")
        if key in node.attributes
    }
    return Bounds(**found)


def is_moving(node: ir.Node | None) -> bool:
    """Whether the outputs of ``node`` are values among its inputs, zeros perhaps."""
    if node is None or node.domain != "" or node.op_type not in _MOVING:
        return False
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Pad":
        filled = node.inputs[2] if len(node.inputs) > 2 else None
        constant = None if filled is None else constant_of(filled)
        return filled is None or (constant is not None and not constant.any())
    return True


def moved_inputs(node: ir.Node) -> list[int]:
    """Which inputs of a moving node are the values that it moves."""
    return list(range(len(node.inputs))) if node.op_type == "Concat" else [0]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of a constant of the graph; None if it is none, or a slot."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return None
    return tensor.numpy()


def clamp_of(node: ir.Node | None) -> Bounds | None:
    """The bounds of a node that clamps to constants, or None."""
    if node is None or node.domain != "":
        return None
    if node.op_type == "Relu":
        return Bounds(lowest=0.0)
    if node.op_type != "Clip":
        return None
    given = [*node.inputs[1:3], None, None][:2]
    constants = [None if value is None else constant_of(value) for value in given]
    if any(v is not None and c is None for v, c in zip(given, constants, strict=True)):
        return None
    lowest, largest = (None if c is None else float(c.reshape(())) for c in constants)
    return Bounds(lowest, largest)


def absorb_clamps(graph: ir.Graph) -> None:
    """Take ReLUs and clips out whose result is only rounded, and let the marks know."""
    for node in marks_of(graph):
        source = node.inputs[0]
        assert source is not None
        clamp = clamp_of(source.producer())
        if clamp is None or source.is_graph_output() or bounds_of(node) != Bounds():
            continue
        if not all(is_mark(user) for user in source.consumers()):
            continue
        producer = source.producer()
        assert producer is not None
        for user in list(source.consumers()):
            user.replace_input_with(0, producer.inputs[0])
            for key in ("lowest", "largest"):
                bound = getattr(clamp, key)
                if bound is not None:
                    user.attributes[key] = ir.AttrFloat32(key, bound)
        graph.remove(producer, safe=True)


def clamp_first(graph: ir.Graph) -> None:
    """Let a ReLU that alone reads what is rounded go before the rounding, in place.

    Rounding is monotone and leaves 0 where it is, so ``relu(round(x)) = round(relu(x))``.
    """
    for node in marks_of(graph):
        source, rounded = node.inputs[0], node.outputs[0]
        users = list(rounded.uses())
        if len(users) != 1 or rounded.is_graph_output() or users[0].node.op_type != "Relu":
            continue
        clamp = users[0].node
        clamped = clamp.outputs[0]
        clamped.replace_all_uses_with(rounded, replace_graph_outputs=True)
        clamp.replace_input_with(0, source)
        node.replace_input_with(0, clamped)
        graph.remove(node)
        graph.insert_after(clamp, node)


def clamp_again(node: ir.Node) -> ir.Value:
    """What the mark ``node`` reads, clamped as it was before the mark took that over."""
    source, bounds = node.inputs[0], bounds_of(node)
    assert source is not None
    if bounds == Bounds():
        return source
    name = f"{node.outputs[0].name}/clamped"
    ends = [
        None
        if bound is None
        else new_node(node, "Constant", [], f"{name}/{end}", {"value_float": bound})
        for end, bound in (("lowest", bounds.lowest), ("largest", bounds.largest))
    ]
    return new_node(node, "Clip", [source, *ends], name, like=source)


def expand_marks(
    graph: ir.Graph, clips: Callable[[str, Bounds], tuple[bool, bool]], alias: Mapping[str, str]
) -> None:
    """Put QuantizeLinear, Clip and DequantizeLinear where the marks are, in place.

    Args:
        graph: with marks.
        clips: for a quantizer and bounds, whether levels need a lowest, and a highest one.
        alias: quantizers whose grid is that of another one.
    """
    slots = Slots(graph)
    dequantized: dict[ir.Value, str] = {}  # what came out of DequantizeLinear, and whose grid
    for node in list(graph):
        if is_mark(node):
            prefix = prefix_of(node)
            prefix = alias.get(prefix, prefix)
            source, out = node.inputs[0], node.outputs[0]
            assert source is not None
            if dequantized.get(source) == prefix and bounds_of(node) == Bounds():
                new = source  # on that grid already
            else:
                levels = _quantize(slots, node, prefix, clips(prefix, bounds_of(node)))
                new = _dequantize(slots, node, levels, prefix, f"{out.name}/rounded")
                dequantized[new] = prefix
            out.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        elif is_moving(node):
            _move_levels(slots, node, dequantized)


def _quantize(slots: Slots, node: ir.Node, prefix: str, clips: tuple[bool, bool]) -> ir.Value:
    """uint8 levels of what the mark ``node`` reads."""
    source, name = node.inputs[0], node.outputs[0].name
    step, zero = slots.of_quantizer(prefix, "step"), slots.of_quantizer(prefix, "zero_point")
    levels = new_node(
        node, "QuantizeLinear", [source, step, zero], f"{name}/levels", dtype=UINT8, like=source
    )
    if not any(clips):
        return levels
    bounds = bounds_of(node)
    lowest = highest = None
    if clips[0]:
        lowest = _level_of(slots, node, prefix, bounds.lowest, f"{name}/lowest")
    if clips[1]:
        highest = slots.of_quantizer(prefix, "highest")
        if bounds.largest is not None:
            largest = _level_of(slots, node, prefix, bounds.largest, f"{name}/largest")
            highest = new_node(node, "Min", [highest, largest], f"{name}/highest", dtype=UINT8)
    return new_node(
        node, "Clip", [levels, lowest, highest], f"{name}/clipped", dtype=UINT8, like=source
    )


def _level_of(slots: Slots, node: ir.Node, prefix: str, bound: float | None, name: str) -> ir.Value:
    """The level of a number; the runtime computes it once, for all it reads is constant."""
    step, zero = slots.of_quantizer(prefix, "step"), slots.of_quantizer(prefix, "zero_point")
    if bound == 0.0 or bound is None:
        return zero
    number = new_node(node, "Constant", [], f"{name}/value", {"value_float": float(bound)})
    return new_node(node, "QuantizeLinear", [number, step, zero], name, dtype=UINT8)


def _dequantize(slots: Slots, node: ir.Node, levels: ir.Value, prefix: str, name: str) -> ir.Value:
    step, zero = slots.of_quantizer(prefix, "step"), slots.of_quantizer(prefix, "zero_point")
    return new_node(node, "DequantizeLinear", [levels, step, zero], name, like=levels)


def _move_levels(slots: Slots, node: ir.Node, dequantized: dict[ir.Value, str]) -> None:
    """Let a moving node work on levels where all that it moves is on one grid."""
    indices = moved_inputs(node)
    grids = {dequantized.get(node.inputs[i]) for i in indices}  # type: ignore[arg-type]
    if len(grids) != 1 or None in grids:
        return
    (prefix,) = grids
    assert prefix is not None
    for index in indices:
        value = node.inputs[index]
        assert value is not None
        producer = value.producer()
        assert producer is not None
        node.replace_input_with(index, producer.inputs[0])
    if node.op_type == "Pad" and _pads_with_constant(node):
        node.resize_inputs(max(len(node.inputs), 3))
        node.replace_input_with(2, slots.of_quantizer(prefix, "zero_point"))  # the level of 0
    assert node.graph is not None
    grid = [slots.of_quantizer(prefix, leaf) for leaf in ("step", "zero_point")]
    for out in node.outputs:
        name = f"{out.name}/rounded"
        value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=out.shape)
        out.replace_all_uses_with(value, replace_graph_outputs=True)
        out.type = ir.TensorType(UINT8)
        after = ir.node("DequantizeLinear", [out, *grid], outputs=[value], name=f"node_{name}")
        node.graph.insert_after(node, after)
        dequantized[value] = prefix


def _pads_with_constant(node: ir.Node) -> bool:
    return "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
