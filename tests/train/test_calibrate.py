"""Calibrated, a float network keeps its moments at every bit-width, and its answers."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, ZooNet, batch
from torch import nn

from plyweight import calibrate, load, pack, prepare
from plyweight.demo import Digits, DigitsNet
from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn import at_bit_width, set_bit_width
from plyweight.train import JointObjective

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT.parent / "shared" / "data"
BIT_WIDTHS = (2, 4, 8)
IMAGES = batch()[0]


class Plain(nn.Module):
    """No batch norm: what is corrected is gains and biases."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc1 = nn.Linear(6, 7, bias=False)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, images):
        x = F.relu(self.conv(images)).mean(dim=(2, 3))
        return self.fc2(F.relu(self.fc1(x)))


def outputs_of(model, name, images, bit_width=None):
    """What the module of that name gives, ``(values, channels)``, over all its calls."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        if bit_width is None:
            model(images)
        else:
            with at_bit_width(model, bit_width):
                model(images)
    handle.remove()
    return torch.cat(seen).movedim(1, -1).flatten(end_dim=-2)


def calibrated(net, **options):
    model = prepare(net.eval(), BIT_WIDTHS, **options).eval()
    calibrate(model, [IMAGES])
    return model


def snapshot(model):
    kinds = [m.kind for m in model.modules() if hasattr(m, "kind")]
    modes = [m.training for m in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, kinds, modes


def assert_as_it_was(model, before):
    state, *others = snapshot(model)
    assert others == list(before[1:])
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[k], before[0][k]) for k in state)


@pytest.mark.parametrize("options", [{}, {"group_size": 2, "pinned": {"fc2": 4, "conv": 8}}])
def test_outputs_without_a_batch_norm_have_the_mean_of_float_at_every_width(options):
    net = Plain()
    model = calibrated(net, **options)
    for name in ("conv", "fc2"):
        expected = outputs_of(net, name, IMAGES)
        for bit_width in BIT_WIDTHS:
            got = outputs_of(model, name, IMAGES, bit_width)
            # Float32 sums in another order.
            torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)


def test_outputs_without_a_batch_norm_have_the_deviation_of_float_at_every_width():
    net = Plain()
    model = calibrated(net)
    expected = outputs_of(net, "conv", IMAGES).std(0)
    for bit_width in BIT_WIDTHS:
        got = outputs_of(model, "conv", IMAGES, bit_width).std(0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # float32, as above


def test_a_batch_norm_takes_the_correction_and_nothing_else_is_stored():
    net = ConvNet()
    model = calibrated(net)
    for name in ("bn1", "bn2"):
        expected = outputs_of(net, name, IMAGES)
        for bit_width in BIT_WIDTHS:
            got = outputs_of(model, name, IMAGES, bit_width)
            torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.std(0), expected.std(0), rtol=1e-4, atol=1e-5)
    for conv in (model.conv1, model.conv2):
        assert conv.weight_quantizer.gain.tolist() == [1, 1, 1]
        assert not conv.has_bias_rows
    assert model.fc.has_bias_rows


def test_latent_weights_mode_and_bit_width_stay():
    net = ConvNet()
    model = prepare(net, BIT_WIDTHS)
    model.bn1.eval()
    set_bit_width(model, 4)
    calibrate(model, [IMAGES])
    assert torch.equal(model.conv1.latent_weight, net.conv1.weight)
    assert [model.training, model.bn1.training, model.bn1.bit_width] == [True, False, 4]
    assert model.bn1.num_batches_tracked.tolist() == [0, 0, 0]


def test_statistics_of_plain_images_do_not_replace_those_of_training():
    net = ConvNet()
    with torch.no_grad():
        net.bn1.running_mean.fill_(0.7)  # of images that calibration does not see
        net.bn1.running_var.fill_(2.5)
    norm = calibrated(net).bn1
    torch.testing.assert_close(norm.running_mean[-1], net.bn1.running_mean, atol=0.05, rtol=0)
    torch.testing.assert_close(norm.running_var[-1], net.bn1.running_var, atol=0.05, rtol=0)


def test_all_batches_count_and_the_loader_is_read_once_and_no_further_than_asked():
    batches = iter([(IMAGES[:3], "labels"), (IMAGES[3:], "labels"), "left"])
    net = Plain().eval()
    # Without steps, which change from batch to batch, the first module sees the same either way.
    model = prepare(net, BIT_WIDTHS, activations=None).eval()
    calibrate(model, batches, num_batches=2)
    assert next(batches) == "left"
    one = calibrated(net, activations=None)
    expected = outputs_of(net, "conv", IMAGES).mean(0)
    for bit_width in BIT_WIDTHS:
        for each in (model, one):
            got = outputs_of(each, "conv", IMAGES, bit_width).mean(0)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # float32, as above


def test_a_module_that_runs_twice_is_corrected_for_both_calls():
    class Twice(Plain):
        def forward(self, images):
            return super().forward(images) + super().forward(-images)

    net = Twice()
    # Without steps, which the second call changes again, the first module sees what it saw.
    model = calibrated(net, activations=None)
    expected = outputs_of(net, "conv", IMAGES)
    assert len(expected) == 2 * 8 * 36
    for bit_width in BIT_WIDTHS:
        got = outputs_of(model, "conv", IMAGES, bit_width)
        torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)  # float32
        torch.testing.assert_close(got.std(0), expected.std(0), rtol=1e-4, atol=1e-5)


class Branched(Plain):
    """Its branch runs for large batches alone."""

    def __init__(self):
        super().__init__()
        self.branch, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, images):
        x = self.conv(images)
        if len(images) > 3:
            x = x + self.bn(self.branch(images))
        return self.fc2(F.relu(self.fc1(F.relu(x).mean(dim=(2, 3)))))


def test_what_a_batch_norm_absorbs_is_so_if_the_last_batch_did_not_run_it():
    model = prepare(Branched().eval(), BIT_WIDTHS).eval()
    calibrate(model, [IMAGES[:5], IMAGES[5:]])
    assert model.branch.weight_quantizer.gain.tolist() == [1, 1, 1]
    assert not model.branch.has_bias_rows
    assert model.conv.has_bias_rows


def test_a_bit_width_at_which_a_module_did_not_run_keeps_its_bias():
    class Skipping(Plain):
        def forward(self, images):
            layered = hasattr(self.fc2, "weight_quantizer")
            if layered and self.fc2.weight_quantizer.bit_width == 4:
                return images
            return super().forward(images)

    net = Skipping()
    rows = calibrated(net).fc2._parameters["bias"]
    assert torch.equal(rows[1], net.fc2.bias)
    assert not torch.equal(rows[0], net.fc2.bias)


def test_samples_that_come_one_by_one_are_one_value_of_each_channel():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, sample):
            return self.fc2(F.relu(self.fc1(sample)))

    net = Single().eval()
    samples = torch.randn(7, 4)
    single, together = (prepare(net, BIT_WIDTHS, activations=None).eval() for _ in range(2))
    calibrate(single, list(samples))
    calibrate(together, [samples])
    for name in ("fc1", "fc2"):
        got, expected = (m.get_submodule(name)._parameters["bias"] for m in (single, together))
        assert got.shape == expected.shape
    with torch.no_grad():
        for bit_width in BIT_WIDTHS:  # float32 sums in another order
            with at_bit_width(single, bit_width):
                got = single.fc1(samples).mean(0)
            torch.testing.assert_close(got, net.fc1(samples).mean(0), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_read_and_whose_module_never_runs_keeps_a_fitted_gain():
    class Read(Plain):
        def forward(self, images):
            x = F.relu(self.conv(images)).mean(dim=(2, 3))
            return F.linear(F.relu(self.fc1(x)), self.fc2.weight, self.fc2.bias)

    model = calibrated(Read())
    latent, gains = model.fc2.latent_weight.detach(), model.fc2.weight_quantizer.gain
    assert gains.shape == (3,)
    for gain, bit_width in zip(gains.tolist(), BIT_WIDTHS, strict=True):
        with torch.no_grad(), at_bit_width(model, bit_width):
            values = model.fc2.weight
        # Of all multiples of the values, these are nearest: what is left is orthogonal to them.
        assert abs(float(((latent - values) * values).sum())) < 1e-5 * float(values.square().sum())
        assert gain != 1
    assert not model.fc2.has_bias_rows
    assert model.conv.has_bias_rows


def test_before_a_shared_batch_norm_deviations_are_kept_and_means_where_there_is_a_bias():
    net = ConvNet()
    model = calibrated(net, batch_norm="shared", activations=None)
    assert model.conv1.bias is None
    assert model.conv2.has_bias_rows
    for bit_width in BIT_WIDTHS:
        got, expected = (
            outputs_of(*m) for m in ((model, "conv1", IMAGES, bit_width), (net, "conv1", IMAGES))
        )
        torch.testing.assert_close(got.std(0), expected.std(0), rtol=1e-4, atol=1e-5)  # float32
        got, expected = (
            outputs_of(*m) for m in ((model, "conv2", IMAGES, bit_width), (net, "conv2", IMAGES))
        )
        torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.std(0), expected.std(0), rtol=1e-4, atol=1e-5)


def test_tied_weights_share_their_gain_and_biases_that_are_tied_stay_one():
    net = Plain()
    net.fc3 = nn.Linear(7, 5)
    net.fc3.weight, net.fc3.bias = net.fc2.weight, net.fc2.bias
    model = calibrated(net)
    assert model.fc2.weight_quantizer is model.fc3.weight_quantizer
    assert model.fc2.weight_quantizer.gain.dim() == 1
    assert model.fc2._parameters["bias"] is model.fc3._parameters["bias"]
    assert not model.fc2.has_bias_rows


@pytest.mark.parametrize("net", [ConvNet, Plain, ZooNet])
@pytest.mark.parametrize("form", ["packed", "fake-quantized"])
def test_what_is_loaded_computes_what_was_calibrated(net, form, tmp_path):
    model = calibrated(net())
    pack(model, tmp_path / "net")
    loaded = load(tmp_path / "net", net(), form=form)
    for bit_width in BIT_WIDTHS:
        set_bit_width(loaded, bit_width)
        with torch.no_grad(), at_bit_width(model, bit_width):
            assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_checkpoint_of_a_calibrated_model_loads_into_a_prepared_one():
    net = Plain()
    model = calibrated(net)
    other = prepare(net, BIT_WIDTHS).eval()
    other.load_state_dict(model.state_dict())
    for bit_width in BIT_WIDTHS:
        with torch.no_grad(), at_bit_width(model, bit_width), at_bit_width(other, bit_width):
            assert torch.equal(other(IMAGES), model(IMAGES))


def test_training_goes_on_from_a_calibrated_model():
    model = calibrated(Plain()).train()
    images, labels = batch()
    objective = JointObjective(model, F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = objective.backward(images, labels)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        last = objective.backward(images, labels)
    assert all(last[b] < first[b] for b in BIT_WIDTHS)
    assert model.conv._parameters["bias"].grad.shape == (3, 6)


def test_the_same_images_give_the_same_model():
    net = ConvNet()
    first, second = calibrated(net), calibrated(net)
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


def broken():
    yield IMAGES
    raise OSError("disk")


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        ([], LayeringError, "gave no batch; calibrate needs at least one"),
        ([IMAGES, {"pixels": IMAGES}], LayeringError, "gave a dict; give batches .* give forward="),
        ([IMAGES, IMAGES * float("nan")], LayeringError, "inputs of conv1? are NaN or infinite"),
        ([IMAGES * 1e38], LayeringError, "NaN or infinite"),
        ([IMAGES[:0]], LayeringError, "a batch is empty at conv"),
        ([IMAGES, IMAGES[:, :2]], RuntimeError, "channels"),
        (broken, OSError, "disk"),
    ],
    ids=["no batch", "a dict", "not a number", "overflow", "empty", "other channels", "a disk"],
)
@pytest.mark.parametrize("net", [ConvNet, Plain])
def test_where_it_fails_the_model_is_as_it_was(net, loader, error, words):
    model = prepare(net(), BIT_WIDTHS).train()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        calibrate(model, loader() if callable(loader) else loader)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 3}, LayeringError, "model is a int; give a torch.nn.Module"),
        ({"model": nn.Linear(2, 2)}, LayeringError, "Linear has no bit-widths"),
        ({"loader": None}, LayeringError, "loader is a NoneType; give batches"),
        ({"num_batches": 0}, LayeringError, "num_batches is 0; give a positive integer or None"),
        ({"forward": "model"}, LayeringError, "forward is 'model'; give a function of a batch"),
        ({"weights": 2}, LayeringError, "weights is 2; give a mapping"),
        ({"weights": {3: 1.0}}, BitWidthError, "3 bits were asked for"),
        ({"weights": {2: -1.0, 4: 1.0, 8: 1.0}}, LayeringError, "give a number of 0 or more"),
        ({"weights": {2: 1.0}}, LayeringError, "give one for each of"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        calibrate(**{"model": prepare(Plain(), BIT_WIDTHS), "loader": [IMAGES], **arguments})


def test_a_packed_model_has_nothing_to_calibrate(tmp_path):
    pack(calibrated(Plain()), tmp_path / "net")
    with pytest.raises(LayeringError, match="no latent weights to calibrate"):
        calibrate(load(tmp_path / "net", Plain()), [IMAGES])


def test_a_forward_runs_batches_of_any_kind():
    net = Plain().eval()
    model = prepare(net, BIT_WIDTHS).eval()
    calibrate(model, [{"pixels": IMAGES}], forward=lambda batch: model(batch["pixels"]))
    state = calibrated(net).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_on_real_digits_calibrated_is_better_than_not_calibrated():
    digits = Digits.load()
    torch.manual_seed(0)
    net, generator = DigitsNet(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3)
    for _ in range(2):
        for images, labels in digits.batches(128, generator):
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    net.eval()
    seen = [images for images, _ in digits.batches(256, generator)][:2]
    model, plain = (prepare(net, BIT_WIDTHS, activations=8).eval() for _ in range(2))
    calibrate(model, seen)
    with torch.no_grad():
        expected = net(digits.test_images).argmax(dim=1)
        plain(seen[0])  # its steps start from it

    def agreement(network, bit_width):
        with torch.no_grad(), at_bit_width(network, bit_width):
            answers = network(digits.test_images).argmax(dim=1)
        return float((answers == expected).float().mean())

    # 540 digits, all of it seeded. Where the float network is right is another question: it is
    # hardly trained, and its batch norms lag behind.
    assert agreement(model, 8) >= 0.99
    assert agreement(model, 4) >= 0.97
    # At 8 bits the clip that others need too costs a digit or two.
    for bit_width in (2, 4):
        assert agreement(model, bit_width) >= agreement(plain, bit_width)
    assert agreement(model, 2) > agreement(plain, 2)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the pretrained networks are not beside this folder")
def test_a_pretrained_resnet_keeps_its_accuracy_at_8_6_and_4_bits(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "examples")])
    from cifar10_data import Cifar10
    from cifar10_nets import NETS
    from safetensors.torch import load_file

    data, net = Cifar10.load(DATA / "cifar10"), NETS["resnet20"]()
    weights = load_file(DATA / "weights" / "cifar10_resnet20.safetensors")
    net.load_state_dict(weights, strict=False)  # it has no num_batches_tracked
    model = prepare(net.eval(), (2, 3, 4, 6, 8), activations=8).eval()
    calibrate(model, [data.batch(step, 128, seed=0)[0] for step in range(2)])
    pack(model, tmp_path / "net")
    loaded = load(tmp_path / "net", NETS["resnet20"]())

    def accuracy(network):
        with torch.no_grad():
            pairs = data.test_batches(250, official=True)
            return sum(int((network(x).argmax(1) == y).sum()) for x, y in pairs) / 1000

    of_float = accuracy(net)
    for bit_width, allowed in ((8, 0.005), (6, 0.01), (4, 0.02)):
        set_bit_width(loaded, bit_width)
        assert accuracy(loaded) >= of_float - allowed, bit_width
