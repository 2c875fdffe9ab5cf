"""Layered modules: `weight` is the weight at the current bit-width, and trains the latent one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plyweight.nn import prepare, set_bit_width

WIDTHS = (1, 2, 4, 8)


@pytest.mark.parametrize("bit_width", WIDTHS)
def test_the_weight_is_what_the_forward_pass_uses(bit_width):
    layered = prepare(nn.Linear(4, 5), WIDTHS, activations=None)
    set_bit_width(layered, bit_width)
    inputs = torch.randn(3, 4)
    assert torch.equal(layered(inputs), F.linear(inputs, layered.weight, layered.bias))
    assert torch.equal(layered.weight, layered.weight_quantizer(layered.latent_weight))
    assert len(layered.weight.abs().unique()) <= 5 * 2 ** (bit_width - 1)


def test_the_latent_weight_is_the_parameter_named_weight():
    layered = prepare(nn.Linear(4, 5), WIDTHS)
    assert dict(layered.named_parameters())["weight"] is layered.latent_weight
    assert layered.weight is not layered.latent_weight


def test_the_functional_use_of_a_weight_trains_the_latent_weight():
    layered = prepare(nn.Linear(4, 5), WIDTHS, activations=None)
    inputs = torch.randn(3, 4)
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        layered.zero_grad()
        layered(inputs).square().sum().backward()
        expected = layered.latent_weight.grad.clone()
        layered.zero_grad()
        F.linear(inputs, layered.weight, layered.bias).square().sum().backward()
        assert torch.equal(layered.latent_weight.grad, expected)
        assert expected.abs().sum() > 0


def test_a_weight_that_cannot_be_quantized_is_never_the_latent_one():
    """nn.Module answers an AttributeError inside a property with the parameter of its name."""
    layered = prepare(nn.Linear(4, 5), WIDTHS)
    del layered.weight_quantizer
    for use in (lambda: layered.weight, lambda: layered(torch.randn(2, 4))):
        with pytest.raises(
            RuntimeError, match=r"the weight cannot be quantized: .*weight_quantizer"
        ):
            use()


def test_a_new_parameter_replaces_the_latent_weight():
    layered = prepare(nn.Linear(4, 5), WIDTHS)
    new = nn.Parameter(torch.randn(5, 4))
    layered.weight = new
    assert layered.latent_weight is new
    with pytest.raises(TypeError, match="cannot assign"):
        layered.weight = torch.randn(5, 4)


def test_only_the_rows_asked_for_have_gradients():
    layered = prepare(nn.Embedding(9, 4), WIDTHS)
    layered(torch.tensor([[1, 1], [4, 7]])).sum().backward()
    touched = layered.latent_weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == [1, 4, 7]
    assert layered.weight_quantizer.clip.grad.nonzero().flatten().tolist() == [1, 4, 7]


def test_a_lookup_trains_as_the_whole_weight_does():
    layered = prepare(nn.Embedding(9, 4), WIDTHS)
    set_bit_width(layered, 2)
    ids, upstream = torch.tensor([[1, 1], [4, 7]]), torch.randn(2, 2, 4)
    layered(ids).backward(upstream)
    by_rows = [layered.latent_weight.grad.clone(), layered.weight_quantizer.clip.grad.clone()]
    layered.zero_grad()
    layered.weight[ids].backward(upstream)
    whole = [layered.latent_weight.grad, layered.weight_quantizer.clip.grad]
    torch.testing.assert_close(by_rows, whole)  # sums in another order


def test_the_padding_row_is_not_trained_and_stays_next_to_zero():
    layered = prepare(nn.Embedding(9, 4, padding_idx=0), WIDTHS)
    optimizer = torch.optim.SGD(layered.parameters(), lr=1.0)
    ids = torch.tensor([[0, 3, 0], [0, 0, 5]])
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        layered(ids).square().sum().backward()
        layered(ids).sum().backward()
    assert layered.latent_weight.grad[0].tolist() == [0.0] * 4
    assert layered.weight_quantizer.clip.grad[0] == 0
    optimizer.step()
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        # An all-zero row has the smallest clip there is, 1e-12.
        assert layered(torch.tensor([0])).abs().max() < 1e-11


def test_sparse_gradients_stay_sparse():
    layered = prepare(nn.Embedding(9, 4, sparse=True), WIDTHS)
    layered(torch.tensor([1, 4])).sum().backward()
    assert layered.latent_weight.grad.is_sparse


def test_autocast_computes_in_its_dtype_with_codes_of_float32():
    layered = prepare(nn.Linear(64, 8), WIDTHS, activations=8)
    inputs = torch.randn(5, 64)
    layered(inputs)
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = layered(inputs)
            quantized, weight = layered.input_quantizer(inputs), layered.weight
        assert outputs.dtype == torch.bfloat16
        assert quantized.dtype == weight.dtype == torch.float32
        expected = F.linear(quantized.bfloat16(), weight.bfloat16(), layered.bias.bfloat16())
        assert torch.equal(outputs, expected)
        outputs.sum().backward()
        assert layered.latent_weight.grad.dtype == torch.float32


def test_changing_the_width_before_the_backward_pass_does_not_change_gradients():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    layered = prepare(model, WIDTHS)
    inputs = torch.randn(4, 3, 6, 6)
    layered(inputs)
    gradients = []
    for in_between in (2, 8):
        layered.zero_grad()
        set_bit_width(layered, 2)
        loss = layered(inputs).square().mean()
        set_bit_width(layered, in_between)
        loss.backward()
        gradients.append([p.grad.clone() for p in layered.parameters() if p.grad is not None])
    assert len(gradients[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_printing_shows_the_bit_widths():
    text = str(prepare(nn.Linear(4, 5), WIDTHS, group_size=2, pinned={"": 2}))
    assert "LayeredLinear(\n  in_features=4, out_features=5, bias=True" in text
    assert "WeightQuantizer(bit_widths=(1, 2, 4, 8), pinned=2, group_size=2)" in text
    assert "ActivationQuantizer(widths=(2, 4, 8), kind=unset)" in text
