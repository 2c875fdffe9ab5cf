"""Parts: an artifact in the split form at its source, as if it were one object.

    layers.json  header.bin  layer-0.bin  layer-1.bin ...        https://host/net/layers.json

A part is a whole file, so a server that knows no byte ranges serves any bit-width as well as one
that does: what it sends before the bytes asked for is less than a part, and is dropped here.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from plyweight.artifact import ByteRange, Sidecar
from plyweight.artifact.sidecar import MAX_SIDECAR_BYTES, Part
from plyweight.delivery.source import RemoteSource, Reply, read_small
from plyweight.errors import SourceError, StaleError, TransferError

__all__ = ["PartsSource"]


class PartsSource:
    """The parts that a sidecar names, in its own folder.

    Its identity is the artifact's id, which the sidecar states; the parts are judged by the
    digests of the header.

    Args:
        address: of the ``layers.json``.
        open_source: makes the source of one file of that folder from its address.

    Raises:
        SourceError: If the address has a query, which the other files would need as well.
    """

    def __init__(self, address: str, open_source: Callable[[str], RemoteSource]) -> None:
        if "?" in address or "#" in address:
            raise SourceError(
                "the address of a layers.json may have no query, because the other files have "
                "theirs; give one that needs none, or fetch the artifact's one file."
            )
        self._folder = address.rpartition("/")[0]
        self._open_source = open_source
        self._lock = threading.Lock()
        self._sources: dict[str, RemoteSource] = {}
        self._sidecar_source = open_source(address)
        self._sidecar: Sidecar | None = None

    @property
    def name(self) -> str:
        """The address of the sidecar."""
        return self._sidecar_source.name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Ask once for the part of ``byte_range`` that lies in one file.

        Where the server ignores ranges the reply is all of that part, and says so.
        """
        # Read again where no identity is known yet: the first request of a download.
        sidecar = self._read_sidecar(again=identity is None)
        if identity is not None and identity != sidecar.artifact_id:
            raise StaleError(f"{self.name} names another artifact by now; fetch it again.")
        if byte_range.start >= sidecar.size:
            raise StaleError(
                f"{self.name} names {sidecar.size} bytes, but bytes {byte_range} were asked for; "
                "fetch it again."
            )
        stops = accumulate(part.num_bytes for part in sidecar.parts)
        part, stop = next(
            (part, stop)
            for part, stop in zip(sidecar.parts, stops, strict=True)
            if byte_range.start < stop
        )
        wanted = ByteRange(byte_range.start, min(byte_range.stop, stop))
        offset = part.offset + part.num_bytes - stop  # from the artifact to the file
        with self._source_of(part).get(wanted.shifted(offset)) as reply:
            # From here on counted from the first byte of the artifact, which a file that holds
            # something else before the part has no number for.
            position = reply.byte_range.start - offset
            got = ByteRange(
                max(position, stop - part.num_bytes), min(reply.byte_range.stop - offset, stop)
            )
            yield Reply(
                byte_range=got,
                total_bytes=sidecar.size,
                identity=sidecar.artifact_id,
                body=_between(reply.body, position, got),
                has_ranges=reply.has_ranges,
            )

    def close(self) -> None:
        """Close the sources of all files."""
        with self._lock:
            for source in (self._sidecar_source, *self._sources.values()):
                source.close()

    def _read_sidecar(self, *, again: bool) -> Sidecar:
        with self._lock:
            if self._sidecar is None or again:
                self._sidecar = Sidecar.parse(read_small(self._sidecar_source, MAX_SIDECAR_BYTES))
            return self._sidecar

    def _source_of(self, part: Part) -> RemoteSource:
        with self._lock:
            if part.file not in self._sources:
                self._sources[part.file] = self._open_source(f"{self._folder}/{part.file}")
            return self._sources[part.file]


def _between(
    body: Iterator[bytes | bytearray | memoryview], position: int, wanted: ByteRange
) -> Iterator[memoryview]:
    """Of bytes that start at ``position``, those of ``wanted``."""
    for piece in body:
        view = memoryview(piece)[max(0, wanted.start - position) :][: wanted.num_bytes]
        start = max(position, wanted.start)
        view = view[: max(0, wanted.stop - start)]
        position += len(piece)
        if view:
            yield view
        if position >= wanted.stop:
            return
    if position < wanted.stop and position <= wanted.start:
        raise TransferError(f"the file ended before byte {wanted.start} of the artifact.")
