"""Receipt: what every bit-width costs in bytes, everything counted.

It is derived from the file alone, so a size in a table can be checked by whoever has the file.
"""

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from plyweight.artifact.header import Header
from plyweight.artifact.names import is_pad, roles_of, split_name
from plyweight.artifact.reader import ArtifactReader
from plyweight.artifact.source import Source

__all__ = ["LayerReceipt", "Receipt", "inspect", "receipt_of"]


@dataclass(frozen=True)
class LayerReceipt:
    """One line: a layer, and the file up to its end.

    Attributes:
        bit_width: of the model with this layer and those before it.
        held: whether the source has this layer.
        num_bytes: of the layer; the sum of the next three.
        plane_bytes: of the weights' planes.
        side_bytes: of everything else: scales, gains, steps, zero points, plain tensors, the graph.
        padding_bytes: of zeros for alignment.
        total_bytes: from the first byte of the file, header included.
        bits_per_weight: ``8 * total_bytes`` for each layered weight.
        sha256: hexadecimal digest of the layer, as the header states it.
    """

    bit_width: int
    held: bool
    num_bytes: int
    plane_bytes: int
    side_bytes: int
    padding_bytes: int
    total_bytes: int
    bits_per_weight: float
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """What an artifact consists of.

    Attributes:
        artifact_id: hexadecimal sha256 of the header.
        header_bytes: of the header, its padding included.
        num_weights: layered weights, over all parameters.
        num_layered: parameters that are layered.
        num_tensors: tensors in the file, padding not counted.
        layers: one line each, base first.
    """

    artifact_id: str
    header_bytes: int
    num_weights: int
    num_layered: int
    num_tensors: int
    layers: tuple[LayerReceipt, ...]

    @property
    def held(self) -> tuple[int, ...]:
        """The bit-widths whose layers the source has."""
        return tuple(layer.bit_width for layer in self.layers if layer.held)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]} | {
            "held": list(self.held)
        }


def inspect(path_or_source: str | os.PathLike[str] | Source) -> Receipt:
    """What an artifact on this machine consists of; only its header is read.

    Args:
        path_or_source: a file, the folder of a split artifact or its ``layers.json``, or a source
            of bytes.

    Raises:
        SourceError: If it cannot be opened or read.
        ArtifactError: If the header is wrong, or the source does not end where a layer does.
    """
    reader = ArtifactReader(path_or_source)
    return receipt_of(reader.header, reader.held_bit_widths)


def receipt_of(header: Header, held_bit_widths: Collection[int]) -> Receipt:
    """The receipt of an artifact, of which only the header may be here.

    Args:
        header: of the artifact.
        held_bit_widths: whose layers its source has.
    """
    return Receipt(
        artifact_id=header.artifact_id,
        header_bytes=header.data_start,
        num_weights=header.num_weights,
        num_layered=len(header.weights),
        num_tensors=sum(not is_pad(entry.name) for entry in header.tensors),
        layers=tuple(
            _line(header, index, held=layer.bit_width in held_bit_widths)
            for index, layer in enumerate(header.layers)
        ),
    )


def _line(header: Header, index: int, *, held: bool) -> LayerReceipt:
    layer = header.layers[index]
    roles = roles_of(header.weights, header.activations)
    planes = padding = 0
    for entry in header.tensors_of(index):
        if is_pad(entry.name):
            padding += entry.byte_range.num_bytes
            continue
        role = roles.get(split_name(entry.name)[1])
        if role is not None and role.kind == "planes":
            planes += entry.byte_range.num_bytes
    total = layer.byte_range.stop
    return LayerReceipt(
        bit_width=layer.bit_width,
        held=held,
        num_bytes=layer.byte_range.num_bytes,
        plane_bytes=planes,
        side_bytes=layer.byte_range.num_bytes - planes - padding,
        padding_bytes=padding,
        total_bytes=total,
        bits_per_weight=8 * total / header.num_weights,
        sha256=layer.sha256,
    )
