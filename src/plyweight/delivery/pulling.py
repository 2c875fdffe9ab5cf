"""Pulling: missing chunks over the wire, several requests at a time, until all are there.

    ranges work       threads take runs of chunks from a queue, base layer first; one goes ahead
                      until a reply has shown that they do
    ranges ignored    one reply is read from byte 0, and what is here already is dropped

Either way a failed request is made again from the byte where it broke off, and a chunk whose
digest is wrong is asked for again, three times at most.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue

from plyweight.artifact import Header
from plyweight.delivery.chunks import Chunk, Gatherer, plan
from plyweight.delivery.filling import Filling
from plyweight.delivery.retry import Patience
from plyweight.delivery.source import RemoteSource
from plyweight.delivery.transfer import Meter, Progress, Stream, ask
from plyweight.errors import DigestError, SourceError, TransferError

__all__ = ["Puller"]

MAX_REJECTIONS = 3  # of one chunk
MAX_IGNORED = 2  # ranges in a row: once may be a proxy's whim, twice is how the server is
IN_FLIGHT_BYTES = 64 * 2**20  # that are held in memory until their digest is known: a largest chunk
REPORT_S = 0.1
GRACE_S = 2.0  # for threads that wait for a server that does not answer


class Puller:
    """Fetches what a filling misses.

    Args:
        source: to ask.
        header: of the artifact.
        bit_width: that is wanted.
        filling: takes the chunks.
        identity: of the object, if it is known.
        meter: counts.
        patience: says how long to go on.
        parallel: requests at the same time.
        max_waste_bytes: to read and drop where the source ignores ranges.
        rejected: is called when a digest was wrong; it may raise ``StaleError``.
        progress: is called now and then, in the thread that called :meth:`pull`.
    """

    def __init__(
        self,
        source: RemoteSource,
        header: Header,
        bit_width: int,
        filling: Filling,
        *,
        identity: str | None,
        meter: Meter,
        patience: Patience,
        parallel: int,
        max_waste_bytes: int,
        rejected: Callable[[], None],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._source, self._header, self._bit_width = source, header, bit_width
        self._filling, self._identity = filling, identity
        self._meter, self._patience, self._parallel = meter, patience, parallel
        self._max_waste_bytes = max_waste_bytes
        self._rejected, self._progress = rejected, progress
        self._rejections: Counter[Chunk] = Counter()
        self._begun: dict[int, Gatherer] = {}  # by the thread that fills it
        self._streamed_waste = 0
        self._reported_s = 0.0
        # Until it is set one thread asks alone: what a server without ranges has sent already when
        # it is hung up on is lost, once for each thread.
        self._ranges_work = threading.Event()
        self._owner = threading.get_ident()
        self._never = threading.Event()  # nobody stops the thread that asked for it

    def pull(self) -> None:
        """Fetch all that is missing.

        Raises:
            TransferError: If nothing arrives for too long.
            StaleError: If the object changed.
            DigestError: If a chunk is wrong again and again.
            SourceError: If the source refuses, or ignores ranges and too much would be wasted.
            OutputError: If it cannot be written.
        """
        with self._last_report():
            self._pull_rest(self._gatherer(self._filling.missing), whole=False)

    def pull_from(self, rest: memoryview, stream: Stream, close: Callable[[], None]) -> None:
        """The same, beginning with what comes with the header.

        Args:
            rest: the bytes after the header that are here.
            stream: the reply they are from.
            close: ends that reply; called as soon as there is nothing more to take from it.

        Raises:
            DeliveryError: As :meth:`pull`.
            DigestError: As :meth:`pull`.
            OutputError: As :meth:`pull`.
        """
        gatherer = self._begun[self._owner] = self._gatherer(self._filling.missing)
        whole = stream.ignores_range
        if stream.has_ranges:
            self._ranges_work.set()
        with self._last_report():
            if not whole or self._waste_of(stream, gatherer) <= self._max_waste_bytes:
                self._take(rest, stream, gatherer)
            close()
            self._pull_rest(gatherer, whole=whole)

    def _pull_rest(self, gatherer: Gatherer, *, whole: bool) -> None:
        """All that a gatherer has left; ``whole`` if the source ignores ranges."""
        if not whole and not self._pull_runs(gatherer):
            gatherer, whole = self._gatherer(self._filling.missing), True
        if whole:
            self._pull(gatherer, self._never, whole=True)
        self._report(at_once=True)

    # --- one request after the other ---

    def _take(self, rest: memoryview, stream: Stream, gatherer: Gatherer) -> None:
        """What came with the header, and still comes; what does not is asked for afterwards."""
        self._meter.wasted(len(rest) - gatherer.feed(self._header.data_start, rest))
        with suppress(TransferError):
            self._read(stream, gatherer, self._never)

    def _read(self, stream: Stream, gatherer: Gatherer, stop: threading.Event) -> None:
        """Take what is wanted of a reply, and leave the rest of it unread."""
        if gatherer.done or gatherer.wanted.start >= stream.byte_range.stop:
            return
        for position, piece in stream:
            if stop.is_set():
                raise _StoppedError
            taken = gatherer.feed(position, piece)
            if taken:
                self._patience.progressed()
            self._meter.wasted(len(piece) - taken)
            if stream.ignores_range:
                self._streamed_waste += len(piece) - taken
            self._report()
            if gatherer.done or gatherer.wanted.start >= stream.byte_range.stop:
                return

    def _pull(self, gatherer: Gatherer, stop: threading.Event, *, whole: bool) -> None:
        """Ask until a gatherer has all its chunks.

        Args:
            gatherer: that wants them.
            stop: is set when it is to end early.
            whole: take replies that start at byte 0 as well.
        """
        failures = ignored = 0
        while True:
            self._begun[threading.get_ident()] = gatherer
            before = gatherer.wanted_bytes
            try:
                if gatherer.done:
                    if not gatherer.rejected:
                        del self._begun[threading.get_ident()]  # and its memory
                        return
                    gatherer = gatherer.handed_over(gatherer.rejected)
                    raise TransferError("the last bytes that came had another digest.")
                with ask(
                    self._source, gatherer.wanted, identity=self._identity, meter=self._meter
                ) as stream:
                    if not stream.ignores_range:
                        self._ranges_work.set()
                    elif not whole:
                        ignored += 1
                        if ignored == MAX_IGNORED:
                            raise _IgnoredError
                        raise TransferError(f"{self._source.name} sent more than was asked for.")
                    else:
                        self._require_little_waste(stream, gatherer)
                    self._read(stream, gatherer, stop)
            except TransferError as error:
                failures = failures + 1 if gatherer.wanted_bytes >= before else 1
                wait_s = self._patience.wait_s(failures, error)
                self._meter.retried()
                if stop.wait(wait_s):
                    raise _StoppedError from None

    # --- several at a time ---

    def _pull_runs(self, gatherer: Gatherer) -> bool:
        """Fetch in parallel what a gatherer has left; False if the source ignores ranges."""
        runs = [*plan(gatherer.rest), *plan(gatherer.rejected)]
        if not runs:
            return True
        jobs: SimpleQueue[Callable[[], Gatherer]] = SimpleQueue()
        jobs.put(partial(gatherer.handed_over, runs[0]))  # which may be begun
        for run in runs[1:]:
            jobs.put(partial(self._gatherer, run))
        self._begun.pop(self._owner, None)
        largest = max(chunk.byte_range.num_bytes for run in runs for chunk in run)
        count = min(self._parallel, len(runs), max(1, IN_FLIGHT_BYTES // largest))
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        stop = threading.Event()
        threads = [
            threading.Thread(
                target=self._work, args=(jobs, ended, stop, number == 0), name="fetch", daemon=True
            )
            for number in range(count)
        ]
        try:
            for thread in threads:
                thread.start()
            errors = [error for _ in threads if (error := self._await(ended)) is not None]
        finally:
            stop.set()
            self._ranges_work.set()  # so that nobody waits for it any more
            until_s = time.monotonic() + GRACE_S
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, until_s - time.monotonic()))
        serious = [error for error in errors if not isinstance(error, _IgnoredError)]
        if serious:
            raise serious[0]
        if errors:  # what was begun is read again, from byte 0
            self._meter.wasted(sum(begun.held_bytes for begun in self._begun.values()))
        self._begun.clear()
        return not errors

    def _work(
        self,
        jobs: "SimpleQueue[Callable[[], Gatherer]]",
        ended: "SimpleQueue[BaseException | None]",
        stop: threading.Event,
        is_first: bool,
    ) -> None:
        """One thread: take a run after the other until there is none."""
        outcome: BaseException | None = None
        try:
            if not is_first:
                self._ranges_work.wait()
            while not stop.is_set():
                self._pull(jobs.get_nowait()(), stop, whole=False)
        except (Empty, _StoppedError):
            pass
        except BaseException as error:
            outcome = error
            stop.set()
        finally:
            self._ranges_work.set()  # or nobody is left to show it
            ended.put(outcome)

    def _await(self, ended: "SimpleQueue[BaseException | None]") -> BaseException | None:
        """How the next thread to end has ended."""
        while True:
            try:
                return ended.get(timeout=REPORT_S)
            except Empty:
                self._report()

    # --- chunks ---

    def _gatherer(self, chunks: Sequence[Chunk]) -> Gatherer:
        return Gatherer(chunks, keep=self._filling.write, reject=self._reject)

    def _reject(self, chunk: Chunk) -> None:
        """A chunk had another digest; nothing of it is kept."""
        self._meter.wasted(chunk.byte_range.num_bytes)
        self._rejections[chunk] += 1
        self._rejected()
        if self._rejections[chunk] == MAX_REJECTIONS:
            layer = self._header.layers[chunk.layer]
            raise DigestError(
                f"{chunk} ({layer.bit_width} bits) of {self._source.name} differs from its digest, "
                f"{MAX_REJECTIONS} times in a row, so nothing of it was kept; ask whoever serves "
                "it, or fetch it from another source."
            )

    def _waste_of(self, stream: Stream, gatherer: Gatherer) -> int:
        """How many bytes would be read and dropped, together with those that were."""
        ahead = gatherer.wanted.stop - stream.byte_range.start - gatherer.wanted_bytes
        return self._streamed_waste + ahead

    def _require_little_waste(self, stream: Stream, gatherer: Gatherer) -> None:
        waste = self._waste_of(stream, gatherer)
        if waste > self._max_waste_bytes:
            raise SourceError(
                f"{self._source.name} ignores byte ranges: {gatherer.wanted_bytes} bytes are "
                f"missing, and {waste} more would be read and dropped. Allow that with "
                f"`max_waste_bytes={waste}`, or publish it on a server that knows ranges."
            )

    @contextmanager
    def _last_report(self) -> Iterator[None]:
        """Where the block ends early, tell what stays: chunks that are begun do not."""
        try:
            yield
        except BaseException:
            self._begun.clear()
            self._report(at_once=True)
            raise

    def _report(self, *, at_once: bool = False) -> None:
        """Tell how far it is, at most ten times a second, in the thread that asked for it."""
        if self._progress is None or threading.get_ident() != self._owner:
            return
        now_s = time.monotonic()
        if not at_once and now_s - self._reported_s < REPORT_S:
            return
        self._reported_s = now_s
        total = self._header.prefix_bytes(self._bit_width)
        begun_bytes = sum(gatherer.held_bytes for gatherer in list(self._begun.values()))
        first = self._filling.first_missing
        self._progress(
            Progress(
                # Other threads go on meanwhile: a chunk may be counted as begun and as written.
                bytes_done=min(total, max(0, total - self._filling.missing_bytes + begun_bytes)),
                bytes_total=total,
                layer=self._header.layer_index(self._bit_width) if first is None else first.layer,
                received_bytes=self._meter.read().received_bytes,
            )
        )


class _StoppedError(Exception):
    """Another thread has failed, or the download was interrupted."""


class _IgnoredError(Exception):
    """The source ignores ranges."""
