"""HTTP: a reply is believed only where it proves what it holds."""

import gc
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from delivery.servers import (
    NAME,
    certificate,
    environment,
    head_of,
    hostile,
    nginx,
    odd,
    plain_server,
    raw_server,
)

from plyweight.artifact import ByteRange
from plyweight.delivery.http import HttpSource
from plyweight.delivery.source import RemoteSource, open_remote
from plyweight.errors import SourceError, StaleError, TransferError

DATA = np.random.default_rng(4).bytes(300_000)
OTHER = bytes(byte ^ 0xFF for byte in DATA[:1000]) + DATA[1000:]
RANGE = ByteRange(1000, 201_000)
SLICE = DATA[RANGE.start : RANGE.stop]


@pytest.fixture
def open_source():
    """``HttpSource``, closed when the test ends."""
    opened = []

    def make(url, **options):
        opened.append(HttpSource(url, **options))
        return opened[-1]

    yield make
    for source in opened:
        source.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))


def read(source, byte_range=RANGE, **options):
    """The range that came back, and its bytes."""
    with source.get(byte_range, **options) as reply:
        return reply.byte_range, b"".join(reply.body)


# --- honest servers -----------------------------------------------------------------------------


@pytest.mark.parametrize("gzip", [False, True])
def test_nginx_gives_the_bytes_that_were_asked_for(tmp_path, open_source, gzip):
    (tmp_path / NAME).write_bytes(DATA)
    with nginx(tmp_path, gzip=gzip) as server:
        source = open_source(f"{server.url}/{NAME}")
        assert read(source) == (RANGE, SLICE)
        with source.get(ByteRange(299_999, 400_000)) as reply:
            assert reply.byte_range == ByteRange(299_999, 300_000)
            assert reply.total_bytes == len(DATA)
            assert b"".join(reply.body) == DATA[-1:]
        with pytest.raises(StaleError):
            read(source, identity='"another"')
        with pytest.raises(StaleError):
            read(source, ByteRange(300_000, 300_001))
        with pytest.raises(SourceError, match="nothing there"):
            read(open_source(f"{server.url}/no-such-file"))


def test_a_killed_server_is_a_transfer_error_and_a_restarted_one_answers(tmp_path, open_source):
    (tmp_path / NAME).write_bytes(DATA)
    with nginx(tmp_path) as server:
        source = open_source(f"{server.url}/{NAME}")
        assert read(source) == (RANGE, SLICE)
        server.kill()
        with pytest.raises(TransferError, match="cannot be reached"):
            read(source)
        server.restart()
        assert read(source) == (RANGE, SLICE)


def test_a_server_that_knows_no_ranges_gives_everything_from_byte_0(tmp_path, open_source):
    (tmp_path / NAME).write_bytes(DATA)
    with plain_server(tmp_path) as server:
        source = open_source(f"{server.url}/{NAME}")
        with source.get(RANGE) as reply:
            assert reply.byte_range == ByteRange(0, len(DATA))
            assert reply.total_bytes == len(DATA)
            assert reply.identity is None  # it has a date, which is no identity
            assert b"".join(reply.body) == DATA
        with pytest.raises(StaleError, match="it has 300000"):
            read(source, ByteRange(300_000, 300_001))


def test_an_https_url_is_a_remote_source_that_open_remote_finds(tls):
    with hostile(DATA, tls=tls) as server, environment({"SSL_CERT_FILE": tls.path}):
        source = open_remote(server.url)
        assert isinstance(source, RemoteSource)
        assert read(source) == (RANGE, SLICE)
        source.close()


def test_a_certificate_that_nobody_trusts_is_refused_for_good(tls, open_source):
    with hostile(DATA, tls=tls) as server:
        with pytest.raises(SourceError, match="certificate that is not trusted"):
            read(open_source(server.url))
        assert server.requests == []


