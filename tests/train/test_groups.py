"""What decays, and how fast each bit-width's own rows learn."""

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, ZooNet, batch

from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn import prepare
from plyweight.train import JointObjective, RateByBitWidth, parameter_groups

WIDTHS = (2, 4, 8)


def names_by_group(model, **options):
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=1e-4, **options)
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}, groups


def test_only_weights_decay():
    named, groups = names_by_group(prepare(ConvNet(), WIDTHS))
    assert named["weights"] == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert {n.rpartition(".")[2] for n in named["scales"]} == {"clip", "gain", "offset"}
    assert named["others"] == {
        "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", "conv2.bias", "fc.bias"
    }  # fmt: skip
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0, 0.0]


def test_every_trainable_parameter_is_in_one_group():
    model = prepare(ZooNet(), WIDTHS, group_size=4)
    model.norm.weight.requires_grad_(False)
    named, _ = names_by_group(model)
    found = [name for names in named.values() for name in names]
    assert sorted(found) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_scales_may_learn_at_their_own_rate():
    _, groups = names_by_group(prepare(ConvNet(), WIDTHS), scale_rate=0.5, learning_rate=0.2)
    assert [g["lr"] for g in groups] == [0.2, 0.1, 0.2]
    _, groups = names_by_group(prepare(ConvNet(), WIDTHS))
    assert not any("lr" in g for g in groups)


def test_a_float_network_has_groups_too():
    named, _ = names_by_group(ConvNet())
    assert set(named) == {"weights", "others"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": 0.0, "scale_rate": float("inf")}, "scale_rate is inf"),
        ({"weight_decay": 0.0, "learning_rate": True}, "learning_rate is True"),
        ({"weight_decay": 0.0, "scale_rate": 0.5}, "a multiple of learning_rate; give that too"),
    ],
)
def test_wrong_rates_are_refused(options, message):
    with pytest.raises(LayeringError, match=message):
        parameter_groups(prepare(ConvNet(), WIDTHS), **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(LayeringError, match="no trainable parameters"):
        parameter_groups(ConvNet().requires_grad_(False), weight_decay=0.0)


def one_step(optimizer_class, factors=None, **options):
    """The parameters before and after one step."""
    torch.manual_seed(0)
    model = prepare(ConvNet(), WIDTHS, **options)
    objective = JointObjective(model, F.cross_entropy)
    images, labels = batch()
    objective.backward(images, labels)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    if factors:
        RateByBitWidth(optimizer, model, factors)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    return before, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_the_own_rows_of_a_bit_width_move_by_its_factor_with_any_optimizer(optimizer_class):
    before, plain = one_step(optimizer_class)
    _, shortened = one_step(optimizer_class, {2: 0.25, 4: 0.0})
    rows = {2: (0, 0.25), 4: (1, 0.0), 8: (2, 1.0)}
    for name in ("bn1.weight", "conv1.weight_quantizer.gain", "fc.input_quantizer.clip"):
        for row, factor in rows.values():
            moved = shortened[name][row] - before[name][row]
            full = plain[name][row] - before[name][row]
            # float32 near 1 is 1.2e-7 apart
            torch.testing.assert_close(moved, factor * full, rtol=1e-4, atol=3e-7)
    assert torch.equal(shortened["conv1.weight"], plain["conv1.weight"])  # shared, so untouched


def test_a_row_that_bit_widths_share_takes_the_factor_of_the_widest():
    before, plain = one_step(torch.optim.SGD, pinned={"conv1": 8})
    _, shortened = one_step(torch.optim.SGD, {2: 0.0, 8: 0.5}, pinned={"conv1": 8})
    name = "conv1.weight_quantizer.gain"
    assert plain[name].shape == (1,)
    moved, full = shortened[name] - before[name], plain[name] - before[name]
    torch.testing.assert_close(moved, 0.5 * full, rtol=1e-3, atol=1e-7)


def test_wrong_factors_are_refused():
    model = prepare(ConvNet(), WIDTHS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BitWidthError, match="3 bits were asked for"):
        RateByBitWidth(optimizer, model, {3: 1.0})
    with pytest.raises(LayeringError, match=r"factors\[2\] is -1"):
        RateByBitWidth(optimizer, model, {2: -1})
