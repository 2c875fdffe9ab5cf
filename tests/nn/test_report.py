"""report: every parameter is counted once, and what stays float is named."""

import pytest
import torch
from torch import nn

from plyweight.errors import LayeringError
from plyweight.nn import prepare, report


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_counts_that_a_human_can_check():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.LayerNorm(5), nn.Linear(5, 2))
    found = report(prepare(model, (2, 4, 8)))
    assert found.bit_widths == (2, 4, 8)
    assert found.layered == ("0", "3")
    assert found.num_layered == 4 * 5 + 5 * 2
    assert found.num_parameters == num_parameters(model) == 20 + 5 + 10 + 10 + 10 + 2
    assert found.share == 30 / 57
    assert [(kept.name, kept.kind, kept.num_parameters) for kept in found.kept] == [
        ("2", "LayerNorm", 10)
    ]


def test_it_reads_well():
    model = nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50))
    assert str(report(prepare(model, (2, 8)))).splitlines() == [
        "93.0% of 2,150 parameters are layered (1 modules; 2, 8 bits)",
        "  float: 1 (LayerNorm, 100 parameters): not a kind of module that can be layered",
    ]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight


def test_tied_weights_count_once():
    found = report(prepare(Tied(), (2, 8)))
    assert found.layered == ("embedding", "head")
    assert found.num_layered == 66
    assert found.num_parameters == num_parameters(Tied()) == 66 + 11 + 3
    assert found.kept[0].name == ""
    assert "  float: (the model itself) (Tied, 3 parameters)" in str(found)


def test_a_float_module_is_named_even_if_all_it_has_is_shared():
    model = nn.Sequential(nn.Embedding(11, 6, max_norm=1.0), nn.Linear(6, 11, bias=False))
    model[1].weight = model[0].weight
    model.append(nn.Linear(2, 3))
    found = report(prepare(model, (2, 8)))
    assert [(kept.name, kept.num_parameters) for kept in found.kept] == [("0", 66), ("1", 0)]
    assert found.num_parameters == num_parameters(model)


def test_attention_counts_as_before_it_was_unfused():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert report(prepare(model, (2, 8))).num_parameters == num_parameters(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_module_is_named_without_a_size():
    found = report(prepare(nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2)), (2, 8)))
    assert [(kept.name, kept.num_parameters) for kept in found.kept] == [("0", 0)]


def test_a_float_model_has_no_report():
    with pytest.raises(LayeringError, match="has no bit-widths"):
        report(nn.Linear(2, 2))
