"""Exact values forward, the gradient of the identity backward."""

import pytest
import torch

from plyweight.quantizers import floor_ste, round_ste


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (round_ste, [-2.0, -0.0, 0.0, 2.0, 1e8]),  # halves to even
        (floor_ste, [-2.0, -1.0, 0.0, 1.0, 1e8]),
    ],
)
def test_values_are_exact_and_gradients_pass_unchanged(estimator, expected):
    values = torch.tensor([-1.5, -0.5, 0.5, 1.5, 1e8], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0])
    rounded = estimator(values)
    rounded.backward(upstream)
    assert torch.equal(rounded, torch.tensor(expected))
    assert torch.equal(values.grad, upstream)
