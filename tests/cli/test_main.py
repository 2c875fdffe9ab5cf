"""main: how a call ends, and what it takes to start."""

import subprocess
import sys

import pytest
from artifact.builders import build
from cli.calls import assert_called_wrongly, run

import plyweight
from plyweight.cli import app

COMMANDS = [command.callback.__name__ for command in app.registered_commands]

# What nobody waits for who looks at a file.
SLOW = ("torch", "rich", "httpx2", "asyncio", "ssl", "matplotlib", "safetensors", "model_signing")


@pytest.fixture
def artifact(tmp_path):
    build(tmp_path / "tiny.layered.safetensors")
    return tmp_path / "tiny.layered.safetensors"


def imported_by(*calls):
    """The modules that these calls import, in a fresh interpreter."""
    script = (
        "import sys; from plyweight.cli import main\n"
        f"code = any([main(call) for call in {calls!r}])\n"
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


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
        assert_called_wrongly(run(capsys, *arguments))


def test_version_and_help_end_with_0(capsys):
    assert run(capsys, "--version") == (0, f"plyweight {plyweight.__version__}\n", "")
    for arguments in (("--help",), *((command, "--help") for command in COMMANDS)):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert out.startswith("Usage: plyweight")


def test_every_command_takes_json(capsys):
    for command in COMMANDS:
        assert "  --json " in run(capsys, command, "--help")[1]


def test_debug_shows_where_an_error_came_from(capsys, tmp_path):
    code, _, err = run(capsys, "--debug", "inspect", tmp_path / "none")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("plyweight: ")


def test_the_module_runs_like_the_command():
    command = [sys.executable, "-m", "plyweight", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"plyweight {plyweight.__version__}\n"


def test_reading_a_file_imports_nothing_slow(artifact):
    modules = imported_by(["inspect", str(artifact)], ["verify", str(artifact)])
    assert modules.isdisjoint(SLOW)


def test_what_moves_bytes_does_not_import_torch(artifact, tmp_path):
    pytest.importorskip("safetensors")
    cache = ["--cache", str(tmp_path / "cache")]
    modules = imported_by(
        ["fetch", str(artifact), *cache],
        ["cached", *cache],
        ["evict", plyweight.inspect(artifact).artifact_id, *cache],
        ["split", str(artifact), str(tmp_path / "parts")],
        ["join", str(tmp_path / "parts"), str(tmp_path / "joined")],
        ["export", str(artifact), str(tmp_path / "plain.safetensors")],
    )
    assert modules.isdisjoint({"torch", "rich", "httpx2"})
