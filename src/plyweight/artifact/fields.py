"""Fields: each entry of ``__metadata__``, and each tensor's, between its text and its value.

Every ``parse_*`` takes what strict JSON gave and checks it alone; every ``*_fields`` gives back
plain values to write. What one field says about another is checked in ``validate``.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from plyweight.artifact.digests import NO_BYTES
from plyweight.artifact.layout import Alignment, ByteRange
from plyweight.artifact.names import check_name
from plyweight.artifact.records import (
    ITEM_BYTES,
    Activation,
    Layer,
    LayeredWeight,
    ModelInfo,
    TensorEntry,
)
from plyweight.artifact.strict_json import check_integer, check_keys, header_error, shown
from plyweight.codec import MAX_BIT_WIDTH

__all__ = [
    "CODE",
    "DECODE",
    "MAX_LAYER_BYTES",
    "activation_fields",
    "layer_fields",
    "model_fields",
    "parse_activations",
    "parse_alignment",
    "parse_evaluation",
    "parse_io",
    "parse_layers",
    "parse_model",
    "parse_tensors",
    "parse_weights",
    "weight_fields",
]

CODE, DECODE = "sign-magnitude", "half-cell"
MAX_TENSORS = 200_000
MAX_LAYERS = 32
MAX_LAYER_BYTES = 2**44
MAX_RANK, MAX_DIM = 8, 2**40
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 2**16
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 64 * 2**10, 64 * 2**20
DIGEST_BYTES = 32
TENSOR_KEYS = frozenset(("dtype", "shape", "data_offsets"))
IO_KEYS = ("inputs", "outputs", "preprocessing", "labels")

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_DECIMAL = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")
_WIDTHS = {str(width): width for width in range(1, MAX_BIT_WIDTH + 1)}


def parse_tensors(table: dict[str, Any]) -> tuple[TensorEntry, ...]:
    """The tensor table in its order; it is used up, so that nothing large is held twice."""
    if not table:
        raise header_error("the file has no tensors", "layered weights need some")
    _check_count(len(table), "tensors")
    return tuple([_tensor(name, table.pop(name)) for name in list(table)])


def parse_alignment(value: object) -> Alignment:
    """``{"layer": bytes, "tensor": bytes}``."""
    fields = check_keys(value, "layered.align", ("layer", "tensor"))
    layer, tensor = (
        check_integer(fields[key], f"layered.align {key}", MIN_ALIGNMENT, MAX_ALIGNMENT)
        for key in ("layer", "tensor")
    )
    if layer & (layer - 1) or tensor & (tensor - 1) or tensor > layer:
        raise header_error(
            f"layered.align is {layer} for layers and {tensor} for tensors",
            "both are powers of two, and layers are aligned at least as tensors are",
        )
    return Alignment(layer, tensor)


def parse_model(value: object) -> ModelInfo:
    """``{"name", "revision", "created_by", "license", "config_sha256"}``."""
    fields = check_keys(
        value, "layered.model", ("name", "revision", "created_by", "license", "config_sha256")
    )
    license_name, config = fields["license"], fields["config_sha256"]
    return ModelInfo(
        name=check_name(fields["name"], "the model's name"),
        revision=check_integer(fields["revision"], "the model's revision", 0, 2**53),
        created_by=check_name(fields["created_by"], "the model's created_by"),
        license=None if license_name is None else check_name(license_name, "the model's license"),
        config_sha256=None if config is None else _hex_digest(config, "the model's config_sha256"),
    )


def model_fields(model: ModelInfo) -> dict[str, object]:
    """The inverse of :func:`parse_model`."""
    return dict(vars(model))


def parse_weights(value: object) -> dict[str, LayeredWeight]:
    """``{param: {"shape", "group", "code", "decode", "pinned"}}``."""
    if not isinstance(value, dict) or not value:
        raise header_error(
            f"layered.params is {shown(value)}", "it must name at least one layered weight"
        )
    _check_count(len(value), "layered weights")
    return {check_name(name, "a weight's name"): _weight(name, v) for name, v in value.items()}


def weight_fields(weights: Mapping[str, LayeredWeight]) -> dict[str, object]:
    """The inverse of :func:`parse_weights`."""
    return {
        name: {
            "shape": list(weight.shape),
            "group": weight.group_size,
            "code": CODE,
            "decode": DECODE,
            "pinned": weight.pinned,
        }
        for name, weight in weights.items()
    }


def parse_activations(value: object) -> dict[str, Activation]:
    """``{module: {"kind", "bits": {"<weight bit-width>": activation width}}}``."""
    if not isinstance(value, dict):
        raise header_error(f"layered.activations is {shown(value)}", "it must be an object")
    _check_count(len(value), "activations")
    activations = {}
    for module, item in value.items():
        what = f"the activation of {shown(check_name(module, 'a module name', shortest=0))}"
        fields = check_keys(item, what, ("kind", "bits"))
        kind = fields["kind"]
        if kind not in ("unsigned", "signed", "offset"):
            raise header_error(
                f"{what} has kind {shown(kind)}", "the format knows unsigned, signed and offset"
            )
        widths = {
            weight_width: check_integer(a, f"a width of {what}", 1, MAX_BIT_WIDTH)
            for weight_width, a in _by_width(fields["bits"], what).items()
        }
        activations[module] = Activation(kind, widths)
    return activations


def activation_fields(activations: Mapping[str, Activation]) -> dict[str, object]:
    """The inverse of :func:`parse_activations`."""
    return {
        module: {
            "kind": activation.kind,
            "bits": {str(b): a for b, a in activation.bit_widths.items()},
        }
        for module, activation in activations.items()
    }


def parse_layers(value: object, data_start: int) -> tuple[Layer, ...]:
    """``[{"kind", "bits", "bytes", "alg", "sha256", "chunk", "chunks"}, ...]``."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LAYERS:
        raise header_error(
            f"layered.layers is {shown(value)}", f"it must be a list of 1 to {MAX_LAYERS} layers"
        )
    layers: list[Layer] = []
    offset, previous = data_start, 0
    for index, item in enumerate(value):
        layer = _layer(item, index, offset)
        if layer.bit_width <= previous:
            raise header_error(
                f"layer {index} has {layer.bit_width} bits after one of {previous}",
                "bit-widths ascend from layer to layer",
            )
        layers.append(layer)
        offset, previous = layer.byte_range.stop, layer.bit_width
    return tuple(layers)


