"""Server: the artifacts of a folder over HTTP, for a local network.

    with serve("models", host="0.0.0.0", port=8000) as server:
        print(server.url)       # fetch(f"{server.url}/net.layered.safetensors", bit_width=4)
        server.wait()

It answers what a client of ranges needs and nothing else: GET and HEAD, one range of bytes, strong
ETags with If-Match, If-None-Match and If-Range. Any object store or nginx does as well, and has
encryption and passwords besides, which this has not: whoever reaches the port reads the artifacts.

Only files that belong to artifacts are served and listed. Hidden files, links that lead out of the
folder and everything else in it are answered as if they did not exist.
"""

import html
import os
import re
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, BinaryIO, Self
from urllib.parse import quote, unquote, urlsplit

from plyweight.artifact import ByteRange
from plyweight.artifact.sidecar import SIDECAR_FILE
from plyweight.errors import SourceError

__all__ = ["FolderServer", "serve"]

# An artifact, what `split` makes of it, its sidecar and the signature of that. No .pem: it may as
# well be the private key that signed.
SERVED = re.compile(r".*\.safetensors|header\.bin|layer-\d+\.bin|.*layers\.json(?:\.sig)?")
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
IDLE_S = 60.0  # a connection that neither asks nor takes anything for so long is closed
MAX_CONNECTIONS = 256
MAX_LISTED = 10_000
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FolderServer:
    """Serves a folder from threads of this process, from :meth:`start` to :meth:`stop`.

    Args:
        folder: whose artifacts are served, those in its folders too.
        host: address to listen at; ``0.0.0.0`` for every network this machine is in.
        port: 0 for any that is free.
        on_request: called with a line for every request, from the thread that answers it.

    Raises:
        SourceError: If there is no such folder, or the port cannot be had.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_request: Callable[[str], None] | None = None,
    ) -> None:
        root = Path(folder).resolve()
        if not root.is_dir():
            raise SourceError(
                f"{os.fspath(folder)} is not a folder; give one that holds artifacts."
            )
        try:
            self._server = _Server(root, host, port, on_request)
        except OSError as error:
            raise SourceError(
                f"port {port} at {host} cannot be listened at ({error.strerror or error}); choose "
                "another one."
            ) from error
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens; by the name of this machine if that is everywhere."""
        host, port = self._server.server_address[:2]
        shown = str(host)
        if shown in ("0.0.0.0", "::"):
            shown = socket.gethostname()
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    @property
    def addresses(self) -> list[str]:
        """What to fetch: an address for every artifact that is there, in one file or split."""
        return [
            f"{self.url}/{quote(name)}"
            for name, _ in _listed(self._server.root)
            if name.endswith(".safetensors") or name.rpartition("/")[2] == SIDECAR_FILE
        ]

    def start(self) -> Self:
        """Answer requests, until :meth:`stop`."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()
        return self

    def wait(self) -> None:
        """Return when it was stopped."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """Close the port and every connection."""
        if self._thread is not None:
            self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def __enter__(self) -> Self:
        return self if self._thread is not None else self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


def serve(
    folder: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_request: Callable[[str], None] | None = None,
) -> FolderServer:
    """A server of ``folder`` that has started; use it as a context manager, or stop it."""
    return FolderServer(folder, host=host, port=port, on_request=on_request).start()


class _Server(ThreadingMixIn, TCPServer):
    """A thread for every connection, up to a number of them."""

    allow_reuse_address = os.name == "posix"  # Windows means something else by it
    daemon_threads = True  # a thread that waits for a slow client does not keep the process alive
    request_queue_size = 128

    def __init__(
        self, root: Path, host: str, port: int, on_request: Callable[[str], None] | None
    ) -> None:
        self.root, self.on_request = root, on_request
        self._live: set[socket.socket] = set()
        self._changed = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer the connection in a thread, or turn it away."""
        with self._changed:
            is_full = len(self._live) >= MAX_CONNECTIONS
            if not is_full:
                self._live.add(request)
        if is_full:
            with suppress(OSError):
                request.sendall(BUSY)
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, which :meth:`hang_up` waits for."""
        super().shutdown_request(request)
        with self._changed:
            self._live.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error; anything else is shown as the library does."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        """Close all connections, and wait for the threads that use them."""
        with self._changed:
            for connection in self._live:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._live, timeout=5)


class _Handler(BaseHTTPRequestHandler):
    """One connection: any number of requests, one after the other."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "plyweight", ""
    timeout = IDLE_S

    def _answer(self) -> None:
        """Answer a GET or a HEAD."""
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what follows is a body that nobody reads
        parts = _parts(self.path)
        if parts == ():
            return self._send_list()
        with self._opened(parts) as file:
            if file is None:
                return self._send_status(HTTPStatus.NOT_FOUND)
            return self._send_file(file)

    do_GET = do_HEAD = _answer  # noqa: N815 (the names that the library calls)

    def _send_file(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        size = status.st_size
        # Strong: artifacts are published by rename, so other bytes are another inode. Who writes
        # into a published file all the same also changes its time.
        etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{size:x}"'
        about = {
            "ETag": etag,
            "Last-Modified": formatdate(status.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        wanted, known = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if wanted is not None and not _names(wanted, etag):
            return self._send_status(HTTPStatus.PRECONDITION_FAILED, about)
        if known is not None and _names(known.replace("W/", ""), etag):
            self._send_head(HTTPStatus.NOT_MODIFIED, about)
            return None
        asked = None
        if self.headers.get("If-Range", etag) == etag:
            asked = _range(self.headers.get("Range", ""), size)
        if asked is None:
            return self._send_bytes(HTTPStatus.OK, about, file, ByteRange(0, size))
        if not asked.num_bytes:
            return self._send_status(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                about | {"Content-Range": f"bytes */{size}"},
            )
        about["Content-Range"] = f"bytes {asked.start}-{asked.stop - 1}/{size}"
        return self._send_bytes(HTTPStatus.PARTIAL_CONTENT, about, file, asked)

    def _send_bytes(
        self, status: HTTPStatus, about: dict[str, str], file: BinaryIO, part: ByteRange
    ) -> None:
        about["Content-Type"] = "application/octet-stream"
        about["Content-Length"] = str(part.num_bytes)
        self._send_head(status, about)
        if self.command == "HEAD" or not part.num_bytes:
            return
        self.wfile.flush()
        # The kernel copies from file to socket, where it can; nothing is held in memory.
        sent = self.connection.sendfile(file, part.start, part.num_bytes)
        if sent < part.num_bytes:  # the file was cut meanwhile; the client must not wait for more
            self.close_connection = True

    def _send_list(self) -> None:
        items = "".join(
            f'<li><a href="{quote(name)}">{html.escape(name)}</a> {size} bytes</li>\n'
            for name, size in _listed(self.server.root)
        )
        self._send_text(
            HTTPStatus.OK, f"<!doctype html><title>Artifacts</title><ul>\n{items}</ul>\n"
        )

    def _send_status(self, status: HTTPStatus, about: dict[str, str] | None = None) -> None:
        self._send_text(status, f"{status.value} {status.phrase}\n", about)

    def _send_text(
        self, status: HTTPStatus, text: str, about: dict[str, str] | None = None
    ) -> None:
        body = text.encode()
        kind = "text/html" if text.startswith("<") else "text/plain"
        head = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        self._send_head(status, (about or {}) | head)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: HTTPStatus, about: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in about.items():
            self.send_header(name, value)
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    @contextmanager
    def _opened(self, parts: tuple[str, ...] | None) -> Iterator[BinaryIO | None]:
        """The file of that path, if it is one that is served."""
        path = None if parts is None else _inside(self.server.root, parts)
        if path is None:
            yield None
            return
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
        except OSError:
            yield None
            return
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            yield file if stat.S_ISREG(os.fstat(descriptor).st_mode) else None

    def log_message(self, format: str, *args: object) -> None:
        """A line for every request, to whoever asked for them."""
        if self.server.on_request is not None:
            # Control characters in a path would reach a terminal.
            line = "".join(c if c.isprintable() else "?" for c in format % args)
            self.server.on_request(f"{self.address_string()} {line}")


def _parts(target: str) -> tuple[str, ...] | None:
    """The folders and the file of a request; None if nothing is served by such a path."""
    try:
        path = unquote(urlsplit(target).path, errors="strict")
    except ValueError:
        return None
    if not path.startswith("/"):
        return None
    parts = tuple(path[1:].split("/")) if path != "/" else ()
    # "", "." and "..", hidden files, and what Windows takes for a separator, a drive or a stream.
    if any(not part or part[0] == "." or not {"\\", ":", "\0"}.isdisjoint(part) for part in parts):
        return None
    return parts


def _inside(root: Path, parts: tuple[str, ...]) -> Path | None:
    """The real path of an artifact's file under ``root``; None if it is none, or leads out."""
    if not SERVED.fullmatch(parts[-1]):
        return None
    try:
        path = root.joinpath(*parts).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # absent, too long, a loop of links
        return None
    return path if path.is_relative_to(root) and path.is_file() else None


def _listed(root: Path) -> list[tuple[str, int]]:
    """Name and size of every file that is served, in order."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            relative = (Path(folder) / name).relative_to(root)
            path = None if name.startswith(".") else _inside(root, relative.parts)
            if path is not None:
                with suppress(OSError):  # gone since
                    found.append((relative.as_posix(), path.stat().st_size))
            if len(found) == MAX_LISTED:
                return found
    return found


def _range(stated: str, size: int) -> ByteRange | None:
    """The one range that was asked for, cut to the file; None if all of it is to be sent.

    That is so without a range, with one that makes no sense, and with several. A range that lies
    behind the end is empty.
    """
    match = RANGE.fullmatch(stated)
    if match is None or match[1] == match[2] == "":
        return None
    if not match[1]:  # the last so many bytes
        return ByteRange(max(0, size - int(match[2])), size)
    start = int(match[1])
    stop = int(match[2]) + 1 if match[2] else size
    if match[2] and stop <= start:
        return None
    return ByteRange(start, max(start, min(stop, size)))


def _names(stated: str, etag: str) -> bool:
    """Whether a list of ETags, or the star for any, holds this one."""
    return stated.strip() == "*" or etag in (item.strip() for item in stated.split(","))
