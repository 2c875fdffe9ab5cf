"""export: one bit-width of an artifact as a file that other tools read.

What is exported are values, computed once: the file knows nothing of layers any more, and no
bit-width but its own.
"""

import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from plyweight.artifact import (
    GRAPH_NAME,
    ArtifactReader,
    Header,
    LayeredWeight,
    Source,
    TensorView,
    gain_name,
    planes_name,
    publish_atomically,
    scale_name,
    step_name,
    zero_point_name,
)
from plyweight.codec import decode, from_planes, spread
from plyweight.errors import LayeringError

__all__ = ["export"]

DTYPES = ("float32", "float16")  # of weights; numpy has no bfloat16 to round to


def export(
    source: str | os.PathLike[str] | Source,
    path: str | os.PathLike[str],
    *,
    bit_width: int | None = None,
    to: Literal["safetensors"] = "safetensors",
    dtype: Literal["float32", "float16"] = "float32",
) -> int:
    """Write the weights of one bit-width as a plain state dict: same artifact, same bytes.

    Layered weights become ``level * scale * gain``, exactly the values that :func:`plyweight.load`
    computes with; biases, norms and buffers are those of that bit-width. Names are those of the
    artifact, so of the prepared network (whose attention is taken apart into projections), and a
    tensor that several modules share is there once. Quantized activations are no weights: their
    steps are left out, and whoever runs the file runs it with float activations.

    Args:
        source: an artifact, whole or a prefix of one.
        path: the file to write.
        bit_width: None for the widest that the source holds.
        to: the format; safetensors is the one there is.
        dtype: of the layered weights; all else keeps its own.

    Returns:
        The bit-width.

    Raises:
        BitWidthError: If that bit-width is not held.
        ArtifactError: If the artifact is damaged.
        LayeringError: If ``to`` or ``dtype`` is not known.
        OutputError: If the file cannot be written.
        ImportError: If safetensors is not installed.
    """
    if to != "safetensors":
        raise LayeringError(f"to is {to!r}; 'safetensors' is the format there is.")
    if dtype not in DTYPES:
        raise LayeringError(f"dtype is {dtype!r}; give one of {', '.join(map(repr, DTYPES))}.")
    try:
        from safetensors import TensorSpec, serialize
    except ModuleNotFoundError as error:
        raise ImportError(
            "export needs safetensors, which is not installed; install it with: "
            'pip install "plyweight[export]"'
        ) from error
    reader = ArtifactReader(source)
    target = reader.held_bit_widths[-1] if bit_width is None else bit_width
    num_layers = reader.header.layer_index(target) + 1
    layers = [reader.read_layer(index) for index in range(num_layers)]
    arrays = dict(_values(reader.header, layers, dtype))
    tensors = {  # by address, because numpy cannot name bfloat16; `arrays` keeps the memory alive
        name: TensorSpec(
            dtype=kind, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, (kind, array) in arrays.items()
    }
    metadata = {
        "format": "pt",
        "plyweight.artifact": reader.header.artifact_id,
        "plyweight.bit_width": str(target),
    }
    head, data = _in_order(serialize(tensors, metadata))
    with publish_atomically(path) as file:
        file.write(head)
        file.write(data)
    return target


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
    bit_width = header.bit_widths[len(layers) - 1]
    for param, weight in header.weights.items():
        values = _weight(param, weight, weight.width_at(bit_width), layers)
        yield param, (dtype, np.ascontiguousarray(values, dtype))
    plain: dict[str, TensorView] = {}
    for layer in layers:  # a later one replaces what an earlier one has
        plain |= {name: view for name, view in layer.items() if name not in reserved}
    for name, view in plain.items():
        array = view.numpy()
        yield name, ("bfloat16" if view.dtype == "BF16" else array.dtype.name, array)


def _weight(
    param: str, weight: LayeredWeight, own: int, layers: list[dict[str, TensorView]]
) -> Any:
    """float32 values of ``weight`` at its own bit-width; ``docs/format.md``, section 3."""
    brought = [layer[planes_name(param)].numpy() for layer in layers if planes_name(param) in layer]
    levels = decode(from_planes([row for planes in brought for row in planes], weight.shape), own)
    scale = layers[0][scale_name(param)].numpy()
    # The gain is that of the last layer that brought planes; where that has none it is 1.
    last = next(layer for layer in reversed(layers) if planes_name(param) in layer)
    gain = last.get(gain_name(param))
    if gain is not None:
        scale = scale * gain.numpy()
    return levels.astype(np.float32) * spread(scale, weight.shape, weight.group_size)
