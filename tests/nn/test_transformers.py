"""A model from transformers: its linear modules are transposed, and its head is tied."""

import pytest
import torch

from plyweight.nn import LayeredLinear, at_bit_width, prepare, report

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=50, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def layered(gpt2):
    return prepare(gpt2, (2, 4, 8), activations=None)


IDS = torch.arange(12).view(2, 6) * 4


def test_everything_that_is_a_matrix_is_layered(gpt2, layered):
    names = set(report(layered).layered)
    conv1ds = {name for name, module in gpt2.named_modules() if type(module).__name__ == "Conv1D"}
    assert len(conv1ds) == 8
    assert names == conv1ds | {"transformer.wte", "transformer.wpe", "lm_head"}
    assert {k.kind for k in report(layered).kept} == {"LayerNorm"}
    assert report(layered).num_parameters == gpt2.num_parameters()


def test_a_transposed_linear_module_is_layered_by_its_outputs(layered):
    mlp = layered.transformer.h[0].mlp.c_fc
    assert type(mlp) is LayeredLinear
    assert (mlp.in_features, mlp.out_features) == (32, 128)
    assert mlp.latent_weight.shape == (128, 32)
    assert mlp.weight_quantizer.clip.shape == (128,)


def test_the_head_stays_tied(layered):
    assert layered.lm_head.latent_weight is layered.transformer.wte.latent_weight
    assert layered.lm_head.weight_quantizer is layered.transformer.wte.weight_quantizer


@torch.no_grad()
def test_wide_logits_are_those_of_the_float_model_and_narrow_ones_are_not(gpt2, layered):
    logits = gpt2(IDS).logits
    error = {}
    for bit_width in (2, 4, 8):
        with at_bit_width(layered, bit_width):
            difference = layered(IDS).logits - logits
        error[bit_width] = (difference.square().mean() / logits.square().mean()).item()
    # At 8 bits only the clip at 2.5 root mean squares changes Gaussian weights: by .004 of their
    # mean square in each of nine matrices. Narrow widths err by .012 and .14 of it.
    assert error[8] < 0.04 < error[4] < error[2]


def test_it_trains(layered):
    model = prepare(
        transformers.GPT2LMHeadModel(layered.config), (2, 8), activations=None, group_size=16
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        with at_bit_width(model, 2):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
