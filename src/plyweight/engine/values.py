"""Values: what fills the slots of a graph at one bit-width, from the layers of an artifact.

A module of the graph is ``y = scale * (levels . x) + bias`` with, for each output channel,

    factor = gamma / sqrt(variance + eps)                    1 without a batch norm
    levels = decode(codes, b)                                int8; negated where factor * gain < 0
    scale  = | s * gain_b * factor |                         in float64, rounded once
    bias   = beta + (bias - mean) * factor                   in float64, rounded once

and where its input is quantized, the bias is a whole number of ``step * scale``, as an integer
product wants it: ``round(bias / (step * scale))``, an int32. Where inputs are in groups, whose
input is never quantized, there is a scale and a sign for each group of a channel.

That quotient overflows where a channel's scale is next to nothing beside its bias (a factor that
training brought to zero). Such a channel gets the least scale that leaves room, and its levels are
rounded to that; what this changes of the output is below a part in a thousand of the bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact import (
    Graph,
    Header,
    Module,
    TensorView,
    gain_name,
    is_output,
    planes_name,
    scale_name,
    step_name,
    zero_point_name,
)
from plyweight.codec import levels_from_planes, spread
from plyweight.errors import GraphError

__all__ = ["DecodedWeight", "SlotValues", "Views"]

Views = Mapping[str, TensorView]  # what a layer holds, by name inside the layer
Array = NDArray[Any]

ACTIVATION_LEVELS = 256  # of a grid that is the graph's own
# A bias of this many units leaves an int32 room for 10^9 of products beside it.
MOST_BIAS_UNITS = 2.0**30
LEAST_PRODUCT = 2.0**-100  # of a scale and a step; a normal float32 with digits to spare


@dataclass(frozen=True)
class DecodedWeight:
    """The weight of a module whose input is a float: ``levels * spread(scale)``.

    Attributes:
        levels: int8 ``(out, in, ...)``, as ``decode`` gives them or negated.
        scale: float32 ``(out,)``, or ``(out, ceil(in / group_size))`` with groups; positive or 0.
        bit_width: its own.
        group_size: inputs that share a scale; None for one scale per output channel.
    """

    levels: Array
    scale: Array
    bit_width: int
    group_size: int | None

    def numpy(self) -> Array:
        """The weight itself, float32 ``(out, in, ...)``."""
        values: Array = self.levels.astype(np.float32)
        values *= spread(self.scale, self.levels.shape, self.group_size)
        return values


class SlotValues:
    """The values of a graph's slots at one bit-width, each computed when it is asked for.

    Args:
        header: of the artifact.
        graph: that was checked against it.
        layers: of the artifact, base first, up to that bit-width; more are not looked at.
        bit_width: one that is stored.
    """

    def __init__(
        self, header: Header, graph: Graph, layers: Sequence[Views], bit_width: int
    ) -> None:
        self._header, self._graph, self._bit_width = header, graph, bit_width
        self._layers = layers[: header.layer_index(bit_width) + 1]
        self._folded: dict[str, _Folded] = {}
        self._levels: dict[tuple[str, bool, bytes], Array] = {}

    def all(self) -> dict[str, Array]:
        """Every slot of the bit-width's model, by name; levels that modules share are shared."""
        slots = self._graph.model_for(self._bit_width).slots
        return {name: self.of(name) for name in slots}

    def of(self, name: str) -> Array:
        """The value of the slot ``name``: C-contiguous, of the dtype that the graph means."""
        slot = self._graph.slots[name]
        if slot.kind == "tensor":
            return _plain(self._current(slot.owner))
        if slot.kind == "quantizer":
            return self._of_quantizer(slot.owner, slot.leaf)
        return self._of_module(slot.owner, slot.leaf)

    def decoded_weight(self, prefix: str) -> DecodedWeight:
        """The weight of a module, its batch norm folded in; nothing of it is kept here."""
        module, folded = self._graph.modules[prefix], self._folded_of(prefix)
        return DecodedWeight(
            levels=self._changed_levels(module, folded),
            scale=folded.scale,
            bit_width=self._header.weights[module.param].width_at(self._bit_width),
            group_size=module.group_size,
        )

    def weight_key(self, prefix: str) -> tuple[object, ...]:
        """What is equal for two modules only if their decoded weights are."""
        module, folded = self._graph.modules[prefix], self._folded_of(prefix)
        return module.param, module.group_size, folded.change.tobytes(), folded.scale.tobytes()

    def shape_of(self, prefix: str, leaf: str) -> tuple[int, ...]:
        """The shape of the slot ``<prefix>.levels`` or ``<prefix>.scale``."""
        module = self._graph.modules[prefix]
        shape = weight = self._header.weights[module.param].shape
        if leaf == "scale" and module.group_size is None:
            return weight[:1]
        if leaf == "scale":
            shape = weight[0], -(-weight[1] // module.group_size), *weight[2:]  # type: ignore[operator]
        return shape[::-1] if module.is_transposed else shape

    def bias_change(self, prefix: str) -> Array:
        """What is added to the bias of a module, ``(out,)`` in its own unit, as it becomes whole.

        0 where the input of the module is not quantized.
        """
        module, folded = self._graph.modules[prefix], self._folded_of(prefix)
        if module.input is None:
            return np.zeros_like(folded.bias)
        unit = self._of_module(prefix, "bias_scale").astype(np.float64)
        change: Array = self._of_module(prefix, "bias") * unit - folded.bias
        return change

    def _of_module(self, prefix: str, leaf: str) -> Array:
        folded = self._folded_of(prefix)
        module = self._graph.modules[prefix]
        if leaf == "levels":
            return self._levels_of(module, folded)
        if leaf == "scale":
            return self._scale_of(prefix, folded)
        if leaf == "zero_point":
            return np.zeros(folded.scale.shape, np.int8)
        if module.input is None:
            return folded.bias.astype(np.float32) if leaf == "bias" else folded.scale
        bias_scale = self._step(module.input) * folded.scale  # both float32, so rounded to that
        if leaf == "bias_scale":
            return bias_scale
        units = np.rint(folded.bias / bias_scale)
        limits = np.iinfo(np.int32)
        return units.clip(limits.min, limits.max).astype(np.int32)

    def _folded_of(self, prefix: str) -> "_Folded":
        if prefix not in self._folded:
            module = self._graph.modules[prefix]
            step = None if module.input is None else float(self._step(module.input))
            with np.errstate(all="ignore"):  # what comes of it is looked at instead
                folded = _Folded(*self._affine(module), step)
            if not folded.is_finite:
                raise GraphError(
                    f"scale or bias of module {prefix!r} are not finite at {self._bit_width} bits; "
                    "check its batch norm and pack the model again."
                )
            self._folded[prefix] = folded
        return self._folded[prefix]

    def _affine(self, module: Module) -> tuple[Array, Array]:
        """Scale, signed, and bias of every output channel, as float64."""
        # The product of scale and gain is rounded to float32, as wherever a weight is decoded.
        scale = self._current(scale_name(module.param)).numpy() * self._gain(module.param)
        scale = scale.astype(np.float64)
        if module.group_size is None:
            scale = scale.reshape(-1)
        bias = np.zeros(len(scale)) if module.bias is None else self._vector(module.bias)
        if module.norm is None:
            return scale, bias
        name = module.norm.name
        mean, variance = self._vector(f"{name}.running_mean"), self._vector(f"{name}.running_var")
        factor = self._vector(f"{name}.weight", 1.0) / np.sqrt(variance + module.norm.eps)
        signed = scale * factor.reshape(-1, *[1] * (scale.ndim - 1))
        return signed, self._vector(f"{name}.bias", 0.0) + (bias - mean) * factor

    def _gain(self, param: str) -> Array:
        """What comes with the last planes; 1 where nothing does."""
        for views in reversed(self._layers):
            if planes_name(param) in views:
                gain = views.get(gain_name(param))
                return np.ones(1, np.float32) if gain is None else gain.numpy()
        raise AssertionError(f"no layer has planes of {param}")

    def _levels_of(self, module: Module, folded: "_Folded") -> Array:
        """The int8 levels as the graph has them, ``(out, in, ...)`` or ``(in, out)``."""
        # Modules that share a weight and do the same to it share its levels.
        key = module.param, module.is_transposed, folded.change.tobytes()
        if key not in self._levels:
            levels = self._changed_levels(module, folded)
            if module.is_transposed:
                levels = np.ascontiguousarray(levels.T)
            self._levels[key] = levels
        return self._levels[key]

    def _changed_levels(self, module: Module, folded: "_Folded") -> Array:
        """The int8 levels ``(out, in, ...)`` that go with the scale that is positive."""
        levels, change = self._decoded(module.param), folded.change
        for place in zip(*np.nonzero(change != 1), strict=True):
            inputs = slice(None)
            if module.group_size is not None:
                start = place[1] * module.group_size
                inputs = slice(start, start + module.group_size)
            changed = np.rint(levels[place[0], inputs] * change[place])
            levels[place[0], inputs] = changed.astype(np.int8)
        return levels

    def _scale_of(self, prefix: str, folded: "_Folded") -> Array:
        """The scale as DequantizeLinear wants it: along all dimensions where there are groups."""
        module = self._graph.modules[prefix]
        if module.group_size is None:
            return folded.scale
        scale = folded.scale.T if module.is_transposed else folded.scale
        shape = self.shape_of(prefix, "scale")
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - 2))
        return np.ascontiguousarray(np.broadcast_to(scale, shape))

    def _decoded(self, param: str) -> Array:
        weight = self._header.weights[param]
        brought = [v[planes_name(param)] for v in self._layers if planes_name(param) in v]
        levels: Array = levels_from_planes(
            [row for view in brought for row in view.numpy()], weight.shape
        )
        return levels

    def _of_quantizer(self, prefix: str, leaf: str) -> Array:
        if leaf == "step":
            return np.array(self._step(prefix))
        quantizer = self._graph.quantizers[prefix]
        if quantizer.activation is None:
            own = quantizer.zero_points[self._bit_width]
            return np.array(own if leaf == "zero_point" else ACTIVATION_LEVELS - 1, np.uint8)
        width = self._activation_width(prefix)
        if leaf == "highest":
            return np.array((1 << width) - 1, np.uint8)
        kind = self._header.activations[quantizer.activation].kind
        if kind == "unsigned":
            return np.array(0, np.uint8)
        if kind == "signed":
            return np.array(1 << (width - 1), np.uint8)
        zero_point = float(self._current(zero_point_name(quantizer.activation)).numpy()[0])
        if not zero_point.is_integer() or not 0 <= zero_point < ACTIVATION_LEVELS:
            raise GraphError(
                f"the zero point of activation {quantizer.activation!r} is {zero_point} at "
                f"{self._bit_width} bits, but a graph computes with whole ones of 0 to "
                f"{ACTIVATION_LEVELS - 1}; pack the model again."
            )
        return np.array(zero_point, np.uint8)

    def _step(self, prefix: str) -> np.float32:
        quantizer = self._graph.quantizers[prefix]
        if quantizer.activation is None:
            return np.float32(quantizer.steps[self._bit_width])
        step: np.float32 = self._current(step_name(quantizer.activation)).numpy()[0]
        return step

    def _activation_width(self, prefix: str) -> int:
        """Bits of the activation where the weight it goes with has its own."""
        activation = self._graph.quantizers[prefix].activation
        assert activation is not None
        own = self._bit_width
        if not is_output(activation):
            param = self._graph.weight_read_with(prefix, self._header)
            assert param is not None
            own = self._header.weights[param].width_at(own)
        return self._header.activations[activation].bit_widths[own]

    def _vector(self, name: str, missing: float = 0.0) -> Array:
        """A plain tensor as float64; ``missing`` where the artifact has none."""
        if name not in self._layers[0]:
            return np.full(1, missing)
        return _plain(self._current(name)).astype(np.float64)

    def _current(self, name: str) -> TensorView:
        """The tensor of the last layer that has it."""
        return next(views[name] for views in reversed(self._layers) if name in views)


