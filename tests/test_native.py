"""Which kernel runs, and why; and what the native library refuses before it reads a byte."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from plyweight import KernelError, native

built = pytest.mark.skipif(
    native.missing_because() is not None, reason=f"no library: {native.missing_because()}"
)
SOURCES = Path(native.__file__).parents[2] / "native"

WITHOUT_THE_LIBRARY = """
import sys
sys.modules["plyweight._native"] = None  # so that an import of it fails
import numpy as np
from plyweight import native
from plyweight.codec import from_planes, to_planes
"""


@pytest.fixture
def library():
    return native.library()


def run(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )


# --- the choice ---------------------------------------------------------------------------------


def test_the_fastest_that_runs_here_is_chosen(monkeypatch):
    monkeypatch.delenv(native.DEMAND, raising=False)
    choice = native.choose()
    assert choice.kernel == native.available()[0]
    if native.missing_because() is None:
        assert choice.why == "the fastest that runs here"
        assert choice.variant.name == choice.kernel
    assert native.choose(among=("reference",)).kernel == "reference"


def test_the_kernels_that_run_here_stand_in_order_and_end_with_the_reference():
    names = native.available()
    assert list(names) == [name for name in native.KERNELS if name in names]
    assert names[-1] == native.REFERENCE


@pytest.mark.parametrize("kernel", native.available())
def test_a_demand_is_met(monkeypatch, kernel):
    choice = native.choose(kernel)
    assert (choice.kernel, choice.why) == (kernel, "it was asked for")
    monkeypatch.setenv(native.DEMAND, kernel)
    choice = native.choose()
    assert (choice.kernel, choice.why) == (kernel, "PLYWEIGHT_KERNEL demands it")


def test_the_call_demands_more_than_the_environment(monkeypatch):
    monkeypatch.setenv(native.DEMAND, "sse9")
    assert native.choose(native.REFERENCE).kernel == native.REFERENCE


def test_a_demand_that_cannot_be_met_is_an_error_that_names_what_can(monkeypatch):
    there = ", ".join(native.available())
    with pytest.raises(KernelError, match=f"the kernel 'sse9', but what runs here is {there}"):
        native.choose("sse9")
    monkeypatch.setenv(native.DEMAND, "sse9")
    with pytest.raises(KernelError, match="PLYWEIGHT_KERNEL demands the kernel 'sse9'"):
        native.choose()
    with pytest.raises(KernelError, match="but what runs here is reference"):
        native.choose(native.KERNELS[0], among=("reference",))


def test_an_empty_demand_is_none(monkeypatch):
    monkeypatch.setenv(native.DEMAND, "")
    assert native.demanded() is None
    assert native.choose().kernel == native.available()[0]


def test_without_the_library_codes_and_planes_work_and_the_reason_is_told():
    done = run(
        WITHOUT_THE_LIBRARY
        + "codes = np.arange(9, dtype=np.uint8)\n"
        + "assert np.array_equal(from_planes(to_planes(codes, 4), (9,)), codes)\n"
        + "assert native.available() == ('reference',) and native.cpu_features() == ()\n"
        + "assert native.missing_because() is not None\n"
        + "print(native.choose().why)\n",
        **{native.DEMAND: ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("there is no native library: ")


@pytest.mark.parametrize("call", ["native.library()", "native.choose('portable')"])
def test_a_library_that_is_wanted_and_missing_is_an_error_that_says_what_to_do(call):
    done = run(WITHOUT_THE_LIBRARY + call)
    assert "KernelError: " in done.stderr
    assert native.ADVICE in done.stderr


# --- the library --------------------------------------------------------------------------------


@built
def test_the_library_was_built_from_the_sources_beside_it(library):
    hook = pytest.importorskip("hatchling") and SOURCES / "build_hook.py"
    if not hook.exists():
        pytest.skip("installed without its sources")
    code = f"import runpy; print(runpy.run_path({str(hook)!r})['sources_digest']())"
    wanted = run(code).stdout.strip()
    assert len(wanted) == 64
    assert wanted == library.SOURCES, "build it again: python native/build_hook.py"


@built
def test_the_processor_has_what_its_variants_need(library):
    features = set(native.cpu_features())
    needed = {
        "portable": set(),
        "neon": {"neon"},
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vnni", "gfni"},
    }
    assert "portable" in native.available()
    for variant in library.variants():
        assert needed[variant.name] <= features


@built
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system says it nowhere else")
def test_the_processor_has_what_the_system_says_it_has():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    names = {"neon": "asimd", "dotprod": "asimddp", "avx512vnni": "avx512_vnni"}
    names |= {"avx512bf16": "avx512_bf16"}
    assert {names.get(name, name) for name in native.cpu_features()} <= set(told)


@pytest.fixture
def portable(library):
    return library.Variant.portable


@built
@pytest.mark.parametrize(
    "codes",
    [
        None,
        [0] * 8,
        np.zeros(8, np.int8),
        np.zeros(8, np.uint16),
        np.zeros((2, 4), np.uint8),
        np.zeros(16, np.uint8)[::2],
    ],
    ids=repr,
)
def test_codes_of_another_kind_never_reach_a_kernel(library, portable, codes):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        library.pack_planes(codes, np.zeros((2, 1), np.uint8), portable)
    for unpack in (library.unpack_planes, library.unpack_levels):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            unpack([np.zeros(1, np.uint8)] * 2, codes, portable)


@built
@pytest.mark.parametrize(
    "planes",
    [
        None,
        np.zeros(2, np.uint8),
        np.zeros((2, 2), np.int8),
        np.zeros((2, 2), np.float32),
        np.zeros((2, 4), np.uint8)[:, ::2],
    ],
    ids=repr,
)
def test_planes_of_another_kind_never_reach_a_kernel(library, portable, planes):
    codes = np.zeros(16, np.uint8)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        library.pack_planes(codes, planes, portable)
    for unpack in (library.unpack_planes, library.unpack_levels):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            unpack(None if planes is None else list(planes), codes, portable)


@built
def test_what_must_not_be_written_is_not_taken_to_be_written(library, portable):
    frozen = np.zeros((1, 1), np.uint8)
    frozen.setflags(write=False)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        library.pack_planes(np.ones(8, np.uint8), frozen, portable)
    for unpack in (library.unpack_planes, library.unpack_levels):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            unpack([np.ones(1, np.uint8)], frozen[0], portable)


@built
@pytest.mark.parametrize(
    ("shape", "num_codes", "words"),
    [
        ((0, 1), 8, "0 planes were given; a code has 1 to 8"),
        ((9, 1), 8, "9 planes were given; a code has 1 to 8"),
        ((2, 1), 9, "a plane of 1 bytes; 9 codes need 2"),
        ((2, 2), 8, "a plane of 2 bytes; 8 codes need 1"),
        ((2, 1), 0, "a plane of 1 bytes; 0 codes need 0"),
    ],
)
def test_sizes_that_do_not_fit_never_reach_a_kernel(library, portable, shape, num_codes, words):
    planes, codes = np.zeros(shape, np.uint8), np.zeros(num_codes, np.uint8)
    with pytest.raises(ValueError, match=words):
        library.pack_planes(codes, planes, portable)
    for unpack in (library.unpack_planes, library.unpack_levels):
        with pytest.raises(ValueError, match=words):
            unpack(list(planes), codes, portable)


@built
def test_one_plane_that_is_too_short_is_enough_to_refuse(library, portable):
    planes = [np.zeros(2, np.uint8), np.zeros(1, np.uint8)]
    for unpack in (library.unpack_planes, library.unpack_levels):
        with pytest.raises(ValueError, match="a plane of 1 bytes; 16 codes need 2"):
            unpack(planes, np.zeros(16, np.uint8), portable)


@built
def test_a_variant_that_does_not_run_here_is_refused(library):
    missing = [v for v in library.Variant if v.name not in native.available()]
    assert missing, "no processor runs both neon and avx2"
    for variant in missing:
        with pytest.raises(ValueError, match="this variant cannot run here"):
            library.pack_planes(np.zeros(8, np.uint8), np.zeros((1, 1), np.uint8), variant)
        for unpack in (library.unpack_planes, library.unpack_levels):
            with pytest.raises(ValueError, match="this variant cannot run here"):
                unpack([np.zeros(1, np.uint8)], np.zeros(8, np.uint8), variant)


@built
def test_other_threads_run_while_a_kernel_does(library, portable):
    # A thread that needs the interpreter notes the time again and again. If the kernel kept the
    # interpreter there would be no note between its first and its last tenth, however often.
    codes, planes = np.zeros(2**24, np.uint8), np.zeros((8, 2**21), np.uint8)
    times, stop = [], threading.Event()

    def note_the_time():
        while not stop.wait(1e-4):
            times.append(time.monotonic())

    thread = threading.Thread(target=note_the_time)
    thread.start()
    try:
        for _ in range(200):
            started = time.monotonic()
            library.pack_planes(codes, planes, portable)
            tenth = (time.monotonic() - started) / 10
            if any(started + tenth < t < started + 9 * tenth for t in times):
                break
        else:
            pytest.fail("no other thread ran")
    finally:
        stop.set()
        thread.join()
