import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import plyweight
from plyweight import demo
from plyweight.cli import main


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
    assert "Traceback" in err


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
    header = plyweight.artifact.ArtifactReader(tmp_path / "b").header
    assert (header.model.name, header.model.revision, header.model.license) == ("net", 3, "MIT")


class _Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_pack_refuses_what_is_no_state_dict_and_leaves_nothing(capsys, artifact, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(_Code(), tmp_path / "code.pt")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "float.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    target = tmp_path / "out"
    for name, word in (
        ("text.pt", "cannot be loaded as a state dict"),
        ("code.pt", "cannot be loaded as a state dict"),
        ("float.pt", "plyweight.prepare"),
        ("other.pt", "flat state dict"),
        ("none.pt", "does not exist"),
    ):
        assert_one_sentence(run(capsys, "pack", tmp_path / name, target), word)
        assert not target.exists()
    missing = tmp_path / "no folder" / "out"
    assert_one_sentence(run(capsys, "pack", tmp_path / "net.pt", missing), "create it first")


def test_wrong_calls_end_with_2(capsys):
    for arguments in ((), ("bogus",), ("inspect",), ("demo", "--seed", "x")):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert "Usage: plyweight" in err


def test_version_and_help_end_with_0(capsys):
    assert run(capsys, "--version") == (0, f"plyweight {plyweight.__version__}\n", "")
    assert run(capsys, "--help")[0] == 0


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
    figure = (tmp_path / "one" / "digits.png").read_bytes()
    assert figure.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(figure) > 10_000  # a blank page of that size has 3 kB
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
    assert list((tmp_path / "out").iterdir()) == []


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
