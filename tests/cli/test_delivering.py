"""fetch, serve, cached, evict: from a folder to a device and back off it, by hand."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from artifact.builders import MODEL, big_content, build, layer_contents
from cli.calls import assert_called_wrongly, assert_one_sentence, run, run_json
from delivery.servers import NAME, hostile, plain_server
from delivery.signers import id_of, keys, signed

from plyweight import delivery
from plyweight.artifact import Header, ModelInfo, split, write_artifact
from plyweight.delivery import fetch
from plyweight.delivery.server import FolderServer

CHUNK_BYTES = 64 * 2**10  # of the big artifact


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("delivering") / "tiny")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    path = tmp_path_factory.mktemp("delivering") / "big"
    write_artifact(path, **big_content(shape=(4096, 2048)))
    return path.read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PLYWEIGHT_TOKEN", raising=False)


# --- fetch: where to, how much -----------------------------------------------------------------


def test_fetch_fills_the_cache_and_the_second_time_moves_nothing(capsys, data, tmp_path):
    with hostile(data) as server:
        call = ("fetch", server.url, "-b", 3, "--id", id_of(data))
        first = run_json(capsys, *call)
        second = run_json(capsys, *call)
        code, out, err = run(capsys, *call)
    assert first["requests"] == 1
    assert first["received_bytes"] <= len(data)
    assert second["requests"] == second["received_bytes"] == 0
    for shown in (first, second):
        assert shown["bit_width"] == 3
        assert shown["reason"] == "3 bits, as asked"
        assert shown["artifact_id"] == id_of(data)
        assert shown["path"] is None
        assert shown["cache"] == str(tmp_path / "cache")
        assert shown["held"] == [2, 3]
        assert shown["total_bytes"] == Header.parse(data).prefix_bytes(3)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{tmp_path}/cache  3 bits, as asked  0 B moved in 0.\d\d s\n", out)


def test_fetch_to_a_file_writes_the_prefix_and_extends_it(capsys, data, tmp_path):
    path = tmp_path / "net.layered.safetensors"
    with hostile(data) as server:
        call = ("fetch", server.url, "--to", path, "--id", id_of(data))
        shown = run_json(capsys, *call, "-b", 2)
        assert path.read_bytes() == data[: Header.parse(data).prefix_bytes(2)]
        code, out, _ = run(capsys, *call)
    assert (shown["path"], shown["cache"]) == (str(path), None)
    assert code == 0
    assert out.startswith(f"{path}  8 bits, the widest there is  ")
    assert path.read_bytes() == data


def test_fetch_mends_what_is_here_if_it_is_told_to(capsys, data, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(data[:-1] + b"x")
    with hostile(data) as server:
        call = ("fetch", server.url, "--to", path, "--id", id_of(data))
        assert run_json(capsys, *call)["requests"] == 0
        assert run_json(capsys, *call, "--verify")["held"] == [2, 3, 8]
    assert path.read_bytes() == data


def test_fetch_takes_the_widest_that_fits_and_says_why(capsys, data):
    three = Header.parse(data).prefix_bytes(3)
    with hostile(data) as server:
        call = ("fetch", server.url, "--id", id_of(data))
        _, out, _ = run(capsys, *call, "--max-bytes", f"{three / 1000}kB")
        assert "3 bits, the widest that fits: 8 need" in out
        assert f"(max_bytes {three:,})" in out
        assert run_json(capsys, *call, "--max-ram", "1GB")["bit_width"] == 8
        assert run_json(capsys, *call, "--deadline", 60)["bit_width"] == 8
        result = run(capsys, *call, "--max-bytes", "10")
    assert_one_sentence(result, "not even 2 bits of tiny fit")


def test_fetch_of_what_there_is_not_is_one_sentence(capsys, data, tmp_path):
    with hostile(data) as server:
        call = ("fetch", server.url, "--id", id_of(data))
        assert_one_sentence(run(capsys, *call, "-b", 4), "4 bits were asked for")
        result = run(capsys, "fetch", server.url, "--id", "0" * 64)
        assert_one_sentence(result, "0" * 64)
    assert_one_sentence(run(capsys, "fetch", tmp_path / "none"), "does not exist")
    assert_one_sentence(run(capsys, "fetch", "ftp://example.org/x"), "the scheme 'ftp'")
    assert_one_sentence(run(capsys, "fetch", "http://example.org/x"), "with --allow-http")
    with hostile(data, refuse=503) as server:
        result = run(capsys, "fetch", server.url, "--patience", "0.2")
    assert_one_sentence(result, "nothing arrived for 0.2 s")


def test_a_server_without_ranges_costs_waste_that_is_asked_for(capsys, big, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(big)
    with plain_server(tmp_path / "served") as server:
        call = ("fetch", f"{server.url}/{NAME}", "--id", id_of(big))
        assert run(capsys, *call, "-b", 2)[0] == 0
        result = run(capsys, *call, "--max-waste", "1kB")
        assert_one_sentence(result, "ignores byte ranges", "--max-waste ")
        waste = re.search(r"--max-waste (\d+)", result[2])[1]
        shown = run_json(capsys, *call, "--max-waste", waste)
    assert (shown["held"], shown["wasted_bytes"]) == ([2, 3], int(waste))


def test_a_split_artifact_is_fetched_by_its_sidecar(capsys, data, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "whole").write_bytes(data)
    split(tmp_path / "whole", tmp_path / "served" / "net")
    with plain_server(tmp_path / "served") as server:
        address = f"{server.url}/net/layers.json"
        shown = run_json(capsys, "fetch", address, "-b", 3, "--id", id_of(data))
    assert shown["held"] == [2, 3]


def test_wrong_calls_of_fetch_end_with_2_and_ask_nobody(capsys, data):
    with hostile(data) as server:
        for options, word in (
            (("-b", 9), "--bit-width"),
            (("-b", 0), "--bit-width"),
            (("-b", 4, "--max-bytes", "3MB"), "--bit-width and --max-bytes exclude each other"),
            (("-b", 4, "--max-ram", "3MB"), "--bit-width and --max-ram exclude each other"),
            (("-b", 4, "--deadline", "3"), "--bit-width and --deadline exclude each other"),
            (("--max-bytes", "-3MB"), "is no size"),
            (("--max-bytes", "3mb"), "is no size"),
            (("--max-ram", "0"), "0 bytes"),
            (("--deadline", "-1"), "give seconds"),
            (("--parallel", "0"), "--parallel"),
            (("--id", "abc"), "64 hexadecimal digits"),
            (("--public-key", "a", "--authority", "b"), "exclude each other"),
            (("--sidecar", "a"), "--sidecar needs"),
            (("--token", "secret"), "--token"),
        ):
            assert_called_wrongly(run(capsys, "fetch", server.url, *options), word)
    assert server.requests == []


# --- fetch: whom to believe --------------------------------------------------------------------


def test_trust_on_first_use_is_one_line_on_stderr_and_only_once(capsys, data):
    with hostile(data) as server:
        code, out, err = run(capsys, "fetch", server.url, "--json")
        assert (code, out.count("\n"), err.count("\n")) == (0, 1, 1)
        assert out.startswith("{")
        assert err.startswith(f"plyweight: {server.url} is trusted on first use")
        assert f"{id_of(data)} is the one" in err
        assert "Pin it with --id, or verify a signature with --public-key." in err
        assert run(capsys, "fetch", server.url)[2] == ""


def test_a_signature_is_verified_before_anything_is_fetched(capsys, data, tmp_path):
    pytest.importorskip("model_signing")
    served, elsewhere = tmp_path / "served", tmp_path / "elsewhere"
    for folder in (served, elsewhere):
        folder.mkdir()
    private, public = keys(tmp_path)
    _, other = keys(elsewhere)
    name = signed(served, data, private)
    with plain_server(served) as server, plain_server(elsewhere) as second:
        call = ("fetch", f"{server.url}/{name}", "--public-key")
        assert_one_sentence(run(capsys, *call, other), "is no signature of")
        assert run(capsys, *call, public)[2] == ""
        for path in served.glob("*.json*"):
            path.rename(elsewhere / path.name)
        sidecar = f"{second.url}/{name}.layers.json"
        assert run_json(capsys, *call, public, "--sidecar", sidecar)["bit_width"] == 8


def test_an_older_revision_is_refused_unless_it_is_allowed(capsys, data, tmp_path):
    newer = ModelInfo(MODEL.name, MODEL.revision + 1, MODEL.created_by, MODEL.license)
    new = build(tmp_path / "new", model=newer, layers=layer_contents(seed=5))
    with hostile(new, "swapped", other=data, after=1) as server:
        run(capsys, "fetch", server.url)
        result = run(capsys, "fetch", server.url, "--refresh")
        assert_one_sentence(result, "revision 3", "--allow-rollback")
        shown = run_json(capsys, "fetch", server.url, "--refresh", "--allow-rollback")
    assert shown["artifact_id"] == id_of(data)


def test_the_token_comes_from_the_environment_and_is_shown_nowhere(capsys, data, monkeypatch):
    with hostile(data, token="open-sesame") as server:
        assert_one_sentence(run(capsys, "inspect", server.url), "401")
        assert_one_sentence(run(capsys, "fetch", server.url), "401")
        monkeypatch.setenv("PLYWEIGHT_TOKEN", "open-sesame")
        for command in ("inspect", "fetch"):
            code, out, err = run(capsys, command, server.url)
            assert code == 0
            assert "open-sesame" not in out + err


# --- fetch: interrupted ------------------------------------------------------------------------


def interrupted(*arguments, when):
    """Call it in another process, press Ctrl-C once ``when()`` is true; its answer."""
    command = [sys.executable, "-m", "plyweight", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until_s = time.monotonic() + 60
        while not when():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until_s
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
@pytest.mark.parametrize("place", ["file", "cache"])
def test_ctrl_c_leaves_what_is_here_and_says_so_and_the_next_call_goes_on(
    capsys, big, tmp_path, place
):
    path = tmp_path / "net.layered.safetensors"
    with hostile(big, pace_s=0.03) as server:
        call = ("fetch", server.url, "--id", id_of(big), *(("--to", path) * (place == "file")))
        code, out, err = interrupted(*call, when=lambda: server.sent > len(big) / 2)
        assert (code, out) == (130, "")
        said = re.fullmatch(
            r"plyweight: interrupted; ([\d,]+) of ([\d,]+) bytes are here, run it again to "
            r"continue\.\n",
            err,
        )
        done, total = (int(number.replace(",", "")) for number in said.groups())
        assert total == len(big)
        assert not path.exists()
        server.options.pace_s = 0
        resumed = run_json(capsys, *call)
        again = run_json(capsys, *call)
    in_flight = 4 * CHUNK_BYTES
    assert 0 < done < total
    assert resumed["received_bytes"] - resumed["wasted_bytes"] <= total - done + in_flight
    assert resumed["held"] == [2, 3]
    assert again["requests"] == again["received_bytes"] == 0
    if place == "file":
        assert path.read_bytes() == big


def test_ctrl_c_before_anything_arrived_says_that(capsys, data, monkeypatch):
    def press(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(delivery, "fetch", press)
    code, out, err = run(capsys, "fetch", "https://example.org/x", "--json")
    assert (code, out) == (130, "")
    assert err == (
        "plyweight: interrupted; what had arrived before is still here, run it again to continue.\n"
    )


# --- fetch: the bar ----------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_bar_with_rate_and_time_left(big):
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with hostile(big, pace_s=0.01) as server:
        command = [sys.executable, "-m", "plyweight", "fetch", server.url, "--id", id_of(big)]
        with subprocess.Popen(
            [*command, "--json"], stdout=subprocess.PIPE, stderr=theirs, env=environment
        ) as process:
            os.close(theirs)
            shown = b""
            while select.select([ours], [], [], 60)[0]:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # how Linux says that nobody writes to a terminal any more
                    break
                if not piece:
                    break
                shown += piece
            out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert out.count(b"\n") == 1
    text = shown.decode()
    assert "layer 0" in text
    assert "3.2/3.2 MB" in text
    assert re.search(r"[\d.]+ [kM]B/s", text)
    assert re.search(r"left .*0:00:0\d", text)


# --- serve -------------------------------------------------------------------------------------


@pytest.fixture
def folder(data, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / NAME).write_bytes(data)
    split(folder / NAME, folder / "net")
    for name in ("notes.txt", ".hidden.safetensors"):
        (folder / name).write_text("not for you")
    return folder


def test_serve_prints_what_to_fetch_and_a_line_for_each_request(
    capsys, folder, data, tmp_path, monkeypatch
):
    fetched = []

    def wait(server):
        fetched.append(fetch(f"{server.url}/{NAME}", bit_width=3, artifact_id=id_of(data)))
        fetched.append(fetch(f"{server.url}/net/layers.json", artifact_id=id_of(data)))
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderServer, "wait", wait)
    code, out, err = run(capsys, "serve", folder, "--port", 0)
    assert code == 0
    base = out.partition(f"/{NAME}")[0]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", base)
    assert out == f"{base}/{NAME}\n{base}/net/layers.json\n"
    assert [one.bit_width for one in fetched] == [3, 8]
    first, *log = err.splitlines()
    assert first.startswith("plyweight: any object store, CDN or static server")
    assert log[0] == f'127.0.0.1 "GET /{NAME} HTTP/1.1" 206 -'
    assert all(re.search(r'"GET /\S+ HTTP/1.1" \d{3}', line) for line in log)


def test_serve_warns_where_others_can_read(capsys, folder, tmp_path, monkeypatch):
    def wait(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderServer, "wait", wait)
    code, out, err = run(capsys, "serve", folder, "--port", 0, "--host", "0.0.0.0")
    assert code == 0
    assert f"anybody who reaches {out.partition(f'/{NAME}')[0]} can read" in err
    for host in ("127.0.0.1", "localhost"):
        assert "anybody" not in run(capsys, "serve", folder, "--port", 0, "--host", host)[2]
    shown = run_json(capsys, "serve", folder, "--port", 0)
    assert shown["artifacts"] == [f"{shown['url']}/{NAME}", f"{shown['url']}/net/layers.json"]
    (tmp_path / "empty").mkdir()
    assert "no artifact in it yet" in run(capsys, "serve", tmp_path / "empty", "--port", 0)[1]


def test_serve_refuses_what_is_no_folder_and_a_port_that_is_taken(capsys, folder, tmp_path):
    assert_one_sentence(run(capsys, "serve", tmp_path / "none"), "is not a folder")
    with FolderServer(folder) as server:
        port = server.url.rpartition(":")[2]
        result = run(capsys, "serve", folder, "--port", port)
    assert_one_sentence(result, f"port {port} at 127.0.0.1 cannot be listened at")
    assert_called_wrongly(run(capsys, "serve", folder, "--port", 70000), "--port")


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_ends_serve_with_0(folder, data):
    command = [sys.executable, "-m", "plyweight", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().strip()
        assert fetch(address, bit_width=2, artifact_id=id_of(data)).bit_width == 2
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert f'"GET /{NAME} HTTP/1.1" 206 -' in err


# --- cached and evict --------------------------------------------------------------------------


def test_the_cache_is_listed_and_evicted_by_address_or_id(capsys, data, tmp_path):
    header = Header.parse(data)
    cache = tmp_path / "own"
    with hostile(data) as server:
        run(capsys, "fetch", server.url, "--cache", cache)
        shown = run_json(capsys, "cached", "--cache", cache)
        assert shown["folder"] == str(cache)
        assert shown["num_bytes"] >= len(data)
        assert shown["artifacts"] == [
            {
                "artifact_id": header.artifact_id,
                "model": "tiny",
                "revision": 3,
                "bit_widths": [2, 3, 8],
                "num_bytes": len(data),
            }
        ]
        freed = run_json(capsys, "evict", server.url, "--keep", 3, "--cache", cache)
        assert freed == {"freed_bytes": len(data) - header.prefix_bytes(3)}
        code, out, _ = run(capsys, "cached", "--cache", cache)
        assert code == 0
        size = f"{header.prefix_bytes(3) / 1000:.2f}"
        line = out.splitlines()[1].split()
        assert line == ["tiny", "3", "2,", "3", size, "kB", header.artifact_id]
    code, out, _ = run(capsys, "evict", f"sha256:{header.artifact_id}", "--cache", cache)
    assert (code, out.endswith(" freed\n")) == (0, True)
    code, out, _ = run(capsys, "cached", "--cache", cache)
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith(f"{cache} takes ")


def test_evict_refuses_what_was_never_fetched(capsys, data):
    assert_one_sentence(run(capsys, "evict", "http://127.0.0.1:9/x"), "was never fetched")
    assert_one_sentence(run(capsys, "evict", "resnet"), "64 hexadecimal digits")
    assert_one_sentence(run(capsys, "evict", "0" * 64), "0" * 64, "holds nothing", "cached")
    assert_called_wrongly(run(capsys, "evict", "resnet", "--keep", 9), "--keep")
    with hostile(data) as server:
        run(capsys, "fetch", server.url)
        result = run(capsys, "evict", server.url, "--keep", 4)
    assert_one_sentence(result, "4 bits were asked for")


def test_a_cache_that_is_not_there_yet_is_empty(capsys, tmp_path):
    shown = run_json(capsys, "cached")
    assert shown == {"folder": str(tmp_path / "cache"), "num_bytes": 0, "artifacts": []}
