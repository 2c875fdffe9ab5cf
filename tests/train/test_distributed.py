"""Two processes that share every batch come to what one process does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.half_batches import BALANCES, alone, halves, prepared

SCRIPT = Path(__file__).parent / "half_batches.py"
PRIVATE = ("gain", "clip", "offset")  # rows of tables, one for each bit-width


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """By process and balance, the state dict after a few steps."""
    folder = tmp_path_factory.mktemp("two")
    commands = [[sys.executable, str(SCRIPT), str(rank), str(folder)] for rank in (0, 1)]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("balance", BALANCES)
def test_both_processes_hold_the_same_model_private_rows_and_lazy_starts_included(two, balance):
    first, second = (states[balance] for states in two)
    assert {name.split(".")[-1] for name in first} >= {*PRIVATE, "kind_index", "widths"}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("balance", BALANCES)
def test_two_processes_equal_one_that_sees_both_halves_of_every_batch(two, balance):
    expected = alone(balance)
    # The sums of gradients are taken in another order; nothing else differs, and with these images
    # no value falls to the other side of a rounding.
    torch.testing.assert_close(two[0][balance], expected, rtol=1e-5, atol=1e-6)


def test_every_bit_width_has_learned_something_of_its_own(two):
    start = prepared()
    start(halves(0)[0][0])
    moved = two[0]["mean"]["hidden.input_quantizer.clip"] - start.hidden.input_quantizer.clip
    assert (moved != 0).all()
    assert len(set(moved.tolist())) == len(moved)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_step(two):
    first, second = (states["stopped"] for states in two)
    for found in (first, second):
        assert (found["step"], found["bit_width"]) == (1, 8)
        assert all(tensor.isfinite().all() for tensor in found["state"].values())
    assert second["module"] == "conv.input_quantizer"
    assert first["module"] is None
    assert "not finite in another process" in first["message"]


def test_a_balance_comes_to_another_model_than_the_mean(two):
    for balance in ("mgda", "upgrad"):
        assert not torch.equal(two[0][balance]["conv.weight"], two[0]["mean"]["conv.weight"])
