"""Reader: a whole artifact, or any prefix of one that ends where a layer does.

Nothing is read before it is asked for, and nothing is handed out before it is verified: the
header when the reader is made (and not one byte more), a layer when ``read_layer`` asks for it.

The header authenticates the digests of a layer's chunks, and they fix each of its bytes; that is
all ``read_layer`` compares. The digest of the whole layer is its name where layers are kept: who
keeps one under that name compares it, and so does ``verify``.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

from plyweight.artifact.header import LENGTH_BYTES, Header, header_bytes
from plyweight.artifact.layout import ByteRange
from plyweight.artifact.names import is_pad, split_name
from plyweight.artifact.opening import open_source
from plyweight.artifact.records import Layer
from plyweight.artifact.source import Source, ViewSource
from plyweight.artifact.values import TensorView, ValueChecker
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    DigestError,
    TruncatedError,
    listed,
)

__all__ = ["ArtifactReader", "naming", "num_held", "verify"]


class ArtifactReader:
    """Reads verified layers from a source.

    Attributes:
        source: where the bytes come from.
        header: what the artifact holds.
        held_bit_widths: those whose layers are wholly inside the source, ascending.

    Raises:
        ArtifactError: If the header is wrong, or the source does not end where a layer does.
        SourceError: If the source cannot be opened or read.
    """

    def __init__(self, source: str | os.PathLike[str] | Source) -> None:
        self.source = open_source(source)
        with naming(self.source.name):
            self.header = _read_header(self.source)
            self._num_held = num_held(self.header, self.source.size())
        self.held_bit_widths = self.header.bit_widths[: self._num_held]
        self._checker = ValueChecker(self.header)

    def read_layer(self, index: int) -> dict[str, TensorView]:
        """The tensors of one layer by their names inside it, verified.

        They are views of one buffer, which is freed with the last of them.

        Raises:
            BitWidthError: If the layer is not held.
            DigestError: If its bytes differ from the digests of its chunks.
            ArtifactError: If its values cannot be computed with.
        """
        layer = self._held_layer(index)
        with naming(self.source.name):
            return self._checked(index, self._read(layer.byte_range))

    def verify(self) -> tuple[Layer, ...]:
        """Read and check every held layer, and that none contradicts itself; the layers checked.

        Raises:
            ArtifactError: If one is wrong.
        """
        with ThreadPoolExecutor(1) as beside:
            for index in range(self._num_held):
                self._verify_layer(index, beside)
        return self.header.layers[: self._num_held]

    def _verify_layer(self, index: int, beside: Executor) -> None:
        """Check a layer, with the digest of all of it computed in another thread meanwhile."""
        layer = self.header.layers[index]
        buffer = self._read(layer.byte_range)
        # The parser has compared the digest of a layer of one chunk with that of the chunk.
        whole = beside.submit(_hexdigest, buffer) if layer.num_chunks > 1 else None
        with naming(self.source.name):
            self._checked(index, buffer)
            if whole is not None and whole.result() != layer.sha256:
                raise DigestError(
                    f"layer {index} ({layer.bit_width} bits) differs from its digest, although "
                    "its chunks match theirs; the header contradicts itself, so pack the model "
                    "again."
                )

    def _read(self, byte_range: ByteRange) -> memoryview:
        if isinstance(self.source, ViewSource):
            return self.source.read_view(byte_range)
        return memoryview(self.source.read(byte_range))

    def _checked(self, index: int, buffer: memoryview) -> dict[str, TensorView]:
        """The tensors of a layer by their names inside it, views of ``buffer``."""
        layer = self.header.layers[index]
        self._check_chunks(index, layer, buffer)
        tensors = {}
        for entry in self.header.tensors_of(index):
            inside = self.header.file_range(entry).shifted(-layer.byte_range.start)
            data = buffer[inside.start : inside.stop]
            self._checker.check(entry, data)
            if not is_pad(entry.name):
                tensors[split_name(entry.name)[1]] = TensorView(entry.dtype, entry.shape, data)
        return tensors

    def _held_layer(self, index: int) -> Layer:
        if not 0 <= index < len(self.header.layers):
            raise IndexError(
                f"layer {index} was asked for, but {self.source.name} has layers 0 to "
                f"{len(self.header.layers) - 1}; ask for one of those."
            )
        layer = self.header.layers[index]
        if index >= self._num_held:
            raise BitWidthError(
                layer.bit_width,
                stored=self.held_bit_widths,
                where=self.source.name,
                advice=f"The artifact has them too: fetch bytes {self.source.size()} to "
                f"{layer.byte_range.stop} of it.",
            )
        return layer

    def _check_chunks(self, index: int, layer: Layer, buffer: memoryview) -> None:
        for number, expected in enumerate(layer.chunk_digests):
            chunk = layer.chunk_range(number)
            inside = chunk.shifted(-layer.byte_range.start)
            if hashlib.sha256(buffer[inside.start : inside.stop]).digest() != expected:
                raise DigestError(
                    f"chunk {number} of layer {index} ({layer.bit_width} bits) differs from its "
                    f"digest; it holds {listed(self._names_in(index, chunk))}; "
                    f"fetch bytes {chunk} again."
                )

    def _names_in(self, index: int, byte_range: ByteRange) -> list[str]:
        """The tensors of a layer that have bytes in ``byte_range`` of the file."""
        places = [(e.name, self.header.file_range(e)) for e in self.header.tensors_of(index)]
        return [
            name
            for name, place in places
            if place.start < byte_range.stop and byte_range.start < place.stop
        ]


def verify(path_or_source: str | os.PathLike[str] | Source) -> tuple[Layer, ...]:
    """Read and check every layer that is held; those that were checked.

    Args:
        path_or_source: a file, the folder of a split artifact or its ``layers.json``, or a source
            of bytes. What a URL has is verified while :func:`plyweight.fetch` brings it.

    Raises:
        SourceError: If it cannot be opened or read, or is a URL.
        ArtifactError: If a byte is wrong.
    """
    return ArtifactReader(path_or_source).verify()


def _hexdigest(buffer: memoryview) -> str:
    return hashlib.sha256(buffer).hexdigest()


def _read_header(source: Source) -> Header:
    size = source.size()
    if size < LENGTH_BYTES:
        raise TruncatedError(
            f"it has {size} bytes, but an artifact starts with {LENGTH_BYTES}; fetch it again."
        )
    first = source.read(ByteRange(0, LENGTH_BYTES))
    data_start = header_bytes(first)
    if size < data_start:
        raise TruncatedError(
            f"its header has {data_start} bytes, but only {size} are there; fetch it again."
        )
    return Header.parse(first + source.read(ByteRange(LENGTH_BYTES, data_start)))


def num_held(header: Header, size: int) -> int:
    """How many layers there are in a source of ``size`` bytes, which must end where one does.

    Raises:
        TruncatedError: If it ends inside a layer, or before the first.
        ArtifactError: If it goes on after the last.
    """
    for index, layer in enumerate(header.layers):
        if size < layer.byte_range.stop:
            if index and size == layer.byte_range.start:
                return index
            raise _cut(header, index, size)
    if size > header.file_bytes:
        raise ArtifactError(
            f"it has {size} bytes, but its layers end at {header.file_bytes}; "
            "fetch it again, or cut off what was appended."
        )
    return len(header.layers)


def _cut(header: Header, index: int, size: int) -> TruncatedError:
    """What to say about a source that ends inside layer ``index``."""
    layer = header.layers[index]
    tensors = [entry for entry in header.tensors_of(index) if not is_pad(entry.name)]
    cut = [entry.name for entry in tensors if size < header.file_range(entry).stop]
    inside = f"tensor {cut[0]}" if cut else f"the padding after {tensors[-1].name}"
    shorter = (
        f", or keep {layer.byte_range.start} bytes for {header.layers[index - 1].bit_width} bits"
    )
    return TruncatedError(
        f"it ends at byte {size}, inside layer {index} ({layer.bit_width} bits) at "
        f"{inside}; fetch it up to byte {layer.byte_range.stop}{shorter if index else ''}."
    )


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a source in front of what is wrong with its bytes."""
    try:
        yield
    except ArtifactError as error:
        raise type(error)(f"{name}: {error}") from error
