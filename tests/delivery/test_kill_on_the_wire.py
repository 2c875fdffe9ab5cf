"""Clients of real servers, of which either dies at any byte: the download goes on from there."""

import random
import signal
import time

import pytest
from delivery.clients import FIRST, PARALLEL, SERVERS, clients
from delivery.fakes import CHUNK, artifact
from delivery.relay import relay

POINTS = {  # 50 of them
    "nginx": 8,
    "nginx-slow-gzip": 8,
    "s3": 10,
    "http.server": 9,
    "hostile-cut": 5,
    "hostile-short": 5,
    "hostile-busy": 5,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """An artifact of 33 chunks, of which the base layer has 17."""
    path = tmp_path_factory.mktemp("published") / "net"
    artifact(path, shape=(2048, 2048))
    return path


@pytest.fixture(scope="module")
def start(path):
    with clients(path) as start:
        yield start


def deaths(name, count, size):
    """Bytes to die after, one in each of ``count`` equal pieces of the file; what to draw from.

    So they are spread over all of it, however fast it is sent.
    """
    seed = random.SystemRandom().randrange(10**6)
    print(f"{name}, seed {seed}")
    draw = random.Random(seed)
    for number in range(count):
        yield 1 + int((number + draw.random()) / count * (size - 1)), draw


def check_killed_clients(name, count, start, path, folder):
    size = path.stat().st_size
    with SERVERS[name](path) as server:
        for point, draw in deaths(name, count, size):
            check_killed_client(server, point, draw, size, start, folder / f"{name}-{point}")


def check_killed_client(server, point, draw, size, start, folder):
    kind, request_bytes = draw.choice(["cache", "file"]), draw.choice([CHUNK, 2 * CHUNK])
    with relay(server.port) as between:
        options = {"request_bytes": request_bytes, "env": server.env(between)}
        between.hold_after(point)
        client = start(server.address(between), folder, kind, **options)
        between.wait_until_held()
        if draw.random() < 0.7:  # else what was sent is still in a socket, and is lost
            between.wait_until_read()
            time.sleep(draw.random() / 50)  # and is written or not, which must not matter
        assert client.kill() == -signal.SIGKILL
        between.hang_up()
        replies = between.replies
        between.release()
        client = start(server.address(between), folder, kind, **options)
        assert client.wait() == 0
    outcome = client.outcome
    print(f"{point} of {size} in {kind}, {between.sent - size} twice: {outcome}")
    assert outcome["wrong"] == ""
    if server.has_ranges:
        assert between.sent - size <= PARALLEL * request_bytes + FIRST
    else:  # one reply is read from byte 0, after at most two that have shown how the server is
        assert outcome["received_bytes"] <= size
        assert outcome["wasted_bytes"] <= point
        assert between.replies - replies <= 3


@pytest.mark.parametrize("name", POINTS)
def test_a_client_of_a_real_server_is_killed_and_goes_on(name, start, path, tmp_path):  # row_17
    check_killed_clients(name, 1, start, path, tmp_path)


@pytest.mark.slow
def test_50_clients_of_real_servers_are_killed_at_random_bytes(start, path, tmp_path):  # row_17
    assert sum(POINTS.values()) == 50
    for name, count in POINTS.items():
        check_killed_clients(name, count, start, path, tmp_path)


def check_killed_server(server, point, draw, size, start, folder):
    kind = draw.choice(["cache", "file"])
    with relay(server.port) as between:
        between.hold_after(point)
        client = start(server.address(between), folder, kind, env=server.env(between))
        between.wait_until_held()
        server.itself.kill()
        between.hang_up()
        between.release()
        between.wait_until_refused()
        server.itself.restart()
        assert client.wait() == 0
    outcome = client.outcome
    print(f"{point} of {size} in {kind}, {between.sent - size} twice: {outcome}")
    assert outcome["wrong"] == ""
    assert outcome["retries"] >= 1
    if server.has_ranges:  # each reply goes on where the last one broke off
        assert outcome["received_bytes"] == size
        assert between.sent - size <= PARALLEL * CHUNK + FIRST
    else:  # the next one is read from byte 0
        assert outcome["wasted_bytes"] <= point
        assert between.sent - size <= point


@pytest.mark.parametrize(
    "count", [1, pytest.param(8, marks=pytest.mark.slow)], ids=["once", "often"]
)
@pytest.mark.parametrize("name", ["nginx", "nginx-slow-gzip", "http.server"])
def test_a_real_server_is_killed_and_started_again(name, count, start, path, tmp_path):  # row_17
    size = path.stat().st_size
    with SERVERS[name](path) as server:
        for point, draw in deaths(name, count, size):
            check_killed_server(server, point, draw, size, start, tmp_path / str(point))
