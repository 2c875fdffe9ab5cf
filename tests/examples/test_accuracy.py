"""The accuracy benchmark: which runs it makes, and how it compares them."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", PATH)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)  # which the benchmark adds the example to
    sys.path.insert(0, str(PATH.parent))
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def found(accuracy):
    """How runs are compared."""
    return sys.modules[accuracy.Found.__module__]


@pytest.fixture
def made(accuracy, monkeypatch):
    """The runs that were made, by an example that only writes down its results."""
    made = []

    def main(arguments):
        folder = Path(arguments[arguments.index("--out") + 1])
        made.append(folder.name)
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({}))
        return 0

    monkeypatch.setattr(accuracy.cifar10, "main", main)
    return made


def test_a_run_makes_its_float_network_first_and_a_second_start_makes_nothing(
    accuracy, made, tmp_path
):
    run = accuracy.Run.parse("dedicated-4:1")
    for _ in range(2):
        assert accuracy.make(run, tmp_path, []) == 0
    assert made == ["float-1", "dedicated-4-1"]


def test_a_run_that_another_process_is_at_is_left_to_it(accuracy, made, tmp_path):
    run = accuracy.Run.parse("layered:0")
    with accuracy.locked(tmp_path, run, is_waiting=True) as is_mine:
        assert is_mine
        assert accuracy.make(run, tmp_path, []) == 0
    assert made == ["float-0"]


def test_a_run_that_fails_stops_the_benchmark_with_its_exit_code(accuracy, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy.cifar10, "main", lambda _: 143)
    assert accuracy.make(accuracy.Run.parse("layered:0"), tmp_path, []) == 143


@pytest.mark.parametrize("text", ["layered", "layered:x", "dedicated:0", "dedicated-9:0", "best:0"])
def test_what_is_no_run_is_refused(accuracy, text):
    with pytest.raises(ValueError):  # noqa: PT011  argparse says which option it was
        accuracy.Run.parse(text)


def test_a_difference_is_paired_image_by_image(found):
    # Four images: the first network gets two right that the second one does not.
    first = {0: np.array([True, True, True, False]), 1: np.array([True] * 4)}
    second = {0: np.array([True, False, False, False])}
    mean, error = found.difference(first, second)
    assert mean == 50
    assert error == pytest.approx(100 * math.sqrt(1 / 3) / 2, abs=1e-3)  # of 0, 1, 1, 0
    assert found.difference(first, first) == [0, 0]
    assert found.difference(first, {}) is None


def test_differences_are_those_of_seeds_that_both_have(found):
    first = {0: np.array([True, True]), 1: np.array([False, False])}
    second = {1: np.array([False, True]), 2: np.array([True, True])}
    assert found.difference(first, second)[0] == -50


def with_recipe(**changes):
    """The results of a run whose recipe differs from a common one in ``changes`` (None: lacks)."""
    recipe = {"epochs": 15, "learning_rate": 0.04, "batch_size": 128, "width_weights": {"2": 2.0}}
    recipe = {name: value for name, value in (recipe | changes).items() if value is not None}
    return {"configuration": {"net": "resnet8", "seed": 0, "recipe": recipe}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dedicated-2:0", {"width_weights": {"2": 1.0}, "sampling": "sandwich"}),
        ("dedicated-2:0", {"width_weights": None}),  # made before there was such a field
        ("calibrated:0", {"learning_rate": 0.1, "width_weights": None}),
        ("layered-all:0", {"sampling": "sandwich"}),
        ("layered:1", {"teacher": "none"}),  # which is what a recipe without the field says
    ],
)
def test_runs_that_differ_in_what_they_do_not_heed_stand_in_one_table(found, name, changes):
    layered, run = found.Run.parse("layered:0"), found.Run.parse(name)
    found.check_alike({layered: with_recipe(), run: with_recipe(**changes)})


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("layered:1", {"width_weights": {"2": 4.0}}, "width_weights"),
        ("layered:1", {"sampling": "sandwich"}, "sampling"),
        ("layered-all:0", {"width_weights": {"2": 4.0}}, "width_weights"),
        ("dedicated-2:0", {"learning_rate": 0.1}, "learning_rate"),
        ("dedicated-2:0", {"teacher": "float"}, "teacher"),
        ("calibrated:0", {"calibration_batches": 4}, "calibration_batches"),
    ],
)
def test_runs_of_two_recipes_are_refused_by_name(found, name, changes, named):
    layered, run = found.Run.parse("layered:0"), found.Run.parse(name)
    with pytest.raises(SystemExit, match=f"layered:0 and {name} differ in {named} "):
        found.check_alike({layered: with_recipe(), run: with_recipe(**changes)})
