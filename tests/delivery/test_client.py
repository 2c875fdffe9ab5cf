"""Client: what moves, what is believed, and what stays when it goes wrong."""

import ast
import contextlib
import itertools
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from artifact.builders import MODEL, build
from delivery.fakes import (
    CHUNK,
    NAME,
    FakeSource,
    artifact,
    fail_from,
    fetch,
    files_in,
    flipped,
    prefix,
    read_all,
    with_layers,
)
from delivery.servers import MODES, hostile, nginx, odd, plain_server

import plyweight.delivery
from plyweight.artifact import ArtifactReader, ByteRange, Header, MemorySource
from plyweight.delivery import opening, pulling
from plyweight.delivery.cache import Cache
from plyweight.delivery.chunks import chunks_of
from plyweight.delivery.client import download, read_header
from plyweight.delivery.retry import FIRST_S, MOST_S, Patience
from plyweight.delivery.source import LocalSource, open_remote
from plyweight.delivery.transfer import Meter, ask
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    DigestError,
    HeaderError,
    LayeringError,
    OutputError,
    SourceError,
    StaleError,
    TransferError,
    TruncatedError,
    TrustError,
)

FIRST = 32 * 2**10


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    """Requests of one chunk after a first one of 32 KiB, and no waiting in between."""
    monkeypatch.setattr(opening, "FIRST_BYTES", FIRST)
    monkeypatch.setattr("plyweight.delivery.chunks.REQUEST_BYTES", CHUNK)
    monkeypatch.setattr("plyweight.delivery.retry.FIRST_S", 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("client") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The next revision: other bytes everywhere, of the same sizes."""
    folder = tmp_path_factory.mktemp("other")
    data, _ = artifact(folder / "a", model=replace(MODEL, revision=4))
    mixed = bytearray(data)
    header = Header.parse(data)
    for layer in header.layers:
        for byte in range(layer.byte_range.start + 5, layer.byte_range.stop - 5000, 999):
            mixed[byte] ^= 1
    return redigested(bytes(mixed))


def redigested(data):
    """A consistent artifact of these bytes, as a forger makes one."""
    import base64
    import hashlib

    header = Header.parse(data)

    def state(layers):
        for index, layer in enumerate(layers):
            digests = [
                hashlib.sha256(data[c.byte_range.start : c.byte_range.stop]).digest()
                for c in chunks_of(header, [index])
            ]
            whole = header.layers[index].byte_range
            layer["chunks"] = base64.b64encode(b"".join(digests)).decode()
            layer["sha256"] = hashlib.sha256(data[whole.start : whole.stop]).hexdigest()

    forged = with_layers(data, state)
    return forged, Header.parse(forged)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def blobs(cache):
    return files_in(cache.folder / "blobs") if (cache.folder / "blobs").exists() else []


def held(cache):
    return {entry.artifact_id: entry.bit_widths for entry in cache.artifacts()}


# --- what moves ---


@pytest.mark.parametrize("bit_width", [2, 3, 4])
def test_a_width_moves_its_prefix_and_no_byte_twice(tiny, cache, bit_width):
    data, header = tiny
    source = FakeSource(data)
    got = fetch(source, cache, bit_width)
    assert read_all(got.artifact) == prefix(data, header, bit_width)
    assert source.sent == got.transfer.received_bytes == header.prefix_bytes(bit_width)
    assert got.transfer.requests == len(source.log)
    assert got.transfer.wasted_bytes == got.transfer.retries == 0
    assert (got.bit_width, got.header) == (bit_width, header)


@pytest.mark.parametrize("bit_width", [2, 3, 4])
def test_at_most_a_mib_beyond_the_prefix_is_asked_for(tiny, cache, bit_width, monkeypatch):
    monkeypatch.setattr(opening, "FIRST_BYTES", 2**20)
    data, header = tiny  # all of it is in the first MiB
    source = FakeSource(data)
    got = fetch(source, cache, bit_width)
    assert got.transfer.requests == 1
    assert header.prefix_bytes(bit_width) <= source.sent
    assert source.sent < header.prefix_bytes(bit_width) + source.piece


def test_an_upgrade_moves_its_layer_and_nothing_else(tiny, cache):
    data, header = tiny
    fetch(FakeSource(data), cache, 2)
    for index, bit_width in [(1, 3), (2, 4)]:
        source = FakeSource(data)
        got = fetch(source, cache, bit_width)
        assert source.sent == header.layers[index].byte_range.num_bytes
        assert read_all(got.artifact) == prefix(data, header, bit_width)
        assert {identity for _, identity in source.log} == {'"v1"'}  # that of the remembered name


def test_the_second_time_nothing_is_asked(tiny, cache):
    data, header = tiny
    fetch(FakeSource(data), cache)
    source = FakeSource(data)
    for bit_width in (4, 2):
        got = fetch(source, Cache(cache.folder), bit_width)
        assert got.transfer.requests == 0
        assert read_all(got.artifact) == prefix(data, header, bit_width)
    assert source.log == []


def test_a_pinned_id_is_found_under_any_name(tiny, cache):
    data, header = tiny
    fetch(FakeSource(data), cache)
    source = FakeSource(data, name="https://mirror.example/tiny")
    got = fetch(source, cache, artifact_id=header.artifact_id)
    assert (got.transfer.requests, source.log) == (0, [])
    assert cache.refs.get(source.name) is None  # nobody has seen what is there


def test_refreshing_an_unchanged_object_moves_one_byte(tiny, cache):
    data, _ = tiny
    fetch(FakeSource(data), cache)
    source = FakeSource(data, piece=1)
    got = fetch(source, cache, refresh=True)
    assert source.log == [(ByteRange(0, 1), '"v1"')]
    assert got.transfer.received_bytes == 1


def test_refreshing_without_an_etag_reads_the_header(tiny, cache):
    data, header = tiny
    fetch(FakeSource(data, identity=None), cache)
    source = FakeSource(data, identity=None, piece=1024)
    fetch(source, cache, refresh=True)
    assert source.log == [(ByteRange(0, FIRST), None)]
    assert source.sent == header.data_start


def test_refreshing_finds_the_next_revision(tiny, other, cache):
    fetch(FakeSource(tiny[0]), cache, 2)
    source = FakeSource(other[0], identity='"v2"')
    assert fetch(source, cache, 2).header.artifact_id == tiny[1].artifact_id
    assert fetch(source, cache, 2, refresh=True).header.artifact_id == other[1].artifact_id
    assert fetch(source, cache, 2).header.artifact_id == other[1].artifact_id
    assert cache.refs.get(NAME).identity == '"v2"'


@pytest.mark.parametrize("first", [1, 7, 8, 9, 100, 4095, 4096])
def test_a_header_longer_than_the_first_request_takes_one_more(tiny, cache, monkeypatch, first):
    data, header = tiny
    monkeypatch.setattr(opening, "FIRST_BYTES", first)
    source = FakeSource(data)
    assert read_all(fetch(source, cache, 2).artifact) == prefix(data, header, 2)
    assert source.sent == header.prefix_bytes(2)


@pytest.mark.parametrize("claimed", [2**64 - 1, 2**63, 16 * 2**20 + 1, 0, 7])
def test_an_impossible_header_length_ends_it_at_once(tiny, cache, claimed):  # row_1
    source = FakeSource(claimed.to_bytes(8, "little") + tiny[0][8:], piece=1024)
    with pytest.raises(HeaderError, match=f"claims {claimed} bytes"):
        fetch(source, cache)
    assert source.sent == 2 * 1024  # a piece each time it was read
    assert not cache.folder.exists()


def test_an_object_that_ends_in_its_header_is_no_artifact(tiny, cache):
    for size in (1, 7, 8, 4095):
        with pytest.raises(TruncatedError):
            fetch(FakeSource(tiny[0][:size]), cache)
    assert not cache.folder.exists()


def test_a_source_that_holds_a_prefix_gives_it_and_refuses_more(tiny, cache):
    data, header = tiny
    source = FakeSource(prefix(data, header, 3))
    assert read_all(fetch(source, cache, 3).artifact) == source.data
    with pytest.raises(SourceError, match=f"has {len(source.data)}; ask for fewer bits"):
        fetch(source, cache, 4)
    assert held(cache) == {header.artifact_id: (2, 3)}


def test_a_width_that_is_not_stored_is_refused_before_anything_is_fetched(tiny, cache):
    source = FakeSource(tiny[0], piece=4096)
    with pytest.raises(BitWidthError, match="stores 2, 3, 4"):
        fetch(source, cache, 5)
    assert source.sent == tiny[1].data_start


def test_the_choice_sees_the_header(tiny, cache):
    budget = tiny[1].prefix_bytes(3)

    def widest_within(header):
        return max(b for b in header.bit_widths if header.prefix_bytes(b) <= budget)

    got = download(FakeSource(tiny[0]), choose=widest_within, into=cache)
    assert got.bit_width == 3


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_no_more_requests_run_at_the_same_time_than_allowed(tiny, cache, parallel):
    running, most, lock, numbers = [0], [0], threading.Lock(), itertools.count()
    together = threading.Barrier(parallel)

    class Counting(FakeSource):
        @contextlib.contextmanager
        def get(self, byte_range, **options):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
                number = next(numbers)
            if 1 <= number <= parallel:
                together.wait(60)  # all of them are there at once, or this fails
            with super().get(byte_range, **options) as reply:
                yield reply
            with lock:
                running[0] -= 1

    fetch(Counting(tiny[0]), cache, parallel=parallel)
    assert most[0] == parallel


def test_large_chunks_are_fetched_one_at_a_time(tiny, cache, monkeypatch):
    monkeypatch.setattr(pulling, "IN_FLIGHT_BYTES", CHUNK)
    threads = set()

    class Counting(FakeSource):
        def _pieces(self, body):
            threads.add(threading.current_thread().name + str(threading.get_ident()))
            yield from super()._pieces(body)

    fetch(Counting(tiny[0]), cache)
    assert len(threads) == 2  # this one and one more


@pytest.mark.parametrize("parallel", [0, -1, 1.5, True, None])
def test_nonsense_is_refused(tiny, cache, parallel):
    with pytest.raises(LayeringError, match="give an integer of 1 or more"):
        fetch(FakeSource(tiny[0]), cache, parallel=parallel)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_no_patience_is_refused(tiny, cache, seconds):
    with pytest.raises(LayeringError, match=r"patience_s is .*; give a positive number"):
        fetch(FakeSource(tiny[0]), cache, patience_s=seconds)


def test_the_base_layer_is_there_before_the_others(tiny, cache):
    data, header = tiny
    seen = []

    def before(source, number):
        asked = source.log[number][0]
        if asked.start >= header.layers[1].byte_range.start:
            seen.append(held(cache)[header.artifact_id][:1])

    source = FakeSource(data)
    source.before = before
    fetch(source, cache, parallel=1)
    assert len(seen) == 4
    assert set(seen) == {(2,)}


def test_progress_goes_from_nothing_to_all(tiny, cache, monkeypatch):
    monkeypatch.setattr(pulling, "REPORT_S", 0.0)
    data, header = tiny
    steps = []
    fetch(FakeSource(data), cache, progress=steps.append)
    assert {step.bytes_total for step in steps} == {header.prefix_bytes(4)}
    assert steps[-1].bytes_done == header.prefix_bytes(4)
    assert steps[-1].received_bytes == header.prefix_bytes(4)
    assert steps[0].bytes_done < CHUNK
    assert steps[0].layer == 0
    assert steps[-1].layer == 2
    assert all(0 <= step.bytes_done <= step.bytes_total for step in steps)


def test_a_local_source_is_copied_and_has_no_name_to_remember(tiny, cache):
    data, header = tiny
    for bit_width in (2, 4):
        got = fetch(LocalSource(MemorySource(data)), cache, bit_width)
        assert read_all(got.artifact) == prefix(data, header, bit_width)
    assert not (cache.folder / "refs").exists()


def test_the_header_alone_can_be_read(tiny):
    source = FakeSource(tiny[0], piece=1024)
    found = read_header(source)
    assert (found.header, found.total_bytes) == (tiny[1], len(tiny[0]))
    assert found.transfer.received_bytes == source.sent == found.header.data_start
    with pytest.raises(TrustError, match="was asked for"):
        read_header(source, artifact_id="0" * 64)


# --- patience ---


def test_waits_are_drawn_from_an_interval_that_doubles():
    times = iter([0.0] * 100)
    patience = Patience(1000, clock=lambda: next(times), draw=lambda: 0.5)
    error = TransferError("x")
    assert MOST_S == 30
    assert FIRST_S == 0.5
    # The fixture has set the first interval to nothing for the other tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plyweight.delivery.retry.FIRST_S", 0.5)
        assert [patience.wait_s(n, error) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 15, 15, 15]
        assert patience.wait_s(10**6, error) == 15


def test_the_servers_wish_is_the_least_wait():
    patience = Patience(10, clock=lambda: 0.0, draw=lambda: 0.0)
    assert patience.wait_s(1, TransferError("x", retry_after_s=7)) == 7
    with pytest.raises(TransferError, match="asks to wait for 11 s, longer than the 10 s allowed"):
        patience.wait_s(1, TransferError("x", retry_after_s=11))


def test_patience_ends_after_its_deadline_without_progress():
    now = [0.0]
    patience = Patience(10, clock=lambda: now[0], draw=lambda: 1.0)
    now[0] = 9.0
    patience.progressed()
    now[0] = 18.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plyweight.delivery.retry.FIRST_S", 0.5)
        assert patience.wait_s(5, TransferError("x")) == 0.5  # what is left
    now[0] = 19.0
    with pytest.raises(TransferError, match="nothing arrived for 10 s; the last attempt says: x"):
        patience.wait_s(1, TransferError("x"))


@pytest.mark.parametrize("number", range(9))
def test_any_request_may_fail_once_or_twice(tiny, cache, number):
    data, _ = tiny
    failed = []

    def before(source, current):
        if number <= current < number + 2 or current == number + 5:
            failed.append(current)
            raise TransferError("the line is down")

    source = FakeSource(data)
    source.before = before
    got = fetch(source, cache)
    assert read_all(got.artifact) == data
    assert got.transfer.retries == len(failed) >= 2
    assert source.sent == len(data)  # not a byte more than once


@pytest.mark.parametrize("number", range(9))
def test_a_reply_that_breaks_off_is_continued_where_it_did(tiny, cache, number):
    data, _ = tiny
    source = FakeSource(data)
    for offset in (0, 1, 3):
        source.replies[number + offset] = lambda body, got: body[: len(body) // 3]
    got = fetch(source, cache)
    assert read_all(got.artifact) == data
    assert got.transfer.retries >= 1
    assert source.sent == len(data)


def test_a_dead_line_is_given_up_and_what_is_verified_stays(tiny, cache):
    data, header = tiny

    def before(source, number):
        if number >= 4:
            raise TransferError("the line is down")

    source = FakeSource(data)
    source.before = before
    with pytest.raises(TransferError, match=r"nothing arrived for 0.05 s; .* the line is down"):
        fetch(source, cache, patience_s=0.05)
    source.before = None
    assert read_all(fetch(source, cache).artifact) == data
    assert source.sent <= len(data) + 4 * CHUNK
    assert held(cache) == {header.artifact_id: (2, 3, 4)}


def test_an_interrupt_ends_the_threads_and_is_taken_up_again(tiny, cache, monkeypatch):
    monkeypatch.setattr(pulling, "REPORT_S", 0.0)
    data, _ = tiny
    source, before = FakeSource(data), threading.active_count()
    calls = []

    def progress(step):
        calls.append(step)
        if step.bytes_done > 3 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(source, cache, progress=progress)
    assert threading.active_count() == before
    assert read_all(fetch(source, cache).artifact) == data
    assert source.sent <= len(data) + 5 * CHUNK


def test_threads_that_wait_for_a_silent_server_are_left_and_touch_nothing(tiny, cache, monkeypatch):
    monkeypatch.setattr(pulling, "REPORT_S", 0.0)
    monkeypatch.setattr(pulling, "GRACE_S", 0.0)
    data, _ = tiny
    silence = threading.Event()

    def before(source, number):
        if number:
            silence.wait()

    def interrupt(step):
        raise KeyboardInterrupt

    source, count = FakeSource(data), threading.active_count()
    source.before = before
    with pytest.raises(KeyboardInterrupt):
        fetch(source, cache, progress=interrupt)
    left = [thread for thread in threading.enumerate() if thread.name == "fetch"]
    before_them = {name: (cache.folder / name).stat() for name in files_in(cache.folder)}
    silence.set()
    for thread in left:
        thread.join()
    assert threading.active_count() == count
    assert {name: (cache.folder / name).stat() for name in files_in(cache.folder)} == before_them
    assert read_all(fetch(FakeSource(data), cache).artifact) == data


def test_an_error_of_ours_in_a_thread_is_raised_and_ends_the_others(tiny, cache):
    def before(source, number):
        if number == 3:
            raise ZeroDivisionError

    source, count = FakeSource(tiny[0]), threading.active_count()
    source.before = before
    with pytest.raises(ZeroDivisionError):
        fetch(source, cache)
    assert threading.active_count() == count


# --- digests ---


def test_a_chunk_that_is_wrong_once_is_fetched_again(tiny, cache):
    data, _ = tiny
    source = FakeSource(data)
    for number in (2, 5):
        source.replies[number] = lambda body, got: flipped(body, len(body) // 2)
    got = fetch(source, cache)
    assert read_all(got.artifact) == data
    assert got.transfer.retries == 2
    assert got.transfer.wasted_bytes == source.sent - len(data) <= 2 * CHUNK


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_chunk_that_is_wrong_three_times_is_named_and_nothing_of_it_kept(tiny, cache, layer):
    """Quarantine (row_11): what is right stays, and a good source need not send it again."""
    data, header = tiny
    chunk = list(chunks_of(header, [layer]))[1]
    source = FakeSource(flipped(data, chunk.byte_range.start + 77))
    with pytest.raises(DigestError, match=rf"chunk 1 of layer {layer} \({layer + 2} bits\)"):
        fetch(source, cache, parallel=1)
    assert blobs(cache) == sorted(f"sha256/{x.sha256}" for x in header.layers[:layer])
    good = FakeSource(data)
    assert read_all(fetch(good, cache).artifact) == data
    there = chunk.byte_range.start - header.data_start  # and whatever had come after it
    assert good.sent <= len(data) - there


def test_each_of_200_flipped_bits_is_noticed(tmp_path):  # row_11
    data = build(tmp_path / "tiny")
    header, draw = Header.parse(data), random.Random(11)
    bits = draw.sample(range(8 * len(data)), 200)
    for bit in bits:
        cache = Cache(tmp_path / "cache")
        position = bit // 8
        source = FakeSource(flipped(data, position, bit % 8))
        what = [i for i, x in enumerate(header.layers) if position >= x.byte_range.start]
        expected = f"chunk 0 of layer {what[-1]}" if what else "."
        with pytest.raises((ArtifactError, TrustError), match=expected):
            fetch(source, cache, 8, artifact_id=header.artifact_id)
        good = [x.sha256 for i, x in enumerate(header.layers) if what and i != what[-1]]
        assert {Path(name).name for name in blobs(cache)} <= set(good)
        for name in files_in(cache.folder) if cache.folder.exists() else []:
            (cache.folder / name).unlink()


def test_a_layer_of_another_artifact_does_not_pass(tiny, other, cache):  # row_12
    data, header = tiny
    place = header.layers[1].byte_range
    mixed = data[: place.start] + other[0][place.start : place.stop] + data[place.stop :]
    with pytest.raises(DigestError, match="of layer 1"):
        fetch(FakeSource(mixed), cache, parallel=1)
    assert held(cache) == {header.artifact_id: (2,)}


def test_a_header_with_a_flipped_bit_is_read_again(tiny, cache):
    data, header = tiny
    source = FakeSource(data)
    source.replies[0] = lambda body, got: flipped(body, 20)
    got = fetch(source, cache, artifact_id=header.artifact_id)
    assert read_all(got.artifact) == data
    assert got.transfer.retries == 1


def test_a_header_that_contradicts_itself_is_said_to(tiny, cache):
    def other_digest(layers):
        layers[1]["sha256"] = "0" * 64

    forged = with_layers(tiny[0], other_digest)
    with pytest.raises(DigestError, match="contradicts itself"):
        fetch(FakeSource(forged), cache, parallel=1)
    assert blobs(cache) == [f"sha256/{tiny[1].layers[0].sha256}"]


def test_another_artifacts_claim_on_a_layers_name_does_not_poison_it(tiny, other, cache):
    """A forged header that calls its own bytes by the digest of a good layer publishes none."""
    data, header = tiny

    def borrowed(layers):
        layers[0]["sha256"] = header.layers[0].sha256

    forged = with_layers(other[0], borrowed)
    half = FakeSource(data)
    half.before = lambda source, number: fail_from(number, 3)
    with pytest.raises(TransferError):
        fetch(half, cache, 2, patience_s=0.05)
    with pytest.raises(DigestError, match="contradicts itself"):
        fetch(FakeSource(forged, name="https://evil.example/x"), cache, 2)
    assert blobs(cache) == []
    good = FakeSource(data)
    assert read_all(fetch(good, cache, 2).artifact) == prefix(data, header, 2)
    assert good.sent < header.prefix_bytes(2)  # its own half was left alone


# --- trust ---


def test_a_forged_artifact_is_refused_with_a_pin(tiny, other, cache):  # row_13
    forged = FakeSource(other[0])  # consistent: every digest is right
    with pytest.raises(TrustError, match=f"has artifact {other[1].artifact_id}, but"):
        fetch(forged, cache, artifact_id=tiny[1].artifact_id)
    assert not cache.folder.exists()
    got = fetch(forged, cache, artifact_id=other[1].artifact_id)
    assert read_all(got.artifact) == other[0]


def test_without_a_pin_the_first_use_is_shown_to_the_judge(tiny, cache):  # row_13
    seen = []
    fetch(FakeSource(tiny[0]), cache, 2, trust=lambda header, known: seen.append((header, known)))
    fetch(FakeSource(tiny[0]), cache, 3, trust=lambda header, known: seen.append((header, known)))
    assert [header for header, _ in seen] == [tiny[1], tiny[1]]
    assert seen[0][1] is None
    assert seen[1][1].artifact_id == tiny[1].artifact_id


def test_what_the_judge_refuses_leaves_nothing(tiny, cache):
    def refuse(header, known):
        raise TrustError(f"{header.model.name} is not signed.")

    source = FakeSource(tiny[0], piece=4096)
    with pytest.raises(TrustError, match="not signed"):
        fetch(source, cache, trust=refuse)
    assert source.sent == tiny[1].data_start
    assert not cache.folder.exists()


def test_an_older_revision_is_refused(tiny, other, cache):  # row_14
    fetch(FakeSource(other[0]), cache, 2)  # revision 4
    source = FakeSource(tiny[0], identity='"v0"')  # revision 3
    with pytest.raises(TrustError, match="has revision 3 of tiny now, but it had revision 4"):
        fetch(source, cache, 2, refresh=True)
    assert cache.refs.get(NAME).revision == 4
    assert held(cache) == {other[1].artifact_id: (2,)}
    pinned = fetch(source, cache, 2, artifact_id=tiny[1].artifact_id)
    assert pinned.header == tiny[1]
    assert cache.refs.get(NAME).revision == 4  # a pin is for one time
    allowed = fetch(source, cache, 2, refresh=True, allow_rollback=True)
    assert allowed.header == tiny[1]
    assert cache.refs.get(NAME).revision == 3


def test_an_older_revision_is_refused_after_eviction_too(tiny, other, cache):  # row_14
    fetch(FakeSource(other[0]), cache, 2)
    cache.evict(other[1].artifact_id)
    with pytest.raises(TrustError, match="had revision 4"):
        fetch(FakeSource(tiny[0]), cache, 2)


def test_another_model_under_the_same_name_is_refused(tiny, cache, tmp_path):
    fetch(FakeSource(tiny[0]), cache, 2)
    data, _ = artifact(tmp_path / "x", model=replace(MODEL, name="evil", revision=99))
    with pytest.raises(TrustError, match="has evil now, but it had tiny"):
        fetch(FakeSource(data, identity='"v2"'), cache, 2, refresh=True)


# --- the object changes ---


def swap_at(number, data, identity):
    def before(source, current):
        if current >= number:
            source.data, source.identity = data, identity

    return before


@pytest.mark.parametrize("etag", ['"v2"', '"v1"', None])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_an_object_that_changes_meanwhile_is_begun_again(tiny, other, cache, number, etag):
    """Row 16: by its ETag if that changes, else by the digests."""
    source = FakeSource(tiny[0], identity=None if etag is None else '"v1"')
    source.before = swap_at(number, other[0], etag)
    if etag == '"v2"':
        got = fetch(source, cache)
        assert got.header == other[1]
        assert read_all(got.artifact) == other[0]
    else:  # nothing says so but the digests: the header was seen a moment ago
        with pytest.raises(DigestError):
            fetch(source, cache)
        assert read_all(fetch(source, cache, refresh=True).artifact) == other[0]


def test_an_object_that_changes_all_the_time_is_given_up(tiny, other, cache):  # row_16
    def before(source, number):
        source.data = (tiny, other)[number // 3 % 2][0]
        source.identity = f'"{number // 3}"'

    source = FakeSource(tiny[0])
    source.before = before
    with pytest.raises(StaleError, match="changed"):
        fetch(source, cache, parallel=1)
    assert blobs(cache) == []


@pytest.mark.parametrize("held_bit_width", [None, 2])
def test_the_same_bytes_under_changing_etags_are_fetched(tiny, cache, held_bit_width):  # row_16
    def before(source, number):
        source.identity = f'"{number}"'

    source = FakeSource(tiny[0])
    if held_bit_width is not None:
        fetch(source, cache, held_bit_width)
    source.before = before
    assert read_all(fetch(source, cache).artifact) == tiny[0]


def test_another_etag_in_a_reply_is_noticed_where_the_source_lets_it_pass(tiny):  # row_16
    class Careless(FakeSource):
        def get(self, byte_range, *, identity=None):
            return super().get(byte_range)

    source = Careless(tiny[0], identity='"v2"')
    with (
        pytest.raises(StaleError, match="changed while it was fetched"),
        ask(source, ByteRange(0, 9), identity='"v1"', meter=Meter()),
    ):
        pass
    with ask(source, ByteRange(0, 9), identity='"v2"', meter=Meter()) as stream:
        assert [bytes(piece) for _, piece in stream] == [tiny[0][:9]]


@pytest.mark.parametrize("etag", ['"v2"', '"v1"', None])
def test_an_upgrade_of_what_has_changed_begins_with_the_new_header(tiny, other, cache, etag):
    fetch(FakeSource(tiny[0], identity='"v1"'), cache, 2)
    source = FakeSource(other[0], identity=etag)
    got = fetch(source, cache, 3)
    assert got.header == other[1]
    assert read_all(got.artifact) == prefix(*other, 3)
    assert held(cache) == {tiny[1].artifact_id: (2,), other[1].artifact_id: (2, 3)}


def test_a_pinned_artifact_that_is_gone_is_not_replaced(tiny, other, cache):
    fetch(FakeSource(tiny[0]), cache, 2)
    for etag in ('"v2"', '"v1"'):
        with pytest.raises(TrustError, match="was asked for"):
            fetch(FakeSource(other[0], identity=etag), cache, 3, artifact_id=tiny[1].artifact_id)
    assert held(cache) == {tiny[1].artifact_id: (2,)}


# --- ranges are ignored ---


def test_a_source_without_ranges_is_read_to_the_end_of_the_prefix(tiny, cache):  # row_15
    data, header = tiny
    source = FakeSource(data, piece=4096)
    source.ranges = False
    for bit_width, waste in [(2, 0), (3, header.prefix_bytes(2))]:
        before = source.sent
        got = fetch(source, cache, bit_width)
        assert read_all(got.artifact) == prefix(data, header, bit_width)
        assert got.transfer.wasted_bytes == waste
        assert source.sent - before == header.prefix_bytes(bit_width)
    assert len(source.log) >= 1 + pulling.MAX_IGNORED + 1


def test_too_much_waste_is_refused_before_it_is_read(tiny, cache):  # row_15
    data, header = tiny
    source = FakeSource(data, piece=4096)
    source.ranges = False
    fetch(source, cache, 2)
    waste, sent = header.prefix_bytes(2), source.sent
    with pytest.raises(SourceError, match=f"`max_waste_bytes={waste}`, or publish it on a server"):
        fetch(source, cache, 3, max_waste_bytes=waste - 1)
    assert source.sent == sent
    fetch(source, cache, 3, max_waste_bytes=waste)


def test_a_stream_that_breaks_off_is_read_again_and_nothing_kept_twice(tiny, cache):
    data, _ = tiny
    source = FakeSource(data, piece=4096)
    source.ranges = False
    source.replies[0] = lambda body, got: body[: 3 * CHUNK]
    source.replies[1] = lambda body, got: body[: 5 * CHUNK]
    got = fetch(source, cache)
    assert read_all(got.artifact) == data
    assert got.transfer.wasted_bytes == 8 * CHUNK
    assert len(source.log) == 3


def test_a_stream_with_a_wrong_chunk_reads_that_again(tiny, cache):
    data, _ = tiny
    source = FakeSource(data)
    source.ranges = False
    source.replies[0] = lambda body, got: flipped(body, 3 * CHUNK)
    assert read_all(fetch(source, cache).artifact) == data


def test_one_reply_with_everything_is_a_whim(tiny, cache):  # row_15
    data, _ = tiny
    source = FakeSource(data)

    def before(source, number):
        source.ranges = number not in (3, 5)

    source.before = before
    got = fetch(source, cache, parallel=1)
    assert read_all(got.artifact) == data
    assert source.sent == len(data)


# --- servers that lie ---

NEVER_RIGHT = {"drip", "redirect-loop", "redirect-to-metadata"}  # slow; refused at once, see below
FOR_EVER = {  # what comes of a fault that never goes away; None: all is well all the same
    "gzip-if-offered": None,
    "busy": TransferError,
    "rate-limited": TransferError,
    "shifted": TransferError,
    "cut": TransferError,  # half of what is left comes each time, and of the last byte nothing
    "flip": (ArtifactError, TrustError),
    "gzip-bomb": TransferError,
    "redirect-loop": SourceError,
    "redirect-to-metadata": SourceError,
    "drip-head": TransferError,
    "stall": TransferError,
    "stall-body": TransferError,
}


@pytest.fixture
def impatient(monkeypatch):
    """HTTP that waits 0.15 s for a byte and 1 s for a head, and a client that waits 0.5 s."""
    from plyweight.delivery.http import HttpSource

    def get(source, into, bit_width=4, **options):
        return fetch(source, into, bit_width, **{"patience_s": 0.5} | options)

    get.source = lambda url: HttpSource(
        url, connect_timeout_s=1.0, read_timeout_s=0.15, head_timeout_s=1.0
    )
    return get


@pytest.mark.parametrize("mode", sorted(MODES.keys() - NEVER_RIGHT))
def test_a_server_that_lies_for_a_while_is_outlived(tiny, other, cache, impatient, mode):  # row_15
    data, header = tiny
    options = {"other": other[0], "after": 3} if mode.startswith("swapped") else {"times": 2}
    options = {} if mode.startswith(("redirect", "signed")) else options
    with hostile(data, mode, retry_after="0", **options) as server:
        source = impatient.source(server.url)
        try:
            got = impatient(source, cache, patience_s=20.0)
        except DigestError:
            assert mode in ("swapped-same-etag", "swapped-silently")
            assert set(held(cache)) <= {header.artifact_id, other[1].artifact_id}
            got = impatient(source, cache, refresh=True, patience_s=20.0)
        finally:
            source.close()
    whole = other[0] if mode.startswith("swapped") else data
    assert read_all(got.artifact) == whole
    assert len(ArtifactReader(got.artifact).verify()) == 3


@pytest.mark.parametrize("mode", [m for m in MODES if m != "drip"])  # being slow is no lie
def test_a_server_that_lies_for_ever_gets_nothing_published(
    tiny, other, cache, impatient, mode
):  # row_15, row_23, row_24
    data, header = tiny
    options = {"other": other[0], "after": 10**6} if mode.startswith("swapped") else {}
    with hostile(data, mode, retry_after="0", **options) as server:
        source = impatient.source(server.url)
        expected = FOR_EVER.get(mode)
        try:
            if expected is None:
                got = impatient(source, cache, artifact_id=header.artifact_id, patience_s=20.0)
                assert read_all(got.artifact) == data
            else:
                with pytest.raises(expected):
                    impatient(source, cache, artifact_id=header.artifact_id)
                assert blobs(cache) == []
        finally:
            source.close()


@pytest.mark.parametrize("mode", ["endless", "endless-length"])
def test_an_endless_body_is_left_where_it_should_have_ended(tiny, cache, impatient, mode):
    """Row 23: beyond what was asked for nothing is read but what the network had in its pipes."""
    data, _ = tiny
    with hostile(data, mode) as server:
        source = impatient.source(server.url)
        got = impatient(source, cache)
        source.close()
    assert got.transfer.received_bytes <= len(data)
    assert max(request.sent for request in server.requests) < 64 * 2**20


@pytest.mark.parametrize("mode", ["flip", "cut", "shifted", "short", "busy", "sometimes-whole"])
def test_every_second_reply_may_be_wrong(tiny, cache, impatient, mode):  # row_15
    data, _ = tiny
    with hostile(data, mode, when=odd, retry_after="0") as server:
        source = impatient.source(server.url)
        got = impatient(source, cache, patience_s=20.0, parallel=1)
        source.close()
    assert read_all(got.artifact) == data


def test_a_server_that_dies_and_comes_back_is_waited_for(tiny, cache, impatient):  # row_17
    data, _ = tiny
    with hostile(data, pace_s=0.001) as server:
        source = impatient.source(server.url)

        def die(step):
            if step.bytes_done > 3 * CHUNK and not died:
                died.append(server.sent)
                server.kill()
                server.restart()

        died = []
        got = impatient(source, cache, patience_s=20.0, progress=die)
        source.close()
    assert read_all(got.artifact) == data
    assert died


@pytest.mark.parametrize("gzip", [False, True])
def test_nginx_serves_a_prefix_and_its_upgrade(tiny, cache, tmp_path, gzip):
    data, header = tiny
    (tmp_path / "model").write_bytes(data)
    with nginx(tmp_path, gzip=gzip) as server:
        source = open_remote(f"{server.url}/model")
        for bit_width in (2, 4):
            got = fetch(source, cache, bit_width)
            assert read_all(got.artifact) == prefix(data, header, bit_width)
            assert got.transfer.wasted_bytes == 0
        source.close()


def test_a_server_without_ranges_serves_a_prefix(tiny, cache, tmp_path):
    data, header = tiny
    (tmp_path / "model").write_bytes(data)
    with plain_server(tmp_path) as server:
        source = open_remote(f"{server.url}/model")
        got = fetch(source, cache, 3)
        source.close()
    assert read_all(got.artifact) == prefix(data, header, 3)
    assert got.transfer.requests == 1
    assert got.transfer.wasted_bytes < 64 * 2**10  # of the last piece


# --- disks and other processes ---


def test_a_full_disk_is_noticed_before_anything_is_fetched(tiny, cache, monkeypatch):
    data, header = tiny
    needed = header.prefix_bytes(4) - header.data_start
    monkeypatch.setattr("plyweight.delivery.filling.free_bytes", lambda folder: needed - 1)
    source = FakeSource(data, piece=4096)
    with pytest.raises(OutputError, match=f"4 bits needs {needed} more bytes in .*, but"):
        fetch(source, cache)
    assert source.sent == header.data_start
    monkeypatch.setattr("plyweight.delivery.filling.free_bytes", lambda folder: needed)
    fetch(source, cache)


def test_what_is_evicted_meanwhile_is_fetched_again(tiny, cache):
    data, header = tiny

    def before(source, number):
        if source.log[number][0].start >= header.layers[2].byte_range.start and not evicted:
            evicted.append(cache.evict(header.artifact_id))

    evicted, source = [], FakeSource(data)
    source.before = before
    assert read_all(fetch(source, cache, parallel=1).artifact) == data
    assert evicted


def test_a_cache_that_forgets_all_the_time_is_given_up(tiny, cache):
    data, header = tiny

    def before(source, number):
        if source.log[number][0].start >= header.layers[1].byte_range.start:
            cache.evict(header.artifact_id)

    source = FakeSource(data)
    source.before = before
    with pytest.raises(OutputError, match="was fetched 3 times, and was gone each time"):
        fetch(source, cache, parallel=1)


def test_two_threads_fetch_a_layer_once(tiny, cache):
    data, _ = tiny
    source, got = FakeSource(data), []
    threads = [
        threading.Thread(target=lambda: got.append(fetch(source, Cache(cache.folder))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_all(one.artifact) for one in got] == [data] * 4
    whole = sum(asked.num_bytes for asked, _ in source.log if asked.start >= FIRST)
    assert whole <= len(data)  # the others waited; each may have asked for the first bytes


def test_whoever_holds_the_lock_and_gets_no_further_is_not_waited_for(tiny, cache):
    from plyweight.artifact import posix

    data, header = tiny
    source = FakeSource(data)
    fetch(source, cache, 2)
    lock = posix.try_lock(cache.folder / "artifacts" / header.artifact_id / "lock")
    assert lock is not None
    got = fetch(source, cache, 4, patience_s=0.2)
    assert read_all(got.artifact) == data


def test_delivery_builds_nothing_from_names_it_was_sent():  # row_22
    banned = {"pickle", "marshal", "shelve", "eval", "exec", "setattr", "__import__", "compile"}
    for folder in plyweight.delivery.__path__:
        for path in Path(folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = {getattr(node, "id", None), getattr(node, "module", None)}
                names |= {alias.name for alias in getattr(node, "names", []) if alias}
                assert not names & banned, (path.name, names & banned)


def test_the_client_starts_without_torch_and_without_a_network_library():
    code = (
        "import sys; import plyweight.delivery.client, plyweight.delivery.standing\n"
        "print(sorted({'torch', 'httpx2', 'obstore', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
