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


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
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
