"""fit_edges: torch and graph round the same, so they answer the same."""

import copy
import io
from unittest import mock

import numpy as np
import pytest
import torch
from graph.nets import SmallMobileNet, SmallResNet, SmallTransformer, prepared
from graph.packed import IMAGES, NETS, Packed
from nets import ConvNet, ZooNet
from torch import nn

import plyweight
from plyweight.engine.values import SlotValues
from plyweight.errors import LayeringError, ModelMismatchError
from plyweight.nn import at_bit_width, bit_widths_of
from plyweight.nn.outputs import output_quantizers, round_output
from plyweight.nn.rows import row_parameters
from plyweight.packing import fit_edges
from plyweight.quantizers import ActivationQuantizer

SMALL_IMAGES = IMAGES[:, :, :8, :8].contiguous()
ALL = {
    **{name: (net, IMAGES, {}) for name, net in NETS.items() if name != "SmallMobileNet"},
    "ConvNet": (ConvNet, SMALL_IMAGES, {"activations": 8}),
    "ZooNet": (ZooNet, SMALL_IMAGES, {"bit_widths": (2, 4, 8), "pinned": {"stem": 8, "head": 5}}),
}


def fitted(net=SmallResNet, inputs=IMAGES, **options):
    torch.manual_seed(0)
    model = prepared(net(), inputs, **options)
    return model, fit_edges(model, inputs)


def outputs_of(model, inputs=IMAGES):
    found = []
    for bit_width in bit_widths_of(model):
        with torch.no_grad(), at_bit_width(model, bit_width):
            found.append(model(inputs))
    return found


@pytest.mark.parametrize(
    "name", ["SmallResNet", *(pytest.param(n, marks=pytest.mark.slow) for n in list(ALL)[1:])]
)
def test_the_graph_gives_torchs_own_numbers_and_stays_on_integers(name, tmp_path):
    net, inputs, options = ALL[name]
    torch.manual_seed(0)
    model = prepared(net(), inputs, **options)
    before = Packed(model, inputs, tmp_path)
    before.run(2, inputs)
    operators = before.operators()
    report = fit_edges(model, inputs)
    after = Packed(model, inputs, tmp_path)
    for bit_width in bit_widths_of(model):
        expected = after.expected(bit_width, inputs)
        difference = np.abs(after.run(bit_width, inputs) - expected).max(axis=-1)
        # A sum that is the middle of two levels but for float noise may go either way: in two of
        # the 32 images at most. The sum of the last block is computed by no module of its own.
        is_same = np.mean(difference > 1e-4 * expected.std()) < 0.07
        assert is_same or report.edges_left == ("add",)
    after.run(2, inputs)
    assert after.operators() == operators
    assert report.edges_left == (("add",) if name == "PaddedResNet" else ())


@pytest.mark.parametrize("name", ["SmallResNet", "SmallSqueezeNet"])
def test_no_grid_is_the_graphs_own_any_more(name, tmp_path):
    net, inputs, options = ALL[name]
    model, report = fitted(net, inputs, **options)
    quantizers = Packed(model, inputs, tmp_path).graph.quantizers
    assert all(quantizer.activation is not None for quantizer in quantizers.values())
    placed = {f"{module}.output_quantizer" for module in report.placed}
    assert set(output_quantizers(model)) == placed <= set(quantizers)


def test_a_residual_network_rounds_where_its_values_are_computed():
    _, report = fitted()
    names = ["bn1", "block1.bn2", "block1", "block2.bn2", "block2.shortcut", "block2"]
    assert list(report.placed) == names
    assert report.edges_left == report.biases_left == ()
    assert str(report) == "6 modules round their output to 8 bits"


def test_what_no_module_gives_is_named_and_left_to_the_graph(tmp_path):
    # Its inner modules are called twice, for values on grids of their own.
    model, report = fitted(SmallMobileNet)
    assert report.placed == ("stem.2", "head.2")
    assert report.edges_left == ("narrow:conv", "add", "narrow:conv:2")
    assert "rounded without torch only: narrow:conv" in str(report)
    packed = Packed(model, IMAGES, tmp_path)
    own = {name for name, q in packed.graph.quantizers.items() if q.activation is None}
    assert own == set(report.edges_left)
    packed.run(2, IMAGES)
    assert packed.operators()["Conv"] == packed.operators()["FusedConv"] == 0


