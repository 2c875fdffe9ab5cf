"""Budgets: the widest bit-width that fits, or a clear no."""

from math import prod

import pytest
from artifact.builders import build

from plyweight.artifact import Header
from plyweight.delivery.budget import Budget
from plyweight.errors import BitWidthError, BudgetError, LayeringError


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    return Header.parse(build(tmp_path_factory.mktemp("budget") / "tiny"))


def test_no_limit_is_the_widest(header):
    choice = Budget().choose(header)
    assert (choice.bit_width, choice.reason) == (8, "8 bits, the widest there is")


@pytest.mark.parametrize("bit_width", [2, 3, 8])
def test_max_bytes_is_met_exactly_and_not_by_one_less(header, bit_width):
    prefix = header.prefix_bytes(bit_width)
    assert Budget(max_bytes=prefix).choose(header).bit_width == bit_width
    if bit_width == 2:
        with pytest.raises(BudgetError, match=f"not even 2 bits of tiny fit: they need {prefix:,}"):
            Budget(max_bytes=prefix - 1).choose(header)
    else:
        assert Budget(max_bytes=prefix - 1).choose(header).bit_width < bit_width


def test_the_reason_names_what_the_next_width_would_need(header):
    choice = Budget(max_bytes=header.prefix_bytes(3)).choose(header)
    needed = header.prefix_bytes(8)
    assert choice.reason == (
        f"3 bits, the widest that fits: 8 need {needed:,} bytes "
        f"(max_bytes {header.prefix_bytes(3):,})"
    )


def memory_at(header, bit_width):
    """Planes lie as they are read; all else is a tensor once more, and one weight is decoded."""
    weights = header.weights.values()
    copied = sum(
        header.file_range(entry).num_bytes
        for index in range(header.layer_index(bit_width) + 1)
        for entry in header.tensors_of(index)
        if not entry.name.endswith(".q")
    )
    decoded = max(5 * 4 * w.num_weights + 4 * prod(w.scale_shape) for w in weights)
    return header.prefix_bytes(bit_width) + copied + decoded


def test_memory_counts_what_a_model_holds_and_the_largest_weight_decoded(header):
    needed = memory_at(header, 3)
    assert Budget(max_ram=needed).choose(header).bit_width == 3
    assert Budget(max_ram=needed - 1).choose(header).bit_width == 2


def test_a_deadline_is_the_missing_bytes_at_the_rate_of_the_link(header):
    budget, need = Budget(deadline_s=10), header.prefix_bytes
    at = {"held_bytes": need(2), "rate": lambda: 100.0}
    seconds = (need(3) - need(2)) / 100
    assert budget.choose(header, left_s=seconds, **at).bit_width == 3
    assert budget.choose(header, left_s=seconds * 0.99, **at).bit_width == 2
    with pytest.raises(BudgetError, match=r"s at the 0.0001 MB/s of this link"):
        budget.choose(header, held_bytes=0, left_s=1, rate=lambda: 100.0)


def test_what_is_here_needs_no_time_and_no_measurement(header):
    def rate():
        raise AssertionError("measured")

    whole = header.file_bytes
    assert Budget(deadline_s=1).choose(header, held_bytes=whole, rate=rate).bit_width == 8
    assert Budget(max_bytes=whole).choose(header, rate=rate).bit_width == 8
    held = header.prefix_bytes(2)
    late = Budget(deadline_s=1).choose(header, held_bytes=held, left_s=-1, rate=lambda: 1e6)
    assert late.bit_width == 2


def test_several_limits_hold_at_once(header):
    memory = memory_at(header, 2)
    assert Budget(max_bytes=header.prefix_bytes(8), max_ram=memory).choose(header).bit_width == 2
    assert Budget(max_bytes=header.prefix_bytes(2), max_ram=10**9).choose(header).bit_width == 2


def test_a_bit_width_is_a_demand(header):
    assert Budget(bit_width=3).choose(header).reason == "3 bits, as asked"
    with pytest.raises(BitWidthError, match="4 bits were asked for"):
        Budget(bit_width=4).choose(header)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"bit_width": 2, "max_bytes": 5}, "were both given"),
        ({"max_bytes": 0}, "max_bytes is 0; give a positive number"),
        ({"max_ram": -1}, "max_ram is -1"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
        ({"max_bytes": True}, "max_bytes is True"),
        ({"max_bytes": "3 MB"}, "max_bytes is '3 MB'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, message):
    with pytest.raises(LayeringError, match=message):
        Budget(**limits)


def test_a_deadline_without_a_link_is_refused(header):
    with pytest.raises(LayeringError, match="nothing is fetched"):
        Budget(deadline_s=1).choose(header)