def test_eight_threads_share_a_source_and_keep_their_connections(open_source):
    # Four of them are answered only when all four are there, so they must be asked side by side.
    together, connections = threading.Barrier(4, timeout=30), set()
    lock = threading.Lock()

    def before(request):
        with lock:
            connections.add(threading.get_ident())
        if len(server.requests) <= 4:
            together.wait()

    with hostile(DATA, before=before) as server:
        source = open_source(server.url)
        ranges = [ByteRange(start, start + 10_000) for start in range(0, 300_000, 10_000)]
        with ThreadPoolExecutor(8) as pool:
            pieces = list(pool.map(lambda wanted: read(source, wanted)[1], ranges))
        assert b"".join(pieces) == DATA
        assert len(connections) <= 8  # the server has a thread for every connection


def test_the_same_connection_carries_one_range_after_another(open_source):
    threads = set()
    with hostile(DATA, before=lambda _: threads.add(threading.get_ident())) as server:
        source = open_source(server.url)
        for _ in range(5):
            assert read(source) == (RANGE, SLICE)
        assert len(threads) == 1


def test_a_source_that_nobody_closed_closes_with_the_last_reference():
    with hostile(DATA) as server:
        source = HttpSource(server.url)
        assert read(source) == (RANGE, SLICE)
        del source
        gc.collect()  # an open socket would be a ResourceWarning, which is an error here


# --- replies that are not believed --------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("shifted", r"answered 'bytes 1001-201000/300000' .* bytes \[1000, 201000\) were asked"),
        ("cut", "broke off"),
        ("gzip-bomb", "answered in 'gzip' though the bytes as they are"),
        ("busy", r"answered 503 \(Service Unavailable\); try again"),
        ("rate-limited", r"answered 429 \(Too Many Requests\); try again"),
    ],
)
def test_a_faulty_reply_is_a_transfer_error_and_the_next_one_may_be_right(
    open_source, mode, message
):
    with hostile(DATA, mode, times=1) as server:
        source = open_source(server.url)
        with pytest.raises(TransferError, match=message):
            read(source)
        assert read(source) == (RANGE, SLICE)


@pytest.mark.parametrize("mode", ["stall", "stall-body"])
def test_a_server_that_falls_silent_is_not_waited_for(open_source, mode):
    with hostile(DATA, mode) as server:
        source = open_source(server.url, read_timeout_s=0.2)
        with pytest.raises(TransferError, match=r"did not answer in time|stopped sending"):
            read(source)


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(open_source):
    with hostile(DATA, "drip-head", times=1) as server:
        source = open_source(server.url, head_timeout_s=0.5)
        started = time.monotonic()
        with pytest.raises(TransferError, match="did not answer in time"):
            read(source)
        assert time.monotonic() - started < 5  # the head takes ten seconds
        assert read(source) == (RANGE, SLICE)
        source.close()
        left = [thread for thread in threading.enumerate() if thread.name == "send"]
        for thread in left:
            thread.join(5)
        assert not any(thread.is_alive() for thread in left)


def test_a_reply_that_comes_too_late_is_closed(open_source):
    late = threading.Event()
    with hostile(DATA, before=lambda _: late.wait(30), times=0) as server:
        source = open_source(server.url, head_timeout_s=0.3)
        with pytest.raises(TransferError, match="did not answer in time"):
            read(source)
        late.set()
        for thread in threading.enumerate():
            if thread.name == "send":
                thread.join(30)
        gc.collect()  # an open socket would be a ResourceWarning, which is an error here
        assert read(source) == (RANGE, SLICE)


def test_gzip_is_never_offered(open_source):
    with hostile(DATA, "gzip-if-offered") as server:
        assert read(open_source(server.url)) == (RANGE, SLICE)
        assert server.requests[0].headers["accept-encoding"] == "identity"


def test_a_shorter_range_from_the_same_start_is_given_as_what_it_is(open_source):
    with hostile(DATA, "short") as server:
        got, data = read(open_source(server.url))
        assert got == ByteRange(1000, 101_000)
        assert data == DATA[1000:101_000]


def test_a_server_that_ignores_ranges_now_and_then_is_told_apart_reply_by_reply(open_source):
    with hostile(DATA, "whole", when=odd) as server:
        source = open_source(server.url)
        assert read(source) == (RANGE, SLICE)
        assert read(source) == (ByteRange(0, len(DATA)), DATA)


