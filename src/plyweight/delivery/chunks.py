"""Chunks: the unit that is asked for, verified, written and taken up again.

    missing chunks ──plan──► runs of neighbours ──a GET each──► bytes in order ──Gatherer──► chunks

A run is what one request asks for. Whatever the reply brings (all of it, less, or the whole file
from byte 0), the gatherer picks out the bytes it wants and drops the others, so every reply is
read in one way.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from plyweight.artifact import ByteRange, Header

__all__ = ["Chunk", "Gatherer", "chunks_of", "plan"]

REQUEST_BYTES = 8 * 2**20  # what object stores advise for one range; neighbours are merged up to it


@dataclass(frozen=True, order=True)
class Chunk:
    """A piece of a layer with a digest of its own.

    Attributes:
        byte_range: in the artifact, counted from its first byte.
        layer: whose piece it is.
        index: of the chunk in its layer.
        digest: 32 bytes.
    """

    byte_range: ByteRange
    layer: int
    index: int
    digest: bytes

    def __str__(self) -> str:
        return f"chunk {self.index} of layer {self.layer}"


def chunks_of(header: Header, layers: Iterable[int]) -> Iterator[Chunk]:
    """The chunks of some layers, in order."""
    for number in layers:
        layer = header.layers[number]
        for index, digest in enumerate(layer.chunk_digests):
            yield Chunk(layer.chunk_range(index), number, index, digest)


def plan(missing: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Cut the missing chunks, in order, into runs of neighbours of at most ``REQUEST_BYTES``."""
    run: list[Chunk] = []
    for chunk in missing:
        if run and (
            chunk.byte_range.start != run[-1].byte_range.stop
            or chunk.byte_range.stop - run[0].byte_range.start > REQUEST_BYTES
        ):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


class Gatherer:
    """Picks chunks out of bytes that arrive in order, and hashes them on the way.

    No more than one chunk is held, whoever sends however much.

    Attributes:
        rejected: chunks whose digest was another one, to be asked for again.

    Args:
        chunks: that are wanted, in order; there may be gaps between them.
        keep: takes a chunk and its bytes, which are valid during the call.
        reject: is told of a chunk whose digest was another one.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        *,
        keep: Callable[[Chunk, memoryview], None],
        reject: Callable[[Chunk], None],
    ) -> None:
        self.rejected: list[Chunk] = []
        self._chunks, self._next = chunks, 0
        self._keep, self._reject = keep, reject
        self._largest = max((chunk.byte_range.num_bytes for chunk in chunks), default=0)
        self._buffer = bytearray()  # until the first byte comes
        self._begin()

    @property
    def done(self) -> bool:
        """Whether every chunk was kept or rejected."""
        return self._next == len(self._chunks)

    @property
    def wanted(self) -> ByteRange:
        """From the next byte that is wanted to the last, gaps included; empty when done."""
        if self.done:
            return ByteRange(0, 0)
        start = self._chunks[self._next].byte_range.start + self.held_bytes
        return ByteRange(start, self._chunks[-1].byte_range.stop)

    @property
    def wanted_bytes(self) -> int:
        """How many bytes are still wanted, gaps not included."""
        return sum(c.byte_range.num_bytes for c in self._chunks[self._next :]) - self.held_bytes

    @property
    def rest(self) -> list[Chunk]:
        """The chunks that are not done, the one that is begun among them."""
        return list(self._chunks[self._next :])

    def handed_over(self, chunks: Sequence[Chunk]) -> "Gatherer":
        """A gatherer for ``chunks`` of this one, the first of which goes on where it is begun here.

        It takes the memory with it, so this one may not be used afterwards.
        """
        other = Gatherer((), keep=self._keep, reject=self._reject)
        other._chunks, other._largest = chunks, self._largest
        other._buffer, self._buffer = self._buffer, bytearray()
        other._hash, other.held_bytes = self._hash, self.held_bytes
        return other

    def feed(self, position: int, data: memoryview) -> int:
        """Take what is wanted of bytes that start at ``position``; how many were.

        Raises:
            ValueError: If bytes that are wanted were left out before ``position``.
        """
        taken = 0
        while not self.done and position + len(data) > self.wanted.start:
            data = data[self.wanted.start - position :] if position < self.wanted.start else data
            position = max(position, self.wanted.start)
            if position > self.wanted.start:
                raise ValueError(f"bytes before {position} were left out")
            chunk = self._chunks[self._next]
            piece = data[: chunk.byte_range.stop - position]
            self._buffer = self._buffer or bytearray(self._largest)
            self._buffer[self.held_bytes : self.held_bytes + len(piece)] = piece
            self._hash.update(piece)
            self.held_bytes += len(piece)
            taken += len(piece)
            position, data = position + len(piece), data[len(piece) :]
            if position == chunk.byte_range.stop:
                self._finish(chunk)
        return taken

    def _begin(self) -> None:
        self.held_bytes = 0  # of the chunk that is begun
        self._hash = hashlib.sha256()

    def _finish(self, chunk: Chunk) -> None:
        digest, size = self._hash.digest(), self.held_bytes
        self._next += 1
        self._begin()
        if digest == chunk.digest:
            self._keep(chunk, memoryview(self._buffer)[:size])
        else:
            self.rejected.append(chunk)
            self._reject(chunk)
