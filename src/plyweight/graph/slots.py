"""Slots: initializers of the ONNX graph without a value, and what fills them.

A slot is declared as external data of zero offset, so the graph holds its name, type and shape
only. Names follow from a *prefix* (``docs/format.md``, section 9):

    <module>.levels, .scale, .bias, .bias_scale     a layered weight, its batch norm folded in
    <quantizer>.step, .zero_point, .highest         a grid that activations are rounded to
    <tensor>                                        a plain tensor of the artifact
"""

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

__all__ = ["Slots", "new_node"]

INT8, UINT8, INT32, FLOAT = (
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT32,
    ir.DataType.FLOAT,
)


class Slots:
    """The slots of one graph, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def of_module(self, prefix: str, leaf: str, shape: Sequence[int]) -> ir.Value:
        """``<prefix>.<leaf>`` of a module."""
        dtype = {"levels": INT8, "zero_point": INT8, "bias": INT32}.get(leaf, FLOAT)
        return self.get(f"{prefix}.{leaf}", dtype, shape)

    def of_quantizer(self, prefix: str, leaf: str) -> ir.Value:
        """``<prefix>.<leaf>`` of a quantizer, 0-dimensional."""
        return self.get(f"{prefix}.{leaf}", FLOAT if leaf == "step" else UINT8, ())

    def get(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """The slot of this name, made if it is not there yet."""
        if name not in self._graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            empty_slot(value)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def empty_slot(value: ir.Value) -> None:
    """Declare ``value``, an initializer, as a place without content."""
    assert value.shape is not None
    assert value.dtype is not None
    assert value.name is not None
    shape = [int(dim) for dim in value.shape]  # type: ignore[arg-type]
    value.const_value = ir.ExternalTensor(
        "slots",
        0,
        int(math.prod(shape) * value.dtype.itemsize),
        value.dtype,
        shape=ir.Shape(shape),
        name=value.name,
    )


def is_slot(value: ir.Value) -> bool:
    """Whether ``value`` is an initializer that an artifact fills."""
    return isinstance(value.const_value, ir.ExternalTensor)


def new_node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: dict[str, Any] | None = None,
    *,
    domain: str = "",
    dtype: ir.DataType = FLOAT,
    like: ir.Value | None = None,
) -> ir.Value:
    """The output, called ``name``, of a node that is inserted before another one.

    Args:
        before: the node that follows.
        op_type: of the new node.
        inputs: of it.
        name: of its output, which nothing else has.
        attributes: of the node.
        domain: of its operator.
        dtype: of its output.
        like: a value of the same shape.
    """
    output = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=None if like is None else like.shape
    )
    node = ir.node(
        op_type, inputs, attributes, domain=domain, outputs=[output], name=f"node_{name}"
    )
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output
