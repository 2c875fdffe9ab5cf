"""Records: what a header says, as values.

They hold what is already checked (or about to be written); the checks are in ``fields`` (one
field at a time) and ``validate`` (fields against each other).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from plyweight.artifact.layout import ByteRange
from plyweight.codec import plane_bytes

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "ITEM_BYTES",
    "Activation",
    "ActivationKind",
    "Layer",
    "LayerKind",
    "LayeredWeight",
    "ModelInfo",
    "TensorEntry",
]

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F64": 8,
    "I64": 8,
}
DEFAULT_CHUNK_BYTES = 8 * 2**20  # what object stores advise for one range request

ActivationKind = Literal["unsigned", "signed", "offset"]
LayerKind = Literal["base", "plane"]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file.

    Attributes:
        name: in the file, ``L<i>/...`` or ``__pad__.<n>``.
        dtype: a key of ``ITEM_BYTES``.
        shape: of the tensor; empty for a scalar.
        byte_range: counted from the start of the data, as safetensors does.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    byte_range: ByteRange


@dataclass(frozen=True)
class LayeredWeight:
    """A weight that is stored as planes.

    Attributes:
        shape: ``(out, in, ...)``.
        group_size: inputs that share a scale; None for one scale per output channel.
        pinned: the least bit-width this weight ever has; None for that of the layer.
    """

    shape: tuple[int, ...]
    group_size: int | None = None
    pinned: int | None = None

    @property
    def num_weights(self) -> int:
        """How many weights there are."""
        return prod(self.shape)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return plane_bytes(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """``(out,)``, or ``(out, ceil(in / group_size))`` with groups."""
        if self.group_size is None:
            return self.shape[:1]
        return self.shape[0], -(-self.shape[1] // self.group_size)

    def width_at(self, layer_bit_width: int) -> int:
        """This weight's own bit-width where the layers together have ``layer_bit_width``."""
        return max(layer_bit_width, self.pinned or 0)

    def planes_in(self, layer_bit_width: int, previous_bit_width: int) -> int:
        """Planes in the layer that leads from ``previous_bit_width`` (0: none) to its own."""
        before = self.width_at(previous_bit_width) if previous_bit_width else 0
        return self.width_at(layer_bit_width) - before


@dataclass(frozen=True)
class Activation:
    """How the input of a module is quantized.

    Attributes:
        kind: "unsigned" (zero point 0), "signed" (zero point ``2^(a-1)``) or "offset" (stored).
        bit_widths: the activation's width ``a`` for each of its module's weight bit-widths.
    """

    kind: ActivationKind
    bit_widths: Mapping[int, int]


@dataclass(frozen=True)
class Layer:
    """One contiguous run of the file: what a step from one bit-width to the next adds.

    Attributes:
        kind: "base" for the first layer, "plane" for those that refine it.
        bit_width: of the model once this layer and those before it are there.
        byte_range: in the file (counted from its first byte, unlike that of a tensor).
        sha256: hexadecimal digest of the layer.
        chunk_bytes: the unit of verification and of range requests; the last chunk may be shorter.
        chunk_digests: 32 bytes each.
    """

    kind: LayerKind
    bit_width: int
    byte_range: ByteRange
    sha256: str
    chunk_bytes: int
    chunk_digests: tuple[bytes, ...]

    @property
    def num_chunks(self) -> int:
        """How many chunks the layer is cut into."""
        return -(-self.byte_range.num_bytes // self.chunk_bytes)

    def chunk_range(self, index: int) -> ByteRange:
        """The bytes of chunk ``index`` in the file."""
        start = self.byte_range.start + index * self.chunk_bytes
        return ByteRange(start, min(start + self.chunk_bytes, self.byte_range.stop))


@dataclass(frozen=True)
class ModelInfo:
    """Whose weights these are.

    Attributes:
        name: of the model.
        revision: counts up with every publication under that name.
        created_by: the program that wrote the artifact.
        license: an identifier, or None.
        config_sha256: hexadecimal digest of the configuration the model is built from, or None.
    """

    name: str
    revision: int
    created_by: str
    license: str | None = None
    config_sha256: str | None = None