class _Folded:
    """Scale and bias of a module's channels.

    Attributes:
        scale: float32 ``(out,)``, positive (0 only where the input is float); or ``(out, groups)``.
        bias: float64 ``(out,)``, in the output's own unit.
        is_finite: whether all of them are numbers, and the scale times the step too.
        change: float64 of the scale's shape: what the levels are multiplied with and rounded, 1
            or -1 wherever the scale is one to compute with.
    """

    def __init__(self, signed: Array, bias: Array, step: float | None) -> None:
        magnitude = np.abs(signed)
        self.bias = bias
        self.change = np.where(signed < 0, -1.0, 1.0)
        if step is not None:
            least = np.maximum(np.abs(bias) / MOST_BIAS_UNITS, LEAST_PRODUCT) / step
            self.change = np.where(magnitude < least, signed / least, self.change)
            magnitude = np.maximum(magnitude, least)
        self.scale: Array = magnitude.astype(np.float32)
        largest = np.maximum(self.scale, self.scale * np.float32(step or 1))
        self.is_finite = bool(np.isfinite(largest).all() and np.isfinite(bias).all())


def _plain(view: TensorView) -> Array:
    """A plain tensor in memory of its own; BF16, which numpy has not, as float32."""
    array = view.numpy()
    if view.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.copy()
