"""Split and join: the parts put together are the file, and nothing else is accepted for it."""

import json
import os

import pytest
from artifact.builders import BIT_WIDTHS, big_content, build, layer_contents, source, with_field

from plyweight.artifact import (
    ArtifactReader,
    ByteRange,
    Header,
    Sidecar,
    SplitSource,
    join,
    split,
    verify,
    write_artifact,
)
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    DigestError,
    HeaderError,
    OutputError,
    RangeError,
    SourceError,
    TruncatedError,
    TrustError,
)

FILES = ["header.bin", "layer-0.bin", "layer-1.bin", "layer-2.bin"]


@pytest.fixture
def data(tmp_path):
    return build(tmp_path / "whole")


@pytest.fixture
def folder(tmp_path, data):
    split(tmp_path / "whole", tmp_path / "parts")
    return tmp_path / "parts"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def change(folder, changes):
    """``layers.json`` with ``changes`` applied to what it says."""
    path = folder / "layers.json"
    value = json.loads(path.read_text())
    changed = changes(value)
    path.write_text(json.dumps(value if changed is None else changed))


# --- round trips -------------------------------------------------------------------------------


def test_the_parts_one_after_the_other_are_the_file(folder, data):
    assert names(folder) == sorted([*FILES, "layers.json"])
    assert b"".join((folder / name).read_bytes() for name in FILES) == data


