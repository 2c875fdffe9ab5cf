"""Inputs come onto a grid whose kind and steps start from the first batch."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from plyweight.errors import LayeringError
from plyweight.quantizers import ActivationQuantizer
from plyweight.quantizers.activation import activation_widths

ALL = tuple(range(1, 9))
KINDS = ("unsigned", "signed", "offset")


def inputs_of(kind, num=4096):
    gaussian = torch.randn(num // 64, 64) * 2
    return {"unsigned": F.relu, "signed": torch.Tensor.clone, "offset": F.gelu}[kind](gaussian)


def seen(kind, bit_widths=ALL, **options):
    quantizer = ActivationQuantizer("match", bit_widths, **options)
    quantizer(inputs_of(kind))
    assert quantizer.kind == kind
    return quantizer


def set_to(kind, width, *, step=0.5, zero_point=0.0):
    quantizer = ActivationQuantizer("match", (width,))
    quantizer.set_kind(kind)
    quantizer.set_step(width, step, zero_point)
    return quantizer


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (F.relu, "unsigned"),
        (F.relu6, "unsigned"),
        (torch.sigmoid, "unsigned"),
        (F.gelu, "offset"),
        (F.silu, "offset"),
        (torch.Tensor.clone, "signed"),
        (torch.tanh, "signed"),
        (torch.zeros_like, "signed"),  # says nothing; signed excludes nothing
    ],
)
def test_the_first_batch_chooses_the_kind(function, kind):
    quantizer = ActivationQuantizer("match", (2, 8))
    assert quantizer.kind == "unset"
    quantizer(function(torch.randn(256, 16) * 2))
    assert quantizer.kind == kind
    quantizer(-torch.ones(4, 16))
    assert quantizer.kind == kind


def test_inputs_that_begin_as_zeros_are_not_cut_off_later():
    quantizer = ActivationQuantizer(8, (8,))
    assert torch.equal(quantizer(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert quantizer(torch.full((2, 3), -0.5)).tolist() == [[-0.5] * 3] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit_width", ALL)
def test_values_are_on_the_grid(kind, bit_width):
    quantizer = seen(kind)
    quantizer.switch(bit_width)
    values = quantizer(inputs_of(kind)).detach()
    row = bit_width - 1
    step, zero_point = quantizer.steps[row].item(), quantizer.zero_points[row].item()
    assert zero_point == round(zero_point)
    half = 0.5 if kind == "signed" and bit_width == 1 else 0.0
    codes = (values.double() / step - half + zero_point).unique()
    # A float32 product divided again: off by 2^-23 of the level at most.
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    codes = codes.round()
    assert codes.min() >= 0
    assert codes.max() <= 2**bit_width - 1
    assert len(codes) == len(values.unique())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit_width", ALL)
def test_zero_is_on_the_grid(kind, bit_width):
    quantizer = seen(kind)
    quantizer.switch(bit_width)
    value = quantizer(torch.zeros(1, 1)).item()
    if kind == "signed" and bit_width == 1:
        assert abs(value) == quantizer.steps[0].item() / 2
    else:
        assert value == 0


@pytest.mark.parametrize("bit_width", range(1, 9))
def test_an_offset_that_training_moved_keeps_zero_on_the_grid(bit_width):
    quantizer = seen("offset")
    quantizer.switch(bit_width)
    for offset in (-100.0, -0.123, 0.0, 0.5):
        with torch.no_grad():
            quantizer.offset.fill_(offset)
        zero_point = quantizer.zero_points[bit_width - 1].item()
        assert 0 <= zero_point <= 2**bit_width - 1
        assert quantizer(torch.zeros(1, 1)).item() == 0


def test_one_bit_signed_is_plus_or_minus_half_a_step():
    quantizer = set_to("signed", 1, step=3.0)
    assert quantizer(torch.tensor([[-9.0, -0.1, 0.1, 9.0]])).tolist() == [[-1.5, -1.5, 1.5, 1.5]]


def test_values_that_a_human_can_check():
    inputs = torch.tensor([[-9.0, -0.6, 0.3, 0.74, 9.0]])
    assert set_to("unsigned", 2)(inputs).tolist() == [[0.0, 0.0, 0.5, 0.5, 1.5]]
    assert set_to("signed", 2)(inputs).tolist() == [[-1.0, -0.5, 0.5, 0.5, 0.5]]
    assert set_to("offset", 2, zero_point=1.0)(inputs).tolist() == [[-0.5, -0.5, 0.5, 0.5, 1.0]]


@pytest.mark.parametrize("bit_width", ALL)
def test_the_first_step_is_that_of_lsq_and_reaches_no_further_than_the_largest_input(bit_width):
    inputs = inputs_of("unsigned")
    quantizer = ActivationQuantizer("match", (bit_width,))
    quantizer(inputs)
    levels = 2**bit_width - 1
    lsq, reach = 2 * inputs.mean().item() / math.sqrt(levels), inputs.max().item() / levels
    assert quantizer.steps.item() == pytest.approx(min(lsq, reach), rel=1e-6)


def test_the_step_gradient_that_a_human_can_check():
    # Step 1/2, levels 0 to 3: 0.4 -> 0.5, 1.2 -> 1.0, 9 is above and -1 below.
    quantizer = set_to("unsigned", 2)
    inputs = torch.tensor([[0.4, 1.2, 9.0, -1.0]], requires_grad=True)
    quantizer(inputs).backward(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert inputs.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]
    for_step = 1 * (1 - 0.8) + 2 * (2 - 2.4) + 4 * 3 + 8 * 0
    lsq = 1 / math.sqrt(4 * 3)  # four features, three positive levels
    # The clip is four steps.
    assert quantizer.clip.grad.item() == pytest.approx(for_step * lsq / 4, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit_width", ALL)
def test_the_gradients_are_those_of_lsq(kind, bit_width):
    """Against autograd through ``s * (r + (level - r).detach())``, cut at the grid's ends."""
    quantizer = seen(kind)
    quantizer.switch(bit_width)
    inputs = inputs_of(kind).requires_grad_()
    upstream = torch.randn(inputs.shape)
    ours = torch.autograd.grad(
        quantizer(inputs), [inputs, quantizer.clip, quantizer.offset], upstream, allow_unused=True
    )

    row, levels = bit_width - 1, 2**bit_width
    x = inputs.detach().double().requires_grad_()
    clip, offset = (
        p.detach().double().requires_grad_() for p in (quantizer.clip, quantizer.offset)
    )
    step = clip[row] / (levels / 2 if kind == "signed" else levels)
    half = 0.5 if kind == "signed" and bit_width == 1 else 0.0
    zero_point = {
        "unsigned": torch.tensor(0.0),
        "signed": torch.tensor(levels / 2 - half),
        "offset": -offset[row] / step,
    }[kind]
    zero_point = zero_point + (zero_point.round() - zero_point).detach() * (kind == "offset")
    low, high = -zero_point, levels - 1 - zero_point
    ratio = x / step
    # The rounding is that of float32, so that ties fall the same way.
    exact = (inputs.detach() / quantizer.steps[row].detach() - half).round() + half
    rounded = ratio + (exact - ratio).detach()
    values = torch.where(
        rounded < low, step * low, torch.where(rounded > high, step * high, step * rounded)
    )
    theirs = torch.autograd.grad(values, [x, clip, offset], upstream, allow_unused=True)
    lsq = (64 * max(high.item(), 1)) ** -0.5
    torch.testing.assert_close(ours[0].double(), theirs[0])
    # float32 sums of 4,096 terms against float64
    torch.testing.assert_close(ours[1].double(), theirs[1] * lsq, rtol=1e-3, atol=1e-4)
    if kind == "offset":
        torch.testing.assert_close(ours[2].double(), theirs[2] * lsq, rtol=1e-3, atol=1e-4)
    else:
        assert not ours[2].any()  # it takes part, for DistributedDataParallel, and is 0


