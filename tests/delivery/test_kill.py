"""Clients that die at any step: what was verified stays, and it goes on from there."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from delivery.clients import ENVIRONMENT
from delivery.fakes import CHUNK, artifact, fetch, files_in, read_all
from delivery.local import Handler, LocalServer
from delivery.relay import relay
from delivery.servers import NAME, hostile

from plyweight.artifact import Header, LayeredWeight, ModelInfo
from plyweight.artifact.layout import Alignment, ByteRange
from plyweight.artifact.records import Layer, TensorEntry
from plyweight.delivery import opening
from plyweight.delivery.cache import Cache
from plyweight.delivery.source import open_remote

FIRST = 32 * 2**10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill") / "tiny"
    return *artifact(path), path


@pytest.fixture
def small_and_quick(monkeypatch):
    monkeypatch.setattr(opening, "FIRST_BYTES", FIRST)
    monkeypatch.setattr("plyweight.delivery.chunks.REQUEST_BYTES", CHUNK)
    monkeypatch.setattr("plyweight.delivery.retry.FIRST_S", 0.0)


def killed(*arguments):
    """The reports of ``killed.py``."""
    command = [sys.executable, Path(__file__).with_name("killed.py"), *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_points(reports, count):
    """Row 17: each was killed, resumed and right, and no more was sent twice than was in flight."""
    assert len(reports) == count
    assert {report["status"] for report in reports} <= {signal.SIGKILL * -1, 0}
    assert sum(report["status"] != 0 for report in reports) > count / 2  # the others were too short
    assert [report for report in reports if report["wrong"]] == []
    assert [report for report in reports if report["twice"] > report["allowed"]] == []


@pytest.mark.parametrize("kind", ["cache", "file"])
def test_a_client_killed_at_a_few_points_goes_on_from_there(tiny, tmp_path, kind):  # row_17
    check_points(killed("points", tiny[2], tmp_path, kind, 17, 6), 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cache", "file"])
def test_a_client_killed_at_50_random_points_goes_on_from_there(tiny, tmp_path, kind):  # row_17
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    check_points(killed("points", tiny[2], tmp_path, kind, seed, 50), 50)


@pytest.mark.parametrize("kind", ["cache", "file"])
def test_four_processes_without_working_locks_make_one_right_file(tiny, tmp_path, kind):  # row_18
    reports = killed("together", tiny[2], tmp_path, kind, 3)
    assert reports == [{"status": [0] * 4, "wrong": ""}] * 3


# --- Ctrl-C ---

CLIENT = """
import sys
from pathlib import Path
from delivery.fakes import CHUNK, fetch
from plyweight.delivery import chunks, opening
from plyweight.delivery.cache import Cache
from plyweight.delivery.source import open_remote