@pytest.mark.parametrize("form", ["packed", "fake-quantized"])
def test_what_is_loaded_equals_what_was_packed(form, tmp_path):
    model, _ = fitted()
    path = tmp_path / "net"
    plyweight.pack(model, path)
    loaded = plyweight.load(path, SmallResNet(), form=form)
    for mine, theirs in zip(outputs_of(loaded), outputs_of(model), strict=True):
        assert torch.equal(mine, theirs)
    again = tmp_path / "again"
    if form == "fake-quantized":
        plyweight.pack(loaded, again, name="SmallResNet")
        assert again.read_bytes() == path.read_bytes()


def test_a_step_arrives_with_its_layer(tmp_path):
    model, _ = fitted()
    path = tmp_path / "net"
    plyweight.pack(model, path)
    loaded = plyweight.load(path, SmallResNet(), bit_width=2)
    plyweight.upgrade(loaded, path, bit_width=4)
    with torch.no_grad(), at_bit_width(model, 4):
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    plyweight.downgrade(loaded, 2)
    with torch.no_grad(), at_bit_width(model, 2):
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_biases_are_whole_numbers_afterwards(tmp_path):
    model, _ = fitted()
    packed = Packed(model, IMAGES, tmp_path)
    assert model.linear.has_bias_rows
    for bit_width in packed.header.bit_widths:
        values = SlotValues(packed.header, packed.graph, packed.layers, bit_width)
        for prefix in packed.graph.modules:
            unit = values.of(f"{prefix}.bias_scale")
            assert np.abs(values.bias_change(prefix) / unit).max() < 0.1


