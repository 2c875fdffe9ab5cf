"""prepare: a layered copy of any model, and what it does not take it names."""

import copy
import io
import pickle
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plyweight.errors import LayeringError
from plyweight.nn import (
    LayeredConv1d,
    LayeredConv2d,
    LayeredEmbedding,
    LayeredLinear,
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    at_bit_width,
    prepare,
    report,
    set_bit_width,
)
from plyweight.quantizers import WeightQuantizer

WIDTHS = (1, 2, 4, 8)


def with_quantized_weights(model, layered, bit_width):
    """A float copy of ``model`` whose weights are those of ``layered`` at ``bit_width``."""
    reference = copy.deepcopy(model)
    set_bit_width(layered, bit_width)
    for name, module in layered.named_modules():
        if hasattr(module, "weight_quantizer"):
            weight = module.weight.detach()
            reference.get_submodule(name).weight = nn.Parameter(weight)
    return reference


def assert_computes_with_quantized_weights(model, *inputs, **options):
    """``prepare`` changes the weights, and nothing else."""
    layered = prepare(model, WIDTHS, activations=None, **options)
    outputs = []
    for bit_width in WIDTHS:
        reference = with_quantized_weights(model, layered, bit_width)
        outputs.append(layered(*inputs))
        assert torch.equal(outputs[-1], reference(*inputs))
    assert not torch.equal(outputs[0], outputs[-1])
    return layered


