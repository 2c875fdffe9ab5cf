"""The scale of a weight as its kernel takes it, kept for as long as no tensor changes.

A kernel brings a scale into a layout of its own, which with groups takes longer than a product.
What it is made of may be exchanged or written to at any time, so every product asks whether it
still is what was kept; that must take no time to speak of.
"""

from typing import Any, NamedTuple

from torch import Tensor

from plyweight.kernels import PlaneMatrix

__all__ = ["KeptScales", "array_of"]


class _Kept(NamedTuple):
    """What was made of a scale, or of a gain, or of both."""

    scale: Tensor | None
    gain: Tensor | None
    versions: tuple[int | None, int | None]
    made: Any

    def is_of(self, scale: Tensor | None, gain: Tensor | None) -> bool:
        """Whether nothing has changed since."""
        if self.scale is not scale or self.gain is not gain:
            return False
        of_scale, of_gain = self.versions
        return (of_scale is None or of_scale == scale._version) and (  # type: ignore[union-attr]
            of_gain is None or of_gain == gain._version  # type: ignore[union-attr]
        )


class KeptScales:
    """Those of one weight.

    A gain that is one number multiplies in the kernel, so that all bit-widths with such gains share
    one scale. A gain of the scale's size is in the scale, of which one is kept for each: together
    they are as large as the gains, which the weight holds as well.
    """

    def __init__(self) -> None:
        self._scales: dict[int, _Kept] = {}
        self._factors: dict[int, _Kept] = {}

    def at(
        self, own: int, scale: Tensor, gain: Tensor | None, matrix: PlaneMatrix
    ) -> tuple[Any, float]:
        """``scale`` with ``gain``, at own bit-width ``own``: what a product takes as both."""
        factor, place = 1.0, 0
        if gain is not None:
            if gain.numel() == 1 and matrix.has_cheap_gain:
                factor, gain = self._factor(own, gain), None
            else:
                place = own
        kept = self._scales.get(place)
        if kept is None or not kept.is_of(scale, gain):
            versions = _version(scale), _version(gain)
            whole = scale.float() if gain is None else scale.float() * gain.float()
            made = matrix.ready_scale(array_of(whole.contiguous()))
            kept = self._scales[place] = _Kept(scale, gain, versions, made)
        return kept.made, factor

    def _factor(self, own: int, gain: Tensor) -> float:
        kept = self._factors.get(own)
        if kept is None or not kept.is_of(None, gain):
            kept = self._factors[own] = _Kept(None, gain, (None, _version(gain)), float(gain))
        factor: float = kept.made
        return factor


def array_of(tensor: Tensor) -> Any:
    """``tensor`` as a kernel takes it: an array on the CPU, itself on a device."""
    return tensor.numpy() if tensor.is_cpu else tensor


def _version(tensor: Tensor | None) -> int | None:
    """Grows with every write in place; torch counts none of inference tensors."""
    return None if tensor is None or tensor.is_inference() else tensor._version
