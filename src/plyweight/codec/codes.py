"""Codes: one byte per weight, the sign first, then seven bits of magnitude.

A weight ``w`` with quantization step ``scale`` has the code

    u = sign << 7 | m        sign = 1 where w < 0,  m = min(round(|w| / scale), 127)

Fewer bits are a prefix of more (cascade downsampling), and a ``b``-bit code decodes to the
centre of its cell: the dropped bits read as ``1000...`` (the half cell). With ``d = 8 - b``

    codes_at(u, b)   = u >> d
    decode(u_b, b)   = +-((m_b << d) + (1 << d >> 1))      an int8 level on one 8-bit grid
    value            = level * scale_b                     scale_b = scale * gain_b

so every bit-width is an ordinary symmetric int8 tensor with zero point 0: ``+-64`` at 1 bit,
``+-32, +-96`` at 2 bits, ``-127 ... 127`` at 8 bits.

The functions are written with operators that numpy arrays and torch tensors share, so training
and shipping use the same definition; this package never imports torch. A bit-width may also be
a 0-dimensional uint8 tensor, which lets one compiled graph serve every bit-width.
"""

from typing import Any

import numpy as np

__all__ = ["MAGNITUDES", "MAX_BIT_WIDTH", "codes_at", "decode", "encode", "inner_levels", "spread"]

MAX_BIT_WIDTH = 8
MAGNITUDES = 128  # of the seven magnitude bits; a scale is its clip divided by this power of two

Array = Any  # a numpy array or a torch tensor


def encode(weight: Array, scale: Array) -> Array:
    """The 8-bit code of every weight.

    Args:
        weight: float, any shape; computed in float32 whatever its dtype.
        scale: float32, positive, broadcastable to ``weight`` (see :func:`spread`).

    Returns:
        uint8 codes of ``weight``'s shape.
    """
    weight = _float32(weight)
    magnitude = _uint8((abs(weight) / scale).round().clip(0, MAGNITUDES - 1))
    return _uint8(weight < 0) << 7 | magnitude


def codes_at(codes: Array, bit_width: Any, from_bit_width: Any = MAX_BIT_WIDTH) -> Array:
    """The ``bit_width``-bit codes inside ``from_bit_width``-bit codes: drop the low bits."""
    return codes >> (from_bit_width - bit_width)


def decode(codes: Array, bit_width: Any) -> Array:
    """The int8 level of every ``bit_width``-bit code, at the centre of its cell."""
    dropped = MAX_BIT_WIDTH - bit_width
    byte = codes << dropped  # the sign is now in bit 7, whatever the bit-width
    magnitude = (byte & (MAGNITUDES - 1)) + (1 << dropped >> 1)
    negative = byte >> 7
    # Two's complement negation of a byte where the sign bit is set: -x == (x ^ 255) + 1.
    return _int8((magnitude ^ (negative * 255)) + negative)


def inner_levels(codes: Array, bit_width: Any) -> Array:
    """A float32 magnitude strictly inside every code's cell, in steps, signed.

    It is the level, except that a level of zero, which only 8 bits have, becomes +-1/4: so
    ``encode(inner_levels(u_b, b) * scale, scale)`` gives ``u_b`` back in its top ``b`` bits,
    the sign of a zero included. Latent weights are rebuilt from it.
    """
    levels = _float32(decode(codes, bit_width))
    negative = _float32((codes << (MAX_BIT_WIDTH - bit_width)) >> 7)
    return levels + (levels == 0) * (0.25 - 0.5 * negative)


def spread(scale: Array, shape: tuple[int, ...], group_size: int | None) -> Array:
    """``scale`` in a shape that broadcasts against weights of ``shape`` ``(out, in, ...)``.

    Args:
        scale: ``(out,)``, or ``(out, ceil(in / group_size))`` with groups, or ``(1,)``.
        shape: of the weight.
        group_size: inputs that share a scale; None for one scale per output channel.

    Returns:
        ``(out, 1, ...)``, ``(out, in, 1, ...)`` or ``(1, ...)``.
    """
    if group_size is not None and scale.ndim == 2:
        repeat = np.repeat if isinstance(scale, np.ndarray) else type(scale).repeat_interleave
        scale = repeat(scale, group_size, 1)[:, : shape[1]]
    return scale.reshape(tuple(scale.shape) + (1,) * (len(shape) - scale.ndim))


def _float32(array: Array) -> Array:
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()


def _uint8(array: Array) -> Array:
    return array.astype(np.uint8) if isinstance(array, np.ndarray) else array.byte()


def _int8(array: Array) -> Array:
    return array.astype(np.int8) if isinstance(array, np.ndarray) else array.char()
