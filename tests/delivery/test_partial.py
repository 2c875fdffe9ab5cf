"""Partial: verified chunks survive, whatever claims otherwise; a file is published whole or not."""

import contextlib
import errno
import hashlib
import os
import stat

import pytest
from delivery.fakes import artifact, flipped, with_layers

from plyweight.artifact import Header, posix
from plyweight.delivery.chunks import Gatherer, chunks_of, plan
from plyweight.delivery.partial import Partial, partial_files
from plyweight.errors import DigestError, OutputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("partial") / "tiny")


@pytest.fixture
def begin(tiny, tmp_path):
    """Begin (or take up) the partial file of the base layer."""
    with contextlib.ExitStack() as stack:

        def partial(header=tiny[1], **options):
            options = {"header": header, "layers": [0], "published_mode": 0o400} | options
            partial = Partial(tmp_path / "blob", tmp_path / "0", **options)
            return stack.enter_context(contextlib.closing(partial))

        yield partial


def bytes_of(tiny, chunk):
    return memoryview(tiny[0])[chunk.byte_range.start : chunk.byte_range.stop]


def write(tiny, partial, chunks):
    for chunk in chunks:
        partial.write(chunk, bytes_of(tiny, chunk))


def journal_of(partial):
    return partial.path.with_suffix(".journal")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_there_the_next_time(tiny, begin):
    first = begin()
    chunks = first.missing
    assert first.missing_bytes == tiny[1].layers[0].byte_range.num_bytes
    write(tiny, first, chunks[1:3])
    first.close()
    again = begin()
    assert again.path == first.path
    assert again.missing == [chunks[0], *chunks[3:]]
    assert again.first_missing == chunks[0]
    assert again.missing_bytes == sum(c.byte_range.num_bytes for c in again.missing)


def test_a_complete_file_is_published_read_only_and_nothing_else_is_left(tiny, begin, tmp_path):
    partial = begin()
    *chunks, last = partial.missing
    assert not any(partial.write(chunk, bytes_of(tiny, chunk)) for chunk in chunks)
    assert partial.write(last, bytes_of(tiny, last))
    partial.publish()
    layer = tiny[1].layers[0]
    assert names(tmp_path) == ["blob"]
    assert stat.S_IMODE((tmp_path / "blob").stat().st_mode) == 0o400
    assert hashlib.sha256((tmp_path / "blob").read_bytes()).hexdigest() == layer.sha256


def test_a_lying_journal_is_not_believed(tiny, begin):  # row_17
    first = begin()
    chunks = first.missing
    write(tiny, first, chunks[:1])
    with journal_of(first).open("ab") as journal:
        journal.write(b"0/3\n0/4\n0/99\n7/0\n\xff\n0/" + b"1" * 40 + b"\n-1/0\n0/1")
    first.close()
    assert begin().missing == chunks[1:]


def test_a_poisoned_chunk_is_fetched_again_and_the_others_are_kept(tiny, begin, tmp_path):
    first = begin()
    chunks = first.missing
    write(tiny, first, chunks)
    first.close()
    with first.path.open("rb+") as file:
        file.seek(70_000)  # in chunk 1
        file.write(b"poison")
    again = begin()
    assert again.missing == chunks[1:2]
    write(tiny, again, chunks[1:2])
    again.publish()
    assert names(tmp_path) == ["blob"]


def test_a_chunk_that_changes_on_disk_before_it_is_published_is_named(tiny, begin, tmp_path):
    partial = begin()
    write(tiny, partial, partial.missing)
    with partial.path.open("rb+") as file:
        file.write(b"poison")
    with pytest.raises(DigestError, match="chunk 0 of layer 0 was changed"):
        partial.publish()
    assert not (tmp_path / "blob").exists()
    partial.close()
    assert [c.index for c in begin().missing] == [0]


def test_a_torn_line_of_the_journal_costs_its_chunk_only(tiny, begin):  # row_17
    first = begin()
    chunks = first.missing
    write(tiny, first, chunks[:3])
    os.truncate(journal_of(first), len("0/0\n0/1\n0"))
    first.close()
    again = begin()
    assert again.missing == chunks[2:]
    write(tiny, again, chunks[2:4])  # the first of these lines ends the torn one
    again.close()
    assert set(begin().missing) <= set(chunks[2:3] + chunks[4:])


def test_without_its_journal_every_chunk_is_looked_at(tiny, begin):  # row_17
    first = begin()
    chunks = first.missing
    write(tiny, first, chunks[1:3])
    first.close()
    journal_of(first).unlink()
    assert begin().missing == [chunks[0], *chunks[3:]]


def test_a_header_that_contradicts_itself_publishes_nothing(tiny, begin, tmp_path):
    data, _ = tiny

    def other_digest(layers):
        layers[0]["sha256"] = "0" * 64

    changed = with_layers(data, other_digest)
    partial = begin(Header.parse(changed))
    for chunk in partial.missing:
        partial.write(chunk, memoryview(changed)[chunk.byte_range.start : chunk.byte_range.stop])
    with pytest.raises(DigestError, match="contradicts itself"):
        partial.publish()
    assert names(tmp_path) == []


