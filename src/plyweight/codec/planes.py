"""Bit planes: codes, stored one significance at a time.

A ``B``-bit code is ``B`` planes, most significant (the sign) first, so the first ``b`` planes
*are* the ``b``-bit code:

    from_planes(to_planes(codes, B)[:b], shape) == codes >> (B - b)    for 1 <= b <= B

Everything an artifact promises rests on that line.

Shapes: codes ``(*shape)`` uint8; planes ``(B, ceil(numel / 8))`` uint8, eight weights to a byte
in C order, the first weight in the lowest bit; only the last byte is padded, with zeros.
"""

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_planes", "plane_bytes", "to_planes"]


def plane_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of one plane of a tensor of ``shape``."""
    return (prod(shape) + 7) // 8


def to_planes(codes: NDArray[np.uint8], bit_width: int) -> NDArray[np.uint8]:
    """Cut ``bit_width``-bit ``codes`` into packed planes, most significant first.

    Raises:
        ValueError: If a code does not fit in ``bit_width`` bits.
    """
    if codes.dtype != np.uint8:
        raise ValueError(f"codes are {codes.dtype}; planes are cut from uint8 codes")
    if codes.size and int(codes.max()) >> bit_width:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bit_width} bits")
    flat = codes.reshape(-1)
    rows = [np.packbits(flat >> s & 1, bitorder="little") for s in reversed(range(bit_width))]
    return np.stack(rows)


def from_planes(planes: Iterable[Any], shape: tuple[int, ...]) -> Any:
    """Rebuild the codes of ``shape`` from their first planes; the inverse of :func:`to_planes`.

    Args:
        planes: rows of ``plane_bytes(shape)`` bytes, the most significant first; numpy arrays or
            torch tensors.
        shape: of the weight.

    Returns:
        uint8 codes of as many bits as there are planes, of the planes' own kind of array.

    Raises:
        ValueError: If there is no plane, more than 8, or one of the wrong length.
    """
    rows = list(planes)
    if not 1 <= len(rows) <= 8:
        raise ValueError(f"{len(rows)} planes were given; a code has 1 to 8")
    size, wanted = prod(shape), plane_bytes(shape)
    for row in rows:
        if tuple(row.shape) != (wanted,):
            raise ValueError(f"a plane of shape {tuple(row.shape)}; {shape} needs ({wanted},)")
    codes = _unpack(rows[0])
    for row in rows[1:]:
        codes = codes << 1 | _unpack(row)  # each plane refines every code by one bit
    return codes[:size].reshape(shape)


def _unpack(row: Any) -> Any:
    """The bits of ``row``, one per uint8, padding included."""
    if isinstance(row, np.ndarray):
        return np.unpackbits(row, bitorder="little")
    places = row.new_tensor(range(8))
    return (row[:, None] >> places & 1).flatten()
