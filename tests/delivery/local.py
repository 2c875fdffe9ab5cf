"""A server in threads of this process that keeps a log and can be killed and restarted."""

import contextlib
import functools
import http.server
import os
import re
import socket
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

PIECE = 2**16  # bytes that go into a socket at once


@dataclass
class Request:
    """One request as the server saw it; header names are in lower case."""

    method: str
    path: str
    headers: dict
    status: int = 0
    sent: int = 0  # bytes of the body that went into the socket

    @property
    def range(self):
        return self.headers.get("range")


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them, and no test leaves one behind
    block_on_close = True
    request_queue_size = 64

    def __init__(self, port, handler, owner):
        self.owner, self.live, self.closing = owner, set(), threading.Event()
        super().__init__(("127.0.0.1", port), handler)

    def finish_request(self, request, client_address):
        with contextlib.suppress(OSError):  # a client that hangs up is what the tests are about
            if self.owner.tls:
                request = self.owner.tls.context.wrap_socket(request, server_side=True)
            self.live.add(request)
            try:
                if not self.closing.is_set():
                    self.RequestHandlerClass(request, client_address, self)
            finally:
                self.live.discard(request)
                request.close()


class LocalServer:
    """Serves with one handler class, keeps a log, can be killed and restarted on its port."""

    def __init__(self, handler, *, path="", tls=None, **options):
        self.handler, self.tls, self.requests = handler, tls, []
        self.lock, self.port, self._server = threading.Lock(), 0, None
        self.options = SimpleNamespace(**options)
        self.restart()
        self.base = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.url = self.base + path

    @property
    def sent(self):
        """Bytes of all bodies so far."""
        return sum(request.sent for request in self.requests)

    def restart(self):
        self._server = _Threads(self.port, self.handler, self)
        self.port = self._server.server_address[1]
        serve = functools.partial(self._server.serve_forever, poll_interval=0.01)
        self._thread = threading.Thread(target=serve)
        self._thread.start()

    def kill(self):
        """Close the port and every connection, in the middle of whatever they send."""
        server, self._server = self._server, None
        if server is None:
            return
        server.closing.set()
        server.shutdown()
        server.socket.close()
        for connection in list(server.live):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
        self._thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD by its method ``answer``, which begins with ``begin``."""

    protocol_version = "HTTP/1.1"

    def _answer(self):
        self.answer()

    do_GET = do_HEAD = _answer  # noqa: N815 (http.server asks for these names)

    def log_message(self, *arguments):
        """Quiet: the log is ``server.requests``."""

    def begin(self):
        """Log the request; the options of the server."""
        self.owner = self.server.owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.entry = Request(self.command, self.path, headers)
        with self.owner.lock:
            self.owner.requests.append(self.entry)
        return self.owner.options

    def reply(self, status, body=b"", *, length=None, **headers):
        """Send a reply; ``length=False`` leaves Content-Length out and closes afterwards."""
        self.entry.status = status
        self.send_response(status)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")  # object stores insist
        if length is False:
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = len(body) if length is None else length
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.send(body)

    def send(self, body):
        view = memoryview(body)
        for start in range(0, len(view), PIECE):
            self.pause(getattr(self.owner.options, "pace_s", 0))
            piece = view[start : start + PIECE]
            self.wfile.write(piece)
            self.entry.sent += len(piece)

    def pause(self, seconds):
        """Wait, but not longer than the server lives."""
        if seconds and self.server.closing.wait(seconds):
            raise ConnectionAbortedError

    def asked(self, size):
        """Start and stop of the range that was asked for; None if there is none."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.entry.range or "")
        if not match:
            return None
        last = int(match[2]) if match[2] else size - 1
        return int(match[1]), min(last + 1, size)

    def honest(self, data, etag, *, if_match=True):
        """What a good server answers."""
        wanted = self.headers.get("If-Match")
        if if_match and wanted and wanted != etag:
            return self.reply(412)
        asked = self.asked(len(data))
        if asked is None:
            return self.reply(200, data, ETag=etag, Accept_Ranges="bytes")
        start, stop = asked
        if start >= len(data):
            return self.reply(416, Content_Range=f"bytes */{len(data)}")
        where = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.reply(206, memoryview(data)[start:stop], ETag=etag, Content_Range=where)


@contextlib.contextmanager
def raw_server(reply):
    """The URL of a server that sends the same bytes to everybody who asks, and hangs up."""
    listener, closing = socket.create_server(("127.0.0.1", 0)), threading.Event()
    connections = []

    def serve():
        while True:
            connection, _ = listener.accept()
            connections.append(connection)
            with connection, contextlib.suppress(OSError):
                if closing.is_set():
                    return
                connection.recv(65536)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/raw"
    finally:
        closing.set()
        for connection in connections:  # a client may keep its end open for the next request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


def head_of(status, *lines):
    """The head of a reply, for a raw server."""
    return "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode()


@dataclass
class Certificate:
    """A certificate for 127.0.0.1 and localhost that signs itself."""

    path: str
    context: ssl.SSLContext = field(repr=False)


def certificate(folder):
    """Make one; its path is what ``SSL_CERT_FILE`` must say."""
    pytest.importorskip("cryptography")
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = Path(folder) / "localhost.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return Certificate(str(path), context)


@contextlib.contextmanager
def environment(changes):
    """The environment with these variables set."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def temporary_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process):
    """Return when ``process`` listens there."""
    for _ in range(2000):
        assert process.poll() is None, "the server ended at once"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.005)
    raise AssertionError(f"nothing listens on port {port}")
