"""The loop of the CIFAR-10 example: an ordinary one, which stops and goes on at any step.

A stage, float or once-QAT, is its network, optimizer and objective at one of its steps. Batches and
learning rates are functions of the step, so ``state_dict`` holds all that a resumed run needs to
compute, on a CPU, bit for bit what an unbroken one would have.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from cifar10_data import Cifar10
from cifar10_logs import History, Log
from cifar10_place import Place
from cifar10_recipe import QuantizedRecipe, Recipe, for_bit_widths
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plyweight import JointObjective, bit_widths_of
from plyweight.train import (
    RateByBitWidth,
    Sandwich,
    damping_penalty,
    moment_penalty,
    parameter_groups,
)

__all__ = ["Stage", "StopSignal", "Stopped", "TrainingError", "float_stage", "once_qat_stage"]

ASK_EVERY = 10  # steps between two questions to the other processes whether one was told to stop

# Adds the gradients of images, with their labels, in a step; gives the losses, detached, by name:
# "float", or a bit-width.
Backward = Callable[[Tensor, Tensor, int], dict[str, Tensor]]


class TrainingError(Exception):
    """Training cannot go on."""


class Stopped(Exception):  # noqa: N818  it is no error
    """The run was told to stop, and left a checkpoint."""

    def __init__(self, stage: str, step: int, num_steps: int, signal_number: int) -> None:
        super().__init__(f"stopped in {stage} after {step:,} of {num_steps:,} steps")
        self.signal_number = signal_number


class StopSignal:
    """Remembers Ctrl-C and SIGTERM while it is entered; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)


