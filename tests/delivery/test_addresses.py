"""Every kind of address to the end: fetched, upgraded, and found again by another process."""

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest
from artifact.builders import big_content
from delivery.clients import ENVIRONMENT
from delivery.fakes import prefix, read_all
from delivery.relay import Relay, relay
from delivery.servers import environment, hub, nginx, plain_server, s3

from plyweight.artifact import Header, split, write_artifact
from plyweight.delivery.fetch import fetch

MIB = 2**20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """An artifact of 2 MiB at 2 bits, and 1 MiB for each of the two other bit-widths."""
    path = tmp_path_factory.mktemp("published") / "net.layered.safetensors"
    write_artifact(path, **big_content((2048, 4096), (2, 3, 4)))
    split(path, path.parent / "split")
    return path


@dataclass
class Published:
    """Where the artifact is, and what its server has been asked and has sent.

    Attributes:
        address: for clients.
        env: that they need.
        counted: by the server, or on the way to its clients.
    """

    address: str
    env: dict
    counted: Relay

    def moved(self):
        return self.counted.sent, self.counted.replies


class HubCounts:
    """Of a Hub and its CDN, as a relay counts."""

    def __init__(self, server):
        self.servers = server, server.cdn

    @property
    def sent(self):
        return self.servers[1].sent  # the others are names and places

    @property
    def replies(self):
        return sum(len(server.requests) for server in self.servers)


@contextlib.contextmanager
def on_a_web_server(path, serve=nginx, file=None):
    folder = path.parent / "split" if file else path.parent
    with serve(folder) as server, relay(server.port) as between:
        yield Published(f"{between.url}/{file or path.name}", {}, between)


@contextlib.contextmanager
def in_a_bucket(path):
    with s3({path.name: path.read_bytes()}) as store, relay(store.port) as between:
        env = store.env | {"AWS_ENDPOINT_URL": between.url}
        yield Published(f"{store.url}/{path.name}", env, between)


@contextlib.contextmanager
def on_the_hub(path):
    with hub({path.name: path.read_bytes()}) as server:
        yield Published(server.address(path.name), server.env, HubCounts(server))


PLACES = {
    "http": on_a_web_server,
    "s3": in_a_bucket,
    "hf": on_the_hub,
    "split": partial(on_a_web_server, file="layers.json"),
    "split without ranges": partial(on_a_web_server, serve=plain_server, file="layers.json"),
}


@pytest.fixture(params=PLACES)
def published(request, path):
    with PLACES[request.param](path) as published, environment(published.env):
        yield published


def test_an_address_is_fetched_and_upgraded_to_the_end(published, path, tmp_path):
    data = path.read_bytes()
    header = Header.parse(data)
    options = {"artifact_id": header.artifact_id, "cache": tmp_path / "cache"}

    def check(bit_width, most_bytes):
        before, _ = published.moved()
        got = fetch(published.address, bit_width=bit_width, **options)
        assert read_all(got.artifact) == prefix(data, header, bit_width)
        got.artifact.close()
        assert published.moved()[0] - before <= most_bytes

    check(2, header.prefix_bytes(2) + MIB)
    for bit_width, layer in zip((3, 4), header.layers[1:], strict=True):
        check(bit_width, layer.byte_range.num_bytes * 1.01)
    got = fetch(published.address, tmp_path / "net", **options)
    assert got.path.read_bytes() == data


def test_another_process_finds_all_in_the_cache_and_moves_nothing(published, path, tmp_path):
    header = Header.parse(path.read_bytes())
    cache = tmp_path / "cache"
    fetch(published.address, bit_width=3, artifact_id=header.artifact_id, cache=cache)
    sent, replies = published.moved()
    assert sent <= header.prefix_bytes(3) + MIB
    command = [sys.executable, "-m", "plyweight", "fetch", published.address, "--json"]
    done = subprocess.run(
        [*command, "-b", "3", "--cache", cache],
        env=ENVIRONMENT | published.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["held"] == [2, 3]
    assert said["requests"] == said["received_bytes"] == 0
    assert published.moved() == (sent, replies)
