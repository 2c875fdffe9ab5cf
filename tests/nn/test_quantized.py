"""A bias may have a row for each bit-width of the model, in every kind of module."""

import copy

import pytest
import torch
from nets import ConvNet, batch, with_rows
from torch import nn

from plyweight import load, pack, prepare, report
from plyweight.errors import LayeringError, ModelMismatchError
from plyweight.nn import at_bit_width

BIT_WIDTHS = (2, 4, 8)
MODULES = {
    "linear": (nn.Linear(3, 4), (5, 3)),
    "conv1d": (nn.Conv1d(3, 4, 2), (5, 3, 6)),
    "conv2d": (nn.Conv2d(3, 4, 2), (5, 3, 6, 6)),
}


@pytest.mark.parametrize(("net", "shape"), MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("pinned", [None, {"": 8}])
def test_each_bit_width_of_the_model_adds_its_own_row(net, shape, pinned):
    model = prepare(net, BIT_WIDTHS, activations=None, pinned=pinned)
    inputs = torch.randn(shape)
    zero = copy.deepcopy(model)
    with torch.no_grad():
        zero.bias.zero_()
        rows = model.give_bias_rows()
        rows.copy_(torch.arange(12.0).reshape(3, 4))
    for row, bit_width in zip(rows, BIT_WIDTHS, strict=True):
        with at_bit_width(model, bit_width), at_bit_width(zero, bit_width):
            assert torch.equal(model.bias, row)
            along = row.reshape(-1, *[1] * (len(shape) - 2))
            # Float32: the convolution adds the bias in another place of its sum.
            torch.testing.assert_close(model(inputs), zero(inputs) + along, rtol=1e-5, atol=1e-5)


def test_rows_begin_as_the_bias_and_are_given_once():
    net = nn.Linear(3, 4)
    model = prepare(net, BIT_WIDTHS)
    assert not model.has_bias_rows
    rows = model.give_bias_rows()
    assert model.has_bias_rows
    assert torch.equal(rows, net.bias.expand(3, 4))
    assert model.give_bias_rows() is rows is model._parameters["bias"]
    assert prepare(nn.Linear(3, 4, bias=False), BIT_WIDTHS).bias is None


def test_a_gradient_reaches_the_row_of_its_bit_width_alone():
    model = prepare(nn.Linear(3, 4), BIT_WIDTHS)
    rows = model.give_bias_rows()
    with at_bit_width(model, 4):
        model(torch.randn(5, 3)).sum().backward()
    assert rows.grad.tolist() == [[0] * 4, [5] * 4, [0] * 4]


def test_the_bias_of_another_bit_width_is_never_all_rows():
    """nn.Module answers an AttributeError inside a property with the parameter of its name."""
    model = prepare(nn.Linear(3, 4), BIT_WIDTHS)
    model.give_bias_rows()
    del model.weight_quantizer
    with pytest.raises(RuntimeError, match=r"the bias cannot be chosen: .*weight_quantizer"):
        _ = model.bias


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (3, 5)])
def test_a_checkpoint_with_other_rows_is_refused_and_the_bias_stays(shape):
    model = prepare(nn.Linear(3, 4), BIT_WIDTHS)
    bias, state = model.bias, model.state_dict() | {"bias": torch.zeros(shape)}
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        model.load_state_dict(state)
    assert model.bias is bias


def test_a_report_counts_the_bias_of_the_float_network():
    net = ConvNet()
    with_them = report(with_rows(prepare(net, BIT_WIDTHS)))
    assert with_them.num_parameters == sum(p.numel() for p in net.parameters())
    assert with_them == report(prepare(net, BIT_WIDTHS))


def test_rows_stand_in_the_layer_of_their_bit_width_and_in_no_other(tmp_path):
    from plyweight.artifact import ArtifactReader

    model = prepare(ConvNet(), BIT_WIDTHS)
    model(batch()[0])
    rows = with_rows(model).fc._parameters["bias"]
    pack(model, tmp_path / "net")
    reader = ArtifactReader(tmp_path / "net")
    for index, row in enumerate(rows):
        stored = torch.from_numpy(reader.read_layer(index)["fc.bias"].numpy().copy())
        assert torch.equal(stored, row)


def test_a_bias_with_a_row_too_few_is_refused(tmp_path):
    model = prepare(ConvNet(), BIT_WIDTHS)
    model(batch()[0])
    state = with_rows(model).state_dict()
    state["fc.bias"] = state["fc.bias"][:2]
    with pytest.raises(LayeringError, match=r"fc.bias has shape .* needs a row for each of 3"):
        pack(state, tmp_path / "net")


def test_what_a_later_layer_replaces_and_the_model_has_no_rows_for_is_refused(tmp_path):
    class Normed(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), norm

    model = prepare(Normed(nn.BatchNorm1d(4)), BIT_WIDTHS, activations=None)
    pack(model, tmp_path / "net")

    class Kept(nn.BatchNorm1d):
        """Of another class, so that it stays as it is."""

    with pytest.raises(ModelMismatchError, match=r"norm.bias by bit-width, .*model has nothing"):
        load(tmp_path / "net", Normed(Kept(4)))
