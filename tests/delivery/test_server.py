"""The folder server: what a client of ranges needs, and nothing that is not an artifact."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest

from plyweight.artifact import ByteRange
from plyweight.delivery import server as server_module
from plyweight.delivery.http import HttpSource
from plyweight.delivery.server import FolderServer, serve
from plyweight.errors import SourceError, StaleError

DATA = np.random.default_rng(8).bytes(100_000)
NAME = "net.layered.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Artifacts, one of them in a folder, and much that is none of anybody's business."""
    root = tmp_path / "served"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / NAME).write_bytes(DATA)
    (root / "deep" / "er" / "with space & <b>.safetensors").write_bytes(DATA[:10])
    (root / "layers.json").write_bytes(b"{}")
    (root / "layers.json.sig").write_bytes(b"signature")
    for name in ("header.bin", "layer-0.bin", "layer-12.bin"):
        (root / name).write_bytes(b"x")
    secrets = ("notes.txt", "id_rsa", "key.pem", "mail.sig", "model.pickle", "data.bin")
    for name in (*secrets, ".hidden.safetensors"):
        (root / name).write_bytes(b"secret")
    (root / ".git" / "net.safetensors").write_bytes(b"secret")
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    return root


@pytest.fixture
def server(folder):
    with FolderServer(folder) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx2.Client(base_url=server.url, headers={"Accept-Encoding": "identity"}) as client:
        yield client


def get(client, name=NAME, method="GET", **headers):
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    return client.request(method, f"/{name}", headers=names)


# --- bytes --------------------------------------------------------------------------------------


def test_our_own_source_reads_from_it_range_by_range(server, folder):
    source = HttpSource(f"{server.url}/{NAME}")
    ranges = [ByteRange(start, start + 7_000) for start in range(0, 100_000, 7_000)]

    def read(wanted):
        with source.get(wanted) as reply:
            return reply.identity, b"".join(reply.body)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(read, ranges))
    assert b"".join(data for _, data in replies) == DATA
    assert len({identity for identity, _ in replies}) == 1
    new = folder / "new"
    new.write_bytes(DATA[::-1])
    new.replace(folder / NAME)  # as `publish_atomically` does
    with pytest.raises(StaleError), source.get(ranges[0], identity=replies[0][0]):
        pass
    source.close()


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ("bytes=0-0", "bytes 0-0/100000"),
        ("bytes=10-19", "bytes 10-19/100000"),
        ("bytes=99999-", "bytes 99999-99999/100000"),
        ("bytes=99990-200000", "bytes 99990-99999/100000"),
        ("bytes=-10", "bytes 99990-99999/100000"),
        ("bytes=-200000", "bytes 0-99999/100000"),
        ("Bytes=5-5", "bytes 5-5/100000"),
    ],
)
def test_a_range_is_answered_by_exactly_its_bytes(client, asked, where):
    reply = get(client, Range=asked)
    first, last = map(int, where.split()[1].split("/")[0].split("-"))
    assert reply.status_code == 206
    assert reply.headers["Content-Range"] == where
    assert reply.headers["Content-Length"] == str(last + 1 - first)
    assert reply.content == DATA[first : last + 1]


@pytest.mark.parametrize("asked", ["bytes=100000-", "bytes=100000-100001", "bytes=-0"])
def test_a_range_after_the_end_is_answered_416_with_the_size(client, asked):
    reply = get(client, Range=asked)
    assert reply.status_code == 416
    assert reply.headers["Content-Range"] == "bytes */100000"


@pytest.mark.parametrize(
    "asked",
    ["bytes=5-4", "bytes=-", "bytes=a-b", "lines=0-1", "bytes=0-1,5-6", "bytes=0", "0-1",
     "bytes=" + "9" * 4000 + "-", "bytes=٣-٤".encode()],
)  # fmt: skip
def test_a_range_that_makes_no_sense_and_several_are_answered_by_the_whole(client, asked):
    reply = get(client, Range=asked)
    assert reply.status_code == 200
    assert "Content-Range" not in reply.headers
    assert reply.content == DATA


def test_an_empty_file_has_no_ranges(client, folder):
    (folder / "empty.safetensors").write_bytes(b"")
    assert get(client, "empty.safetensors").content == b""
    reply = get(client, "empty.safetensors", Range="bytes=0-9")
    assert (reply.status_code, reply.headers["Content-Range"]) == (416, "bytes */0")


def test_head_says_what_get_would_and_sends_nothing(client):
    for asked in ({}, {"Range": "bytes=10-19"}, {"Range": "bytes=100000-"}):
        head, whole = get(client, method="HEAD", **asked), get(client, **asked)
        assert head.content == b""
        assert head.status_code == whole.status_code
        for name in ("Content-Length", "ETag", "Accept-Ranges", "Content-Range", "Last-Modified"):
            assert head.headers.get(name) == whole.headers.get(name)
    assert get(client, method="HEAD", Accept="*/*").headers["Accept-Ranges"] == "bytes"


