"""Header: what a file holds and where, read from untrusted bytes once.

    | N, 8 bytes little-endian | JSON of N bytes, padded with spaces | data |
    0                          8                                     data_start = 8 + N

Whoever holds a ``Header`` may trust it: its ranges tile the file, its planes fit its weights, and
its digests authenticate every layer. The digest of the header's own bytes is the artifact's name.
"""

import contextlib
import gc
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from plyweight.artifact import fields
from plyweight.artifact.layout import Alignment, ByteRange, align_up
from plyweight.artifact.names import check_name, is_pad, split_name
from plyweight.artifact.records import (
    Activation,
    Layer,
    LayeredWeight,
    ModelInfo,
    TensorEntry,
)
from plyweight.artifact.strict_json import (
    check_keys,
    header_error,
    parse_json,
    shown,
    to_json,
)
from plyweight.artifact.validate import validate
from plyweight.errors import BitWidthError, TruncatedError, VersionError

__all__ = ["LENGTH_BYTES", "MAX_HEADER_BYTES", "VERSION", "Header", "header_bytes"]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 2**20
VERSION = "1"
KNOWN_FEATURES: frozenset[str] = frozenset()  # of `layered.requires`; version 1 has none
EXTENSION = "layered.x-"
REQUIRED_KEYS = (
    "format",
    "layered.version",
    "layered.requires",
    "layered.model",
    "layered.align",
    "layered.params",
    "layered.activations",
    "layered.layers",
)
OPTIONAL_KEYS = ("layered.eval", "layered.io")


def header_bytes(first: bytes | bytearray | memoryview) -> int:
    """How long the header is, from the file's first 8 bytes: where the data starts.

    Raises:
        HeaderError: If it claims to be longer than 16 MiB or too short for JSON.
        TruncatedError: If there are fewer than 8 bytes.
    """
    if len(first) < LENGTH_BYTES:
        raise TruncatedError(
            f"the file ends after {len(first)} bytes, but its header starts with {LENGTH_BYTES}; "
            "fetch it again."
        )
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if not LENGTH_BYTES <= length <= MAX_HEADER_BYTES:
        raise header_error(
            f"the header claims {length} bytes",
            f"{LENGTH_BYTES} to {MAX_HEADER_BYTES} are read",
            "check that this is an artifact",
        )
    return LENGTH_BYTES + length