class Loop(nn.Module):
    """Calls one module several times, one by a list of its own, and one by the functional form."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.plain_list = [self.shared]
        self.functional = nn.Linear(4, 4)

    def forward(self, inputs):
        for _ in range(2):
            inputs = self.shared(inputs).tanh()
        inputs = self.again(inputs) + self.plain_list[0](inputs)
        return F.linear(inputs, self.functional.weight, self.functional.bias)


class Tied(nn.Module):
    def __init__(self, **other):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        for name, module in other.items():
            module.weight = self.embedding.weight
            setattr(self, name, module)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Linear(6, 5, bias=False), (2, 3, 6)),
        (nn.Linear(6, 5), (6,)),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), (2, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="reflect"), (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 9)),
        (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (4, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("group_size", [None, 3])
def test_a_module_computes_its_function_with_the_quantized_weight(module, shape, group_size):
    layered = assert_computes_with_quantized_weights(
        module, torch.randn(shape), group_size=group_size
    )
    assert type(layered).__name__ == f"Layered{type(module).__name__}"


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)], ids=str)
def test_an_embedding_looks_up_quantized_rows(shape):
    ids = torch.randint(0, 11, shape)
    layered = prepare(nn.Embedding(11, 6), WIDTHS)
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        assert torch.equal(layered(ids), F.embedding(ids, layered.weight))


def test_nested_models_with_loops_lists_and_functional_uses_compute_with_quantized_weights():
    model = nn.Sequential(OrderedDict(a=nn.Sequential(nn.Linear(3, 4), nn.ReLU()), b=Loop()))
    layered = assert_computes_with_quantized_weights(model, torch.randn(5, 3))
    assert report(layered).layered == ("a.0", "b.shared", "b.functional")
    assert layered.b.again is layered.b.shared is layered.b.plain_list[0]


def test_the_root_may_be_the_module():
    layered = prepare(nn.Linear(3, 4), WIDTHS)
    assert type(layered) is LayeredLinear
    assert report(layered).layered == ("",)
    assert layered(torch.randn(2, 3)).shape == (2, 4)


def test_it_starts_at_the_widest():
    assert prepare(nn.Linear(3, 4), (2, 5)).weight_quantizer.bit_width == 5


def test_the_original_is_untouched():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    before = copy.deepcopy(model)
    layered = prepare(model, WIDTHS, exclude=["3"])
    layered(torch.randn(2, 3, 3, 3)).sum().backward()
    with torch.no_grad():
        for parameter in layered.parameters():
            parameter.add_(1)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    attributes = [[set(vars(m)) for m in one.modules()] for one in (model, before)]
    assert attributes[0] == attributes[1]
    for (name, tensor), (other, expected) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor, expected)


def test_every_layered_kind_has_its_class():
    model = nn.ModuleList(
        [
            nn.Linear(2, 2),
            nn.Conv1d(2, 2, 1),
            nn.Conv2d(2, 2, 1),
            nn.Embedding(2, 2),
            nn.BatchNorm1d(2),
            nn.BatchNorm2d(2),
        ]
    )
    assert [type(module) for module in prepare(model, WIDTHS)] == [
        LayeredLinear,
        LayeredConv1d,
        LayeredConv2d,
        LayeredEmbedding,
        SwitchableBatchNorm1d,
        SwitchableBatchNorm2d,
    ]


def test_tied_weights_stay_tied_and_share_their_quantizer():
    layered = prepare(Tied(), WIDTHS, activations=None)
    assert layered.head.latent_weight is layered.embedding.latent_weight
    assert layered.head.weight_quantizer is layered.embedding.weight_quantizer
    ids = torch.tensor([[1, 2]])
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        weight = layered.head.weight
        assert torch.equal(layered(ids), weight[ids] @ weight.t())
    layered(ids).sum().backward()
    assert layered.embedding.latent_weight.grad.abs().sum(dim=1).gt(0).all()


def test_a_weight_tied_to_a_float_module_stays_float_everywhere_and_is_named():
    model = nn.Sequential(Tied(other=Subclass(6, 11)), nn.Linear(11, 2))
    layered = prepare(model, WIDTHS)
    assert report(layered).layered == ("1",)
    reasons = {kept.name: kept.reason for kept in report(layered).kept}
    assert set(reasons) == {"0.embedding", "0.head", "0.other"}
    assert reasons["0.embedding"] == "shares its weight with 0.other, which stays float"
    assert reasons["0.head"].startswith("shares its weight with 0.")
    assert layered[0].head.weight is layered[0].embedding.weight


def test_excluding_one_of_two_tied_modules_keeps_both_float():
    model = nn.Sequential(Tied(), nn.Linear(11, 2))
    reasons = {k.name: k.reason for k in report(prepare(model, WIDTHS, exclude=["0.head"])).kept}
    assert reasons == {
        "0.embedding": "shares its weight with 0.head, which stays float",
        "0.head": "excluded by the caller",
    }


def test_hooks_still_run():
    model, seen = nn.Sequential(nn.Linear(3, 4)), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    prepare(model, WIDTHS)(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LSTM(3, 4), "not a kind of module that can be layered"),
        (lambda: nn.GRU(3, 4), "not a kind of module that can be layered"),
        (lambda: nn.Conv3d(3, 4, 1), "not a kind of module that can be layered"),
        (lambda: nn.ConvTranspose2d(3, 4, 1), "not a kind of module that can be layered"),
        (lambda: nn.Bilinear(3, 4, 5), "not a kind of module that can be layered"),
        (lambda: nn.LayerNorm(3), "not a kind of module that can be layered"),
        (lambda: Subclass(3, 4), "a subclass of Linear, whose forward may differ"),
        (lambda: nn.LazyLinear(4), "its weight is not initialized yet"),
        (lambda: nn.LazyConv2d(4, 3), "its weight is not initialized yet"),
        (lambda: nn.Embedding(0, 4), "its weight is empty"),
        (
            lambda: nn.Embedding(3, 4, max_norm=1.0),
            "an embedding with max_norm rewrites its weight",
        ),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "by a parametrization"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 4)), "by a parametrization"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), "its weight is computed by a hook"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_what_stays_float_is_named_with_its_reason(make, reason):
    module = make()
    layered = prepare(nn.ModuleDict({"other": module, "fc": nn.Linear(3, 4)}), WIDTHS)
    assert report(layered).layered == ("fc",)
    assert type(layered["other"]) is type(module)
    first = report(layered).kept[0]
    assert first.name == "other"
    assert reason in first.reason


def test_a_module_whose_forward_was_replaced_stays_float():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    old = model[0].forward
    model[0].forward = lambda inputs: old(inputs) * 2  # as accelerate's hooks do
    layered = prepare(model, WIDTHS)
    assert report(layered).layered == ("1",)
    assert "its forward was replaced" in report(layered).kept[0].reason


def test_integer_weights_stay_float_modules():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    assert report(prepare(model, WIDTHS)).kept[0].reason == "its weight is torch.int8"


def test_frozen_weights_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    layered = prepare(model, WIDTHS)
    layered(torch.randn(2, 3)).sum().backward()
    frozen = [layered[0].latent_weight, *layered[0].weight_quantizer.parameters()]
    assert not any(p.requires_grad for p in frozen)
    assert layered[1].latent_weight.grad is not None
    assert layered[1].weight_quantizer.clip.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    layered = prepare(model.to(dtype), WIDTHS)
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        outputs = layered(torch.randn(8, 3, 3, 3, dtype=dtype))
        assert outputs.dtype == dtype
        outputs.sum().backward()
    assert layered[0].latent_weight.dtype == layered[0].latent_weight.grad.dtype == dtype


def test_weights_that_are_not_finite_are_named():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    with torch.no_grad():
        model["b"].weight[0, :2] = torch.tensor([torch.nan, torch.inf])
    words = "b.weight has 2 weights that are NaN or infinite"
    with pytest.raises(LayeringError, match=re.escape(words)):
        prepare(model, WIDTHS)


def test_weights_without_values_are_named():
    with pytest.raises(LayeringError, match=re.escape("0.weight is on the meta device")):
        prepare(nn.Sequential(nn.Linear(3, 4, device="meta")), WIDTHS)


def small():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3),
            body=nn.Sequential(nn.Flatten(), nn.Linear(4, 4)),
            bodyguard=nn.Linear(4, 2),
        )
    )


def own_bit_widths(model):
    return {
        name.removesuffix(".weight_quantizer"): module.own_bit_widths
        for name, module in model.named_modules()
        if isinstance(module, WeightQuantizer)
    }


def test_nothing_is_pinned_unless_asked():
    assert set(own_bit_widths(prepare(small(), WIDTHS)).values()) == {WIDTHS}


def test_pinning_a_name_pins_what_is_inside_of_it_and_no_more():
    layered = prepare(small(), WIDTHS, pinned={"stem": 8, "body": 3})
    assert own_bit_widths(layered) == {"stem": (8,), "body.1": (3, 4, 8), "bodyguard": WIDTHS}
    assert layered.stem.input_quantizer.widths.tolist() == [8]


def test_the_highest_of_several_pins_counts():
    layered = prepare(small(), WIDTHS, pinned={"": 2, "body": 4, "body.1": 3})
    assert own_bit_widths(layered) == {"stem": (2, 4, 8), "body.1": (4, 8), "bodyguard": (2, 4, 8)}


def test_tied_weights_take_the_highest_pin_of_their_modules():
    layered = prepare(Tied(), WIDTHS, pinned={"head": 4})
    assert layered.embedding.weight_quantizer.own_bit_widths == (4, 8)


def test_a_shared_module_goes_by_all_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "c": nn.Linear(3, 4)})
    model["b"] = model["a"]
    assert report(prepare(model, WIDTHS, exclude=["b"])).layered == ("c",)
    assert own_bit_widths(prepare(model, WIDTHS, pinned={"b": 4}))["a"] == (4, 8)


def test_shared_attention_that_is_excluded_by_its_second_name_stays_whole():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "c": nn.Linear(3, 4)})
    model["b"] = model["a"]
    layered = prepare(model, WIDTHS, exclude=["b"])
    assert type(layered["a"]) is nn.MultiheadAttention
    assert report(layered).layered == ("c",)


def test_excluded_modules_stay_float_with_everything_in_them():
    layered = prepare(small(), WIDTHS, exclude=["body"])
    assert report(layered).layered == ("stem", "bodyguard")
    assert type(layered.body[1]) is nn.Linear
    one_name = prepare(small(), WIDTHS, exclude="body.1")
    assert report(one_name).layered == ("stem", "bodyguard")
    assert report(one_name).kept[0].reason == "excluded by the caller"


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_an_excluded_batch_norm_stays_a_batch_norm(options):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options))
    assert type(prepare(model, WIDTHS, exclude=["1"])[1]) is nn.BatchNorm1d


def test_a_part_of_a_layered_model_that_stayed_float_can_be_prepared_by_itself():
    part = prepare(small(), WIDTHS, exclude=["body"]).body
    assert report(prepare(part, WIDTHS)).layered == ("1",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet"}, "model is a str; give a torch.nn.Module"),
        ({"bit_widths": "2,4"}, "bit_widths is '2,4'; give a sequence of integers"),
        ({"bit_widths": 8}, "bit_widths is 8; give a sequence of integers"),
        ({"bit_widths": (4, 2)}, "bit_widths is (4, 2); give at least one, ascending"),
        ({"bit_widths": (2, 16)}, "bit_widths is (2, 16); each must be an integer of 1 to 8"),
        ({"activations": "all"}, "activations is 'all'; give 'match'"),
        ({"activations": 16}, "activations is 16; give 'match'"),
        ({"activations": (2, 8)}, "activations is (2, 8); give 'match'"),
        ({"activations": {1: 8}}, "but weights of 2 bits need an entry too"),
        ({"group_size": 0}, "group_size is 0; give a positive integer or None"),
        ({"group_size": 2.0}, "group_size is 2.0; give a positive integer or None"),
        ({"group_size": True}, "group_size is True; give a positive integer or None"),
        ({"pinned": {"stem": 9}}, "pinned['stem'] is 9; give an integer of 1 to 8"),
        ({"pinned": {"stem": "8"}}, "pinned['stem'] is '8'; give an integer of 1 to 8"),
        ({"pinned": ["stem"]}, "pinned is ['stem']; give a mapping such as {'fc': 8}"),
        ({"pinned": {"fc": 8}}, "pinned names 'fc', but no layered module has that name"),
        ({"pinned": {"bod": 8}}, "there are stem, body.1, bodyguard"),
        ({"pinned": {"body.0": 8}}, "pinned names 'body.0', but no layered module"),
        ({"pinned": {0: 8}}, "pinned names 0, but no layered module"),
        ({"pinned": {"stem": 8}, "exclude": ["stem"]}, "pinned names 'stem', but no layered"),
        ({"exclude": ["fc"]}, "exclude names 'fc', but the model's modules are stem, body"),
        ({"exclude": "fc"}, "exclude names 'fc'"),
        ({"exclude": 5}, "exclude names 5"),
        ({"exclude": [""]}, "nothing in this Sequential can be layered"),
        ({"exclude": ["stem", "body", "bodyguard"]}, "nothing in this Sequential can be layered"),
        ({"model": nn.ReLU()}, "nothing in this ReLU can be layered"),
        ({"model": nn.BatchNorm1d(3)}, "nothing in this BatchNorm1d can be layered"),
        ({"model": prepare(nn.Linear(2, 2), (8,))}, "the model is layered already"),
        ({"model": nn.ModuleList([prepare(nn.Linear(2, 2), (8,))])}, "is layered already"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options, words):
    with pytest.raises(LayeringError, match=re.escape(words)):
        prepare(**({"model": small(), "bit_widths": WIDTHS} | options))


def test_activations_are_checked_even_where_no_input_is_quantized():
    with pytest.raises(LayeringError, match="activations is 'all'"):
        prepare(nn.Embedding(3, 4), WIDTHS, activations="all")


@pytest.mark.parametrize(
    ("activations", "widths"),
    [("match", [1, 2, 4, 8]), (8, [8] * 4), ({1: 3, 2: 4, 4: 6, 8: 8}, [3, 4, 6, 8])],
)
def test_inputs_are_quantized_as_wide_as_told(activations, widths):
    layered = prepare(nn.Linear(3, 4), WIDTHS, activations=activations)
    assert layered.input_quantizer.widths.tolist() == widths
    inputs = torch.randn(50, 3)
    layered(inputs)
    for bit_width in WIDTHS:
        with at_bit_width(layered, bit_width):
            quantized = layered.input_quantizer(inputs)
            assert torch.equal(layered(inputs), F.linear(quantized, layered.weight, layered.bias))


def trained():
    """A layered model that has seen a step, with each kind of module."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 6),
        nn.GELU(),
        nn.Linear(6, 2),
    )
    layered = prepare(model, WIDTHS, pinned={"0": 4}, group_size=2)
    optimizer = torch.optim.SGD(layered.parameters(), lr=0.1)
    for bit_width in WIDTHS:
        set_bit_width(layered, bit_width)
        layered(torch.randn(16, 3, 3, 3)).square().mean().backward()
    optimizer.step()
    return model, layered


