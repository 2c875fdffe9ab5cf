"""Opening: the header of an artifact, from memory or from the first bytes of a source.

    GET [0, 1 MiB)  ──►  N, judged before more is read  ──►  header, parsed strictly  ──►  id

What comes after the header in the first reply is the beginning of the base layer, so the reply is
handed on half read instead of being asked for again.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from plyweight.artifact import ByteRange, Header, header_bytes
from plyweight.artifact.header import LENGTH_BYTES
from plyweight.delivery.filling import Destination
from plyweight.delivery.refs import Ref
from plyweight.delivery.retry import Patience
from plyweight.delivery.source import RemoteSource
from plyweight.delivery.transfer import Meter, Stream, ask
from plyweight.errors import ArtifactError, StaleError, TransferError, TrustError

__all__ = ["Opened", "Opener"]

FIRST_BYTES = 2**20  # of the first request: most headers, and the beginning of the base layer
MAX_READINGS = 2  # of a header that is wrong: a bit may have been flipped on the way


@dataclass(frozen=True)
class Opened:
    """A header, and what came with it.

    Attributes:
        raw: its bytes.
        header: what they say.
        identity: of the object; None if it is unknown.
        rest: bytes after the header that came with it; empty if it was here already.
        stream: the reply they are from, half read; None if it was here already.
        close: ends that reply, so that its connection is free.
    """

    raw: bytes
    header: Header
    identity: str | None
    rest: memoryview
    stream: Stream | None
    close: Callable[[], None]


class Opener:
    """Reads the header of one source.

    Args:
        source: to ask.
        artifact_id: that it must have; None for any.
        meter: counts.
        patience: says how long to go on.
    """

    def __init__(
        self, source: RemoteSource, artifact_id: str | None, meter: Meter, patience: Patience
    ) -> None:
        self._source, self._artifact_id = source, artifact_id
        self._meter, self._patience = meter, patience
        self._lock = threading.Lock()
        self._is_confirmed = False  # whether the source has shown the header in this session

    def from_memory(self, into: Destination, known: Ref | None, *, refresh: bool) -> Opened | None:
        """The header that the pinned id or the name stands for, if it is here.

        Args:
            into: where it may be.
            known: what the name stands for.
            refresh: ask first whether the object is still the same.
        """
        wanted = self._artifact_id
        if wanted is None and known is not None and not (refresh and self._has_changed(known)):
            wanted = known.artifact_id
        raw = into.raw_header(wanted) if wanted is not None else None
        if raw is None:
            return None
        is_of_name = known is not None and known.artifact_id == wanted
        identity = known.identity if known is not None and is_of_name else None
        return Opened(raw, Header.parse(raw), identity, memoryview(b""), None, lambda: None)

    @contextmanager
    def from_source(self) -> Iterator[Opened]:
        """The header as the source has it now.

        Raises:
            ArtifactError: If it is wrong, twice.
            TrustError: If it is not that of the pinned id, twice.
            TransferError: If nothing arrives for too long.
            StaleError: If the object changes while its header is read.
            SourceError: If there is none.
        """
        for reading in range(1, MAX_READINGS + 1):
            with ExitStack() as stack:
                try:
                    opened = self._read(stack)
                except (ArtifactError, TrustError):
                    if reading == MAX_READINGS:
                        raise
                    self._meter.retried()
                    continue
                self._is_confirmed = True
                yield opened
                return

    def require_unchanged(self, header: Header) -> None:
        """Look whether the source still has that header, once, if it has not shown it yet.

        Raises:
            StaleError: If it has another one.
            TransferError: If it cannot be seen.
        """
        with self._lock:
            if self._is_confirmed:
                return
            digest = hashlib.sha256()
            whole = ByteRange(0, header.data_start)
            with ask(self._source, whole, identity=None, meter=self._meter) as stream:
                for position, piece in stream:
                    digest.update(piece[: max(0, header.data_start - position)])
                    if position + len(piece) >= header.data_start:
                        break
            if digest.hexdigest() != header.artifact_id:
                raise StaleError(
                    f"{self._source.name} does not have artifact {header.artifact_id[:12]} any "
                    "more; begin again with its header."
                )
            self._is_confirmed = True

    def _has_changed(self, known: Ref) -> bool:
        """Whether the object may be another one by now; asks for one byte if that can tell."""
        if known.identity is None:
            return True
        first = ByteRange(0, 1)
        try:
            with ask(self._source, first, identity=known.identity, meter=self._meter) as stream:
                next(iter(stream), None)
                return stream.identity != known.identity
        except (StaleError, TransferError):
            return True  # its header is asked for, which tries again

    def _read(self, stack: ExitStack) -> Opened:
        """The header, and the reply that ends it, left open in ``stack``."""
        buffer, identity, failures = bytearray(), None, 0
        stop = FIRST_BYTES
        while True:
            before = len(buffer)
            try:
                with ExitStack() as attempt:
                    wanted = ByteRange(before, stop)
                    stream = attempt.enter_context(
                        ask(self._source, wanted, identity=identity, meter=self._meter)
                    )
                    identity = identity or stream.identity
                    if _has_header(buffer, stream, self._patience):
                        stack.push(attempt.pop_all())  # left open
                        break
                    # It is longer than what was asked for, or than what was given.
                    is_known = len(buffer) >= LENGTH_BYTES
                    stop = max(FIRST_BYTES, header_bytes(buffer) if is_known else LENGTH_BYTES)
            except TransferError as error:
                failures = 1 if len(buffer) > before else failures + 1
                self._patience.pause(failures, error)
                self._meter.retried()
        header = Header.parse(buffer)
        if self._artifact_id not in (None, header.artifact_id):
            raise TrustError(
                f"{self._source.name} has artifact {header.artifact_id}, but {self._artifact_id} "
                "was asked for; it was replaced or is not what you were told, so ask its publisher."
            )
        raw, rest = bytes(buffer[: header.data_start]), memoryview(buffer)[header.data_start :]
        return Opened(raw, header, identity, rest, stream, stack.close)


def _has_header(buffer: bytearray, stream: Stream, patience: Patience) -> bool:
    """Read on until the header is in ``buffer``; whether it is.

    Raises:
        HeaderError: If its length cannot be one; nothing more is read then.
        TruncatedError: If the object ends inside it.
        TransferError: If the bytes end early.
    """
    for position, piece in stream:
        buffer += piece[max(0, len(buffer) - position) :]
        patience.progressed()
        if len(buffer) >= LENGTH_BYTES and len(buffer) >= header_bytes(buffer):
            return True
    if stream.total_bytes is not None and len(buffer) >= stream.total_bytes:
        header_bytes(buffer)
        Header.parse(buffer)  # says where it ends
    return False
