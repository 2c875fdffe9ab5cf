"""Transfer: what a download asked for and what it moved, counted where it happens."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from plyweight.artifact import ByteRange
from plyweight.delivery.source import RemoteSource, Reply
from plyweight.errors import StaleError, TransferError

__all__ = ["Meter", "Progress", "Stream", "Transfer", "ask"]


@dataclass(frozen=True)
class Transfer:
    """What one download moved.

    Attributes:
        requests: that were made.
        received_bytes: of their replies, as far as they were read.
        wasted_bytes: of those, that were dropped: wrong, here already, or not wanted.
        retries: requests that were made again because one failed.
        seconds: from the first step to the last.
    """

    requests: int
    received_bytes: int
    wasted_bytes: int
    retries: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a download is.

    Attributes:
        bytes_done: of the prefix, that are here; fewer than before if some turned out wrong.
        bytes_total: of the prefix, header included.
        layer: index of the first layer that is not complete; of the last one in the end.
        received_bytes: over the wire so far, from which a rate can be told.
    """

    bytes_done: int
    bytes_total: int
    layer: int
    received_bytes: int


class Meter:
    """Counts, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._requests = self._received = self._wasted = self._retries = 0

    def asked(self) -> None:
        """A request is made."""
        with self._lock:
            self._requests += 1

    def received(self, num_bytes: int) -> None:
        """Bytes have arrived."""
        with self._lock:
            self._received += num_bytes

    def wasted(self, num_bytes: int) -> None:
        """Bytes that had arrived are dropped."""
        with self._lock:
            self._wasted += num_bytes

    def retried(self) -> None:
        """A request is about to be made again."""
        with self._lock:
            self._retries += 1

    def read(self) -> Transfer:
        """The counts so far."""
        with self._lock:
            seconds = time.monotonic() - self._started
            return Transfer(self._requests, self._received, self._wasted, self._retries, seconds)


class Stream:
    """One reply that is being read.

    Attributes:
        identity: of the object, or None.
        total_bytes: of the object, or None.
        byte_range: that the reply covers.
        ignores_range: whether it is more than what was asked for: all of a file.
        has_ranges: whether it shows that the source knows ranges.
    """

    def __init__(self, reply: Reply, asked: ByteRange, meter: Meter) -> None:
        self.identity, self.total_bytes = reply.identity, reply.total_bytes
        self.byte_range, self.has_ranges = reply.byte_range, reply.has_ranges
        self.ignores_range = reply.byte_range.start < asked.start or (
            reply.byte_range.stop > asked.stop
        )
        self._pieces, self._meter = iter(reply.body), meter
        self._position = reply.byte_range.start

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """The pieces from where reading stopped, each with the position of its first byte.

        Raises:
            TransferError: If they end early.
        """
        for piece in self._pieces:
            self._meter.received(len(piece))
            position, self._position = self._position, self._position + len(piece)
            yield position, memoryview(piece)
        if self._position < self.byte_range.stop:
            raise TransferError(
                f"bytes {self.byte_range} were promised, but they ended at {self._position}; "
                "try again."
            )


@contextmanager
def ask(
    source: RemoteSource, byte_range: ByteRange, *, identity: str | None, meter: Meter
) -> Iterator[Stream]:
    """Ask once for ``byte_range``: a reply that starts there or before, and is not empty.

    Raises:
        TransferError: If another attempt may succeed.
        StaleError: If the object is not the one of ``identity``, or ends before the range.
        SourceError: If there is no such object.
    """
    meter.asked()
    with source.get(byte_range, identity=identity) as reply:
        if identity is not None and reply.identity not in (None, identity):
            raise StaleError(f"{source.name} changed while it was fetched; fetch it again.")
        got = reply.byte_range
        if got.stop <= byte_range.start:
            raise StaleError(
                f"{source.name} ends at byte {got.stop}, but bytes {byte_range} were asked for; "
                "fetch it again."
            )
        if got.start > byte_range.start:
            raise TransferError(
                f"{source.name} answered with bytes {got} when {byte_range} were asked for."
            )
        yield Stream(reply, byte_range, meter)