def assert_same_at_every_width(one, other):
    inputs = torch.randn(5, 3, 3, 3)
    one.eval()
    other.eval()
    for bit_width in WIDTHS:
        with at_bit_width(one, bit_width), at_bit_width(other, bit_width):
            assert torch.equal(one(inputs), other(inputs))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "pickle"],
)
def test_a_copy_computes_the_same_and_shares_nothing(copied):
    _, layered = trained()
    set_bit_width(layered, 2)
    other = copied(layered)
    assert other[0].weight_quantizer.bit_width == 2
    assert_same_at_every_width(layered, other)
    set_bit_width(other, 8)
    assert layered[0].weight_quantizer.bit_width == 2
    theirs = {p.data_ptr() for p in other.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in layered.parameters())


def test_a_checkpoint_without_code_restores_a_fresh_model():
    model, layered = trained()
    file = io.BytesIO()
    torch.save(layered.state_dict(), file)
    file.seek(0)
    fresh = prepare(model, WIDTHS, pinned={"0": 4}, group_size=2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same_at_every_width(layered, fresh)


def test_the_state_dict_keeps_the_names_of_the_float_model():
    model, layered = trained()
    assert set(model.state_dict()) <= set(layered.state_dict())
    assert {name for name, _ in model.named_parameters()} <= {
        name for name, _ in layered.named_parameters()
    }
