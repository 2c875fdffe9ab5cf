"""Cache: layers appear whole, are ours alone, and stay with whoever has them open."""

import contextlib
import hashlib
import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from delivery.fakes import NAME, FakeSource, artifact, fetch, files_in, prefix, read_all

from plyweight.artifact import ArtifactReader, ByteRange, FileSource, posix
from plyweight.delivery.cache import Cache, default_folder
from plyweight.delivery.refs import Ref, check_digest
from plyweight.delivery.source import LocalSource
from plyweight.delivery.standing import StandingFile
from plyweight.errors import (
    BitWidthError,
    DigestError,
    OutputError,
    RangeError,
    SourceError,
    TrustError,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("cache") / "tiny")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def filled(tiny, cache):
    """A cache that holds all of the artifact."""
    fetch(FakeSource(tiny[0]), cache).artifact.close()
    return cache


def blob(cache, header, layer):
    return cache.folder / "blobs" / "sha256" / header.layers[layer].sha256


def replace(path, data):
    """As an attacker with our rights would: another file under the same name."""
    other = path.with_name("other")
    other.write_bytes(data)
    other.chmod(0o400)
    other.replace(path)


# --- where and what ---


def test_the_folder_is_found_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PLYWEIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "plyweight"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "plyweight"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "plyweight"
    monkeypatch.setenv("PLYWEIGHT_CACHE", str(tmp_path / "own"))
    assert Cache().folder == tmp_path / "own"
    assert not (tmp_path / "own").exists()  # until something is put into it


