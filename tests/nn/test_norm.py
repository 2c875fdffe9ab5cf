"""Each bit-width has a batch norm of its own, which is torch's."""

import copy

import pytest
import torch
from nets import ConvNet, trained
from nets import batch as images_and_labels
from torch import nn

from plyweight import load, pack, recalibrate
from plyweight.errors import LayeringError
from plyweight.nn import (
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    at_bit_width,
    prepare,
    report,
)

WIDTHS = (2, 4, 8)
OPTIONS = [
    {},
    {"momentum": 0.3, "eps": 1e-2},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"track_running_stats": False, "affine": False},
]


def batch_norm(dims, **options):
    module = (nn.BatchNorm1d if dims < 4 else nn.BatchNorm2d)(3, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0)
    if module.running_mean is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    return module


def switchable(module):
    cls = SwitchableBatchNorm1d if isinstance(module, nn.BatchNorm1d) else SwitchableBatchNorm2d
    return cls.from_float(copy.deepcopy(module), WIDTHS)


def batch(dims):
    return torch.randn(6, 3, *[4] * (dims - 2)) * 2 + 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_each_width_is_a_batch_norm_alone(dims, options):
    module = batch_norm(dims, **options)
    layered = switchable(module)
    alone = {bit_width: copy.deepcopy(module) for bit_width in WIDTHS}
    for bit_width in (8, 2, 4, 2, 2, 8):  # each sees other batches, in turn
        layered.switch(bit_width)
        inputs = batch(dims)
        assert torch.equal(layered(inputs), alone[bit_width](inputs))
    layered.eval()
    for row, bit_width in enumerate(WIDTHS):
        alone[bit_width].eval()
        layered.switch(bit_width)
        inputs = batch(dims)
        assert torch.equal(layered(inputs), alone[bit_width](inputs))
        for name, tensor in alone[bit_width].state_dict().items():
            assert torch.equal(layered.state_dict()[name][row], tensor)


def test_only_the_current_width_is_trained():
    layered = switchable(batch_norm(2))
    layered.switch(4)
    before = layered.running_mean.clone()
    layered(batch(2)).square().sum().backward()
    for tensor in (layered.weight.grad, layered.bias.grad, layered.running_mean - before):
        assert tensor[[0, 2]].abs().sum() == 0
        assert tensor[1].abs().min() > 0
    assert layered.num_batches_tracked.tolist() == [0, 1, 0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradients_are_those_of_a_batch_norm_alone(options):
    module = batch_norm(4, **options)
    layered = switchable(module)
    inputs, upstream = batch(4), torch.randn(6, 3, 4, 4)
    gradients = []
    for one in (module, layered):
        layered.switch(2)
        x = inputs.clone().requires_grad_()
        outputs = one(x)
        layered.switch(8)  # after the forward pass
        outputs.backward(upstream)
        gradients.append([x.grad] + [p.grad for p in one.parameters()])
    assert torch.equal(gradients[0][0], gradients[1][0])
    for alone, rows in zip(gradients[0][1:], gradients[1][1:], strict=True):
        assert torch.equal(rows[0], alone)


def test_evaluation_leaves_the_statistics_alone():
    layered = switchable(batch_norm(2)).eval()
    before = {name: tensor.clone() for name, tensor in layered.state_dict().items()}
    layered(batch(2))
    assert all(torch.equal(layered.state_dict()[name], before[name]) for name in before)


def test_resetting_forgets_the_current_width_alone():
    layered = switchable(batch_norm(2))
    layered(batch(2))
    layered.switch(4)
    layered(batch(2))
    before = layered.running_var.clone()
    layered.reset_row()
    assert layered.running_mean[1].tolist() == [0.0] * 3
    assert layered.running_var[1].tolist() == [1.0] * 3
    assert layered.num_batches_tracked.tolist() == [0, 0, 1]
    assert torch.equal(layered.running_var[[0, 2]], before[[0, 2]])


def test_frozen_affine_parameters_stay_frozen():
    module = batch_norm(2)
    module.weight.requires_grad_(False)
    layered = switchable(module)
    assert not layered.weight.requires_grad
    assert layered.bias.requires_grad


@pytest.mark.parametrize("dims", [2, 4])
def test_inputs_of_the_wrong_shape_are_refused_as_torch_does(dims):
    module = batch_norm(dims)
    for one in (module, switchable(module)):
        with pytest.raises(ValueError, match=r"expected .* input"):
            one(torch.randn(2, 3, 4, 4, 4))


def test_a_state_dict_restores_every_width():
    trained = switchable(batch_norm(2))
    for bit_width in WIDTHS:
        trained.switch(bit_width)
        trained(batch(2))
    fresh = switchable(batch_norm(2))
    fresh.load_state_dict(trained.state_dict())
    for bit_width in WIDTHS:
        inputs = batch(2)
        outputs = []
        for one in (trained.eval(), fresh.eval()):
            one.switch(bit_width)
            outputs.append(one(inputs))
        assert torch.equal(*outputs)


def test_printing_shows_the_bit_widths():
    text = str(switchable(batch_norm(2)))
    assert text.startswith("SwitchableBatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True")
    assert text.endswith("bit_widths=(2, 4, 8))")


def test_a_shared_batch_norm_stays_the_float_module_and_is_named_so():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))
    model = prepare(net, (2, 4, 8), batch_norm="shared")
    assert type(model[1]) is nn.BatchNorm2d
    assert "1 (BatchNorm2d, 6 parameters): one batch norm is shared" in str(report(model))
    with pytest.raises(LayeringError, match="batch_norm is 'none'; give 'private' or 'shared'"):
        prepare(net, (2, 4, 8), batch_norm="none")


@pytest.mark.parametrize("group_size", [None, 4])
def test_where_a_batch_norm_is_shared_weights_keep_their_second_moment_at_every_width(group_size):
    net = nn.Sequential(nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5))
    model = prepare(net, (1, 2, 3, 8), group_size=group_size, batch_norm="shared")
    latent = model[0].latent_weight
    for bit_width in (1, 2, 3, 8):
        with at_bit_width(model, bit_width):
            moments = [w.detach().square().sum(dim=(1, 2, 3)) for w in (latent, model[0].weight)]
        torch.testing.assert_close(*moments)


def test_a_shared_batch_norm_is_measured_over_all_bit_widths():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))
    model = prepare(net, (2, 8), batch_norm="shared", activations=None)
    batches = [torch.randn(4, 2, 3, 3) + 1 for _ in range(3)]
    recalibrate(model, batches)
    means = []
    for bit_width in (2, 8):
        with torch.no_grad(), at_bit_width(model, bit_width):
            means += [model[0](batch).mean(dim=(0, 2, 3)) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(dim=0))


def test_a_net_with_shared_batch_norms_is_packed_loaded_and_smaller(tmp_path):
    images, _ = images_and_labels()
    sizes, model = {}, None
    for kind in ("private", "shared"):
        model = trained(ConvNet(), (2, 4, 8), batch_norm=kind)
        sizes[kind] = pack(model, tmp_path / f"{kind}.safetensors").layers[-1].total_bytes
    loaded = load(tmp_path / "shared.safetensors", ConvNet(), bit_width=2)
    with torch.no_grad(), at_bit_width(model, 2):
        assert torch.equal(loaded(images), model(images))
    assert sizes["shared"] < sizes["private"]
