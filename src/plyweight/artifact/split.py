"""Split: one file for each part of an artifact, for servers that know nothing of byte ranges.

    layers.json  header.bin  layer-0.bin  layer-1.bin  ...

Nothing is added and nothing lost: the parts, one after the other, are the artifact.

    header.bin + layer-0.bin + ... + layer-i.bin == the first bytes of the artifact's file

so ``join(split(artifact))`` gives the same bytes, and whoever has the first files has a prefix.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

from plyweight.artifact.digests import LayerDigests
from plyweight.artifact.files import publish_atomically
from plyweight.artifact.header import Header
from plyweight.artifact.layout import ByteRange
from plyweight.artifact.reader import ArtifactReader
from plyweight.artifact.sidecar import (
    HEADER_FILE,
    MAX_SIDECAR_BYTES,
    SIDECAR_FILE,
    Part,
    Sidecar,
    layer_file,
)
from plyweight.artifact.source import FileSource, Source
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    DigestError,
    OutputError,
    RangeError,
    SourceError,
    TruncatedError,
    TrustError,
)

__all__ = ["SplitSource", "join", "split"]


def split(artifact: str | os.PathLike[str] | Source, folder: str | os.PathLike[str]) -> Sidecar:
    """Write each part of an artifact to a file of its own; the folder appears whole or not at all.

    Args:
        artifact: a path or source; of a prefix, those layers are written that it holds, and the
            sidecar is the same as that of the whole.
        folder: a new one, or one that is empty.

    Returns:
        What ``layers.json`` says.

    Raises:
        SourceError: If the artifact cannot be opened or read.
        ArtifactError: If a byte of it is wrong.
        OutputError: If the folder cannot be written.
    """
    reader = ArtifactReader(artifact)
    header = reader.header
    sidecar = Sidecar.of(header)
    with _new_folder(folder) as place:
        with publish_atomically(place / HEADER_FILE) as file:
            file.write(_raw_header(reader.source, header))
        for index in range(len(reader.held_bit_widths)):
            with publish_atomically(place / layer_file(index)) as file:
                _copy_layer(reader.source, header, index, file)
        with publish_atomically(place / SIDECAR_FILE) as file:
            file.write(sidecar.emit())
    return sidecar


def join(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    bit_width: int | None = None,
    artifact_id: str | None = None,
) -> Header:
    """Put the parts of a split artifact together; the file appears whole and verified, or not.

    Args:
        folder: with ``layers.json`` and the files it names; the last layers may be missing.
        path: of the file to write; what stood there is replaced.
        bit_width: how far to join; None for all layers that are there.
        artifact_id: that it must be, if it is known.

    Returns:
        The header; the file is a prefix where the last layers are missing or not wanted.

    Raises:
        SourceError: If a file that is needed is missing or cannot be read.
        ArtifactError: If a byte of one is wrong, or the sidecar is.
        TrustError: If it is another artifact than ``artifact_id``.
        BitWidthError: If the bit-width is not stored or its layers are not there.
        OutputError: If the file cannot be written.
    """
    source = SplitSource(folder)
    header = source.header
    if artifact_id is not None and header.artifact_id != artifact_id:
        raise TrustError(
            f"{source.name} is artifact {header.artifact_id}, but {artifact_id} was asked for; "
            "fetch that one."
        )
    num_layers = source.num_held
    if bit_width is not None:
        num_layers = header.layer_index(bit_width) + 1
        if num_layers > source.num_held:
            raise BitWidthError(
                bit_width,
                stored=header.bit_widths[: source.num_held],
                where=source.name,
                advice=f"Fetch {source.sidecar.layers[source.num_held].file} and what follows.",
            )
    with publish_atomically(path) as file:
        file.write(_raw_header(source, header))
        for index in range(num_layers):
            _copy_layer(source, header, index, file)
    return header


class SplitSource:
    """The parts in a folder as one source: a whole artifact, or a prefix of one.

    The header is verified here, and its agreement with the sidecar; layers are verified by whoever
    reads them. Files are held open until the source is garbage collected.

    Attributes:
        sidecar: what ``layers.json`` says.
        header: of the artifact.
        num_held: how many layers are there.

    Raises:
        SourceError: If ``layers.json``, the header or the base layer is missing, or a layer is
            missing while a later one is there.
        ArtifactError: If the sidecar or the header is wrong, or a file ends inside a part.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = os.fspath(folder)
        self._folder = Path(folder)
        self.sidecar = _read_sidecar(self._folder / SIDECAR_FILE)
        self._files: dict[str, FileSource] = {}
        self._parts = self._parts_there()
        self.num_held = len(self._parts) - 1
        self._require_ends()
        self._stops = tuple(accumulate(part.num_bytes for part in self._parts))
        raw = self.read(ByteRange(0, self.sidecar.header.num_bytes))
        self.header = Header.parse(raw)
        self.sidecar.check(self.header)

    def size(self) -> int:
        """Bytes of the parts that are there."""
        return self._stops[-1]

    def read(self, byte_range: ByteRange) -> bytearray:
        """Exactly the bytes of ``byte_range``, counted as in the artifact's one file."""
        if not 0 <= byte_range.start <= byte_range.stop <= self.size():
            raise RangeError(
                f"bytes {byte_range} were asked for, but {self.name} has {self.size()} bytes; "
                "ask inside those."
            )
        pieces = []
        for part, (first, last) in zip(self._parts, pairwise((0, *self._stops)), strict=True):
            start, stop = max(byte_range.start, first), min(byte_range.stop, last)
            if start < stop:
                inside = ByteRange(start, stop).shifted(part.offset - first)
                pieces.append(self._files[part.file].read(inside))
        return pieces[0] if len(pieces) == 1 else bytearray().join(pieces)

    def _parts_there(self) -> tuple[Part, ...]:
        """The header and the first layers."""
        there: list[Part] = []
        missing: Part | None = None
        for part in self.sidecar.parts:
            if not self._is_there(part):
                missing = missing or part
            elif missing is None:
                there.append(part)
            elif part.num_bytes:
                raise SourceError(
                    f"{self.name} has {part.file} and lacks {missing.file}, without which it says "
                    "nothing; fetch that too, or delete what comes after it."
                )
        if missing is not None and len(there) < 2:
            raise SourceError(
                f"{self.name} lacks {missing.file}, which every bit-width needs; fetch it."
            )
        return tuple(there)

    def _is_there(self, part: Part) -> bool:
        """Whether the file has the part; one that ends before it, where another does, has not."""
        if not part.num_bytes:
            return True  # held with the one before it
        if part.file not in self._files:
            path = self._folder / part.file
            if not path.exists():
                return False
            self._files[part.file] = FileSource(path)
        size = self._files[part.file].size()
        if part.offset and size <= part.offset:
            return False
        if size < part.offset + part.num_bytes:
            raise TruncatedError(
                f"{self._folder / part.file} has {size} bytes, but its part of the artifact ends "
                f"at {part.offset + part.num_bytes}; fetch it again."
            )
        return True

    def _require_ends(self) -> None:
        """No file has bytes after its last part, where something could hide."""
        ends = {part.file: part.offset + part.num_bytes for part in self._parts if part.num_bytes}
        for name, end in ends.items():
            if (size := self._files[name].size()) != end:
                raise ArtifactError(
                    f"{self._folder / name} has {size} bytes, but its part of the artifact ends at "
                    f"{end}; fetch it again, or cut off what was appended."
                )