def layer_fields(layers: Sequence[Layer]) -> list[dict[str, object]]:
    """The inverse of :func:`parse_layers`."""
    return [
        {
            "kind": layer.kind,
            "bits": layer.bit_width,
            "bytes": layer.byte_range.num_bytes,
            "alg": "sha256",
            "sha256": layer.sha256,
            "chunk": layer.chunk_bytes,
            "chunks": base64.b64encode(b"".join(layer.chunk_digests)).decode(),
        }
        for layer in layers
    ]


def parse_evaluation(value: object) -> dict[int, dict[str, str]]:
    """``{"<bit-width>": {metric: "decimal string"}}``."""
    evaluation = {}
    for bit_width, metrics in _by_width(value, "layered.eval").items():
        if not isinstance(metrics, dict):
            raise header_error(f"layered.eval has {shown(metrics)}", "metrics are an object")
        for metric, number in metrics.items():
            check_name(metric, "a metric of layered.eval")
            if not isinstance(number, str) or not _DECIMAL.fullmatch(number):
                raise header_error(
                    f"layered.eval says {shown(metric)} is {shown(number)}",
                    "numbers are decimal strings such as '91.5'",
                )
        evaluation[bit_width] = metrics
    return evaluation


def parse_io(value: object) -> dict[str, Any]:
    """An object with some of ``inputs``, ``outputs``, ``preprocessing``, ``labels``."""
    return dict(check_keys(value, "layered.io", (), IO_KEYS))


