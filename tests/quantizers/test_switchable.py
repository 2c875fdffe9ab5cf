"""A bit-width is chosen by the model's number and lives in a tensor."""

import copy
import re

import pytest
import torch

from plyweight.errors import BitWidthError, LayeringError, ModelMismatchError
from plyweight.quantizers import (
    ActivationQuantizer,
    Switchable,
    WeightQuantizer,
    checked_bit_widths,
)


def switchable(bit_widths=(2, 4, 8), pinned=0):
    module = Switchable()
    module.make_switchable(bit_widths, pinned=pinned)
    return module


@pytest.mark.parametrize("bit_widths", [(2, 4, 8), [1], range(3, 6)])
def test_ascending_integers_of_1_to_8_are_bit_widths(bit_widths):
    assert checked_bit_widths(bit_widths) == tuple(bit_widths)


@pytest.mark.parametrize(
    ("bit_widths", "words"),
    [
        ((), "give at least one, ascending and each only once"),
        ((4, 2), "give at least one, ascending and each only once"),
        ((2, 2), "give at least one, ascending and each only once"),
        ((0, 2), "each must be an integer of 1 to 8"),
        ((2, 9), "each must be an integer of 1 to 8"),
        ((2.0, 4), "each must be an integer of 1 to 8"),
        ((True, 4), "each must be an integer of 1 to 8"),
        ("248", "give a sequence of integers such as (2, 4, 8)"),
        (8, "give a sequence of integers such as (2, 4, 8)"),
        ({2, 4}, "give a sequence of integers such as (2, 4, 8)"),
        (None, "give a sequence of integers such as (2, 4, 8)"),
    ],
)
def test_anything_else_is_refused_with_what_to_give(bit_widths, words):
    with pytest.raises(LayeringError, match=re.escape(words)) as caught:
        checked_bit_widths(bit_widths)
    assert str(bit_widths) in str(caught.value)


def test_it_starts_at_the_widest():
    assert switchable().bit_width == 8


def test_a_pinned_module_never_goes_below():
    module = switchable((2, 3, 4, 8), pinned=4)
    assert module.own_bit_widths == (4, 8)
    assert module.available_bit_widths == (2, 3, 4, 8)
    rows = []
    for bit_width in (2, 3, 4, 8):
        module.switch(bit_width)
        rows.append(int(module.row))
    assert rows == [0, 0, 0, 1]


def test_pinned_may_be_a_bit_width_that_the_model_does_not_have():
    assert switchable((2, 4), pinned=3).own_bit_widths == (3, 4)
    assert switchable((2, 4), pinned=6).own_bit_widths == (6,)


def test_a_bit_width_that_is_not_there_changes_nothing():
    module = switchable()
    module.switch(4)
    with pytest.raises(BitWidthError, match="3 bits were asked for, but Switchable stores 2, 4, 8"):
        module.switch(3)
    assert module.bit_width == 4
    assert int(module.row) == 1


def test_switching_between_forward_and_backward_leaves_the_gradients_alone():
    module = switchable()
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    module.switch(4)
    row = module.row_of(table)
    module.switch(2)
    row.backward(torch.tensor([10.0, 20.0]))
    assert table.grad.tolist() == [[0, 0], [10, 20], [0, 0]]


WEIGHT = torch.linspace(-1, 1, 30).view(5, 6)


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (
            WeightQuantizer(WEIGHT, (2, 8)),
            WeightQuantizer(WEIGHT, (4, 8)),
            ["model_bit_widths = 4, 8", "model_bit_widths = 2, 8"],
        ),
        (
            WeightQuantizer(WEIGHT, (2, 8), pinned=3),
            WeightQuantizer(WEIGHT, (2, 8), pinned=4),
            ["pinned = 4", "pinned = 3"],
        ),
        # Both make two groups of six inputs, so the shapes of the clips do not tell them apart.
        (
            WeightQuantizer(WEIGHT, (2, 8), group_size=3),
            WeightQuantizer(WEIGHT, (2, 8), group_size=4),
            ["group_size = 4", "group_size = 3"],
        ),
        (
            ActivationQuantizer("match", (2, 8)),
            ActivationQuantizer(8, (2, 8)),
            ["widths = 8, 8", "widths = 2, 8"],
        ),
    ],
)
def test_a_state_dict_of_other_settings_is_refused_and_changes_nothing(mine, theirs, words):
    mine = copy.deepcopy(mine)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ModelMismatchError) as caught:
        mine.load_state_dict(theirs.state_dict())
    assert all(word in str(caught.value) for word in words)
    assert all(torch.equal(mine.state_dict()[name], before[name]) for name in before)
