"""JointObjective: one backward pass per bit-width, and the gradients meet in the latent weights.

Once-QAT minimizes all bit-widths' losses over one set of latent weights w:

    sum over b of  weight_b * ( loss(model_b(x), y) + KL(model_next_wider(x) || model_b(x)) )

Widest first, for its logits teach the next narrower bit-width in the same step. Each bit-width's
graph is freed by its own backward pass, so a step needs the memory of one bit-width plus the
gradients. Sources: the paper's cascade downsampling and multi-objective optimization (Wu et al.,
"Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", TPAMI 2023); the
in-place distillation of Yu and Huang, "Universally Slimmable Networks" (ICCV 2019).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn.bit_width import at_bit_width, bit_widths_of
from plyweight.quantizers import ActivationQuantizer
from plyweight.train.sampling import Sampler, sampler_named

__all__ = ["JointObjective", "soft_cross_entropy"]

Criterion = Callable[[Any, Any], Tensor]
Distillation = Callable[[Tensor, Tensor], Tensor]


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``KL(teacher || student)``, the mean over everything but the classes.

    Args:
        logits: of the student, ``(batch, classes, ...)`` as for ``F.cross_entropy``.
        teacher_logits: of the same shape.
    """
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
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None = None,
        *,
        weights: Mapping[int, float] | None = None,
        sampling: Literal["all", "sandwich"] | Sampler = "all",
        distillation: Distillation | Literal["auto"] | None = "auto",
    ) -> None:
        """Train ``model`` at all of its bit-widths.

        Args:
            model: from :func:`plyweight.prepare`, compiled or not.
            criterion: ``criterion(outputs, targets)`` gives a scalar; not needed for closures.
            weights: for each bit-width, 0 or more; None for all equal. Of those sampled in a
                step, the sum is brought back to 1.
            sampling: "all" bit-widths in each step, the "sandwich" rule, or a ``Sampler``.
            distillation: ``distillation(outputs, teacher_outputs)``, added to the loss of every
                bit-width but the widest of the step; its teacher is the next wider one, detached.
                "auto": :func:`soft_cross_entropy` where the criterion is cross entropy, none
                otherwise. None: labels only.

        Raises:
            LayeringError: If the model has no bit-widths or an argument is wrong.
            BitWidthError: If ``weights`` names a bit-width that the model does not have.
        """
        self.model = model
        self.criterion = criterion
        self.bit_widths = bit_widths_of(model)
        self.weights = _normalized(weights, self.bit_widths)
        self.sampler = sampler_named(sampling)
        self.distillation = _chosen_distillation(distillation, criterion)
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
        """
        compute = self._closure(inputs, targets)
        self._initialize(compute)
        sampled = sorted(self.sampler.sample(self.bit_widths), reverse=True)
        total = sum(self.weights[b] for b in sampled)
        losses: dict[int, Tensor] = {}
        teacher: Any = None
        same_randomness = _RandomState(self.model)
        for bit_width in sampled:  # widest first: it teaches the next narrower
            # The backward pass runs inside: modules under checkpointing run forward again in it.
            with same_randomness.restored(), at_bit_width(self.model, bit_width):
                loss, outputs = compute()
                losses[bit_width] = loss.detach()
                if self.distillation is not None and outputs is not None:
                    if teacher is not None:
                        loss = loss + self.distillation(outputs, teacher)
                    teacher = outputs.detach()
                weighted = self.weights[bit_width] / total * loss
                (weighted if scale_loss is None else scale_loss(weighted)).backward()
        return dict(sorted(losses.items()))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to sample the same bit-widths."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.sampler.load_state_dict(state["sampler"])

    def _closure(self, inputs: Any, targets: Any) -> Callable[[], tuple[Tensor, Any]]:
        """What computes ``(loss, outputs)``; outputs is None where they are not known."""
        if targets is None and callable(inputs):

            def compute_closure() -> tuple[Tensor, Any]:
                result = inputs()
                loss, outputs = result if isinstance(result, tuple) else (result, None)
                if not isinstance(loss, Tensor) or loss.dim() != 0:
                    raise LayeringError(
                        f"the closure returned {type(loss).__name__}; it must return the loss, a "
                        "scalar tensor, or (loss, outputs)."
                    )
                return loss, outputs

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
            return criterion(outputs, targets), outputs

        return compute

    def _initialize(self, compute: Callable[[], Any]) -> None:
        """Let activation quantizers see a first batch outside of any compiled graph."""
        if self._initialized:
            return
        unset = any(
            isinstance(m, ActivationQuantizer) and m.kind == "unset" for m in self.model.modules()
        )
        if unset:
            with _RandomState(self.model).restored(), torch.no_grad(), _eager():
                compute()
        self._initialized = True


class _RandomState:
    """The state of the random generators that ``model`` draws from, to be set again."""

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers (dropout masks) at each bit-width."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        yield


@contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def _normalized(weights: Mapping[int, float] | None, bit_widths: tuple[int, ...]) -> dict[int, float]:
    chosen = dict.fromkeys(bit_widths, 1.0) if weights is None else dict(weights)
    for bit_width, weight in chosen.items():
        if bit_width not in bit_widths:
            raise BitWidthError(bit_width, stored=bit_widths, where="the model")
        if not weight >= 0 or weight == float("inf"):
            raise LayeringError(f"weights[{bit_width}] is {weight}; give a number of 0 or more.")
    missing = [b for b in bit_widths if b not in chosen]
    if missing or not sum(chosen.values()) > 0:
        raise LayeringError(
            f"weights is {chosen}; give one for each of {bit_widths}, not all of them 0."
        )
    total = sum(chosen.values())
    return {b: chosen[b] / total for b in bit_widths}


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