def test_joining_gives_the_same_bytes(folder, data, tmp_path):
    header = join(folder, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data
    assert header == Header.parse(data)


def test_layers_of_several_chunks_and_of_none_are_split_and_joined(tmp_path):
    write_artifact(tmp_path / "big", **big_content())
    split(tmp_path / "big", tmp_path / "parts")
    join(tmp_path / "parts", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "big").read_bytes()


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_a_prefix_of_the_layers_joins_to_a_prefix_of_the_file(folder, data, tmp_path, bit_width):
    stop = Header.parse(data).prefix_bytes(bit_width)
    join(folder, tmp_path / "asked", bit_width=bit_width)
    assert (tmp_path / "asked").read_bytes() == data[:stop]
    for index in range(BIT_WIDTHS.index(bit_width) + 1, 3):
        (folder / f"layer-{index}.bin").unlink()
    join(folder, tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == data[:stop]
    assert verify(SplitSource(folder)) == Header.parse(data).layers_for(bit_width)


def test_a_prefix_is_split_into_the_layers_it_holds_and_the_same_sidecar(folder, data, tmp_path):
    split(source(data[: Header.parse(data).prefix_bytes(3)]), tmp_path / "prefix")
    assert names(tmp_path / "prefix") == sorted([*FILES[:3], "layers.json"])
    sidecars = [(tmp_path / f / "layers.json").read_bytes() for f in ("parts", "prefix")]
    assert sidecars[0] == sidecars[1]


def test_a_layer_without_bytes_is_held_with_the_one_before_it(tmp_path):
    layers = layer_contents()
    content = big_content()
    tensors = content["layers"][0].tensors
    planes = type(tensors[0])("w.q", "U8", (8, 65536), bytes(8 * 65536))
    weight = type(content["weights"]["w"])((512, 1024), None, 8)
    rest = [type(layers[0])(width, []) for width in (3, 8)]
    content |= {"layers": [type(layers[0])(2, [planes, tensors[1]]), *rest]}
    write_artifact(tmp_path / "pinned", **content | {"weights": {"w": weight}})
    split(tmp_path / "pinned", tmp_path / "parts")
    (tmp_path / "parts" / "layer-1.bin").unlink()  # nothing is in it
    join(tmp_path / "parts", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "pinned").read_bytes()
    (tmp_path / "parts" / "layer-0.bin").unlink()
    with pytest.raises(SourceError, match=r"lacks layer-0\.bin"):
        SplitSource(tmp_path / "parts")


def test_a_split_source_gives_any_range_of_the_file(folder, data):
    parts = SplitSource(folder)
    assert parts.size() == len(data)
    header = parts.header.data_start
    for start, stop in [(0, 0), (0, 8), (5, header), (header - 3, header + 3), (1, len(data) - 1)]:
        assert parts.read(ByteRange(start, stop)) == data[start:stop]
    with pytest.raises(RangeError, match=f"has {len(data)} bytes"):
        parts.read(ByteRange(0, len(data) + 1))


def test_layers_are_read_from_the_parts_as_from_the_file(folder, data):
    whole, parts = ArtifactReader(source(data)), ArtifactReader(SplitSource(folder))
    for index in range(3):
        one, other = whole.read_layer(index), parts.read_layer(index)
        assert {n: bytes(v.data) for n, v in one.items()} == {
            n: bytes(v.data) for n, v in other.items()
        }


# --- the sidecar -------------------------------------------------------------------------------


def test_the_sidecar_is_what_the_page_prints(folder, data):
    header = Header.parse(data)
    assert json.loads((folder / "layers.json").read_bytes()) == {
        "schema": 1,
        "artifact": f"sha256:{header.artifact_id}",
        "revision": 3,
        "header_bytes": header.data_start,
        "size": len(data),
        "header": {"file": "header.bin", "offset": 0},
        "layers": [
            {
                "sha256": layer.sha256,
                "bytes": layer.byte_range.num_bytes,
                "file": f"layer-{index}.bin",
                "offset": 0,
            }
            for index, layer in enumerate(header.layers)
        ],
    }


@pytest.mark.parametrize("file", [None, "tiny.layered.safetensors"])
def test_a_sidecar_is_emitted_as_it_was_parsed_and_the_same_every_time(data, file):
    sidecar = Sidecar.of(Header.parse(data), file=file)
    assert Sidecar.parse(sidecar.emit()) == sidecar
    assert Sidecar.parse(sidecar.emit()).emit() == sidecar.emit()
    assert sidecar.size == len(data)


def test_a_sidecar_may_say_where_the_parts_lie_in_one_file(tmp_path, data):
    header = Header.parse(data)
    (tmp_path / "layers.json").write_bytes(Sidecar.of(header, file="whole").emit())
    join(tmp_path, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data
    (tmp_path / "whole").write_bytes(data[: header.prefix_bytes(2)])
    assert SplitSource(tmp_path).size() == header.prefix_bytes(2)
    (tmp_path / "whole").write_bytes(data[: header.prefix_bytes(2) + 1])
    with pytest.raises(TruncatedError, match=r"whole has \d+ bytes, but its part"):
        SplitSource(tmp_path)


BAD_NAMES = ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "C:x", "a\0b", "ä", "-a", ".a"]


def with_layer(**changes):
    return lambda value: value["layers"][0].update(changes)


CHANGES = {
    **{f"file {name!r}": with_layer(file=name) for name in [*BAD_NAMES, "x" * 129, 5, None]},
    "header file": lambda v: v["header"].update(file="../header.bin"),
    "schema 2": lambda v: v.update(schema=2),
    "schema true": lambda v: v.update(schema=True),
    "no schema": lambda v: v.pop("schema"),
    "extra": lambda v: v.update(extra=1),
    "extra of a layer": with_layer(extra=1),
    "extra of the header": lambda v: v["header"].update(extra=1),
    "no layers": lambda v: v.update(layers=[]),
    "33 layers": lambda v: v.update(layers=v["layers"] * 11),
    "id without its algorithm": lambda v: v.update(artifact="0" * 64),
    "id of capitals": lambda v: v.update(artifact="sha256:" + "A" * 64),
    "digest": with_layer(sha256="00"),
    "offset": with_layer(offset=8),
    "negative": with_layer(bytes=-1),
    "float": with_layer(bytes=1.0),
    "size": lambda v: v.update(size=v["size"] + 1),
    "a list": lambda v: [v],
    "revision": lambda v: v.update(revision=4),
    "digest of another layer": lambda v: v["layers"][0].update(sha256=v["layers"][1]["sha256"]),
    "one layer less": lambda v: v.update(size=v["size"] - v["layers"].pop()["bytes"]),
    "header_bytes": lambda v: v.update(header_bytes=v["header_bytes"] + 8, size=v["size"] + 8),
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_sidecar_that_breaks_a_rule_or_disagrees_with_the_header_is_refused(
    folder, tmp_path, changes
):
    change(folder, changes)
    with pytest.raises(ArtifactError):
        join(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b'{"schema":1,"schema":1}', b"[" * 1000, b" " * 70_000]
)
def test_bytes_that_are_no_sidecar_are_refused(folder, raw):
    (folder / "layers.json").write_bytes(raw)
    with pytest.raises(HeaderError, match=r"layers\.json"):
        SplitSource(folder)


# --- what is wrong with the parts ----------------------------------------------------------------


def flip(path, position=0):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_changed_byte_of_any_layer_leaves_nothing(folder, tmp_path, index):
    (tmp_path / "again").write_bytes(b"before")
    flip(folder / f"layer-{index}.bin", 5)
    with pytest.raises(DigestError, match=rf"chunk 0 of layer {index} \(. bits\) of .*parts"):
        join(folder, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"before"
    assert names(tmp_path) == ["again", "parts", "whole"]


def test_a_changed_header_is_refused(folder, tmp_path):
    raw = (folder / "header.bin").read_bytes()
    (folder / "header.bin").write_bytes(raw.replace(b"tiny", b"tony"))
    with pytest.raises(HeaderError, match=r"layers\.json states as artifact"):
        join(folder, tmp_path / "again")


def test_a_layer_of_another_artifact_is_refused(folder, tmp_path):
    build(tmp_path / "other", layers=layer_contents(seed=7))
    split(tmp_path / "other", tmp_path / "others")
    (tmp_path / "others" / "layer-1.bin").replace(folder / "layer-1.bin")
    with pytest.raises(DigestError, match="layer 1"):
        join(folder, tmp_path / "again")


def test_a_header_that_contradicts_itself_is_refused_by_split_and_by_join(tmp_path):
    write_artifact(tmp_path / "big", **big_content())
    data = (tmp_path / "big").read_bytes()
    bad = with_field(data, "layered.layers", lambda v: v[0].update(sha256="0" * 64), alignment=4096)
    with pytest.raises(DigestError, match="contradicts itself"):
        split(source(bad), tmp_path / "parts")
    assert names(tmp_path) == ["big"]
    header = Header.parse(bad)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "layers.json").write_bytes(Sidecar.of(header, file="a").emit())
    (folder / "a").write_bytes(bad)
    with pytest.raises(DigestError, match="contradicts itself"):
        join(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_too_short_or_too_long_is_refused(folder, tmp_path, name):
    raw = (folder / name).read_bytes()
    for changed in (raw[:-1], raw + b"\0", b""):
        (folder / name).write_bytes(changed)
        with pytest.raises(ArtifactError, match=rf"{name} has {len(changed)} bytes"):
            join(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_missing_layer_is_named_where_a_later_one_is_there(folder, tmp_path):
    (folder / "layer-1.bin").unlink()
    with pytest.raises(SourceError, match=r"has layer-2\.bin and lacks layer-1\.bin"):
        join(folder, tmp_path / "again")


@pytest.mark.parametrize("name", ["layers.json", "header.bin", "layer-0.bin"])
def test_what_every_bit_width_needs_is_named_where_it_is_missing(folder, tmp_path, name):
    for path in folder.glob("layer-[12].bin"):
        path.unlink()
    (folder / name).unlink()
    with pytest.raises(SourceError, match=name):
        join(folder, tmp_path / "again")


def test_a_bit_width_whose_layer_is_missing_is_refused_and_not_replaced(folder, tmp_path):
    (folder / "layer-2.bin").unlink()
    with pytest.raises(BitWidthError, match=r"stores 2, 3\. Fetch layer-2\.bin"):
        join(folder, tmp_path / "again", bit_width=8)
    with pytest.raises(BitWidthError, match="4 bits"):
        join(folder, tmp_path / "again", bit_width=4)
    assert not (tmp_path / "again").exists()


def test_an_artifact_that_is_not_the_one_asked_for_is_refused(folder, tmp_path, data):
    with pytest.raises(TrustError, match=f"{'0' * 64} was asked for"):
        join(folder, tmp_path / "again", artifact_id="0" * 64)
    assert not (tmp_path / "again").exists()
    join(folder, tmp_path / "again", artifact_id=Header.parse(data).artifact_id)


# --- where the parts go ------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path, data):
    start = Header.parse(data).layers[2].byte_range.start
    broken = data[:start] + bytes(len(data) - start)
    with pytest.raises(DigestError, match="layer 2"):
        split(source(broken), tmp_path / "parts")
    assert names(tmp_path) == ["whole"]


def test_an_empty_folder_is_filled_and_any_other_kept(tmp_path, data):
    (tmp_path / "parts").mkdir()
    split(source(data), tmp_path / "parts")
    assert names(tmp_path / "parts") == sorted([*FILES, "layers.json"])
    with pytest.raises(OutputError, match="is not an empty folder"):
        split(source(data), tmp_path / "parts")
    with pytest.raises(OutputError, match="is not an empty folder"):
        split(source(data), tmp_path / "whole")


@pytest.mark.parametrize("name", ["missing/parts", "a\0b"])
def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path, data, name):
    with pytest.raises(OutputError, match="cannot be made"):
        split(source(data), os.fspath(tmp_path) + "/" + name)