def test_a_whole_object_of_unknown_length_is_measured_if_it_is_small(open_source):
    with hostile(DATA, "no-length") as server, open_source(server.url).get(RANGE) as reply:
        assert reply.byte_range == ByteRange(0, len(DATA))
        assert reply.total_bytes == len(DATA)
        assert b"".join(reply.body) == DATA


def test_a_whole_object_of_unknown_length_is_given_up_to_the_end_asked_for(open_source):
    data = DATA * 10
    with hostile(data, "no-length") as server:
        got, body = read(open_source(server.url), ByteRange(5, 2_500_000))
        assert got == ByteRange(0, 2_500_000)
        assert body == data[:2_500_000]


@pytest.mark.parametrize("mode", ["endless", "endless-length"])
def test_ten_gigabytes_for_one_megabyte_stop_at_the_end_of_what_was_asked_for(open_source, mode):
    data, wanted = DATA * 4, ByteRange(0, 2**20)
    with hostile(data, mode) as server:
        source = open_source(server.url)
        tracemalloc.start()
        with source.get(wanted) as reply:
            received = sum(len(piece) for piece in reply.body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        server.kill()  # waits until the server's thread has noticed, so that `sent` is final
        assert received == wanted.num_bytes
        assert peak < 2**22  # the server's pieces are in this process too
        assert server.sent < 2**25  # what fits into the sockets' buffers, not 10 GB


def test_a_total_that_is_not_true_is_passed_on_for_the_header_to_judge(open_source):
    with hostile(DATA, "lying-total") as server, open_source(server.url).get(RANGE) as reply:
        assert reply.total_bytes == 2**50


def test_a_flipped_bit_is_not_the_sources_to_see(open_source):
    with hostile(DATA, "flip") as server:
        got, data = read(open_source(server.url))
        assert got == RANGE
        assert data != SLICE


@pytest.mark.parametrize(
    "stated",
    [
        "",
        "bytes */300000",
        "bytes 1000-200999",
        "bytes 1000-200999/200999",  # ends after the total
        "bytes 1000-201000/300000",  # longer than asked
        "bytes 999-200999/300000",
        "bytes 1000-999/300000",
        "octets 1000-200999/300000",
        "bytes 1000-200999/300000, bytes 1000-200999/300000",
        "bytes 1000-20099٩/300000",
        f"bytes 1000-200999/{'9' * 5000}",
    ],
)
def test_a_content_range_that_is_not_of_what_was_asked_is_refused(open_source, stated):
    head = head_of(206, f"Content-Range: {stated}", "Content-Length: 200000")
    with raw_server(head) as url, pytest.raises(TransferError):
        read(open_source(url))


@pytest.mark.parametrize("length", ["199999", "-1", "200000, 200000", "1_0"])
def test_a_length_that_contradicts_the_range_is_refused(open_source, length):
    head = head_of(206, "Content-Range: bytes 1000-200999/300000", f"Content-Length: {length}")
    with raw_server(head) as url, pytest.raises(TransferError):
        read(open_source(url))


def test_a_body_of_unknown_length_that_ends_early_is_a_transfer_error(open_source):
    head = head_of(206, "Content-Range: bytes 1000-200999/300000", "Connection: close")
    with raw_server(head + SLICE[:-7]) as url, pytest.raises(TransferError, match="7 bytes early"):
        read(open_source(url))


@pytest.mark.parametrize("reply", [b"", b"\r\n\r\n", b"HTTP/1.1 two hundred\r\n\r\n", b"\0" * 5000])
def test_what_is_not_http_is_a_transfer_error(open_source, reply):
    with raw_server(reply) as url, pytest.raises(TransferError):
        read(open_source(url))


# --- other objects ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message"), [("swapped", 'not "v1" any more'), ("swapped-silently", '"swapped"')]
)
def test_a_swapped_object_is_stale(open_source, mode, message):
    with hostile(DATA, mode, other=OTHER, after=2) as server:
        source = open_source(server.url)
        with source.get(RANGE) as reply:
            identity = reply.identity
            assert b"".join(reply.body) == SLICE
        assert identity == '"v1"'
        assert read(source, identity=identity) == (RANGE, SLICE)
        with pytest.raises(StaleError, match=message):
            read(source, identity=identity)
        assert server.requests[-1].headers["if-match"] == '"v1"'


