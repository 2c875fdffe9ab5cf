"""ActivationQuantizer: a learned step per bit-width, its kind and start read off the first batch.

With ``a`` bits, step ``s`` and integer zero point ``z``

    value = s * (clamp(round(x / s), -z, 2^a - 1 - z))

    unsigned   z = 0             inputs that are never negative (after ReLU)
    signed     z = 2^(a-1)       inputs of both signs; at 1 bit the two levels are +-s/2
    offset     z learned         inputs that go a little below zero (GELU, SiLU): LSQ+

Sources: Esser et al., "Learned Step Size Quantization" (ICLR 2020), for the gradient of the step
and its start ``2 E|x| / sqrt(2^a - 1)``; Bhalgat et al., "LSQ+" (CVPR Workshops 2020), for the
offset. The start never reaches past the largest input, which matters from 6 bits up.

The parameter is the clip, ``s * 2^a``, or ``s * 2^(a-1)`` if signed (a power of two, so that a
step read from a file gives it back exactly): of the same order at every bit-width, which Adam
needs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plyweight.codec import MAX_BIT_WIDTH
from plyweight.errors import LayeringError
from plyweight.quantizers.rounding import round_ste
from plyweight.quantizers.switchable import Switchable

__all__ = ["KINDS", "ActivationQuantizer", "ActivationWidths", "activation_widths", "kind_of"]

# How wide activations are: as wide as the weights, one width, or one for each weight bit-width.
ActivationWidths = Literal["match"] | int | Mapping[int, int]

KINDS = ("unset", "unsigned", "signed", "offset")
SMALLEST_CLIP = 1e-12
# Inputs count as "a little below zero" when they reach no lower than GELU's and SiLU's minimum
# (-0.170 and -0.278) and at least four times as far up.
LOWEST_OFFSET, OFFSET_RATIO = -0.3, 4.0


def activation_widths(
    activations: ActivationWidths, own_bit_widths: Sequence[int]
) -> tuple[int, ...]:
    """The activation width for each of a module's weight bit-widths.

    Raises:
        LayeringError: If one is not an integer of 1 to 8, or a mapping lacks a bit-width.
    """
    if isinstance(activations, Mapping):
        missing = [b for b in own_bit_widths if b not in activations]
        if missing:
            raise LayeringError(
                f"activations maps {dict(activations)}, but weights of {missing[0]} bits need an "
                f"entry too (a pinned module keeps its own bit-width)."
            )
        widths = tuple(activations[b] for b in own_bit_widths)
    elif activations == "match":
        widths = tuple(own_bit_widths)
    else:
        widths = (activations,) * len(own_bit_widths)
    if any(type(a) is not int or not 1 <= a <= MAX_BIT_WIDTH for a in widths):
        raise LayeringError(
            f"activations is {activations!r}; give 'match', an integer of 1 to 8, None, or a "
            "mapping from weight bit-width to activation bit-width."
        )
    return widths


def kind_of(lowest: float, largest: float) -> str:
    """The kind of grid for inputs whose least value and largest magnitude are these."""
    if largest == 0:
        return "signed"  # zeros do not say that nothing is ever negative
    if lowest >= 0:
        return "unsigned"
    if lowest >= LOWEST_OFFSET and largest >= OFFSET_RATIO * -lowest:
        return "offset"
    return "signed"


class ActivationQuantizer(Switchable):
    """Fake-quantizes a module's input at the activation width of the current bit-width.

    Attributes:
        clip: parameter, float32 ``(own bit-widths,)``.
        offset: parameter, float32 ``(own bit-widths,)``: the lowest value, for kind "offset".
        widths: uint8 ``(own bit-widths,)``, the activation width at each.
        kind_index: uint8 scalar, position in ``KINDS``; 0 until the first batch was seen.
    """

    settings = (*Switchable.settings, "widths")

    widths: Tensor
    kind_index: Tensor
    _tables: Tensor

    def __init__(
        self,
        activations: ActivationWidths,
        bit_widths: Sequence[int],
        *,
        pinned: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.make_switchable(bit_widths, pinned=pinned, device=device)
        widths = activation_widths(activations, self.own_bit_widths)
        self.register_buffer("widths", torch.tensor(widths, dtype=torch.uint8, device=device))
        self.register_buffer("kind_index", torch.zeros((), dtype=torch.uint8, device=device))
        # Rows: own bit-widths. Columns: divisor of the clip, lowest level, highest level, half.
        tables = torch.zeros(len(widths), 4, dtype=torch.float32, device=device)
        self.register_buffer("_tables", tables, persistent=False)
        zeros = torch.zeros(len(widths), dtype=torch.float32, device=device)
        self.clip = nn.Parameter(zeros + 1)
        self.offset = nn.Parameter(zeros)
        self.kind = "unset"

    @property
    def steps(self) -> Tensor:
        """float32 ``(own bit-widths,)``: the width of one quantization step at each."""
        return self.clip.float().abs().clamp_min(SMALLEST_CLIP) / self._tables[:, 0].float()

    @property
    def zero_points(self) -> Tensor:
        """float32 ``(own bit-widths,)``: the integer that stands for 0, counted from the lowest."""
        if self.kind != "offset":
            return -(self._tables[:, 1] - self._tables[:, 3])
        highest = (self._tables[:, 2] - self._tables[:, 1]).float()
        return round_ste(torch.minimum((-self.offset.float() / self.steps).clamp_min(0), highest))

    def row_parameters(self) -> list[nn.Parameter]:
        """The clips and the offsets."""
        return [self.clip, self.offset]

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` on the grid of the current width, in their shape and dtype."""
        if self.kind == "unset":
            self._initialize(inputs)
        _, low, high, half = self.row_of(self._tables).float().unbind()
        if self.kind == "offset":
            zero_point = self.row_of(self.zero_points)
            low, high = -zero_point, high - low - zero_point
        # Nothing is added but a path for the gradient, which is 0: DistributedDataParallel waits
        # for every parameter, also for the offset of a kind that has none.
        step = self.row_of(self.steps) + 0.0 * self.row_of(self.offset)
        values: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            inputs, step, low, high, half
        )
        return values

    def levels_at(self, bit_width: int) -> tuple[float, float, float]:
        """The lowest and highest level at ``bit_width`` (of the model), and what they are off 0.

        Of kind "offset" they are counted from the lowest.
        """
        _, low, high, half = self._tables[self._rows[bit_width]].tolist()
        return low, high, half

    def set_kind(self, kind: str) -> None:
        """Choose the grid: one of ``KINDS``."""
        self.kind = kind
        self.kind_index.fill_(KINDS.index(kind))
        signed = kind == "signed"
        rows = []
        for width in self.widths.tolist():
            levels = 2.0**width
            half = 0.5 if signed and width == 1 else 0.0
            lowest = -levels / 2 + half if signed else 0.0
            rows.append([levels / 2 if signed else levels, lowest, lowest + levels - 1, half])
        self._tables.copy_(torch.tensor(rows))

    def restore_kind(self) -> None:
        """Take the kind that ``kind_index`` names, after it came from elsewhere."""
        self.set_kind(KINDS[int(self.kind_index)])

    @torch.no_grad()
    def set_step(self, bit_width: int, step: float, zero_point: float) -> None:
        """Set the grid at ``bit_width`` (of the model); the kind is set already."""
        row = self._rows[bit_width]
        self.clip[row] = step * self._tables[row, 0]
        self.offset[row] = -zero_point * step if self.kind == "offset" else 0.0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads values; happens once
    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        """Kind, steps and offsets from the first batch."""
        if inputs.numel() == 0:
            raise LayeringError("the first batch is empty, but activation steps start from it.")
        values = inputs.detach().float()
        lowest, mean = float(values.min()), float(values.abs().mean())
        largest = float(values.abs().max())
        if not math.isfinite(largest):
            raise LayeringError(
                "the first batch has NaN or infinite activations, but activation steps start "
                "from it; give one that the float model can compute."
            )
        self.set_kind(kind_of(lowest, largest))
        divisor, _, high, half = self._tables.float().unbind(dim=1)
        positive_levels = (high + half).clamp_min(1)
        start = 2 * mean / positive_levels.sqrt()
        steps = torch.minimum(start, largest / positive_levels)
        self.clip.copy_(torch.where(steps > 0, steps * divisor, 1.0))
        self.offset.fill_(lowest if self.kind == "offset" else 0.0)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.restore_kind()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"widths={tuple(self.widths.tolist())}, kind={self.kind}"


