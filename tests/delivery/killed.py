"""Clients that die: a script which forks them, so that each costs no new interpreter.

    python killed.py points DATA FOLDER KIND SEED COUNT     each is killed at one step, then resumed
    python killed.py together DATA FOLDER KIND ROUNDS       four at once, without working locks
    python killed.py orders DATA                            one for each line of JSON on stdin

A step is a system call that changes the disk, or a piece of the body that arrives. A client is
killed before a step, after it, or, where it writes bytes, in the middle. Prints one JSON object for
each client: what was sent twice, and what is wrong; nothing of the parent's memory is relied on.

An order is {"address", "folder", "kind", "request_bytes", "env"}; after it comes "kill" or "wait",
and the exit status is printed. A client that was not killed leaves FOLDER.json behind.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from delivery.fakes import CHUNK, FakeSource, fetch, files_in, prefix, read_all

from plyweight.artifact import Header
from plyweight.delivery import chunks, opening, retry
from plyweight.delivery.cache import Cache
from plyweight.delivery.source import open_remote
from plyweight.delivery.standing import StandingFile

FIRST = 32 * 2**10
PARALLEL = 4
write = os.write  # which is no step
CALLS = ("open", "ftruncate", "pwrite", "write", "fchmod", "fsync", "replace", "unlink", "close")

opening.FIRST_BYTES, chunks.REQUEST_BYTES, retry.FIRST_S = FIRST, CHUNK, 0.0


class Logged(FakeSource):
    """Notes the length of each piece in a file before it is handed out."""

    def __init__(self, data, log, step=lambda: None):
        super().__init__(data, piece=8192)
        self.descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.step = step

    def _pieces(self, body):
        for piece in super()._pieces(body):
            write(self.descriptor, b"%d\n" % len(piece))
            self.step()
            yield piece


class Steps:
    """Counts the steps of this process, and kills it at one of them."""

    def __init__(self, fatal, how):
        self.count, self.fatal, self.how, self.lock = 0, fatal, how, threading.Lock()
        for name in CALLS:
            setattr(os, name, self.around(getattr(os, name), name))

    def around(self, call, name):
        def counted(*arguments, **options):
            with self.lock:
                self.count += 1
                is_fatal = self.count == self.fatal
            if is_fatal and self.how == "before":
                self.kill()
            if is_fatal and self.how == "torn" and name in ("pwrite", "write"):
                call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                self.kill()
            result = call(*arguments, **options)
            if is_fatal:
                self.kill()
            return result

        return counted

    def step(self):
        with self.lock:
            self.count += 1
            is_fatal = self.count == self.fatal
        if is_fatal:
            self.kill()

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # until it arrives


def destination(folder, kind):
    """Where the client puts it, and where it remembers names."""
    cache = Cache(folder / "cache")
    return (cache if kind == "cache" else StandingFile(folder / "file")), cache.refs


def forked(client):
    """Run ``client`` in a process of its own; its exit status."""
    child = os.fork()
    if not child:
        try:
            client()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def client(data, folder, kind, fatal, how):
    """One download that dies at step ``fatal``; how many steps there were, if it does not."""
    steps = Steps(fatal, how)
    into, refs = destination(folder, kind)
    source = Logged(data, folder / "log", steps.step)
    fetch(source, into, refs=refs, parallel=PARALLEL)
    (folder / "steps").write_text(str(steps.count))


def wrong(data, header, folder, kind):
    """What is not as it must be after a download; empty if all is well."""
    into, _ = destination(folder, kind)
    source = into.opened(header, 4)
    if source is None or read_all(source) != prefix(data, header, 4):
        return "the bytes"
    source.close()
    names = [name.split("/") for name in files_in(folder)]
    # A kill at the very end leaves its lock, which is empty and nobody's, to the next who locks;
    # one at the very beginning a header that had no name yet, to whoever evicts the artifact.
    own = ("log", "steps", "header", "file", "lock", "file.lock")
    left = [n for n in names if n[-1] not in own and not n[-1].startswith(".plyweight-")]
    left = [n for n in left if n[:2] != ["cache", "blobs"] and n[:2] != ["cache", "refs"]]
    blobs = [n[-1] for n in names if n[:3] == ["cache", "blobs", "sha256"]]
    if kind == "cache" and sorted(blobs) != sorted(layer.sha256 for layer in header.layers):
        return f"the blobs: {blobs}"
    return f"left behind: {left}" if left else ""


def points(data, header, folder, kind, seed, count):
    draw = random.Random(seed)
    run = folder / "whole"
    run.mkdir()
    assert wait(forked(lambda: client(data, run, kind, 0, "never"))) == 0
    total = int((run / "steps").read_text())
    for number in range(count):
        run = folder / str(number)
        run.mkdir()
        fatal, how = draw.randint(1, total), draw.choice(["before", "after", "torn"])
        status = wait(forked(lambda run=run, f=fatal, h=how: client(data, run, kind, f, h)))
        killed = sent(run)
        into, refs = destination(run, kind)
        got = fetch(Logged(data, run / "log"), into, refs=refs, parallel=PARALLEL)
        got.artifact.close()
        report(
            step=f"{fatal} of {total}, {how}",
            status=status,
            twice=sent(run) - len(data),
            allowed=PARALLEL * CHUNK + FIRST,
            killed=killed,
            wrong=wrong(data, header, run, kind),
        )
        shutil.rmtree(run)


def sent(run):
    return sum(map(int, (run / "log").read_text().split())) if (run / "log").exists() else 0


def together(data, header, folder, kind, rounds):
    fcntl.flock = lambda *arguments: None
    for number in range(rounds):
        run = folder / str(number)
        run.mkdir()

        def one(run=run):
            into, refs = destination(run, kind)
            while not (run / "go").exists():
                time.sleep(0.001)
            source = Logged(data, run / "log", lambda: time.sleep(random.random() / 1000))
            got = fetch(source, into, refs=refs, parallel=2)
            assert read_all(got.artifact) == data

        children = [forked(one) for _ in range(4)]
        (run / "go").touch()
        statuses = [wait(child) for child in children]
        (run / "go").unlink()
        report(status=statuses, wrong=wrong(data, header, run, kind))
        shutil.rmtree(run)


def orders(data, header):
    import httpx2  # noqa: F401 (once, before the forks)
    import obstore  # noqa: F401

    while line := sys.stdin.readline():
        order = json.loads(line)
        child = forked(lambda order=order: obey(data, header, order))
        if sys.stdin.readline() == "kill\n":
            os.kill(child, signal.SIGKILL)  # nobody else has its number before it was waited for
        print(wait(child), flush=True)


def obey(data, header, order):
    """A client of a real server."""
    os.environ.update(order["env"])
    chunks.REQUEST_BYTES, retry.FIRST_S = order["request_bytes"], 0.01
    folder = Path(order["folder"])
    into, refs = destination(folder, order["kind"])
    source = open_remote(order["address"])
    got = fetch(source, into, refs=refs, parallel=PARALLEL)
    got.artifact.close()
    outcome = asdict(got.transfer) | {"wrong": wrong(data, header, folder, order["kind"])}
    folder.with_suffix(".json").write_text(json.dumps(outcome))


def report(**fields):
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    what, path, *arguments = sys.argv[1:]
    data = Path(path).read_bytes()
    header = Header.parse(data)
    if what == "orders":
        orders(data, header)
    else:
        folder, kind, *numbers = arguments
        run = {"points": points, "together": together}[what]
        run(data, header, Path(folder), kind, *map(int, numbers))
