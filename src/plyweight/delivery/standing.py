"""StandingFile: an artifact as a plain file at a path, whole or not at all.

It is filled beside its path and renamed onto it. A narrower file of the same artifact that stands
there already is not fetched again, nor what a cache has of it: those bytes are verified and copied.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from plyweight.artifact import FileSource, Header, header_bytes
from plyweight.artifact.files import resolve_target
from plyweight.artifact.header import LENGTH_BYTES
from plyweight.artifact.layout import ByteRange
from plyweight.artifact.posix import require_posix
from plyweight.delivery.cache import Cache, CachedArtifact
from plyweight.delivery.chunks import Chunk, chunks_of
from plyweight.delivery.filling import Filling, hold_lock, require_space
from plyweight.delivery.partial import Partial, partial_files
from plyweight.errors import ArtifactError, OutputError, RangeError, SourceError

__all__ = ["StandingFile"]

NEW_FILE_MODE = 0o666  # less what the umask takes, as for any file a person writes


class StandingFile:
    """A file that holds the first layers of one artifact.

    Args:
        path: of the file. If one stands there it must be an artifact, whole or a prefix, and only
            a download of that same artifact replaces it, by a longer one.
        cache: what it holds of the artifact is not fetched.

    Raises:
        OutputError: If no file can be written there, or what stands there is no artifact.
    """

    def __init__(self, path: str | os.PathLike[str], *, cache: Cache | None = None) -> None:
        require_posix("fetching into a file that can be resumed")
        self.path = resolve_target(path)
        self._cache = cache
        self._damaged: tuple[int, int] | None = None  # the very file, by device and number
        self._raw_existing()

    def raw_header(self, artifact_id: str) -> bytes | None:
        """The header of that artifact if the file has it, one being filled for it, or the cache."""
        found = [self._raw_existing(), *map(_raw_header, partial_files(self.path))]
        for raw in found:
            if raw is not None and hashlib.sha256(raw).hexdigest() == artifact_id:
                return raw
        return self._cache.raw_header(artifact_id) if self._cache is not None else None

    def opened(self, header: Header, bit_width: int) -> FileSource | None:
        """The file if it has ``bit_width``; None if it is not there, shorter or known as damaged.

        Raises:
            OutputError: If another artifact stands there.
        """
        if not self._require_same(header) or self._is_damaged():
            return None
        source = FileSource(self.path)
        ends = {layer.byte_range.stop for layer in header.layers}
        if source.size() >= header.prefix_bytes(bit_width) and source.size() in ends:
            return source
        source.close()
        return None

    def repair(self, artifact_id: str) -> tuple[int, ...]:
        """Read the file; the layers that are damaged, which are then missing until it is filled."""
        raw = self._raw_existing()
        if raw is None or hashlib.sha256(raw).hexdigest() != artifact_id:
            return ()
        header = Header.parse(raw)
        with contextlib.closing(FileSource(self.path)) as source:
            found = self._identity()
            held = range(_num_layers(header, source.size()))
            chunks = chunks_of(header, held)
            wrong = {
                chunk.layer for chunk in chunks if not _is(chunk, source.read(chunk.byte_range))
            }
        if wrong:
            self._damaged = found
        return tuple(sorted(wrong))

    @contextlib.contextmanager
    def filling(
        self, raw: bytes, header: Header, bit_width: int, *, wait_s: float
    ) -> Iterator[Filling]:
        """What is missing of ``bit_width``."""

        def progress() -> int:
            journals = [part.with_suffix(".journal") for part in partial_files(self.path)]
            return sum(j.stat().st_size for j in journals if j.exists())

        lock = self.path.with_name(f"{self.path.name}.lock")
        with hold_lock(lock, progress, wait_s=wait_s):
            existing = self._require_same(header)
            layers = range(len(header.layers_for(bit_width)))
            if self._is_damaged():  # what is mended is as long as what it replaces
                held = _num_layers(header, self.path.stat().st_size)
                layers = range(max(len(layers), held))
            if self._is_complete(header, bit_width):  # by whoever had the lock before
                yield Filling({})
                return
            others = partial_files(self.path)
            partial = Partial(
                self.path,
                self.path,
                header=header,
                layers=layers,
                head=raw,
                mode=stat.S_IMODE(self.path.stat().st_mode) if existing else NEW_FILE_MODE,
            )
            with contextlib.closing(partial):
                filling = Filling(dict.fromkeys(layers, partial))
                require_space(self.path.parent, filling.missing_bytes, f"{bit_width} bits")
                for path in [self.path, *others]:
                    if path != partial.path and _raw_header(path) == raw:
                        with contextlib.suppress(SourceError):
                            _copy(FileSource(path), partial)
                if self._cache is not None:
                    with contextlib.suppress(SourceError):  # it holds nothing of it
                        _copy(self._cache.open(header.artifact_id), partial)
                filling.publish_complete()
                yield filling

    def _is_damaged(self) -> bool:
        """Whether the file that stands there is the one that :meth:`repair` found damaged."""
        return self._damaged is not None and self._identity() == self._damaged

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _is_complete(self, header: Header, bit_width: int) -> bool:
        if (source := self.opened(header, bit_width)) is None:
            return False
        source.close()
        return True

    def _require_same(self, header: Header) -> bool:
        """Whether a file stands there, which must be of that artifact."""
        raw = self._raw_existing()
        if raw is None:
            return False
        if (found := hashlib.sha256(raw).hexdigest()) != header.artifact_id:
            raise OutputError(
                f"{self.path} holds another artifact ({found[:12]}) than the one that is fetched "
                f"({header.artifact_id[:12]}, revision {header.model.revision} of "
                f"{header.model.name}); move it away, or give another path."
            )
        return True

    def _raw_existing(self) -> bytes | None:
        if not self.path.exists():
            return None
        if (raw := _raw_header(self.path)) is None:
            raise OutputError(
                f"{self.path} exists and is no artifact, so it is not replaced; move it away, or "
                "give another path."
            )
        return raw


def _raw_header(path: Path) -> bytes | None:
    """The first bytes of a file as far as they claim to be a header; None if they do not."""
    try:
        with contextlib.closing(FileSource(path)) as source:
            stop = header_bytes(source.read(ByteRange(0, min(source.size(), LENGTH_BYTES))))
            raw = bytes(source.read(ByteRange(0, stop)))
    except (SourceError, RangeError, ArtifactError):
        return None
    return raw if raw[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" else None


def _num_layers(header: Header, size: int) -> int:
    """How many whole layers there are in the first ``size`` bytes."""
    return sum(layer.byte_range.stop <= size for layer in header.layers)


def _copy(source: CachedArtifact | FileSource, partial: Partial) -> None:
    """Take over the chunks that a shorter or half-filled copy of the same artifact has."""
    with contextlib.closing(source):
        for chunk in partial.missing:
            if chunk.byte_range.stop > source.size():
                break
            data = source.read(chunk.byte_range)
            if _is(chunk, data):
                partial.write(chunk, memoryview(data))


def _is(chunk: Chunk, data: bytearray) -> bool:
    return hashlib.sha256(data).digest() == chunk.digest