@dataclass(frozen=True)
class Header:
    """What an artifact holds.

    Attributes:
        alignment: of layers and tensors.
        model: whose weights these are.
        weights: the layered weights by parameter name.
        activations: how inputs are quantized, by module name.
        layers: base first.
        tensors: of the whole file in its order, padding included.
        evaluation: metrics by bit-width, as decimal strings; informative.
        io: inputs, outputs, preprocessing and labels, as plain values; None if not stated.
        requires: features a reader must know.
        extensions: the ``layered.x-*`` fields, which a reader may ignore.
        data_start: bytes of the header; 0 in one that is yet to be written.
        artifact_id: hexadecimal sha256 of those bytes; empty in one that is yet to be written.
    """

    alignment: Alignment
    model: ModelInfo
    weights: Mapping[str, LayeredWeight]
    activations: Mapping[str, Activation]
    layers: tuple[Layer, ...]
    tensors: tuple[TensorEntry, ...]
    evaluation: Mapping[int, Mapping[str, str]] | None = None
    io: Mapping[str, Any] | None = None
    requires: tuple[str, ...] = ()
    extensions: Mapping[str, str] | None = None
    data_start: int = 0
    artifact_id: str = ""

    @classmethod
    def parse(cls, raw: bytes | bytearray | memoryview) -> "Header":
        """Read untrusted bytes once; what follows the header in ``raw`` is ignored.

        Raises:
            HeaderError: If the header breaks a rule of ``docs/format.md``.
            VersionError: If it needs a newer reader.
            TruncatedError: If ``raw`` ends inside it.
        """
        data_start = header_bytes(raw)
        if len(raw) < data_start:
            raise TruncatedError(
                f"the header has {data_start} bytes, but only {len(raw)} are there; "
                "fetch the file again."
            )
        with _uncollected():
            return cls._parse(bytes(raw[:data_start]))

    @classmethod
    def _parse(cls, raw: bytes) -> "Header":
        data_start = len(raw)
        table = _parse_table(raw[LENGTH_BYTES:])
        metadata = _metadata(table.pop("__metadata__", None))
        alignment = fields.parse_alignment(_embedded(metadata, "layered.align"))
        if data_start % alignment.layer:
            raise header_error(
                f"the data starts at byte {data_start}",
                f"it must start at a multiple of {alignment.layer}",
            )
        layers = fields.parse_layers(_embedded(metadata, "layered.layers"), data_start)
        weights = fields.parse_weights(_embedded(metadata, "layered.params"))
        activations = fields.parse_activations(_embedded(metadata, "layered.activations"))
        tensors = fields.parse_tensors(table)
        validate(tensors, layers, alignment=alignment, weights=weights, activations=activations)
        return cls(
            alignment=alignment,
            model=fields.parse_model(_embedded(metadata, "layered.model")),
            weights=weights,
            activations=activations,
            layers=layers,
            tensors=tensors,
            evaluation=_evaluation(metadata, layers),
            io=fields.parse_io(_embedded(metadata, "layered.io"))
            if "layered.io" in metadata
            else None,
            extensions={k: v for k, v in metadata.items() if k.startswith(EXTENSION)} or None,
            data_start=data_start,
            artifact_id=hashlib.sha256(raw).hexdigest(),
        )

    def emit(self) -> bytes:
        """The header's bytes, always the same for the same content."""
        table: dict[str, object] = {"__metadata__": self._metadata_fields()}
        for entry in self.tensors:
            table[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [entry.byte_range.start, entry.byte_range.stop],
            }
        text = _in_order(table).encode()
        end = align_up(LENGTH_BYTES + len(text), self.alignment.layer)
        text = text.ljust(end - LENGTH_BYTES, b" ")
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """The bit-widths that are stored, ascending."""
        return tuple(layer.bit_width for layer in self.layers)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.layers[-1].byte_range.stop

    @property
    def num_weights(self) -> int:
        """How many layered weights there are, over all parameters."""
        return sum(weight.num_weights for weight in self.weights.values())

    def layer_index(self, bit_width: int) -> int:
        """Which layer completes ``bit_width``.

        Raises:
            BitWidthError: If that bit-width is not stored.
        """
        if type(bit_width) is not int or bit_width not in self.bit_widths:
            raise BitWidthError(bit_width, stored=self.bit_widths, where=self.model.name)
        return self.bit_widths.index(bit_width)

    def layers_for(self, bit_width: int) -> tuple[Layer, ...]:
        """The layers that ``bit_width`` needs, base first.

        Raises:
            BitWidthError: If that bit-width is not stored.
        """
        return self.layers[: self.layer_index(bit_width) + 1]

    def prefix_bytes(self, bit_width: int) -> int:
        """How many first bytes of the file ``bit_width`` needs, header included.

        Raises:
            BitWidthError: If that bit-width is not stored.
        """
        return self.layers_for(bit_width)[-1].byte_range.stop

    def tensors_of(self, layer_index: int) -> tuple[TensorEntry, ...]:
        """The tensors of one layer in order of the file, padding included."""
        first, last = self._bounds[layer_index], self._bounds[layer_index + 1]
        return self.tensors[first:last]

    def file_range(self, entry: TensorEntry) -> ByteRange:
        """The bytes of a tensor, counted from the start of the file."""
        return entry.byte_range.shifted(self.data_start)

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        """Index of each layer's first tensor, and of the end."""
        # A tensor without bytes may stand on either side of a boundary; its name decides.
        starts = [entry.byte_range.start for entry in self.tensors]
        bounds = []
        for index, layer in enumerate(self.layers):
            position = bisect_left(starts, layer.byte_range.start - self.data_start)
            while position < len(starts) and _is_earlier(self.tensors[position], index):
                position += 1
            bounds.append(position)
        return (*bounds, len(starts))

    def _metadata_fields(self) -> dict[str, str]:
        metadata = {
            "format": "pt",
            "layered.version": VERSION,
            "layered.requires": to_json(list(self.requires)),
            "layered.model": to_json(fields.model_fields(self.model)),
            "layered.align": to_json(vars(self.alignment)),
            "layered.params": to_json(fields.weight_fields(self.weights)),
            "layered.activations": to_json(fields.activation_fields(self.activations)),
            "layered.layers": to_json(fields.layer_fields(self.layers)),
        }
        if self.evaluation is not None:
            by_width = {str(b): dict(metrics) for b, metrics in self.evaluation.items()}
            metadata["layered.eval"] = to_json(by_width)
        if self.io is not None:
            metadata["layered.io"] = to_json(dict(self.io))
        return metadata | dict(sorted((self.extensions or {}).items()))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause Python's search for cycles.

    No record of a header refers back to another, so there is nothing to find; but the search walks
    over all of them each time they have grown by a quarter, which takes a third of the time that a
    header of 16 MiB takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parse_table(raw: bytes) -> dict[str, Any]:
    """The JSON object of the header, without its padding."""
    text = raw.rstrip(b" ")
    if not text.startswith(b"{") or not text.endswith(b"}"):
        raise header_error(
            f"the header starts with {shown(raw[:1])} and ends with {shown(text[-1:])}",
            "it is one JSON object followed by spaces only",
            "check that this is an artifact",
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise header_error(f"the header is no UTF-8 ({error})", "JSON is") from error
    table = parse_json(decoded, "the header")
    if not isinstance(table, dict):
        raise header_error(f"the header is {shown(table)}", "it must be an object")
    return table


def _metadata(value: object) -> Mapping[str, str]:
    """``__metadata__`` once its version, features and keys are known to be ours."""
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise header_error(f"__metadata__ is {shown(value)}", "it must map strings to strings")
    if "layered.version" not in value:
        raise header_error(
            "__metadata__ has no 'layered.version'",
            "a layered artifact states one",
            "check that this is an artifact and not another safetensors file",
        )
    if value["layered.version"] != VERSION:  # before anything whose meaning depends on it
        raise VersionError(
            f"the artifact has version {shown(value['layered.version'])}, but this reader knows "
            f"{VERSION!r}; install a newer plyweight."
        )
    _check_requires(value)
    extensions = [check_name(key, "a key") for key in value if key.startswith(EXTENSION)]
    check_keys(value, "__metadata__", REQUIRED_KEYS, (*OPTIONAL_KEYS, *extensions))
    if value["format"] != "pt":
        raise header_error(f"the format is {shown(value['format'])}", "it must be 'pt'")
    return value


def _check_requires(metadata: Mapping[str, str]) -> None:
    requires = parse_json(metadata.get("layered.requires", "null"), "layered.requires")
    if not isinstance(requires, list) or not all(isinstance(f, str) for f in requires):
        raise header_error(f"layered.requires is {shown(requires)}", "it must be a list of names")
    unknown = [feature for feature in requires if feature not in KNOWN_FEATURES]
    if unknown:
        raise VersionError(
            f"the artifact requires {shown(unknown[0])}, but this reader knows no such feature; "
            "install a newer plyweight."
        )


def _embedded(metadata: Mapping[str, str], key: str) -> Any:
    """The value of the JSON text under ``key``."""
    return parse_json(metadata[key], key)


def _evaluation(
    metadata: Mapping[str, str], layers: tuple[Layer, ...]
) -> dict[int, dict[str, str]] | None:
    if "layered.eval" not in metadata:
        return None
    evaluation = fields.parse_evaluation(_embedded(metadata, "layered.eval"))
    stored = {layer.bit_width for layer in layers}
    if not evaluation.keys() <= stored:
        raise header_error(
            f"layered.eval speaks of {sorted(evaluation)} bits", f"{sorted(stored)} are stored"
        )
    return evaluation


def _is_earlier(entry: TensorEntry, layer_index: int) -> bool:
    return not is_pad(entry.name) and split_name(entry.name)[0] < layer_index


def _in_order(table: Mapping[str, object]) -> str:
    """Compact JSON whose keys keep their order, which is that of the file."""
    return json.dumps(table, separators=(",", ":"))