# --- conditions ---------------------------------------------------------------------------------


def test_if_match_is_kept(client):
    etag = get(client, method="HEAD").headers["ETag"]
    assert etag.startswith('"')
    for stated, status in [
        (etag, 206),
        (f'"other", {etag}', 206),
        ("*", 206),
        ('"other"', 412),
        (f"W/{etag}", 412),  # weak ones never match strongly
    ]:
        assert get(client, Range="bytes=0-9", If_Match=stated).status_code == status


def test_if_range_gives_the_whole_where_the_file_is_another(client):
    etag = get(client, method="HEAD").headers["ETag"]
    assert get(client, Range="bytes=0-9", If_Range=etag).status_code == 206
    for other in ('"other"', f"W/{etag}", "Thu, 01 Jan 2026 00:00:00 GMT"):
        reply = get(client, Range="bytes=0-9", If_Range=other)
        assert (reply.status_code, reply.content) == (200, DATA)


def test_if_none_match_saves_the_bytes(client):
    etag = get(client, method="HEAD").headers["ETag"]
    for stated in (etag, f"W/{etag}", "*", f'"a", {etag}'):
        reply = get(client, If_None_Match=stated)
        assert (reply.status_code, reply.content) == (304, b"")
    assert get(client, If_None_Match='"other"').status_code == 200


def test_a_file_that_was_published_again_has_another_etag(client, folder):
    before = get(client, method="HEAD").headers["ETag"]
    status = (folder / NAME).stat()
    (folder / "new").write_bytes(DATA[::-1])
    os.utime(folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "new").replace(folder / NAME)  # of the same size and time
    assert get(client, method="HEAD").headers["ETag"] != before


# --- what is served -----------------------------------------------------------------------------


def test_the_list_shows_artifacts_and_nothing_else(client):
    reply = client.get("/")
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    links = [part.partition('"')[0] for part in reply.text.split('href="')[1:]]
    assert links == [
        "header.bin",
        "layer-0.bin",
        "layer-12.bin",
        "layers.json",
        "layers.json.sig",
        NAME,
        "deep/er/with%20space%20%26%20%3Cb%3E.safetensors",
    ]
    assert "<b>" not in reply.text
    for link in links:
        assert client.get(f"/{link}").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/notes.txt", "/id_rsa", "/key.pem", "/mail.sig", "/model.pickle", "/data.bin",
        "/.hidden.safetensors",
        "/.git/net.safetensors", "/deep", "/deep/", "/deep/er", "/none.safetensors",
        "/../outside.safetensors", "/%2e%2e/outside.safetensors", "/..%2foutside.safetensors",
        "/deep/../../outside.safetensors", "/deep/%2e%2e/%2e%2e/outside.safetensors",
        f"/./{NAME}", f"/deep/../{NAME}", f"/deep//{NAME}", f"/{NAME}/",
        "/..%5coutside.safetensors", "/C:/outside.safetensors", "/net.safetensors::$DATA",
        "/%00.safetensors", f"/{NAME}%00", "/%ff.safetensors", "/a/" * 500 + "x.safetensors",
        "/" + "x" * 5000 + ".safetensors", "nothing", "*", "http://other/notes.txt",
    ],
)  # fmt: skip
def test_everything_else_is_answered_as_if_it_did_not_exist(server, path):
    status, body = raw(server, path)
    assert status == 404
    assert body == b"404 Not Found\n"


@pytest.mark.parametrize(
    "path",
    [f"/{NAME}?x=1", f"/{NAME}#x", "/%6eet.layered.safetensors", f"//{NAME}", f"http://x/{NAME}"],
)
def test_the_same_file_by_other_spellings(server, path):
    assert raw(server, path) == (200, DATA)


@pytest.mark.skipif(os.name != "posix", reason="links need no permission there")
def test_links_that_lead_out_are_not_followed(server, client, folder):
    (folder / "out.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "way").symlink_to(folder.parent)
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "in.safetensors").symlink_to(folder / NAME)
    os.mkfifo(folder / "pipe.safetensors")  # opening it would wait for ever
    (folder / "folder.safetensors").mkdir()
    for name in ("out", "way/outside", "loop", "pipe", "folder"):
        assert client.get(f"/{name}.safetensors").status_code == 404
    assert client.get("/in.safetensors").content == DATA
    deep = "deep/er/with%20space%20%26%20%3Cb%3E.safetensors"
    names = ("in.safetensors", "layers.json", NAME, deep)
    assert server.addresses == [f"{server.url}/{name}" for name in names]
    listed = client.get("/").text
    assert "in.safetensors" in listed
    for name in ("out", "way", "loop", "pipe", "folder"):
        assert f"{name}.safetensors" not in listed.replace("in.safetensors", "")
        assert f"{name}/" not in listed


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(server, folder, method):
    status, _ = raw(server, f"/{NAME}", method=method)
    assert status == 501
    assert (folder / NAME).read_bytes() == DATA


