"""What cannot have a graph is named, and can still be packed without one."""

import builtins

import pytest
import torch
from graph.nets import SmallTransformer, prepared
from torch import nn

from plyweight.artifact import GRAPH_NAME, ArtifactReader
from plyweight.errors import LayeringError
from plyweight.packing import pack

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    """Goes another way for other values, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


class Unknown(nn.Module):
    """Computes with an operator that ONNX has not."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


def small(*modules, **options):
    return prepared(nn.Sequential(nn.Linear(6, 6), *modules), X, (2, 4, 8), **options)


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (lambda: small(Branching()), X, "module '1' cannot be traced"),
        (lambda: small(Unknown()), X, "operator prims.bessel_j0.default of module '1'"),
        (lambda: small(group_size=2), X, "weight of 0 has a scale for each group of 2 inputs"),
        (lambda: small().double(), X.double(), "0.weight is torch.float64"),
        (lambda: small(), [], "gave no batch"),
        (lambda: small(), "images", "has a str"),
        (lambda: small(), (X, None), "has a tuple"),
        (lambda: small(), [X, X.double()], "differ in dtypes"),
    ],
)
def test_the_reason_is_named(model, inputs, said, tmp_path):
    with pytest.raises(LayeringError) as caught:
        pack(model(), tmp_path / "packed", example_inputs=inputs)
    assert said in str(caught.value)
    assert not (tmp_path / "packed").exists()


def test_a_graph_that_no_engine_would_open_is_not_packed(tmp_path, monkeypatch):
    monkeypatch.setattr("plyweight.engine.onnx_model.MAX_NODES", 9)
    model = small(*(nn.ReLU() for _ in range(20)))
    with pytest.raises(
        LayeringError, match=r"more than an engine reads.*or pack without example_inputs"
    ):
        pack(model, tmp_path / "packed", example_inputs=X)
    assert not (tmp_path / "packed").exists()
    pack(model, tmp_path / "packed")


def test_signed_activations_of_one_bit_have_no_integer_grid(tmp_path):
    model = prepared(nn.Sequential(nn.Linear(6, 6)), X, (1, 8))
    with pytest.raises(LayeringError, match="signed and has 1 bit"):
        pack(model, tmp_path / "packed", example_inputs=X)


def test_a_state_dict_says_not_what_is_computed(tmp_path):
    with pytest.raises(LayeringError, match="pack the model itself"):
        pack(small().state_dict(), tmp_path / "packed", example_inputs=X)


def test_without_example_inputs_there_is_no_graph(tmp_path):
    pack(small(Branching()), tmp_path / "packed")
    assert GRAPH_NAME not in ArtifactReader(tmp_path / "packed").read_layer(0)


def test_what_has_to_be_installed_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_onnx(name, *args, **kwargs):
        if name == "plyweight.graph.build":
            raise ModuleNotFoundError("No module named 'onnxscript'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(ImportError, match=r"onnxscript.*plyweight\[onnx\]"):
        pack(small(), tmp_path / "packed", example_inputs=X)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "cat"}, "labels is 'cat'"),
        ({"labels": ["cat", 3]}, "give a sequence of texts"),
        ({"preprocessing": ["resize"]}, "give a mapping"),
        ({"preprocessing": {"mean": [0.5]}}, "decimal texts"),
        ({"preprocessing": {1: "a"}}, "keys that are no texts"),
    ],
)
def test_a_wrong_description_is_refused(options, said, tmp_path):
    with pytest.raises(LayeringError) as caught:
        pack(small(), tmp_path / "packed", **options)
    assert said in str(caught.value)


def test_a_description_is_in_the_header(tmp_path):
    preprocessing = {"mean": ["0.485"], "size": [32, 32]}
    pack(small(), tmp_path / "packed", labels=["cat", "dog"], preprocessing=preprocessing)
    io = ArtifactReader(tmp_path / "packed").header.io
    assert io == {"labels": ["cat", "dog"], "preprocessing": preprocessing}


def test_labels_are_as_many_as_classes_and_ports_are_described(tmp_path):
    model = small(nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(LayeringError, match="2 labels, but the model tells 3 classes"):
        pack(model, tmp_path / "packed", example_inputs=X, labels=["cat", "dog"])
    pack(model, tmp_path / "packed", example_inputs=X, labels=["cat", "dog", "eel"])
    io = ArtifactReader(tmp_path / "packed").header.io
    assert io["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 6]}]
    assert io["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 3]}]


def test_the_model_is_as_it_was(tmp_path):
    tokens = torch.randint(0, 12, (4, 7))
    model = prepared(SmallTransformer(), tokens, (2, 8)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pack(model, tmp_path / "packed", example_inputs=tokens)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