def test_whoever_renames_publishes_the_file_it_has_filled(tiny, begin, tmp_path):  # row_18
    """Without locks: one publishes, one begins anew, and one that shared with the first ends."""
    one, two = begin(), begin()
    assert one.path == two.path
    for partial in (one, two):
        write(tiny, partial, partial.missing)
    one.publish()
    three = begin()  # as by a process that had looked before
    write(tiny, three, three.missing[:1])
    two.publish()
    layer = tiny[1].layers[0]
    assert hashlib.sha256((tmp_path / "blob").read_bytes()).hexdigest() == layer.sha256
    write(tiny, three, three.missing)  # goes on unharmed
    three.publish()
    assert hashlib.sha256((tmp_path / "blob").read_bytes()).hexdigest() == layer.sha256
    assert names(tmp_path) == ["blob"]


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "other size", "other head"])
def test_only_our_own_file_of_the_right_size_is_taken_up(tiny, begin, tmp_path, kind):  # row_20
    first = begin(head=b"head")
    write(tiny, first, first.missing)
    first.close()
    victim = tmp_path / "victim"
    first.path.rename(victim)
    if kind == "symlink":
        first.path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, first.path)
    elif kind == "fifo":
        os.mkfifo(first.path)
    else:
        data = victim.read_bytes()
        first.path.write_bytes(data + b"x" if kind == "other size" else b"fork" + data[4:])
    before = victim.read_bytes()
    again = begin(head=b"head")
    assert again.path != first.path
    assert again.missing == list(chunks_of(tiny[1], [0]))
    write(tiny, again, again.missing[:1])
    assert victim.read_bytes() == before


def test_a_closed_file_is_not_written_to(tiny, begin):
    partial = begin()
    chunks = partial.missing
    partial.close()
    with pytest.raises(OutputError, match="was closed while it was filled"):
        partial.write(chunks[0], bytes_of(tiny, chunks[0]))
    assert begin().missing == chunks


@pytest.mark.parametrize("call", ["pwrite", "write", "ftruncate", "fsync"])
def test_a_full_disk_is_said_and_what_was_verified_stays(tiny, begin, tmp_path, monkeypatch, call):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish():
        with contextlib.closing(begin()) as partial:
            write(tiny, partial, partial.missing)
            partial.publish()

    if call != "ftruncate":  # which only a new file needs
        first = begin()
        write(tiny, first, first.missing[:2])
        first.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match="No space left on device"):
            finish()
    assert not (tmp_path / "blob").exists()
    assert call == "ftruncate" or len(begin().missing) <= 3
    finish()


def test_published_files_are_on_disk_before_they_have_their_name(
    tiny, begin, tmp_path, monkeypatch
):
    steps = []
    for name in ("fsync", "replace"):
        step = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, step=step: (steps.append(name), step(*a))[1]
        )
    partial = begin()
    write(tiny, partial, partial.missing)
    partial.publish()
    assert steps == ["fsync", "replace", "fsync"]  # the file, the name, the folder


def test_chunks_are_merged_into_runs_of_neighbours_of_at_most_8_mib(tiny):
    chunks = list(chunks_of(tiny[1], [0, 1, 2]))
    assert list(plan(chunks)) == [chunks]  # also over the ends of layers
    holes = [*chunks[:2], *chunks[3:4], *chunks[5:]]
    assert list(plan(holes)) == [chunks[:2], chunks[3:4], chunks[5:]]
    assert list(plan([])) == []


def test_runs_are_cut_at_their_largest_size(tiny, monkeypatch):
    monkeypatch.setattr("plyweight.delivery.chunks.REQUEST_BYTES", 2 * 64 * 2**10)
    chunks = list(chunks_of(tiny[1], [0]))
    assert list(plan(chunks)) == [chunks[:2], chunks[2:4], chunks[4:]]


@pytest.mark.parametrize("piece", [1000, 65_536, 10**6])
def test_a_gatherer_takes_what_it_wants_of_a_stream_and_no_more(tiny, piece):
    data, header = tiny
    chunks = list(chunks_of(header, [0, 1]))
    wanted, kept = chunks[1:3] + chunks[5:6], {}
    gatherer = Gatherer(
        wanted, keep=lambda c, view: kept.__setitem__(c, bytes(view)), reject=pytest.fail
    )
    taken = 0
    for start in range(0, len(data), piece):
        taken += gatherer.feed(start, memoryview(data)[start : start + piece])
    assert kept == {c: bytes(data[c.byte_range.start : c.byte_range.stop]) for c in wanted}
    assert taken == sum(c.byte_range.num_bytes for c in wanted)
    assert gatherer.done
    assert gatherer.wanted.num_bytes == gatherer.wanted_bytes == 0


def test_a_gatherer_rejects_a_chunk_with_one_wrong_bit(tiny):  # row_11
    data, header = tiny
    chunks, kept, rejected = list(chunks_of(header, [0])), [], []
    gatherer = Gatherer(chunks, keep=lambda c, view: kept.append(c), reject=rejected.append)
    wrong = flipped(data, chunks[2].byte_range.start + 5)
    gatherer.feed(0, memoryview(wrong))
    assert rejected == gatherer.rejected == chunks[2:3]
    assert kept == chunks[:2] + chunks[3:]


def test_bytes_that_were_left_out_are_noticed(tiny):
    chunks = list(chunks_of(tiny[1], [0]))
    gatherer = Gatherer(chunks, keep=pytest.fail, reject=pytest.fail)
    with pytest.raises(ValueError, match="left out"):
        gatherer.feed(chunks[0].byte_range.start + 1, memoryview(b"abc"))


def test_partial_files_of_others_are_not_listed(tmp_path):
    for name in ("0.part", "0.0123abcd.part", "0.0123abcd.journal", "00.0123abcd.part", "0.x.part"):
        (tmp_path / name).touch()
    assert [path.name for path in partial_files(tmp_path / "0")] == ["0.0123abcd.part"]


def test_locks_are_advisory(tmp_path, monkeypatch):
    import fcntl

    first = posix.try_lock(tmp_path / "lock")
    assert posix.try_lock(tmp_path / "lock") is None

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    second = posix.try_lock(tmp_path / "lock")
    assert second is not None
    os.close(first)
    os.close(second)