@pytest.mark.parametrize("etag", [None, 'W/"v1"', "v1", '"' + "x" * 1000 + '"'])
def test_what_is_not_a_strong_etag_is_no_identity(open_source, etag):
    with hostile(DATA, etag=etag) as server, open_source(server.url).get(RANGE) as reply:
        assert reply.identity is None


def test_an_object_without_an_etag_is_left_to_the_digests(open_source):
    head = head_of(206, "Content-Range: bytes 0-0/1", "Content-Length: 1")
    with raw_server(head + b"x") as url:
        assert read(open_source(url), ByteRange(0, 1), identity='"v1"')[1] == b"x"


def test_an_empty_object_is_a_source_error_and_one_that_became_empty_is_stale(open_source):
    for mode in ("ok", "whole"):
        with hostile(b"", mode) as server:
            source = open_source(server.url)
            with pytest.raises(SourceError, match="is empty"):
                read(source, ByteRange(0, 10))
            with pytest.raises(StaleError, match="it has 0"):
                read(source, ByteRange(0, 10), identity='"v1"')


def test_a_416_that_contradicts_itself_is_a_transfer_error(open_source):
    head = head_of(416, "Content-Range: bytes */300000", "Content-Length: 0")
    with raw_server(head) as url, pytest.raises(TransferError, match="though it has 300000"):
        read(open_source(url))


# --- waiting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "seconds"),
    [("0", 0), ("120", 120), (None, None), ("soon", None), ("-5", None), ("1" * 5000, None)],
)
def test_retry_after_is_read_as_seconds(open_source, stated, seconds):
    with hostile(DATA, "busy", retry_after=stated) as server:
        with pytest.raises(TransferError) as caught:
            read(open_source(server.url))
        assert caught.value.retry_after_s == seconds


def test_retry_after_is_read_as_a_date(open_source):
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    waits = []
    for date in (later, "Thu, 01 Jan 1970 00:00:00 GMT", "Thu Jan  1 00:00:00 1970"):
        with hostile(DATA, "rate-limited", retry_after=date) as server:
            with pytest.raises(TransferError) as caught:
                read(open_source(server.url))
            waits.append(caught.value.retry_after_s)
    assert 3000 < waits[0] <= 3600
    assert waits[1:] == [0, 0]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (408, TransferError, "Request Timeout"),
        (500, TransferError, "Internal Server Error"),
        (599, TransferError, "answered 599; try again"),
        (401, SourceError, "wants a token"),
        (403, SourceError, "may not be read"),
        (404, SourceError, "nothing there"),
        (410, SourceError, "nothing there"),
        (418, SourceError, "no answer to a range"),
        (204, SourceError, "no answer to a range"),
        (304, SourceError, "no answer to a range"),
    ],
)
def test_a_status_says_whether_to_try_again(open_source, status, error, message):
    with raw_server(head_of(status, "Content-Length: 0")) as url:
        with pytest.raises(error, match=message) as caught:
            read(open_source(url))
        assert type(caught.value) is error


def test_a_slow_drip_gives_its_bytes_as_they_come_so_that_the_caller_can_give_up(open_source):
    with hostile(DATA, "drip") as server, open_source(server.url).get(RANGE) as reply:
        assert next(reply.body)[:1] == SLICE[:1]
        assert server.sent < 1000


# --- imports ------------------------------------------------------------------------------------


def test_without_httpx2_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['httpx2'] = None\n"
        "try: import plyweight.delivery.http\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('run: pip install "plyweight[http]"')


def test_reading_over_http_imports_no_torch():
    code = "import sys, plyweight.delivery.http; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
