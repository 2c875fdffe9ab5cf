"""export: a plain state dict that computes what the layered model computes."""

import sys

import pytest
import torch
from nets import ConvNet, ZooNet, batch, trained, with_rows
from safetensors import safe_open
from safetensors.torch import load_file

from plyweight.artifact import inspect, split
from plyweight.errors import BitWidthError, LayeringError, OutputError
from plyweight.exporting import export
from plyweight.loading import load
from plyweight.packing import pack

GROUPS_AND_PINS = {"group_size": 3, "pinned": {"fc": 8, "conv1": 3}}


@pytest.mark.parametrize("options", [{}, GROUPS_AND_PINS], ids=["plain", "groups and pins"])
@pytest.mark.parametrize("bit_width", [1, 2, 3, 8])
def test_the_float_network_with_the_exported_state_computes_the_logits_of_the_layered_one(
    tmp_path, options, bit_width
):
    path, exported = tmp_path / "net.layered.safetensors", tmp_path / "net.safetensors"
    pack(with_rows(trained(ConvNet(), activations=None, **options)), path)
    report = export(path, exported, bit_width=bit_width)
    assert (report.bit_width, report.num_bytes) == (bit_width, exported.stat().st_size)
    net = ConvNet().eval()
    net.load_state_dict(load_file(exported))
    images, _ = batch()
    with torch.no_grad():
        expected = load(path, ConvNet(), bit_width=bit_width)(images)
        assert torch.equal(net(images), expected)


def test_weights_of_quantized_activations_and_tied_ones_are_exported_too(tmp_path):
    path, exported = tmp_path / "zoo.layered.safetensors", tmp_path / "zoo.safetensors"
    pack(trained(ZooNet()), path)
    assert export(path, exported).bit_width == 8
    state, net = load_file(exported), ZooNet()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert all("self_attn" in name for name in unexpected)  # taken apart by prepare
    assert {"head.weight", "embedding.weight"} & set(missing)  # one name for both
    assert all("self_attn" in name or "weight" in name for name in missing)
    assert torch.equal(net.head.weight, net.embedding.weight)
    layered = load(path, ZooNet()).stem.weight
    assert torch.equal(net.stem.weight, layered)


def test_the_file_says_which_bit_width_of_which_artifact_it_is(tmp_path):
    path, exported = tmp_path / "net.layered.safetensors", tmp_path / "net.safetensors"
    pack(trained(ConvNet()), path)
    export(path, exported, bit_width=3, dtype="float16")
    with safe_open(exported, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "plyweight.artifact": inspect(path).artifact_id,
            "plyweight.bit_width": "3",
        }
        assert file.get_tensor("conv1.weight").dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_artifact_and_bit_width_give_the_same_bytes(tmp_path, dtype):
    path, exported = tmp_path / "net.layered.safetensors", tmp_path / "net.safetensors"
    pack(trained(ConvNet()), path)
    seen = set()
    for _ in range(8):  # three entries of metadata in any order: equal eight times once in 300,000
        export(path, exported, bit_width=3, dtype=dtype)
        seen.add(exported.read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bit_width": 9}, BitWidthError, "9 bits were asked for"),
        ({"to": "tflite"}, LayeringError, "to is 'tflite'; give one of 'safetensors', 'onnx'"),
        ({"to": "onnx", "dtype": "float16"}, LayeringError, "but 'onnx' has weights of its own"),
        ({"dtype": "int8"}, LayeringError, "dtype is 'int8'; give one of 'float32', 'float16'"),
    ],
)
def test_what_cannot_be_exported_is_said_and_leaves_no_file(tmp_path, options, error, message):
    path, exported = tmp_path / "net.layered.safetensors", tmp_path / "net.safetensors"
    pack(trained(ConvNet()), path)
    with pytest.raises(error, match=message):
        export(path, exported, **options)
    assert not exported.exists()


def test_a_split_artifact_exports_what_its_one_file_does(tmp_path):
    path = tmp_path / "net.layered.safetensors"
    pack(trained(ConvNet()), path)
    split(path, tmp_path / "parts")
    for source, exported in ((path, "one"), (tmp_path / "parts", "other")):
        export(source, tmp_path / exported)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_prefix_exports_what_it_holds_and_a_missing_folder_is_said(tmp_path):
    path = tmp_path / "net.layered.safetensors"
    receipt = pack(trained(ConvNet()), path)
    cut = tmp_path / "cut.layered.safetensors"
    cut.write_bytes(path.read_bytes()[: receipt.layers[2].total_bytes])
    assert export(cut, tmp_path / "net.safetensors").bit_width == 3
    with pytest.raises(BitWidthError, match="fetch bytes"):
        export(cut, tmp_path / "net.safetensors", bit_width=4)
    with pytest.raises(OutputError, match="create it first"):
        export(cut, tmp_path / "nowhere" / "net.safetensors")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "net.layered.safetensors"
    pack(trained(ConvNet()), path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "plyweight\[export\]"'):
        export(path, tmp_path / "net.safetensors")
