"""Nibbles: a weight as products of 4-bit codes, which ONNX Runtime multiplies floats with.

``MatMulNBits`` multiplies ``x`` with ``scale * (code - 8)``, a scale for each block of inputs, in
float32. Levels of every bit-width are such products, exactly:

    1 to 3 bits    half * (code - 8)                  one product: odd multiples of half a cell
    4 bits         16 * (code - 8) + 8                one product, and 8 * sum(x) of each group
    5 to 8 bits    16 * (high - 8) + (low - 8) + 8    two products, and the same

    sum over products of  block_scale * (codes - 8), + half == levels * scale

There is an 8-bit and a 2-bit form of the operator too, but for float activations ONNX Runtime 1.32
has kernels for 4 bits only; the others make a float weight of it at every call, as they do for a
zero point that is a float. (Six products of 2048 x 2048, one row, one thread: 0.9 ms in one product
of 4 bits, 2.0 in two; 28 in 8 bits, 44 in 2 bits, 30 with float zero points.) A zero point of whole
codes, which would save the sums of two products, was up to 1.5 times slower than they are.

A block is a power of two from 16 to 256. Groups of inputs become one or several blocks each; those
of another size have no such form.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.codec import MAX_BIT_WIDTH, decode
from plyweight.engine.values import DecodedWeight

__all__ = ["BLOCK_SIZES", "Nibbles", "Product", "block_size_of", "nibbles_of", "sums_of_groups"]

Array = NDArray[Any]

BLOCK_SIZES = (16, 32, 64, 128, 256)  # those that ONNX Runtime's kernel takes
MIDDLE = 8  # the zero point of MatMulNBits where none is given
ONE_PRODUCT = 4  # the widest that is one
HIGH = 16  # what the higher of two codes counts
MAX_CODE = 15
SCALE_BYTES = 4
ROWS = 256  # of a weight, packed at once: temporary copies stay small
# Every level, in the order of its byte.
_LEVELS = np.arange(1 << MAX_BIT_WIDTH, dtype=np.uint8).view(np.int8).astype(np.int16)


@dataclass(frozen=True)
class Product:
    """The arguments of one ``MatMulNBits`` beside ``x``.

    Attributes:
        codes: uint8 ``(out, blocks, block_size / 2)``, the first of two codes in the low half.
        scale: float32 ``(out, blocks)``.
    """

    codes: Array
    scale: Array


@dataclass(frozen=True)
class Nibbles:
    """A weight ``(out, in)`` as products.

    Attributes:
        num_inputs: of the weight.
        block_size: inputs that share a scale.
        products: whose sum is the weight.
        half: float32 ``(groups, out)``: what the sum of a group's inputs is multiplied with and
            added; None for nothing.
        group_size: inputs of a group.
    """

    num_inputs: int
    block_size: int
    products: tuple[Product, ...]
    half: Array | None
    group_size: int


def block_size_of(num_inputs: int, group_size: int | None) -> int | None:
    """The block size for a weight with so many inputs; None where there is none.

    Without groups it is that with the fewest bytes: larger blocks have fewer scales and a longer
    remainder. A group is one block or several, so the largest that divides it.
    """
    if group_size is None:

        def num_bytes(size: int) -> int:
            return -(-num_inputs // size) * (size // 2 + SCALE_BYTES)

        return min(BLOCK_SIZES, key=num_bytes)
    fitting = [size for size in BLOCK_SIZES if group_size % size == 0]
    return max(fitting, default=None)


def nibbles_of(weight: DecodedWeight) -> Nibbles:
    """``weight``, which has two dimensions and a block size, as products."""
    levels = weight.levels
    num_inputs = levels.shape[1]
    block_size = block_size_of(num_inputs, weight.group_size)
    assert block_size is not None
    num_blocks = -(-num_inputs // block_size)
    scale = weight.scale.reshape(len(levels), -1)
    blocks_of_group = num_blocks if weight.group_size is None else weight.group_size // block_size
    block_scale = np.repeat(scale, blocks_of_group, axis=1)[:, :num_blocks]
    half_cell = int(decode(np.zeros(1, np.uint8), weight.bit_width)[0])
    half = None
    if weight.bit_width < ONE_PRODUCT:
        parts = [(half_cell, _LEVELS // half_cell + MIDDLE)]
    else:
        half = np.ascontiguousarray(scale.T) * np.float32(MIDDLE)
        parts = [(HIGH, _LEVELS // HIGH + MIDDLE)]
    if weight.bit_width > ONE_PRODUCT:
        parts.append((1, _LEVELS % HIGH))
    products = [_product(levels, block_size, *part, block_scale) for part in parts]
    return Nibbles(num_inputs, block_size, tuple(products), half, weight.group_size or num_inputs)


def sums_of_groups(num_inputs: int, group_size: int) -> Array:
    """float32 ``(in, groups)``: what ``x`` is multiplied with to have the sums of its groups."""
    groups = np.arange(num_inputs) // group_size
    sums: Array = (groups[:, None] == np.arange(groups[-1] + 1)).astype(np.float32)
    return sums


def _product(levels: Array, block_size: int, unit: int, codes_of: Array, scale: Array) -> Product:
    """The part of ``levels`` that codes of ``unit`` have, and nothing in the remainder.

    Args:
        levels: int8 ``(out, in)``.
        block_size: inputs that share a scale.
        unit: of a code, in levels.
        codes_of: the code of each of ``_LEVELS``.
        scale: float32 ``(out, blocks)`` of levels.
    """
    out, num_inputs = levels.shape
    num_blocks = -(-num_inputs // block_size)
    table = np.clip(codes_of, 0, MAX_CODE).astype(np.uint8)  # levels that the bit-width has not
    codes = np.empty((out, num_blocks * block_size // 2), np.uint8)
    for start in range(0, out, ROWS):
        rows = levels[start : start + ROWS]
        part = np.full((len(rows), num_blocks * block_size), MIDDLE, np.uint8)
        part[:, :num_inputs] = table[rows.view(np.uint8)]
        codes[start : start + ROWS] = part[:, 0::2] | part[:, 1::2] << 4
    return Product(
        codes=codes.reshape(out, num_blocks, block_size // 2),
        scale=np.ascontiguousarray(scale) * np.float32(unit),
    )
