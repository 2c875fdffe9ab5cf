"""calibrate: a pretrained float network becomes good at every bit-width, without training.

For each batch the model runs once in float and once at every bit-width, and three things are
found on the way, each with those before it in effect (from the input to the output):

    clips    one per channel for all bit-widths jointly, from the weights alone
             (``quantizers/clip_search.py``)
    steps    at each bit-width, of the inputs that the layered network itself has there: the step
             with the least squared error on a fixed row of steps
    moments  of each output channel ``y_b``, at each bit-width, brought back to those of the same
             channel ``y`` in float on the same images:

                 k = std(y) / std(y_b)        k * (y_b - mean(y_b)) + mean(y)

Where the output goes straight into a batch norm, its row takes ``k`` and the means; elsewhere
the gain of the weight takes ``k`` and a row of the bias takes the means. Because both sides of
the comparison see the same images, what the images have of their own cancels: a statistic of
few hundred images, even without the augmentation of training, is good enough.

Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(ICCV 2019) and Finkelstein et al., "Fighting Quantization Bias with Bias" (CVPR Workshops 2019)
for the means; Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for
Rapid-Deployment" (NeurIPS 2019) for the standard deviations and the search of clips.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.codec import MAGNITUDES
from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn.bit_width import at_bit_width, bit_widths_of
from plyweight.nn.layered import LayeredEmbedding, LayeredModule
from plyweight.nn.swap import BATCH_NORMS, LAYERED
from plyweight.quantizers import ActivationQuantizer, Switchable, WeightQuantizer
from plyweight.quantizers.clip_search import fitted_gain, joint_clip
from plyweight.train.batch_norm import check_arguments, inputs_of
from plyweight.train.moments import Moments, correction
from plyweight.train.step_search import StepSearch

__all__ = ["calibrate"]

SWITCHABLE_NORMS = tuple(BATCH_NORMS.values())
FLOAT_CLASSES = {layered: float_class for float_class, layered in LAYERED.items()}


@torch.inference_mode(False)  # what is made inside could not be trained outside
@torch.no_grad()
def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward: Callable[[Any], object] | None = None,
    weights: Mapping[int, float] | None = None,
) -> None:
    """Choose clips, gains, steps, biases and batch-norm rows of every bit-width from data.

    Latent weights do not change. A few hundred samples are enough; the loader is read once, and
    batches are not kept. The model keeps its mode and bit-width. Gains and biases become other
    parameters (a row for each bit-width), so make an optimizer after that.

    Args:
        model: from :func:`plyweight.prepare`, with pretrained weights; changed in place.
        loader: gives batches: a tensor, or a tuple or list whose first item is the input.
        num_batches: how many to use; None for all.
        forward: ``forward(batch)`` runs the model on a batch of any other kind.
        weights: how much each bit-width counts where they share a clip; None for all equal.

    Raises:
        LayeringError: If the model is not layered, an argument is wrong, the loader gives no
            batch or one of a kind that is not known, or activations are not finite. The model is
            then as it was, and also if the loader or the model fails.
        BitWidthError: If ``weights`` names a bit-width that the model does not have.
    """
    check_arguments(model, loader, num_batches, forward)
    bit_widths = bit_widths_of(model)
    counts = _counts(weights, bit_widths)
    if not any(isinstance(module, LayeredModule) for module in model.modules()):
        raise LayeringError(
            f"{type(model).__name__} has no latent weights to calibrate; take a model from "
            "plyweight.prepare, or load with form='fake-quantized'."
        )
    run = forward or (lambda batch: model(inputs_of(batch)))
    is_empty = True
    with _as_it_was_on_error(model), _in_evaluation(model):
        _set_clips(model, counts)
        calibration = _Calibration(model, bit_widths)
        for batch in islice(loader, num_batches):
            is_empty = False
            with calibration.watching_float():
                run(batch)
            for bit_width in reversed(bit_widths):  # a pinned weight takes its gain at the widest
                with at_bit_width(model, bit_width), calibration.correcting(bit_width):
                    run(batch)
        if is_empty:
            raise LayeringError("the loader gave no batch; calibrate needs at least one.")
        calibration.finish()


def _set_clips(model: nn.Module, counts: Mapping[int, float]) -> None:
    """The joint clip of every weight; gains are 1, or fitted where no output is corrected."""
    for quantizer, modules in _users(model).items():
        own = dict.fromkeys(quantizer.own_bit_widths, 0.0)
        for bit_width, count in counts.items():
            own[max(bit_width, int(quantizer.pinned))] += count
        weight, group_size = modules[0].latent_weight, int(quantizer.group_size) or None
        clip = joint_clip(weight, tuple(own), group_size=group_size, weights=own)
        gains = {}
        if not _may_have_gains(modules):
            fits = {b: fitted_gain(weight, clip, b, group_size=group_size) for b in own}
            gains = {b: torch.tensor([fit]) for b, fit in fits.items()}
        quantizer.set_grid(clip / MAGNITUDES, gains)


def _users(model: nn.Module) -> dict[WeightQuantizer, list[LayeredModule]]:
    """The modules that compute with each layered weight; tied ones share theirs."""
    users: dict[WeightQuantizer, list[LayeredModule]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, LayeredModule):
            users[module.weight_quantizer].append(module)
    return users


def _may_have_gains(modules: list[LayeredModule]) -> bool:
    """Whether a weight may have a gain per output channel: one use, whose outputs are seen."""
    return len(modules) == 1 and not isinstance(modules[0], LayeredEmbedding)


class _Calibration:
    """What was seen of every output, batch norm and input, and the corrections that follow.

    A module may run several times in a pass: its calls are told apart by their number, so that
    each is compared with the same call in float; in the end they count together.
    """

    def __init__(self, model: nn.Module, bit_widths: tuple[int, ...]) -> None:
        self.model, self.bit_widths = model, bit_widths
        users = _users(model)
        self.names = {module: name or "the model" for name, module in model.named_modules()}
        self.layered = [m for m in model.modules() if isinstance(m, LayeredModule)]
        self.outputs = [m for m in self.layered if not isinstance(m, LayeredEmbedding)]
        self.has_own_gain = {m: _may_have_gains(users[m.weight_quantizer]) for m in self.layered}
        biases = [id(bias) for m in self.layered if (bias := m._parameters.get("bias")) is not None]
        self.has_own_bias = {
            m: biases.count(id(m._parameters.get("bias"))) == 1 for m in self.layered
        }
        self.norms = [m for m in model.modules() if isinstance(m, SWITCHABLE_NORMS)]
        self.float_rows = {
            norm: (norm.running_mean[-1].clone(), norm.running_var[-1].clone())
            for norm in self.norms
            if norm.running_mean is not None and norm.running_var is not None
        }
        self.steps = {
            m.input_quantizer: StepSearch(m.input_quantizer)
            for m in self.outputs
            if isinstance(m.input_quantizer, ActivationQuantizer)
        }
        # By module, and by number of the call; with the bit-width where it is not float.
        self.references: dict[tuple[nn.Module, int], Moments] = defaultdict(Moments)
        self.moments: dict[tuple[nn.Module, int, int], Moments] = defaultdict(Moments)
        self.num_straight: dict[nn.Module, int] = defaultdict(int)  # calls, right into a batch norm
        self._calls: dict[nn.Module, int] = {}

    @contextmanager
    def watching_float(self) -> Iterator[None]:
        """Inside, the model computes in float, and that is what outputs are compared with."""
        made_by: dict[int, tuple[weakref.ref[Tensor], nn.Module]] = {}
        self.num_straight.clear()

        def see_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            quantizer = module.input_quantizer
            if isinstance(quantizer, ActivationQuantizer):
                self.steps[quantizer].see(args[0], self.names[module])

        def see_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            self.references[module, self._call_of(module)].add(
                output, _channel_dim(module), self.names[module]
            )
            made_by[id(output)] = weakref.ref(output), module

        def see_norm_input(norm: nn.Module, args: tuple[Any, ...]) -> None:
            self.references[norm, self._call_of(norm)].add(args[0], 1, self.names[norm])
            reference, module = made_by.get(id(args[0]), (None, norm))
            if reference is not None and reference() is args[0]:
                self.num_straight[module] += 1

        widest = self.bit_widths[-1]
        with at_bit_width(self.model, widest), self._in_float(), self._hooked() as handles:
            for module in self.outputs:
                handles.append(module.register_forward_pre_hook(see_input))
                handles.append(module.register_forward_hook(see_output))
            for norm in self.norms:
                handles.append(norm.register_forward_pre_hook(see_norm_input))
            yield
        for search in self.steps.values():
            search.choose_kind()

    @contextmanager
    def correcting(self, bit_width: int) -> Iterator[None]:
        """Inside, everything is measured and at once corrected, so that what follows sees it."""

        def set_step(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(quantizer, ActivationQuantizer)
            self.steps[quantizer].add(args[0], bit_width)

        def correct_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
            assert isinstance(module, LayeredModule)
            channel_dim, call = _channel_dim(module), self._call_of(module)
            bias = module.bias
            plain = output if bias is None else output - _along(bias, output, channel_dim)
            self.moments[module, bit_width, call].add(plain, channel_dim, self.names[module])
            if self._is_absorbed(module):
                return output
            found = self._correction(module, bit_width, [call])
            if found is None:
                return output
            ratio, shift = found
            if not self.has_own_bias[module]:
                shift = bias
            corrected = plain * _along(ratio, output, channel_dim)
            return corrected if shift is None else corrected + _along(shift, output, channel_dim)

        def set_row(norm: nn.Module, args: tuple[Any, ...]) -> None:
            call = self._call_of(norm)
            self.moments[norm, bit_width, call].add(args[0], 1, self.names[norm])
            self._set_row(norm, bit_width, [call])

        with self._hooked() as handles:
            for quantizer in self.steps:
                handles.append(quantizer.register_forward_pre_hook(set_step))
            for module in self.outputs:
                handles.append(module.register_forward_hook(correct_output))
            for norm in self.float_rows:
                handles.append(norm.register_forward_pre_hook(set_row))
            yield

    def finish(self) -> None:
        """Write down what all batches together say."""
        for bit_width in self.bit_widths:
            for norm in self.float_rows:
                self._set_row(norm, bit_width, self._calls_of(norm))
        for module in self.outputs:
            calls = self._calls_of(module)
            if not calls or self._is_absorbed(module):
                continue
            found = {b: self._correction(module, b, calls) for b in self.bit_widths}
            if self.has_own_gain[module]:
                self._set_gains(module, {b: f[0] for b, f in found.items() if f is not None})
            if self.has_own_bias[module]:
                shifts = [f[1] for f in found.values() if f is not None]
                for row, shift in zip(module.give_bias_rows(), shifts, strict=True):
                    row.copy_(shift)

    def _set_gains(self, module: LayeredModule, ratios: Mapping[int, Tensor]) -> None:
        quantizer = module.weight_quantizer
        gains = {}
        for bit_width, ratio in ratios.items():
            spread = ratio.float().cpu().reshape(-1, *[1] * (quantizer.clip.dim() - 1))
            own = max(bit_width, int(quantizer.pinned))
            gains[own] = spread.expand(quantizer.clip.shape)
        quantizer.set_grid(quantizer.scale, gains)

    def _set_row(self, norm: nn.Module, bit_width: int, calls: list[int]) -> None:
        """Let ``norm`` give ``k * y_b + d`` the output that ``y`` has in float.

        ``(k y_b + d - mean) / sqrt(var + eps) = (y_b - (mean - d) / k) / sqrt((var + eps) / k^2)``
        """
        assert isinstance(norm, SWITCHABLE_NORMS)
        pooled = self._pooled(norm, bit_width, calls)
        if pooled is None:
            return
        ratio, shift = correction(*pooled)
        mean, var = self.float_rows[norm]
        self._write_row(
            norm,
            self.bit_widths.index(bit_width),
            (mean - shift) / ratio,
            ((var + norm.eps) / ratio.square() - norm.eps).clamp_min(0),
        )

    @staticmethod
    def _write_row(norm: nn.Module, row: int, mean: Tensor, var: Tensor) -> None:
        for buffer, value in ((norm.running_mean, mean), (norm.running_var, var)):
            assert isinstance(buffer, Tensor)
            buffer[row] = value.to(buffer)

    def _correction(
        self, module: LayeredModule, bit_width: int, calls: list[int]
    ) -> tuple[Tensor, Tensor] | None:
        """``k`` and ``d`` of the outputs of ``module`` without its bias; None where unknown."""
        pooled = self._pooled(module, bit_width, calls)
        if pooled is None:
            return None
        reference, quantized = pooled
        if not self.has_own_gain[module]:
            return torch.ones_like(quantized.mean), reference.mean - quantized.mean
        # A pinned weight has one gain for all at which it computes the same: that of the widest.
        pinned = int(module.weight_quantizer.pinned)
        widest = max((b for b in self.bit_widths if b <= pinned), default=bit_width)
        ratio, _ = correction(*(self._pooled(module, max(bit_width, widest), calls) or pooled))
        return ratio, reference.mean - ratio * quantized.mean

    def _pooled(
        self, module: nn.Module, bit_width: int, calls: list[int]
    ) -> tuple[Moments, Moments] | None:
        """The moments in float and at ``bit_width``, over those of ``calls`` that both had."""
        both = [
            c
            for c in calls
            if (module, c) in self.references and (module, bit_width, c) in self.moments
        ]
        if not both:
            return None
        return (
            Moments.pooled(self.references[module, c] for c in both),
            Moments.pooled(self.moments[module, bit_width, c] for c in both),
        )

    def _is_absorbed(self, module: nn.Module) -> bool:
        """Whether all outputs of ``module`` go straight into a batch norm, which corrects them."""
        return self.num_straight[module] == len(self._calls_of(module))

    def _call_of(self, module: nn.Module) -> int:
        """The number of the call of ``module`` that is going on, from 0 in each pass."""
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        return call

    def _calls_of(self, module: nn.Module) -> list[int]:
        return [call for seen, call in self.references if seen is module]

    @contextmanager
    def _hooked(self) -> Iterator[list[Any]]:
        """Hooks that are appended to the list are removed at the end."""
        handles: list[Any] = []
        self._calls.clear()
        try:
            # Eager, for hooks read values.
            with torch.compiler.set_stance("force_eager"):
                yield handles
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _in_float(self) -> Iterator[None]:
        """Inside, layered modules are their float classes again, with their latent weights."""
        classes: dict[nn.Module, type[nn.Module]] = {m: type(m) for m in self.layered}
        biases = {m: m._parameters["bias"] for m in self.outputs if m.has_bias_rows}
        try:
            for module, layered in classes.items():
                module.__class__ = FLOAT_CLASSES[layered]  # type: ignore[index]
            for module, rows in biases.items():
                assert rows is not None
                module._parameters["bias"] = nn.Parameter(rows[-1].clone(), requires_grad=False)
            for norm, (mean, var) in self.float_rows.items():
                self._write_row(norm, -1, mean, var)
            yield
        finally:
            for module, layered in classes.items():
                module.__class__ = layered
            for module, rows in biases.items():
                module._parameters["bias"] = rows


def _channel_dim(module: nn.Module) -> int:
    """Along which dimension of its output ``module`` has its channels."""
    return -1 - len(getattr(module, "kernel_size", ()))


def _along(vector: Tensor, outputs: Tensor, channel_dim: int) -> Tensor:
    """``vector`` in the dtype of ``outputs``, of a shape that spreads it over the others."""
    return vector.to(outputs.dtype).reshape(-1, *[1] * (-1 - channel_dim))


def _counts(weights: Mapping[int, float] | None, bit_widths: tuple[int, ...]) -> dict[int, float]:
    """``weights`` for every one of ``bit_widths``."""
    if weights is None:
        return dict.fromkeys(bit_widths, 1.0)
    if not isinstance(weights, Mapping):
        raise LayeringError(f"weights is {weights!r}; give a mapping such as {{2: 2.0, 8: 1.0}}.")
    for bit_width, weight in weights.items():
        if bit_width not in bit_widths:
            raise BitWidthError(bit_width, stored=bit_widths, where="the model")
        if not isinstance(weight, Real) or not 0 <= weight < float("inf"):
            raise LayeringError(f"weights[{bit_width}] is {weight!r}; give a number of 0 or more.")
    counts = {b: float(weights.get(b, 0.0)) for b in bit_widths}
    if len(weights) < len(bit_widths) or not any(counts.values()):
        raise LayeringError(
            f"weights is {dict(weights)}; give one for each of {bit_widths}, not all of them 0."
        )
    return counts


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, everything computes as in evaluation; then in the modes it had."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def _as_it_was_on_error(model: nn.Module) -> Iterator[None]:
    """Give ``model`` back what calibration changes, if it fails inside."""
    changing = [m for m in model.modules() if isinstance(m, (Switchable, LayeredModule))]
    latent = {id(m.latent_weight) for m in changing if isinstance(m, LayeredModule)}
    places = [(m, dict(m._parameters), dict(m._buffers)) for m in changing]
    tensors = [t for _, own, buffers in places for t in (*own.values(), *buffers.values())]
    values = [(t, t.clone()) for t in tensors if t is not None and id(t) not in latent]
    kinds = {m: m.kind for m in changing if isinstance(m, ActivationQuantizer)}
    try:
        yield
    except BaseException:
        for module, parameters, buffers in places:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, value in values:
            tensor.copy_(value)
        for quantizer, kind in kinds.items():
            quantizer.kind = kind
        raise
