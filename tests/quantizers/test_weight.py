"""What is trained is what is shipped, and the gradients are LSQ's."""

import math

import numpy as np
import pytest
import torch

from plyweight.codec import codes_at, decode, encode, spread
from plyweight.quantizers import WeightQuantizer
from plyweight.quantizers.weight import INITIAL_CLIP, initial_clip

ALL = tuple(range(1, 9))
GRIDS = {
    "per_channel": {},
    "groups": {"group_size": 3},
    "ragged_groups": {"group_size": 4},
    "one_group": {"group_size": 100},
    "pinned": {"pinned": 4},
}
SHAPES = [(5, 6), (5, 6, 3), (4, 6, 3, 3)]


def nn_parameter(*shape):
    return torch.nn.Parameter(torch.randn(shape))


def grid(weight, *, gain_per_scale=False, seed=0, **options):
    """A quantizer whose clips and gains are not the ones it starts from."""
    quantizer = WeightQuantizer(weight, ALL, **options)
    random = torch.Generator().manual_seed(seed)
    clip = quantizer.clip.detach() * (0.5 + torch.rand(quantizer.clip.shape, generator=random))
    shape = clip.shape if gain_per_scale else (1,)
    gains = {b: 0.8 + 0.4 * torch.rand(shape, generator=random) for b in quantizer.own_bit_widths}
    quantizer.set_grid(clip / 128, gains)
    return quantizer


def values_by_hand(quantizer, weight, bit_width):
    """The rule, in numpy, element by element."""
    own = max(bit_width, int(quantizer.pinned))
    row = quantizer.own_bit_widths.index(own)
    group_size = int(quantizer.group_size) or None
    shape = tuple(weight.shape)
    scale = quantizer.scale.detach().numpy()
    gain = quantizer.gain.detach()[row].numpy()
    step = spread(scale * gain, shape, group_size)
    codes = encode(weight.detach().float().numpy(), spread(scale, shape, group_size))
    return decode(codes_at(codes, own), own).astype(np.float32) * step


@pytest.mark.parametrize("gain_per_scale", [False, True])
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forward_pass_is_the_codec(shape, options, gain_per_scale):
    weight = torch.randn(shape)
    quantizer = grid(weight, gain_per_scale=gain_per_scale, **options)
    for bit_width in ALL:
        quantizer.switch(bit_width)
        by_hand = values_by_hand(quantizer, weight, bit_width)
        assert np.array_equal(quantizer(weight).detach().numpy(), by_hand)


@pytest.mark.parametrize("bit_width", ALL)
def test_a_width_has_its_levels_and_no_more(bit_width):
    weight = torch.linspace(-1, 1, 5001)[None]
    quantizer = WeightQuantizer(weight, ALL)
    quantizer.switch(bit_width)
    assert len(quantizer(weight).unique()) == min(2**bit_width, 255)  # 8 bits have one zero


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_rows_are_the_rows_of_the_whole(options):
    weight = torch.randn(5, 6)
    quantizer = grid(weight, gain_per_scale=True, **options)
    rows = torch.tensor([4, 0, 0, 2])
    for bit_width in (1, 3, 8):
        quantizer.switch(bit_width)
        assert torch.equal(quantizer(weight[rows], rows), quantizer(weight)[rows])


def test_rows_have_the_gradients_of_the_whole():
    """A batch of embeddings moves a clip as much as the whole weight would."""
    weight = nn_parameter(50, 6)
    quantizer = grid(weight, gain_per_scale=True, group_size=3)
    quantizer.switch(3)
    rows, upstream = torch.tensor([4, 0, 2]), torch.randn(3, 6)
    quantizer(weight[rows], rows).backward(upstream)
    clip_of_rows, gain_of_rows = quantizer.clip.grad, quantizer.gain.grad
    quantizer.zero_grad()
    quantizer(weight)[rows].backward(upstream)
    torch.testing.assert_close(clip_of_rows, quantizer.clip.grad)  # sums in another order
    torch.testing.assert_close(gain_of_rows, quantizer.gain.grad)