def test_a_second_time_changes_nothing():
    model, _ = fitted()
    before = outputs_of(model)
    report = fit_edges(model, IMAGES)
    assert report.placed == report.edges_left == report.biases_left == ()
    for mine, theirs in zip(outputs_of(model), before, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_the_bit_width_of_the_model_stays():
    model = prepared(SmallResNet(), IMAGES)
    plyweight.set_bit_width(model, 3)
    fit_edges(model, IMAGES)
    assert {q.bit_width for q in output_quantizers(model).values()} == {3}
    assert model.conv1.weight_quantizer.bit_width == 3


def test_training_goes_on_and_the_steps_learn():
    model, _ = fitted()
    model.train()
    plyweight.set_bit_width(model, 2)
    model(IMAGES).square().mean().backward()
    clips = [q.clip for q in output_quantizers(model).values()]
    assert all(clip.grad is not None and clip.grad[0] != 0 for clip in clips)
    rows = {id(row.parameter) for row in row_parameters(model)}
    assert {id(clip) for clip in clips} <= rows


def test_copies_and_checkpoints_round_too():
    model, _ = fitted()
    expected = outputs_of(model)
    for mine, theirs in zip(outputs_of(copy.deepcopy(model)), expected, strict=True):
        assert torch.equal(mine, theirs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    for mine, theirs in zip(outputs_of(restored), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_biases_that_bit_widths_share_stay_and_are_named():
    _, report = fitted(batch_norm="shared")
    assert set(report.biases_left) == {
        "conv1",
        *(f"block{i}.conv{j}" for i in (1, 2) for j in (1, 2)),
    }
    assert "biases rounded without torch only" in str(report)
    assert len(report.placed) == 6


def test_weight_only_models_have_nothing_to_round():
    tokens = torch.randint(0, 12, (16, 7), generator=torch.Generator().manual_seed(1))
    _, report = fitted(SmallTransformer, tokens, activations=None)
    assert report.placed == report.edges_left == report.biases_left == ()


class _Written(nn.Module):
    """The same parameters as ``ALL``'s first, with an activation that is no module."""

    def __init__(self, activation):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        if activation:
            self.act = nn.ReLU6()
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, images):
        act = self.act if hasattr(self, "act") else nn.functional.relu6
        x = act(self.conv(images))
        return (self.left(x) - self.right(x)).mean(dim=(2, 3))


def test_a_network_without_the_module_that_rounds_is_refused(tmp_path):
    torch.manual_seed(0)
    model = prepared(_Written(activation=True), SMALL_IMAGES)
    assert fit_edges(model, SMALL_IMAGES).placed[0] == "act"
    plyweight.pack(model, tmp_path / "net")
    with pytest.raises(ModelMismatchError, match=r"a quantized output, act\.output_quantizer"):
        plyweight.load(tmp_path / "net", _Written(activation=False))


def test_wrong_arguments_are_refused():
    with pytest.raises(LayeringError, match="model is a dict; give a layered module"):
        fit_edges({}, IMAGES)
    with pytest.raises(LayeringError, match="is not of a model from"):
        fit_edges(SmallResNet(), IMAGES)
    with pytest.raises(LayeringError, match="gave no batch"):
        fit_edges(prepared(SmallResNet(), IMAGES), [])
    with (
        mock.patch.dict("sys.modules", {"plyweight.graph.build": None}),
        pytest.raises(ImportError, match=r"plyweight\[onnx\]"),
    ):
        fit_edges(prepared(SmallResNet(), IMAGES), IMAGES)


def test_an_output_is_rounded_once_and_not_by_a_sequential():
    quantizer = ActivationQuantizer(8, (2, 8))
    relu = nn.ReLU()
    round_output(relu, quantizer)
    containers = nn.Sequential(nn.ReLU()), nn.ModuleList([nn.ReLU()]), nn.ModuleDict()
    for module in (relu, quantizer, *containers):
        with pytest.raises(LayeringError, match="round that of a module inside of it"):
            round_output(module, quantizer)


class _Reduced(nn.Module):
    """A leaf whose sum is read inside, and a counter."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.join = _MeanOfSum()
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.join(self.left(images), self.right(images)))


class _MeanOfSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, a, b):
        self.num_calls.add_(1)
        return (a + b).mean(dim=(2, 3))


def test_a_module_that_computes_on_with_a_sum_does_not_give_it_and_buffers_stay():
    torch.manual_seed(0)
    model = prepared(_Reduced(), SMALL_IMAGES)
    before = model.join.num_calls.item()
    report = fit_edges(model, SMALL_IMAGES)
    assert report.placed == ("left", "right")
    assert report.edges_left == ("join:add",)
    assert model.join.num_calls.item() == before


def test_in_inference_mode_it_makes_a_model_that_can_be_trained():
    torch.manual_seed(0)
    model = prepared(SmallResNet(), IMAGES)
    with torch.inference_mode():
        fit_edges(model, IMAGES)
    model(IMAGES).square().mean().backward()


def test_a_checkpoint_goes_into_a_model_that_was_fitted_too():
    model, _ = fitted()
    torch.manual_seed(1)
    fresh = prepared(SmallResNet(), IMAGES)
    fit_edges(fresh, IMAGES)
    fresh.load_state_dict(model.state_dict())
    for mine, theirs in zip(outputs_of(fresh), outputs_of(model), strict=True):
        assert torch.equal(mine, theirs)


def test_an_output_that_is_no_tensor_is_said():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    pair, quantizer = Pair(), ActivationQuantizer(8, (2, 8))
    round_output(pair, quantizer)
    with pytest.raises(LayeringError, match="output of a Pair is to be rounded"):
        pair(torch.ones(1))


def test_a_layered_module_of_that_name_is_refused_when_it_is_packed(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.output_quantizer = nn.Linear(8, 4)

        def forward(self, x):
            return self.output_quantizer(x)

    model = prepared(Named(), torch.randn(4, 8))
    with pytest.raises(LayeringError, match="layered module output_quantizer has a name"):
        plyweight.pack(model, tmp_path / "net")
