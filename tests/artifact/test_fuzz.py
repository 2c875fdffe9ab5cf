"""The work of scripts/fuzz_header.py for a second: its seeds, and mutations of them."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from golden import make
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]


def script():
    """The script as a module; atheris is asked for when it runs only."""
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts" / "fuzz_header.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = script()
SEEDS = {path.name: path.read_bytes() for path in sorted(FUZZ.CORPUS.iterdir())}


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_headers_and_sidecars(name):
    is_header, is_sidecar = FUZZ.check(SEEDS[name])
    assert is_header == name.startswith("header")
    assert is_sidecar == name.startswith("sidecar")


def test_the_seeds_are_those_of_the_golden_artifact():
    assert make.corpus() == SEEDS


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(SEEDS)), seed=st.integers(0, 2**32), times=st.integers(1, 3))
def test_a_mutated_seed_is_refused_or_means_one_thing_and_opens_in_stock_safetensors(
    name, seed, times
):
    value, rng = json.loads(SEEDS[name]), random.Random(seed)
    for _ in range(times):
        value = FUZZ.mutate(value, rng)
    FUZZ.check(json.dumps(value).encode())