def test_gradients_that_a_human_can_check():
    # Clip 128: a step is 1. At 2 bits 40 -> +32, -70 -> -96, 200 is saturated -> +96.
    weight = torch.tensor([[40.0, -70.0, 200.0]], requires_grad=True)
    quantizer = WeightQuantizer(weight, (2, 8))
    quantizer.set_grid(torch.tensor([1.0]), {2: torch.tensor([1.5])})
    quantizer.switch(2)
    values = quantizer(weight)
    assert values.tolist() == [[48.0, -144.0, 144.0]]
    values.backward(torch.tensor([[1.0, 2.0, 4.0]]))
    assert weight.grad.tolist() == [[1.5, 3.0, 0.0]]
    lsq = 1 / math.sqrt(3 * 2)  # three weights share the scale, two positive levels
    for_scale = 1.5 * (1 * (32 - 40) + 2 * (-96 + 70) + 4 * 96)
    assert quantizer.clip.grad.item() == pytest.approx(for_scale / 128 * lsq)
    for_gain = 1 * 32 + 2 * -96 + 4 * 96
    assert quantizer.gain.grad.tolist() == pytest.approx([for_gain * lsq, 0.0])


@pytest.mark.parametrize("gain_per_scale", [False, True])
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 3)], ids=str)
def test_the_gradients_are_those_of_lsq(shape, options, gain_per_scale):
    """Against autograd through ``gain * s * (r + (level - r).detach())`` in float64."""
    weight = (torch.randn(shape) * 2).requires_grad_()
    quantizer = grid(weight, gain_per_scale=gain_per_scale, **options)
    upstream = torch.randn(shape)
    for bit_width in ALL:
        quantizer.switch(bit_width)
        own = max(bit_width, int(quantizer.pinned))
        grads = torch.autograd.grad(
            quantizer(weight), [weight, quantizer.clip, quantizer.gain], upstream
        )
        latent, clip, gain = (
            t.detach().double().requires_grad_() for t in (weight, quantizer.clip, quantizer.gain)
        )
        group_size = int(quantizer.group_size) or None
        step = spread(clip / 128, shape, group_size)
        own_gain = gain[quantizer.own_bit_widths.index(own)]
        wide_gain = spread(own_gain, shape, group_size) if own_gain.dim() else own_gain
        ratio = latent / step
        codes = encode(weight.detach(), spread(quantizer.scale.detach(), shape, group_size))
        level = decode(codes_at(codes, own), own).double()
        through = ratio.clamp(-127.5, 127.5)  # no gradient where the code is saturated
        values = wide_gain * step * (through + (level - through).detach())
        for_weight, for_clip, for_gain = torch.autograd.grad(values, [latent, clip, gain], upstream)
        num_gains = own_gain.numel()
        lsq_clip = (weight.numel() / clip.numel() * 2 ** (own - 1)) ** -0.5
        lsq_gain = (weight.numel() / num_gains * 2 ** (own - 1)) ** -0.5
        # float32 against float64
        torch.testing.assert_close(grads[0].double(), for_weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[1].double(), for_clip * lsq_clip, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads[2].double(), for_gain * lsq_gain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bit_width", ALL)
def test_the_gradient_of_the_gain_is_its_finite_difference(bit_width):
    """Values are linear in the gain, so the difference is exact but for rounding."""
    weight, upstream = nn_parameter(5, 6), torch.randn(5, 6)
    quantizer = grid(weight)
    quantizer.switch(bit_width)
    row = bit_width - 1
    (quantizer(weight) * upstream).sum().backward()
    ends = []
    for change in (-0.25, 0.25):
        with torch.no_grad():
            quantizer.gain[row] += change
            ends.append((quantizer(weight) * upstream).double().sum())
            quantizer.gain[row] -= change
    lsq = (weight.numel() * 2 ** (bit_width - 1)) ** -0.5
    difference = (ends[1] - ends[0]).item() / 0.5 * lsq
    assert quantizer.gain.grad[row].item() == pytest.approx(difference, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bit_width", ALL)
def test_the_gradient_of_the_clip_of_saturated_weights_is_its_finite_difference(bit_width):
    """Saturated weights are proportional to the clip, so the difference is exact."""
    weight = torch.nn.Parameter(torch.randn(3, 8).sign() * 10)
    upstream = torch.randn(3, 8)
    quantizer = WeightQuantizer(weight, ALL)
    quantizer.set_grid(torch.tensor([1.0, 2.0, 3.0]) / 128, {bit_width: torch.tensor([1.25])})
    quantizer.switch(bit_width)
    (quantizer(weight) * upstream).sum().backward()
    ends = []
    for change in (-0.5, 0.5):
        with torch.no_grad():
            quantizer.clip += change
            ends.append((quantizer(weight) * upstream).double().sum(dim=1))
            quantizer.clip -= change
    difference = (ends[1] - ends[0]) * (8 * 2 ** (bit_width - 1)) ** -0.5
    torch.testing.assert_close(quantizer.clip.grad.double(), difference, rtol=1e-5, atol=1e-6)


def test_a_weight_is_trained_exactly_where_its_code_is_not_saturated():
    weight = torch.tensor([[127.25, 127.5, -127.25, -127.5, 500.0]], requires_grad=True)
    quantizer = WeightQuantizer(weight, (8,))
    quantizer.set_grid(torch.tensor([1.0]), {})
    quantizer(weight).sum().backward()
    assert weight.grad.tolist() == [[1, 0, 1, 0, 0]]


def test_frozen_weights_have_a_frozen_grid():
    quantizer = WeightQuantizer(torch.randn(3, 4), (2, 8))
    assert not any(p.requires_grad for p in quantizer.parameters())
    quantizer = WeightQuantizer(nn_parameter(3, 4), (2, 8))
    assert all(p.requires_grad for p in quantizer.parameters())


def test_the_first_clip_is_two_and_a_half_root_mean_squares_at_most_the_largest():
    weight = torch.tensor([[3.0, -4.0, 0, 0], [1, 1, -1, -1], [0, 0, 0, 0]])
    # Root mean squares 2.5, 1 and 0, largest magnitudes 4, 1 and 0.
    assert initial_clip(weight, None).tolist() == pytest.approx([4.0, 1.0, 1e-12])
    wide = torch.randn(2, 4000)
    rms = wide.square().mean(dim=1).sqrt()
    torch.testing.assert_close(initial_clip(wide, None), INITIAL_CLIP * rms)


@pytest.mark.parametrize("shape", [(3, 10), (3, 10, 4), (3, 10, 2, 2)], ids=str)
@pytest.mark.parametrize("group_size", [1, 4, 5, 10, 11])
def test_the_first_clip_of_a_group_is_that_of_its_weights_alone(shape, group_size):
    weight = torch.randn(shape)
    clip = initial_clip(weight, group_size)
    assert clip.shape == (3, math.ceil(10 / group_size))
    for channel in range(3):
        for group in range(clip.shape[1]):
            part = weight[channel, group * group_size : (group + 1) * group_size]
            alone = initial_clip(part.reshape(1, -1), None).item()
            assert clip[channel, group].item() == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"group_size": 4}])
