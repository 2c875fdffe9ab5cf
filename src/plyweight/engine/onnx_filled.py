"""ONNX models with their slots filled: one message in memory, for runtimes that want it whole.

    filled(data, values)          data, where each slot has its value as raw_data

Everything else is copied byte by byte, so nothing of the model has to be understood. The field
numbers are those of ``onnx_model``, which also checks a model before it comes here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.engine.onnx_model import (
    COUNTED,
    DTYPES,
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_NAME,
    VARINT,
    fields_and_bytes,
    slot_name,
)

__all__ = ["filled"]

TENSOR_RAW = 9  # values as they lie in memory, little-endian
NUMBERS = {name: number for number, name in DTYPES.items()}

Part = bytes | memoryview


def filled(data: bytes, values: Mapping[str, NDArray[Any]]) -> bytes:
    """The ONNX model ``data`` with ``values`` in its slots, by name.

    Args:
        data: a model that :func:`~plyweight.engine.onnx_model.external_initializers` accepted.
        values: for exactly the slots that it found.
    """
    parts: list[Part] = []
    for number, value, raw in fields_and_bytes(memoryview(data)):
        if number == MODEL_GRAPH and isinstance(value, memoryview):
            parts += _counted(MODEL_GRAPH, list(_graph(value, values)))
        else:
            parts.append(raw)
    return b"".join(parts)


def _graph(graph: memoryview, values: Mapping[str, NDArray[Any]]) -> Iterator[Part]:
    for number, value, raw in fields_and_bytes(graph):
        name = slot_name(value) if number == GRAPH_INITIALIZER else None
        if name is None:
            yield raw
        else:
            yield from _counted(GRAPH_INITIALIZER, _tensor(name, values[name]))


def _tensor(name: str, value: NDArray[Any]) -> list[Part]:
    """The parts of a ``TensorProto``."""
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return [
        *(_tag(TENSOR_DIMS, VARINT) + _varint(length) for length in value.shape),
        _tag(TENSOR_DTYPE, VARINT) + _varint(NUMBERS[value.dtype.name]),
        *_counted(TENSOR_NAME, [name.encode()]),
        *_counted(TENSOR_RAW, [little.reshape(-1).view(np.uint8).data]),
    ]


def _counted(number: int, parts: Sequence[Part]) -> list[Part]:
    """A field that has ``parts`` one after the other."""
    return [_tag(number, COUNTED) + _varint(sum(map(len, parts))), *parts]


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
