"""Recalibrated statistics are plain means over the batches, one set for each bit-width."""

import pytest
import torch
from torch import nn

from plyweight.errors import LayeringError
from plyweight.nn import at_bit_width, prepare, set_bit_width
from plyweight.train import recalibrate


def prepared():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 2, 1)
    )
    model = prepare(net, (1, 2, 8))
    with torch.no_grad():
        model(torch.randn(4, 2, 6, 6))
    return model.train()


BATCHES = [torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_statistics_are_the_mean_over_the_batches_at_each_width():
    model = prepared()
    recalibrate(model, [(images, "labels") for images in BATCHES])
    norm = model[1]
    for row, bit_width in enumerate((1, 2, 8)):
        with torch.no_grad(), at_bit_width(model, bit_width):
            outputs = [model[0](images) for images in BATCHES]
        means = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
        variances = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
        # A running mean of three against a plain one: float32 rounding.
        torch.testing.assert_close(norm.running_mean[row], means, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var[row], variances, rtol=1e-5, atol=1e-6)
    assert not torch.equal(norm.running_mean[0], norm.running_mean[2])


def test_the_loader_is_read_once_and_no_further_than_asked():
    read = []

    def loader():
        for number, images in enumerate(BATCHES):
            read.append(number)
            yield images

    recalibrate(prepared(), loader())
    assert read == [0, 1, 2]
    one = prepared()
    recalibrate(one, BATCHES, num_batches=1)
    assert one[1].num_batches_tracked.tolist() == [1, 1, 1]


def test_dropout_is_off_and_modes_and_momenta_are_kept():
    model = prepared()
    model[3].eval()
    model[1].momentum = 0.25
    seen = []
    handle = model[3].register_forward_hook(lambda m, i, o: seen.append(torch.equal(i[0], o)))
    recalibrate(model, BATCHES)
    handle.remove()
    assert seen == [True] * 9
    assert model[1].momentum == 0.25
    assert [m.training for m in model] == [True, True, True, False, True]


def test_modes_are_kept_when_the_loader_fails():
    def broken():
        yield BATCHES[0]
        raise OSError("disk")

    model = prepared()
    set_bit_width(model, 2)
    with pytest.raises(OSError, match="disk"):
        recalibrate(model, broken())
    assert all(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    assert model[1].bit_width == model[0].weight_quantizer.bit_width == 2


def test_batches_of_another_kind_need_a_forward():
    model = prepared()
    with pytest.raises(LayeringError, match="give forward="):
        recalibrate(model, [{"pixels": BATCHES[0]}])
    recalibrate(model, [{"pixels": BATCHES[0]}], forward=lambda batch: model(batch["pixels"]))
    assert model[1].num_batches_tracked.tolist() == [1, 1, 1]


def test_a_loader_that_gives_nothing_is_refused():
    model = prepared()
    before = model[1].running_mean.clone()
    with pytest.raises(LayeringError, match="gave no batch"):
        recalibrate(model, [])
    assert torch.equal(model[1].running_mean, before)


def test_a_model_without_batch_norm_is_left_as_it_is():
    model = prepare(nn.Linear(3, 2), (2, 8))
    recalibrate(model, [])


def test_the_loader_may_give_one_more_batch_than_is_asked_for_and_keeps_it():
    batches = iter(BATCHES)
    recalibrate(prepared(), batches, num_batches=2)
    assert next(batches) is BATCHES[2]


def test_gradients_are_not_recorded():
    model = prepared()
    recalibrate(model, BATCHES)
    assert all(p.grad is None for p in model.parameters())
    assert not model[1].running_mean.requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": 3}, "model is a int; give a torch.nn.Module"),
        ({"model": nn.Linear(2, 2)}, "Linear has no bit-widths"),
        ({"loader": None}, "loader is a NoneType; give batches"),
        ({"num_batches": 0}, "num_batches is 0; give a positive integer or None"),
        ({"num_batches": 1.5}, "num_batches is 1.5"),
        ({"forward": "model"}, "forward is 'model'; give a function of a batch"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(LayeringError, match=words):
        recalibrate(**{"model": prepared(), "loader": BATCHES, **arguments})
