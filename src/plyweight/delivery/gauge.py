"""Gauge: how fast the link to a source is, measured on bytes that are needed anyway.

The first reply is read ahead and timed, and then handed on as it came; so a download that begins
with its header (most do) measures its link without one request or byte more. One whose header is
known asks for the first bytes that are missing, and keeps them for whoever asks for them next.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from plyweight.artifact import ByteRange
from plyweight.delivery.retry import Patience
from plyweight.delivery.source import RemoteSource, Reply
from plyweight.delivery.transfer import Transfer
from plyweight.errors import TransferError

__all__ = ["MOST_BYTES", "Gauge"]

MOST_BYTES = 2**20  # that are read ahead: enough for a link to come up to its speed

Pieces = list[bytes | bytearray | memoryview]


class Gauge:
    """A remote source whose first reply is timed, from the request to the last byte read ahead.

    The latency counts, so the rate of a short reply is below that of the link, never above.

    Args:
        source: to ask; it stays the caller's to close.
        most_s: stop reading ahead after so long, whatever was read.
        patience_s: give up measuring when nothing arrives for so long.
    """

    def __init__(self, source: RemoteSource, *, most_s: float, patience_s: float) -> None:
        self._source, self._most_s, self._patience_s = source, most_s, patience_s
        self._lock = threading.Lock()
        self._rate: float | None = None
        self._kept: Reply | None = None  # what was read to measure, until it is asked for
        self._failures = self._unused = 0

    @property
    def name(self) -> str:
        """That of the source."""
        return self._source.name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Ask once, as the source does; the first time some of the body is read ahead."""
        if (kept := self._take(byte_range)) is not None:
            yield kept
            return
        started = time.monotonic()
        with self._source.get(byte_range, identity=identity) as reply:
            if self._rate is None:
                ahead = self._read_ahead(reply, started)
                yield replace(reply, body=_chained(ahead, reply.body))
            else:
                yield reply

    def rate(self, missing: ByteRange) -> float:
        """Bytes a second; asks for ``missing`` if nothing was asked before, and keeps what comes.

        Raises:
            DeliveryError: If nothing of it can be read.
        """
        patience = Patience(self._patience_s)
        while self._rate is None:
            try:
                started = time.monotonic()
                with self._source.get(missing) as reply:
                    data = b"".join(self._read_ahead(reply, started))
                start = reply.byte_range.start
                self._kept = replace(
                    reply, byte_range=ByteRange(start, start + len(data)), body=iter([data])
                )
            except TransferError as error:
                self._failures += 1
                patience.pause(self._failures, error)
        return self._rate

    def accounted(self, transfer: Transfer) -> Transfer:
        """``transfer`` and what was moved to measure and for nothing else."""
        unused = self._unused + (self._kept.byte_range.num_bytes if self._kept is not None else 0)
        return replace(
            transfer,
            requests=transfer.requests + self._failures + (self._kept is not None),
            received_bytes=transfer.received_bytes + unused,
            wasted_bytes=transfer.wasted_bytes + unused,
            retries=transfer.retries + self._failures,
        )

    def close(self) -> None:
        """Nothing: the source is its owner's."""

    def _take(self, byte_range: ByteRange) -> Reply | None:
        """What is kept of ``byte_range``, from its first byte: a reply that is short."""
        with self._lock:
            kept = self._kept
            if kept is None or not (
                kept.byte_range.start <= byte_range.start < kept.byte_range.stop
            ):
                return None
            self._kept = None
        start, stop = byte_range.start, min(byte_range.stop, kept.byte_range.stop)
        self._unused += kept.byte_range.num_bytes - (stop - start)
        data = next(kept.body)[start - kept.byte_range.start : stop - kept.byte_range.start]
        return replace(kept, byte_range=ByteRange(start, stop), body=iter([data]))

    def _read_ahead(self, reply: Reply, started: float) -> Pieces:
        pieces: Pieces = []
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
    first: Pieces, rest: Iterator[bytes | bytearray | memoryview]
) -> Iterator[bytes | bytearray | memoryview]:
    yield from first
    yield from rest
