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
from pathlib import Path
from typing import BinaryIO

from plyweight.artifact.digests import LayerDigests
from plyweight.artifact.files import publish_atomically
from plyweight.artifact.header import Header
from plyweight.artifact.layout import ByteRange
from plyweight.artifact.parts import SplitSource
from plyweight.artifact.reader import ArtifactReader
from plyweight.artifact.sidecar import HEADER_FILE, SIDECAR_FILE, Sidecar, layer_file
from plyweight.artifact.source import Source
from plyweight.errors import BitWidthError, DigestError, OutputError, TrustError

__all__ = ["join", "split"]


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
