"""Partial: a file that is being filled, and survives a kill at any point.

    <stem>.<nonce>.part       verified chunks at their places, holes in between
    <stem>.<nonce>.journal    a line "layer/chunk" for each of them: a hint, judged by hashing;
                              without it (a kill may leave none) every chunk is looked at

A chunk is judged before it is written and always goes to the same place, so writing it twice, or
from two processes at once, writes the same bytes. The nonce ties a name to one file for ever:
whoever renames ``<nonce>.part`` publishes the very file it has filled and hashed, even where locks
do not work and another process has begun a file of its own meanwhile.
"""

import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from plyweight.artifact import ByteRange, Header
from plyweight.artifact.posix import (
    append,
    fill_from,
    open_to_fill,
    publish_descriptor,
    set_size,
    write_at,
)
from plyweight.delivery.chunks import Chunk, chunks_of
from plyweight.errors import DigestError, OutputError, SourceError

__all__ = ["Partial", "partial_files", "remove_partials"]

PIECE_BYTES = 2**20  # of what is hashed again
LINE_BYTES = 16  # a line of the journal has fewer
NONCE_BYTES = 4
_LINE = re.compile(rb"([0-9]{1,2})/([0-9]{1,9})")


class Partial:
    """Some layers of an artifact, on their way into one file.

    Attributes:
        path: of the partial file.
        missing: the chunks that are not there yet, in order.

    Args:
        target: what the file becomes.
        stem: how the names of the partial file and its journal begin.
        header: of the artifact.
        layers: indices of those that the file holds, neighbours in order.
        head: bytes before the first of them: the header of a standing file, or nothing.
        mode: of the partial file when it is created.
        published_mode: of the file it becomes; None to leave that of the partial one.

    Raises:
        OutputError: If the file cannot be written.
        SourceError: If what stands there is not ours.
    """

    def __init__(
        self,
        target: Path,
        stem: Path,
        *,
        header: Header,
        layers: Sequence[int],
        head: bytes = b"",
        mode: int = 0o600,
        published_mode: int | None = None,
    ) -> None:
        self._target, self._stem = target, stem
        self._header, self._layers, self._head = header, layers, head
        self._published_mode = published_mode
        first, last = header.layers[layers[0]], header.layers[layers[-1]]
        self._origin = first.byte_range.start - len(head)
        self._num_bytes = last.byte_range.stop - self._origin
        self._lock = threading.Lock()
        self._descriptor = self._journal = -1
        try:
            is_new = self._open(mode)
            wanted = list(chunks_of(header, layers))
            is_noted = is_new or self._journal_path.exists()
            self._journal = open_to_fill(self._journal_path, flags=os.O_CREAT | os.O_APPEND)
            claimed = self._claimed(wanted) if is_noted else set(wanted)
            held = {chunk for chunk in claimed if self._holds(self._descriptor, chunk)}
            self._missing = set(wanted) - held
            self._missing_bytes = sum(chunk.byte_range.num_bytes for chunk in self._missing)
        except BaseException:
            self.close()
            raise

    @property
    def missing(self) -> list[Chunk]:
        """The chunks that are not there yet, in order."""
        with self._lock:
            return sorted(self._missing)

    @property
    def first_missing(self) -> Chunk | None:
        """The first of them; None if all are there."""
        with self._lock:
            return min(self._missing, default=None)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the chunks that are not there yet."""
        with self._lock:
            return self._missing_bytes

    def write(self, chunk: Chunk, data: memoryview) -> bool:
        """Put a verified chunk at its place; whether the file is complete with it.

        Raises:
            OutputError: If the disk is full or fails.
        """
        with self._lock:
            if chunk not in self._missing:
                return False
            if self._descriptor < 0:  # its number may be another file's by now
                raise OutputError(f"{self.path} was closed while it was filled; run it again.")
            write_at(self._descriptor, data, chunk.byte_range.start - self._origin)
            append(self._journal, f"{chunk.layer}/{chunk.index}\n".encode())
            self._missing.discard(chunk)
            self._missing_bytes -= chunk.byte_range.num_bytes
            return not self._missing

    def publish(self) -> None:
        """Check every layer's own digest, force the file to disk, and give it its name.

        If another process took the partial file away meanwhile, because it has published the same
        bytes, nothing is left to do; the caller looks whether that is so.

        Raises:
            DigestError: If a layer differs from its digest; what is wrong is dropped.
            OutputError: If the file cannot be published.
        """
        with self._lock:
            descriptor = os.dup(self._descriptor)  # ours until we close it, whoever closes the file
        try:
            for number in self._layers:
                self._check_layer(descriptor, number)
            mode = self._published_mode
            if mode is None:
                mode = os.fstat(descriptor).st_mode & 0o777
            # First, so that a kill between the two leaves a whole file to go on with, not litter.
            self._journal_path.unlink(missing_ok=True)
            publish_descriptor(descriptor, self.path, self._target, mode=mode)
        finally:
            os.close(descriptor)
        self.close()
        remove_partials(self._stem, self._num_bytes)

    def close(self) -> None:
        """Close the files; what is verified stays on disk for another time."""
        with self._lock:
            for descriptor in (self._descriptor, self._journal):
                if descriptor >= 0:
                    os.close(descriptor)
            self._descriptor = self._journal = -1

    @property
    def _journal_path(self) -> Path:
        return self.path.with_suffix(".journal")

    def _open(self, mode: int) -> bool:
        """Take up a partial file of the right size and head, or begin one; whether it is new."""
        for part in partial_files(self._stem):
            self.path = part
            with contextlib.suppress(SourceError, OutputError):  # gone, or not ours
                self._descriptor = open_to_fill(part, flags=0)
                if self._is_of_this_artifact():
                    return False
                os.close(self._descriptor)
                self._descriptor = -1
        nonce = secrets.token_hex(NONCE_BYTES)
        self.path = self._stem.with_name(f"{self._stem.name}.{nonce}.part")
        self._descriptor = open_to_fill(self.path, flags=os.O_CREAT | os.O_EXCL, mode=mode)
        set_size(self._descriptor, self._num_bytes)
        write_at(self._descriptor, self._head, 0)
        return True

    def _is_of_this_artifact(self) -> bool:
        """Whether the open file has the size and the first bytes that it must have in the end."""
        if os.fstat(self._descriptor).st_size != self._num_bytes:
            return False
        found = bytearray(len(self._head))
        fill_from(self._descriptor, found, 0)
        return found == self._head

    def _claimed(self, wanted: Iterable[Chunk]) -> set[Chunk]:
        """The chunks that the journal speaks of; lines that were cut or make no sense do not."""
        by_number = {(chunk.layer, chunk.index): chunk for chunk in wanted}
        most = LINE_BYTES * 4 * (len(by_number) + 1)  # several processes may have written each
        text = bytearray(min(os.fstat(self._journal).st_size, most))
        fill_from(self._journal, text, 0)
        numbers = (_LINE.fullmatch(line) for line in text.splitlines())
        claims = {(int(n[1]), int(n[2])) for n in numbers if n}
        return {by_number[number] for number in claims & by_number.keys()}

    def _holds(self, descriptor: int, chunk: Chunk) -> bool:
        """Whether the chunk on disk has its digest."""
        return self._digest(descriptor, chunk.byte_range) == chunk.digest

    def _digest(self, descriptor: int, byte_range: ByteRange) -> bytes:
        """The sha256 of bytes of the artifact that stand in the file."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
        for start in range(byte_range.start, byte_range.stop, PIECE_BYTES):
            piece = buffer[: byte_range.stop - start]
            digest.update(piece[: fill_from(descriptor, piece, start - self._origin)])
        return digest.digest()

    def _check_layer(self, descriptor: int, number: int) -> None:
        layer = self._header.layers[number]
        if self._digest(descriptor, layer.byte_range).hex() == layer.sha256:
            return
        chunks = chunks_of(self._header, [number])
        wrong = [chunk for chunk in chunks if not self._holds(descriptor, chunk)]
        if wrong:
            raise DigestError(
                f"{wrong[0]} was changed in {self.path} after it was verified; nothing was "
                "published, so check that disk, and run it again to fetch the chunk anew."
            )
        remove_partials(self._stem, self._num_bytes)
        raise DigestError(
            f"layer {number} ({layer.bit_width} bits) of artifact {self._header.artifact_id} "
            "differs from its digest, although its chunks match theirs; the header contradicts "
            "itself, so nothing was published: ask whoever published it to pack it again."
        )


def remove_partials(stem: Path, most_bytes: int) -> None:
    """Delete partial files of at most that size, and all journals that have lost theirs.

    Whoever fills one of them goes on unharmed, and finds in the end that it is published.
    """
    for part in partial_files(stem):
        with contextlib.suppress(FileNotFoundError):
            if part.lstat().st_size <= most_bytes:
                part.unlink()
    for journal in partial_files(stem, "journal"):
        if not journal.with_suffix(".part").exists():
            journal.unlink(missing_ok=True)


def partial_files(stem: Path, suffix: str = "part") -> list[Path]:
    """The partial files (or journals) under that stem, always in the same order."""
    name = re.compile(rf"{re.escape(stem.name)}\.[0-9a-f]{{{2 * NONCE_BYTES}}}\.{suffix}")
    return sorted(path for path in stem.parent.iterdir() if name.fullmatch(path.name))
