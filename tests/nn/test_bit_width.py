"""A model computes at one of its bit-widths, and says which there are."""

import pytest
import torch
from torch import nn

from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn import at_bit_width, bit_widths_of, prepare, set_bit_width


def chosen(model):
    return {module.bit_width for module in model.modules() if hasattr(module, "bit_width")}


@pytest.fixture
def model():
    float_model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return prepare(float_model, (2, 4, 8), pinned={"0": 8})


def test_a_layered_model_has_the_bit_widths_it_was_prepared_with(model):
    assert bit_widths_of(model) == (2, 4, 8)


def test_setting_a_bit_width_reaches_every_module(model):
    for bit_width in (4, 2, 8):
        set_bit_width(model, bit_width)
        assert chosen(model) == {bit_width}


@pytest.mark.parametrize("asked", [3, 0, 9, "4", 4.0, True, None])
def test_another_bit_width_is_refused_and_changes_nothing(model, asked):
    set_bit_width(model, 4)
    words = f"{asked} bits were asked for, but this Sequential stores 2, 4, 8"
    if type(asked) is not int:
        words = rf"the bit-width is {asked!r}, a \w+; give an integer, one of 2, 4, 8"
    with pytest.raises(BitWidthError, match=words):
        set_bit_width(model, asked)
    assert chosen(model) == {4}


def test_the_earlier_bit_width_comes_back(model):
    set_bit_width(model, 4)
    with at_bit_width(model, 2):
        assert chosen(model) == {2}
        with at_bit_width(model, 8):
            assert chosen(model) == {8}
        assert chosen(model) == {2}
    assert chosen(model) == {4}


def test_the_earlier_bit_width_comes_back_after_an_error(model):
    set_bit_width(model, 4)
    with pytest.raises(KeyError), at_bit_width(model, 2):
        raise KeyError
    assert chosen(model) == {4}


def test_a_float_model_has_no_bit_widths():
    for ask in (bit_widths_of, lambda model: set_bit_width(model, 4)):
        with pytest.raises(LayeringError, match="Linear has no bit-widths; get a layered copy"):
            ask(nn.Linear(2, 2))


def test_checkpointed_modules_run_again_at_the_same_width(model):
    inputs = torch.randn(6, 3)
    model(inputs)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        with at_bit_width(model, 2):
            outputs = (
                torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)
                if checkpointed
                else model(inputs)
            )
            outputs.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
