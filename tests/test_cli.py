import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import plyweight
from plyweight import demo
from plyweight.artifact import ArtifactReader
from plyweight.cli import app, main

COMMANDS = [command.callback.__name__ for command in app.registered_commands]


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


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_sentence(result, *words):
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("plyweight: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert all(word in err for word in words)


def test_inspect_prints_the_receipt_of_the_library(capsys, artifact):
    code, out, _ = run(capsys, "inspect", artifact, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(plyweight.inspect(artifact).to_json()))
    code, out, _ = run(capsys, "inspect", artifact)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split()[:2] == ["layer", "bit-width"]
    assert [line.split()[1] for line in lines[1:4]] == ["2", "4", "8"]


def test_of_a_cut_file_inspect_and_verify_tell_what_is_there(capsys, artifact):
    receipt = plyweight.inspect(artifact)
    artifact.write_bytes(artifact.read_bytes()[: receipt.layers[1].total_bytes])
    _, out, _ = run(capsys, "inspect", artifact)
    assert [("not in this file" in line) for line in out.splitlines()[1:4]] == [False, False, True]
    assert run(capsys, "verify", artifact)[:2] == (
        0,
        "2 of 3 layers match their digests; the other 1 are not in this file\n",
    )
    assert json.loads(run(capsys, "verify", artifact, "--json")[1]) == {
        "verified": [2, 4],
        "stored": [2, 4, 8],
    }


def test_verify_refuses_a_damaged_layer_by_name(capsys, artifact):
    assert run(capsys, "verify", artifact) == (0, "3 of 3 layers match their digests\n", "")
    data = bytearray(artifact.read_bytes())
    data[-50] ^= 1
    artifact.write_bytes(data)
    assert_one_sentence(run(capsys, "verify", artifact), "layer 2 (8 bits)", "L2/")


def test_debug_shows_where_an_error_came_from(capsys, tmp_path):
    code, _, err = run(capsys, "--debug", "inspect", tmp_path / "none")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("plyweight: ")


def test_what_is_no_artifact_is_one_sentence(capsys, tmp_path):
    (tmp_path / "text").write_text("hello, this is no artifact at all")
    assert_one_sentence(run(capsys, "inspect", tmp_path / "text"), "check that this is an artifact")
    assert_one_sentence(run(capsys, "inspect", tmp_path / "none"), "does not exist")
    assert_one_sentence(run(capsys, "verify", tmp_path), "is a directory")
    assert_one_sentence(run(capsys, "inspect", "https://example.org/x"), "is a URL")


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


def test_wrong_calls_end_with_2(capsys):
    for arguments in (
        (),
        ("bogus",),
        ("--bogus",),
        ("inspect",),
        ("inspect", "a", "b"),
        ("verify", "a", "--debug"),  # an option of plyweight itself: it comes first
        ("pack", "net.pt"),
        ("demo", "--seed", "x"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert "Usage: plyweight" in err
        assert "Traceback" not in err


def test_version_and_help_end_with_0(capsys):
    assert run(capsys, "--version") == (0, f"plyweight {plyweight.__version__}\n", "")
    for arguments in (("--help",), *((command, "--help") for command in COMMANDS)):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert out.startswith("Usage: plyweight")


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
    monkeypatch.delitem(sys.modules, "plyweight.packing")
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(capsys, "pack", "net.pt", "out")
    assert_one_sentence(result, "plyweight pack needs torch", 'pip install "plyweight[train]"')


def test_reading_commands_do_not_import_torch(artifact):
    script = (
        "import sys; from plyweight.cli import main; "
        f"code = main(['inspect', {str(artifact)!r}]) or main(['verify', {str(artifact)!r}]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_module_runs_like_the_command():
    command = [sys.executable, "-m", "plyweight", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"plyweight {plyweight.__version__}\n"


def test_the_checkpoint_is_not_overwritten_by_its_artifact(capsys, artifact, tmp_path):
    before = (tmp_path / "net.pt").read_bytes()
    result = run(capsys, "pack", tmp_path / "net.pt", tmp_path / "net.pt")
    assert_one_sentence(result, "is the checkpoint itself")
    assert (tmp_path / "net.pt").read_bytes() == before
