"""Layout: which bytes belong to what, and how they are aligned.

    data := layer 0, layer 1, ...         every layer starts and ends at a multiple of `layer`
    layer := tensor, gap, tensor, gap     every tensor starts at a multiple of `tensor`

Offsets here count from the start of the data (the byte after the header), which is itself a
multiple of the layer alignment, so what is aligned here is aligned in the file. The smallest
tensor alignment is 8 bytes, the largest item, so every tensor starts at a multiple of its items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENTS", "Alignment", "ByteRange", "align_up", "choose_alignment", "place"]


@dataclass(frozen=True, order=True)
class ByteRange:
    """Half-open: ``stop`` is the first byte left out."""

    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """How many bytes the range holds."""
        return self.stop - self.start

    def shifted(self, offset: int) -> "ByteRange":
        """The same bytes, counted from ``offset`` bytes earlier."""
        return ByteRange(self.start + offset, self.stop + offset)

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclass(frozen=True)
class Alignment:
    """In bytes, powers of two: where layers start and end, and where tensors start."""

    layer: int
    tensor: int


# From the friendliest to memory maps and vector loads down to what costs a tiny model least.
ALIGNMENTS = (
    Alignment(4096, 64),
    Alignment(512, 64),
    Alignment(64, 64),
    Alignment(64, 8),
    Alignment(8, 8),
)
# Padding may be one byte in so many of payload: half a percent.
PAYLOAD_PER_PADDING = 200


def align_up(offset: int, alignment: int) -> int:
    """The first multiple of ``alignment`` that is not below ``offset``."""
    return -(-offset // alignment) * alignment


def place(
    layer_sizes: Sequence[Sequence[int]], alignment: Alignment
) -> tuple[tuple[ByteRange, ...], ...]:
    """Where every tensor of every layer goes, counted from the start of the data.

    Args:
        layer_sizes: bytes of each tensor, layer by layer, in order of the file.
        alignment: of layers and tensors.
    """
    layers, offset = [], 0
    for sizes in layer_sizes:
        ranges = []
        for size in sizes:
            start = align_up(offset, alignment.tensor)
            offset = start + size
            ranges.append(ByteRange(start, offset))
        offset = align_up(offset, alignment.layer)
        layers.append(tuple(ranges))
    return tuple(layers)


def choose_alignment(layer_sizes: Sequence[Sequence[int]]) -> Alignment:
    """The largest alignment whose padding is at most 0.5 % of the payload, else the smallest."""
    payload = sum(map(sum, layer_sizes))
    for alignment in ALIGNMENTS:
        if (_data_bytes(layer_sizes, alignment) - payload) * PAYLOAD_PER_PADDING <= payload:
            return alignment
    return ALIGNMENTS[-1]


def _data_bytes(layer_sizes: Sequence[Sequence[int]], alignment: Alignment) -> int:
    """Bytes of all layers with their padding."""
    offset = 0
    for sizes in layer_sizes:
        for size in sizes:
            offset = align_up(offset, alignment.tensor) + size
        offset = align_up(offset, alignment.layer)
    return offset
