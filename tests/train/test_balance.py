"""The coefficients of the bit-widths' gradients, and where those gradients are kept."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchjd.aggregation import MGDAWeighting, UPGradWeighting

from plyweight.errors import LayeringError
from plyweight.nn import at_bit_width, prepare
from plyweight.train import JointObjective, NormalizedMGDA
from plyweight.train.balance import GradientStash, UPGrad

WIDTHS = (2, 4, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).flatten(start_dim=1))


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 2, 6, 6, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


def prepared(**options):
    torch.manual_seed(5)
    model = prepare(Net(), WIDTHS, **options)
    with torch.no_grad():
        model(data()[0])
    return model


def is_private(name):
    """Written down once more, independently of the code: what has a row for each bit-width."""
    return name.endswith((".gain", "input_quantizer.clip", "input_quantizer.offset")) or (
        name.startswith("bn.")
    )


def per_width_gradients(model):
    """The gradient at every bit-width alone, widest first."""
    images, labels = data()
    found = []
    for bit_width in sorted(WIDTHS, reverse=True):
        model.zero_grad()
        with at_bit_width(model, bit_width):
            F.cross_entropy(model(images), labels).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    return found


def flat(gradients):
    return torch.cat([g.flatten() for n, g in gradients.items() if not is_private(n)]).double()


@pytest.mark.parametrize("balance", ["mgda", "upgrad"])
def test_shared_parameters_follow_the_balance_and_private_ones_the_mean(balance):
    rows = per_width_gradients(prepared())
    J = torch.stack([flat(row) for row in rows])
    G = J @ J.T
    if balance == "upgrad":
        expected = UPGradWeighting()(G / G.trace())
    else:
        norms = G.diagonal().sqrt()
        expected = MGDAWeighting()(G / norms[:, None] / norms) * norms.mean() / norms
    model = prepared()
    objective = JointObjective(model, F.cross_entropy, balance=balance, distillation=None)
    objective.backward(*data())
    for name, parameter in model.named_parameters():
        own = [1 / 3] * 3 if is_private(name) else expected.tolist()
        by_hand = sum(c * row[name] for c, row in zip(own, rows, strict=True))
        # float32 sums of three terms; the Gramian of the code is summed module by module
        torch.testing.assert_close(parameter.grad, by_hand, rtol=1e-3, atol=1e-6, msg=name)


def test_a_balance_that_always_answers_the_mean_is_the_mean():
    model, other = prepared(), prepared()
    weights = {2: 3.0, 4: 1.0, 8: 1.0}
    uniform = JointObjective(
        model, F.cross_entropy, weights=weights, balance=lambda G: torch.full((len(G),), 1 / len(G))
    )
    uniform.backward(*data())
    JointObjective(other, F.cross_entropy, weights=weights).backward(*data())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_balance_sees_the_gramian_of_the_weighted_gradients_widest_first():
    rows = per_width_gradients(prepared())
    seen = []

    def look(gramian):
        seen.append(gramian)
        return torch.ones(len(gramian)) / len(gramian)

    weights = {2: 2.0, 4: 1.0, 8: 1.0}
    objective = JointObjective(
        prepared(), F.cross_entropy, weights=weights, balance=look, distillation=None
    )
    objective.backward(*data())
    scales = torch.tensor([3 / 4, 3 / 4, 3 / 2]).double()  # 8, 4, 2 bits: 3 times the weight
    J = scales[:, None] * torch.stack([flat(row) for row in rows])
    torch.testing.assert_close(seen[0], J @ J.T, rtol=1e-4, atol=1e-7)
    assert seen[0].dtype == torch.float64


def test_normalized_mgda_does_not_care_how_long_a_gradient_is():
    G = torch.tensor([[1.0, 0.2], [0.2, 1.0]]).double()
    lengths = torch.tensor([100.0, 1.0]).double()
    plain = NormalizedMGDA()(G)
    scaled = NormalizedMGDA()(G * torch.outer(lengths, lengths))
    torch.testing.assert_close(plain, torch.tensor([0.5, 0.5]).double())
    # The same direction: each gradient counts by the inverse of its length.
    torch.testing.assert_close(scaled[0] * lengths[0], scaled[1] * lengths[1])
    # Together as long as if both had their mean length.
    torch.testing.assert_close(scaled @ lengths, lengths.mean())


@pytest.mark.parametrize("short", [0.0, 1e-12])
def test_a_gradient_of_hardly_any_length_does_not_stop_the_others(short):
    coefficients = NormalizedMGDA()(torch.diag(torch.tensor([1.0, short**2]).double()))
    assert coefficients[0] >= 0.25
    assert coefficients.isfinite().all()


@pytest.mark.parametrize("balance", [NormalizedMGDA(), UPGrad()])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
def test_a_balance_does_not_depend_on_the_unit_of_the_loss(balance, scale):
    J = torch.tensor([[1.0, 0.0, 2.0], [-0.5, 1.0, 0.0], [0.3, 0.3, -1.0]]).double()
    torch.testing.assert_close(balance(scale * J @ J.T), balance(J @ J.T), rtol=1e-3, atol=1e-6)


def test_the_gramian_is_as_exact_under_autocast():
    seen = []

    def look(gramian):
        seen.append(gramian)
        return torch.ones(len(gramian)) / len(gramian)

    for is_mixed in (False, True):
        stash = GradientStash(prepared(), copy=False)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in stash.parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            stash.take_row()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            look(stash.gramian())
    assert torch.equal(*seen)


def test_a_step_that_fails_leaves_the_gradients_that_were_there():
    model = prepared()
    JointObjective(model, F.cross_entropy).backward(*data())
    before = {n: p.grad.clone() for n, p in model.named_parameters()}

    def fail(gramian):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        JointObjective(model, F.cross_entropy, balance=fail).backward(*data())
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


def test_a_balance_without_torchjd_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"needs TorchJD.*plyweight\[train\]"):
        JointObjective(prepared(), F.cross_entropy, balance="mgda")


@pytest.mark.parametrize("balance", ["mean", "mgda", "upgrad"])
def test_gradients_are_added_to_those_that_are_there(balance):
    model, other = prepared(), prepared()
    for part in (model, other):
        objective = JointObjective(part, F.cross_entropy, balance=balance)
        for _ in range(2 if part is model else 1):
            part.bn.reset_running_stats()
            objective.backward(*data())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * q.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("balance", ["mean", "mgda", "upgrad"])
def test_one_bit_width_is_ordinary_training_whatever_the_balance(balance):
    torch.manual_seed(5)
    model = prepare(Net(), (4,))
    torch.manual_seed(5)
    other = prepare(Net(), (4,))
    JointObjective(model, F.cross_entropy, balance=balance).backward(*data())
    with torch.no_grad():
        other(data()[0])
    F.cross_entropy(other(data()[0]), data()[1]).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)


def test_a_pinned_module_has_one_row_which_all_bit_widths_share():
    model = prepared(pinned={"conv": 8})
    seen = []
    objective = JointObjective(
        model,
        F.cross_entropy,
        balance=lambda G: seen.append(G) or torch.tensor([1.0, 0.0, 0.0]),
        distillation=None,
    )
    objective.backward(*data())
    alone = prepared(pinned={"conv": 8})
    JointObjective(alone, F.cross_entropy, weights={2: 0, 4: 0, 8: 1}, distillation=None).backward(
        *data()
    )
    gain = model.conv.weight_quantizer.gain
    torch.testing.assert_close(gain.grad, 3 * 1 / 3 * alone.conv.weight_quantizer.gain.grad)


def test_overflown_gradients_stay_overflown_so_that_a_scaler_skips_the_step():
    model = prepared()
    objective = JointObjective(model, F.cross_entropy, balance="upgrad")
    objective.backward(*data(), scale_loss=lambda loss: loss * float("inf"))
    assert not model.head._parameters["weight"].grad.isfinite().all()


@pytest.mark.parametrize("answer", [torch.ones(2), torch.tensor([1.0, float("nan"), 0.0])])
def test_a_balance_that_answers_nonsense_is_refused(answer):
    objective = JointObjective(prepared(), F.cross_entropy, balance=lambda G: answer)
    with pytest.raises(LayeringError, match="it must give 3 finite coefficients"):
        objective.backward(*data())


def test_an_unknown_balance_is_refused():
    with pytest.raises(LayeringError, match="give 'mean', 'mgda', 'upgrad' or a function"):
        JointObjective(prepared(), F.cross_entropy, balance="median")


def test_sparse_gradients_are_refused_with_what_to_do():
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    model = prepare(net, WIDTHS, exclude=["0"])
    objective = JointObjective(model, F.cross_entropy, balance="mgda")
    with pytest.raises(LayeringError, match="sparse gradients, which cannot be balanced"):
        objective.backward(torch.tensor([[0, 1]]), torch.tensor([2]))
