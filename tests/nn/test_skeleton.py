"""A skeleton has the names and shapes of a model, and none of its values."""

import pytest
import torch
from torch import nn

from plyweight.errors import LayeringError, ModelMismatchError
from plyweight.nn import prepare
from plyweight.nn.skeleton import Skeleton


def model():
    tied = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
    tied[2].weight = tied[0].weight
    return tied


NAMES = frozenset({"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.bias"})


def test_no_parameter_is_copied_and_the_model_is_untouched():
    original = model()
    skeleton = Skeleton(original, NAMES)
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert not any(p.is_meta for p in original.parameters())
    assert skeleton.device == torch.device("cpu")


def test_a_tensor_is_set_wherever_it_is_tied():
    skeleton = Skeleton(model(), NAMES)
    value = torch.randn(5, 3, dtype=torch.float64)
    skeleton.set("2.weight", value)
    assert skeleton.model[0].weight is skeleton.model[2].weight
    assert torch.equal(skeleton.model[0].weight, value.float())


def test_other_names_and_shapes_are_named_on_both_sides():
    skeleton = Skeleton(model(), NAMES)
    shapes = {name: tuple(skeleton.tensor(name).shape) for name in NAMES}
    skeleton.check(shapes)
    shapes["2.bias"] = (7,)
    with pytest.raises(ModelMismatchError, match=r"2\.bias \(7,\).*2\.bias \(5,\)"):
        skeleton.check(shapes)


def test_integers_do_not_become_floats():
    with pytest.raises(ModelMismatchError, match=r"2\.bias as torch\.int64"):
        Skeleton(model(), NAMES).set("2.bias", torch.zeros(5, dtype=torch.long))


def test_a_layered_model_is_refused():
    with pytest.raises(LayeringError, match="the model is layered already"):
        Skeleton(prepare(nn.Linear(2, 2), (8,)), frozenset())
