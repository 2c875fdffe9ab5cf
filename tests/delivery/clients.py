"""Clients in processes of their own, of real servers behind a relay: what tests of deaths share.

with clients(path) as start:                    forks of one process that has imported all
    client = start(address, folder, kind)
    client.kill()   or   client.wait()          its exit status
    client.outcome                              if it was not killed: what it moved, what is wrong

with SERVERS["nginx"](path) as server:          serves the artifact at that path
    with relay(server.port) as between:
        server.address(between), server.env(between)
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from delivery.fakes import CHUNK
from delivery.servers import NAME, hostile, nginx, odd, plain_server, s3

import plyweight

PARALLEL, FIRST = 4, 32 * 2**10  # as in killed.py
# What is tested is what this process has imported, which need not be what is installed.
PLACES = [Path(__file__).parents[1], Path(plyweight.__file__).parents[1]]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, PLACES)), "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Client:
    """One download, under way."""

    def __init__(self, forks, folder, order):
        self.folder = folder
        self._forks = forks
        self._say(json.dumps(order))

    def kill(self):
        return self._end("kill")

    def wait(self):
        return self._end("wait")

    @property
    def outcome(self):
        return json.loads(self.folder.with_suffix(".json").read_text())

    def _end(self, how):
        self._say(how)
        return int(self._forks.stdout.readline())

    def _say(self, line):
        self._forks.stdin.write(f"{line}\n")
        self._forks.stdin.flush()


@contextlib.contextmanager
def clients(path):
    """A function that starts clients of the artifact at ``path``, one after the other."""
    command = [sys.executable, Path(__file__).with_name("killed.py"), "orders", path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as forks:

        def start(address, folder, kind, *, request_bytes=CHUNK, env=None):
            folder.mkdir(exist_ok=True)
            order = {"address": address, "folder": str(folder), "kind": kind}
            return Client(forks, folder, order | {"request_bytes": request_bytes, "env": env or {}})

        yield start
        forks.stdin.close()
    assert forks.returncode == 0


@dataclass
class Server:
    """One that serves the artifact, and how clients get to it through a relay.

    Attributes:
        port: that it listens on.
        path: of the artifact in its URL, or all of its address.
        has_ranges: whether it sends what is asked for and no more.
        itself: with ``kill`` and ``restart``.
        variables: of the environment of its clients.
    """

    port: int
    path: str
    itself: object
    has_ranges: bool = True
    variables: dict = field(default_factory=dict)

    def address(self, between):
        return self.path if "://" in self.path else f"{between.url}/{self.path}"

    def env(self, between):
        return self.variables and self.variables | {"AWS_ENDPOINT_URL": between.url}


@contextlib.contextmanager
def _nginx(path, **options):
    with nginx(path.parent, **options) as server:
        yield Server(server.port, path.name, server)


@contextlib.contextmanager
def _s3(path):
    with s3({path.name: path.read_bytes()}) as store:
        yield Server(store.port, f"{store.url}/{path.name}", store, variables=store.env)


@contextlib.contextmanager
def _without_ranges(path):
    with plain_server(path.parent) as server:
        yield Server(server.port, path.name, server, has_ranges=False)


@contextlib.contextmanager
def _hostile(path, mode):
    with hostile(path.read_bytes(), mode, when=odd, retry_after=None) as server:
        yield Server(server.port, NAME, server)


SERVERS = {
    "nginx": _nginx,
    # Each reply takes a sixteenth of a second, so that several are always under way.
    "nginx-slow-gzip": lambda path: _nginx(path, gzip=True, rate="1m"),
    "s3": _s3,
    "http.server": _without_ranges,
    # Every second reply breaks off, is shorter than asked, or is none; nothing is sent in vain.
    "hostile-cut": lambda path: _hostile(path, "cut"),
    "hostile-short": lambda path: _hostile(path, "short"),
    "hostile-busy": lambda path: _hostile(path, "busy"),
}
