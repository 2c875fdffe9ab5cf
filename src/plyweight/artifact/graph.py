"""Graph: the computation of a model without its weights, as the tensor ``L0/__graph__`` holds it.

    zlib( n, u64 | JSON of n bytes | ONNX model | ONNX model ... )        docs/format.md, section 9

A model's initializers that depend on the bit-width are slots, empty places with names; the JSON
says for each name which tensors of the artifact fill it. So one graph serves every bit-width, and

    Graph.from_bytes(graph.to_bytes()) == graph

The ONNX models are bytes here. What is read is bounded and checked like a header; whoever holds
a ``Graph`` of an artifact asks :meth:`Graph.check` whether the artifact has what the graph names.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from plyweight.artifact.graph_fields import (
    MAX_GRAPH_BYTES,
    Model,
    Module,
    Port,
    Quantizer,
    model_fields,
    module_fields,
    parse_models,
    parse_modules,
    parse_ports,
    parse_quantizers,
    parse_tensor_names,
    port_fields,
    quantizer_fields,
)
from plyweight.artifact.header import Header
from plyweight.artifact.names import is_output, is_pad, roles_of, split_name
from plyweight.artifact.records import TensorEntry
from plyweight.artifact.strict_json import (
    check_keys,
    header_error,
    parse_json,
    shown,
    to_json,
)
from plyweight.errors import HeaderError, VersionError

__all__ = ["GRAPH_VERSION", "Graph", "Slot"]

GRAPH_VERSION = 2  # the newest; what has no groups is written as version 1, as it always was
MAX_TEXT_BYTES = 16 * 2**20  # of JSON, as of a header
LENGTH_BYTES = 8
KEYS = ("version", "models", "inputs", "outputs", "modules", "quantizers", "tensors")
FLOATS = ("F16", "BF16", "F32", "F64")

MODULE_LEAVES = ("levels", "scale", "zero_point", "bias", "bias_scale")
QUANTIZER_LEAVES = ("step", "zero_point", "highest")


@dataclass(frozen=True)
class Slot:
    """What an initializer is to be filled with.

    Attributes:
        kind: of the owner.
        owner: prefix of a module or quantizer, or the name of a plain tensor of the artifact.
        leaf: which of the owner's values; "" for a tensor.
    """

    kind: Literal["module", "quantizer", "tensor"]
    owner: str
    leaf: str = ""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The computation of an artifact's model, without its weights.

    Attributes:
        models: each for some bit-widths, no bit-width twice.
        inputs, outputs: of every model.
        modules, quantizers: by prefix of their slots' names.
        tensors: the artifact's plain tensor, by name of the slot.

    Raises:
        HeaderError: If bit-widths or names contradict each other.
    """

    models: tuple[Model, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    modules: Mapping[str, Module]
    quantizers: Mapping[str, Quantizer]
    tensors: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.models:
            raise header_error("the graph has no models", "it needs one or more")
        widths = [bit_width for model in self.models for bit_width in model.bit_widths]
        if len(set(widths)) < len(widths):
            raise header_error(
                f"the graph's models are for {sorted(widths)} bits", "each bit-width has one model"
            )
        for prefix, module in self.modules.items():
            if module.input is not None and module.input not in self.quantizers:
                raise header_error(
                    f"module {shown(prefix)} of the graph reads {shown(module.input)}",
                    "that must be one of its quantizers",
                )
        for model in self.models:
            for name in model.slots:
                if name not in self.slots:
                    raise header_error(
                        f"the graph has a slot {shown(name)}",
                        "none of its modules, quantizers and tensors fills it",
                    )

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Every name that a slot may have, and what fills it."""
        slots: dict[str, Slot] = {}
        for name, slot in self._all_slots():
            if name in slots:
                raise header_error(
                    f"the graph's slot {shown(name)} belongs to both {shown(slots[name].owner)} "
                    f"and {shown(slot.owner)}",
                    "a name means one thing",
                )
            slots[name] = slot
        return slots

    def _all_slots(self) -> Iterator[tuple[str, Slot]]:
        for prefix, module in self.modules.items():
            for leaf in MODULE_LEAVES:
                if leaf != "bias_scale" or module.group_size is None:
                    yield f"{prefix}.{leaf}", Slot("module", prefix, leaf)
        for prefix in self.quantizers:
            for leaf in QUANTIZER_LEAVES:
                yield f"{prefix}.{leaf}", Slot("quantizer", prefix, leaf)
        for name, tensor in self.tensors.items():
            yield name, Slot("tensor", tensor)

    def model_for(self, bit_width: int) -> Model:
        """The model that ``bit_width`` computes with; it must be one that the artifact stores."""
        return next(model for model in self.models if bit_width in model.bit_widths)

    def weight_read_with(self, prefix: str, header: Header) -> str | None:
        """The layered weight whose bit-width decides about that of quantizer ``prefix``.

        It is the ``<activation>.weight`` of the artifact, or else that of the first module of the
        graph, by prefix, that reads it; None for a quantizer of neither, or without activation.
        """
        activation = self.quantizers[prefix].activation
        if activation is None:
            return None
        own = f"{activation}.weight" if activation else "weight"
        if own in header.weights:
            return own
        readers = [name for name, module in self.modules.items() if module.input == prefix]
        return self.modules[min(readers)].param if readers else None

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "Graph":
        """Read untrusted bytes, those of the tensor ``L0/__graph__``.

        Raises:
            HeaderError: If they break a rule.
            VersionError: If the graph needs a newer reader.
        """
        content = _unpacked(data)
        length = int.from_bytes(content[:LENGTH_BYTES], "little")
        if len(content) < LENGTH_BYTES or length > MAX_TEXT_BYTES:
            raise header_error(
                f"the graph has {len(content)} bytes, and claims {length} of JSON",
                f"it starts with {LENGTH_BYTES} bytes of length, of at most {MAX_TEXT_BYTES}",
            )
        end = LENGTH_BYTES + length
        if end > len(content):
            raise header_error(
                f"the graph claims {length} bytes of JSON",
                f"{len(content) - LENGTH_BYTES} bytes are there",
            )
        try:
            text = content[LENGTH_BYTES:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise header_error(f"the graph's text is no UTF-8 ({error})", "JSON is") from error
        fields = _versioned(parse_json(text, "the graph"))
        return cls(
            models=parse_models(fields["models"], memoryview(content)[end:]),
            inputs=parse_ports(fields["inputs"], "inputs"),
            outputs=parse_ports(fields["outputs"], "outputs"),
            modules=parse_modules(fields["modules"], has_groups=fields["version"] > 1),
            quantizers=parse_quantizers(fields["quantizers"]),
            tensors=parse_tensor_names(fields["tensors"]),
        )

    def to_bytes(self) -> bytes:
        """The tensor's bytes; the same graph always gives the same, with the same zlib.

        Raises:
            HeaderError: If no reader would accept them.
        """
        has_groups = any(module.group_size is not None for module in self.modules.values())
        fields = {
            "version": 2 if has_groups else 1,
            "models": model_fields(self.models),
            "inputs": port_fields(self.inputs),
            "outputs": port_fields(self.outputs),
            "modules": module_fields(self.modules, has_groups=has_groups),
            "quantizers": quantizer_fields(self.quantizers),
            "tensors": dict(self.tensors),
        }
        text = to_json(fields).encode()
        parts = [len(text).to_bytes(LENGTH_BYTES, "little"), text, *(m.data for m in self.models)]
        packed = zlib.compress(b"".join(parts), 9)
        Graph.from_bytes(packed)  # what would be refused is not written
        return packed

    def check(self, header: Header) -> None:
        """Whether the artifact of ``header`` has what the graph names, in fitting shapes.

        Raises:
            HeaderError: If it does not.
        """
        _Checker(self, header).check()


class _Checker:
    """What a graph says about an artifact, against the artifact's header."""

    def __init__(self, graph: Graph, header: Header) -> None:
        self._graph, self._header = graph, header
        reserved = roles_of(header.weights, header.activations)
        self._plain: dict[str, TensorEntry] = {
            name: entry
            for entry in header.tensors_of(0)
            if not is_pad(entry.name)
            and (name := split_name(entry.name)[1]) not in reserved
            and not name.startswith("__")
        }

    def check(self) -> None:
        widths = sorted(b for model in self._graph.models for b in model.bit_widths)
        if tuple(widths) != self._header.bit_widths:
            raise header_error(
                f"the graph has models for {widths} bits",
                f"the artifact stores {list(self._header.bit_widths)}",
            )
        for prefix, module in self._graph.modules.items():
            self._check_module(f"module {shown(prefix)} of the graph", module)
        for prefix, quantizer in self._graph.quantizers.items():
            self._check_quantizer(f"quantizer {shown(prefix)} of the graph", prefix, quantizer)
        for name, tensor in self._graph.tensors.items():
            self._require_plain(f"slot {shown(name)} of the graph", tensor)

    def _check_module(self, what: str, module: Module) -> None:
        weight = self._header.weights.get(module.param)
        if weight is None:
            raise _lacks(what, module.param, "layered weight")
        num_channels = weight.shape[0]
        group_size = None if weight.scale_shape[1:] in ((), (1,)) else weight.group_size
        if module.group_size != group_size:
            raise header_error(
                f"{what} uses {shown(module.param)} in groups of {module.group_size} inputs",
                f"the artifact has it in groups of {group_size}",
            )
        if group_size is not None and module.input is not None:
            raise header_error(
                f"{what} has groups of inputs, which {shown(module.input)} quantizes",
                "sums of integers have one scale for each output channel",
            )
        if module.is_transposed and len(weight.shape) != 2:
            raise header_error(
                f"{what} transposes {shown(module.param)} of shape {list(weight.shape)}",
                "only two dimensions can be exchanged",
            )
        if module.bias is not None:
            self._require_vector(what, module.bias, num_channels)
        if module.norm is not None:
            for leaf in ("running_mean", "running_var"):
                self._require_vector(what, f"{module.norm.name}.{leaf}", num_channels)
            for leaf in ("weight", "bias"):  # absent where the norm is not affine
                if f"{module.norm.name}.{leaf}" in self._plain:
                    self._require_vector(what, f"{module.norm.name}.{leaf}", num_channels)

    def _check_quantizer(self, what: str, prefix: str, quantizer: Quantizer) -> None:
        if quantizer.activation is None:
            for given in (tuple(quantizer.steps), tuple(quantizer.zero_points)):
                if given != self._header.bit_widths:
                    raise header_error(
                        f"{what} has values for {list(given)} bits",
                        f"the artifact stores {list(self._header.bit_widths)}",
                    )
            return
        activation = self._header.activations.get(quantizer.activation)
        if activation is None:
            raise _lacks(what, quantizer.activation, "activation")
        weight = None
        if not is_output(quantizer.activation):
            param = self._graph.weight_read_with(prefix, self._header)
            weight = self._header.weights.get(param) if param is not None else None
            if weight is None:
                raise header_error(f"no module reads {what}", "its bit-width is that of a weight's")
        for bit_width in self._header.bit_widths:
            own = bit_width if weight is None else weight.width_at(bit_width)
            if own not in activation.bit_widths:
                raise header_error(
                    f"the activation {shown(quantizer.activation)} has no width for {own} bits",
                    f"{what} needs one",
                )
            if activation.kind == "signed" and activation.bit_widths[own] == 1:
                raise header_error(
                    f"{what} has a signed activation of 1 bit",
                    "its two levels, -1/2 and 1/2, are on no integer grid",
                    "train it with 2 bits or more, or without a graph",
                )

    def _require_plain(self, what: str, name: str) -> TensorEntry:
        entry = self._plain.get(name)
        if entry is None:
            raise _lacks(what, name, "plain tensor")
        return entry

    def _require_vector(self, what: str, name: str, length: int) -> None:
        entry = self._require_plain(what, name)
        if entry.dtype not in FLOATS or entry.shape != (length,):
            raise header_error(
                f"{what} uses {shown(name)}, {entry.dtype} of shape {list(entry.shape)}",
                f"it must be floats of shape {[length]}",
            )


def _lacks(what: str, name: str, kind: str) -> HeaderError:
    return header_error(f"{what} uses {shown(name)}", f"the artifact has no such {kind}")


def _unpacked(data: bytes | bytearray | memoryview) -> bytes:
    """The content of one zlib stream, of bounded size."""
    stream = zlib.decompressobj()
    try:
        # No more memory is taken than one byte above the limit.
        content = stream.decompress(data, MAX_GRAPH_BYTES + 1)
    except zlib.error as error:
        raise header_error(f"the graph is no zlib stream ({error})", "it must be") from error
    if len(content) > MAX_GRAPH_BYTES:
        raise header_error(
            f"the graph's {len(data)} bytes unpack to more than {MAX_GRAPH_BYTES}",
            "no more are read",
        )
    if not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise header_error(
            "the graph's zlib stream ends too early or has bytes after it", "it must end with it"
        )
    return content


def _versioned(value: Any) -> Mapping[str, Any]:
    """The JSON object, once its version is known to be ours."""
    if not isinstance(value, dict) or "version" not in value:
        raise header_error(f"the graph is {shown(value)}", "it is an object with a version")
    # Before anything whose meaning depends on it.
    if type(value["version"]) is not int or not 1 <= value["version"] <= GRAPH_VERSION:
        raise VersionError(
            f"the graph has version {shown(value['version'])}, but this reader knows "
            f"1 to {GRAPH_VERSION}; install a newer plyweight."
        )
    return check_keys(value, "the graph", KEYS)