def test_the_first_gain_has_the_least_squared_error(options):
    weight = torch.randn(16, 64)
    quantizer = WeightQuantizer(weight, ALL, **options)
    for bit_width in (1, 2):
        quantizer.switch(bit_width)

        def error(bit_width=bit_width):
            return (quantizer(weight) - weight).double().square().sum().item()

        best = error()
        for factor in (0.99, 1.01):
            with torch.no_grad():
                quantizer.gain[bit_width - 1] *= factor
                assert error() > best
                quantizer.gain[bit_width - 1] /= factor
    assert quantizer.gain[2:].tolist() == [1.0] * 6


def test_a_channel_of_zeros_stays_next_to_zero():
    weight = torch.zeros(2, 5)
    quantizer = WeightQuantizer(weight, ALL)
    for bit_width in ALL:
        quantizer.switch(bit_width)
        assert quantizer(weight).abs().max() <= 1e-12
    assert quantizer.gain.tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_in_float32(dtype):
    weight = torch.randn(5, 6).to(dtype).requires_grad_()
    quantizer = WeightQuantizer(weight, ALL)
    assert {p.dtype for p in quantizer.parameters()} == {torch.float32}
    for bit_width in ALL:
        quantizer.switch(bit_width)
        values = quantizer(weight)
        assert values.dtype == dtype
        assert torch.equal(values, quantizer(weight.detach().float()).to(dtype))
    values.sum().backward()
    assert weight.grad.dtype == dtype
    assert quantizer.clip.grad.dtype == torch.float32