class _FakeQuantize(torch.autograd.Function):
    """LSQ's gradients; the bounds move the saturated inputs, which is how an offset learns."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, step: Tensor, low: Tensor, high: Tensor, half: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inputs, step, low, high, half)
        values: Tensor = (_levels(inputs.float() / step, low, high, half) * step).to(inputs.dtype)
        return values

    @staticmethod
    def backward(
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        inputs, step, low, high, half = ctx.saved_tensors
        upstream = gradients[0].float()
        ratio = inputs.float() / step
        below, above = (ratio - half).round() + half < low, (ratio - half).round() + half > high
        inside = ~(below | above)
        # All the same: an input below the grid becomes the offset, whatever the step, so what it
        # says about the step itself and about the bound must cancel.
        factor = torch.rsqrt(max(inputs.shape[1:].numel(), 1) * high.clamp_min(1))
        for_inputs = for_step = for_low = for_high = None
        if ctx.needs_input_grad[0]:
            for_inputs = (upstream * inside).to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            inner = torch.where(inside, ratio, 0.0)  # an infinite input is outside, not a NaN
            for_step = (upstream * (_levels(ratio, low, high, half) - inner)).sum()
            for_step = for_step * factor
        if ctx.needs_input_grad[2]:
            for_low = (upstream * below).sum() * step * factor
        if ctx.needs_input_grad[3]:
            for_high = (upstream * above).sum() * step * factor
        return for_inputs, for_step, for_low, for_high, None


def _levels(ratio: Tensor, low: Tensor, high: Tensor, half: Tensor) -> Tensor:
    rounded = (ratio - half).round() + half
    return torch.minimum(torch.maximum(rounded, low), high)
