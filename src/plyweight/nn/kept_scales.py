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
    """What was made of a scale, of a gain, or of both."""

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
    """The last two of one weight, so that two bit-widths in turn make none.

    A gain that is one number multiplies in the kernel, if it can without taking longer, so that all
    bit-widths with such gains share a scale. Any other gain is multiplied into a scale of its own.
    """

    def __init__(self) -> None:
        self._scales: tuple[_Kept, ...] = ()
        self._factors: dict[int, _Kept] = {}

    def at(
        self, own: int, scale: Tensor, gain: Tensor | None, matrix: PlaneMatrix
    ) -> tuple[Any, float]:
        """Of ``scale`` and ``gain`` at own bit-width ``own`` the scale and gain of a product."""
        factor = 1.0
        if gain is not None and gain.numel() == 1 and matrix.has_cheap_gain:
            factor, gain = self._factor(own, gain), None
        for kept in self._scales:
            if kept.is_of(scale, gain):
                return kept.made, factor
        versions = _version(scale), _version(gain)
        whole = scale.float() if gain is None else scale.float() * gain.float()
        made = matrix.ready_scale(array_of(whole.contiguous()))
        self._scales = (_Kept(scale, gain, versions, made), *self._scales[:1])
        return made, factor

    def _factor(self, own: int, gain: Tensor) -> float:
        kept = self._factors.get(own)
        if kept is None or not kept.is_of(None, gain):
            kept = self._factors[own] = _Kept(None, gain, (None, _version(gain)), gain.item())
        factor: float = kept.made
        return factor


def array_of(tensor: Tensor) -> Any:
    """``tensor`` as a kernel takes it: an array on the CPU, itself on a device."""
    return tensor.numpy() if tensor.is_cpu else tensor


def _version(tensor: Tensor | None) -> int | None:
    """Grows with every write in place; torch counts none of inference tensors."""
    return None if tensor is None or tensor.is_inference() else tensor._version