def test_autocast_changes_neither_codes_nor_gradients():
    weight = torch.randn(5, 6, requires_grad=True)
    quantizer = WeightQuantizer(weight, ALL)
    for bit_width in ALL:
        quantizer.switch(bit_width)
        plain = quantizer(weight)
        gradients = torch.autograd.grad(plain.square().sum(), [weight, quantizer.clip])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = quantizer(weight)
            assert torch.equal(quantizer.codes(weight), encode(weight, quantizer.scale[:, None]))
        assert values.dtype == torch.float32
        assert torch.equal(values, plain)
        again = torch.autograd.grad(values.square().sum(), [weight, quantizer.clip])
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default):
    torch.set_default_dtype(default)
    try:
        quantizer = WeightQuantizer(torch.randn(3, 4), ALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in quantizer.parameters()} == {torch.float32}


def test_a_negative_clip_is_its_magnitude():
    """An optimizer may step across zero."""
    weight = torch.randn(2, 5, requires_grad=True)
    quantizer = grid(weight)
    quantizer.switch(3)
    quantizer(weight).square().sum().backward()
    before, gradient = quantizer(weight).detach(), quantizer.clip.grad.clone()
    quantizer.zero_grad()
    with torch.no_grad():
        quantizer.clip.neg_()
    quantizer(weight).square().sum().backward()
    assert torch.equal(quantizer(weight), before)
    assert torch.equal(quantizer.clip.grad, -gradient)


@pytest.mark.parametrize("gain_shape", [(1,), (5,)], ids=str)
def test_a_grid_that_was_read_is_given_back_exactly(gain_shape):
    weight = torch.randn(5, 6)
    quantizer = WeightQuantizer(weight, (2, 4, 8))
    scale, gain = torch.rand(5) + 1e-6, torch.rand(gain_shape)
    quantizer.set_grid(scale, {2: gain})
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.gain[0].reshape(-1), gain)
    assert torch.equal(quantizer.gain[1:], torch.ones_like(quantizer.gain[1:]))


def test_switching_before_the_backward_pass_does_not_change_gradients():
    weight = torch.randn(5, 6, requires_grad=True)
    quantizer = grid(weight)
    tensors = [weight, *quantizer.parameters()]
    quantizer.switch(2)
    expected = torch.autograd.grad(quantizer(weight).square().sum(), tensors)
    loss = quantizer(weight).square().sum()
    quantizer.switch(8)
    gradients = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_no_rows_have_no_gradient():
    """An empty batch of an embedding must not put NaN into the clips."""
    weight = torch.randn(5, 6, requires_grad=True)
    quantizer = WeightQuantizer(weight, (2, 8))
    rows = torch.zeros(0, dtype=torch.long)
    quantizer(weight[rows], rows).sum().backward()
    assert quantizer.clip.grad.tolist() == [0.0] * 5
    assert quantizer.gain.grad.tolist() == [0.0] * 2
