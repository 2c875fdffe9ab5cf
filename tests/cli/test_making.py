"""demo and pack: the commands that make an artifact."""

import errno
import json
import os
import sys

import pytest
import torch
from cli.calls import assert_one_sentence, run
from matplotlib.image import imread
from torch import nn

import plyweight
from plyweight import demo
from plyweight.artifact import ArtifactReader


@pytest.fixture
def artifact(tmp_path):
    model = plyweight.prepare(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), (2, 4, 8)
    )
    model(torch.randn(4, 16))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    plyweight.pack(model, tmp_path / "net.layered.safetensors")
    return tmp_path / "net.layered.safetensors"


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(demo, "FAST", demo.Recipe(float_epochs=1, quantized_epochs=1))


def test_pack_makes_the_file_that_the_library_makes(capsys, artifact, tmp_path):
    code, out, _ = run(capsys, "pack", tmp_path / "net.pt", tmp_path / "a", "--name", "Sequential")
    assert code == 0
    assert out.endswith("2 layered weights  2, 4, 8 bits\n")
    assert (tmp_path / "a").read_bytes() == artifact.read_bytes()
    run(capsys, "pack", tmp_path / "net.pt", tmp_path / "b", "--revision", 3, "--license", "MIT")
    model = ArtifactReader(tmp_path / "b").header.model
    assert (model.name, model.revision, model.license) == ("net", 3, "MIT")


def test_pack_prints_the_receipt_of_the_file_as_json(capsys, artifact, tmp_path):
    code, out, _ = run(capsys, "pack", tmp_path / "net.pt", tmp_path / "c", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(plyweight.inspect(tmp_path / "c").to_json()))


class _Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_pack_refuses_what_is_no_state_dict_and_leaves_nothing(capsys, artifact, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(_Code(), tmp_path / "code.pt")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "float.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(3, 2), tmp_path / "module.pt")
    (tmp_path / "empty.pt").touch()
    target = tmp_path / "out"
    for name, word in (
        ("text.pt", "cannot be loaded as a state dict"),
        ("code.pt", "cannot be loaded as a state dict"),
        ("float.pt", "plyweight.prepare"),
        ("other.pt", "flat state dict"),
        ("list.pt", "a list was given"),
        ("module.pt", "torch.save(model.state_dict(), path)"),
        ("empty.pt", "cannot be loaded as a state dict"),
        (".", "cannot be read (Is a directory)"),
        ("none.pt", "does not exist"),
    ):
        assert_one_sentence(run(capsys, "pack", tmp_path / name, target), word)
        assert not target.exists()
    missing = tmp_path / "no folder" / "out"
    assert_one_sentence(run(capsys, "pack", tmp_path / "net.pt", missing), "create it first")
    assert_one_sentence(run(capsys, "pack", tmp_path / "net.pt", tmp_path), "is a folder")


def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    capsys, artifact, tmp_path, monkeypatch
):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = run(capsys, "pack", tmp_path / "net.pt", artifact, "--revision", 7)
    assert_one_sentence(result, "cannot be written", "nothing was left behind")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_demo_shows_every_width_and_the_same_seed_makes_the_same_file(
    capsys, tmp_path, tiny_demo
):
    code, out, err = run(capsys, "demo", "--fast", "--out", tmp_path / "one")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:9]]
    assert [row[0] for row in rows] == [str(b) for b in range(1, 9)]
    assert {row[-1] for row in rows} == {"equal"}
    assert "once-QAT" in err
    assert "dedicated, 8 bits" in err
    figure = tmp_path / "one" / "digits.png"
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(figure)[..., :3]
    assert (pixels == 1).mean() > 0.5  # a white page ...
    assert len({tuple(pixel) for pixel in pixels[::2, ::2].reshape(-1, 3)}) > 50  # ... drawn upon
    code, out, _ = run(capsys, "demo", "--fast", "--out", tmp_path / "two", "--json")
    result = json.loads(out)
    assert [row["bit_width"] for row in result["rows"]] == list(range(1, 9))
    name = "digits.layered.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    sizes = [layer.total_bytes for layer in plyweight.inspect(tmp_path / "two" / name).layers]
    assert [row["num_bytes"] for row in result["rows"]] == sizes


def test_the_demo_with_a_graph_is_answered_without_torch_as_with_it(capsys, tmp_path, tiny_demo):
    code, out, _ = run(capsys, "demo", "--fast", "--graph", "--out", tmp_path)
    assert code == 0
    head, *rows = out.splitlines()[:9]
    assert head.split()[-1] == "engine"
    assert [row.split()[-2] for row in rows] == ["equal"] * 8
    # All of them where this was written; elsewhere a last bit may part two equal digits.
    assert min(float(row.split()[-1].removesuffix("%")) for row in rows) > 99.5
    with plyweight.open(tmp_path / "digits.layered.safetensors", bit_width=3) as engine:
        assert engine.bit_widths == (1, 2, 3)


def test_an_interrupted_demo_says_so_and_leaves_nothing(capsys, tmp_path, tiny_demo, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "pack", interrupt)
    code, out, err = run(capsys, "demo", "--fast", "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert "nothing half-written is left" in err
    assert "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_figure_leaves_the_finished_file_alone(
    capsys, tmp_path, tiny_demo, monkeypatch
):
    from matplotlib.figure import Figure

    def interrupt(figure, file, **options):
        file.write(b"half a figure")
        raise KeyboardInterrupt

    def no_training(folder, **options):
        (folder / "digits.layered.safetensors").write_bytes(b"whole")
        row = demo.WidthResult(1, 4, 1000, 2.0, 0.9, 0.9, agrees=True)
        return demo.DemoResult(0, "path", 0.9, 10, (row,))

    monkeypatch.setattr(Figure, "savefig", interrupt)
    monkeypatch.setattr(demo, "run_demo", no_training)
    assert run(capsys, "demo", "--out", tmp_path)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["digits.layered.safetensors"]


def test_a_folder_that_cannot_be_made_is_told_before_the_training(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(capsys, "demo", "--out", tmp_path / "file" / "out")
    assert_one_sentence(result, "choose another --out")


def test_without_what_it_needs_a_command_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = run(capsys, "demo", "--out", tmp_path)
    assert_one_sentence(result, "plyweight demo needs sklearn", 'pip install "plyweight[demo]"')
    for name in [name for name in sys.modules if name.startswith("plyweight.packing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(capsys, "pack", "net.pt", "out")
    assert_one_sentence(result, "plyweight pack needs torch", 'pip install "plyweight[train]"')


def test_a_demo_with_a_graph_says_what_is_not_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = run(capsys, "demo", "--graph", "--out", tmp_path / "out")
    assert_one_sentence(result, "demo --graph needs onnxscript", 'pip install "plyweight[onnx]"')
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_is_not_overwritten_by_its_artifact(capsys, artifact, tmp_path):
    before = (tmp_path / "net.pt").read_bytes()
    result = run(capsys, "pack", tmp_path / "net.pt", tmp_path / "net.pt")
    assert_one_sentence(result, "is the checkpoint itself")
    assert (tmp_path / "net.pt").read_bytes() == before