def test_a_body_is_not_mistaken_for_the_next_request(server):
    smuggled = b"GET /notes.txt HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"GET /{NAME} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(smuggled)}\r\n\r\n"
    with socket.create_connection(address(server)) as connection:
        connection.sendall(head.encode() + smuggled)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in received


def test_requests_are_told_without_control_characters(folder):
    lines = []
    with FolderServer(folder, on_request=lines.append) as server:
        raw(server, f"/{NAME}")
        raw(server, "/\x1b[31m.safetensors")
    assert f'"GET /{NAME} HTTP/1.1" 200' in lines[0]
    assert "\x1b" not in lines[1]
    assert lines[1].startswith("127.0.0.1 ")


# --- running ------------------------------------------------------------------------------------


def test_a_large_file_is_never_in_memory(folder, client):
    with (folder / "large.safetensors").open("wb") as file:
        file.truncate(2**27)
    tracemalloc.start()
    with client.stream("GET", "/large.safetensors") as reply:
        received = sum(len(piece) for piece in reply.iter_raw())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert received == 2**27
    assert peak < 2**22


def test_a_file_that_is_cut_meanwhile_ends_the_connection_instead_of_waiting(folder):
    (folder / "cut.safetensors").write_bytes(bytes(2**25))
    with FolderServer(folder) as server, socket.create_connection(address(server)) as connection:
        connection.sendall(b"GET /cut.safetensors HTTP/1.1\r\nHost: x\r\n\r\n")
        received = len(connection.recv(1000))
        os.truncate(folder / "cut.safetensors", 2**24)
        while piece := connection.recv(2**20):
            received += len(piece)
        assert received < 2**25


def test_a_client_that_hangs_up_is_no_error(server, folder, capfd):
    (folder / "large.safetensors").write_bytes(bytes(2**24))
    for _ in range(3):
        with socket.create_connection(address(server)) as connection:
            connection.sendall(b"GET /large.safetensors HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.recv(1000)
    assert raw(server, f"/{NAME}") == (200, DATA)
    server.stop()  # waits for the threads
    assert capfd.readouterr() == ("", "")


def test_one_connection_too_many_is_told_to_come_back(folder, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    with FolderServer(folder) as server:
        held = [http.client.HTTPConnection(*address(server)) for _ in range(2)]
        for connection in held:
            connection.request("GET", f"/{NAME}")
            assert connection.getresponse().read() == DATA
        source = HttpSource(f"{server.url}/{NAME}")
        with pytest.raises(Exception, match="503") as caught, source.get(ByteRange(0, 1)):
            pass
        assert caught.value.retry_after_s == 1
        for connection in held:
            connection.close()
        source.close()


def test_it_stops_in_the_middle_of_a_transfer_and_starts_again_on_its_port(folder):
    (folder / "large.safetensors").write_bytes(bytes(2**25))
    server = FolderServer(folder).start()
    port = address(server)[1]
    with socket.create_connection(address(server)) as connection:
        connection.sendall(b"GET /large.safetensors HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1000)
        server.stop()
    server.wait()
    with FolderServer(folder, port=port) as again:
        assert raw(again, f"/{NAME}") == (200, DATA)


def test_serve_starts_and_the_block_stops(folder):
    with serve(folder, port=0) as server:
        assert raw(server, f"/{NAME}") == (200, DATA)
    with pytest.raises(OSError, match="refused"):
        raw(server, f"/{NAME}")


def test_a_port_that_is_taken_and_a_folder_that_is_none_are_refused(folder):
    with FolderServer(folder) as server, pytest.raises(SourceError, match="choose another one"):
        FolderServer(folder, port=address(server)[1])
    with pytest.raises(SourceError, match="is not a folder"):
        FolderServer(folder / NAME)
    with pytest.raises(SourceError, match="is not a folder"):
        FolderServer(folder / "none")


def test_its_url_names_the_machine_where_it_listens_everywhere(folder):
    with FolderServer(folder, host="0.0.0.0") as server:
        assert socket.gethostname() in server.url
        assert raw(server, f"/{NAME}")[0] == 200


def test_a_process_that_forgets_it_ends_all_the_same(folder):
    code = "import sys; from plyweight.delivery.server import serve; serve(sys.argv[1], port=0)"
    subprocess.run([sys.executable, "-c", code, os.fspath(folder)], check=True, timeout=60)


def test_no_thread_is_left(folder):
    before = set(threading.enumerate())
    with FolderServer(folder) as server:
        raw(server, f"/{NAME}")
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


def address(server):
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def raw(server, path, method="GET"):
    """Status and body for a path that is sent as it stands."""
    with socket.create_connection(address(server), timeout=30) as connection:
        line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(line.encode())
        reply = http.client.HTTPResponse(connection, method=method)
        reply.begin()
        return reply.status, reply.read()
