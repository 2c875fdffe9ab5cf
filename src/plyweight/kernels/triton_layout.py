"""The compute layout of the Triton kernels, as torch operations on any device.

A plane of a weight ``(out, in)`` becomes int32 words ``(ceil(out / 16), ceil(in / 256), 128)``.
The 128 words of a block are the bits of 16 outputs and 256 inputs, four to each of the 32 lanes of
a warp: what the lane multiplies with, in a load of 16 bytes. Bits of a block, from the outermost:

    output % 8 · lane of four · output // 8 · input // 128     which word
    half · pair, of 16                                         which bit of it

where, of the 7 bits of ``input % 128``, the lowest says which half of the word; the lane of four
and the pair take the others in one of two orders. The compiler chooses between them: it lets a
lane of the matrix unit have 2 neighbouring inputs, or 4 (releases of Triton that see a ``join`` on
the way to a product). Whatever the order, planes are kept apart and results are the same.
"""

import torch
from torch import Tensor

from plyweight.codec import plane_bytes

__all__ = ["INPUTS", "OUTPUTS", "WORDS", "from_words", "to_words", "words_shape"]

OUTPUTS, INPUTS, WORDS = 16, 256, 128  # of a block

# The axes of a block of bits, outputs (2, 8) and inputs (2, then the bits of input % 128): in
# memory order they are output % 8, lane of four, output // 8, input // 128, half, pair.
_NARROW = (2, 2, 2, 2, 4, 2)  # pair's three highest bits, its lowest, the lane of four, the half
_WIDE = (2, 2, 2, 4, 2, 2)  # pair's three highest bits, the lane of four, pair's lowest, the half

BLOCK_WEIGHTS = 2**24  # brought into the layout at a time; a byte and an int32 of each are there


def words_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """Of a plane of a weight of ``shape`` ``(out, in)``."""
    return -(-shape[0] // OUTPUTS), -(-shape[1] // INPUTS), WORDS


def to_words(plane: Tensor, shape: tuple[int, int], *, is_wide: bool) -> Tensor:
    """A plane in the layout of the wire, uint8 ``(bytes,)``, in the compute layout.

    Outputs and inputs that are not there are zeros.
    """
    row_blocks, blocks, _ = words_shape(shape)
    words = torch.empty(words_shape(shape), dtype=torch.int32, device=plane.device)
    step = _row_blocks_at_a_time(shape)
    for first in range(0, row_blocks, step):
        last = min(first + step, row_blocks)
        start, stop = first * OUTPUTS, min(last * OUTPUTS, shape[0])
        bits = plane.new_zeros((last - first) * OUTPUTS, blocks * INPUTS)
        # OUTPUTS rows are whole bytes, whatever their length, so a block begins with a byte.
        cut = plane[start * shape[1] // 8 : plane_bytes((stop, shape[1]))]
        places = torch.arange(8, dtype=torch.uint8, device=plane.device)
        flat = (cut[:, None] >> places & 1).flatten()[: (stop - start) * shape[1]]
        bits[: stop - start, : shape[1]] = flat.view(-1, shape[1])
        words[first:last] = _packed(_to_memory_order(bits, is_wide), words.shape[1:])
    return words


def from_words(words: Tensor, shape: tuple[int, int], *, is_wide: bool) -> Tensor:
    """The inverse: uint8 ``(bytes,)`` of the layout of the wire, with zeros in the padding."""
    plane = torch.zeros(plane_bytes(shape), dtype=torch.uint8, device=words.device)
    step = _row_blocks_at_a_time(shape)
    for first in range(0, len(words), step):
        block = words[first : first + step]
        start, stop = first * OUTPUTS, min((first + len(block)) * OUTPUTS, shape[0])
        rows = _from_memory_order(_unpacked(block), is_wide)
        flat = rows[: stop - start, : shape[1]].flatten()
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
        places = torch.arange(8, dtype=torch.uint8, device=words.device)
        packed = (flat.view(-1, 8) << places).sum(dim=1, dtype=torch.uint8)
        at = start * shape[1] // 8
        plane[at : at + len(packed)] = packed
    return plane


def _row_blocks_at_a_time(shape: tuple[int, int]) -> int:
    return max(BLOCK_WEIGHTS // (OUTPUTS * shape[1]), 1)


def _to_memory_order(bits: Tensor, is_wide: bool) -> Tensor:
    """Bits ``(out, in)`` of whole blocks, as ``(words, 2, 16)``."""
    out, inputs = bits.shape
    split = bits.view(out // OUTPUTS, 2, 8, inputs // INPUTS, 2, *(_WIDE if is_wide else _NARROW))
    return split.permute(_memory_axes(is_wide)).reshape(-1, 2, 16)


def _from_memory_order(bits: Tensor, is_wide: bool) -> Tensor:
    """The inverse, from ``(row blocks, blocks, WORDS, 32)``."""
    row_blocks, blocks = bits.shape[:2]
    axes = _memory_axes(is_wide)
    sizes = (row_blocks, 2, 8, blocks, 2, *(_WIDE if is_wide else _NARROW))
    split = bits.reshape([sizes[axis] for axis in axes])
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return split.permute(back).reshape(row_blocks * OUTPUTS, blocks * INPUTS)


def _memory_axes(is_wide: bool) -> tuple[int, ...]:
    """Of ``(row block, output // 8, output % 8, block, input // 128, …)``, in memory order."""
    pair, lane = ((5, 6, 7, 9), 8) if is_wide else ((5, 6, 7, 8), 9)
    return (0, 3, 2, lane, 1, 4, 10, *pair)


def _packed(bits: Tensor, shape: torch.Size) -> Tensor:
    """Bits ``(words, 2, 16)`` to int32 words ``(…, *shape)``, the first in the lowest bit."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device).view(2, 16)
    # No two bits share a place, so their sum is their union; int32 wraps to the sign bit.
    return (bits.int() << places).sum(dim=(1, 2), dtype=torch.int32).view(-1, *shape)


def _unpacked(words: Tensor) -> Tensor:
    """The bits of int32 words, uint8 ``(…, 32)``, the lowest first."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words[..., None] >> places & 1).to(torch.uint8)
