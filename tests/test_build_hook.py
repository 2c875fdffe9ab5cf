"""The native library is built where a compiler is; where it is not, the package says so."""

import os
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parent.parent
HOOK = runpy.run_path(str(ROOT / "native" / "build_hook.py"))
NO_COMPILER = {"CXX": "/nonexistent/c++"}


def make(target, folder, *, root=ROOT, **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    environment = os.environ | {"PLYWEIGHT_NATIVE": ""} | environment
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_a_mode_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("PLYWEIGHT_NATIVE", "maybe")
    with pytest.raises(SystemExit, match="is 'maybe'; set it to one of auto, require, skip"):
        HOOK["mode"]()


@pytest.mark.parametrize("environment", [NO_COMPILER, {"PLYWEIGHT_NATIVE": "skip"}])
def test_nothing_is_fetched_for_what_is_not_compiled(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert HOOK["requirements"]() == []


def test_what_compiling_needs_is_fetched_where_it_is_missing(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("PLYWEIGHT_NATIVE", raising=False)
    assert [r.partition(">")[0] for r in HOOK["requirements"]()] == ["nanobind", "cmake", "ninja"]
    (tmp_path / "cmake").touch(0o755)
    (tmp_path / "make").touch(0o755)
    assert [r.partition(">")[0] for r in HOOK["requirements"]()] == ["nanobind"]


def test_what_went_wrong_is_told_in_one_line():
    complaint = HOOK["_complaint"]
    assert complaint("a.cpp: In function f:\na.cpp:3:1: error: no g\nmake: failed\n") == (
        "a.cpp:3:1: error: no g"
    )
    said = "-- fine\nCMake Error at x.cmake:3 (message):\n  It\n\n  is\n\n  broken.\n\nCall Stack\n"
    assert complaint(said) == "It is broken."
    assert complaint("one\ntwo\n") == "two"
    assert complaint("") == "it said nothing"


def test_the_digest_is_of_every_source(tmp_path):
    assert HOOK["sources_digest"]() == HOOK["sources_digest"]()
    names = {path.name for path in HOOK["SOURCES"].iterdir()}
    digested = {name for name in names if name.endswith((".cpp", ".hpp", "CMakeLists.txt"))}
    assert names - digested <= {"build_hook.py", "__pycache__"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (NO_COMPILER, "CXX names /nonexistent/c++, which is not there"),
        ({"CXX": "false"}, "`cmake -S` failed: The C++ compiler "),
        ({"PLYWEIGHT_NATIVE": "skip"}, "it was installed with PLYWEIGHT_NATIVE=skip"),
    ],
    ids=["no compiler", "a compiler that fails", "not wanted"],
)
def test_without_a_compiler_the_wheel_is_pure_and_says_why(tmp_path, environment, reason):
    done = make("wheel", tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert f"without the native library: {reason}" in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = names_in(wheel)
    assert "plyweight/_native.pyi" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("plyweight/_native_missing.txt").decode().startswith(reason)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [NO_COMPILER, {"CXX": "false"}])
def test_a_library_that_is_required_and_cannot_be_built_ends_the_build(tmp_path, environment):
    done = make("wheel", tmp_path, PLYWEIGHT_NATIVE="require", **environment)
    assert done.returncode != 0
    assert "the native library is required (PLYWEIGHT_NATIVE), but " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wheel_of_the_sdist_has_the_library_and_no_sources_of_it(tmp_path):
    try:
        HOOK["check_compiler"]()
    except HOOK["NotBuiltError"] as error:
        pytest.skip(str(error))
    done = make("sdist", tmp_path)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (unpacked / "native" / "module.cpp").exists()
    assert not list(unpacked.rglob("*.so"))
    assert not list(unpacked.rglob("_native_missing.txt"))

    done = make("wheel", tmp_path, root=unpacked, PLYWEIGHT_NATIVE="require")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}" in wheel.name
    names = names_in(wheel)
    assert f"plyweight/{HOOK['LIBRARY']}" in names
    assert "plyweight/_native_missing.txt" not in names
    assert not [name for name in names if name.startswith("native/")]

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from plyweight import native; print(native.library().__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(tmp_path)
