"""One backward pass per bit-width, and the gradients meet in the latent weights."""

import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from plyweight.errors import BitWidthError, LayeringError, LossError
from plyweight.nn import at_bit_width, prepare, set_bit_width
from plyweight.train import JointObjective, Sandwich, soft_cross_entropy

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


class Net(nn.Module):
    """No batch norm, so that a batch is the sum of its parts."""

    def __init__(self, checkpointing=None, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.hidden = nn.Linear(64, 16)
        self.head = nn.Linear(16, 3)
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = checkpointing

    def middle(self, x):
        return self.dropout(F.relu(self.hidden(x)))

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(start_dim=1)
        if self.checkpointing is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.checkpointing)
        return self.head(x)


def data(size=6):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 2, 6, 6, generator=generator)
    return images, torch.randint(0, 3, (size,), generator=generator)


def prepared(bit_widths=(2, 4, 8), **options):
    """A prepared net whose activation steps are set."""
    torch.manual_seed(5)
    model = prepare(Net(**options), bit_widths)
    model(data()[0])
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, other, scale=1.0, **tolerance):
    mine, theirs = gradients(model), gradients(other)
    assert mine.keys() == theirs.keys()
    assert any(g.abs().sum() > 0 for g in mine.values())
    for name in mine:
        torch.testing.assert_close(mine[name], scale * theirs[name], **tolerance, msg=name)


def by_hand(model, weights, distillation=None):
    """The gradients of the weighted sum, written out."""
    images, labels = data()
    teacher = None
    for bit_width in sorted(weights, reverse=True):
        with at_bit_width(model, bit_width):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if distillation and teacher is not None:
                loss = loss + distillation(logits, teacher)
            teacher = logits.detach()
            (weights[bit_width] * loss).backward()


@pytest.mark.parametrize("distillation", [None, soft_cross_entropy])
def test_gradients_are_the_weighted_sum_over_the_bit_widths(distillation):
    model, other = prepared(), prepared()
    objective = JointObjective(
        model, F.cross_entropy, weights={2: 2, 4: 1, 8: 1}, distillation=distillation
    )
    assert objective.weights == {2: 0.5, 4: 0.25, 8: 0.25}
    losses = objective.backward(*data())
    by_hand(other, {2: 0.5, 4: 0.25, 8: 0.25}, distillation)
    assert_same_gradients(model, other, rtol=0, atol=0)
    assert list(losses) == [2, 4, 8]
    for bit_width, loss in losses.items():
        with torch.no_grad(), at_bit_width(model, bit_width):
            assert loss == F.cross_entropy(model(data()[0]), data()[1])  # without distillation


def test_distillation_is_on_where_the_criterion_is_cross_entropy():
    model = prepared()
    assert JointObjective(model, nn.CrossEntropyLoss()).distillation is soft_cross_entropy
    assert JointObjective(model, F.cross_entropy).distillation is soft_cross_entropy
    assert JointObjective(model, nn.MSELoss()).distillation is None
    assert JointObjective(model, nn.CrossEntropyLoss(), distillation=None).distillation is None


def test_soft_cross_entropy_is_the_kl_divergence_and_zero_for_equal_logits():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    p, q = teacher.softmax(1), student.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher), expected)
    assert soft_cross_entropy(student, student).abs() < 1e-7


def test_a_closure_gives_the_same_gradients_as_inputs_and_targets():
    model, other = prepared(), prepared()
    images, labels = data()
    JointObjective(model).backward(lambda: F.cross_entropy(model(images), labels))
    JointObjective(other, F.cross_entropy, distillation=None).backward(images, labels)
    assert_same_gradients(model, other, rtol=0, atol=0)


def test_a_model_that_computes_its_own_loss_trains_by_a_closure():
    class WithLoss(nn.Module):  # as transformers' models do
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, images, labels):
            logits = self.net(images)
            return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)

    images, labels = data()
    torch.manual_seed(5)
    model, other = prepare(WithLoss(), (2, 4, 8)), prepared()
    JointObjective(model).backward(lambda: model(images, labels).loss)
    JointObjective(other, F.cross_entropy, distillation=None).backward(images, labels)
    assert_same_gradients(model.net, other, rtol=0, atol=0)


def test_a_closure_that_returns_outputs_is_distilled_too():
    model, other = prepared(), prepared()
    images, labels = data()

    def closure():
        logits = model(images)
        return F.cross_entropy(logits, labels), logits

    JointObjective(model, distillation=soft_cross_entropy).backward(closure)
    JointObjective(other, F.cross_entropy).backward(images, labels)
    assert_same_gradients(model, other, rtol=0, atol=0)