def _read_sidecar(path: Path) -> Sidecar:
    source = FileSource(path)
    # One byte more than may be there is enough to be refused, however long the file is.
    raw = source.read(ByteRange(0, min(source.size(), MAX_SIDECAR_BYTES + 1)))
    source.close()
    return Sidecar.parse(raw)


def _raw_header(source: Source, header: Header) -> bytes:
    """The bytes of a header, which are still those that were parsed."""
    raw = bytes(source.read(ByteRange(0, header.data_start)))
    if hashlib.sha256(raw).hexdigest() != header.artifact_id:
        raise DigestError(f"{source.name} changed while it was read; start again.")
    return raw


def _copy_layer(source: Source, header: Header, index: int, file: BinaryIO) -> None:
    """Write a layer to ``file``, chunk by chunk, and raise unless all its digests match."""
    layer = header.layers[index]
    digests = LayerDigests(layer)
    for number in range(layer.num_chunks):
        data = source.read(layer.chunk_range(number))
        digests.update(memoryview(data))
        file.write(data)
    what = f"layer {index} ({layer.bit_width} bits) of {source.name}"
    for number, (found, stated) in enumerate(
        zip(digests.chunks(), layer.chunk_digests, strict=True)
    ):
        if found != stated:
            raise DigestError(
                f"chunk {number} of {what} differs from its digest; fetch bytes "
                f"{layer.chunk_range(number)} of the artifact again."
            )
    if digests.sha256() != layer.sha256:
        raise DigestError(
            f"{what} differs from its digest, although its chunks match theirs; the header "
            "contradicts itself, so pack the model again."
        )


@contextlib.contextmanager
def _new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that takes the name ``folder`` when the block ends without an exception."""
    shown = os.fspath(folder)
    try:
        target = Path(folder).resolve()
        temporary = target.parent / f".plyweight-{secrets.token_hex(8)}.part"
        is_empty = target.is_dir() and not any(target.iterdir())
        is_taken = target.exists() and not is_empty
        if not is_taken:
            temporary.mkdir()
    except (OSError, ValueError, RuntimeError) as error:  # an embedded NUL, a loop of links
        raise OutputError(
            f"the folder {shown!r} cannot be made ({error}); choose another place."
        ) from error
    if is_taken:
        raise OutputError(f"{shown!r} is not an empty folder; give the name of a new one.")
    try:
        yield temporary
        try:
            if is_empty:
                target.rmdir()  # Windows renames onto no folder, be it empty
            temporary.rename(target)
        except OSError as error:
            raise OutputError(
                f"the folder {shown!r} cannot be written ({error}); nothing was left behind, so "
                "choose another place and try again."
            ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