@dataclass
class Stage:
    """One stage of training, at one of its steps.

    Attributes:
        name: "float" or "once-qat".
        net: what is trained, neither compiled nor wrapped.
        network: the same as it is called on the test images.
        backward: adds the gradients of a batch to ``.grad``.
        optimizer: of the parameters of ``net``; its learning rates are those after the warm-up.
        objective: what has state of its own beside; None for a float network.
        data: to train on.
        recipe: how.
        seed: of the order of images and their augmentation.
        place: where.
        ema_decay: of a moving average of the parameters; None for no average.
        step: how many steps were taken.
        history: a row for each epoch that is over.
        average: the moving average of ``net``, if there is one.
    """

    name: str
    net: nn.Module
    network: nn.Module
    backward: Backward
    optimizer: torch.optim.Optimizer
    objective: JointObjective | None
    data: Cifar10
    recipe: Recipe
    seed: int
    place: Place
    ema_decay: float | None = None
    step: int = 0
    history: History = field(default_factory=list)
    average: AveragedModel | None = None
    _totals: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _seconds: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass."""
        return self.data.steps_per_epoch(self.recipe.batch_size)

    @property
    def num_steps(self) -> int:
        """Of the whole stage."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def trained(self) -> nn.Module:
        """What the stage is for: the moving average if there is one, else the network."""
        return self.net if self.average is None else self.average.module

    def run(
        self,
        *,
        log: Log,
        save: Callable[[dict[str, Any]], None],
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        save_every: int | None = None,
    ) -> None:
        """Take the steps that are left.

        Args:
            log: is told of every step and epoch.
            save: publishes a checkpoint of :meth:`state_dict`; called in the first process.
            evaluate: gives accuracies by the names of the losses, after every epoch.
            save_every: steps between checkpoints; None for an epoch.

        Raises:
            Stopped: If Ctrl-C or SIGTERM came; a checkpoint is left.
            TrainingError: If the float network's loss is NaN or infinite, or a parameter that
                would be saved.
            LossError: If the loss of a bit-width is; the last checkpoint stays as it is.
        """
        save_every = save_every or self.steps_per_epoch
        self.net.train()
        self._drop_gradients()
        with StopSignal() as stop:
            while self.step < self.num_steps:
                started = time.monotonic()
                losses = self._take_step()
                self._seconds += time.monotonic() - started
                log.step(self.step, losses)
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch(evaluate)
                    log.epoch(self.history)
                is_last = self.step == self.num_steps
                signal_number = 0 if is_last else self._signal_received(stop)
                if is_last or signal_number or self.step % save_every == 0:
                    self._check_parameters()
                    if self.place.is_first:
                        save(self.state_dict())
                if signal_number:
                    raise Stopped(self.name, self.step, self.num_steps, signal_number)
            # One that came in the last step, or while its checkpoint was written.
            signal_number = self.place.largest(stop.received)
            if signal_number:
                raise Stopped(self.name, self.step, self.num_steps, signal_number)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; tensors and plain values."""
        devices = [self.place.device] if self.place.device.type == "cuda" else []
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": None if self.objective is None else self.objective.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history,
            "totals": self._totals,
            "counts": self._counts,
            "seconds": self._seconds,
            "random": torch.get_rng_state(),
            "cuda_random": [torch.cuda.get_rng_state(device) for device in devices],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.step = state["step"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
        if state["average"] is not None:
            self._start_average()
            self.average.load_state_dict(state["average"])
        self.history = state["history"]
        device = self.place.device
        self._totals = {name: total.to(device) for name, total in state["totals"].items()}
        self._counts = state["counts"]
        self._seconds = state["seconds"]
        torch.set_rng_state(state["random"])
        for random in state["cuda_random"]:
            torch.cuda.set_rng_state(random, device)

    def _take_step(self) -> dict[str, Tensor]:
        recipe, place = self.recipe, self.place
        factor = learning_rate_factor(
            self.step, self.num_steps, warmup=recipe.warmup_epochs * self.steps_per_epoch
        )
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak_rate"]
        images, labels = self.data.batch(
            self.step, recipe.batch_size, seed=self.seed, part=place.rank, parts=place.num_processes
        )
        losses = self.backward(images, labels, self.step)
        if recipe.clip_value is not None:
            nn.utils.clip_grad_value_(self.net.parameters(), recipe.clip_value)
        self.optimizer.step()
        self._drop_gradients()
        self.step += 1
        self._update_average()
        for name, loss in losses.items():
            self._totals[name] = self._totals.get(name, torch.zeros_like(loss)) + loss
            self._counts[name] = self._counts.get(name, 0) + 1
        return losses

    def _drop_gradients(self) -> None:
        """Before the first step and after each."""
        if self.place.compile != "cuda-graphs":
            self.optimizer.zero_grad()
            return
        # Their memory stays: a gradient that a graph made stands where its next replay writes, so
        # the passes of a step have to be added up elsewhere.
        for parameter in self.net.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def _update_average(self) -> None:
        if self.ema_decay is None:
            return
        if self.average is None:  # not before the first step, which starts activation quantizers
            self._start_average()
        self.average.update_parameters(self.net)

    def _start_average(self) -> None:
        update = get_ema_multi_avg_fn(self.ema_decay)
        self.average = AveragedModel(self.net, multi_avg_fn=update)

    def _end_epoch(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> None:
        """A row of the history, of the losses of this process and accuracies."""
        row: dict[str, float] = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "seconds": round(self._seconds, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        row |= {f"loss/{name}": float(t) / self._counts[name] for name, t in self._totals.items()}
        self._totals, self._counts = {}, {}
        if self.place.is_first:
            self.net.eval()
            accuracies = evaluate(self.network)
            self.net.train()
            row |= {f"accuracy/{name}": value for name, value in accuracies.items()}
        self.history = [*self.history, row]

    def _check_parameters(self) -> None:
        """No checkpoint is of a network that is lost; parameters are the same in all processes."""
        for name, parameter in self.net.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingError(
                    f"{name} has values that are not finite after {self.step:,} steps of "
                    f"{self.name}, though the losses were. The last checkpoint is kept; lower the "
                    "learning rate."
                )

    def _signal_received(self, stop: StopSignal) -> int:
        """The number of the signal that any process got; 0 for none."""
        if self.place.num_processes > 1 and self.step % ASK_EVERY:
            return 0
        return self.place.largest(stop.received)


def float_stage(net: nn.Module, data: Cifar10, recipe: Recipe, *, seed: int, place: Place) -> Stage:
    """The float network ``net``, before its first step."""
    compiled = place.compiled(net)
    shared = place.shared(compiled)

    def backward(images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        with place.autocast():
            loss = F.cross_entropy(shared(images), labels)
        loss.backward()
        loss = loss.detach()
        is_finite = bool(loss.isfinite())
        if place.any_process(not is_finite):  # all have the mean of the gradients, and stop
            elsewhere = ", and not finite in another process" if is_finite else ""
            raise TrainingError(
                f"the loss of the float network is {float(loss)} in step {step}{elsewhere}. The "
                "last checkpoint is kept; lower --float-learning-rate."
            )
        return {"float": loss}

    groups = parameter_groups(net, weight_decay=recipe.weight_decay)
    optimizer = _sgd(groups, recipe)
    return Stage("float", net, compiled, backward, optimizer, None, data, recipe, seed, place)


def once_qat_stage(
    model: nn.Module,
    data: Cifar10,
    recipe: QuantizedRecipe,
    *,
    teacher: nn.Module | None,
    seed: int,
    place: Place,
) -> Stage:
    """The layered ``model``, before its first step; ``teacher`` is the float network."""
    compiled = place.compiled(model)
    widths = bit_widths_of(model)
    objective = JointObjective(
        place.shared(compiled),
        F.cross_entropy,
        weights=for_bit_widths(recipe.width_weights, widths),
        balance=recipe.balance,
        sampling="all" if recipe.sampling == "all" else Sandwich(recipe.num_random, seed=seed),
        teacher=teacher,
        teacher_of="widest" if teacher is None else recipe.teacher_of,
    )
    num_steps = recipe.epochs * data.steps_per_epoch(recipe.batch_size)

    def backward(images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        with place.autocast():
            losses = objective.backward(images, labels)
        penalty = _penalty(model, recipe, is_late=step >= recipe.damping_from * num_steps)
        if penalty is not None:
            penalty.backward()
        return {str(bit_width): loss for bit_width, loss in losses.items()}

    groups = parameter_groups(
        model,
        weight_decay=recipe.weight_decay,
        scale_rate=recipe.scale_rate,
        learning_rate=recipe.learning_rate,
    )
    optimizer = _sgd(groups, recipe)
    if recipe.rates == "inverse":
        RateByBitWidth(optimizer, model, {b: 1 / w for b, w in objective.weights.items() if w})
    elif recipe.rates is not None:
        RateByBitWidth(optimizer, model, for_bit_widths(recipe.rates, widths))
    return Stage(
        "once-qat",
        model,
        compiled,
        backward,
        optimizer,
        objective,
        data,
        recipe,
        seed,
        place,
        ema_decay=recipe.ema_decay,
    )


def learning_rate_factor(step: int, num_steps: int, *, warmup: float) -> float:
    """Of step ``step``: a line up to 1 in ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


def _penalty(model: nn.Module, recipe: QuantizedRecipe, *, is_late: bool) -> Tensor | None:
    """What the recipe adds to the losses once a step, about the weights alone."""
    terms = []
    if recipe.moment_weight:
        terms.append(recipe.moment_weight * moment_penalty(model))
    if recipe.damping_weight and is_late:
        narrowest = bit_widths_of(model)[0]
        terms.append(recipe.damping_weight * damping_penalty(model, bit_width=narrowest))
    return sum(terms) if terms else None


def _sgd(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True
    )
    for group in optimizer.param_groups:
        group["peak_rate"] = group["lr"]  # of which every step takes its part
    return optimizer
