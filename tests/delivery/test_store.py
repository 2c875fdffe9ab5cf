"""Object stores: the same promises as HTTP, kept by obstore and checked after it."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from delivery.servers import environment, hostile, s3

from plyweight.artifact import ByteRange
from plyweight.delivery.source import RemoteSource, open_remote
from plyweight.delivery.store import StoreSource
from plyweight.errors import SourceError, StaleError, TransferError

DATA = np.random.default_rng(6).bytes(300_000)
OTHER = DATA[::-1]
RANGE = ByteRange(1000, 201_000)
SLICE = DATA[RANGE.start : RANGE.stop]
KEY = "nets/net one.layered.safetensors"


@pytest.fixture(scope="module")
def bucket():
    with s3({KEY: DATA, "empty": b""}) as store:
        yield store


def read(source, byte_range=RANGE, **options):
    """The range that came back, and its bytes."""
    with source.get(byte_range, **options) as reply:
        return reply.byte_range, b"".join(reply.body)


@contextlib.contextmanager
def lying(mode="ok", data=DATA, **options):
    """A hostile server as the endpoint of S3, and the source that reads from it."""
    with hostile(data, mode, **options) as server:
        variables = {
            "AWS_ENDPOINT_URL": server.base,
            "AWS_ALLOW_HTTP": "true",
            "AWS_SKIP_SIGNATURE": "true",
        }
        with environment(variables):
            yield server, StoreSource("s3://models/net")


# --- a good store -------------------------------------------------------------------------------


def test_an_s3_address_is_a_remote_source_that_open_remote_finds(bucket):
    source = open_remote(f"{bucket.url}/{KEY}")
    assert isinstance(source, RemoteSource)
    assert source.name == f"s3://models/{KEY}"
    assert read(source) == (RANGE, SLICE)
    source.close()


def test_a_range_that_ends_after_the_object_is_answered_shorter(bucket):
    with StoreSource(f"{bucket.url}/{KEY}").get(ByteRange(299_990, 400_000)) as reply:
        assert reply.byte_range == ByteRange(299_990, 300_000)
        assert reply.total_bytes == len(DATA)
        assert b"".join(reply.body) == DATA[-10:]


def test_eight_threads_share_a_source(bucket):
    source = StoreSource(f"{bucket.url}/{KEY}")
    ranges = [ByteRange(start, start + 10_000) for start in range(0, 300_000, 10_000)]
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda wanted: read(source, wanted)[1], ranges))
    assert b"".join(pieces) == DATA


def test_an_object_that_was_put_again_is_stale(bucket):
    bucket.put("changing", DATA)
    source = StoreSource(f"{bucket.url}/changing")
    with source.get(RANGE) as reply:
        identity = reply.identity
    assert read(source, identity=identity) == (RANGE, SLICE)
    bucket.put("changing", OTHER)
    with pytest.raises(StaleError, match="begin again with its header"):
        read(source, identity=identity)
    assert read(source)[1] != SLICE


def test_a_range_after_the_end_is_stale_and_an_empty_object_is_refused(bucket):
    with pytest.raises(StaleError, match="it has fewer"):
        read(StoreSource(f"{bucket.url}/{KEY}"), ByteRange(300_000, 300_001))
    with pytest.raises(SourceError, match="is empty"):
        read(StoreSource(f"{bucket.url}/empty"), ByteRange(0, 10))


@pytest.mark.parametrize("address", ["s3://models/no-such-key", "s3://no-such-bucket/key"])
def test_what_is_not_there_is_a_source_error(bucket, address):
    with pytest.raises(SourceError, match=r"is not there; check the address, .* AWS_\*"):
        read(StoreSource(address))


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3://bucket",
        "gs://bucket/",
        "s3:///key",
        "s3://key:secret@bucket/net",
        "ftp://b/k",
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(address):
    with pytest.raises(SourceError, match="not like s3://bucket/path") as caught:
        StoreSource(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a//b", "../b", "a/./b"])
def test_a_key_that_is_no_path_is_refused(bucket, key):
    with pytest.raises(SourceError, match="check the key"):
        read(StoreSource(f"s3://models/{key}"))


def test_a_variable_that_makes_no_sense_is_refused_when_the_source_is_opened():
    nonsense = environment({"AWS_TIMEOUT": "ten parsecs"})
    with nonsense, pytest.raises(SourceError, match=r"variables AWS_\* of the environment"):
        StoreSource("s3://models/net")
    with pytest.raises(SourceError, match="Account must be specified"):
        StoreSource("az://models/net")


def test_azure_and_google_read_their_own_variables_and_keep_their_secrets():
    azure = {
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_SAS_TOKEN": "sv=2026&sig=s3cret",
        "AZURE_ALLOW_HTTP": "true",
    }
    google = {"GOOGLE_SKIP_SIGNATURE": "true", "GOOGLE_ALLOW_HTTP": "true"}
    for url, variable, variables, path in [
        ("az://models/a/net", "AZURE_STORAGE_ENDPOINT", azure, "/models/a/net?sv=2026&sig=s3cret"),
        ("gs://models/a/net", "GOOGLE_BASE_URL", google, "/models/a%2Fnet"),
    ]:
        with hostile(DATA) as server, environment(variables | {variable: server.base}):
            assert read(StoreSource(url)) == (RANGE, SLICE)
            assert server.requests[0].path == path
            server.options.mode = "busy"
            with pytest.raises(TransferError) as caught:
                read(StoreSource(url))
            assert "s3cret" not in str(caught.value)
            assert caught.value.__suppress_context__


def test_without_credentials_it_says_how_to_give_some(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with hostile(DATA, refuse=403) as server:
        variables = {"AWS_METADATA_ENDPOINT": server.base, "AWS_ALLOW_HTTP": "true"}
        with environment(variables), pytest.raises(SourceError) as caught:
            read(StoreSource("s3://models/net"))
    assert str(caught.value) == (
        "there are no credentials for s3://models/net; set AWS_* in the environment, or "
        "AWS_SKIP_SIGNATURE=true if everybody may read it."
    )


def test_plain_http_needs_the_permission_of_the_environment():
    with lying() as (server, _), environment({"AWS_ALLOW_HTTP": "false"}):
        with pytest.raises(SourceError, match="set AWS_ALLOW_HTTP=true if it may be plain http"):
            read(StoreSource("s3://models/net"))
        assert server.requests == []


# --- a lying store ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        "busy",
        "rate-limited",
        "shifted",
        "short",
        "cut",
        "whole",
        "no-length",
    ],
)
def test_a_faulty_reply_is_a_transfer_error_asked_for_once(mode):
    with lying(mode, times=1) as (server, source):
        with pytest.raises(TransferError):
            read(source)
        assert len(server.requests) == 1  # trying again is the client's to decide
        assert read(source) == (RANGE, SLICE)


@pytest.mark.parametrize("mode", ["stall", "stall-body"])
def test_a_store_that_falls_silent_is_not_waited_for(monkeypatch, mode):
    monkeypatch.setenv("AWS_READ_TIMEOUT", "200ms")
    with lying(mode) as (_, source), pytest.raises(TransferError):
        read(source)


def test_a_connection_that_is_refused_is_a_transfer_error():
    with lying() as (server, source):
        server.kill()
        with pytest.raises(TransferError, match="cannot be read now"):
            read(source)
        server.restart()
        assert read(source) == (RANGE, SLICE)


def test_ten_gigabytes_for_one_stop_at_the_end_of_what_was_asked_for():
    with lying("endless-length") as (server, source):
        assert read(source) == (RANGE, SLICE)
        server.kill()  # waits until the server's thread has noticed, so that `sent` is final
        assert server.sent < 2**26  # what fits into buffers, not 10 GB


@pytest.mark.parametrize("mode", ["swapped", "swapped-silently"])
def test_a_swapped_object_is_stale_whether_the_store_says_so_or_not(mode):
    with lying(mode, other=OTHER, after=1) as (_, source):
        with source.get(RANGE) as reply:
            identity = reply.identity
        with pytest.raises(StaleError):
            read(source, identity=identity)


def test_an_object_that_is_stored_packed_is_refused():
    with lying("gzip-bomb") as (_, source), pytest.raises(SourceError, match="stored in 'gzip'"):
        read(source)


def test_a_weak_etag_is_no_identity():
    with lying(etag='W/"v1"') as (_, source), source.get(RANGE) as reply:
        assert reply.identity is None


def test_a_large_object_comes_in_pieces_of_a_few_mib():
    data = bytes(2**25)
    with lying(data=data) as (_, source), source.get(ByteRange(0, 2**25)) as reply:
        sizes = [len(piece) for piece in reply.body]
    assert sum(sizes) == 2**25
    assert max(sizes) < 2**22


def test_a_body_that_nobody_reads_to_its_end_is_hung_up_on():
    data = bytes(2**26)
    with lying(data=data) as (server, source):
        with source.get(ByteRange(0, 2**26)) as reply:
            next(reply.body)
        server.kill()
        assert server.sent < 2**26


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "may not be read"),
        (403, "may not be read"),
        (404, "is not there"),
        (400, "status code: 400"),
    ],
)
def test_a_refusal_is_a_source_error(status, message):
    with lying(refuse=status) as (_, source), pytest.raises(SourceError, match=message):
        read(source)


# --- imports ------------------------------------------------------------------------------------


def test_without_obstore_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "try: import plyweight.delivery.store\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('run: pip install "plyweight[cloud]"')
