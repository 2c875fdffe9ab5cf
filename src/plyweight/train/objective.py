"""JointObjective: one backward pass per bit-width, and the gradients meet in the latent weights.

Once-QAT minimizes all bit-widths' losses over one set of latent weights w:

    sum over b of  weight_b * ( loss(model_b(x), y) + KL(model_next_wider(x) || model_b(x)) )

Widest first, for its logits teach the next narrower bit-width in the same step. Each bit-width's
graph is freed by its own backward pass, so a step needs the memory of one bit-width plus the
gradients. Sources: the paper's cascade downsampling and multi-objective optimization (Wu et al.,
"Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", TPAMI 2023); the
in-place distillation of Yu and Huang, "Universally Slimmable Networks" (ICCV 2019).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.errors import LayeringError, listed
from plyweight.nn.bit_width import at_bit_width, bit_widths_of
from plyweight.quantizers import ActivationQuantizer
from plyweight.train.balance import Balance, BalanceName, GradientStash, balance_named
from plyweight.train.diagnosis import check_losses
from plyweight.train.distributed import Synchronizer
from plyweight.train.sampling import Sampler, sampler_named
from plyweight.train.width_weights import checked_weights

__all__ = ["JointObjective", "soft_cross_entropy"]

Criterion = Callable[[Any, Any], Tensor]
Distillation = Callable[[Tensor, Tensor], Tensor]


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``KL(teacher || student)``, the mean over everything but the classes.

    Args:
        logits: of the student, ``(batch, classes, ...)`` as for ``F.cross_entropy``.
        teacher_logits: of the same shape.

    Raises:
        LayeringError: If the shapes differ.
    """
    if logits.shape != teacher_logits.shape:
        raise LayeringError(
            f"outputs have shape {tuple(logits.shape)}, those to learn from have "
            f"{tuple(teacher_logits.shape)}; give a teacher with the same classes, or a "
            "distillation that compares them."
        )
    log_student = F.log_softmax(logits.float(), dim=1)
    log_teacher = F.log_softmax(teacher_logits.float(), dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(dim=1).mean()


class JointObjective:
    """The loss of every bit-width, differentiated into one set of latent weights.

    It owns no loop and no optimizer: where a loop calls ``loss.backward()``, call
    :meth:`backward`. Gradient clipping, accumulation, schedulers and ``GradScaler`` stay as they
    are (``scale_loss=scaler.scale``).

    Attributes:
        weights: how much each bit-width counts; they sum to 1 over all of them.
        num_steps: how often :meth:`backward` was called.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None = None,
        *,
        weights: Mapping[int, float] | None = None,
        balance: BalanceName | Balance = "mean",
        sampling: Literal["all", "sandwich"] | Sampler = "all",
        distillation: Distillation | Literal["auto"] | None = "auto",
        teacher: Callable[[Any], Any] | None = None,
        teacher_of: Literal["widest", "all"] = "widest",
    ) -> None:
        """Train ``model`` at all of its bit-widths.

        Args:
            model: from :func:`plyweight.prepare`, compiled or not, in DistributedDataParallel or
                not.
            criterion: ``criterion(outputs, targets)`` gives a scalar; not needed for closures.
            weights: for each bit-width, 0 or more; None for all equal. Of those sampled in a
                step, the sum is brought back to 1.
            balance: how the gradients of shared parameters meet: their weighted "mean", "mgda",
                "upgrad", or a function of their Gramian (:mod:`plyweight.train.balance`). All but
                the mean keep the gradients of every bit-width of a step.
            sampling: "all" bit-widths in each step, the "sandwich" rule, or a ``Sampler``.
            distillation: ``distillation(outputs, teacher_outputs)``, added to the loss of every
                bit-width but the widest of the step; its teacher is the next wider one, detached.
                "auto": :func:`soft_cross_entropy` where the criterion is cross entropy, none
                otherwise. None: labels only.
            teacher: a float network in evaluation mode; ``teacher(inputs)`` teaches the widest
                bit-width of the step as that one teaches the next narrower.
            teacher_of: "all" if it teaches every bit-width, in place of the next wider one.

        Raises:
            LayeringError: If the model has no bit-widths or an argument is wrong.
            ImportError: If ``balance`` needs TorchJD and it is not installed.
            BitWidthError: If ``weights`` names a bit-width that the model does not have.
        """
        if not isinstance(model, nn.Module):
            raise LayeringError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
        if criterion is not None and not callable(criterion):
            raise LayeringError(
                f"criterion is {criterion!r}; give a function of outputs and targets, or None."
            )
        self.model = model
        self.criterion = criterion
        self.bit_widths = bit_widths_of(model)
        counts = checked_weights(weights, self.bit_widths)
        self.weights = {b: count / sum(counts.values()) for b, count in counts.items()}
        self.balance = balance_named(balance)
        self.sampler = sampler_named(sampling)
        self.distillation = _chosen_distillation(distillation, criterion)
        self.teacher = _checked_teacher(teacher, self.distillation)
        self.teacher_of = _checked_teacher_of(teacher_of, teacher)
        self.num_steps = 0
        self._synchronizer = Synchronizer(model)
        self._initialized = False

    def backward(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        scale_loss: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """Add the gradients of this batch at each sampled bit-width to ``.grad``.

        Args:
            inputs: what ``model(inputs)`` takes; or, without ``targets``, a closure that computes
                at the bit-width that is set when it is called and returns the loss, or
                ``(loss, outputs)`` if it is to be distilled too.
            targets: what ``criterion(outputs, targets)`` takes.
            scale_loss: applied to each loss before its backward pass, such as ``scaler.scale``,
                or ``lambda loss: loss / num_accumulated``.

        Returns:
            For each bit-width visited, ascending, its loss without the distillation term,
            detached: a scalar tensor.

        Raises:
            LayeringError: If there is no criterion and no closure, a loss is not a scalar tensor,
                outputs to distill are not a tensor, or the sampler's choice cannot be trained.
            LossError: If a loss is NaN or infinite; it names the step, the bit-width and the
                module. The gradients of the step are of no use then; parameters are untouched.
        """
        compute = self._closure(inputs, targets)
        randomness = _RandomState(self.model)
        self._initialize(compute)
        teacher = self._float_logits(inputs, targets)
        stash = self._stash()
        try:
            losses = self._passes(compute, teacher, stash, randomness, scale_loss)
        except BaseException:
            if stash is not None:
                stash.restore()
            raise
        self.num_steps += 1
        return dict(sorted(losses.items()))

    def _passes(
        self,
        compute: Callable[[], tuple[Tensor, Any]],
        teacher: Tensor | None,
        stash: GradientStash | None,
        randomness: "_RandomState",
        scale_loss: Callable[[Tensor], Tensor] | None,
    ) -> dict[int, Tensor]:
        """A forward and a backward pass for each sampled bit-width; their losses."""
        weights = self._sampled_weights()
        losses: dict[int, Tensor] = {}
        differentiated: dict[int, Tensor] = {}
        for bit_width, weight in weights.items():  # widest first: it teaches the next narrower
            randomness.restore()  # the same dropout masks at every bit-width
            is_reduced = stash is not None or len(losses) == len(weights) - 1
            # The backward pass runs inside: modules under checkpointing run forward again in it.
            with at_bit_width(self.model, bit_width), self._synchronizer.reduced(is_reduced):
                loss, outputs = compute()
                losses[bit_width] = loss.detach()
                if self.distillation is not None and outputs is not None:
                    student = _distillable(outputs)
                    if teacher is not None:
                        loss = loss + self.distillation(student, teacher)
                    if self.teacher_of == "widest":
                        # A copy on GPUs: the next replay of a CUDA graph writes where it stands.
                        teacher = student.detach().clone() if student.is_cuda else student.detach()
                differentiated[bit_width] = loss.detach()
                # A balance sees each gradient as large as it is where all weights are equal.
                weighted = (weight if stash is None else weight * len(weights)) * loss
                (weighted if scale_loss is None else scale_loss(weighted)).backward()
            if stash is not None:
                stash.take_row()
        check_losses(
            differentiated,
            self.model,
            compute,
            step=self.num_steps,
            synchronizer=self._synchronizer,
        )
        if stash is not None:
            stash.give_back(self._coefficients(stash.gramian()))
        return losses

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike; plain values."""
        return {"sampler": self.sampler.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        missing = {"sampler", "num_steps"} - state.keys()
        if missing:
            raise LayeringError(
                f"the state has no {listed(sorted(missing))}; give what state_dict() returned."
            )
        self.sampler.load_state_dict(state["sampler"])
        self.num_steps = state["num_steps"]

    def _closure(self, inputs: Any, targets: Any) -> Callable[[], tuple[Tensor, Any]]:
        """What computes ``(loss, outputs)``; outputs is None where they are not known."""
        if targets is None and callable(inputs):

            def compute_closure() -> tuple[Tensor, Any]:
                result = inputs()
                is_pair = isinstance(result, tuple) and len(result) == 2
                loss, outputs = result if is_pair else (result, None)
                return _scalar(loss, "the closure", " or (loss, outputs)"), outputs

            return compute_closure
        if self.criterion is None or targets is None:
            missing = "targets" if self.criterion is not None else "a criterion"
            raise LayeringError(
                f"backward needs {missing}: call backward(inputs, targets) with a criterion given "
                "to JointObjective, or backward(closure) with a closure that returns the loss."
            )
        criterion = self.criterion

        def compute() -> tuple[Tensor, Any]:
            outputs = self.model(inputs)
            return _scalar(criterion(outputs, targets), "the criterion"), outputs

        return compute

    def _initialize(self, compute: Callable[[], Any]) -> None:
        """Let activation quantizers see a first batch outside of any compiled graph."""
        if self._initialized:
            return
        quantizers = [m for m in self.model.modules() if isinstance(m, ActivationQuantizer)]
        is_unset = any(quantizer.kind == "unset" for quantizer in quantizers)
        device = next(self.model.parameters()).device
        if bool(self._synchronizer.any_process(torch.tensor(is_unset, device=device))):
            # It is no step of training, so running statistics do not count it.
            own = {id(buffer) for quantizer in quantizers for buffer in quantizer.buffers()}
            others = [(b, b.clone()) for b in self.model.buffers() if id(b) not in own]
            # With gradients, which are dropped: reentrant checkpointing warns where there are none.
            with torch.compiler.set_stance("force_eager"), self._synchronizer.reduced(False):
                compute()
            with torch.no_grad():
                for buffer, before in others:
                    buffer.copy_(before)
            self._synchronizer.broadcast(quantizers)
        self._initialized = True

    def _float_logits(self, inputs: Any, targets: Any) -> Tensor | None:
        """What the teacher says about this batch; None without one."""
        if self.teacher is None:
            return None
        if targets is None:
            raise LayeringError(
                "a teacher needs the inputs, which a closure hides; call backward(inputs, targets)."
            )
        with torch.no_grad():
            logits = _distillable(self.teacher(inputs))
        return logits.clone() if logits.is_cuda else logits  # as above: it may be compiled too

    def _stash(self) -> GradientStash | None:
        """Where the gradients of this step are kept until they are balanced; None for the mean."""
        if self.balance is None:
            return None
        on_gpu = any(p.is_cuda for p in self.model.parameters())
        return GradientStash(self.model, copy=on_gpu or self._synchronizer.reuses_gradients)

    def _coefficients(self, gramian: Tensor) -> Tensor:
        """What the balance makes of the Gramian ``(n, n)``."""
        n = len(gramian)
        if self.balance is None or n == 1 or not gramian.isfinite().all():
            # Infinite gradients stay what they are, for a GradScaler to see and skip the step.
            return torch.full((n,), 1 / n)
        coefficients = torch.as_tensor(self.balance(gramian))
        if coefficients.shape != (n,) or not coefficients.isfinite().all():
            raise LayeringError(
                f"balance gave {coefficients.tolist()} for {n} bit-widths; it must give {n} finite "
                "coefficients."
            )
        return coefficients

    def _sampled_weights(self) -> dict[int, float]:
        """The bit-widths of this step, widest first, and how much each counts; their sum is 1."""
        sampled: Sequence[int] = tuple(self.sampler.sample(self.bit_widths))
        unknown = [b for b in sampled if b not in self.weights]
        if unknown or not sampled:
            raise LayeringError(
                f"the sampler chose {listed(sampled)}; it must choose among "
                f"{listed(self.bit_widths)}."
            )
        total = sum(self.weights[b] for b in set(sampled))
        if total == 0:
            raise LayeringError(
                f"the sampler chose {listed(sampled)}, whose weights are all 0; give those a "
                "weight, or choose others."
            )
        return {b: self.weights[b] / total for b in sorted(set(sampled), reverse=True)}


class _RandomState:
    """The state of the random generators that ``model`` draws from, to be set again."""

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Draw the same numbers again from here on."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


def _scalar(loss: Any, origin: str, alternative: str = "") -> Tensor:
    """``loss`` if one can differentiate it."""
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
    raise LayeringError(
        f"{origin} returned a {type(loss).__name__}{shape}; it must return the loss, a scalar "
        f"tensor{alternative}."
    )


def _distillable(outputs: Any) -> Tensor:
    """``outputs`` if a narrower bit-width can learn from them."""
    if isinstance(outputs, Tensor):
        return outputs
    raise LayeringError(
        f"outputs are a {type(outputs).__name__}, but only a tensor can be distilled; let the "
        "model or closure return its logits, or give distillation=None."
    )


def _checked_teacher(
    teacher: Callable[[Any], Any] | None, distillation: Distillation | None
) -> Callable[[Any], Any] | None:
    if teacher is None:
        return None
    if not callable(teacher):
        raise LayeringError(f"teacher is {teacher!r}; give a network or a function of inputs.")
    if distillation is None:
        raise LayeringError(
            "a teacher was given, but distillation is None (or 'auto' with a criterion that is not "
            "cross entropy); give the function that compares outputs with the teacher's."
        )
    if isinstance(teacher, nn.Module) and teacher.training:
        raise LayeringError("the teacher is in training mode; call teacher.eval() first.")
    return teacher


def _checked_teacher_of(
    teacher_of: Literal["widest", "all"], teacher: Callable[[Any], Any] | None
) -> Literal["widest", "all"]:
    if teacher_of not in ("widest", "all"):
        raise LayeringError(f"teacher_of is {teacher_of!r}; give 'widest' or 'all'.")
    if teacher_of == "all" and teacher is None:
        raise LayeringError("teacher_of='all' needs a teacher; give one, or leave 'widest'.")
    return teacher_of


def _chosen_distillation(
    distillation: Distillation | str | None, criterion: Criterion | None
) -> Distillation | None:
    if distillation is None or callable(distillation):
        return distillation
    if distillation != "auto":
        raise LayeringError(
            f"distillation is {distillation!r}; give 'auto', None or a function of outputs and "
            "teacher outputs."
        )
    is_cross_entropy = isinstance(criterion, nn.CrossEntropyLoss) or criterion is F.cross_entropy
    return soft_cross_entropy if is_cross_entropy else None
