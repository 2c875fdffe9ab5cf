"""Unfused attention is torch's attention, with projections that can be layered."""

import copy
import itertools

import pytest
import torch
from torch import nn

from plyweight.nn import UnfusedAttention, prepare, report, set_bit_width

N, L, S, E, H = 3, 4, 5, 8, 2
WIDTHS = (2, 8)


def attention(**options):
    """An ``nn.MultiheadAttention`` whose biases are not the zeros they start from."""
    module = nn.MultiheadAttention(E, H, **options)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return module


def operands(module, is_batched=True):
    """Query, key and value."""
    shapes = [(L, E), (S, module.kdim), (S, module.vdim)]
    if not is_batched:
        return [torch.randn(shape) for shape in shapes]
    if module.batch_first:
        return [torch.randn(N, *shape) for shape in shapes]
    return [torch.randn(length, N, features) for length, features in shapes]


def unfused(module):
    return UnfusedAttention.from_float(copy.deepcopy(module))


def assert_same(module, other, *inputs, **options):
    expected, expected_weights = module(*inputs, **options)
    outputs, weights = other(*inputs, **options)
    # The same products in another order: float32 sums of at most 8 terms of order 1.
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
]
MASKS = {
    "none": dict,
    "bool": lambda: {"attn_mask": torch.rand(L, S) < 0.3},
    "float": lambda: {"attn_mask": torch.randn(L, S)},
    "bool_3d": lambda: {"attn_mask": torch.rand(N * H, L, S) < 0.3},
    "float_3d": lambda: {"attn_mask": torch.randn(N * H, L, S)},
    "padding": lambda: {"key_padding_mask": torch.tensor([[0, 0, 0, 0, 1]] * N).bool()},
    "float_padding": lambda: {"key_padding_mask": torch.randn(N, S)},
    "both": lambda: {
        "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(2),
        "key_padding_mask": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0] * 5]).bool(),
    },
    "both_3d": lambda: {
        "attn_mask": torch.randn(N * H, L, S),
        "key_padding_mask": torch.randn(N, S),
    },
}
WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("wanted", WEIGHTS, ids=["outputs", "weights", "weights_per_head"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_attention_of_torch(options, mask, wanted):
    module = attention(**options)
    assert_same(module, unfused(module), *operands(module), **MASKS[mask](), **wanted)


@pytest.mark.parametrize("wanted", WEIGHTS, ids=["outputs", "weights", "weights_per_head"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_takes_what_is_not_batched(options, wanted):
    module = attention(**options)
    inputs = operands(module, is_batched=False)
    masks = {
        "attn_mask": torch.randn(H, L, S),
        "key_padding_mask": torch.randn(S),
    }
    assert_same(module, unfused(module), *inputs, **wanted)
    assert_same(module, unfused(module), *inputs, **masks, **wanted)


@pytest.mark.parametrize("wanted", WEIGHTS[:2], ids=["outputs", "weights"])
def test_a_causal_hint_comes_with_its_mask(wanted):
    module = attention(batch_first=True)
    inputs = torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    causal = {"attn_mask": mask, "is_causal": True}
    assert_same(module, unfused(module), inputs, inputs, inputs, **causal, **wanted)
    for one in (module, unfused(module)):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            one(inputs, inputs, inputs, is_causal=True)


def test_the_gradients_are_those_of_torch():
    module = attention()
    other = unfused(module)
    inputs = operands(module)
    for one in (module, other):
        one(*inputs)[0].square().sum().backward()
    projections = (other.q_proj, other.k_proj, other.v_proj)
    weights = torch.cat([projection.weight.grad for projection in projections])
    biases = torch.cat([projection.bias.grad for projection in projections])
    torch.testing.assert_close(weights, module.in_proj_weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(biases, module.in_proj_bias.grad, rtol=1e-4, atol=1e-4)


def test_dropout_drops_in_training_alone():
    other = unfused(attention(dropout=0.5))
    inputs = operands(other_dims := attention())
    assert other_dims.dropout == 0
    for wanted in ({"need_weights": False}, {"need_weights": True}):
        other.train()
        assert not torch.equal(other(*inputs, **wanted)[0], other(*inputs, **wanted)[0])
        other.eval()
        assert torch.equal(other(*inputs, **wanted)[0], other(*inputs, **wanted)[0])


def fused_with(layered, module):
    """``module`` with the weights that ``layered`` has now."""
    fused = copy.deepcopy(module)
    weights = [p.weight.detach() for p in (layered.q_proj, layered.k_proj, layered.v_proj)]
    with torch.no_grad():
        if fused.in_proj_weight is None:
            for name, weight in zip("qkv", weights, strict=True):
                getattr(fused, f"{name}_proj_weight").copy_(weight)
        else:
            fused.in_proj_weight.copy_(torch.cat(weights))
        fused.out_proj.weight.copy_(layered.out_proj.weight)
    return fused


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layered_attention_is_the_attention_of_torch_with_quantized_weights(options):
    module = attention(**options)
    layered = prepare(module, WIDTHS, activations=None)
    inputs, outputs = operands(module), []
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        for wanted in WEIGHTS:
            assert_same(fused_with(layered, module), layered, *inputs, **MASKS["both"](), **wanted)
        outputs.append(layered(*inputs)[0])
    assert not torch.allclose(*outputs, atol=1e-2)


def test_all_four_projections_are_layered():
    model = nn.ModuleDict({"attention": attention()})
    names = [f"attention.{name}_proj" for name in ("out", "q", "k", "v")]
    assert report(prepare(model, WIDTHS)).layered == tuple(names)
    kept = prepare(model, WIDTHS, exclude=["attention.out_proj"])
    assert report(kept).layered == tuple(names[1:])
    assert type(kept["attention"].out_proj) is nn.Linear


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_that_is_not_supported_stays_whole_and_is_named(options):
    model = nn.ModuleDict({"attention": attention(**options), "fc": nn.Linear(E, E)})
    layered = prepare(model, WIDTHS)
    assert report(layered).layered == ("fc",)
    assert {k.reason for k in report(layered).kept} == {
        "attention with add_bias_kv or add_zero_attn is not supported"
    }
    inputs = operands(model["attention"])
    assert torch.equal(layered["attention"](*inputs)[0], model["attention"](*inputs)[0])


def test_frozen_projections_stay_frozen():
    module = attention()
    module.in_proj_weight.requires_grad_(False)
    other = unfused(module)
    assert [p.weight.requires_grad for p in (other.q_proj, other.k_proj, other.v_proj)] == [
        False
    ] * 3
    assert other.q_proj.bias.requires_grad
    assert other.out_proj.weight.requires_grad


def test_autocast_computes_as_torch_does():
    module = attention(batch_first=True)
    inputs = operands(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for wanted, mask in itertools.product(WEIGHTS, ("none", "float", "both")):
            options = MASKS[mask]() | wanted
            expected = module(*inputs, **options)[0]
            outputs = unfused(module)(*inputs, **options)[0]
            assert outputs.dtype == expected.dtype
            # Two roundings to 8 bits, at other places, of values of order 1.
            torch.testing.assert_close(outputs, expected, rtol=0.05, atol=0.05)


def encoder(norm_first=False, **options):
    layer = nn.TransformerEncoderLayer(
        E, H, 16, batch_first=True, norm_first=norm_first, dropout=0.0, **options
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0] * 5]).bool()


# The float model, with which ours is compared, takes torch's fast path.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_an_encoder_in_evaluation_computes_with_quantized_weights(options, padding):
    """Torch's fast path would read the weights of its submodules past them."""
    model, inputs = encoder(**options), torch.randn(N, S, E)
    layered = prepare(model, WIDTHS, activations=None)
    outputs = {}
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        layered.train()  # no dropout, so training differs only in taking the slow path
        slow = layered(inputs, src_key_padding_mask=padding)
        layered.eval()
        with torch.no_grad():
            fast = layered(inputs, src_key_padding_mask=padding)
            reference = copy.deepcopy(model).eval()
            for mine, theirs in zip(reference.layers, layered.layers, strict=True):
                mine.self_attn = fused_with(theirs.self_attn, mine.self_attn)
                mine.linear1.weight.copy_(theirs.linear1.weight)
                mine.linear2.weight.copy_(theirs.linear2.weight)
            expected = reference(inputs, src_key_padding_mask=padding)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
        real = slice(None) if padding is None else ~padding  # torch's fast path writes 0 elsewhere
        torch.testing.assert_close(fast[real], expected[real], rtol=1e-4, atol=1e-5)
        outputs[bit_width] = fast
    assert not torch.allclose(outputs[2], outputs[8], atol=1e-2)


def test_an_encoder_whose_attention_is_excluded_computes_with_quantized_weights():
    model, inputs = encoder().eval(), torch.randn(N, S, E)
    exclude = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    layered = prepare(model, WIDTHS, activations=None, exclude=exclude)
    outputs = []
    with torch.no_grad():
        for bit_width in WIDTHS:
            set_bit_width(layered, bit_width)
            outputs.append(layered(inputs))
    assert not torch.allclose(*outputs, atol=1e-2)


def test_a_whole_transformer_with_its_decoder_works():
    model = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True)
    layered = prepare(model, WIDTHS, activations=None)
    assert len(report(layered).layered) == 3 * 4 + 2 * 2
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    options = {
        "tgt_mask": mask,
        "tgt_is_causal": True,
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    for mode in (True, False):
        model.train(mode)
        layered.train(mode)
        with torch.no_grad():
            expected = model(source, target, **options)
            outputs = layered(source, target, **options)
        # 8 bits: each weight within half a step of 2.5/128 root mean squares, six products deep.
        assert (outputs - expected).square().mean() < 0.01 * expected.square().mean()
    layered.train()
    layered(source, target, **options).sum().backward()
    assert all(p.grad is not None for name, p in layered.named_parameters() if "weight" in name)


def test_attention_whose_forward_was_replaced_stays_whole():
    model = nn.ModuleDict({"attention": attention(), "fc": nn.Linear(E, E)})
    model["attention"].forward = model["attention"].forward  # bound to the fused weights
    layered = prepare(model, WIDTHS)
    assert report(layered).layered == ("fc",)
    assert "its forward was replaced" in report(layered).kept[0].reason
    inputs = operands(model["attention"])
    assert torch.equal(layered["attention"](*inputs)[0], model["attention"](*inputs)[0])
