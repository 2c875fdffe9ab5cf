"""StandingFile: whole or not at all, extended without fetching what it has, never replaced."""

import os
import stat

import pytest
from delivery.fakes import (
    CHUNK,
    FakeSource,
    artifact,
    fail_from,
    fetch,
    files_in,
    flipped,
    prefix,
    read_all,
)

from plyweight.artifact import ArtifactReader
from plyweight.delivery import opening
from plyweight.delivery.cache import Cache
from plyweight.delivery.standing import StandingFile
from plyweight.errors import DigestError, OutputError, TransferError

FIRST = 32 * 2**10


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(opening, "FIRST_BYTES", FIRST)
    monkeypatch.setattr("plyweight.delivery.chunks.REQUEST_BYTES", CHUNK)
    monkeypatch.setattr("plyweight.delivery.retry.FIRST_S", 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("standing") / "tiny")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.layered.safetensors"


def cut_off(source, number, into, bit_width=4, **options):
    """A download whose line goes down at that request."""
    source.before = lambda source, current: fail_from(current, number)
    with pytest.raises(TransferError):
        fetch(source, into, bit_width, patience_s=0.05, **options)


@pytest.mark.parametrize("bit_width", [2, 3, 4])
def test_the_file_is_the_prefix_and_nothing_else_is_left(tiny, path, bit_width):
    data, header = tiny
    source = FakeSource(data)
    got = fetch(source, StandingFile(path), bit_width)
    assert path.read_bytes() == read_all(got.artifact) == prefix(data, header, bit_width)
    assert files_in(path.parent) == [path.name]
    assert source.sent == header.prefix_bytes(bit_width)
    assert len(ArtifactReader(path).verify()) == bit_width - 1


def test_an_interrupted_file_is_not_there_and_is_taken_up_again(tiny, path):
    data, _ = tiny
    source = FakeSource(data)
    cut_off(source, 5, StandingFile(path))
    assert not path.exists()
    assert [name.rsplit(".")[-1] for name in files_in(path.parent)] == ["journal", "part"]
    sent = source.sent
    again = FakeSource(data)
    fetch(again, StandingFile(path))
    assert path.read_bytes() == data
    assert files_in(path.parent) == [path.name]
    assert sent + again.sent <= len(data) + 4 * CHUNK + FIRST


@pytest.mark.parametrize("remembered", [False, True])
def test_a_narrower_file_is_extended_without_fetching_what_it_has(tiny, path, tmp_path, remembered):
    data, header = tiny
    refs = Cache(tmp_path / "cache").refs if remembered else None
    fetch(FakeSource(data), StandingFile(path), 2, refs=refs)
    path.chmod(0o640)
    source = FakeSource(data, piece=4096)
    got = fetch(source, StandingFile(path), 4, refs=refs)
    assert path.read_bytes() == read_all(got.artifact) == data
    missing = header.prefix_bytes(4) - header.prefix_bytes(2)
    assert source.sent == missing + (0 if remembered else header.data_start)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as it was


def test_a_wider_file_is_enough(tiny, path):
    data, header = tiny
    fetch(FakeSource(data), StandingFile(path), 4)
    before = path.stat()
    source = FakeSource(data)
    got = fetch(source, StandingFile(path), 2, artifact_id=header.artifact_id)
    assert (got.transfer.requests, source.log) == (0, [])
    assert read_all(got.artifact) == data
    assert path.stat() == before


def test_a_damaged_chunk_of_the_old_file_is_fetched_anew(tiny, path):
    data, header = tiny
    path.write_bytes(flipped(prefix(data, header, 2), header.data_start + 2 * CHUNK))
    source = FakeSource(data, piece=4096)
    fetch(source, StandingFile(path), 3)
    assert path.read_bytes() == prefix(data, header, 3)
    layer = header.layers[1].byte_range.num_bytes
    assert source.sent == header.data_start + CHUNK + layer


@pytest.mark.parametrize("bit_width", [2, 4])
def test_a_damaged_file_is_mended_when_it_is_read_again(tiny, path, bit_width):
    data, header = tiny
    pin = {"artifact_id": header.artifact_id}
    path.write_bytes(flipped(data, header.layers[1].byte_range.start + CHUNK + 1))
    source = FakeSource(data)
    fetch(source, StandingFile(path), bit_width, **pin)
    assert (source.log, path.read_bytes() == data) == ([], False)  # judged by whoever reads it
    fetch(source, StandingFile(path), bit_width, verify=True, **pin)
    assert path.read_bytes() == data  # as long as it was
    assert source.sent == header.layers[1].byte_range.num_bytes - CHUNK
    assert files_in(path.parent) == [path.name]
    before = path.stat()
    assert fetch(source, StandingFile(path), 4, verify=True, **pin).transfer.requests == 0
    assert path.stat() == before


def test_what_the_cache_holds_is_copied_and_not_fetched(tiny, path, tmp_path):
    data, header = tiny
    cache = Cache(tmp_path / "cache")
    fetch(FakeSource(data), cache, 3)
    source = FakeSource(data)
    fetch(source, StandingFile(path, cache=cache), 2, refs=cache.refs)
    assert path.read_bytes() == prefix(data, header, 2)
    assert source.log == []
    fetch(source, StandingFile(path, cache=cache), 4, refs=cache.refs)
    assert path.read_bytes() == data
    assert source.sent == header.layers[2].byte_range.num_bytes


