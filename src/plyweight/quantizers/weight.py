"""WeightQuantizer: a learned clip per output channel, a gain per bit-width, one code for all.

    scale   s   = |clip| / 128
    value   v_b = gain_b * s * decode(codes_at(encode(w, s), b), b)

What is trained is what is shipped: the forward pass calls the codec that packing calls, so the
values of a loaded artifact are equal to those seen in training, bit for bit.

Gradients are those of LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020), with the
straight-through estimator for the rounding. With ``r = w / s`` and ``inside`` where the code is
not saturated:

    dv/dw     = gain_b                        inside, else 0
    dv/ds     = gain_b * (level - r * inside)       times 1 / sqrt(weights per scale * 2^(b-1))
    dv/dgain  = s * level                           times 1 / sqrt(weights per gain * 2^(b-1))

The clip, not the scale, is the parameter: an optimizer with steps of its learning rate (Adam)
would otherwise change the scale by several times itself. 128 is a power of two, so that a scale
read from a file gives back its clip without rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.codec import MAGNITUDES, codes_at, decode, encode, spread
from plyweight.quantizers.switchable import Switchable

__all__ = ["WeightQuantizer", "scale_of"]

# Where the clip starts, in root mean squares of a channel: near the best single clip for Gaussian
# weights over 8 to 2 bits (docs/method.md).
INITIAL_CLIP = 2.5
# The widest bit-width whose gain starts at the least-squares fit; wider ones fit 1 to a percent.
FITTED_GAIN = 2
SMALLEST_CLIP = 1e-12  # keeps the scale of an all-zero channel positive


class WeightQuantizer(Switchable):
    """Fake-quantizes one weight tensor ``(out, in, ...)`` at the bit-width that is chosen.

    Attributes:
        clip: parameter, float32 ``(out,)``, or ``(out, ceil(in / group_size))`` with groups.
        gain: parameter, float32 ``(own bit-widths,)``, or ``(own bit-widths, *clip.shape)``.
        group_size: int64 scalar, inputs that share a scale; 0 for one scale per output channel.
    """

    settings = (*Switchable.settings, "group_size")

    own_widths: Tensor
    group_size: Tensor

    def __init__(
        self,
        weight: Tensor,
        bit_widths: Sequence[int],
        *,
        group_size: int | None = None,
        pinned: int = 0,
    ) -> None:
        super().__init__()
        self.make_switchable(bit_widths, pinned=pinned, device=weight.device)
        own = torch.tensor(self.own_bit_widths, dtype=torch.uint8, device=weight.device)
        self.register_buffer("own_widths", own, persistent=False)
        self.register_buffer("group_size", torch.tensor(group_size or 0, device=weight.device))
        self._group_size = group_size
        learn = weight.requires_grad
        self.clip = nn.Parameter(initial_clip(weight, group_size), requires_grad=learn)
        ones = torch.ones(len(own), dtype=torch.float32, device=weight.device)
        self.gain = nn.Parameter(ones, requires_grad=learn)
        self.fit_gain(weight)

    @property
    def scale(self) -> Tensor:
        """float32, the shape of ``clip``: the width of one step of the 8-bit code."""
        return scale_of(self.clip)

    def row_parameters(self) -> list[nn.Parameter]:
        """The gains."""
        return [self.gain]

    def spread_scale(self, weight: Tensor) -> Tensor:
        """The scale in a shape that broadcasts against ``weight``."""
        return self._spread(self.scale, weight)

    def codes(self, weight: Tensor) -> Tensor:
        """The 8-bit codes of ``weight``, uint8 of its shape."""
        with torch.no_grad():
            codes: Tensor = encode(weight, self.spread_scale(weight))
            return codes

    def forward(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """The values of ``weight`` at the current bit-width, in ``weight``'s shape and dtype.

        Args:
            weight: the latent weight ``(out, in, ...)``, or rows of it.
            rows: int64, which output channels ``weight`` holds, if not all in order.
        """
        scale, gain = self.scale, self.row_of(self.gain).float()
        if rows is not None:
            scale, gain = scale[rows], gain if gain.dim() == 0 else gain[rows]
        per_scale = weight.shape[1:].numel() / scale.shape[1:].numel()
        values: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            weight,
            self._spread(scale, weight),
            self._spread(gain, weight) if gain.dim() else gain,
            self.row_of(self.own_widths),
            per_scale,
            per_scale if gain.dim() else weight.numel(),
        )
        return values

    @torch.no_grad()
    def fit_gain(self, weight: Tensor) -> None:
        """Set the gains of the narrowest bit-widths to the least-squares fit, others to 1."""
        scale, codes = self.spread_scale(weight), self.codes(weight)
        for row, bit_width in enumerate(self.own_bit_widths):
            if bit_width <= FITTED_GAIN:
                ungained = decode(codes_at(codes, bit_width), bit_width).float() * scale
                fit = (ungained * weight.float()).sum() / (ungained * ungained).sum()
                self.gain[row] = torch.where(fit > 0, fit, 1.0)

    @torch.no_grad()
    def match_moments(self, weight: Tensor) -> None:
        """Give each scale a gain of its own at every bit-width, at the weights' second moment.

        ``gain_b = sqrt(sum w^2 / sum v_b^2)`` over the weights of a scale, in the place of the
        batch norm per bit-width that would undo another spread. Their mean needs nothing: signs
        are kept, and what is rounded off is alike on both sides of zero.
        """
        scale, codes = self.spread_scale(weight), self.codes(weight)
        energy = _per_scale(weight.float().square(), self.clip.shape, self._group_size)
        rows = []
        for bit_width in self.own_bit_widths:
            values = decode(codes_at(codes, bit_width), bit_width).float() * scale
            quantized = _per_scale(values.square(), self.clip.shape, self._group_size)
            is_positive = (energy > 0) & (quantized > 0)
            rows.append(torch.where(is_positive, energy / quantized, 1.0).sqrt())
        self.gain = nn.Parameter(torch.stack(rows), requires_grad=self.gain.requires_grad)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, gains: Mapping[int, Tensor]) -> None:
        """Take the scale and gains of a file.

        Args:
            scale: float32, the shape of ``clip``.
            gains: float32 ``(1,)`` or the shape of ``clip``, by own bit-width; 1 where missing.
        """
        self.clip.copy_(scale * MAGNITUDES)
        one = torch.ones(1)
        rows = [gains.get(b, one).reshape(-1) for b in self.own_bit_widths]
        if all(len(row) == 1 for row in rows):
            rows = [row[0] for row in rows]
        else:
            rows = [row.expand(scale.numel()).reshape(scale.shape) for row in rows]
        gain = torch.stack(rows).to(self.gain)
        self.gain = nn.Parameter(gain, requires_grad=self.gain.requires_grad)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        theirs = state_dict.get(f"{prefix}gain")
        by_channel = (len(self.own_bit_widths), *self.clip.shape)
        if isinstance(theirs, Tensor) and theirs.shape == by_channel != self.gain.shape:
            gain = torch.ones(by_channel, dtype=self.gain.dtype, device=self.gain.device)
            self.gain = nn.Parameter(gain, requires_grad=self.gain.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = spread(scale, tuple(weight.shape), self._group_size)
        return result

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        pinned = f", pinned={int(self.pinned)}" if self.pinned else ""
        group = f", group_size={self._group_size}" if self._group_size else ""
        return f"bit_widths={self.available_bit_widths}{pinned}{group}"


def _per_scale(values: Tensor, shape: torch.Size, group_size: int | None) -> Tensor:
    """The sum over the weights ``(out, in, ...)`` that share a scale, in the scales' ``shape``."""
    if group_size is None or len(shape) == 1:
        return values.flatten(start_dim=1).sum(dim=1) if values.dim() > 1 else values
    inputs = values.flatten(start_dim=2).sum(dim=2) if values.dim() > 2 else values
    padded = nn.functional.pad(inputs, (0, -inputs.shape[1] % group_size))
    groups: Tensor = padded.unflatten(1, (-1, group_size))
    return groups.sum(dim=2)


