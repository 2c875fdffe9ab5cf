"""docs/format.md: the reader and the example printed there say what the code does."""

import re
from pathlib import Path

import numpy as np
import pytest
from artifact.builders import BIT_WIDTHS, WEIGHTS, build

from plyweight.artifact import ArtifactReader
from plyweight.codec import codes_at, decode, encode, from_planes, spread, to_planes

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed():
    """What the page's reader defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code.count("\n") < 80
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_the_printed_reader_reads_what_the_package_wrote(tmp_path, printed, bit_width):
    build(tmp_path / "a")
    held = printed["read"](tmp_path / "a", bit_width)
    reader = ArtifactReader(tmp_path / "a")
    layers = [reader.read_layer(i) for i in range(BIT_WIDTHS.index(bit_width) + 1)]
    for name, weight in WEIGHTS.items():
        rows = [
            row
            for tensors in layers
            if f"{name}.q" in tensors
            for row in tensors[f"{name}.q"].numpy()
        ]
        levels = decode(from_planes(rows, weight.shape), len(rows))
        scale = layers[0][f"{name}.scale"].numpy()
        newest = max(i for i, tensors in enumerate(layers) if f"{name}.q" in tensors)
        if f"{name}.gain" in layers[newest]:
            scale = scale * layers[newest][f"{name}.gain"].numpy()
        expected = levels * spread(scale, weight.shape, weight.group_size)
        assert np.array_equal(held[name], expected)
    assert np.array_equal(held["bn.bias"], layers[-1]["bn.bias"].numpy())
    assert np.array_equal(held["fc.bias"], layers[0]["fc.bias"].numpy())


def rows_of(label):
    """The cells of the row of the worked example that starts with ``label``."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_worked_example_is_right():
    weights = np.array([[0.50, -0.30], [0.06, -1.60]], np.float32)
    scale = spread(np.array([0.01, 0.02], np.float32), weights.shape, None)
    codes = encode(weights, scale)
    assert [int(cell) for cell in rows_of("m ")[:4]] == (codes & 127).flatten().tolist()
    for index, plane in enumerate(to_planes(codes, 8)):
        *bits, _, byte = rows_of(f"plane {index}:")
        assert [int(bit) for bit in bits] == np.unpackbits(plane, bitorder="little")[:4].tolist()
        assert byte == f"`0x{plane[0]:02X}`"
    for bit_width in (2, 3, 8):
        levels = decode(codes_at(codes, bit_width), bit_width)
        printed_levels = rows_of(f"level at {bit_width} bits")[:4]
        assert [int(cell) for cell in printed_levels] == levels.flatten().tolist()
