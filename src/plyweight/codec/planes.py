"""Bit planes: codes, stored one significance at a time.

A ``B``-bit code is ``B`` planes, most significant (the sign) first, so the first ``b`` planes
*are* the ``b``-bit code:

    from_planes(to_planes(codes, B)[:b], shape) == codes >> (B - b)    for 1 <= b <= B

Everything an artifact promises rests on that line.

Each direction is written three times: as a definition (``*_reference``), for numpy once more in
blocks that stay in a core's cache, and in the native library, which is what ``to_planes`` and
``from_planes`` run where it was built (:mod:`plyweight.native` chooses, and says why).

Shapes: codes ``(*shape)`` uint8; planes ``(B, ceil(numel / 8))`` uint8, eight weights to a byte
in C order, the first weight in the lowest bit; only the last byte is padded, with zeros.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight import native
from plyweight.codec.codes import decode

__all__ = [
    "from_planes",
    "from_planes_reference",
    "levels_from_planes",
    "plane_bytes",
    "to_planes",
    "to_planes_reference",
]

# Of one plane. Eight times as many codes and what is computed from them stay in the second cache
# (1.5 GB/s of codes from 8 planes here; 0.3 GB/s when every step passes over the whole weight).
BLOCK_BYTES = 2**14


def plane_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of one plane of a tensor of ``shape``."""
    return (prod(shape) + 7) // 8


def to_planes(
    codes: NDArray[np.uint8], bit_width: int, *, kernel: str = "auto"
) -> NDArray[np.uint8]:
    """Cut ``bit_width``-bit ``codes`` into packed planes, most significant first.

    Args:
        codes: uint8 of any shape.
        bit_width: how many planes; 1 to 8.
        kernel: "auto", or one of ``native.KERNELS``, which is then a demand.

    Raises:
        ValueError: If a code does not fit in ``bit_width`` bits.
        KernelError: If the kernel that is demanded does not run here.
    """
    variant = native.choose(kernel).variant
    if variant is None:
        return _to_planes_in_numpy(codes, bit_width)
    _check_kind(codes, bit_width)
    flat = np.ascontiguousarray(codes).reshape(-1)
    planes = np.empty((bit_width, plane_bytes(flat.shape)), np.uint8)
    if native.library().pack_planes(flat, planes, variant) >> bit_width:  # of all codes, or-ed
        _check_fit(codes, bit_width)
    return planes


def _to_planes_in_numpy(codes: NDArray[np.uint8], bit_width: int) -> NDArray[np.uint8]:
    _check_kind(codes, bit_width)
    _check_fit(codes, bit_width)
    flat = codes.reshape(-1)
    planes = np.empty((bit_width, plane_bytes(flat.shape)), np.uint8)
    scratch = np.empty(min(len(flat), 8 * BLOCK_BYTES), np.uint8)
    for start in range(0, planes.shape[1], BLOCK_BYTES):
        block = flat[8 * start : 8 * (start + BLOCK_BYTES)]
        bits = scratch[: len(block)]
        for row, plane in enumerate(planes[:, start : start + BLOCK_BYTES]):
            # Whatever is not zero packs to a one, so the bit may stay in its place.
            np.bitwise_and(block, 1 << (bit_width - 1 - row), out=bits)
            plane[:] = np.packbits(bits, bitorder="little")
    return planes


def to_planes_reference(codes: NDArray[np.uint8], bit_width: int) -> NDArray[np.uint8]:
    """The definition that :func:`to_planes` must equal."""
    _check_kind(codes, bit_width)
    _check_fit(codes, bit_width)
    flat = codes.reshape(-1)
    rows = [np.packbits(flat >> s & 1, bitorder="little") for s in reversed(range(bit_width))]
    return np.stack(rows)


def from_planes(planes: Iterable[Any], shape: tuple[int, ...], *, kernel: str = "auto") -> Any:
    """Rebuild the codes of ``shape`` from their first planes; the inverse of :func:`to_planes`.

    Args:
        planes: rows of ``plane_bytes(shape)`` bytes, the most significant first; numpy arrays or
            torch tensors.
        shape: of the weight.
        kernel: "auto", or one of ``native.KERNELS``, which is then a demand. Torch tensors are
            always put together by the definition.

    Returns:
        uint8 codes of as many bits as there are planes, of the planes' own kind of array.

    Raises:
        ValueError: If there is no plane, more than 8, or one of the wrong length.
        KernelError: If the kernel that is demanded does not run here.
    """
    rows = list(planes)
    if not all(isinstance(row, np.ndarray) for row in rows):
        if kernel != "auto":  # or nothing is to be chosen, which a compiler could not follow
            native.choose(kernel)
        return from_planes_reference(rows, shape)
    _check_planes(rows, shape)
    variant = native.choose(kernel).variant
    if variant is None:
        return _from_planes_in_numpy(rows, shape)
    codes = np.empty(prod(shape), np.uint8)
    native.library().unpack_planes([np.ascontiguousarray(row) for row in rows], codes, variant)
    return codes.reshape(shape)


