"""Writer: same content, same bytes, and never more than one tensor in memory.

The layout follows from dtypes and shapes alone, so the header's size is known before any data:
room for it is left, the layers are streamed and hashed, and the header is written last, all in
a temporary file that takes the target's name only when it is complete.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, BinaryIO, TypeAlias

from plyweight.artifact.digests import NO_BYTES, LayerDigests
from plyweight.artifact.files import publish_atomically
from plyweight.artifact.header import Header
from plyweight.artifact.layout import Alignment, ByteRange, choose_alignment, place
from plyweight.artifact.names import pad_name, tensor_name
from plyweight.artifact.records import (
    DEFAULT_CHUNK_BYTES,
    ITEM_BYTES,
    Activation,
    Layer,
    LayeredWeight,
    ModelInfo,
    TensorEntry,
)
from plyweight.artifact.strict_json import header_error, shown
from plyweight.artifact.values import ValueChecker
from plyweight.errors import ArtifactError

__all__ = ["LayerContent", "TensorData", "write_artifact"]

# Anything with the buffer protocol: bytes, memoryview, a C-contiguous little-endian numpy array.
BytesLike: TypeAlias = Any


@dataclass(frozen=True)
class TensorData:
    """A tensor to write.

    Attributes:
        name: inside its layer, without ``L<i>/``.
        dtype: a key of ``ITEM_BYTES``.
        shape: of the tensor.
        data: its bytes, little-endian, C order, or a function that returns them, called once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: BytesLike | Callable[[], BytesLike]


@dataclass(frozen=True)
class LayerContent:
    """The tensors that a step to ``bit_width`` adds, in order of execution."""

    bit_width: int
    tensors: Sequence[TensorData]


