"""From a torch model whose weights alone are quantized to an engine: nearly the same numbers."""

import numpy as np
import pytest
import torch
from graph.nets import SmallResNet, SmallTransformer, prepared
from graph.packed import IMAGES, Packed
from torch import nn

import plyweight
from plyweight.artifact import GRAPH_NAME, ArtifactReader, Graph

TOKENS = torch.randint(0, 12, (5, 7), generator=torch.Generator().manual_seed(2))
# Both compute in float32 and sum in different orders, over up to 144 products and seven modules.
NEAR = 1e-5


class Mixed(nn.Module):
    """``(batch, 40)``: a product for each of many rows, one with a batch norm, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(10, 17)
        self.wide = nn.Linear(68, 96, bias=False)
        self.norm = nn.BatchNorm1d(96)
        self.square = nn.Linear(96, 96)
        self.head = nn.Linear(96, 3)

    def forward(self, x):
        x = self.rows(x.unflatten(1, (4, 10))).flatten(1)
        x = torch.relu(self.norm(self.wide(x)))
        x = self.head(self.square(torch.relu(self.square(x))))
        return x + self.square.weight.square().mean()


NETS = {
    "transformer": (SmallTransformer, TOKENS),
    "convolutions": (SmallResNet, IMAGES),
    "mixed": (Mixed, torch.randn(6, 40, generator=torch.Generator().manual_seed(3))),
}


def packed(name, folder, **options):
    torch.manual_seed(0)
    net, inputs = NETS[name]
    return Packed(
        prepared(net(), inputs, (1, 2, 3, 4, 5, 6, 7, 8), activations=None, **options),
        inputs,
        folder,
    )


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("group_size", [None, 16, 5])
@pytest.mark.parametrize("name", NETS)
def test_an_engine_answers_as_torch_does(name, group_size, backend, tmp_path):
    one, inputs = packed(name, tmp_path, group_size=group_size), NETS[name][1]
    with plyweight.open(one.path, backend=backend, threads=1) as engine:
        for bit_width in engine.bit_widths:
            engine.set_bit_width(bit_width)
            (found,) = engine.run({engine.inputs[0].name: inputs.numpy()}).values()
            expected = one.expected(bit_width, inputs)
            assert np.abs(found - expected).max() < NEAR * expected.std()
        (again,) = engine.run({engine.inputs[0].name: inputs[:1].numpy()}).values()
        assert np.abs(again - expected[:1]).max() < NEAR * expected.std()


def test_the_forms_of_a_mixed_network_are_told(tmp_path):
    one = packed("mixed", tmp_path)
    with plyweight.open(one.path, bit_width=4) as engine:
        kinds = {name: form.kind for name, form in engine.report().forms.items()}
    assert kinds == {
        "rows": "nibbles",
        "wide": "nibbles",
        "square": "nibbles",
        "head": "nibbles",
        "square.weight:value": "float",
    }


class ReadAsValue(nn.Module):
    """``compute(weight, x)`` of a weight ``(48, 48)`` whose rows have uneven scales."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.l, self.compute = nn.Linear(48, 48), compute
        with torch.no_grad():
            self.l.weight.mul_(torch.linspace(0.05, 3, 48)[:, None])

    def forward(self, x):
        return self.compute(self.l.weight, x)


COMPUTED = {
    "product": lambda weight, x: x @ weight,
    "product from the left": lambda weight, x: (weight @ x.T).T,
    "product of one row each": lambda weight, x: (x.unsqueeze(1) @ weight).squeeze(1),
    "sum": lambda weight, x: weight.sum(0) + x,
    "linear": lambda weight, x: nn.functional.linear(x, weight),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_read_as_a_value_is_what_torch_reads(name, group_size, backend, tmp_path):
    """With a scale for each of the inputs that are summed, OpenVINO's own product is wrong."""
    torch.manual_seed(0)
    x = torch.randn(8, 48)
    net = prepared(
        ReadAsValue(COMPUTED[name]), x, (2, 4, 8), activations=None, group_size=group_size
    )
    one = Packed(net, x, tmp_path)
    with plyweight.open(one.path, backend=backend, threads=1) as engine:
        for bit_width in engine.bit_widths:
            engine.set_bit_width(bit_width)
            expected = one.expected(bit_width, x)
            for rows in (1, 2, 8):
                (found,) = engine.run({engine.inputs[0].name: x[:rows].numpy()}).values()
                assert np.abs(found - expected[:rows]).max() < NEAR * expected.std()


class Tied(nn.Module):
    """Several layers that share a weight, each with a bias of its own."""

    def __init__(self, count) -> None:
        super().__init__()
        self.all = nn.ModuleList([nn.Linear(512, 512) for _ in range(count)])
        for layer in self.all:
            layer.weight = self.all[0].weight

    def forward(self, x):
        for layer in self.all:
            x = layer(x)
        return x


@pytest.mark.parametrize("group_size", [None, 16, 20])  # as nibbles, and as floats
def test_modules_that_share_a_weight_share_its_bytes(group_size, tmp_path):
    torch.manual_seed(0)
    x, sizes = torch.randn(4, 512), []
    for count in (1, 6):
        net = prepared(Tied(count), x, (2, 4, 8), activations=None, group_size=group_size)
        folder = tmp_path / str(count)
        folder.mkdir()
        one = Packed(net, x, folder)
        with plyweight.open(one.path, threads=1) as engine:
            sizes.append(engine.report().warm[0].num_bytes)
            (found,) = engine.run({engine.inputs[0].name: x.numpy()}).values()
            expected = one.expected(8, x)
            assert np.abs(found - expected).max() < NEAR * expected.std()
    assert sizes[1] < 1.2 * sizes[0]


@pytest.mark.parametrize(("group_size", "version"), [(None, 1), (96, 1), (16, 2)])
def test_only_a_graph_with_groups_is_of_version_2(group_size, version, tmp_path):
    one = packed("mixed", tmp_path, group_size=group_size)
    data = ArtifactReader(one.path).read_layer(0)[GRAPH_NAME].data
    assert text_of(data).startswith(b'{"inputs"')
    assert f'"version":{version}}}'.encode() in text_of(data)
    sizes = {m.group_size for m in Graph.from_bytes(data).modules.values()}
    assert sizes == ({None, 16} if version == 2 else {None})


def text_of(data):
    import zlib

    raw = zlib.decompress(data)
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def test_groups_and_quantized_activations_are_refused_with_what_to_do(tmp_path):
    net, inputs = NETS["mixed"]
    model = prepared(net(), inputs, (2, 8), group_size=16)
    with pytest.raises(plyweight.PlyweightError, match=r"group of 16.*activations=None"):
        plyweight.pack(model, tmp_path / "packed", example_inputs=inputs)