def test_accumulated_half_batches_equal_the_whole_batch():
    model, other = prepared(), prepared()
    images, labels = data()
    objective = JointObjective(model, F.cross_entropy)
    for half in (slice(0, 3), slice(3, 6)):
        objective.backward(images[half], labels[half], scale_loss=lambda loss: loss / 2)
    JointObjective(other, F.cross_entropy).backward(images, labels)
    # Two sums of three terms each against one of six: float32 rounding.
    assert_same_gradients(model, other, rtol=1e-4, atol=1e-6)


def test_a_grad_scaler_scales_every_width_and_steps_as_usual():
    model, other = prepared(), prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    JointObjective(model, F.cross_entropy).backward(*data(), scale_loss=scaler.scale)
    JointObjective(other, F.cross_entropy).backward(*data())
    assert_same_gradients(model, other, scale=1024.0, rtol=1e-6, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.hidden.latent_weight.clone()
    scaler.unscale_(optimizer)
    assert_same_gradients(model, other, rtol=1e-6, atol=0)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model.hidden.latent_weight)


def test_an_ordinary_loop_with_clipping_and_a_schedule_learns_every_width():
    model = prepared()
    images, labels = data()
    objective = JointObjective(model, F.cross_entropy)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    first = objective.backward(images, labels)
    for _ in range(60):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = objective.backward(images, labels)
    assert all(last[b] < 0.8 * first[b] for b in first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_modules_run_again_at_the_width_of_their_gradient(use_reentrant):
    # The model is left at 8 bits: a recompute outside of its width would give other gradients.
    model, other = prepared(checkpointing=use_reentrant, dropout=0.3), prepared(dropout=0.3)
    for net in (model, other):
        torch.manual_seed(11)
        JointObjective(net, F.cross_entropy).backward(*data())
    assert_same_gradients(model, other, rtol=0, atol=0)


def test_dropout_draws_the_same_mask_at_each_width_and_a_new_one_in_the_next_step():
    model = prepared(WIDTHS, dropout=0.5)
    masks = []
    model.dropout.register_forward_hook(lambda m, i, o: masks.append((o == 0) & (i[0] != 0)))
    objective = JointObjective(model, F.cross_entropy)
    ones = torch.ones(6, 2, 6, 6)
    with torch.no_grad():
        model.hidden.bias.fill_(10.0)  # everything is positive, so zeros are dropout's
    for _ in range(2):
        objective.backward(ones, data()[1])
    assert len(masks) == 16
    assert all(torch.equal(masks[0], m) for m in masks[:8])
    assert all(torch.equal(masks[8], m) for m in masks[8:])
    assert not torch.equal(masks[0], masks[8])


def test_a_step_keeps_the_memory_of_one_width_at_a_time():
    def peak(bit_widths):
        model = prepared(bit_widths)
        alive, highest = 0, 0

        class Held:
            def __init__(self, tensor):
                nonlocal alive, highest
                self.tensor = tensor
                alive += tensor.numel() * tensor.element_size()
                highest = max(highest, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.numel() * self.tensor.element_size()

        objective = JointObjective(model, F.cross_entropy)
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            objective.backward(*data(64))
        return highest

    # The rest: tables with a row for each width, the teacher's logits.
    assert peak(WIDTHS) <= 1.1 * peak((8,))


def test_the_model_goes_back_to_its_width_also_when_the_step_fails():
    model = prepared()
    set_bit_width(model, 4)

    def fail(outputs, targets):
        if model.hidden.weight_quantizer.bit_width == 2:
            raise RuntimeError("broken")
        return outputs.sum()

    with pytest.raises(RuntimeError, match="broken"):
        JointObjective(model, fail).backward(*data())
    assert {m.bit_width for m in model.modules() if hasattr(m, "bit_width")} == {4}


def test_the_sandwich_visits_the_ends_and_one_between_and_resumes():
    model = prepared(WIDTHS)
    objective = JointObjective(model, F.cross_entropy, sampling=Sandwich(2, seed=1))
    visited = [tuple(objective.backward(*data())) for _ in range(5)]
    assert all({1, 8} < set(v) and len(v) == 4 for v in visited)
    assert len(set(visited)) > 1
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    going_on = [tuple(objective.backward(*data())) for _ in range(5)]
    resumed = JointObjective(model, F.cross_entropy, sampling=Sandwich(2, seed=99))
    resumed.load_state_dict(state)
    assert [tuple(resumed.backward(*data())) for _ in range(5)] == going_on


def test_the_sandwich_is_known_by_its_name_and_all_is_resumed_from_nothing():
    model = prepared(WIDTHS)
    objective = JointObjective(model, F.cross_entropy, sampling="sandwich")
    visited = objective.backward(*data())
    assert {1, 8} < set(visited)
    assert len(visited) == 3
    everything = JointObjective(model, F.cross_entropy)
    everything.load_state_dict(everything.state_dict())
    assert tuple(everything.backward(*data())) == WIDTHS


def test_weights_of_the_widths_sampled_are_brought_back_to_one():
    class Only2And8:
        def sample(self, bit_widths):
            return (2, 8)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    model, other = prepared(), prepared()
    weights = {2: 1, 4: 2, 8: 1}
    objective = JointObjective(
        model, F.cross_entropy, weights=weights, sampling=Only2And8(), distillation=None
    )
    assert list(objective.backward(*data())) == [2, 8]
    by_hand(other, {2: 0.5, 8: 0.5})
    assert_same_gradients(model, other, rtol=1e-6, atol=0)


def test_bf16_autocast_trains_with_codes_in_float32():
    model = prepared()
    with torch.autocast("cpu", torch.bfloat16):
        losses = JointObjective(model, F.cross_entropy).backward(*data())
    assert all(loss.isfinite() for loss in losses.values())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


def test_the_first_batch_sets_the_activation_steps_before_anything_is_differentiated():
    torch.manual_seed(5)
    model, other = prepare(Net(), (2, 4, 8)), prepared()
    JointObjective(model, F.cross_entropy).backward(*data())
    JointObjective(other, F.cross_entropy).backward(*data())
    assert_same_gradients(model, other, rtol=0, atol=0)


def test_a_compiled_model_trains_at_eight_widths_in_one_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, other = prepared(WIDTHS), prepared(WIDTHS)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    objective = JointObjective(compiled, F.cross_entropy)
    for _ in range(2):
        objective.backward(*data())
    for _ in range(2):
        JointObjective(other, F.cross_entropy).backward(*data())
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert_same_gradients(model, other, rtol=1e-5, atol=1e-7)  # sums in another order


def test_a_fresh_model_trains_and_evaluates_at_eight_widths_without_passing_the_recompile_limit():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 4))
    model = prepare(nn.Sequential(*net, nn.Flatten()), WIDTHS)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    objective = JointObjective(compiled, F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        objective.backward(*data())
        optimizer.step()
        optimizer.zero_grad()
    compiled.eval()
    with torch.no_grad():
        for bit_width in WIDTHS:
            set_bit_width(compiled, bit_width)
            compiled(data()[0])
    breaks = dict(counters["graph_break"])
    torch._dynamo.reset()
    counters.clear()
    assert counter.frame_count == 2  # one graph in training, one in evaluation
    assert not breaks  # the first batch, which sets the grids, was seen in eager mode


def test_looking_at_the_first_batch_is_no_step_of_training():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model = prepare(net, (2, 4, 8)).train()
    generator = torch.get_rng_state()
    JointObjective(model, F.cross_entropy).backward(*data())
    assert model[2].num_batches_tracked.tolist() == [1, 1, 1]
    torch.set_rng_state(generator)
    other = prepare(net, (2, 4, 8)).train()
    for bit_width in (8, 4, 2):
        with at_bit_width(other, bit_width):
            other(data()[0])
    assert torch.equal(model[2].running_mean, other[2].running_mean)
    assert torch.equal(model[2].running_var, other[2].running_var)


@pytest.mark.slow
def test_inductor_trains_at_eight_widths_like_eager():
    torch._dynamo.reset()
    model, other = prepared(WIDTHS), prepared(WIDTHS)
    JointObjective(torch.compile(model, fullgraph=True), F.cross_entropy).backward(*data())
    JointObjective(other, F.cross_entropy).backward(*data())
    torch._dynamo.reset()
    assert_same_gradients(model, other, rtol=1e-4, atol=1e-6)  # fused sums in another order


def test_wrong_arguments_are_one_sentence():
    model = prepared()
    objective = JointObjective(model, F.cross_entropy)
    with pytest.raises(LayeringError, match="backward needs targets"):
        objective.backward(data()[0])
    with pytest.raises(LayeringError, match="backward needs a criterion"):
        JointObjective(model).backward(*data())
    with pytest.raises(LayeringError, match="must return the loss"):
        JointObjective(model).backward(lambda: "loss")
    with pytest.raises(LayeringError, match="must return the loss"):
        JointObjective(model).backward(lambda: torch.ones(3))
    with pytest.raises(BitWidthError, match="3 bits were asked for"):
        JointObjective(model, F.cross_entropy, weights={2: 1, 3: 1, 8: 1})
    for weights in ({2: 1, 8: 1}, {2: 0, 4: 0, 8: 0}, {2: -1, 4: 1, 8: 1}, {2: float("nan")}):
        with pytest.raises(LayeringError, match="weights"):
            JointObjective(model, F.cross_entropy, weights=weights)
    with pytest.raises(LayeringError, match="'all', 'sandwich'"):
        JointObjective(model, F.cross_entropy, sampling="some")
    with pytest.raises(LayeringError, match="'auto', None or a function"):
        JointObjective(model, F.cross_entropy, distillation="yes")
    with pytest.raises(LayeringError, match="has no bit-widths"):
        JointObjective(Net(), F.cross_entropy)
    with pytest.raises(LayeringError, match="num_random"):
        Sandwich(-1)
    with pytest.raises(LayeringError, match=r"model is a int; give a torch\.nn\.Module"):
        JointObjective(3, F.cross_entropy)
    with pytest.raises(LayeringError, match="criterion is 'mse'; give a function"):
        JointObjective(model, "mse")
    with pytest.raises(LayeringError, match="weights is 3; give a mapping"):
        JointObjective(model, F.cross_entropy, weights=3)
    with pytest.raises(LayeringError, match=r"weights\[2\] is 'much'; give a number"):
        JointObjective(model, F.cross_entropy, weights={2: "much", 4: 1, 8: 1})
    with pytest.raises(LayeringError, match="'all', 'sandwich' or a Sampler"):
        JointObjective(model, F.cross_entropy, sampling=3)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "a NoneType"),
        (1.5, "a float"),
        ((), "a tuple"),
        ((torch.ones(()),), "a tuple"),
        ((torch.ones(()), torch.ones(2), torch.ones(2)), "a tuple"),
        (torch.ones(2, 3), r"a Tensor of shape \(2, 3\)"),
        ((torch.ones(2), torch.ones(2)), r"a Tensor of shape \(2,\)"),
    ],
    ids=str,
)
def test_a_closure_that_returns_no_loss_is_told_so(result, found):
    model = prepared()
    with pytest.raises(LayeringError, match=f"the closure returned {found}; it must return"):
        JointObjective(model).backward(lambda: result)
    assert not gradients(model)


