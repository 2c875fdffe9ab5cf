"""Filling: what a download still misses, and the files it goes to.

    Cache            one partial file for each layer that is missing
    StandingFile     one for the whole prefix

Either way a verified chunk goes to the partial file of its layer, and a file that is complete with
it is published at once: the base layer can be used while the others still arrive.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from plyweight.artifact import Header, Source
from plyweight.artifact.posix import free_bytes, try_lock
from plyweight.delivery.chunks import Chunk
from plyweight.delivery.partial import Partial
from plyweight.errors import OutputError

__all__ = ["Destination", "Filling", "hold_lock", "require_space"]

POLL_S = 0.05


class Filling:
    """The partial files of one download.

    Args:
        partials: by the index of the layer; several layers may share one.
    """

    def __init__(self, partials: Mapping[int, Partial]) -> None:
        self._partials = partials
        self._files = list({id(partial): partial for partial in partials.values()}.values())

    @property
    def missing(self) -> list[Chunk]:
        """The chunks that are not there yet, in order."""
        return sorted(chunk for partial in self._files for chunk in partial.missing)

    @property
    def first_missing(self) -> Chunk | None:
        """The first of them; None if all are there."""
        firsts = [partial.first_missing for partial in self._files]
        return min((chunk for chunk in firsts if chunk is not None), default=None)

    @property
    def missing_bytes(self) -> int:
        """Bytes of those chunks."""
        return sum(partial.missing_bytes for partial in self._files)

    def write(self, chunk: Chunk, data: memoryview) -> None:
        """Put a verified chunk at its place, and publish the file if it is complete with it.

        Raises:
            DigestError: If its layer has another digest.
            OutputError: If the file cannot be written or published.
        """
        partial = self._partials[chunk.layer]
        if partial.write(chunk, data):
            partial.publish()

    def publish_complete(self) -> None:
        """Publish what was complete already when it was opened.

        Raises:
            DigestError: If a layer has another digest.
            OutputError: If a file cannot be published.
        """
        for partial in self._files:
            if not partial.missing_bytes:
                partial.publish()

    def close(self) -> None:
        """Close the files; what is verified stays on disk for another time."""
        for partial in self._files:
            partial.close()


class Destination(Protocol):
    """Where a download goes: a cache or a standing file."""

    def raw_header(self, artifact_id: str) -> bytes | None:
        """The header of that artifact if it is here, verified; None if it is not."""
        ...

    def filling(
        self, raw: bytes, header: Header, bit_width: int, *, wait_s: float
    ) -> AbstractContextManager[Filling]:
        """What is missing here of ``bit_width``.

        Args:
            raw: the bytes of the header.
            header: what they say.
            bit_width: that is wanted.
            wait_s: how long to wait for another process that fetches the same but gets no further.

        Raises:
            OutputError: If there is no space, or it cannot be written.
        """
        ...

    def repair(self, artifact_id: str) -> tuple[int, ...]:
        """Read what is here of that artifact; the layers that are damaged, and missing from now on.

        Raises:
            SourceError: If it cannot be read.
        """
        ...

    def opened(self, header: Header, bit_width: int) -> Source | None:
        """A source of ``bit_width``; None if some of it is missing.

        Raises:
            OutputError: If something else is there.
        """
        ...


@contextlib.contextmanager
def hold_lock(path: Path, progress: Callable[[], object], *, wait_s: float) -> Iterator[None]:
    """Hold the advisory lock of ``path``, so that nothing is fetched twice at the same time.

    Whoever waits in vain goes on without: two that fill the same file write the same bytes.

    Args:
        path: of the lock file; it is deleted in the end.
        progress: changes while whoever has the lock gets further.
        wait_s: how long to wait while it does not.

    Raises:
        OutputError: If the lock file cannot be created.
    """
    seen, since = progress(), time.monotonic()
    while (descriptor := try_lock(path)) is None:
        time.sleep(POLL_S)
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > wait_s:
            break
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse what does not fit on the disk.

    Raises:
        OutputError: If fewer than ``num_bytes`` are free.
    """
    free = free_bytes(folder)
    if num_bytes > free:
        raise OutputError(
            f"{what} needs {num_bytes} more bytes in {folder}, but {free} are free; free some "
            "space, or ask for fewer bits."
        )
