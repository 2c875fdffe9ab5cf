"""The Hub: one commit from the first byte to the last, and a token that stays there."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
from delivery.servers import environment, hostile, hub

from plyweight.artifact import ByteRange
from plyweight.delivery.hub import hub_source
from plyweight.delivery.source import RemoteSource, open_remote
from plyweight.errors import SourceError, TransferError

DATA = np.random.default_rng(7).bytes(50_000)
OTHER = DATA[::-1]
PATH = "nets/net one.layered.safetensors"
RANGE = ByteRange(1000, 21_000)
SLICE = DATA[RANGE.start : RANGE.stop]


@pytest.fixture
def open_source():
    """``hub_source``, closed when the test ends."""
    opened = []

    def make(address, **options):
        opened.append(hub_source(address, **options))
        return opened[-1]

    yield make
    for source in opened:
        source.close()


def read(source, byte_range=RANGE, **options):
    """The bytes that came back."""
    with source.get(byte_range, **options) as reply:
        assert reply.byte_range == byte_range
        return b"".join(reply.body)


@contextlib.contextmanager
def endpoint(mode="whole", data=b"", **options):
    """A hostile server in the place of the Hub."""
    with (
        hub({}),
        hostile(data, mode, **options) as server,
        environment({"HF_ENDPOINT": server.base}),
    ):
        yield server


def test_a_hub_address_is_a_remote_source_that_open_remote_finds():
    with hub({PATH: DATA}) as server:
        source = open_remote(server.address(PATH))
        assert isinstance(source, RemoteSource)
        assert source.name == f"hf://owner/model/{PATH}"
        assert server.requests == []  # nothing is asked before the first bytes are
        assert read(source) == SLICE
        source.close()


def test_every_request_reads_the_commit_of_the_first(open_source):
    with hub({PATH: DATA}) as server:
        source = open_source(server.address(PATH))
        with source.get(RANGE) as reply:
            identity = reply.identity
        server.push({PATH: OTHER})
        assert read(source, identity=identity) == SLICE
        assert read(open_source(server.address(PATH))) != SLICE
        asked = [request.path for request in server.requests if "/api/" in request.path]
        assert len(asked) == 2  # once for each source


def test_the_end_of_the_redirect_is_remembered(open_source):
    with hub({PATH: DATA}) as server:
        source = open_source(server.address(PATH))
        for _ in range(3):
            assert read(source) == SLICE
        assert [request.status for request in server.requests] == [200, 302]
        assert [request.status for request in server.cdn.requests] == [206] * 3


def test_a_branch_a_tag_a_pull_request_and_a_commit_are_revisions(open_source):
    with hub({PATH: OTHER}) as server:
        for revision in ("v1.0", "refs/pr/7", "feature/x"):
            commit = server.push({PATH: DATA}, branch=revision)
            written = revision.replace("feature/", "feature%2F")
            assert read(open_source(server.address(PATH, written))) == SLICE
        count = len(server.requests)
        assert read(open_source(server.address(PATH, commit))) == SLICE
        assert "/api/" not in server.requests[count].path  # a commit needs no question


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(open_source):
    with hub({PATH: DATA}, token="hf_t0ken") as server:
        assert read(open_source(server.address(PATH), token="hf_t0ken")) == SLICE
        sent = {request.headers.get("authorization") for request in server.requests}
        assert sent == {"Bearer hf_t0ken"}
        assert "authorization" not in server.cdn.requests[0].headers


def test_the_token_is_that_of_huggingface_hub_unless_it_is_told_to_keep_it(
    open_source, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_t0ken")
    with hub({PATH: DATA}, token="hf_t0ken") as server:
        with pytest.raises(SourceError):  # the fake sets HF_HUB_DISABLE_IMPLICIT_TOKEN
            read(open_source(server.address(PATH)))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        assert read(open_source(server.address(PATH))) == SLICE


def test_what_is_not_there_is_a_source_error_that_says_which_part_of_the_address(open_source):
    with hub({PATH: DATA}) as server:
        for address, message in [
            ("hf://owner/other/net", "shows no repository owner/other"),
            ("hf://owner/model@v9/net", "owner/model has no revision 'v9'"),
            ("hf://owner/model/net", r"answered 404 \(Not Found\): there is nothing there"),
            ("hf://ow ner/model/net", "does not name a repository"),
        ]:
            with pytest.raises(SourceError, match=message):
                read(open_source(address))
        assert server.cdn.requests == []


def test_a_private_repository_asks_for_a_token(open_source):
    with hub({PATH: DATA}, token="hf_t0ken") as server:
        for token in (None, "hf_wrong"):
            with pytest.raises(SourceError, match="give a token that may read it") as caught:
                read(open_source(server.address(PATH), token=token))
            assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner/model",
        "hf://owner/model/",
        "hf://owner//net",
        "hf://owner/model@/net",
        "hf://owner/model/../other/net",
        "hf://owner/model/a//net",
        "hf://owner/model/./net",
    ],
)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(SourceError, match="not like hf://owner/repo/path"):
        hub_source(address)


def test_a_hub_that_is_busy_is_a_transfer_error_and_asked_again_later(open_source):
    with endpoint("rate-limited", retry_after="7") as server:
        source = open_source("hf://owner/model/net")
        with pytest.raises(TransferError, match="answered 429") as caught:
            read(source)
        assert caught.value.retry_after_s == 7
        server.kill()
        with pytest.raises(TransferError, match="cannot be reached"):
            read(source)


@pytest.mark.parametrize("answer", ["not json", "[]", '{"id": "a/b"}', '{"id": "", "sha": "v1"}'])
def test_a_hub_that_answers_nonsense_is_a_transfer_error(open_source, answer):
    with endpoint(data=answer.encode()), pytest.raises(TransferError, match="try again"):
        read(open_source("hf://owner/model/net"))


def test_a_hub_that_refuses_is_a_source_error(open_source):
    with endpoint(refuse=403), pytest.raises(SourceError, match="answered 403"):
        read(open_source("hf://owner/model/net"))


def test_offline_is_said(open_source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with hub({PATH: DATA}) as server:
        source = open_source(server.address(PATH))
        with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set; unset it"):
            read(source)


@pytest.mark.parametrize("revision", ["main", "0" * 40])
def test_a_hub_of_plain_http_on_another_machine_is_told_nothing(open_source, revision, monkeypatch):
    def send(*arguments, **options):
        raise AssertionError("something was sent")

    with environment({"HF_ENDPOINT": "http://hub.example"}):
        source = open_source(f"hf://owner/model@{revision}/net", token="secret")
        monkeypatch.setattr("httpx2.Client.send", send)
        with pytest.raises(SourceError, match=r"the Hub at http://hub\.example is plain http"):
            read(source)


def test_a_process_that_starts_with_the_endpoint_reads_from_it():
    code = (
        "import sys; from plyweight.artifact import ByteRange\n"
        "from plyweight.delivery.source import open_remote\n"
        "source = open_remote(sys.argv[1])\n"
        "with source.get(ByteRange(1000, 21_000)) as reply:\n"
        "    sys.stdout.buffer.write(b''.join(reply.body))\n"
        "source.close()\n"
        "assert 'torch' not in sys.modules"
    )
    with hub({PATH: DATA}) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, server.address(PATH)],
            capture_output=True,
            env=os.environ | server.env,
            check=False,
        )
    assert done.stdout == SLICE, done.stderr.decode()


def test_without_huggingface_hub_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "try: import plyweight.delivery.hub\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('run: pip install "plyweight[hub]"')
