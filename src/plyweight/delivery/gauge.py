"""Gauge: how fast the link to a source is, measured on bytes that are needed anyway.

The first reply is read ahead and timed, and then handed on as it came; so a download that begins
with its header (most do) measures its link without one request or byte more.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from plyweight.artifact import ByteRange
from plyweight.delivery.source import RemoteSource, Reply

__all__ = ["Gauge"]

MOST_BYTES = 2**20  # that are read ahead: enough for a link to come up to its speed


class Gauge:
    """A remote source whose first reply is timed, from the request to the last byte read ahead.

    The latency counts, so the rate of a short reply is below that of the link, never above.

    Args:
        source: to ask; it stays the caller's to close.
        most_s: stop reading ahead after so long, whatever was read.
    """

    def __init__(self, source: RemoteSource, *, most_s: float) -> None:
        self._source, self._most_s = source, most_s
        self._lock = threading.Lock()
        self._rate: float | None = None

    @property
    def name(self) -> str:
        """That of the source."""
        return self._source.name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Ask once, as the source does; the first time some of the body is read ahead."""
        started = time.monotonic()
        with self._source.get(byte_range, identity=identity) as reply:
            if self._rate is None:
                ahead = self._read_ahead(reply, started)
                yield replace(reply, body=_chained(ahead, reply.body))
            else:
                yield reply

    def rate(self, sample: ByteRange) -> float:
        """Bytes a second; asks for ``sample`` and drops it if nothing was asked before.

        Raises:
            DeliveryError: If that cannot be read.
        """
        if self._rate is None:
            with self.get(sample):
                pass
        assert self._rate is not None
        return self._rate

    def close(self) -> None:
        """Nothing: the source is its owner's."""

    def _read_ahead(self, reply: Reply, started: float) -> list[bytes | bytearray | memoryview]:
        pieces: list[bytes | bytearray | memoryview] = []
        num_bytes = 0
        for piece in reply.body:
            pieces.append(bytes(piece))  # the source may use its buffer again
            num_bytes += len(piece)
            if num_bytes >= MOST_BYTES or time.monotonic() - started > self._most_s:
                break
        with self._lock:
            self._rate = max(num_bytes, 1) / max(time.monotonic() - started, 1e-6)
        return pieces


def _chained(
    first: list[bytes | bytearray | memoryview], rest: Iterator[bytes | bytearray | memoryview]
) -> Iterator[bytes | bytearray | memoryview]:
    yield from first
    yield from rest
