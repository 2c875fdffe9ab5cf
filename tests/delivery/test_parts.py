"""The split form over the wire: no server needs to know byte ranges."""

import json

import pytest
from artifact.builders import big_content, build
from delivery.relay import relay
from delivery.servers import hostile, nginx, plain_server, s3
from delivery.signers import keys

from plyweight.artifact import ArtifactReader, ByteRange, Header, split, write_artifact
from plyweight.delivery import chunks
from plyweight.delivery.fetch import fetch
from plyweight.delivery.signing import sign
from plyweight.delivery.source import open_remote
from plyweight.errors import ArtifactError, SourceError, TrustError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published artifact of several chunks a layer, in parts, and its bytes."""
    folder = tmp_path_factory.mktemp("parts")
    write_artifact(folder / "net", **big_content(shape=(1024, 2048)))
    split(folder / "net", folder / "split")
    return folder


def test_a_server_without_ranges_sends_the_files_that_a_bit_width_needs(folder, tmp_path):
    data = (folder / "net").read_bytes()
    header = Header.parse(data)
    with plain_server(folder / "split") as server:
        address, pin = f"{server.url}/layers.json", {"artifact_id": header.artifact_id}
        first = fetch(address, bit_width=2, cache=tmp_path / "cache", **pin)
        second = fetch(address, tmp_path / "net", **pin, cache=tmp_path / "cache")
    assert ArtifactReader(first.artifact).held_bit_widths == (2,)
    assert second.bit_width == header.bit_widths[-1]
    assert (tmp_path / "net").read_bytes() == data
    prefix = header.prefix_bytes(2)
    assert first.transfer.received_bytes <= prefix + 2**20


def test_a_server_without_ranges_sends_each_file_hardly_more_than_once(tmp_path, monkeypatch):
    # So that the base layer takes 32 requests, each of which is answered with all of its file.
    monkeypatch.setattr(chunks, "REQUEST_BYTES", 2**18)
    write_artifact(tmp_path / "net", **big_content(shape=(2048, 16384)))
    split(tmp_path / "net", tmp_path / "split")
    header = Header.parse((tmp_path / "net").read_bytes())
    with plain_server(tmp_path / "split") as server, relay(server.port) as between:
        fetched = fetch(
            f"{between.url}/layers.json", artifact_id=header.artifact_id, cache=tmp_path / "cache"
        )
    assert fetched.bit_width == header.bit_widths[-1]
    # Two replies are hung up on before ranges are given up; what the sockets hold of them is sent.
    assert between.sent <= 3 * header.file_bytes
    assert fetched.transfer.received_bytes <= between.sent


@pytest.mark.parametrize(("serve", "has_ranges"), [(plain_server, False), (nginx, True)])
def test_a_part_that_comes_as_asked_shows_no_ranges_where_there_are_none(folder, serve, has_ranges):
    header = Header.parse((folder / "net").read_bytes())
    with serve(folder / "split") as server:
        source = open_remote(f"{server.url}/layers.json")
        with source.get(ByteRange(0, header.data_start)) as reply:
            assert reply.byte_range == ByteRange(0, header.data_start)
            assert reply.has_ranges == has_ranges
        source.close()


def test_a_server_with_ranges_serves_parts_too(folder, tmp_path):
    data = (folder / "net").read_bytes()
    with nginx(folder / "split") as server:
        fetched = fetch(
            f"{server.url}/layers.json",
            tmp_path / "net",
            artifact_id=Header.parse(data).artifact_id,
            cache=tmp_path / "cache",
        )
    assert (tmp_path / "net").read_bytes() == data
    assert fetched.transfer.wasted_bytes == 0


def test_an_object_store_serves_parts_too(folder, tmp_path):
    files = {f"net/{path.name}": path.read_bytes() for path in (folder / "split").iterdir()}
    data = (folder / "net").read_bytes()
    with s3(files) as store:
        fetch(
            f"{store.url}/net/layers.json",
            tmp_path / "net",
            artifact_id=Header.parse(data).artifact_id,
            cache=tmp_path / "cache",
        )
    assert (tmp_path / "net").read_bytes() == data


def test_what_was_begun_goes_on_in_the_middle_of_a_part(folder, tmp_path):
    data = (folder / "net").read_bytes()
    pin = {"artifact_id": Header.parse(data).artifact_id, "cache": tmp_path / "cache"}

    def stop(progress):
        if progress.bytes_done > len(data) // 3:
            raise KeyboardInterrupt

    with plain_server(folder / "split") as server:
        address = f"{server.url}/layers.json"
        with pytest.raises(KeyboardInterrupt):
            fetch(address, tmp_path / "net", progress=stop, **pin)
        fetch(address, tmp_path / "net", **pin)
    assert (tmp_path / "net").read_bytes() == data


def test_row_19_a_sidecar_names_only_files_of_its_own_folder(folder, tmp_path):
    sidecar = json.loads((folder / "split" / "layers.json").read_text())
    for name in ("../secret", "/etc/passwd", "a/b", ".hidden", "C:x", "a\u0000", "ä"):
        sidecar["layers"][0]["file"] = name
        (tmp_path / "layers.json").write_text(json.dumps(sidecar, separators=(",", ":")))
        with plain_server(tmp_path) as server, pytest.raises(ArtifactError, match="the file of"):
            fetch(f"{server.url}/layers.json", cache=tmp_path / "cache", artifact_id="0" * 64)


def test_parts_of_another_artifact_are_not_the_one_that_was_asked_for(folder, tmp_path):
    other = tmp_path / "other"
    build(other)
    split(other, tmp_path / "split")
    with plain_server(tmp_path / "split") as server, pytest.raises(TrustError, match="asked for"):
        fetch(
            f"{server.url}/layers.json",
            artifact_id=Header.parse((folder / "net").read_bytes()).artifact_id,
            cache=tmp_path / "cache",
        )


def test_the_sidecar_of_the_parts_is_what_is_signed(folder, tmp_path):
    private, public = keys(tmp_path)
    write_artifact(tmp_path / "net", **big_content(shape=(256, 512)))
    split(tmp_path / "net", tmp_path / "split")
    sign(tmp_path / "split" / "layers.json", private_key=private)
    options = {"public_key": public, "cache": tmp_path / "cache"}
    with plain_server(tmp_path) as server:
        address = f"{server.url}/split/layers.json"
        assert fetch(address, bit_width=2, **options).bit_width == 2
        assert fetch(address, sidecar=address, **options).bit_width == 3
        forged = (folder / "split" / "layers.json").read_bytes()
        (tmp_path / "split" / "layers.json").write_bytes(forged)
        with pytest.raises(TrustError, match=r"is no signature of http://.*/split/layers\.json by"):
            fetch(address, **options)


def test_a_query_cannot_be_meant_for_every_file():
    with pytest.raises(SourceError, match="may have no query"):
        open_remote("https://host/layers.json?signature=x")


def test_a_sidecar_that_is_missing_is_said(tmp_path):
    with hostile(b"", refuse=404) as server, pytest.raises(SourceError, match="404"):
        fetch(server.url.rpartition("/")[0] + "/layers.json", cache=tmp_path / "cache")
