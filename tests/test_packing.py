"""A trained model becomes one file: the same weights the same bytes, or one sentence why not."""

import io
import math
import os
import stat

import numpy as np
import pytest
import torch
from nets import ALL_BIT_WIDTHS, ConvNet, ZooNet, trained
from torch import nn

from plyweight.artifact import ArtifactReader, MemorySource, inspect
from plyweight.codec import codes_at, encode, from_planes, spread
from plyweight.errors import BitWidthError, LayeringError, OutputError, PlyweightError
from plyweight.loading import load
from plyweight.nn import prepare
from plyweight.packing import pack
from plyweight.train import recalibrate

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trained(ZooNet(), group_size=3, pinned={"head": 5, "stem": 8})


@pytest.fixture
def small():
    """A prepared model that has seen a batch, to break."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    prepared = prepare(net, (2, 4, 8))
    prepared(torch.randn(4, 6))
    return prepared


def packed(model, folder, **options):
    path = folder / "packed"
    pack(model, path, **options)
    return path.read_bytes()


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_model_and_its_checkpoint_make_the_same_file(model, tmp_path):
    expected = packed(model, tmp_path)
    assert packed(model, tmp_path) == expected
    assert packed(model.state_dict(), tmp_path, name="ZooNet") == expected
    assert packed(saved_and_loaded(model.state_dict()), tmp_path, name="ZooNet") == expected
    again = prepare(ZooNet(), ALL_BIT_WIDTHS, group_size=3, pinned={"head": 5, "stem": 8})
    again.load_state_dict(model.state_dict())
    assert packed(again, tmp_path, name="ZooNet") == expected


def test_wrappers_are_looked_through(small, tmp_path):
    expected = packed(small, tmp_path)
    assert packed(torch.compile(small, backend="eager"), tmp_path) == expected
    assert packed(nn.DataParallel(small), tmp_path) == expected
    compiled = torch.compile(small, backend="eager").state_dict()
    assert packed(compiled, tmp_path, name="Sequential") == expected
    small[0] = torch.compile(small[0], backend="eager")  # a part of it alone
    assert packed(small, tmp_path) == expected


def test_the_bit_width_and_mode_that_are_set_leave_no_trace(small, tmp_path):
    expected = packed(small.eval(), tmp_path)
    for module in small.modules():
        if hasattr(module, "switch"):
            module.switch(2)
    assert packed(small.train(), tmp_path) == expected


def test_the_planes_of_a_width_are_the_codes_of_the_latent_weight(model, tmp_path):
    reader = ArtifactReader(MemorySource(packed(model, tmp_path)))
    layers = [reader.read_layer(i) for i in range(8)]
    layered = {n: m for n, m in model.named_modules() if hasattr(m, "latent_weight")}
    assert {f"{name}.weight" for name in layered} - {"head.weight"} == set(reader.header.weights)
    for name, module in layered.items():
        if name == "head":
            continue  # tied to the embedding
        param = f"{name}.weight"
        weight = module.latent_weight.detach().numpy()
        scale = module.weight_quantizer.scale.detach().numpy()
        record = reader.header.weights[param]
        codes = encode(weight, spread(scale, weight.shape, record.group_size))
        planes = []
        for layer, bit_width in zip(layers, ALL_BIT_WIDTHS, strict=True):
            if f"{param}.q" in layer:
                planes += list(layer[f"{param}.q"].numpy())
            own = max(bit_width, record.pinned or 0)
            assert len(planes) == own
            assert np.array_equal(from_planes(planes, weight.shape), codes_at(codes, own))
        assert np.array_equal(layers[0][f"{param}.scale"].numpy(), scale)


def test_a_pin_holds_for_all_that_share_the_weight(model, tmp_path):
    weights = ArtifactReader(MemorySource(packed(model, tmp_path))).header.weights
    assert {p: w.pinned for p, w in weights.items() if w.pinned} == {
        "embedding.weight": 5,
        "stem.weight": 8,
    }


def test_a_root_module_has_no_prefix(tmp_path):
    linear = prepare(nn.Linear(6, 5), (1, 8), pinned={"": 3})
    inputs = torch.randn(4, 6)
    expected = linear(inputs)
    pack(linear, tmp_path / "linear")
    header = ArtifactReader(tmp_path / "linear").header
    assert list(header.weights) == ["weight"]
    assert list(header.activations) == [""]
    assert torch.equal(load(tmp_path / "linear", nn.Linear(6, 5))(inputs), expected)


@pytest.mark.parametrize(
    ("net", "options"),
    [(ConvNet, {}), (ZooNet, {"group_size": 3, "pinned": {"stem": 8}, "activations": None})],
)
def test_the_file_is_its_planes_and_side_information_and_one_percent(net, options, tmp_path):
    model = trained(net(), **options)
    receipt = pack(model, tmp_path / "net")
    num_widths, state = len(ALL_BIT_WIDTHS), model.state_dict()
    counted = 0
    for name, module in model.named_modules():
        if hasattr(module, "latent_weight") and name != "head":
            counted += 8 * math.ceil(module.latent_weight.numel() / 8)
            counted += 4 * module.weight_quantizer.clip.numel()
            counted += 4 * int((module.weight_quantizer.gain != 1).sum())
        if hasattr(module, "kind_index"):
            with_zero_point = 2 if module.kind == "offset" else 1
            counted += 4 * with_zero_point * len(module.own_bit_widths)
        if hasattr(module, "reset_row"):
            counted += 4 * num_widths * 4 * module.num_features
        if isinstance(module, nn.LayerNorm):
            counted += 4 * 2 * module.weight.numel()
    counted += sum(  # biases of layered modules
        4 * state[key.replace("weight_quantizer.clip", "bias")].numel()
        for key in state
        if key.endswith("weight_quantizer.clip")
        and key.replace("weight_quantizer.clip", "bias") in state
    )
    num_bytes = (tmp_path / "net").stat().st_size
    assert receipt.layers[-1].total_bytes == num_bytes
    contents = sum(layer.plane_bytes + layer.side_bytes for layer in receipt.layers)
    assert contents == counted
    padding = num_bytes - receipt.header_bytes - counted
    assert padding == sum(layer.padding_bytes for layer in receipt.layers)
    # One percent, or where the tensors are as tiny as here, less than 8 bytes for each of them
    # and each layer.
    assert padding <= max(0.01 * counted, 7 * (receipt.num_tensors + num_widths))


def test_a_file_of_ordinary_size_has_less_than_one_percent_of_padding(tmp_path):
    net = nn.Sequential(nn.Linear(300, 301), nn.BatchNorm1d(301), nn.Linear(301, 303))
    model = prepare(net, ALL_BIT_WIDTHS, activations=None)
    receipt = pack(model, tmp_path / "net")
    planes = 8 * sum(math.ceil(n / 8) for n in (300 * 301, 301 * 303))
    side = (
        4 * (301 + 303) * 2
        + 4 * 4 * 8 * 301
        + 4 * sum(int((m.gain != 1).sum()) for m in model.modules() if hasattr(m, "gain"))
    )
    assert (tmp_path / "net").stat().st_size <= receipt.header_bytes + 1.01 * (planes + side)


def test_the_receipt_is_read_back_from_the_file(model, tmp_path):
    receipt = pack(model, tmp_path / "zoo")
    assert receipt == inspect(tmp_path / "zoo")
    assert receipt.held == ALL_BIT_WIDTHS
    assert receipt.num_layered == 11  # embedding and head count as one


def test_what_is_said_about_the_model_is_in_the_header(small, tmp_path):
    pack(
        small,
        tmp_path / "small",
        name="small",
        revision=3,
        license="Apache-2.0",
        evaluation={4: {"accuracy": "0.981"}},
    )
    header = ArtifactReader(tmp_path / "small").header
    assert (header.model.name, header.model.revision) == ("small", 3)
    assert header.model.license == "Apache-2.0"
    assert header.model.created_by.startswith("plyweight ")
    assert header.evaluation == {4: {"accuracy": "0.981"}}
    pack(small, tmp_path / "small")
    header = ArtifactReader(tmp_path / "small").header
    assert (header.model.name, header.model.revision) == ("Sequential", 0)
    assert header.model.license is None
    assert header.evaluation is None


def test_plain_tensors_of_every_dtype_come_back(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            for i, dtype in enumerate(DTYPES):
                self.register_buffer(f"b{i}", torch.tensor([[1, 0, 3]]).t().to(dtype))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("scalar", torch.tensor(7))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # no weight, so allowed
            self.register_buffer("strided", torch.arange(12.0).view(3, 4).t()[::2])

    net = Net()
    pack(prepare(net, (2, 8), activations=None), tmp_path / "net")
    loaded = load(tmp_path / "net", Net())
    for name, buffer in net.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)
        assert loaded.get_buffer(name).dtype == buffer.dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_stored_is_named(small, tmp_path, dtype):
    small.register_buffer("phases", torch.ones(2).to(dtype))
    with pytest.raises(LayeringError, match=f"phases is {dtype}, which an artifact cannot store"):
        pack(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "0.weight",
        "0.weight_quantizer.clip",
        "0.weight_quantizer.gain",
        "3.input_quantizer.clip",
        "3.input_quantizer.offset",
        "1.running_var",
        "1.bias",
    ],
)
def test_numbers_that_are_not_finite_are_counted_and_named(small, tmp_path, name, value):
    state = small.state_dict()
    state[name].view(-1)[1] = value
    with pytest.raises(LayeringError, match=rf"^{name} has 1 values that are NaN or infinite"):
        pack(state, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_quantizer_that_never_saw_a_batch_is_named(tmp_path):
    model = prepare(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), (2, 8))
    with pytest.raises(LayeringError, match="the input of 0 has not seen a batch"):
        pack(model, tmp_path / "net")
    pack(prepare(nn.Linear(3, 3), (2, 8), activations=None), tmp_path / "net")


def test_what_is_no_prepared_model_is_refused(small, tmp_path):
    path = tmp_path / "net"
    for wrong in (nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), {}, nn.ReLU()):
        with pytest.raises(LayeringError, match="no bit-widths, so it is not of a model from"):
            pack(wrong, path)
    for wrong in (3, None, "model.pt", b"bytes", [torch.zeros(2)]):
        with pytest.raises(LayeringError, match="pack a module or a state dict"):
            pack(wrong, path)
    for wrong in ({"model": small.state_dict()}, {"epoch": 3}, {1: torch.zeros(2)}):
        with pytest.raises(LayeringError, match="pack a flat state dict of tensors"):
            pack(wrong, path)
    with pytest.raises(LayeringError, match="no plain values to store"):
        pack(small.to("meta"), path)
    assert not path.exists()


def test_a_state_dict_with_a_hole_is_refused_by_name(small, tmp_path):
    for name in ("0.weight_quantizer.gain", "3.input_quantizer.widths"):
        state = small.state_dict()
        del state[name]
        with pytest.raises(LayeringError, match=f"has no {name}, which a prepared model has"):
            pack(state, tmp_path / "net")


def test_parts_of_different_bit_widths_are_no_model(small, tmp_path):
    other = prepare(nn.Linear(3, 3), (2, 3), activations=None)
    with pytest.raises(LayeringError, match=r"has bit-widths \(2, 3\), \(2, 4, 8\)"):
        pack(nn.Sequential(small, other), tmp_path / "net")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": 3}, "path is a int"),
        ({"path": None}, "path is a NoneType"),
        ({"path": b"bytes"}, "path is a bytes"),
        ({"name": 3}, "name is 3; give a text"),
        ({"license": ["MIT"]}, r"license is \['MIT'\]; give a text"),
        ({"revision": "1"}, "revision is '1'; give an integer of 0 or more"),
        ({"revision": -1}, "revision is -1"),
        ({"revision": True}, "revision is True"),
        ({"evaluation": 0.9}, "evaluation is 0.9; give metrics by bit-width"),
        ({"evaluation": {4: 0.9}}, r"evaluation\[4\] is 0.9; give decimal strings"),
        ({"evaluation": {4: {"accuracy": 0.9}}}, r"evaluation\[4\] is .* give decimal strings"),
    ],
    ids=str,
)
def test_an_argument_of_the_wrong_type_is_named(small, tmp_path, arguments, words):
    with pytest.raises(LayeringError, match=words):
        pack(small, **{"path": tmp_path / "net", **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bit_width", [3, "4", None])
def test_metrics_of_a_width_that_is_not_stored_are_refused(small, tmp_path, bit_width):
    with pytest.raises(BitWidthError, match=r"(stores|one of) 2, 4, 8"):
        pack(small, tmp_path / "net", evaluation={bit_width: {"accuracy": "0.9"}})


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 600])
def test_a_name_that_the_format_forbids_is_refused(small, tmp_path, name):
    with pytest.raises(PlyweightError, match="name"):
        pack(small, tmp_path / "net", name=name)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_leaves_nothing(small, tmp_path):
    with pytest.raises(OutputError, match="does not exist; create it first"):
        pack(small, tmp_path / "missing" / "net")
    with pytest.raises(OutputError, match="is a folder"):
        pack(small, tmp_path)
    assert not list(tmp_path.iterdir())


def test_packing_that_fails_midway_leaves_the_earlier_file(small, tmp_path, monkeypatch):
    before = packed(small, tmp_path)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        raise MemoryError

    monkeypatch.setattr("plyweight.packing.contents.to_planes", full)
    with pytest.raises(MemoryError):
        pack(small, tmp_path / "packed")
    assert calls
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    assert (tmp_path / "packed").read_bytes() == before


def test_packing_changes_nothing_in_the_model(small, tmp_path):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    gradients = torch.is_grad_enabled()
    pack(small, tmp_path / "net")
    after = small.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.is_grad_enabled() == gradients
    assert all(p.requires_grad for p in small.parameters())


def test_a_model_in_bfloat16_is_stored_as_it_computes(small, tmp_path):
    small = small.bfloat16().eval()
    inputs = torch.randn(4, 6).bfloat16()
    pack(small, tmp_path / "net")
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).bfloat16()
    for form in ("packed", "fake-quantized"):
        for bit_width in (2, 4, 8):
            loaded = load(tmp_path / "net", net, bit_width=bit_width, form=form)
            for module in small.modules():
                if hasattr(module, "switch"):
                    module.switch(bit_width)
            outputs = loaded(inputs)
            assert outputs.dtype == torch.bfloat16
            assert torch.equal(outputs, small(inputs))


def test_a_model_with_one_bit_width_is_an_ordinary_file(tmp_path):
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model = prepare(net, (4,))
    model(torch.randn(8, 6))
    data = packed(model.eval(), tmp_path)
    inputs = torch.randn(4, 6)
    for form in ("packed", "fake-quantized"):
        assert torch.equal(load(MemorySource(data), net, form=form)(inputs), model(inputs))
    again = load(MemorySource(data), net, form="fake-quantized")
    assert packed(again, tmp_path) == data
    recalibrate(again, [inputs])
    assert not torch.equal(again[1].running_mean, model[1].running_mean)


def test_a_device_or_pipe_is_not_replaced_by_an_artifact(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        pack(small, tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_packed_model_is_told_how_to_be_packed_again(small, tmp_path):
    pack(small, tmp_path / "net")
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(LayeringError, match="form='fake-quantized'"):
        pack(load(tmp_path / "net", net), tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("1.running_mean", torch.zeros(5)),
        ("0.weight_quantizer.gain", torch.ones(1)),
        ("0.weight_quantizer.pinned", torch.zeros(2, dtype=torch.uint8)),
        ("0.weight_quantizer.clip", torch.ones(5, dtype=torch.int64)),
        ("0.input_quantizer.clip", torch.ones(3, 3)),
        ("0.input_quantizer.kind_index", torch.tensor(77, dtype=torch.uint8)),
    ],
)
def test_a_state_dict_that_was_changed_is_refused_by_name(small, tmp_path, name, value):
    with pytest.raises(LayeringError, match=name.rpartition(".")[0]):
        pack(dict(small.state_dict()) | {name: value}, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_buffers_on_the_same_memory_are_tied_only_if_they_are_one_tensor(tmp_path):
    class Views(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 3))
            self.register_buffer("a", torch.arange(6.0))
            self.register_buffer("b", self.a.detach())

    pack(prepare(Views(), (2, 8), activations=None), tmp_path / "net")
    assert load(tmp_path / "net", Views()).b.tolist() == list(range(6))