opening.FIRST_BYTES, chunks.REQUEST_BYTES = 32 * 2**10, CHUNK
source = open_remote(sys.argv[1])
fetch(source, Cache(sys.argv[2]), artifact_id=sys.argv[3])
"""


def test_ctrl_c_ends_a_client_in_a_state_to_go_on_from(tiny, tmp_path, small_and_quick):
    data, header, _ = tiny
    cache = Cache(tmp_path / "cache")
    with hostile(data) as server, relay(server.port) as between:
        address = f"{between.url}/{NAME}"
        between.hold_after(3 * CHUNK)
        command = [sys.executable, "-c", CLIENT, address, cache.folder, header.artifact_id]
        with subprocess.Popen(
            command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        ) as process:
            between.wait_until_held()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert error.rstrip().endswith("KeyboardInterrupt")
        assert process.returncode == -signal.SIGINT
        between.hang_up()
        between.release()
        source = open_remote(address)
        got = fetch(source, cache)
        source.close()
    assert read_all(got.artifact) == data
    assert between.sent <= len(data) + 4 * CHUNK + FIRST


# --- how much memory it takes ---

PLANE = 2**28  # bytes: 2^31 weights
BLOCK = bytes(random.Random(2).randbytes(2**20))


def layer(bit_width, start, num_bytes, chunk_bytes):
    """A layer of repeated blocks; its digests."""
    import hashlib

    whole, chunk, digests = hashlib.sha256(), hashlib.sha256(), []
    for position in range(0, num_bytes, len(BLOCK)):
        piece = BLOCK[: num_bytes - position]
        whole.update(piece)
        chunk.update(piece)
        if (position + len(piece)) % chunk_bytes == 0 or position + len(piece) == num_bytes:
            digests.append(chunk.digest())
            chunk = hashlib.sha256()
    stop = start + num_bytes
    kind = "plane" if start else "base"
    return Layer(
        kind, bit_width, ByteRange(start, stop), whole.hexdigest(), chunk_bytes, tuple(digests)
    )


def two_gibibytes(chunk_bytes):
    """The header of an artifact of 2 GiB, whose bytes nobody holds."""
    out, base = 2048, 2 * PLANE + 4 * 2048
    layers = (
        layer(2, 0, base, chunk_bytes),
        layer(8, base, 6 * PLANE, chunk_bytes),
    )
    tensors = (
        TensorEntry("L0/w.q", "U8", (2, PLANE), ByteRange(0, 2 * PLANE)),
        TensorEntry("L0/w.scale", "F32", (out,), ByteRange(2 * PLANE, base)),
        TensorEntry("L1/w.q", "U8", (6, PLANE), ByteRange(base, base + 6 * PLANE)),
    )
    header = Header(
        alignment=Alignment(4096, 64),
        model=ModelInfo("large", 0, "plyweight tests"),
        weights={"w": LayeredWeight((out, 8 * PLANE // out))},
        activations={},
        layers=layers,
        tensors=tensors,
    )
    raw = header.emit()
    return raw, Header.parse(raw)


class _Synthetic(Handler):
    def answer(self):
        options = self.begin()
        start, stop = self.asked(options.header.file_bytes)
        where = f"bytes {start}-{stop - 1}/{options.header.file_bytes}"
        self.reply(206, length=stop - start, Content_Range=where)
        while start < stop:
            piece = self.piece(options, start)[: stop - start]
            self.send(piece)
            start += len(piece)

    def piece(self, options, position):
        """Some bytes of the artifact from ``position``."""
        if position < len(options.raw):
            return options.raw[position:]
        for held in options.header.layers:
            if position < held.byte_range.stop:
                inside = (position - held.byte_range.start) % len(BLOCK)
                return BLOCK[inside:][: held.byte_range.stop - position]
        raise AssertionError(position)


PEAK = """
import sys
from delivery.fakes import fetch
from plyweight.delivery.cache import Cache
from plyweight.delivery.source import open_remote

source = open_remote(sys.argv[1])
got = fetch(source, Cache(sys.argv[2]), 8)
print(got.transfer)
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(int(lines["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chunk_mib", [8, 64])
def test_two_gibibytes_are_fetched_within_150_mb(tmp_path, chunk_mib):
    raw, header = two_gibibytes(chunk_mib * 2**20)
    server = LocalServer(_Synthetic, path="/large", raw=raw, header=header)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, server.url, tmp_path / "cache"],
            env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
    finally:
        server.kill()
    assert done.returncode == 0, done.stderr
    transfer, peak = done.stdout.splitlines()
    print(transfer, peak)
    assert int(peak) < 150e6
    assert server.sent <= header.file_bytes + 2**20
    blobs = [tmp_path / "cache" / "blobs" / "sha256" / x.sha256 for x in header.layers]
    assert [blob.stat().st_size for blob in blobs] == [
        x.byte_range.num_bytes for x in header.layers
    ]
    for name in files_in(tmp_path):
        (tmp_path / name).unlink()  # pytest would keep 2 GiB
