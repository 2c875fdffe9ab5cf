"""Protocol buffers, written: the counterpart of the reading in ``onnx_model``.

See https://protobuf.dev/programming-guides/encoding. A message is a list of parts, so that what is
copied from another message, or is large, is not copied more than once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.engine.onnx_model import (
    COUNTED,
    DTYPES,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_NAME,
    VARINT,
)

__all__ = ["Part", "counted", "tensor"]

TENSOR_RAW = 9  # values as they lie in memory, little-endian
NUMBERS = {name: number for number, name in DTYPES.items()}

Part = bytes | memoryview


def counted(number: int, parts: Sequence[Part]) -> list[Part]:
    """Field ``number``, that has ``parts`` one after the other."""
    return [_tag(number, COUNTED) + _varint(sum(map(len, parts))), *parts]


def tensor(name: str, value: NDArray[Any]) -> list[Part]:
    """The parts of a ``TensorProto``."""
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return [
        *(_tag(TENSOR_DIMS, VARINT) + _varint(length) for length in value.shape),
        _tag(TENSOR_DTYPE, VARINT) + _varint(NUMBERS[value.dtype.name]),
        *counted(TENSOR_NAME, [name.encode()]),
        *counted(TENSOR_RAW, [little.reshape(-1).view(np.uint8).data]),
    ]


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the high bit says that another follows."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
