"""ONNX models with their slots filled: one message in memory, for runtimes that want it whole.

    filled(data, values)          data, where each slot has its value as raw_data

Everything else is copied byte by byte, so nothing of the model has to be understood. The field
numbers are those of ``onnx_model``, which also checks a model before it comes here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from plyweight.engine.onnx_model import GRAPH_INITIALIZER, MODEL_GRAPH, slot_name
from plyweight.engine.onnx_writing import tensor
from plyweight.engine.protobuf import Part, counted, fields_and_bytes

__all__ = ["filled"]


def filled(data: bytes, values: Mapping[str, NDArray[Any]]) -> bytes:
    """The ONNX model ``data`` with ``values`` in its slots, by name.

    Args:
        data: a model that :func:`~plyweight.engine.onnx_model.external_initializers` accepted.
        values: for exactly the slots that it found.
    """
    parts: list[Part] = []
    for number, value, raw in fields_and_bytes(memoryview(data)):
        if number == MODEL_GRAPH and isinstance(value, memoryview):
            parts += counted(MODEL_GRAPH, list(_graph(value, values)))
        else:
            parts.append(raw)
    return b"".join(parts)


def _graph(graph: memoryview, values: Mapping[str, NDArray[Any]]) -> Iterator[Part]:
    for number, value, raw in fields_and_bytes(graph):
        name = slot_name(value) if number == GRAPH_INITIALIZER else None
        if name is None:
            yield raw
        else:
            yield from counted(GRAPH_INITIALIZER, tensor(name, values[name]))
