"""What a caller gives is compared with what the graph takes; nothing is converted silently."""

import numpy as np
import pytest

from plyweight.artifact import Port
from plyweight.engine.inputs import check_inputs
from plyweight.errors import InputError

PORTS = (
    Port("ids", "int64", ("batch", "length")),
    Port("mask", "bool", ("batch", "length")),
    Port("image", "float32", ("batch", 3, 4, 4)),
)
EXPECTED = "ids: int64 (batch, length); mask: bool (batch, length); image: float32 (batch, 3, 4, 4)"


def inputs(**changes):
    good = {
        "ids": np.zeros((2, 5), np.int64),
        "mask": np.ones((2, 5), bool),
        "image": np.zeros((2, 3, 4, 4), np.float32),
    }
    return good | changes


def test_what_fits_is_handed_on_in_the_order_of_the_graph():
    given = inputs()
    checked = check_inputs(PORTS, dict(reversed(given.items())))
    assert list(checked) == ["ids", "mask", "image"]
    assert all(checked[name] is given[name] for name in given)


def test_views_that_are_not_contiguous_are_copied():
    image = np.zeros((2, 4, 4, 3), np.float32).transpose(0, 3, 1, 2)
    assert check_inputs(PORTS, inputs(image=image))["image"].flags.c_contiguous


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], "the inputs are a list; give a dictionary of arrays by name: " + EXPECTED),
        (inputs(x=np.zeros(3)), "'x' is no input; the model expects " + EXPECTED),
        ({"ids": np.zeros((2, 5), np.int64)}, "too few inputs were given; the model expects "),
        (
            inputs(image=np.zeros((2, 3, 4, 4))),
            "input 'image' is float64; the model expects image: float32 (batch, 3, 4, 4), so give "
            "x.astype('float32') if its values are right",
        ),
        (inputs(image=np.zeros((2, 3, 4, 4), ">f4")), "input 'image' is >f4"),
        (inputs(ids=[[1], [2, 3]]), "input 'ids' is no array"),
        (
            inputs(image=np.zeros((3, 4, 4), np.float32)),
            "input 'image' has shape (3, 4, 4); the model expects image: float32 (batch, 3, 4, 4)",
        ),
        (
            inputs(image=np.zeros((1, 3, 4, 4), np.float32)),
            "input 'image' has shape (1, 3, 4, 4); the model expects image: float32 "
            "(batch, 3, 4, 4) where batch = 2, length = 5",
        ),
        (inputs(mask=np.ones((2, 4), bool)), "where batch = 2, length = 5"),
        (inputs(image=np.zeros((2, 1, 4, 4), np.float32)), "has shape (2, 1, 4, 4)"),
        (inputs(ids=np.zeros((0, 5), np.int64)), "input 'ids' has shape (0, 5)"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(given, message):
    with pytest.raises(InputError) as caught:
        check_inputs(PORTS, given)
    assert message in str(caught.value)
