"""Writer: same content, same bytes; whole or not at all."""

import os
import stat

import numpy as np
import pytest
import safetensors.numpy
from artifact.builders import MODEL, big_content, build, content, float32, layer_contents

from plyweight.artifact import (
    ArtifactReader,
    Header,
    LayerContent,
    LayeredWeight,
    TensorData,
    publish_atomically,
    write_artifact,
)
from plyweight.errors import ArtifactError, HeaderError, OutputError


def test_the_same_content_gives_the_same_bytes_whatever_the_name_and_order(tmp_path):
    first = build(tmp_path / "a.safetensors")
    weights = dict(reversed(content()["weights"].items()))
    assert build(tmp_path / "another name", weights=weights) == first


def test_stock_safetensors_opens_the_file_and_keeps_names_shapes_and_bytes(tmp_path):
    data = build(tmp_path / "a.safetensors")
    stock = safetensors.numpy.load(data)
    reader = ArtifactReader(tmp_path / "a.safetensors")
    seen = set()
    for index in range(3):
        for name, view in reader.read_layer(index).items():
            seen.add(f"L{index}/{name}")
            array = stock[f"L{index}/{name}"]
            assert array.shape == view.shape
            assert array.tobytes() == bytes(view.data)
    assert seen == {name for name in stock if not name.startswith("__pad__")}


def test_the_header_that_is_returned_is_the_one_in_the_file(tmp_path):
    header = write_artifact(tmp_path / "a", **content())
    assert Header.parse((tmp_path / "a").read_bytes()) == header


def test_data_may_come_from_a_function_which_is_called_once(tmp_path):
    calls = []

    def lazily(tensor):
        def data():
            calls.append(tensor.name)
            return np.frombuffer(tensor.data, np.uint8)

        return TensorData(tensor.name, tensor.dtype, tensor.shape, data)

    layers = [LayerContent(c.bit_width, [*map(lazily, c.tensors)]) for c in layer_contents()]
    assert build(tmp_path / "lazy", layers=layers) == build(tmp_path / "eager")
    assert calls == [t.name for c in layer_contents() for t in c.tensors]


def test_layers_start_at_aligned_bytes_and_padding_is_small_in_large_files(tmp_path):
    header = write_artifact(tmp_path / "big", **big_content())
    assert header.alignment.tensor == 64
    for layer in header.layers:
        assert layer.byte_range.start % header.alignment.layer == 0
    for entry in header.tensors:
        assert entry.name.startswith("__pad__") or header.file_range(entry).start % 64 == 0


def test_a_group_wider_than_the_inputs_is_stored_as_wide_as_they_are(tmp_path):
    planes = TensorData("w.q", "U8", (1, 1), b"\x0f")
    scale = TensorData("w.scale", **float32(np.ones((2, 1))))
    header = write_artifact(
        tmp_path / "a",
        layers=[LayerContent(1, [planes, scale])],
        weights={"w": LayeredWeight((2, 2), 128)},
        activations={},
        model=MODEL,
    )
    assert header.weights["w"].group_size == 2


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    build(tmp_path / "a")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a")]
    assert modes[0] == modes[1]


# --- refusals: nothing is left behind ----------------------------------------------------------


def replaced(name, /, **changes):
    """The layers with some attributes of one tensor of layer 0 changed."""
    base, *rest = layer_contents()
    tensors = [
        TensorData(**{**vars(tensor), **changes}) if tensor.name == name else tensor
        for tensor in base.tensors
    ]
    return [LayerContent(base.bit_width, tensors), *rest]


def fails(error):
    def data():
        raise error

    return data


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("fc.bias", {"data": bytes(19)}, ArtifactError, "19 bytes.*needs 20"),
        ("fc.bias", {"data": lambda: bytes(24)}, ArtifactError, "24 bytes.*needs 20"),
        ("fc.bias", {"data": np.zeros((5, 2), "<f4")[:, 0]}, ArtifactError, "contiguous"),
        ("fc.bias", {"data": fails(KeyboardInterrupt("now"))}, KeyboardInterrupt, "now"),
        ("fc.bias", {"data": fails(FileNotFoundError("theirs"))}, FileNotFoundError, "theirs"),
        ("fc.bias", {"data": fails(OSError(28, "No space left"))}, OutputError, "No space left"),
        ("fc.bias", {"dtype": "F8"}, HeaderError, "'F8'"),
        ("fc.bias", {"name": "empty"}, HeaderError, "twice"),
        ("fc.bias", {"name": "a\nb"}, HeaderError, "control characters"),
        ("fc.bias", {"name": "\ud800"}, HeaderError, "surrogate"),
        ("fc.weight.scale", {"data": float32([np.nan] * 15)["data"]}, ArtifactError, "not finite"),
        ("fc.weight.scale", {"data": float32([0] * 15)["data"]}, ArtifactError, "is positive"),
        ("fc.step", {"data": float32([-1])["data"]}, ArtifactError, "is positive"),
        ("fc.zero_point", {"data": float32([np.inf])["data"]}, ArtifactError, "not finite"),
        ("fc.weight.q", {"data": b"\xff" * 14}, ArtifactError, "after its last weight"),
    ],
)
def test_a_failing_write_leaves_nothing_and_keeps_what_was_there(
    tmp_path, name, changes, error, words
):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"before")
    with pytest.raises(error, match=words):
        write_artifact(target, **content(layers=replaced(name, **changes)))
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.safetensors"]  # noqa: PTH208  names are enough


@pytest.mark.parametrize("chunk_bytes", [0, 1000, 2**30])
def test_a_chunk_size_out_of_bounds_is_refused(tmp_path, chunk_bytes):
    with pytest.raises(HeaderError, match="chunk size"):
        write_artifact(tmp_path / "a", **content(chunk_bytes=chunk_bytes))
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"the folder .*missing does not exist"):
        write_artifact(tmp_path / "missing" / "a", **content())


@pytest.mark.parametrize("name", ["", "folder"])
def test_a_folder_is_not_overwritten(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_artifact(tmp_path / name, **content())


def test_a_path_with_a_nul_is_refused_in_words(tmp_path):
    with pytest.raises(OutputError, match="null"):
        write_artifact(f"{tmp_path}/a\0b", **content())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write_artifact(tmp_path / "a", **content())


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with publish_atomically(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_nothing_is_visible_before_the_end(tmp_path):
    with publish_atomically(tmp_path / "a") as file:
        file.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"