def test_what_the_cache_has_damaged_is_fetched(tiny, path, tmp_path):
    data, header = tiny
    cache = Cache(tmp_path / "cache")
    fetch(FakeSource(data), cache, 2)
    blob = tmp_path / "cache" / "blobs" / "sha256" / header.layers[0].sha256
    content = flipped(blob.read_bytes(), CHUNK)
    blob.chmod(0o600)
    blob.write_bytes(content)
    source = FakeSource(data)
    fetch(source, StandingFile(path, cache=cache), 2, artifact_id=header.artifact_id)
    assert path.read_bytes() == prefix(data, header, 2)
    assert source.sent == CHUNK


def test_a_file_cut_by_other_tools_is_completed(tiny, path):
    data, header = tiny
    path.write_bytes(data[: header.data_start + 2 * CHUNK + 5])
    source = FakeSource(data, piece=4096)
    fetch(source, StandingFile(path), 3)
    assert path.read_bytes() == prefix(data, header, 3)
    assert source.sent == header.prefix_bytes(3) - 2 * CHUNK


def test_what_a_wider_download_had_got_is_not_fetched_again(tiny, path):
    data, header = tiny
    wide = FakeSource(data)
    cut_off(wide, 6, StandingFile(path), 4, parallel=1)
    source = FakeSource(data, piece=4096)
    fetch(source, StandingFile(path), 2)
    assert path.read_bytes() == prefix(data, header, 2)
    assert source.sent < header.prefix_bytes(2) - CHUNK
    fetch(FakeSource(data), StandingFile(path), 4)
    assert path.read_bytes() == data
    assert files_in(path.parent) == [path.name]


def test_another_artifact_is_not_replaced(tiny, path, tmp_path):
    other, _ = artifact(tmp_path / "other", (2, 3))
    path.write_bytes(other)
    with pytest.raises(OutputError, match=r"holds another artifact .* move it away, or give"):
        fetch(FakeSource(tiny[0]), StandingFile(path), 2)
    assert path.read_bytes() == other


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 5000, b"\xff" * 5000])
def test_another_file_is_refused_before_anything_is_asked(path, content):
    path.write_bytes(content)
    with pytest.raises(OutputError, match="exists and is no artifact, so it is not replaced"):
        StandingFile(path)
    assert path.read_bytes() == content


def test_places_where_no_file_can_be_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for where, words in [
        ("", "is a folder"),
        ("fifo", "not a regular"),
        ("no/x", "does not exist"),
    ]:
        with pytest.raises(OutputError, match=words):
            StandingFile(tmp_path / where)


def test_a_name_too_long_for_its_partial_file_is_refused(tiny, tmp_path):
    with pytest.raises(OutputError, match="File name too long"):
        fetch(FakeSource(tiny[0]), StandingFile(tmp_path / ("x" * 250)))
    assert files_in(tmp_path) == []


def test_a_link_is_followed_and_stays_a_link(tiny, path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    path.symlink_to(target)
    fetch(FakeSource(tiny[0]), StandingFile(path), 2)
    assert path.is_symlink()
    assert target.read_bytes() == prefix(*tiny, 2)


def test_a_new_file_has_the_usual_mode(tiny, path):
    before = os.umask(0o027)
    try:
        fetch(FakeSource(tiny[0]), StandingFile(path), 2)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_planted_partial_file_brings_no_byte_in(tiny, path):
    """Row 20: a half-filled file of somebody else's artifact, with a journal that claims it all."""
    data, header = tiny
    planted = path.with_name(f"{path.name}.01234567.part")
    planted.write_bytes(data[: header.data_start] + bytes(len(data) - header.data_start))
    planted.with_suffix(".journal").write_text(
        "".join(f"{i}/{j}\n" for i in (0, 1, 2) for j in range(9))
    )
    source = FakeSource(data)
    fetch(source, StandingFile(path))
    assert path.read_bytes() == data
    assert source.sent == len(data)


def test_what_is_wrong_three_times_leaves_the_old_file(tiny, path):
    data, header = tiny
    fetch(FakeSource(data), StandingFile(path), 2)
    bad = FakeSource(flipped(data, header.layers[1].byte_range.start))
    with pytest.raises(DigestError, match="chunk 0 of layer 1"):
        fetch(bad, StandingFile(path), 4)
    assert path.read_bytes() == prefix(data, header, 2)


def test_a_header_that_another_process_published_meanwhile_is_used(tiny, path):
    """Whoever waits for the lock finds the file there."""
    data, _ = tiny

    class Published(FakeSource):
        def get(self, byte_range, **options):
            if not path.exists():
                path.write_bytes(data)
            return super().get(byte_range, **options)

    source = Published(data, piece=4096)
    got = fetch(source, StandingFile(path))
    assert read_all(got.artifact) == data
    assert source.sent == tiny[1].data_start
