"""inspect and verify: the same of a file, of a split artifact, of a source and of a URL."""

import subprocess
import sys
from dataclasses import asdict

import pytest
from artifact.builders import build
from delivery.servers import head_of, hostile, plain_server, raw_server

import plyweight
from plyweight.artifact import Header, MemorySource, split
from plyweight.delivery import open_remote
from plyweight.errors import (
    ArtifactError,
    SourceError,
    TransferError,
    TruncatedError,
    TrustError,
)

WITHOUT_HTTP = """
import sys
sys.modules["httpx2"] = None
import plyweight
plyweight.inspect(sys.argv[1]), plyweight.verify(sys.argv[1])
print("plyweight.delivery" in sys.modules)
try: plyweight.inspect("https://models.example/net")
except ImportError as error: print(error)
"""


@pytest.fixture
def path(tmp_path):
    build(tmp_path / "tiny.layered.safetensors")
    return tmp_path / "tiny.layered.safetensors"


@pytest.fixture
def data(path):
    return path.read_bytes()


def without_transfer(receipt):
    return {name: value for name, value in asdict(receipt).items() if name != "transfer"}


def test_whatever_names_an_artifact_on_this_machine_is_inspected_and_verified(path, data, tmp_path):
    receipt, layers = plyweight.inspect(path), Header.parse(data).layers
    split(path, tmp_path / "parts")
    for source in (
        str(path),
        MemorySource(data),
        tmp_path / "parts",
        str(tmp_path / "parts" / "layers.json"),
    ):
        assert plyweight.inspect(source) == receipt
        assert plyweight.verify(source) == layers


def test_what_is_inspected_can_be_pinned(path, data):
    receipt = plyweight.inspect(path)
    with hostile(data) as server:
        for address in (path, server.url):
            pinned = plyweight.inspect(address, artifact_id=receipt.artifact_id)
            assert pinned.artifact_id == receipt.artifact_id
            with pytest.raises(TrustError, match="was asked for"):
                plyweight.inspect(address, artifact_id="0" * 64)


def test_inspect_of_a_url_is_the_receipt_of_the_file_and_what_was_moved(path, data, tmp_path):
    receipt = plyweight.inspect(path)
    with hostile(data, token="t0ken") as server:
        with pytest.raises(SourceError, match="wants a token"):
            plyweight.inspect(server.url)
        far = plyweight.inspect(server.url, token="t0ken")
    assert without_transfer(far) == asdict(receipt)
    assert far.transfer.requests == 1
    moved = {"requests": 1, "received_bytes": far.transfer.received_bytes}
    assert far.to_json() == receipt.to_json() | moved | {"seconds": far.transfer.seconds}
    split(path, tmp_path / "parts")
    with plain_server(tmp_path) as server:
        far = plyweight.inspect(f"{server.url}/parts/layers.json")
    assert without_transfer(far) == asdict(receipt)


def test_a_source_that_is_given_stays_open(path, data):
    with hostile(data) as server:
        source = open_remote(server.url)
        for _ in range(2):
            assert plyweight.inspect(source).held == plyweight.inspect(path).held
        source.close()


def test_what_is_held_at_a_url_is_what_lies_inside_its_size(data):
    header = Header.parse(data)
    with hostile(data[: header.prefix_bytes(3)]) as server:
        assert plyweight.inspect(server.url).held == (2, 3)
    where = f"Content-Range: bytes 0-{len(data) - 1}/*"  # of any size
    with raw_server(head_of(206, where, f"Content-Length: {len(data)}") + data) as url:
        assert plyweight.inspect(url).held == (2, 3, 8)


def test_a_file_at_a_url_that_is_shorter_or_longer_than_its_header_says_is_refused(data):
    header = Header.parse(data)
    for size in (header.data_start + 1, header.prefix_bytes(3) - 1, len(data) - 1):
        with (
            hostile(data[:size]) as server,
            pytest.raises(TruncatedError, match=rf"^{server.url}: it ends at byte {size}, inside"),
        ):
            plyweight.inspect(server.url)
    with (
        hostile(data + b"x") as server,
        pytest.raises(ArtifactError, match=f"^{server.url}: it has {len(data) + 1} bytes, but"),
    ):
        plyweight.inspect(server.url)


def test_a_url_that_may_not_be_used_or_does_not_answer_is_refused(data):
    with pytest.raises(SourceError, match="allow_http"):
        plyweight.inspect("http://models.example/net")
    with hostile(data, refuse=503) as server, pytest.raises(TransferError, match=r"for 0.2 s"):
        plyweight.inspect(server.url, patience_s=0.2)


def test_verify_of_a_url_says_what_verifies_it_without_its_query():
    with pytest.raises(
        SourceError, match=r"is a URL.*`plyweight\.fetch`, which verifies"
    ) as caught:
        plyweight.verify("https://models.example/net?X-Amz-Signature=secret")
    assert "secret" not in str(caught.value)


def test_a_file_needs_neither_httpx2_nor_what_moves_bytes(path):
    command = [sys.executable, "-c", WITHOUT_HTTP, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, message = done.stdout.splitlines()
    assert imported == "False"
    assert message.endswith('run: pip install "plyweight[http]"')