def test_a_criterion_that_gives_no_scalar_is_told_so():
    def per_image(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")

    with pytest.raises(LayeringError, match=r"the criterion returned a Tensor of shape \(6,\)"):
        JointObjective(prepared(), per_image).backward(*data())


def test_only_a_tensor_can_be_distilled():
    model = prepared()
    images, labels = data()

    def closure():
        logits = model(images)
        return F.cross_entropy(logits, labels), {"logits": logits}

    with pytest.raises(LayeringError, match="outputs are a dict, but only a tensor"):
        JointObjective(model, distillation=soft_cross_entropy).backward(closure)
    assert list(JointObjective(model).backward(closure)) == [2, 4, 8]  # labels only


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ((), "the sampler chose nothing; it must choose among 2, 4, 8"),
        ((3, 8), "the sampler chose 3, 8; it must choose among 2, 4, 8"),
        ((2,), "the sampler chose 2, whose weights are all 0"),
    ],
)
def test_a_sampler_that_chooses_wrongly_is_told_so(chosen, words):
    sampler = SimpleNamespace(sample=lambda bit_widths: chosen)
    objective = JointObjective(
        prepared(), F.cross_entropy, weights={2: 0, 4: 1, 8: 1}, sampling=sampler
    )
    with pytest.raises(LayeringError, match=words):
        objective.backward(*data())


