"""load and upgrade of what is somewhere else."""

import pytest
import torch
from delivery.servers import hostile
from nets import ConvNet, batch, trained

import plyweight
from plyweight.artifact import Header, MemorySource
from plyweight.errors import ArtifactError, BudgetError, LayeringError, TrustError, TrustWarning
from plyweight.loading import downgrade, load, start_upgrade, upgrade
from plyweight.nn import bit_widths_of
from plyweight.packing import pack


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("urls") / "net"
    pack(trained(ConvNet()), path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWEIGHT_CACHE", str(tmp_path / "cache"))


def logits(model):
    images, _ = batch()
    with torch.no_grad():
        return model(images)


def reference(data, bit_width):
    return logits(load(MemorySource(data), ConvNet(), bit_width=bit_width))


def test_a_url_is_loaded_and_upgraded_by_what_is_missing(data):
    header = Header.parse(data)
    with hostile(data) as server:
        with pytest.warns(TrustWarning, match="first use"):
            model = load(server.url, ConvNet(), bit_width=2)
        assert torch.equal(logits(model), reference(data, 2))
        plyweight.evict(header.artifact_id, keep_bit_width=2)
        server.requests.clear()
        upgrade(model, server.url, bit_width=3)
        assert sum(request.sent for request in server.requests) == (
            header.prefix_bytes(3) - header.prefix_bytes(2)
        )
        assert start_upgrade(model, server.url).result(60) == 8
    assert torch.equal(logits(model), reference(data, 8))
    downgrade(model, 2)
    assert bit_widths_of(model) == (1, 2)


def test_limits_choose_the_width_of_a_url_and_of_a_file(data, tmp_path):
    header = Header.parse(data)
    (tmp_path / "net").write_bytes(data)
    limits = {"max_bytes": header.prefix_bytes(3), "artifact_id": header.artifact_id}
    with hostile(data) as server:
        for source in (server.url, tmp_path / "net"):
            assert bit_widths_of(load(source, ConvNet(), **limits))[-1] == 3
            with pytest.raises(BudgetError, match="not even 1 bits"):
                load(source, ConvNet(), max_bytes=100, artifact_id=header.artifact_id)


def test_a_file_is_pinned_as_a_url_is_and_takes_no_options_of_delivery(data, tmp_path):
    (tmp_path / "net").write_bytes(data)
    with pytest.raises(TrustError, match="was asked for"):
        load(tmp_path / "net", ConvNet(), artifact_id="0" * 64)
    with pytest.raises(LayeringError, match=r"parallel was given, but .* is no URL"):
        load(tmp_path / "net", ConvNet(), parallel=2)


def test_a_model_is_upgraded_from_the_artifact_it_was_loaded_from(data, tmp_path):
    pin = {"artifact_id": Header.parse(data).artifact_id}
    other = tmp_path / "other"
    pack(trained(ConvNet()), other, name="another")
    model = load(MemorySource(data), ConvNet(), bit_width=2)
    with hostile(other.read_bytes()) as server:
        with pytest.raises(TrustError, match="was asked for"):
            upgrade(model, server.url)
        with pytest.raises(ArtifactError, match="is artifact"):
            upgrade(model, server.url, artifact_id=Header.parse(other.read_bytes()).artifact_id)
    assert bit_widths_of(model) == (1, 2)
    with hostile(data) as server:
        upgrade(model, server.url, **pin)
    assert torch.equal(logits(model), reference(data, 8))


def test_a_layer_that_the_disk_has_spoilt_is_fetched_again(data):
    header = Header.parse(data)
    pin = {"artifact_id": header.artifact_id}
    with hostile(data) as server:
        fetched = plyweight.fetch(server.url, **pin)
        blob = plyweight.delivery.Cache()._blobs / header.layers[2].sha256
        blob.chmod(0o600)
        spoilt = bytearray(blob.read_bytes())
        spoilt[5] ^= 1
        blob.write_bytes(spoilt)
        blob.chmod(0o400)
        model = load(server.url, ConvNet(), **pin)
    assert torch.equal(logits(model), reference(data, 8))
    assert fetched.bit_width == 8