def _from_planes_in_numpy(
    rows: Sequence[NDArray[np.uint8]], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    codes = np.empty(8 * plane_bytes(shape), np.uint8)
    for start in range(0, plane_bytes(shape), BLOCK_BYTES):
        first, *others = (row[start : start + BLOCK_BYTES] for row in rows)
        block = codes[8 * start : 8 * (start + BLOCK_BYTES)]
        block[:] = _unpack(first)
        for row in others:
            # Twice itself: numpy adds bytes many at a time, but shifts them one by one.
            np.add(block, block, out=block)
            np.bitwise_or(block, _unpack(row), out=block)
    return codes[: prod(shape)].reshape(shape)


def levels_from_planes(
    planes: Iterable[NDArray[np.uint8]], shape: tuple[int, ...], *, kernel: str = "auto"
) -> NDArray[np.int8]:
    """``decode(from_planes(planes, shape), len(planes))`` in one pass: the levels of ``shape``.

    Args:
        planes: as for :func:`from_planes`; numpy arrays.
        shape: of the weight.
        kernel: likewise.

    Raises:
        ValueError: If there is no plane, more than 8, or one of the wrong length.
        KernelError: If the kernel that is demanded does not run here.
    """
    rows = list(planes)
    _check_planes(rows, shape)
    variant = native.choose(kernel).variant
    if variant is None:
        return _levels_of(_from_planes_in_numpy(rows, shape), len(rows))
    levels = np.empty(prod(shape), np.uint8)
    native.library().unpack_levels([np.ascontiguousarray(row) for row in rows], levels, variant)
    return levels.view(np.int8).reshape(shape)


def _levels_of(codes: NDArray[np.uint8], bit_width: int) -> NDArray[np.int8]:
    """Levels in the memory of the codes they are decoded from."""
    table = np.zeros(256, np.int8)
    table[: 1 << bit_width] = decode(np.arange(1 << bit_width, dtype=np.uint8), bit_width)
    flat, rule = codes.reshape(-1), table.tobytes()
    for start in range(0, flat.size, 8 * BLOCK_BYTES):
        block = flat[start : start + 8 * BLOCK_BYTES]
        # Of all that looks bytes up in a table, this is the one that numpy has not.
        block[:] = np.frombuffer(block.tobytes().translate(rule), np.uint8)
    return codes.view(np.int8)


def from_planes_reference(planes: Iterable[Any], shape: tuple[int, ...]) -> Any:
    """The definition that :func:`from_planes` must equal, and what it does with torch tensors."""
    rows = list(planes)
    _check_planes(rows, shape)
    codes = _unpack(rows[0])
    for row in rows[1:]:
        codes = codes << 1 | _unpack(row)  # each plane refines every code by one bit
    return codes[: prod(shape)].reshape(shape)


def _check_kind(codes: NDArray[np.uint8], bit_width: int) -> None:
    if codes.dtype != np.uint8:
        raise ValueError(f"codes are {codes.dtype}; planes are cut from uint8 codes")
    if not 1 <= bit_width <= 8:
        raise ValueError(f"{bit_width} planes were asked for; a code has 1 to 8")


def _check_fit(codes: NDArray[np.uint8], bit_width: int) -> None:
    if codes.size and int(codes.max()) >> bit_width:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bit_width} bits")


def _check_planes(rows: Sequence[Any], shape: tuple[int, ...]) -> None:
    if not 1 <= len(rows) <= 8:
        raise ValueError(f"{len(rows)} planes were given; a code has 1 to 8")
    wanted = plane_bytes(shape)
    for row in rows:
        if tuple(row.shape) != (wanted,):
            raise ValueError(f"a plane of shape {tuple(row.shape)}; {shape} needs ({wanted},)")
        if isinstance(row, np.ndarray) and row.dtype != np.uint8:
            raise ValueError(f"a plane is {row.dtype}; planes are uint8")


def _unpack(row: Any) -> Any:
    """The bits of ``row``, one per uint8, padding included."""
    if isinstance(row, np.ndarray):
        return np.unpackbits(row, bitorder="little")
    places = row.new_tensor(range(8))
    return (row[:, None] >> places & 1).flatten()
