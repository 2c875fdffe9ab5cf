"""The client without torch: an answer at the base layer, then one at all of them."""

import re
import subprocess
import sys
from pathlib import Path

import edge_client
import numpy as np
import pytest
from delivery.servers import hostile
from engine.handmade import images, residual_graph, write

import plyweight

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An artifact with a graph, and a batch for it."""
    monkeypatch.setenv("PLYWEIGHT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "net.layered.safetensors", residual_graph())
    np.save(tmp_path / "x.npy", images())
    return tmp_path / "net.layered.safetensors", tmp_path / "x.npy"


def classes(path, bit_width):
    with plyweight.open(path, bit_width=bit_width) as engine:
        return engine.run({"input": images()})["logits"].argmax(axis=1).tolist()


def answers(printed):
    found = re.findall(r"^ *[\d.]+ s  (\d) bits  classes ([\d, ]+)$", printed, re.MULTILINE)
    return [(int(bits), [int(c) for c in text.split(", ")]) for bits, text in found]


def test_it_answers_with_the_base_layer_and_then_with_all(files, capsys):
    path, x = files
    artifact_id = plyweight.inspect(path).artifact_id
    with hostile(path.read_bytes()) as server:
        edge_client.main([server.url, str(x), "--id", artifact_id])
    assert answers(capsys.readouterr().out) == [(2, classes(path, 2)), (8, classes(path, 8))]


def test_an_upgrade_that_fails_leaves_the_answers_of_before(files, capsys):
    path, x = files
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    edge_client.main([str(path), str(x)])
    printed = capsys.readouterr().out
    assert answers(printed) == [(2, classes(path, 2))] * 2
    assert "stays at 2 bits, as good as before: " in printed
    assert "layer 2 (8 bits)" in printed


def test_it_imports_no_torch(files):
    path, x = files
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'examples')\n"
        "import edge_client; edge_client.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path), str(x)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [bits for bits, _ in answers(done.stdout)] == [2, 8], done.stderr
