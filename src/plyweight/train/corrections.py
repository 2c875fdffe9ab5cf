"""Corrections: outputs at every bit-width get back the moments they have in float.

    pass in float            the moments of every output channel (and batch-norm input): references
    pass at a bit-width      the same, corrected on the spot, so that what comes after sees inputs
                             that are corrected already
    finish                   what all batches say together becomes gains, biases, batch-norm rows

The passes are the model's own forward passes under hooks: no order of modules has to be known.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.nn.bit_width import at_bit_width
from plyweight.nn.layered import LayeredEmbedding, LayeredModule
from plyweight.nn.swap import BATCH_NORMS, LAYERED
from plyweight.quantizers import ActivationQuantizer, WeightQuantizer
from plyweight.train.moments import Moments, correction
from plyweight.train.step_search import StepSearch

__all__ = ["Corrections", "may_have_gains", "users_of"]

SWITCHABLE_NORMS = tuple(BATCH_NORMS.values())
FLOAT_CLASSES = {layered: float_class for float_class, layered in LAYERED.items()}


def users_of(model: nn.Module) -> dict[WeightQuantizer, list[LayeredModule]]:
    """The modules that compute with each layered weight; tied ones share theirs."""
    users: dict[WeightQuantizer, list[LayeredModule]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, LayeredModule):
            users[module.weight_quantizer].append(module)
    return users


def may_have_gains(modules: list[LayeredModule]) -> bool:
    """Whether a weight may have a gain per output channel: one use, whose outputs are seen."""
    return len(modules) == 1 and not isinstance(modules[0], LayeredEmbedding)


class Corrections:
    """What was seen of every output, batch norm and input, and the corrections that follow.

    A module may run several times in a pass: its calls are told apart by their number, so that
    each is compared with the same call in float; in the end they count together.
    """

    def __init__(self, model: nn.Module, bit_widths: tuple[int, ...]) -> None:
        self.model, self.bit_widths = model, bit_widths
        users = users_of(model)
        self.names = {module: name or "the model" for name, module in model.named_modules()}
        self.layered = [m for m in model.modules() if isinstance(m, LayeredModule)]
        self.outputs = [m for m in self.layered if not isinstance(m, LayeredEmbedding)]
        self.has_own_gain = {m: may_have_gains(users[m.weight_quantizer]) for m in self.layered}
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
        # Some call of theirs, in some batch, did not go straight into a batch norm.
        self.exposed: set[nn.Module] = set()
        self._calls: dict[nn.Module, int] = {}

    @contextmanager
    def watching_float(self) -> Iterator[None]:
        """Inside, the model computes in float, and that is what outputs are compared with."""
        made_by: dict[int, tuple[weakref.ref[Tensor], tuple[nn.Module, int]]] = {}
        made: set[tuple[nn.Module, int]] = set()
        straight: set[tuple[nn.Module, int]] = set()

        def see_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            quantizer = module.input_quantizer
            if isinstance(quantizer, ActivationQuantizer):
                self.steps[quantizer].see(args[0], self.names[module])

        def see_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            key = module, self._call_of(module)
            self.references[key].add(output, _channel_dim(module), self.names[module])
            made_by[id(output)] = weakref.ref(output), key
            made.add(key)

        def see_norm_input(norm: nn.Module, args: tuple[Any, ...]) -> None:
            self.references[norm, self._call_of(norm)].add(args[0], 1, self.names[norm])
            reference, key = made_by.get(id(args[0]), (None, (norm, 0)))
            if reference is not None and reference() is args[0]:
                straight.add(key)

        widest = self.bit_widths[-1]
        with at_bit_width(self.model, widest), self._in_float(), self._hooked() as handles:
            for module in self.outputs:
                handles.append(module.register_forward_pre_hook(see_input))
                handles.append(module.register_forward_hook(see_output))
            for norm in self.norms:
                handles.append(norm.register_forward_pre_hook(see_norm_input))
            yield
        self.exposed |= {module for module, _ in made - straight}
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
            known = {b: f for b, f in found.items() if f is not None}  # others stay: it did not run
            if not known:
                continue
            if self.has_own_gain[module]:
                self._set_gains(module, {b: ratio for b, (ratio, _) in known.items()})
            if self.has_own_bias[module]:
                rows = module.give_bias_rows()
                for bit_width, (_, shift) in known.items():
                    rows[self.bit_widths.index(bit_width)].copy_(shift)

    def uncalled(self) -> list[LayeredModule]:
        """Those that no pass in float has run: if anything, their weight is read."""
        called = {module for module, _ in self.references}
        return [module for module in self.outputs if module not in called]

    def _set_gains(self, module: LayeredModule, ratios: Mapping[int, Tensor]) -> None:
        """Multiply the gains that the outputs were computed with."""
        quantizer, shape = module.weight_quantizer, module.weight_quantizer.clip.shape
        before = dict(zip(quantizer.own_bit_widths, quantizer.gain.cpu(), strict=True))
        gains = dict(before)
        for bit_width, ratio in ratios.items():
            spread = ratio.float().cpu().reshape(-1, *[1] * (len(shape) - 1))
            own = quantizer.own_bit_width(bit_width)
            gains[own] = before[own].float() * spread.expand(shape)
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
        return module not in self.exposed

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