def test_an_artifact_is_cached_as_its_header_and_one_file_for_each_layer(tiny, filled):
    _, header = tiny
    name = hashlib.sha256(NAME.encode()).hexdigest()
    layers = [f"blobs/sha256/{layer.sha256}" for layer in header.layers]
    assert files_in(filled.folder) == sorted(
        [f"artifacts/{header.artifact_id}/header", f"refs/{name}", *layers]
    )
    for index in range(3):
        assert stat.S_IMODE(blob(filled, header, index).stat().st_mode) == 0o400
    folders = [filled.folder, *(p for p in filled.folder.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_reader_sees_the_layers_as_the_prefix_of_one_file(tiny, filled):
    data, header = tiny
    for bit_width in header.bit_widths:
        with contextlib.closing(filled.open(header.artifact_id, bit_width)) as cached:
            assert read_all(cached) == prefix(data, header, bit_width)
            reader = ArtifactReader(cached)
            assert reader.held_bit_widths == tuple(b for b in header.bit_widths if b <= bit_width)
            assert len(reader.verify()) == len(reader.held_bit_widths)


@pytest.mark.parametrize("copy", [False, True])
def test_any_range_reads_as_it_stands_in_the_file(tiny, filled, copy):
    data, header = tiny
    bounds = [0, 7, header.data_start, *(x.byte_range.stop for x in header.layers)]
    bounds += [bound - 1 for bound in bounds[2:]]
    cache = Cache(filled.folder, copy=copy)
    with contextlib.closing(cache.open(header.artifact_id)) as cached:
        for start, stop in itertools.combinations(sorted(bounds), 2):
            assert cached.read(ByteRange(start, stop)) == data[start:stop]
            assert cached.read_view(ByteRange(start, stop)) == data[start:stop]
        for wrong in (ByteRange(-1, 3), ByteRange(5, 4), ByteRange(0, len(data) + 1)):
            with pytest.raises(RangeError, match="ask inside those"):
                cached.read(wrong)


@pytest.mark.parametrize("copy", [False, True])
def test_what_is_written_to_a_view_reaches_no_file(tiny, filled, copy):
    data, header = tiny
    cache = Cache(filled.folder, copy=copy)
    with contextlib.closing(cache.open(header.artifact_id)) as cached:
        view = cached.read_view(header.layers[1].byte_range)
        view[:4] = b"mine"
        assert read_all(cached) == data
    assert bytes(view[:4]) == b"mine"  # and outlives the artifact


def test_the_listing_says_what_is_held(tiny, cache):
    data, header = tiny
    assert cache.artifacts() == ()
    assert cache.num_bytes == 0
    fetch(FakeSource(data), cache, 3)
    (entry,) = cache.artifacts()
    assert (entry.artifact_id, entry.model, entry.revision) == (header.artifact_id, "tiny", 3)
    assert entry.bit_widths == (2, 3)
    assert entry.num_bytes == header.prefix_bytes(3)
    assert cache.num_bytes >= entry.num_bytes


def test_what_is_not_held_is_said(tiny, cache):
    data, header = tiny
    with pytest.raises(SourceError, match=r"is not in .* fetch it first"):
        cache.open(header.artifact_id)
    fetch(FakeSource(data), cache, 2)
    with pytest.raises(SourceError, match="has only its first 2; fetch the others"):
        cache.open(header.artifact_id, 4)
    with pytest.raises(BitWidthError, match="stores 2, 3, 4"):
        cache.open(header.artifact_id, 5)


def test_a_closed_artifact_says_so(tiny, filled):
    cached = filled.open(tiny[1].artifact_id)
    cached.close()
    with pytest.raises(SourceError, match="is closed"):
        cached.read(ByteRange(0, 9000))
    with pytest.raises(SourceError, match="is closed"):
        cached.read_view(ByteRange(0, 9))


def test_files_are_closed_with_the_artifact(tiny, filled):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        filled.open(tiny[1].artifact_id)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_layer_without_bytes_needs_no_file(tiny, cache, tmp_path):
    from artifact.builders import WEIGHTS, content, layer_contents

    from plyweight.artifact import LayerContent, LayeredWeight, write_artifact

    pinned = {name: LayeredWeight(w.shape, w.group_size, 8) for name, w in WEIGHTS.items()}
    base = layer_contents((8,))[0].tensors
    changes = {"weights": pinned, "activations": {}, "evaluation": None}
    layers = [LayerContent(2, base), LayerContent(3, []), LayerContent(8, [])]
    write_artifact(tmp_path / "pinned", **content((2, 3, 8)) | changes | {"layers": layers})
    source = FakeSource((tmp_path / "pinned").read_bytes())
    cached = fetch(source, cache, 8).artifact
    assert ArtifactReader(cached).held_bit_widths == (2, 3, 8)
    assert len(ArtifactReader(cached).verify()) == 3
    assert len(files_in(cache.folder / "blobs")) == 1


# --- evicting ---


def test_evicting_above_a_width_keeps_what_it_needs(tiny, filled):
    data, header = tiny
    freed = filled.evict(header.artifact_id, keep_bit_width=3)
    assert freed == header.layers[2].byte_range.num_bytes
    assert filled.artifacts()[0].bit_widths == (2, 3)
    assert read_all(filled.open(header.artifact_id)) == prefix(data, header, 3)
    assert filled.evict(header.artifact_id, keep_bit_width=3) == 0


def test_evicting_an_artifact_leaves_the_memory_of_its_name(tiny, filled):
    _, header = tiny
    assert filled.evict(header.artifact_id) == header.file_bytes - header.data_start
    assert filled.artifacts() == ()
    assert [name.split("/")[0] for name in files_in(filled.folder)] == ["refs"]
    assert filled.refs.get(NAME).artifact_id == header.artifact_id
    assert filled.evict(header.artifact_id) == 0


def test_evicting_an_unknown_width_is_refused(tiny, filled):
    with pytest.raises(BitWidthError, match="stores 2, 3, 4"):
        filled.evict(tiny[1].artifact_id, keep_bit_width=5)
    assert filled.artifacts()[0].bit_widths == (2, 3, 4)


def test_a_layer_that_another_artifact_names_is_not_evicted(tiny, filled, tmp_path):
    _, header = tiny
    other_data, other = artifact(tmp_path / "other", (2, 3))  # the same planes, other header
    assert other.artifact_id != header.artifact_id
    assert [x.sha256 for x in other.layers] == [x.sha256 for x in header.layers[:2]]
    moved = fetch(FakeSource(other_data, name="https://models.example/other"), filled, 3)
    assert moved.transfer.requests == 1  # its header; the layers are there
    assert filled.evict(header.artifact_id) == header.layers[2].byte_range.num_bytes
    assert read_all(filled.open(other.artifact_id)) == other_data


def test_readers_keep_what_is_evicted_under_load(tiny, cache):  # row_21, row_28
    """Threads read and map while another fetches and evicts: every byte is right, or refused."""
    data, header = tiny
    source, stop, wrong, reads = LocalSource(FakeSourceFile(data)), threading.Event(), [], [0]

    def read():
        while not stop.is_set():
            try:
                with contextlib.closing(cache.open(header.artifact_id)) as cached:
                    size = cached.size()
                    views = [cached.read_view(x.byte_range) for x in cached.layers]
                    if b"".join(views) != data[header.data_start : size]:
                        wrong.append("view")
                    if cached.read(ByteRange(0, size)) != data[:size]:
                        wrong.append("read")
                    reads[0] += 1
            except SourceError:
                pass  # nothing there at this moment

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(24):
            got = fetch(source, cache, (2, 3, 4)[number % 3])
            assert read_all(got.artifact)[: got.header.prefix_bytes(got.bit_width)] == prefix(
                data, header, got.bit_width
            )
            got.artifact.close()
            cache.evict(header.artifact_id, keep_bit_width=2 if number % 2 else None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert reads[0]


class FakeSourceFile:
    """A local source in memory."""

    def __init__(self, data):
        self.data, self.name = data, "memory"

    def size(self):
        return len(self.data)

    def read(self, byte_range):
        return bytearray(self.data[byte_range.start : byte_range.stop])


# --- who could have put it there ---


DIGITS = "0" * 63


@pytest.mark.parametrize(  # row_19
    "artifact_id",
    [
        *("../../etc/passwd", "/etc/passwd", "", ".", None, 7, b"0" * 64),
        *(DIGITS, DIGITS + "00", "A" * 64, DIGITS + "\0", DIGITS + "0\n", DIGITS + "/"),
        *("C:" + DIGITS[1:], "\N{ARABIC-INDIC DIGIT ZERO}" * 64, "\N{FULLWIDTH DIGIT ZERO}" * 64),
    ],
)
def test_only_64_digits_ever_become_a_path(tiny, filled, artifact_id):
    calls = [
        lambda: check_digest(artifact_id),
        lambda: filled.open(artifact_id),
        lambda: filled.evict(artifact_id),
        lambda: filled.raw_header(artifact_id),
    ]
    if artifact_id is not None:
        calls.append(lambda: fetch(FakeSource(tiny[0]), filled, artifact_id=artifact_id))
    before = files_in(filled.folder.parent)
    for call in calls:
        with pytest.raises(SourceError, match="64 hexadecimal digits"):
            call()
    assert files_in(filled.folder.parent) == before


@pytest.mark.parametrize(  # row_19
    "name", ["../../x", "https://h/../../x", "C:\\x", "\0", "\ud800", "ünï", "/", "", "x" * 10_000]
)
def test_a_name_never_becomes_a_path(tiny, cache, name):
    fetch(FakeSource(tiny[0], name=name), cache, 2)
    assert cache.refs.get(name).name == name
    stored = [file for file in files_in(cache.folder) if file.startswith("refs/")]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    assert stored == [f"refs/{digest}"]


@pytest.mark.parametrize("kind", ["symlink", "hard link", "short", "long", "folder", "fifo"])
def test_a_layer_that_is_not_our_own_file_is_replaced_and_never_read(
    tiny, filled, tmp_path, kind
):  # row_10, row_20
    data, header = tiny
    path, victim = blob(filled, header, 1), tmp_path / "victim"
    content = path.read_bytes()
    victim.write_bytes(content)
    path.unlink()
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content[:-1] if kind == "short" else content + b"\0")
    assert filled.artifacts()[0].bit_widths == (2,)
    with pytest.raises(SourceError, match="has only its first 2"):
        filled.open(header.artifact_id, 4)
    if kind == "folder":  # which no rename replaces
        with pytest.raises(OutputError, match="cannot be written"):
            fetch(FakeSource(data), filled)
        return
    assert read_all(fetch(FakeSource(data), filled).artifact) == data
    assert stat.S_ISREG(path.lstat().st_mode)
    assert victim.read_bytes() == content


@pytest.mark.parametrize("user", [-1, +1])
def test_files_of_another_user_are_not_read(tiny, filled, monkeypatch, user):  # row_20
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + user)
    assert filled.raw_header(tiny[1].artifact_id) is None
    with pytest.raises(SourceError, match="fetch it first"):
        filled.open(tiny[1].artifact_id)
    with pytest.raises(OutputError, match=f"belongs to user {mine} and not to you"):
        fetch(FakeSource(tiny[0], name="another"), filled)


def test_a_cache_that_is_a_file_is_refused_before_anything_is_asked(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"file is not a folder; choose another one"):
        Cache(tmp_path / "file")


def test_a_folder_where_others_may_write_is_refused(tiny, tmp_path):  # row_20
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(OutputError, match=r"others may write in .* run `chmod 700 "):
        fetch(FakeSource(tiny[0]), Cache(shared))
    assert files_in(shared) == []


def test_a_layer_replaced_between_verifying_and_reading_stays_the_old_one(tiny, filled):  # row_20
    data, header = tiny
    cached = filled.open(header.artifact_id)
    for layer in range(3):
        path = blob(filled, header, layer)
        replace(path, bytes(path.stat().st_size))
    assert len(ArtifactReader(cached).verify()) == 3
    assert read_all(cached) == data
    with pytest.raises(DigestError, match="chunk 0 of layer 0"):
        ArtifactReader(filled.open(header.artifact_id)).verify()


@pytest.mark.parametrize("copy", [False, True])
def test_a_layer_replaced_between_verifying_and_mapping_is_not_seen(
    tiny, filled, monkeypatch, copy
):  # row_20
    """The digests are computed over the very memory that is handed out."""
    _, header = tiny
    cached = Cache(filled.folder, copy=copy).open(header.artifact_id)
    reader = ArtifactReader(cached)
    expected = {name: bytes(view.data) for name, view in reader.read_layer(1).items()}
    check = ArtifactReader._check_chunks

    def replaced_afterwards(self, index, layer, buffer):
        check(self, index, layer, buffer)
        replace(blob(filled, header, 1), bytes(layer.byte_range.num_bytes))

    monkeypatch.setattr(ArtifactReader, "_check_chunks", replaced_afterwards)
    found = {name: bytes(view.data) for name, view in reader.read_layer(1).items()}
    assert found == expected


@pytest.mark.parametrize("cut", [-1, 0, 1])
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_layer_cut_anywhere_is_not_held(tiny, filled, chunk, cut):  # row_10
    _, header = tiny
    path = blob(filled, header, 1)
    size = min(chunk * 64 * 2**10 + cut, path.stat().st_size - 1)
    replace(path, path.read_bytes()[: max(0, size)])
    assert filled.artifacts()[0].bit_widths == (2,)


@pytest.mark.parametrize("kept", [0, 65_535, 65_536, 65_537])
def test_a_layer_extended_by_zeros_to_its_size_is_refused(tiny, filled, kept):  # row_10
    _, header = tiny
    path = blob(filled, header, 1)
    size = path.stat().st_size
    replace(path, path.read_bytes()[:kept])
    path.chmod(0o600)
    os.truncate(path, size)
    path.chmod(0o400)
    reader = ArtifactReader(filled.open(header.artifact_id))
    with pytest.raises(DigestError, match=f"chunk {kept // 65_536} of layer 1"):
        reader.read_layer(1)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_damaged_layer_is_found_and_fetched_again(tiny, filled, by_hand):  # row_11
    data, header = tiny
    path = blob(filled, header, 1)
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    replace(path, content)
    if by_hand:
        assert filled.repair(header.artifact_id) == (1,)
        assert filled.repair(header.artifact_id) == ()
        assert filled.repair("0" * 64) == ()
    source = FakeSource(data)
    assert read_all(fetch(source, filled, verify=not by_hand).artifact) == data
    assert source.sent == header.layers[1].byte_range.num_bytes


def test_a_damaged_header_counts_as_missing_and_is_replaced(tiny, filled):
    data, header = tiny
    path = filled.folder / "artifacts" / header.artifact_id / "header"
    path.write_bytes(path.read_bytes()[:-1] + b"\t")
    assert filled.artifacts() == ()
    assert read_all(fetch(FakeSource(data), filled).artifact) == data
    assert filled.artifacts()[0].bit_widths == (2, 3, 4)


CUT_WHILE_READ = """
import os, sys
from plyweight.artifact import ByteRange
from plyweight.delivery.cache import Cache

cached = Cache(sys.argv[1], copy=True).open(sys.argv[2])
layer = cached.layers[1]
path = os.path.join(sys.argv[1], "blobs", "sha256", layer.sha256)
os.chmod(path, 0o600)
os.truncate(path, 100)
try:
    cached.read_view(layer.byte_range)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_in_copy_mode_a_file_that_is_cut_is_an_error_and_no_crash(tiny, filled):  # row_21
    command = [sys.executable, "-c", CUT_WHILE_READ, filled.folder, tiny[1].artifact_id]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("SourceError a layer of tiny")
    assert "was cut by somebody else" in done.stdout


# --- what a name stands for ---


def test_a_name_is_remembered(tiny, filled):
    ref = filled.refs.get(NAME)
    assert ref == Ref(NAME, tiny[1].artifact_id, "tiny", 3, '"v1"')
    assert filled.refs.get("https://elsewhere") is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"name": "x"}', '{"artifact_id": "../x"}', "[" * 9000, "x" * 70_000],
)  # fmt: skip
def test_a_damaged_note_is_not_taken_for_a_first_use(tiny, filled, text):  # row_14
    (path,) = (filled.folder / "refs").iterdir()
    path.write_text(text)
    with pytest.raises(TrustError, match=f"is damaged .* delete {path}"):
        fetch(FakeSource(tiny[0]), filled)


def test_a_note_that_is_a_link_is_not_believed(tiny, filled, tmp_path):  # row_20
    (path,) = (filled.folder / "refs").iterdir()
    note = json.loads(path.read_text())
    path.unlink()
    (tmp_path / "mine").write_text(json.dumps(note | {"revision": 0}))
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(TrustError, match="symbolic link"):
        fetch(FakeSource(tiny[0]), filled)


# --- Windows, as far as it can be argued from here ---


def test_without_posix_a_cache_refuses_and_whole_files_read(tiny, tmp_path, monkeypatch):
    (tmp_path / "whole").write_bytes(tiny[0])
    monkeypatch.setattr(posix, "POSIX", False)
    refused = [
        Cache,
        lambda: StandingFile(tmp_path / "file"),
        lambda: posix.open_private(tmp_path / "whole"),
        lambda: posix.open_to_fill(tmp_path / "file"),
        lambda: posix.create_private_folder(tmp_path / "folder"),
        lambda: posix.map_file(0, 1),
    ]
    for call in refused:
        with pytest.raises(OutputError, match="reading whole local files works"):
            call()
    assert len(ArtifactReader(tmp_path / "whole").verify()) == 3
    assert files_in(tmp_path) == ["whole"]


def test_posix_calls_stand_in_one_file():
    source = Path(posix.__file__).parents[1]
    calls = ("pwrite", "pread", "O_NOFOLLOW", "O_CLOEXEC", "flock", "fcntl", "getuid",
             "fchmod", "statvfs", "ftruncate", "import mmap")  # fmt: skip
    for path in [*(source / "artifact").glob("*.py"), *(source / "delivery").glob("*.py")]:
        code = "\n".join(
            line.split("#")[0] for line in path.read_text().splitlines() if '"""' not in line
        )
        used = [call for call in calls if f"os.{call}" in code or f"{call}\n" in code]
        assert path.name == "posix.py" or not used, path


def test_a_file_source_needs_nothing_of_the_cache(tiny, tmp_path):
    (tmp_path / "whole").write_bytes(tiny[0])
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from plyweight.artifact import ArtifactReader\n"
        f"print(len(ArtifactReader({str(tmp_path / 'whole')!r}).verify()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    assert FileSource(tmp_path / "whole").size() == len(tiny[0])
