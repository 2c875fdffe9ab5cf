"""A loaded model computes what the trained one did, from just the layers its width needs."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from artifact.builders import MODEL, float32
from nets import ALL_BIT_WIDTHS, ConvNet, ZooNet, batch, trained, with_rows
from torch import nn

from plyweight.artifact import (
    Activation,
    ArtifactReader,
    ByteRange,
    LayerContent,
    LayeredWeight,
    MemorySource,
    TensorData,
    inspect,
    write_artifact,
)
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    DigestError,
    LayeringError,
    ModelMismatchError,
    SourceError,
    TruncatedError,
)
from plyweight.loading import downgrade, load, upgrade
from plyweight.nn import at_bit_width, bit_widths_of, prepare, report, set_bit_width
from plyweight.nn.packed import PackedWeight
from plyweight.packing import pack
from plyweight.train import JointObjective, recalibrate

OPTIONS = {
    "match": {},
    "groups and pins": {
        "group_size": 3,
        "pinned": {"fc": 8, "conv1": 3},
        "activations": {b: max(b, 4) for b in ALL_BIT_WIDTHS},
    },
    "float activations": {"activations": None},
}
ZOO_OPTIONS = {
    "match": {},
    "groups and pins": {
        "group_size": 3,
        "pinned": {"head": 5, "stem": 8},
        "activations": {b: max(b, 4) for b in ALL_BIT_WIDTHS},
    },
    "float activations": {"activations": None},
}
for options in (OPTIONS, ZOO_OPTIONS):
    options["rows"] = {"adapt": with_rows}
    options["rows, groups and pins"] = {"adapt": with_rows, **options["groups and pins"]}
CASES = [(ConvNet, o) for o in OPTIONS.values()] + [(ZooNet, o) for o in ZOO_OPTIONS.values()]
IDS = [f"{net} {name}" for net in ("ConvNet", "ZooNet") for name in OPTIONS]


class Packed:
    """A trained model, its file, and its logits at every bit-width."""

    def __init__(self, net, options, folder):
        self.net = net
        options = dict(options)
        adapt = options.pop("adapt", lambda model: model)
        self.model = adapt(trained(net(), **options))
        self.path = folder / "net.layered.safetensors"
        self.receipt = pack(self.model, self.path)
        self.data = self.path.read_bytes()
        self.images = batch()[0]
        self.logits = {}
        for bit_width in bit_widths_of(self.model):
            with torch.no_grad(), at_bit_width(self.model, bit_width):
                self.logits[bit_width] = self.model(self.images)

    def stop(self, bit_width):
        return self.receipt.layers[list(self.logits).index(bit_width)].total_bytes

    def assert_equal_at(self, net, bit_width):
        with torch.no_grad():
            assert torch.equal(net(self.images), self.logits[bit_width])


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def packed(request, tmp_path_factory):
    torch.manual_seed(0)
    return Packed(*request.param, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    torch.manual_seed(0)
    return Packed(ConvNet, {}, tmp_path_factory.mktemp("conv"))


@pytest.mark.parametrize("form", ["packed", "fake-quantized"])
def test_loaded_logits_equal_the_trained_ones_at_every_width_that_is_held(packed, form):
    for bit_width in ALL_BIT_WIDTHS:
        net = load(MemorySource(packed.data), packed.net(), bit_width=bit_width, form=form)
        assert bit_widths_of(net) == ALL_BIT_WIDTHS[:bit_width]
        packed.assert_equal_at(net, bit_width)
        for narrower in (1, (bit_width + 1) // 2):
            set_bit_width(net, narrower)
            packed.assert_equal_at(net, narrower)


def test_widths_differ_so_that_equality_says_something(packed):
    assert len({tuple(logits.flatten().tolist()) for logits in packed.logits.values()}) == 8


def test_loading_reads_no_byte_beyond_the_layer_it_needs(packed):
    for bit_width in ALL_BIT_WIDTHS:
        source = MemorySource(packed.data)
        load(source, packed.net(), bit_width=bit_width)
        assert max(read.stop for read in source.reads) == packed.stop(bit_width)


def test_a_file_cut_at_a_layer_loads_at_the_widths_it_holds(packed, tmp_path):
    for bit_width in (1, 4, 7):
        cut = tmp_path / "cut"
        cut.write_bytes(packed.data[: packed.stop(bit_width)])
        net = load(cut, packed.net())
        assert net.training is False
        packed.assert_equal_at(net, bit_width)
        for narrower in ALL_BIT_WIDTHS[: bit_width - 1]:
            packed.assert_equal_at(load(cut, packed.net(), bit_width=narrower), narrower)
        with pytest.raises(BitWidthError, match=f"{bit_width + 1} bits were asked for"):
            load(cut, packed.net(), bit_width=bit_width + 1)


def test_an_upgrade_reads_only_the_missing_layers(conv):
    net = load(MemorySource(conv.data), ConvNet(), bit_width=3)
    source = MemorySource(conv.data)
    upgrade(net, source, bit_width=5)
    header = conv.receipt.header_bytes
    assert source.reads[:2] == [ByteRange(0, 8), ByteRange(8, header)]
    assert source.reads[2:] == [
        ByteRange(conv.stop(3), conv.stop(4)),
        ByteRange(conv.stop(4), conv.stop(5)),
    ]
    conv.assert_equal_at(net, 5)


def test_up_and_down_any_way_the_logits_are_those_of_the_width(packed):
    net = load(MemorySource(packed.data), packed.net(), bit_width=2)
    for target in (5, 1, 8, 3, 4, 2, 8, 7):
        if target in bit_widths_of(net):
            downgrade(net, target)
        else:
            upgrade(net, MemorySource(packed.data), bit_width=target)
        assert bit_widths_of(net) == ALL_BIT_WIDTHS[:target]
        packed.assert_equal_at(net, target)


def test_upgrade_without_a_width_takes_all_that_the_source_holds(conv, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(conv.data[: conv.stop(6)])
    net = load(cut, ConvNet(), bit_width=1)
    upgrade(net, cut)
    assert bit_widths_of(net) == (1, 2, 3, 4, 5, 6)
    conv.assert_equal_at(net, 6)


class _Buffer(bytearray):
    """A bytearray that can be watched."""


class _WatchedSource(MemorySource):
    """Keeps weak references to the buffers it handed out."""

    def read(self, byte_range):
        buffer = _Buffer(super().read(byte_range))
        self.__dict__.setdefault("buffers", {})[byte_range.start] = weakref.ref(buffer)
        return buffer


def test_a_downgrade_frees_the_buffers_of_the_layers_above(conv):
    source = _WatchedSource(conv.data)
    net = load(source, ConvNet())
    gc.collect()
    alive = [start for start, buffer in source.buffers.items() if buffer() is not None]
    assert len(alive) == 8  # one for each layer: planes are views, nothing is copied
    downgrade(net, 3)
    gc.collect()
    alive = [start for start, buffer in source.buffers.items() if buffer() is not None]
    assert sorted(alive) == [conv.receipt.header_bytes, conv.stop(1), conv.stop(2)]
    planes = sum(b.numel() for n, b in net.named_buffers() if ".planes_" in n)
    assert planes == sum(layer.plane_bytes for layer in conv.receipt.layers[:3])
    assert not any(p.dim() > 1 for p in net.parameters() if p.shape[0] != 8)  # no float weight


def _snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}, bit_widths_of(net)


def test_an_upgrade_that_fails_leaves_the_model_as_it_was(conv, tmp_path):
    net = load(MemorySource(conv.data), ConvNet(), bit_width=3)
    before = _snapshot(net)
    damaged = bytearray(conv.data)
    damaged[conv.stop(6) - 40] ^= 4  # in the layer of 6 bits, after intact ones
    with pytest.raises(DigestError, match=r"layer 5 \(6 bits\)"):
        upgrade(net, MemorySource(bytes(damaged)))
    with pytest.raises(TruncatedError, match=r"inside layer 4 \(5 bits\) at tensor L4/"):
        upgrade(net, MemorySource(conv.data[: conv.stop(4) + 100]))
    with pytest.raises(BitWidthError):
        upgrade(net, MemorySource(conv.data), bit_width=9)
    other = tmp_path / "other"
    pack(trained(ConvNet()), other, name="other")
    with pytest.raises(ArtifactError, match="is artifact"):
        upgrade(net, other)
    after = _snapshot(net)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][k], before[0][k]) for k in after[0])
    conv.assert_equal_at(net, 3)


def test_an_upgrade_that_is_interrupted_leaves_the_model_as_it_was(conv, monkeypatch):
    net = load(MemorySource(conv.data), ConvNet(), bit_width=3)
    before, kept = _snapshot(net)
    hold, calls = PackedWeight.hold, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:  # three weights: in the middle of the second layer
            raise KeyboardInterrupt
        hold(self, *arguments)

    monkeypatch.setattr(PackedWeight, "hold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upgrade(net, MemorySource(conv.data))
    after, still_kept = _snapshot(net)
    assert still_kept == kept
    assert after.keys() == before.keys()
    conv.assert_equal_at(net, 3)
    monkeypatch.undo()
    upgrade(net, MemorySource(conv.data), bit_width=6)
    conv.assert_equal_at(net, 6)


def test_a_loaded_model_goes_up_and_down_while_it_is_compiled(conv):
    torch._dynamo.reset()
    net = torch.compile(load(MemorySource(conv.data), ConvNet(), bit_width=2), backend="eager")
    conv.assert_equal_at(net, 2)
    upgrade(net, MemorySource(conv.data), bit_width=4)
    conv.assert_equal_at(net, 4)
    downgrade(net, 1)
    conv.assert_equal_at(net, 1)
    torch._dynamo.reset()


def test_recurrent_modules_stay_float_and_come_back(tmp_path):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True)
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.lstm(x)[0])

    model, inputs = prepare(Tagger(), (2, 8)), torch.randn(2, 5, 4)
    expected = model(inputs)
    pack(model, tmp_path / "tagger")
    with torch.device("meta"):
        skeleton = Tagger()
    for net in (Tagger(), skeleton):
        assert torch.equal(load(tmp_path / "tagger", net)(inputs), expected)


def test_what_is_packed_loaded_to_train_and_packed_again_has_the_same_planes(packed, tmp_path):
    net = load(MemorySource(packed.data), packed.net(), form="fake-quantized")
    pack(net, tmp_path / "again", name=type(packed.model).__name__)
    assert (tmp_path / "again").read_bytes() == packed.data


def test_layers_come_back_unchanged_from_the_fake_quantized_form_at_every_width(packed, tmp_path):
    stored = ArtifactReader(MemorySource(packed.data))
    for bit_width in ALL_BIT_WIDTHS:
        net = load(
            MemorySource(packed.data), packed.net(), bit_width=bit_width, form="fake-quantized"
        )
        pack(net, tmp_path / "again")
        again = ArtifactReader(tmp_path / "again")
        assert again.header.bit_widths == ALL_BIT_WIDTHS[:bit_width]
        for index in range(bit_width):
            views, expected = again.read_layer(index), stored.read_layer(index)
            assert {n: bytes(v.data) for n, v in views.items()} == {
                n: bytes(v.data) for n, v in expected.items()
            }


def test_training_goes_on_from_the_fake_quantized_form(conv, tmp_path):
    net = load(MemorySource(conv.data), ConvNet(), bit_width=4, form="fake-quantized").train()
    images, labels = batch()
    objective = JointObjective(net, nn.functional.cross_entropy)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    first = objective.backward(images, labels)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        last = objective.backward(images, labels)
    assert list(last) == [1, 2, 3, 4]
    assert last[4] < first[4]
    assert pack(net, tmp_path / "tuned").held == (1, 2, 3, 4)


def test_packed_and_fake_quantized_models_do_not_mix_up_their_verbs(conv):
    net = load(MemorySource(conv.data), ConvNet(), form="fake-quantized")
    with pytest.raises(LayeringError, match="holds no artifact"):
        downgrade(net, 2)
    with pytest.raises(LayeringError, match="holds no artifact"):
        upgrade(ConvNet(), MemorySource(conv.data))
    with pytest.raises(LayeringError, match="layered already"):
        load(MemorySource(conv.data), net)
    with pytest.raises(LayeringError, match="'packed' or 'fake-quantized'"):
        load(MemorySource(conv.data), ConvNet(), form="float")


def test_a_downgrade_to_what_is_not_held_is_refused(conv):
    net = load(MemorySource(conv.data), ConvNet(), bit_width=3)
    for wrong in (4, 0, True, "2", None):
        with pytest.raises(BitWidthError):
            downgrade(net, wrong)
    with pytest.raises(BitWidthError, match="Upgrade the model to it first"):
        set_bit_width(net, 4)
    conv.assert_equal_at(net, 3)


class _Renamed(ConvNet):
    def __init__(self):
        super().__init__()
        self.classifier = self.fc
        del self.fc


class _Wider(ConvNet):
    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 9, 3, padding=1)


class _Smaller(ConvNet):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7 * 16, 5, bias=False)


class _OtherKind(ConvNet):
    def __init__(self):
        super().__init__()

        class MyLinear(nn.Linear):
            pass

        self.fc = MyLinear(7 * 16, 5)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (_Renamed, [r"artifact has fc.weight \(5, 112\)", r"model has classifier.weight"]),
        (_Wider, [r"artifact has conv2.weight \(7, 6, 3, 3\)", r"conv2.weight \(9, 6, 3, 3\)"]),
        (_Smaller, [r"artifact has fc.bias \(5,\); only the model has nothing"]),
        (_OtherKind, ["fc.weight as a layered weight", "fc.weight in a MyLinear"]),
    ],
)
def test_a_model_that_does_not_match_is_refused_with_the_names_on_both_sides(conv, net, words):
    with pytest.raises(ModelMismatchError) as raised:
        load(MemorySource(conv.data), net())
    for word in words:
        assert raised.match(word)


@pytest.mark.parametrize("owner", ["bn1", "missing"])
def test_a_quantized_input_of_no_layered_module_is_named(conv, tmp_path, owner):
    state = conv.model.state_dict()
    moved = {
        k.replace("conv2.input_quantizer", f"{owner}.input_quantizer"): state[k] for k in state
    }
    pack(moved, tmp_path / "moved")
    with pytest.raises(ModelMismatchError, match=f"artifact has a quantized input of {owner};"):
        load(tmp_path / "moved", ConvNet())


def test_ties_must_match(tmp_path):
    class Untied(ZooNet):
        def __init__(self):
            super().__init__()
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())

    pack(trained(ZooNet()), tmp_path / "tied")
    pack(trained(Untied()), tmp_path / "untied")
    with pytest.raises(ModelMismatchError, match=r"only the model has head.weight \(12, 8\)"):
        load(tmp_path / "tied", Untied())
    with pytest.raises(ModelMismatchError, match=r"artifact has head.weight \(12, 8\)"):
        load(tmp_path / "untied", ZooNet())


def test_a_model_on_the_meta_device_is_enough(conv):
    with torch.device("meta"):
        skeleton = ConvNet()
    conv.assert_equal_at(load(MemorySource(conv.data), skeleton, bit_width=5), 5)


def test_buffers_without_a_value_on_the_meta_device_are_named(tmp_path):
    pack(trained(ZooNet()), tmp_path / "zoo")
    with torch.device("meta"):
        skeleton = ZooNet()
    with pytest.raises(LayeringError, match=r"positions is not part of a state dict"):
        load(tmp_path / "zoo", skeleton)


def test_the_model_that_is_given_is_not_changed(conv):
    net = ConvNet()
    before = copy.deepcopy(net.state_dict())
    for form in ("packed", "fake-quantized"):
        load(MemorySource(conv.data), net, form=form)
        assert type(net.fc) is nn.Linear
        assert net.training
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_no_weight_of_the_model_that_is_given_is_ever_copied(conv, monkeypatch):
    def copied(self, memo):
        raise AssertionError("a parameter was copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)
    load(MemorySource(conv.data), ConvNet())


def test_a_model_is_loaded_in_the_dtype_of_the_one_that_is_given(conv):
    for form in ("packed", "fake-quantized"):
        net = load(MemorySource(conv.data), ConvNet().bfloat16(), form=form)
        assert net(conv.images.bfloat16()).dtype == torch.bfloat16


def test_excluded_modules_stay_float_and_come_back(tmp_path):
    model = trained(ZooNet(), (2, 4), exclude=("encoder", "bn1d"))
    path = tmp_path / "zoo"
    pack(model, path)
    net = load(path, ZooNet())
    with torch.no_grad():
        assert torch.equal(net(batch()[0]), model(batch()[0]))


def test_a_loaded_model_can_be_copied_and_its_copy_changes_alone(conv):
    net = load(MemorySource(conv.data), ConvNet())
    twin = copy.deepcopy(net)
    downgrade(twin, 2)
    assert bit_widths_of(net) == ALL_BIT_WIDTHS
    conv.assert_equal_at(net, 8)
    conv.assert_equal_at(twin, 2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("no such file", ConvNet()), SourceError),
        (("ftp://example.org/net", ConvNet()), SourceError),
    ],
)
def test_a_source_that_cannot_be_opened_is_refused(arguments, error):
    with pytest.raises(error):
        load(*arguments)


def test_arguments_of_the_wrong_type_are_one_sentence(conv):
    net = load(MemorySource(conv.data), ConvNet())
    for wrong in (3, None, b"bytes", ConvNet()):
        with pytest.raises(SourceError, match="give the path of an artifact"):
            load(wrong, ConvNet())
        with pytest.raises(SourceError, match="give the path of an artifact"):
            upgrade(net, wrong)
    for wrong in (3, None, "net"):
        with pytest.raises(LayeringError, match="holds no artifact"):
            upgrade(wrong, MemorySource(conv.data))
        with pytest.raises(LayeringError, match="holds no artifact"):
            downgrade(wrong, 2)
    for wrong in (None, 3, ["packed"]):
        with pytest.raises(LayeringError, match="'packed' or 'fake-quantized'"):
            load(MemorySource(conv.data), ConvNet(), form=wrong)
    with pytest.raises(LayeringError, match=r"give a torch\.nn\.Module"):
        load(MemorySource(conv.data), {"not": "a model"})
    for wrong in (9, 0, True, "4", 4.0):
        with pytest.raises(BitWidthError):
            load(MemorySource(conv.data), ConvNet(), bit_width=wrong)


def test_inspect_tells_what_was_packed(conv):
    assert inspect(conv.path) == conv.receipt
    assert conv.receipt.num_weights == sum(
        p.numel() for n, p in ConvNet().named_parameters() if p.dim() > 1
    )


def test_a_model_loaded_in_inference_mode_can_be_switched_outside(conv):
    with torch.inference_mode():
        net = load(MemorySource(conv.data), ConvNet(), bit_width=2)
    set_bit_width(net, 1)
    upgrade(net, MemorySource(conv.data))
    conv.assert_equal_at(net, 8)


def test_the_wrapper_of_a_compiled_model_is_looked_through(conv):
    conv.assert_equal_at(load(MemorySource(conv.data), torch.compile(ConvNet())), 8)


def test_a_loaded_model_reports_the_weights_it_holds_as_planes(conv):
    net = load(MemorySource(conv.data), ConvNet())
    assert report(net).num_layered == conv.receipt.num_weights
    assert report(net).num_layered == report(conv.model).num_layered


# What another writer left out because it does not change: {layer: {name: value}}.
CHANGES = [
    {"fc.step": 0.5, "fc.zero_point": 1.0, "fc.bias": 10.0, "bn.running_mean": 20.0},
    {"fc.step": 0.25, "fc.bias": 11.0},
    {"fc.zero_point": 3.0, "bn.running_mean": 22.0},
    {},
]
HELD = {
    2: [0.5, 1.0, 10.0, 20.0],
    4: [0.25, 1.0, 11.0, 20.0],
    6: [0.25, 3.0, 11.0, 22.0],
    8: [0.25, 3.0, 11.0, 22.0],
}


class Sparing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, inputs):
        return self.bn(self.fc(inputs))

    @staticmethod
    def write(path):
        """A file in which what a later layer does not change is not there again."""
        layers = []
        for changes, bit_width in zip(CHANGES, HELD, strict=True):
            planes = np.full((2, 5), 0b10101010, np.uint8)
            tensors = [TensorData("fc.weight.q", "U8", planes.shape, planes.tobytes())]
            if not layers:
                ones = float32(np.ones(5))
                names = ("fc.weight.scale", "bn.weight", "bn.bias", "bn.running_var")
                tensors += [TensorData(name, **ones) for name in names]
            for name, value in changes.items():
                is_row = name in ("fc.bias", "bn.running_mean")
                tensors.append(TensorData(name, **float32([value] * (5 if is_row else 1))))
            layers.append(LayerContent(bit_width, tensors))
        write_artifact(
            path,
            layers=layers,
            weights={"fc.weight": LayeredWeight((5, 8), None, None)},
            activations={"fc": Activation("offset", {b: b for b in HELD})},
            model=MODEL,
        )


def _held(net, bit_width):
    with torch.no_grad(), at_bit_width(net, bit_width):
        inputs = net.fc.input_quantizer
        tensors = inputs.row_of(inputs.steps), inputs.row_of(inputs.zero_points)
        rows = net.fc.bias, net.bn.row_of(net.bn.running_mean)
        assert all(len(row.unique()) == 1 for row in rows)
        return [float(t.flatten()[0]) for t in (*tensors, *rows)]


@pytest.mark.parametrize("form", ["packed", "fake-quantized"])
@pytest.mark.parametrize("widest", HELD)
def test_what_a_later_layer_does_not_replace_holds_at_every_width(form, widest, tmp_path):
    Sparing.write(tmp_path / "net")
    net = load(tmp_path / "net", Sparing(), bit_width=widest, form=form)
    for bit_width in bit_widths_of(net):
        assert _held(net, bit_width) == HELD[bit_width]


def test_what_holds_does_so_up_and_down_any_way(tmp_path):
    Sparing.write(tmp_path / "net")
    net = load(tmp_path / "net", Sparing(), bit_width=2)
    for target in (4, 8, 2, 6, 4, 8):
        if target in bit_widths_of(net):
            downgrade(net, target)
        else:
            upgrade(net, tmp_path / "net", bit_width=target)
        for bit_width in bit_widths_of(net):
            assert _held(net, bit_width) == HELD[bit_width]


@pytest.mark.parametrize("form", ["packed", "fake-quantized"])
def test_a_shared_batch_norm_that_was_loaded_is_measured_again(form, tmp_path):
    images = 2 * batch()[0]  # others than those it was trained on
    pack(trained(ConvNet(), (2, 8), batch_norm="shared"), tmp_path / "net")
    net = load(tmp_path / "net", ConvNet(), form=form)
    recalibrate(net, [images])
    means = []
    for bit_width in (2, 8):
        with torch.no_grad(), at_bit_width(net, bit_width):
            means.append(net.conv1(images).mean(dim=(0, 2, 3)))
    # A running mean of two against a plain one: float32 rounding.
    torch.testing.assert_close(net.bn1.running_mean, torch.stack(means).mean(dim=0))
