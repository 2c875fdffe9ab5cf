"""Remote sources: one request for a range of bytes, one reply, judged before it is believed.

    https://  http://     delivery.http     any web server or CDN
    s3:// gs:// az://     delivery.store    object stores, by obstore
    hf://                 delivery.hub      the Hugging Face Hub
    .../layers.json       delivery.parts    any of these, one file for each layer
    a path, a Source      LocalSource       files and memory

A source makes one attempt and says exactly what came of it. It never tries again and never judges
the bytes: :mod:`plyweight.delivery.client` does the first, the digests of the header the second.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from plyweight.artifact import ByteRange, FileSource, Source, open_source
from plyweight.artifact.opening import is_url
from plyweight.artifact.sidecar import SIDECAR_FILE
from plyweight.errors import SourceError, TransferError

__all__ = [
    "LocalSource",
    "RemoteSource",
    "Reply",
    "open_file",
    "open_remote",
    "read_small",
]

PIECE_BYTES = 2**20  # of a local body, so that nothing large is held at once


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    Attributes:
        byte_range: of the bytes that ``body`` gives: as asked; or shorter, from the same start; or
            all of the object, or of that file of it, where the server ignores ranges.
        total_bytes: of the whole object; None where the server does not say.
        identity: what changes when the object does (a strong ETag, a version); None if unknown.
        body: the bytes in order, in pieces of at most a few MiB. It raises ``TransferError`` if
            they end early, and stops at the end of ``byte_range`` if there are more.
        has_ranges: whether it shows that the server knows ranges: one that ignores them may send
            as much as was asked for because its file has no more.
    """

    byte_range: ByteRange
    total_bytes: int | None
    identity: str | None
    body: Iterator[bytes | bytearray | memoryview]
    has_ranges: bool = True


@runtime_checkable
class RemoteSource(Protocol):
    """An object somewhere else. It may be asked from several threads at once."""

    @property
    def name(self) -> str:
        """What a message and a reference call it: its URL, without anything secret."""
        ...

    def get(
        self, byte_range: ByteRange, *, identity: str | None = None
    ) -> AbstractContextManager[Reply]:
        """Ask once for ``byte_range``; the reply is valid inside the ``with`` block.

        Args:
            byte_range: not empty. One that ends after the object is answered shorter.
            identity: of an earlier reply, whose object it must still be.

        Raises:
            TransferError: If another attempt may succeed: no connection, a time-out, an
                overloaded server, a reply that does not say what it holds.
            StaleError: If the object is not the one of ``identity``, or ends before the range.
            SourceError: If there is no such object, it is refused, or its address is.
        """
        ...

    def close(self) -> None:
        """Give back connections; the source may not be used afterwards."""
        ...


class LocalSource:
    """A source of bytes on this machine, as a remote one."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """That of the source it reads."""
        return self._source.name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Bytes of the file as it was when it was opened."""
        size = self._source.size()
        yield Reply(
            inside := ByteRange(byte_range.start, min(byte_range.stop, size)),
            total_bytes=size,
            identity=identity,
            body=self._pieces(inside),
        )

    def close(self) -> None:
        """Nothing is held but the source, which is its owner's."""

    def _pieces(self, byte_range: ByteRange) -> Iterator[bytearray]:
        for start in range(byte_range.start, byte_range.stop, PIECE_BYTES):
            yield self._source.read(ByteRange(start, min(start + PIECE_BYTES, byte_range.stop)))


def open_remote(
    address: str | os.PathLike[str] | Source | RemoteSource,
    *,
    token: str | None = None,
    allow_http: bool = False,
) -> RemoteSource:
    """The source of that address; nothing is asked yet.

    Args:
        address: a URL, a path, or a source itself.
        token: sent as a bearer token to the host of ``address`` and to no other.
        allow_http: allow ``http://``, where anybody on the way can read and change bytes (the
            digests show a change, but only if the artifact's id or signature is known), and can
            read the token, which is sent in clear.

    Raises:
        SourceError: If there is no source for that address, or it may not be used.
        ImportError: If what the source needs is not installed.
    """
    if isinstance(address, RemoteSource):
        return address
    if not is_url(address):
        return LocalSource(open_source(address))
    if address.partition("?")[0].endswith(f"/{SIDECAR_FILE}"):
        from plyweight.delivery.parts import PartsSource

        return PartsSource(
            address, lambda file: open_file(file, token=token, allow_http=allow_http)
        )
    return open_file(address, token=token, allow_http=allow_http)


def open_file(address: str, *, token: str | None = None, allow_http: bool = False) -> RemoteSource:
    """The source of one file, whatever it holds: of a ``layers.json``, its own bytes.

    Args:
        address: a URL or a path.
        token: as :func:`open_remote` takes it.
        allow_http: as :func:`open_remote` takes it.

    Raises:
        SourceError: If there is no source for that address, or it may not be used.
        ImportError: If what the source needs is not installed.
    """
    if not is_url(address):
        return LocalSource(FileSource(address))
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        from plyweight.delivery.http import HttpSource

        return HttpSource(address, token=token, allow_http=allow_http)
    if scheme in ("s3", "gs", "az"):
        from plyweight.delivery.store import StoreSource

        return StoreSource(address)
    if scheme == "hf":
        from plyweight.delivery.hub import hub_source

        return hub_source(address, token=token, allow_http=allow_http)
    raise SourceError(  # without the address, which may hold secrets
        f"the address has the scheme {scheme!r}; https, http, s3, gs, az and hf are known, and "
        "plain paths."
    )


def read_small(source: RemoteSource, most_bytes: int) -> bytes:
    """All of a small file, in as many replies as it comes in.

    Raises:
        TransferError: If another attempt may succeed.
        StaleError: If it changes meanwhile.
        SourceError: If it has more than ``most_bytes``, or the source refuses.
    """
    data, identity = bytearray(), None
    while True:
        before = len(data)
        with source.get(ByteRange(before, most_bytes + 1), identity=identity) as reply:
            position = reply.byte_range.start
            for piece in reply.body:
                data += piece[max(0, len(data) - position) :]
                position += len(piece)
                if len(data) > most_bytes:
                    raise SourceError(
                        f"{source.name} has more than the {most_bytes} bytes that a sidecar or "
                        "signature may have; check the address."
                    )
            total, identity = reply.total_bytes, reply.identity
        if total is None or len(data) >= total:
            return bytes(data)
        if len(data) == before:
            raise TransferError(f"{source.name} sent {before} of {total} bytes and then none.")