def test_a_width_is_visited_once_however_often_it_is_chosen():
    sampler = SimpleNamespace(sample=lambda bit_widths: [8, 2, 2])
    model, other = prepared(), prepared()
    JointObjective(model, F.cross_entropy, sampling=sampler).backward(*data())
    by_hand(other, {2: 0.5, 8: 0.5}, soft_cross_entropy)
    assert_same_gradients(model, other, rtol=0, atol=0)


@pytest.mark.parametrize("teacher_of", ["widest", "all"])
def test_a_float_teacher_teaches_the_widest_alone_or_all(teacher_of):
    model, other = prepared(), prepared()
    torch.manual_seed(9)
    teacher = Net().eval()
    objective = JointObjective(model, F.cross_entropy, teacher=teacher, teacher_of=teacher_of)
    objective.backward(*data())
    images, labels = data()
    with torch.no_grad():
        learned_from = teacher(images)
    for bit_width in (8, 4, 2):
        with at_bit_width(other, bit_width):
            logits = other(images)
            loss = F.cross_entropy(logits, labels) + soft_cross_entropy(logits, learned_from)
            (loss / 3).backward()
            if teacher_of == "widest":
                learned_from = logits.detach()
    assert_same_gradients(model, other, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": Net()}, "the teacher is in training mode; call teacher.eval"),
        ({"teacher": "resnet"}, "give a network or a function of inputs"),
        ({"teacher": Net().eval(), "distillation": None}, "but distillation is None"),
        ({"teacher": Net().eval(), "teacher_of": "both"}, "teacher_of is 'both'; give 'widest'"),
        ({"teacher_of": "all"}, "teacher_of='all' needs a teacher"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(options, message):
    with pytest.raises(LayeringError, match=message):
        JointObjective(prepared(), F.cross_entropy, **options)


def test_a_teacher_needs_the_inputs_that_a_closure_hides():
    model = prepared()
    objective = JointObjective(model, F.cross_entropy, teacher=Net().eval())
    with pytest.raises(LayeringError, match="which a closure hides"):
        objective.backward(lambda: model(data()[0]).mean())


def test_a_nan_loss_stops_with_the_step_the_width_and_the_module_named():
    model = prepared()
    objective = JointObjective(model, F.cross_entropy)
    images, labels = data()
    objective.backward(images, labels)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.hidden.bias.fill_(float("nan"))
    with pytest.raises(
        LossError, match=r"the loss at 8 bits is nan in step 1\. .*'hidden'"
    ) as found:
        objective.backward(images, labels)
    assert (found.value.step, found.value.bit_width, found.value.module) == (1, 8, "hidden")
    assert torch.equal(model.head.latent_weight, before["head.weight"])  # no step was taken


def test_a_loss_that_only_a_narrow_width_loses_names_that_width():
    model = prepared()
    with torch.no_grad():
        model.hidden.weight_quantizer.gain[0] = float("inf")
    with pytest.raises(LossError, match="the loss at 2 bits is") as found:
        JointObjective(model, F.cross_entropy).backward(*data())
    assert found.value.module == "hidden.weight_quantizer"


def test_a_criterion_that_is_not_finite_is_told_apart_from_the_modules():
    objective = JointObjective(prepared(), lambda x, y: (x - x).mean() / 0.0, distillation=None)
    with pytest.raises(LossError, match="it comes from the criterion or the targets") as found:
        objective.backward(*data())
    assert found.value.module is None


def test_looking_for_the_module_leaves_hooks_and_statistics_as_they_were():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model = prepare(net, (2, 8))
    JointObjective(model, F.cross_entropy).backward(*data())
    with torch.no_grad():
        model[3].bias.fill_(float("inf"))
    with pytest.raises(LossError, match="'3'"):
        JointObjective(model, F.cross_entropy).backward(*data())
    assert model[1].running_mean.isfinite().all()
    assert model[1].num_batches_tracked.tolist() == [2, 2]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_resumed_objective_counts_its_steps_on():
    objective = JointObjective(prepared(), F.cross_entropy)
    for _ in range(3):
        objective.backward(*data())
    resumed = JointObjective(prepared(), F.cross_entropy)
    resumed.load_state_dict(objective.state_dict())
    assert resumed.num_steps == 3


def test_a_teacher_that_is_not_finite_stops_training_too():
    objective = JointObjective(
        prepared(), F.cross_entropy, teacher=lambda x: torch.full((len(x), 3), float("nan"))
    )
    with pytest.raises(LossError, match="the loss at 8 bits is nan"):
        objective.backward(*data())


@pytest.mark.parametrize("num_classes", [1, 7])
def test_a_teacher_of_other_classes_is_refused_with_both_shapes(num_classes):
    objective = JointObjective(
        prepared(), F.cross_entropy, teacher=lambda x: torch.zeros(len(x), num_classes)
    )
    shapes = rf"shape \(6, 3\), those to learn from have \(6, {num_classes}\)"
    with pytest.raises(LayeringError, match=shapes):
        objective.backward(*data())


def test_the_state_of_something_else_is_refused():
    with pytest.raises(LayeringError, match="the state has no num_steps, sampler"):
        JointObjective(prepared(), F.cross_entropy).load_state_dict({})