@pytest.mark.parametrize("bit_width", [2, 4, 8])
def test_the_offset_gradient_is_the_finite_difference_over_whole_steps(bit_width):
    """Saturated inputs are moved by the zero point, a whole step at a time."""
    quantizer = set_to("offset", bit_width, step=0.25, zero_point=2.0)
    inputs = torch.tensor([[-1e3, 1e3, -1e3, 1e3]])
    upstream = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    (quantizer(inputs) * upstream).sum().backward()
    ends = []
    for zero_point in (3.0, 1.0):
        quantizer.set_step(bit_width, 0.25, zero_point)
        ends.append((quantizer(inputs) * upstream).sum().item())
    lsq = (4 * max(2**bit_width - 1 - 2, 1)) ** -0.5
    difference = (ends[1] - ends[0]) / 0.5 * lsq
    assert quantizer.offset.grad.item() == pytest.approx(difference, rel=1e-6)


def test_an_input_below_an_offset_grid_says_nothing_about_the_step():
    """It becomes the offset, whatever the step; both parts of its gradient must cancel."""
    quantizer = set_to("offset", 4, step=0.25, zero_point=3.0)
    quantizer(torch.full((2, 300), -1e3)).sum().backward()
    assert quantizer.clip.grad.item() == pytest.approx(0.0, abs=1e-5)
    assert quantizer.offset.grad.item() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_was_read_is_given_back_exactly(kind):
    quantizer = ActivationQuantizer("match", ALL)
    quantizer.set_kind(kind)
    for bit_width in ALL:
        step = (torch.rand(()) * 10 ** float(torch.randint(-6, 4, ()))).item()
        zero_point = float(torch.randint(0, 2**bit_width, ()))
        quantizer.set_step(bit_width, step, zero_point)
        assert quantizer.steps[bit_width - 1].item() == step
        if kind == "offset":
            assert quantizer.zero_points[bit_width - 1].item() == zero_point


