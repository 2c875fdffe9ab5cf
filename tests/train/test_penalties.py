"""Terms about the latent weights alone."""

import pytest
import torch
from nets import ConvNet
from torch import nn

from plyweight.codec import codes_at, decode, encode
from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn import prepare
from plyweight.train import damping_penalty, moment_penalty


def linear(weight, bit_widths=(2, 4, 8)):
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.weight.data.copy_(weight)
    return prepare(nn.Sequential(net), bit_widths)


def test_uniform_weights_have_no_moment_penalty_and_gaussian_ones_the_known_one():
    uniform = torch.linspace(-1, 1, 100_000).view(100, -1)
    assert moment_penalty(linear(uniform)) < 1e-6
    gaussian = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(  # kurtosis 3, skewness 0; a sample of 160,000 is off by a percent
        moment_penalty(linear(gaussian)), torch.tensor((3 - 1.8) ** 2), rtol=0.05, atol=0.0
    )


def test_weights_that_are_all_alike_have_a_penalty_and_a_gradient_that_are_finite():
    model = linear(torch.zeros(4, 4))
    penalty = moment_penalty(model)
    penalty.backward()
    assert penalty.isfinite()
    assert model[0].latent_weight.grad.isfinite().all()


def test_skew_weights_are_penalized():
    exponential = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)).log().neg()
    expected = torch.tensor((9.0 - 9.0) ** 2 + 2.0**2)  # its kurtosis is 9, its skewness 2
    found = moment_penalty(linear(exponential), kurtosis=9.0)
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0.5)  # heavy tails


def test_following_the_moment_penalty_flattens_the_weights():
    model = linear(torch.randn(50, 50))
    weight = model[0].latent_weight
    before = moment_penalty(model).item()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(moment_penalty(model), weight)
        with torch.no_grad():
            weight -= 5.0 * gradient
    assert moment_penalty(model) < 0.8 * before


@pytest.mark.parametrize("bit_width", [2, 4, 8])
def test_damping_is_half_the_squared_distance_to_the_centre_of_the_cell(bit_width):
    model = linear(torch.randn(6, 5))
    weight, scale = model[0].latent_weight, model[0].weight_quantizer.scale[:, None]
    level = decode(codes_at(encode(weight, scale), bit_width), bit_width).float()
    distance = (weight - scale * level) / (scale * 2 ** (8 - bit_width))
    expected = distance.square().mean() / 2
    torch.testing.assert_close(damping_penalty(model, bit_width=bit_width), expected)


def test_damping_draws_weights_to_the_centres():
    model = linear(torch.randn(20, 20))
    weight = model[0].latent_weight
    before = damping_penalty(model, bit_width=2).item()
    (gradient,) = torch.autograd.grad(damping_penalty(model, bit_width=2), weight)
    with torch.no_grad():
        weight -= 1e-2 * gradient / gradient.abs().max()
    assert damping_penalty(model, bit_width=2) < before


def test_a_pinned_module_is_damped_at_its_own_bit_width():
    net = nn.Sequential(nn.Linear(5, 6))
    free, pinned = prepare(net, (2, 8)), prepare(net, (2, 8), pinned={"0": 8})
    torch.testing.assert_close(
        damping_penalty(pinned, bit_width=2), damping_penalty(free, bit_width=8)
    )


@pytest.mark.parametrize("penalty", [lambda m: damping_penalty(m, bit_width=4), moment_penalty])
def test_tied_weights_are_counted_once(penalty):
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    nn.init.normal_(other.weight)  # of another distribution than the uniform start
    tied = nn.Linear(6, 6)
    tied.weight = one.weight
    expected = penalty(prepare(nn.Sequential(one, other), (2, 4, 8)))
    assert penalty(prepare(nn.Sequential(one, tied, other), (2, 4, 8))) == expected
    tied.weight = nn.Parameter(one.weight.detach().clone())
    assert penalty(prepare(nn.Sequential(one, tied, other), (2, 4, 8))) != expected


def test_a_group_is_damped_as_a_channel_of_its_own():
    net, cut = nn.Linear(8, 5, bias=False), nn.Linear(4, 10, bias=False)
    with torch.no_grad():
        cut.weight.copy_(net.weight.view(10, 4))
    for bit_width in (2, 4, 8):
        torch.testing.assert_close(
            damping_penalty(prepare(net, (2, 4, 8), group_size=4), bit_width=bit_width),
            damping_penalty(prepare(cut, (2, 4, 8)), bit_width=bit_width),
        )


def test_what_cannot_be_penalized_is_refused():
    with pytest.raises(LayeringError, match="no layered modules"):
        moment_penalty(ConvNet())
    with pytest.raises(BitWidthError, match="3 bits were asked for"):
        damping_penalty(prepare(ConvNet(), (2, 4)), bit_width=3)
