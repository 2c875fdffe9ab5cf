"""state_dict: the values of one bit-width in safetensors, as any tool reads them.

Same artifact and bit-width, same bytes.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from plyweight.artifact import (
    GRAPH_NAME,
    Header,
    LayeredWeight,
    TensorView,
    gain_name,
    planes_name,
    scale_name,
    step_name,
    zero_point_name,
)
from plyweight.codec import levels_from_planes, spread

__all__ = ["state_dict_bytes"]


def state_dict_bytes(
    header: Header, layers: list[dict[str, TensorView]], dtype: str
) -> tuple[bytes, memoryview]:
    """The file's head and data, for the bit-width of the last of ``layers``.

    Args:
        header: of the artifact.
        layers: from the base layer on.
        dtype: of the layered weights, "float32" or "float16"; all else keeps its own.

    Raises:
        ImportError: If safetensors is not installed.
    """
    try:
        from safetensors import TensorSpec, serialize
    except ModuleNotFoundError as error:
        raise ImportError(
            "export needs safetensors, which is not installed; install it with: "
            'pip install "plyweight[export]"'
        ) from error
    arrays = dict(_values(header, layers, dtype))
    tensors = {  # by address, because numpy cannot name bfloat16; `arrays` keeps the memory alive
        name: TensorSpec(
            dtype=kind, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, (kind, array) in arrays.items()
    }
    metadata = {
        "format": "pt",
        "plyweight.artifact": header.artifact_id,
        "plyweight.bit_width": str(header.bit_widths[len(layers) - 1]),
    }
    return _in_order(serialize(tensors, metadata))


def _in_order(file: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with its metadata sorted, and the data after it.

    safetensors keeps metadata in a hash map that is seeded anew for each file, so that the same
    content is in another order each time; tensors it sorts itself.
    """
    view = memoryview(file)
    data_start = 8 + int.from_bytes(view[:8], "little")
    table = json.loads(bytes(view[8:data_start]))
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as safetensors has it
    return len(text).to_bytes(8, "little") + text, view[data_start:]


def _values(
    header: Header, layers: list[dict[str, TensorView]], dtype: str
) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Name, dtype and array of every tensor at the bit-width of the last layer."""
    reserved = {GRAPH_NAME}
    for param in header.weights:
        reserved |= {planes_name(param), scale_name(param), gain_name(param)}
    for module in header.activations:
        reserved |= {step_name(module), zero_point_name(module)}
    for param, weight in header.weights.items():
        values = _weight(param, weight, layers)
        yield param, (dtype, np.ascontiguousarray(values, dtype))
    plain: dict[str, TensorView] = {}
    for layer in layers:  # a later one replaces what an earlier one has
        plain |= {name: view for name, view in layer.items() if name not in reserved}
    for name, view in plain.items():
        array = view.numpy()
        yield name, ("bfloat16" if view.dtype == "BF16" else array.dtype.name, array)


def _weight(param: str, weight: LayeredWeight, layers: list[dict[str, TensorView]]) -> Any:
    """float32 values of ``weight`` with the planes of ``layers``; ``docs/format.md``, section 3."""
    brought = [layer[planes_name(param)].numpy() for layer in layers if planes_name(param) in layer]
    levels = levels_from_planes([row for planes in brought for row in planes], weight.shape)
    scale = layers[0][scale_name(param)].numpy()
    # The gain is that of the last layer that brought planes; where that has none it is 1.
    last = next(layer for layer in reversed(layers) if planes_name(param) in layer)
    gain = last.get(gain_name(param))
    if gain is not None:
        scale = scale * gain.numpy()
    return levels.astype(np.float32) * spread(scale, weight.shape, weight.group_size)
