"""info: what is installed, and which kernels run."""

import sys
from importlib.metadata import version

import pytest
from cli.calls import assert_one_sentence, run, run_json

from plyweight import native
from plyweight.cli import installed
from plyweight.kernels.picking import triton_missing_because


@pytest.fixture
def no_library(monkeypatch):
    """As if it had never been built."""
    monkeypatch.setattr(native, "_missing_because", "nobody has built it")
    caches = (native.cpu_features, native._variants, native._choose)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def no_demand(monkeypatch):
    monkeypatch.delenv(native.DEMAND, raising=False)


def test_info_tells_versions_and_what_the_kernel_of_planes_is_and_why(capsys):
    told = run_json(capsys, "info")
    assert told["version"] == version("plyweight")
    assert told["numpy"] == version("numpy")
    assert told["extras"]["engine"]["onnxruntime"] == version("onnxruntime")
    assert "dev" not in told["extras"]
    choice = native.choose()
    assert told["native"] == {
        "is_built": native.missing_because() is None,
        "missing_because": native.missing_because(),
        "cpu_features": list(native.cpu_features()),
        "available": list(native.available()),
        "demanded": None,
        "kernels": {
            what: {"kernel": choice.kernel, "why": choice.why} for what in ("planes", "products")
        },
    }
    missing = triton_missing_because("cuda")
    assert told["triton"] == {"is_there": missing is None, "missing_because": missing}


def test_info_prints_it(capsys):
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"plyweight {version('plyweight')}  Python ")
    assert f"engine    onnxruntime {version('onnxruntime')}" in lines
    for what in ("planes    ", "products  "):
        assert f"{what}      {native.choose().kernel}: {native.choose().why}" in lines
    assert any(line.startswith("on a GPU        ") for line in lines)


def test_info_shows_what_is_missing(capsys, monkeypatch):
    def found(package):
        if package == "onnxruntime":
            raise installed.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(installed, "version", found)
    assert "engine    onnxruntime (missing)" in run(capsys, "info")[1]
    assert run_json(capsys, "info")["extras"]["engine"] == {"onnxruntime": None}


@pytest.mark.usefixtures("no_library")
def test_without_the_library_info_says_why_and_what_to_do(capsys):
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    assert "native library  missing: nobody has built it\n" in out
    assert "planes          reference: there is no native library: nobody has built it\n" in out
    assert out.endswith(f"\n{native.ADVICE}\n")
    told = run_json(capsys, "info")["native"]
    assert not told["is_built"]
    assert told["available"] == ["reference"]
    assert told["cpu_features"] == []


def test_a_demand_that_is_met_is_the_reason(capsys, monkeypatch):
    monkeypatch.setenv(native.DEMAND, "reference")
    told = run_json(capsys, "info")["native"]
    assert told["demanded"] == "reference"
    assert told["kernels"]["planes"]["why"] == "PLYWEIGHT_KERNEL demands it"


def test_a_demand_that_cannot_be_met_is_an_error_after_all_that_info_knows(capsys, monkeypatch):
    monkeypatch.setenv(native.DEMAND, "sse9")
    code, out, err = run(capsys, "info")
    assert "kernels here    " in out
    assert_one_sentence((code, "", err), "PLYWEIGHT_KERNEL", "'sse9'", *native.available())
    assert_one_sentence(run(capsys, "info", "--json"), "PLYWEIGHT_KERNEL", "'sse9'")


def test_info_imports_no_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(capsys, "info")[0] == 0
