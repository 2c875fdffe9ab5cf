"""ONNX constants: the short lists of integers that say how a node moves values.

They are initializers or nodes of their own, and each of them is written in several ways.
"""

import struct
from collections.abc import Iterable
from itertools import islice

from plyweight.engine.onnx_model import NODE_ATTRIBUTE, TENSOR_DIMS, TENSOR_DTYPE, TENSOR_RAW
from plyweight.engine.protobuf import Value, fields, integer_of, message_of, packed, text_of

__all__ = ["ATTRIBUTE_INTEGERS", "ATTRIBUTE_NAME", "constant_of", "integers_of"]

INT64 = 7
TENSOR_INT64 = 7
ATTRIBUTE_NAME, ATTRIBUTE_TENSOR, ATTRIBUTE_INTEGERS = 1, 5, 8
MOST_INTEGERS = 16  # none of those lists has more


def integers_of(tensor: memoryview) -> tuple[int, ...] | None:
    """A ``TensorProto`` of one dimension and int64; None for another or a longer one."""
    dtype, shape, found = 0, list[int](), list[int]()
    for number, value in fields(tensor):
        if number == TENSOR_DTYPE:
            dtype = integer_of(value)
        elif number == TENSOR_DIMS:
            shape += _repeated(value)
        elif number == TENSOR_INT64:
            found += _repeated(value)
        elif number == TENSOR_RAW:
            data = message_of(value)
            if len(data) > 8 * MOST_INTEGERS or len(data) % 8:
                return None
            found += struct.unpack(f"<{len(data) // 8}q", data)
        if len(found) > MOST_INTEGERS:
            return None
    return tuple(found) if dtype == INT64 and shape == [len(found)] else None


def constant_of(node: memoryview) -> tuple[int, ...] | None:
    """What a node ``Constant`` gives, if it is such a list."""
    found = None
    for number, value in fields(node):
        if number == NODE_ATTRIBUTE:
            found = _attribute(message_of(value))
    return found


def _attribute(attribute: memoryview) -> tuple[int, ...] | None:
    name, tensor, integers = "", None, list[int]()
    for number, value in fields(attribute):
        if number == ATTRIBUTE_NAME:
            name = text_of(value)
        elif number == ATTRIBUTE_TENSOR:
            tensor = message_of(value)
        elif number == ATTRIBUTE_INTEGERS:
            integers += _repeated(value)
        if len(integers) > MOST_INTEGERS:
            return None
    if name == "value":
        return None if tensor is None else integers_of(tensor)
    return tuple(integers) if name == "value_ints" else None


def _repeated(value: Value) -> Iterable[int]:
    """Integers of a repeated field, one by one or packed, and no more than can be needed."""
    found = [value] if isinstance(value, int) else packed(message_of(value))
    return [v - 2**64 if v >= 2**63 else v for v in islice(found, MOST_INTEGERS + 1)]
