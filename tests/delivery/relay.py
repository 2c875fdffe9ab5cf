"""A relay between clients and a server: it counts the bytes of bodies, and stops after so many.

    with relay(port) as between:                 between.url leads to the server on that port
        between.hold_after(100_000)              that many bytes go on, and not one more
        between.wait_until_held()                now whoever waits for the next one can be killed
        between.hang_up()                        on everybody: what is held is dropped, not counted
        between.release()
        between.sent, .replies, .refused         bytes and replies that went on; calls that the
                                                 server refused

So a client or a server dies at a byte that a test draws, however fast the machine is, and what is
counted is what any server has sent, also one that keeps no log.
"""

import contextlib
import re
import socket
import socketserver
import threading
import time
from pathlib import Path

PIECE = 8192  # bytes that go on at once: what a kill may find between two sockets
PATIENCE_S = 120.0  # for what happens at once on a machine that is not very busy
SOCKETS = Path("/proc/net/tcp")  # proc(5) has the columns


class _HungUpError(Exception):
    """The relay was told to drop this connection."""


class _Connection(socketserver.BaseRequestHandler):
    """One client, and its own connection to the server."""

    def handle(self):
        relay, self.is_dropped, self.server_side = self.server.relay, False, None
        try:
            self.server_side = socket.create_connection(("127.0.0.1", relay.port))
        except OSError:
            relay.note_refusal()
            return
        asking = threading.Thread(target=self._ask)
        with self.server_side, contextlib.suppress(OSError, _HungUpError), relay.keeping(self):
            asking.start()
            try:
                self._answer(relay)
            finally:
                self.end()
                asking.join()

    def end(self):
        """Let nobody wait for more on either side."""
        for side in (self.request, self.server_side):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _ask(self):
        with contextlib.suppress(OSError):
            while data := self.request.recv(PIECE):
                self.server_side.sendall(data)
        self.end()  # a client that has hung up wants nothing more

    def _answer(self, relay):
        with self.server_side.makefile("rb") as reply:
            while head := _head(reply):
                relay.note_reply()
                self.request.sendall(head)
                length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
                left = int(length[1]) if length else float("inf")
                while left and (piece := reply.read1(min(left, PIECE))):
                    left -= len(piece)
                    relay.hand_on(piece, self)
                if left:
                    return  # it ended before it had sent what it promised, or had promised nothing


def _head(reply):
    """The head of the next reply, with the empty line that ends it; nothing if there is none."""
    lines = [reply.readline()]
    while lines[-1] not in (b"\r\n", b""):
        lines.append(reply.readline())
    return b"".join(lines)


def _ports_with_bytes_left(server_port):
    """Of clients of that port, those with bytes that they have not read."""
    ports = set()
    for line in SOCKETS.read_text().splitlines()[1:] if SOCKETS.exists() else ():
        _, local, remote, _, queues, *_ = line.split()
        if int(remote.split(":")[1], 16) == server_port and int(queues.split(":")[1], 16):
            ports.add(int(local.split(":")[1], 16))
    return ports


class Relay:
    """Counts and holds what a server sends."""

    def __init__(self, port):
        self.port, self.sent, self.replies, self.refused = port, 0, 0, 0
        self._limit, self._live, self._is_closing = float("inf"), set(), False
        self._changed = threading.Condition()
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Connection)
        self._server.relay, self._server.daemon_threads = self, False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def hold_after(self, num_bytes):
        """Let so many bytes go on, counted from the first one ever, and then none."""
        with self._changed:
            self._limit = num_bytes

    def wait_until_held(self):
        self._wait(lambda: self.sent >= self._limit)

    def wait_until_read(self):
        """Until clients have taken all that went on out of their sockets; on Linux only."""
        with self._changed:
            ports = {connection.client_address[1] for connection in self._live}
        until_s = time.monotonic() + PATIENCE_S
        while ports & _ports_with_bytes_left(self._server.server_address[1]):
            assert time.monotonic() < until_s, "a client does not read"
            time.sleep(0.001)

    def wait_until_refused(self):
        """Until somebody asks while the server is down."""
        self._wait(lambda: self.refused)

    def hang_up(self):
        """Drop all connections, and what they hold."""
        with self._changed:
            dropped = list(self._live)
            for connection in dropped:
                connection.is_dropped = True
            self._changed.notify_all()
        for connection in dropped:
            connection.end()

    def release(self):
        self.hold_after(float("inf"))
        with self._changed:
            self._changed.notify_all()

    def close(self):
        self._server.shutdown()
        with self._changed:
            self._is_closing = True
        self.hang_up()
        self._server.server_close()
        self._thread.join()

    # --- for connections ---

    @contextlib.contextmanager
    def keeping(self, connection):
        with self._changed:
            if self._is_closing:
                raise _HungUpError
            self._live.add(connection)
        try:
            yield
        finally:
            with self._changed:
                self._live.discard(connection)

    def note_reply(self):
        with self._changed:
            self.replies += 1

    def note_refusal(self):
        with self._changed:
            self.refused += 1
            self._changed.notify_all()

    def hand_on(self, piece, connection):
        """Send a piece as soon, and as far, as it is allowed."""
        while piece:
            with self._changed:
                self._changed.wait_for(lambda: connection.is_dropped or self.sent < self._limit)
                if connection.is_dropped:
                    raise _HungUpError
                now = piece[: int(min(len(piece), self._limit - self.sent))]
                self.sent += len(now)
                self._changed.notify_all()
            connection.request.sendall(now)
            piece = piece[len(now) :]

    def _wait(self, reached):
        with self._changed:
            assert self._changed.wait_for(reached, PATIENCE_S), f"{self.sent} bytes went on"


@contextlib.contextmanager
def relay(port):
    between = Relay(port)
    try:
        yield between
    finally:
        between.close()