def scale_of(clip: Tensor) -> Tensor:
    """The scale that belongs to ``clip``: float32, positive, of its shape."""
    return clip.float().abs().clamp_min(SMALLEST_CLIP) / MAGNITUDES


def initial_clip(weight: Tensor, group_size: int | None) -> Tensor:
    """2.5 root mean squares of each channel (or group), at most its largest magnitude.

    Returns:
        float32 ``(out,)``, or ``(out, ceil(in / group_size))`` with groups.
    """
    magnitude = weight.detach().float().abs().flatten(start_dim=min(2, weight.dim() - 1))
    if group_size is None:
        groups = magnitude.flatten(start_dim=1) if magnitude.dim() > 1 else magnitude[:, None]
    else:
        num_inputs = magnitude.shape[1]
        padding = -num_inputs % group_size
        if magnitude.dim() == 2:
            magnitude = magnitude[:, :, None]
        padded = nn.functional.pad(magnitude, (0, 0, 0, padding), value=float("nan"))
        groups = padded.unflatten(1, (-1, group_size)).flatten(start_dim=2)
    mean_square = groups.square().nanmean(dim=-1)
    largest = groups.nan_to_num(nan=0.0).amax(dim=-1)
    return torch.minimum(INITIAL_CLIP * mean_square.sqrt(), largest).clamp_min(SMALLEST_CLIP)


class _FakeQuantize(torch.autograd.Function):
    """One function, so that a step keeps the latent weight alone and not five tensors like it."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        gain: Tensor,
        bit_width: Tensor,
        per_scale: float,
        per_gain: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, gain, bit_width)
        ctx.per_scale, ctx.per_gain = per_scale, per_gain  # weights that share one
        codes = codes_at(encode(weight, scale), bit_width)
        values: Tensor = (decode(codes, bit_width).float() * (scale * gain)).to(weight.dtype)
        return values

    @staticmethod
    def backward(
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        weight, scale, gain, bit_width = ctx.saved_tensors
        upstream = gradients[0].float()
        ratio = weight.float() / scale
        inside = ratio.abs() < MAGNITUDES - 0.5  # where the code is not saturated
        for_weight = for_scale = for_gain = None
        if ctx.needs_input_grad[0]:
            for_weight = (upstream * gain * inside).to(weight.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            level = decode(codes_at(encode(weight, scale), bit_width), bit_width).float()
            positive_levels = torch.exp2(bit_width.float() - 1)
            for_scale = (upstream * gain * (level - ratio * inside)).sum_to_size(scale.shape)
            for_scale = for_scale * torch.rsqrt(ctx.per_scale * positive_levels)
            for_gain = (upstream * level * scale).sum_to_size(gain.shape)
            for_gain = for_gain * torch.rsqrt(max(ctx.per_gain, 1) * positive_levels)
        return for_weight, for_scale, for_gain, None, None, None
