"""joint_clip: the one clip of each channel that serves every bit-width, without training.

All bit-widths share one code, so they share its scale: a clip that suits 8 bits leaves the two
levels of 2 bits far too wide, and one that suits 2 bits cuts off what 8 bits could tell. For each
channel (or group) of weights ``w`` and each bit-width ``b``, with the gain at its least-squares
fit,

    E_b(clip) = min over g of |w - g * v_b(clip)|^2 = |w|^2 - <w, v_b>^2 / |v_b|^2

and the clip is the one that comes nearest to the best that each bit-width could have alone:

    minimize over clip   sum_b  weight_b * (E_b(clip) + F) / (min over c of E_b(c) + F)

A ratio, for errors at 2 bits are a thousand times those at 8 and would decide alone. The floor
``F``, a thousandth of ``|w|^2``, is what other roundings of the network add in any case: below
it, an error that is twice another is no worse.

The search is over a fixed row of clips, for the error is no smooth function of the clip and has
several minima.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plyweight.codec import MAGNITUDES, codes_at, decode, encode
from plyweight.quantizers.weight import SMALLEST_CLIP

__all__ = ["fitted_gain", "grouped", "joint_clip"]

# Clips that are tried, per largest magnitude of the channel: a quarter is below the best one for
# 1 bit on Gaussian weights of a few thousand inputs.
SMALLEST_RATIO, NUM_RATIOS = 0.25, 40
ERROR_FLOOR = 1e-3
TINY = torch.finfo(torch.float32).tiny  # of a channel of zeros all errors are 0, and equal


@torch.no_grad()
def joint_clip(
    weight: Tensor,
    bit_widths: Sequence[int],
    *,
    group_size: int | None = None,
    weights: Mapping[int, float] | None = None,
) -> Tensor:
    """The clip of every channel (or group) of ``weight`` that serves all ``bit_widths``.

    Args:
        weight: ``(out, in, ...)``, finite.
        bit_widths: those the weight takes.
        group_size: inputs that share a clip; None for one per output channel.
        weights: how much each bit-width counts; None for all equal.

    Returns:
        float32 ``(out,)``, or ``(out, ceil(in / group_size))`` with groups.
    """
    rows, mask = grouped(weight, group_size)
    largest = rows.abs().amax(dim=-1).clamp_min(SMALLEST_CLIP)
    ratios = torch.linspace(SMALLEST_RATIO, 1, NUM_RATIOS, device=rows.device)
    errors = torch.stack([_errors(rows, mask, r * largest, bit_widths) for r in ratios])
    errors += ERROR_FLOOR * rows.square().sum(dim=-1) + TINY
    excess = errors / errors.amin(dim=0)  # (ratios, bit-widths, ...): 1 where it is best alone
    counts = [1.0 if weights is None else weights[b] for b in bit_widths]
    score = torch.einsum("rb...,b->r...", excess, torch.tensor(counts, device=rows.device))
    # The last of equal ones: an all-zero channel keeps its largest magnitude.
    best = NUM_RATIOS - 1 - score.flip(0).argmin(dim=0)
    clip: Tensor = ratios[best] * largest
    return clip


@torch.no_grad()
def fitted_gain(
    weight: Tensor, clip: Tensor, bit_width: int, *, group_size: int | None = None
) -> float:
    """The one gain of the whole tensor that brings its values nearest to ``weight``.

    1 where none is positive.
    """
    rows, mask = grouped(weight, group_size)
    values = _values(rows, mask, clip, (bit_width,))[0]
    fit = float((rows * values).sum() / values.square().sum())
    return fit if fit > 0 else 1.0


def grouped(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """The weights that share a clip, along the last dimension, and a mask of what is no padding.

    Returns:
        Two float32 tensors, ``(out, weights)``, or ``(out, groups, weights)`` with groups.
    """
    values = weight.detach().float().reshape(len(weight), *(weight.shape[1:] or (1,)))
    if group_size is None:
        flat = values.flatten(start_dim=1)
        return flat, torch.ones_like(flat)
    values = values.flatten(start_dim=2) if values.dim() > 2 else values[:, :, None]

    def cut(tensor: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[1] % group_size))
        groups: Tensor = padded.unflatten(1, (-1, group_size))
        return groups.flatten(start_dim=2)

    return cut(values), cut(torch.ones_like(values))


def _errors(rows: Tensor, mask: Tensor, clip: Tensor, bit_widths: Sequence[int]) -> Tensor:
    """``E_b(clip)``, ``(bit-widths, out, ...)``."""
    energy = rows.square().sum(dim=-1)
    errors = []
    for values in _values(rows, mask, clip, bit_widths):
        along, length = (rows * values).sum(dim=-1), values.square().sum(dim=-1)
        errors.append((energy - along.square() / length.clamp_min(TINY)).clamp_min(0))
    return torch.stack(errors)


def _values(rows: Tensor, mask: Tensor, clip: Tensor, bit_widths: Sequence[int]) -> list[Tensor]:
    """What ``rows`` become at each bit-width with a gain of 1; 0 where ``mask`` is."""
    scale = (clip / MAGNITUDES)[..., None]
    codes = encode(rows, scale)
    return [decode(codes_at(codes, b), b).float() * scale * mask for b in bit_widths]