def write_artifact(
    path: str | os.PathLike[str],
    *,
    layers: Sequence[LayerContent],
    weights: Mapping[str, LayeredWeight],
    activations: Mapping[str, Activation],
    model: ModelInfo,
    evaluation: Mapping[int, Mapping[str, str]] | None = None,
    io: Mapping[str, Any] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Header:
    """Write an artifact; it appears at ``path`` whole or not at all.

    Args:
        path: of the file; what stood there is replaced.
        layers: base first, bit-widths ascending.
        weights: the layered weights; a group wider than the inputs is stored as wide as they are.
        activations: how inputs are quantized, by module name.
        model: whose weights these are.
        evaluation: metrics by bit-width, as decimal strings.
        io: inputs, outputs, preprocessing, labels; strings, integers, lists and objects.
        chunk_bytes: the unit of verification and of range requests, 64 KiB to 64 MiB.

    Returns:
        The header as any reader parses it.

    Raises:
        HeaderError: If the content breaks a rule of ``docs/format.md``; nothing is written then.
        ArtifactError: If data has the wrong length, or values a reader would refuse.
        OutputError: If the file cannot be written.
    """
    tensors, ranges, alignment = _lay_out(layers)
    draft = Header(
        alignment=alignment,
        model=model,
        weights={name: _with_group_inside(weight) for name, weight in weights.items()},
        activations=activations,
        layers=_unhashed(layers, ranges, chunk_bytes),
        tensors=tensors,
        evaluation=evaluation,
        io=io,
    )
    # Digests of zeros are as long as real ones, so this header has its final size, and every
    # rule is checked before a byte is written.
    room = draft.emit()
    planned = Header.parse(room)
    with publish_atomically(path) as file:
        file.write(bytes(len(room)))
        hashed = [
            _write_layer(file, planned, index, content) for index, content in enumerate(layers)
        ]
        final = replace(draft, layers=tuple(hashed)).emit()
        assert len(final) == len(room)
        header = Header.parse(final)
        file.seek(0)
        file.write(final)
    return header


def _lay_out(
    layers: Sequence[LayerContent],
) -> tuple[tuple[TensorEntry, ...], list[ByteRange], Alignment]:
    """Every tensor with the padding between them, each layer's range, and the alignment."""
    sizes = [[_num_bytes(tensor) for tensor in layer.tensors] for layer in layers]
    alignment = choose_alignment(sizes)
    entries: list[TensorEntry] = []
    ranges: list[ByteRange] = []
    offset, num_pads = 0, 0

    def pad_to(start: int) -> None:
        nonlocal offset, num_pads
        if start > offset:
            gap = ByteRange(offset, start)
            entries.append(TensorEntry(pad_name(num_pads), "U8", (gap.num_bytes,), gap))
            num_pads += 1
        offset = start

    for index, (layer, places) in enumerate(zip(layers, place(sizes, alignment), strict=True)):
        start = offset
        for tensor, byte_range in zip(layer.tensors, places, strict=True):
            pad_to(byte_range.start)
            name = tensor_name(index, tensor.name)
            entries.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape), byte_range))
            offset = byte_range.stop
        pad_to(-(-offset // alignment.layer) * alignment.layer)
        ranges.append(ByteRange(start, offset))
    _require_unique([entry.name for entry in entries])
    return tuple(entries), ranges, alignment


def _num_bytes(tensor: TensorData) -> int:
    if tensor.dtype not in ITEM_BYTES:
        raise header_error(
            f"tensor {shown(tensor.name)} has dtype {shown(tensor.dtype)}",
            f"the format knows {', '.join(ITEM_BYTES)}",
            "convert it to one of those",
        )
    return ITEM_BYTES[tensor.dtype] * prod(tensor.shape)


def _require_unique(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise header_error(
                f"tensor {shown(name)} was given twice", "names are unique", "rename one of them"
            )
        seen.add(name)


def _with_group_inside(weight: LayeredWeight) -> LayeredWeight:
    """One group that is wider than the inputs holds all of them: the same scales either way."""
    if weight.group_size is None or len(weight.shape) < 2:
        return weight
    return replace(weight, group_size=min(weight.group_size, weight.shape[1]))


def _unhashed(
    layers: Sequence[LayerContent], ranges: Sequence[ByteRange], chunk_bytes: int
) -> tuple[Layer, ...]:
    """The layers with zeros for digests."""
    return tuple(
        Layer(
            kind="plane" if index else "base",
            bit_width=content.bit_width,
            byte_range=byte_range,
            sha256="0" * 64 if byte_range.num_bytes else NO_BYTES,
            chunk_bytes=chunk_bytes,
            # `max`: a chunk size of 0 is for the parser to refuse, in words.
            chunk_digests=(bytes(32),) * -(-byte_range.num_bytes // max(chunk_bytes, 1)),
        )
        for index, (content, byte_range) in enumerate(zip(layers, ranges, strict=True))
    )


def _write_layer(file: BinaryIO, planned: Header, index: int, content: LayerContent) -> Layer:
    """Stream one layer to ``file``; the layer with its digests."""
    layer = planned.layers[index]
    digests = LayerDigests(layer)
    checker = ValueChecker(planned)
    tensors = iter(content.tensors)
    for entry in planned.tensors_of(index):
        if entry.name.startswith("__pad__"):
            data = memoryview(bytes(entry.byte_range.num_bytes))
        else:
            data = _bytes_of(next(tensors), entry)
            checker.check(entry, data)
        file.write(data)
        digests.update(data)
    return replace(layer, sha256=digests.sha256(), chunk_digests=digests.chunks())


def _bytes_of(tensor: TensorData, entry: TensorEntry) -> memoryview:
    """The data as bytes, of exactly the length that was laid out."""
    view = memoryview(tensor.data() if callable(tensor.data) else tensor.data)
    if view.nbytes != entry.byte_range.num_bytes or not view.c_contiguous:
        raise ArtifactError(
            f"tensor {entry.name} was given {view.nbytes} bytes, but {entry.dtype} of shape "
            f"{list(entry.shape)} needs {entry.byte_range.num_bytes} contiguous ones; "
            "check its dtype and shape."
        )
    return view.cast("B") if view.nbytes else memoryview(b"")  # a view of nothing cannot be cast
