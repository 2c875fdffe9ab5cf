"""A remote source in this process that keeps a log and fails as it is told.

source = FakeSource(data)                 an honest one
source.before = function                  called with the source and the number of the request
source.data, source.identity = ...        what it has from now on; identity None: no ETag
source.ranges = False                     everything from byte 0, whatever was asked
source.replies[3] = lambda data, r: ...   other bytes for request number 3
source.log                                [(ByteRange asked, identity asked)]
source.sent                               bytes that were handed out
"""

import contextlib
import json
import threading

from artifact.builders import big_content, table_of, with_table

from plyweight.artifact import ByteRange, Header, write_artifact
from plyweight.delivery.cache import Cache
from plyweight.delivery.client import download
from plyweight.delivery.source import LocalSource, Reply
from plyweight.errors import StaleError, TransferError

NAME = "https://models.example/tiny"
CHUNK = 64 * 2**10


class FakeSource:
    def __init__(self, data, *, identity='"v1"', name=NAME, piece=16 * 2**10):
        self.data, self.identity, self.name, self.piece = bytes(data), identity, name, piece
        self.ranges, self.before, self.replies, self.log, self.sent = True, None, {}, [], 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def get(self, byte_range, *, identity=None):
        with self._lock:
            number = len(self.log)
            self.log.append((byte_range, identity))
        if self.before:
            self.before(self, number)
        if identity is not None and self.identity not in (None, identity):
            raise StaleError(f"{self.name} changed.")
        size = len(self.data)
        if byte_range.start >= size:
            raise StaleError(f"{self.name} ends before {byte_range}.")
        got = ByteRange(byte_range.start, min(byte_range.stop, size))
        got = got if self.ranges else ByteRange(0, size)
        body = self.data[got.start : got.stop]
        if number in self.replies:
            body = self.replies[number](body, got)
        yield Reply(got, size, self.identity, self._pieces(body))

    def _pieces(self, body):
        for start in range(0, len(body), self.piece):
            piece = body[start : start + self.piece]
            with self._lock:
                self.sent += len(piece)
            yield piece

    def close(self):
        pass


def artifact(path, bit_widths=(2, 3, 4), *, shape=(1024, 1024), **changes):
    """An artifact whose base layer has five chunks and the others two; its bytes and header."""
    write_artifact(path, **big_content(shape, bit_widths) | changes)
    data = path.read_bytes()
    return data, Header.parse(data)


def fetch(source, into, bit_width=4, **options):
    """``download`` of a fixed bit-width; a cache remembers names."""
    if isinstance(into, Cache) and not isinstance(source, LocalSource):
        options.setdefault("refs", into.refs)
    return download(source, choose=lambda header: bit_width, into=into, **options)


def fail_from(number, first):
    """For ``before``: the line goes down at request ``first``."""
    if number >= first:
        raise TransferError("the line is down")


def flipped(data, position, bit=0):
    data = bytearray(data)
    data[position] ^= 1 << bit
    return bytes(data)


def with_layers(data, change):
    """The artifact with ``change`` applied to the list of its layers in the header."""
    table, _ = table_of(data)
    layers = json.loads(table["__metadata__"]["layered.layers"])
    change(layers)
    table["__metadata__"]["layered.layers"] = json.dumps(layers)
    return with_table(data, table, alignment=4096)


def prefix(data, header, bit_width):
    return data[: header.prefix_bytes(bit_width)]


def read_all(source):
    """All bytes of an artifact source."""
    return bytes(source.read(ByteRange(0, source.size())))


def files_in(folder):
    """Names of all files under a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