def test_a_state_dict_restores_kind_and_values():
    for kind in KINDS:
        trained, fresh = seen(kind), ActivationQuantizer("match", ALL)
        fresh.load_state_dict(trained.state_dict())
        assert fresh.kind == kind
        inputs = inputs_of(kind)
        for bit_width in ALL:
            trained.switch(bit_width)
            fresh.switch(bit_width)
            assert torch.equal(fresh(inputs), trained(inputs))


def test_an_unset_quantizer_stays_unset_through_a_state_dict():
    fresh = seen("signed")
    fresh.load_state_dict(ActivationQuantizer("match", ALL).state_dict())
    assert fresh.kind == "unset"
    fresh(inputs_of("unsigned"))
    assert fresh.kind == "unsigned"


def test_an_empty_first_batch_is_refused():
    quantizer = ActivationQuantizer("match", (2, 8))
    with pytest.raises(LayeringError, match="the first batch is empty"):
        quantizer(torch.empty(0, 4))
    assert quantizer.kind == "unset"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_batch_that_is_not_finite_is_refused(bad):
    quantizer = ActivationQuantizer("match", (2, 8))
    with pytest.raises(LayeringError, match="the first batch has NaN or infinite activations"):
        quantizer(torch.tensor([[1.0, bad]]))
    assert quantizer.kind == "unset"


def test_an_empty_later_batch_has_no_gradient():
    for kind in KINDS:
        quantizer = seen(kind)
        for shape in ((0, 64), (2, 0, 64)):
            quantizer(torch.empty(shape)).sum().backward()
        assert quantizer.clip.grad.tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    quantizer = ActivationQuantizer("match", ALL)
    inputs = inputs_of("signed").to(dtype).view(4, 2, -1)
    for bit_width in ALL:
        quantizer.switch(bit_width)
        values = quantizer(inputs)
        assert values.dtype == dtype
        assert torch.equal(values, quantizer(inputs.float()).to(dtype))


@pytest.mark.parametrize(
    ("activations", "own", "widths"),
    [
        ("match", (2, 4, 8), (2, 4, 8)),
        (8, (2, 4, 8), (8, 8, 8)),
        ({2: 4, 4: 6, 8: 8}, (2, 4, 8), (4, 6, 8)),
        ({2: 4, 8: 8}, (8,), (8,)),
    ],
)
def test_activation_widths_follow_the_weights_as_told(activations, own, widths):
    assert activation_widths(activations, own) == widths
    assert ActivationQuantizer(activations, own).widths.tolist() == list(widths)


@pytest.mark.parametrize(
    ("activations", "words"),
    [
        ("same", "activations is 'same'; give 'match', an integer of 1 to 8, None"),
        (0, "activations is 0; give"),
        (9, "activations is 9; give"),
        (4.0, "activations is 4.0; give"),
        (True, "activations is True; give"),
        ({2: 2}, "activations maps {2: 2}, but weights of 8 bits need an entry too"),
        ({2: 2, 8: 16}, "activations is {2: 2, 8: 16}; give"),
    ],
)
def test_other_activation_widths_are_refused(activations, words):
    with pytest.raises(LayeringError, match=re.escape(words)):
        activation_widths(activations, (2, 8))


def test_switching_before_the_backward_pass_does_not_change_gradients():
    inputs = inputs_of("offset").requires_grad_()
    quantizer = seen("offset")
    tensors = [inputs, quantizer.clip, quantizer.offset]
    quantizer.switch(2)
    expected = torch.autograd.grad(quantizer(inputs).square().sum(), tensors)
    loss = quantizer(inputs).square().sum()
    quantizer.switch(8)
    gradients = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_an_infinite_input_is_the_largest_level_and_leaves_gradients_finite():
    quantizer = seen("unsigned")
    inputs = torch.tensor([0.5, float("inf")], requires_grad=True)
    values = quantizer(inputs)
    values.sum().backward()
    assert values.isfinite().all()
    assert inputs.grad.tolist() == [1.0, 0.0]
    assert quantizer.clip.grad.isfinite().all()
