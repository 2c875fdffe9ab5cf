"""The golden artifact: every reader of this format, now and later, finds the recorded values."""

import json
from pathlib import Path

import numpy as np
import pytest
import second_reader
from artifact.builders import source
from golden import make

from plyweight.artifact import ArtifactReader, Header, verify
from plyweight.codec import decode, from_planes, spread

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
DATA = make.ARTIFACT.read_bytes()
VALUES = json.loads(make.VALUES.read_text())
BIT_WIDTHS = (2, 3, 8)


def ours(raw, bit_width):
    """Weights and plain tensors at a bit-width, by the package."""
    reader = ArtifactReader(source(raw))
    count = reader.header.layer_index(bit_width) + 1
    layers = [
        {name: view.numpy() for name, view in reader.read_layer(index).items()}
        for index in range(count)
    ]
    held = {name: array for layer in layers for name, array in layer.items()}
    for name, weight in reader.header.weights.items():
        brought = [layer for layer in layers if f"{name}.q" in layer]
        rows = [row for layer in brought for row in layer[f"{name}.q"]]
        scale = layers[0][f"{name}.scale"] * brought[-1].get(f"{name}.gain", np.float32(1))
        levels = decode(from_planes(rows, weight.shape), len(rows))
        held[name] = levels * spread(scale, weight.shape, weight.group_size)
    return held


def theirs(raw, bit_width):
    """The same by the reader that is written from the page alone."""
    weights, plain = second_reader.read(raw, bit_width)
    return plain | {name: weight["values"] for name, weight in weights.items()}


@pytest.mark.parametrize("read", [ours, theirs])
@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_the_golden_artifact_has_exactly_the_recorded_values(read, bit_width):
    stop = Header.parse(DATA).prefix_bytes(bit_width)
    for raw in (DATA, DATA[:stop]):
        held = read(raw, bit_width)
        for name, recorded in VALUES[str(bit_width)].items():
            assert list(held[name].shape) == recorded["shape"]
            found = held[name].astype(float).ravel().tolist()
            # In hexadecimal, where -0.0 is not 0.0.
            assert [*map(float.hex, found)] == [*map(float.hex, recorded["values"])], name


def test_the_golden_artifact_is_the_one_it_always_was():
    assert len(DATA) <= 4096
    artifact_id = "51242df9b61536a3da1b43367f6b2f5b5275cd42ee6e1c9617ff9f4446350899"
    assert Header.parse(DATA).artifact_id == artifact_id
    assert len(verify(make.ARTIFACT)) == 3


def test_the_recorded_values_are_those_of_the_worked_example():
    scales = np.float32([0.01, 0.01, 0.02, 0.02])
    at_2, at_8 = np.float32([32, -32, 32, -96]), np.float32([50, -30, 3, -80])  # levels
    assert VALUES["2"]["fc.weight"]["values"] == (at_2 * (scales * np.float32(1.25))).tolist()
    assert VALUES["8"]["fc.weight"]["values"] == (at_8 * scales).tolist()


def test_the_page_prints_the_golden_artifact_byte_by_byte():
    assert f"```text\n{make.dump(DATA)}\n```" in PAGE
    assert f"{len(DATA):,} bytes" in PAGE
    ends = [f"`0x{layer.byte_range.start:04x}`" for layer in Header.parse(DATA).layers[1:]]
    assert f"after byte {ends[0]} or {ends[1]}" in PAGE


def test_the_dump_has_every_byte():
    shown = bytearray()
    for line in make.dump(DATA).splitlines():
        if line.startswith("layer ") or not line:
            continue
        offset, rest = int(line[:4], 16), line[6:]
        assert offset == len(shown)
        if rest.endswith(" spaces)"):
            shown += b" " * int(rest[1:].split()[0])
        elif 8 <= offset < Header.parse(DATA).data_start:
            shown += rest.encode()
        else:
            shown += bytes.fromhex(rest[:24])
    assert bytes(shown) == DATA


def test_what_wrote_the_golden_artifact_still_writes_the_same(tmp_path):
    make.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == DATA
    assert make.values() == VALUES


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_the_golden_artifact_loads_into_a_network(bit_width):
    torch = pytest.importorskip("torch")
    plyweight = pytest.importorskip("plyweight")

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.zeros(2, dtype=torch.half))
            self.register_buffer("count", torch.tensor(0))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 2, 3, bias=False)
            self.fc = torch.nn.Linear(2, 2)
            self.norm = Norm()

    net = plyweight.load(make.ARTIFACT, Net(), bit_width=bit_width)
    for name in ("conv.weight", "fc.weight"):
        weight = net.get_submodule(name.partition(".")[0]).weight
        assert weight.flatten().tolist() == VALUES[str(bit_width)][name]["values"]