def _tensor(name: str, value: object) -> TensorEntry:
    """One entry of the tensor table."""
    check_name(name, "a tensor name")
    what = f"tensor {name!r}"
    fields = check_keys(value, what, TENSOR_KEYS)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise header_error(
            f"{what} has dtype {shown(dtype)}", f"the format knows {', '.join(ITEM_BYTES)}"
        )
    shape = _shape(fields["shape"], what, smallest_dim=0)
    offsets = fields["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise header_error(f"{what} has data_offsets {shown(offsets)}", "they are [start, stop]")
    start, stop = [check_integer(o, f"an offset of {what}", 0, 2**53) for o in offsets]
    num_bytes = _num_bytes(shape, ITEM_BYTES[dtype], what)
    if stop - start != num_bytes:
        raise header_error(
            f"{what} has {stop - start} bytes", f"{dtype} of shape {list(shape)} needs {num_bytes}"
        )
    return TensorEntry(name, dtype, shape, ByteRange(start, stop))


def _weight(name: str, value: object) -> LayeredWeight:
    what = f"weight {shown(name)}"
    fields = check_keys(value, what, ("shape", "group", "code", "decode", "pinned"))
    if fields["code"] != CODE or fields["decode"] != DECODE:
        raise header_error(
            f"{what} has code {shown(fields['code'])} and decode {shown(fields['decode'])}",
            f"version 1 knows {CODE!r} and {DECODE!r}",
        )
    shape = _shape(fields["shape"], what, smallest_dim=1)
    group, pinned = fields["group"], fields["pinned"]
    if not shape or (group is not None and len(shape) < 2):
        raise header_error(
            f"{what} has shape {list(shape)}", "a weight is (out, in, ...), and groups need `in`"
        )
    if group is not None:
        # A group wider than the inputs would let a few bytes ask for much memory at decoding.
        check_integer(group, f"the group of {what}", 1, shape[1])
    if pinned is not None:
        check_integer(pinned, f"the pinned bit-width of {what}", 1, MAX_BIT_WIDTH)
    _num_bytes(shape, 1, what)
    return LayeredWeight(shape, group, pinned)


def _layer(value: object, index: int, start: int) -> Layer:
    what = f"layer {index}"
    fields = check_keys(value, what, ("kind", "bits", "bytes", "alg", "sha256", "chunk", "chunks"))
    kind = "plane" if index else "base"
    if fields["kind"] != kind or fields["alg"] != "sha256":
        raise header_error(
            f"{what} has kind {shown(fields['kind'])} and alg {shown(fields['alg'])}",
            f"this layer's kind is {kind!r} and its digests are 'sha256'",
        )
    bit_width = check_integer(fields["bits"], f"the bit-width of {what}", 1, MAX_BIT_WIDTH)
    num_bytes = check_integer(fields["bytes"], f"the size of {what}", 0, MAX_LAYER_BYTES)
    chunk_bytes = check_integer(
        fields["chunk"], f"the chunk size of {what}", MIN_CHUNK_BYTES, MAX_CHUNK_BYTES
    )
    sha256 = _hex_digest(fields["sha256"], f"the digest of {what}")
    chunk_digests = _digests(fields["chunks"], -(-num_bytes // chunk_bytes), what)
    # Two digests of the same bytes; where there are more chunks, only the bytes can tell.
    if len(chunk_digests) < 2 and sha256 != (b"".join(chunk_digests).hex() or NO_BYTES):
        raise header_error(
            f"the digest of {what} is not that of its only chunk", "they are of the same bytes"
        )
    return Layer(
        kind="plane" if index else "base",
        bit_width=bit_width,
        byte_range=ByteRange(start, start + num_bytes),
        sha256=sha256,
        chunk_bytes=chunk_bytes,
        chunk_digests=chunk_digests,
    )


def _check_count(count: int, what: str) -> None:
    """There are no more of anything that has tensors than there may be tensors."""
    if count > MAX_TENSORS:
        raise header_error(
            f"the file has {count} {what}",
            f"at most {MAX_TENSORS} are read",
            "pack the model as several artifacts",
        )


def _digests(value: object, count: int, what: str) -> tuple[bytes, ...]:
    """``count`` digests from the base64 of all of them."""
    length = -(-count * DIGEST_BYTES // 3) * 4
    if not isinstance(value, str) or len(value) != length:
        raise header_error(
            f"the chunks of {what} are {shown(value)}",
            f"{count} chunks need {length} characters of base64",
        )
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise header_error(
            f"the chunks of {what} are no base64 ({error})", "they must be"
        ) from error
    if base64.b64encode(raw).decode() != value or len(raw) != count * DIGEST_BYTES:
        raise header_error(f"the chunks of {what} are not canonical base64", "they must be")
    return tuple(raw[i : i + DIGEST_BYTES] for i in range(0, len(raw), DIGEST_BYTES))


def _hex_digest(value: object, what: str) -> str:
    if not isinstance(value, str) or not _HEX_DIGEST.fullmatch(value):
        raise header_error(f"{what} is {shown(value)}", "it must be 64 hexadecimal digits")
    return value


def _by_width(value: object, what: str) -> dict[int, Any]:
    """A non-empty object whose keys are bit-widths."""
    if not isinstance(value, dict) or not value or not value.keys() <= _WIDTHS.keys():
        raise header_error(
            f"{what} has {shown(value)}", "it must be an object with bit-widths '1' to '8' as keys"
        )
    return {_WIDTHS[key]: item for key, item in value.items()}


def _shape(value: object, what: str, *, smallest_dim: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        raise header_error(
            f"{what} has shape {shown(value)}", f"a shape is a list of at most {MAX_RANK} integers"
        )
    return tuple(
        [check_integer(dim, f"a dimension of {what}", smallest_dim, MAX_DIM) for dim in value]
    )


def _num_bytes(shape: tuple[int, ...], item_bytes: int, what: str) -> int:
    """Bytes of a tensor; every partial product is bounded, so no reader's integers overflow."""
    num_bytes = item_bytes
    for dim in shape:
        num_bytes *= max(dim, 1)
        if num_bytes > MAX_LAYER_BYTES:
            raise header_error(
                f"{what} of shape {list(shape)} is too large",
                f"at most {MAX_LAYER_BYTES} bytes fit",
            )
    return 0 if 0 in shape else num_bytes
