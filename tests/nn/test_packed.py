"""What is resident are the planes that are held; their values are those that were trained."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plyweight.codec import to_planes
from plyweight.errors import BitWidthError
from plyweight.nn.packed import (
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
)
from plyweight.quantizers import WeightQuantizer

WIDTHS = (2, 3, 4, 8)


def trained(weight, *, gain_per_scale=False, **options):
    quantizer = WeightQuantizer(weight, WIDTHS, **options)
    shape = quantizer.clip.shape if gain_per_scale else (1,)
    gains = {b: torch.rand(shape) + 0.5 for b in quantizer.own_bit_widths[:-1]}
    quantizer.set_grid(torch.rand(quantizer.clip.shape) * 0.02 + 0.01, gains)
    return quantizer


def layers_of(quantizer, weight):
    """What each layer brings: planes and gain, at the bit-widths of the model."""
    planes = torch.from_numpy(to_planes(quantizer.codes(weight).numpy(), 8))
    layers, held = [], 0
    for bit_width in WIDTHS:
        own = max(bit_width, int(quantizer.pinned))
        gain = quantizer.gain.detach()[quantizer.own_bit_widths.index(own)]
        brings = own > held
        layers.append(
            (planes[held:own].clone(), gain.reshape(-1).reshape(gain.shape or (1,)).clone())
            if brings
            else (None, None)
        )
        held = max(own, held)
    return layers


def packed_of(quantizer, weight, dtype=torch.float32):
    return PackedWeight(
        tuple(weight.shape),
        quantizer.scale.detach(),
        WIDTHS,
        dtype=dtype,
        group_size=int(quantizer.group_size) or None,
        pinned=int(quantizer.pinned),
    )


def holding(weight, dtype=torch.float32, **options):
    quantizer = trained(weight, **options)
    packed = packed_of(quantizer, weight, dtype)
    for index, (planes, gain) in enumerate(layers_of(quantizer, weight)):
        packed.hold(index, planes, gain)
    return quantizer, packed


@pytest.mark.parametrize("gain_per_scale", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 4}, {"pinned": 4}, {"pinned": 8}, {"pinned": 3, "group_size": 2}]
)
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 6, 3, 3)], ids=str)
def test_the_values_are_those_that_were_trained(shape, options, gain_per_scale):
    weight = torch.randn(shape)
    quantizer, packed = holding(weight, gain_per_scale=gain_per_scale, **options)
    for bit_width in WIDTHS:
        quantizer.switch(bit_width)
        packed.switch(bit_width)
        assert torch.equal(packed(), quantizer(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"group_size": 4}, {"pinned": 3}], ids=str)
@pytest.mark.parametrize("shape", [(64, 6), (37, 5), (35, 3, 3, 3), (9, 200), (1, 77)], ids=str)
def test_by_block_or_at_once_the_values_are_the_same(shape, options, dtype, monkeypatch):
    monkeypatch.setattr("plyweight.nn.packed.BLOCK_WEIGHTS", 64)
    weight = torch.randn(shape)
    quantizer, packed = holding(weight, dtype, gain_per_scale=True, **options)
    for bit_width in (2, 8):
        quantizer.switch(bit_width)
        packed.switch(bit_width)
        assert torch.equal(packed(), quantizer(weight).to(dtype))


def test_compiled_it_is_the_definition_in_one_graph(monkeypatch):
    monkeypatch.setattr("plyweight.nn.packed.BLOCK_WEIGHTS", 64)
    _, packed = holding(torch.randn(64, 6), group_size=4)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    for bit_width in (2, 8):
        packed.switch(bit_width)
        assert torch.equal(compiled(), packed())
    torch._dynamo.reset()


def test_a_weight_that_fills_pages_of_its_own_has_the_same_values():
    weight = torch.randn(1025, 513)  # more than one page, and four blocks
    quantizer, packed = holding(weight)
    assert torch.equal(packed(), quantizer(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_values_are_in_the_dtype_of_the_model(dtype):
    weight = torch.randn(5, 6)
    quantizer, packed = holding(weight, dtype)
    assert packed().dtype == dtype
    assert torch.equal(packed(), quantizer(weight).to(dtype))


@pytest.mark.parametrize("pinned", [0, 4])
def test_layers_are_taken_and_given_back_in_turn(pinned):
    weight = torch.randn(5, 6)
    quantizer = trained(weight, pinned=pinned)
    packed, layers = packed_of(quantizer, weight), layers_of(quantizer, weight)
    steps = [*range(4), 3, 2, 1, *range(1, 4)]
    held = 0
    for layer in steps:
        if layer == held:
            packed.hold(layer, *layers[layer])
            held += 1
        else:
            packed.switch(WIDTHS[layer - 1])
            packed.release(layer)
            held -= 1
        assert packed.available_bit_widths == WIDTHS[:held]
        for bit_width in WIDTHS[:held]:
            packed.switch(bit_width)
            quantizer.switch(bit_width)
            assert torch.equal(packed(), quantizer(weight))


def test_released_planes_are_given_back_to_the_system():
    weight = torch.randn(5, 6)
    quantizer = trained(weight)
    packed = packed_of(quantizer, weight)
    for index, (planes, gain) in enumerate(layers_of(quantizer, weight)):
        packed.hold(index, planes, gain)
    planes = gain = None
    names = set(packed.state_dict())
    assert {"planes_3", "gain_8"} <= names
    gone = [weakref.ref(packed.planes_3), weakref.ref(packed.gain_8)]
    packed.switch(2)
    packed.release(3)
    assert [ref() for ref in gone] == [None, None]
    assert names - set(packed.state_dict()) == {"planes_3", "gain_8"}


def test_layers_come_and_go_at_the_end_alone():
    weight = torch.randn(5, 6)
    quantizer, packed = holding(weight)
    layers = layers_of(quantizer, weight)
    for wrong in (lambda: packed.hold(0, *layers[0]), lambda: packed.release(1)):
        with pytest.raises(AssertionError):
            wrong()
    for layer in (3, 2, 1):
        packed.release(layer)
    with pytest.raises(AssertionError):
        packed.release(0)


def test_a_width_that_the_artifact_does_not_have_is_refused():
    _, packed = holding(torch.randn(5, 6))
    with pytest.raises(BitWidthError, match="5 bits were asked for, but PackedWeight stores 2, 3"):
        packed.switch(5)


@pytest.mark.parametrize(
    ("module", "packed_class", "inputs", "function"),
    [
        (nn.Linear(6, 5), PackedLinear, torch.randn(2, 6), F.linear),
        (nn.Conv1d(6, 5, 3), PackedConv1d, torch.randn(2, 6, 7), F.conv1d),
        (nn.Conv2d(6, 5, 3), PackedConv2d, torch.randn(2, 6, 7, 7), F.conv2d),
        (nn.Embedding(5, 6), PackedEmbedding, torch.tensor([[1, 4]]), None),
    ],
    ids=["linear", "conv1d", "conv2d", "embedding"],
)
def test_a_packed_module_computes_its_function_and_holds_no_float_weight(
    module, packed_class, inputs, function
):
    weight, bias = module.weight.detach().clone(), getattr(module, "bias", None)
    quantizer, packed = holding(weight)
    packed_module = packed_class.from_float(module, packed)
    assert "weight" not in dict(packed_module.named_parameters())
    largest = max(t.numel() * t.element_size() for t in packed_module.buffers())
    assert largest < weight.numel()  # bytes: a plane of eight weights is one
    for bit_width in WIDTHS:
        packed.switch(bit_width)
        quantizer.switch(bit_width)
        values = quantizer(weight)
        expected = values[inputs] if function is None else function(inputs, values, bias)
        assert torch.equal(packed_module(inputs), expected)
        assert torch.equal(packed_module.weight, values)


def test_printing_shows_the_shape_and_the_bit_widths_held():
    _, packed = holding(torch.randn(5, 6))
    packed.release(3)
    assert str(packed) == "PackedWeight(shape=(5, 6), bit_widths=(2, 3, 4), kernel=reference)"
