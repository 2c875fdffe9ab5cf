"""Bytes travel without torch: a gateway starts, reads artifacts, and says what is missing."""

import os
import subprocess
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# What pip says when there is no index to ask; a pin that no index has reads differently.
NO_INDEX = ("connection broken", "from versions: none")

IMPORT_EVERYTHING_TORCH_FREE = """
import importlib, pkgutil

for name in ("errors", "codec", "artifact", "engine", "inspecting", "cli"):
    package = importlib.import_module(f"plyweight.{name}")
    for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"plyweight.{name}."):
        importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter with plyweight[cli] and nothing else, built as a wheel from this tree."""
    home = tmp_path_factory.mktemp("torch_free") / "venv"
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = ["-m", "pip", "install", "--no-input", "-c", "constraints.txt", ".[cli]"]
    done = run(python, *install, cwd=ROOT)
    unreachable = [line for line in done.stderr.splitlines() if any(w in line for w in NO_INDEX)]
    if done.returncode and unreachable:
        pytest.skip(f"pip cannot reach an index: {unreachable[-1].strip()}")
    assert done.returncode == 0, done.stderr
    return python


def run(python, *arguments, cwd):
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_torch_is_not_there(python, tmp_path):
    done = run(python, "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize("code", ["import plyweight", IMPORT_EVERYTHING_TORCH_FREE])
def test_everything_that_handles_bytes_imports(python, tmp_path, code):
    done = run(python, "-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_types_are_shipped(python, tmp_path):
    code = "import importlib.resources as r; print((r.files('plyweight') / 'py.typed').is_file())"
    assert run(python, "-c", code, cwd=tmp_path).stdout.strip() == "True"


def test_the_command_line_starts(python, tmp_path):
    done = run(python.with_name("plyweight"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_a_name_that_needs_torch_says_so_in_one_sentence(python, tmp_path):
    done = run(python, "-c", "import plyweight; plyweight.prepare", cwd=tmp_path)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: plyweight.prepare needs PyTorch, which is not installed; "
        'install it with: pip install "plyweight[train]"'
    )
