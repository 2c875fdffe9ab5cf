"""Graph fields: what the JSON of a graph says, as values, and back.

Every ``parse_*`` takes what strict JSON gave and checks it alone; every ``*_fields`` gives back
plain values to write. What one field says about another, or about the artifact, is for ``graph``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from plyweight.artifact.names import check_name
from plyweight.artifact.strict_json import check_integer, check_keys, header_error, shown
from plyweight.codec import MAX_BIT_WIDTH

__all__ = [
    "MAX_GRAPH_BYTES",
    "PORT_DTYPES",
    "Model",
    "Module",
    "Norm",
    "Port",
    "Quantizer",
    "model_fields",
    "module_fields",
    "parse_models",
    "parse_modules",
    "parse_ports",
    "parse_quantizers",
    "parse_tensor_names",
    "port_fields",
    "quantizer_fields",
]

MAX_GRAPH_BYTES = 64 * 2**20  # unpacked; a hundredth of it is much
# As numpy spells them.
PORT_DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool")
MAX_RANK, MAX_DIM = 8, 2**40
MAX_ITEMS = 200_000  # as many tensors as an artifact may have

# What Python writes for a finite float that is not negative; nothing that takes long to read.
_NUMBER = re.compile(r"[0-9]{1,24}(\.[0-9]{1,24})?(e[+-]?[0-9]{1,3})?")
MODULE_KEYS = ("param", "bias", "norm", "input", "is_transposed")
GROUP_KEYS = ("group",)  # since version 2
_WIDTHS = {str(width): width for width in range(1, MAX_BIT_WIDTH + 1)}


@dataclass(frozen=True)
class Port:
    """An input or output of the graph.

    Attributes:
        name: of it.
        dtype: one of ``PORT_DTYPES``.
        shape: numbers, and names of dimensions that may have any length.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Norm:
    """A batch norm that is folded into the module before it.

    Attributes:
        name: of the module whose tensors ``<name>.weight``, ``.bias``, ``.running_mean`` and
            ``.running_var`` the artifact has; the first two are 1 and 0 where it has none.
        eps: that is added to the variance.
    """

    name: str
    eps: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """An ONNX model.

    Attributes:
        bit_widths: that compute with it, ascending.
        slots: names of its initializers that are filled per bit-width, in the model's order.
        data: a serialized ONNX ModelProto.
    """

    bit_widths: tuple[int, ...]
    slots: tuple[str, ...]
    data: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Module:
    """A convolution or product with a layered weight.

    Attributes:
        param: the layered weight, a key of ``layered.params``.
        bias: a plain tensor of the artifact; None for 0.
        norm: the batch norm that follows it, if one does.
        input: prefix of the quantizer of its input; None where that is a float.
        is_transposed: whether the graph has the weight as ``(in, out)``.
        group_size: inputs that share a scale; None for one scale per output channel.
    """

    param: str
    bias: str | None = None
    norm: Norm | None = None
    input: str | None = None
    is_transposed: bool = False
    group_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A grid that activations are rounded to: one of the artifact's, or one of its own.

    Attributes:
        activation: a key of ``layered.activations``; None for a grid of its own, of 8 bits.
        steps: of a grid of its own, by the model's bit-width.
        zero_points: the same, 0 to 255.
    """

    activation: str | None = None
    steps: Mapping[int, float] = field(default_factory=dict)
    zero_points: Mapping[int, int] = field(default_factory=dict)


def _widths(value: object, what: str) -> tuple[int, ...]:
    """``[2, 3, 8]``: ascending bit-widths, at least one."""
    if not isinstance(value, list) or not value:
        raise header_error(f"the bit-widths of {what} are {shown(value)}", "they must be a list")
    widths = tuple(check_integer(b, f"a bit-width of {what}", 1, MAX_BIT_WIDTH) for b in value)
    if list(widths) != sorted(set(widths)):
        raise header_error(f"the bit-widths of {what} are {list(widths)}", "they must ascend")
    return widths


def parse_models(value: object, data: memoryview) -> tuple[Model, ...]:
    """``[{"bit_widths", "num_bytes", "slots"}, ...]`` with the bytes that follow the text."""
    if not isinstance(value, list):
        raise header_error(f"the graph's models are {shown(value)}", "they must be a list")
    models, offset = [], 0
    for index, item in enumerate(value):
        what = f"model {index} of the graph"
        fields = check_keys(item, what, ("bit_widths", "num_bytes", "slots"))
        size = check_integer(fields["num_bytes"], f"num_bytes of {what}", 1, MAX_GRAPH_BYTES)
        models.append(
            Model(
                bit_widths=_widths(fields["bit_widths"], what),
                slots=_names(fields["slots"], f"slots of {what}"),
                data=bytes(data[offset : offset + size]),
            )
        )
        offset += size
        if offset > len(data):
            break
    if offset != len(data):
        raise header_error(
            f"the graph's models have {offset} bytes or more",
            f"{len(data)} bytes follow the text",
        )
    return tuple(models)


def model_fields(models: Sequence[Model]) -> list[dict[str, object]]:
    """The inverse of :func:`parse_models`, without the bytes."""
    return [
        {
            "bit_widths": list(model.bit_widths),
            "num_bytes": len(model.data),
            "slots": list(model.slots),
        }
        for model in models
    ]


def _names(value: object, what: str) -> tuple[str, ...]:
    """A list of names, none of them twice."""
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise header_error(f"the {what} are {shown(value)}", f"they must be {MAX_ITEMS} at most")
    names = tuple(check_name(name, f"one of the {what}") for name in value)
    if len(set(names)) < len(names):
        raise header_error(f"one of the {what} is there twice", "names are unique")
    return names


def parse_ports(value: object, what: str) -> tuple[Port, ...]:
    """``[{"name", "dtype", "shape"}, ...]``, at least one."""
    if not isinstance(value, list) or not value:
        raise header_error(f"the graph's {what} are {shown(value)}", "they must be a list")
    ports = []
    for item in value:
        where = f"one of the graph's {what}"
        fields = check_keys(item, where, ("name", "dtype", "shape"))
        name = check_name(fields["name"], f"the name of {where}")
        if fields["dtype"] not in PORT_DTYPES:
            raise header_error(
                f"{shown(name)} has dtype {shown(fields['dtype'])}",
                f"a graph knows {', '.join(PORT_DTYPES)}",
            )
        ports.append(Port(name, fields["dtype"], _shape(fields["shape"], name)))
    _names([port.name for port in ports], f"graph's {what}")
    return tuple(ports)


def port_fields(ports: Sequence[Port]) -> list[dict[str, object]]:
    """The inverse of :func:`parse_ports`."""
    return [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in ports]


def parse_modules(value: object, *, has_groups: bool) -> dict[str, Module]:
    """``{prefix: {"param", "bias", "norm", "input", "is_transposed"}}``, and ``"group"``."""
    keys = MODULE_KEYS + GROUP_KEYS if has_groups else MODULE_KEYS
    modules = {}
    for prefix, item in _by_name(value, "modules").items():
        what = f"module {shown(prefix)} of the graph"
        fields = check_keys(item, what, keys)
        group_size = fields.get("group")
        if type(fields["is_transposed"]) is not bool:
            raise header_error(f"is_transposed of {what} is no boolean", "it must be true or false")
        modules[prefix] = Module(
            param=check_name(fields["param"], f"the param of {what}"),
            bias=_name_or_none(fields["bias"], f"the bias of {what}"),
            norm=None if fields["norm"] is None else _norm(fields["norm"], what),
            input=_name_or_none(fields["input"], f"the input of {what}"),
            is_transposed=fields["is_transposed"],
            group_size=None
            if group_size is None
            else check_integer(group_size, f"the group of {what}", 1, MAX_DIM),
        )
    return modules


def module_fields(modules: Mapping[str, Module], *, has_groups: bool) -> dict[str, object]:
    """The inverse of :func:`parse_modules`."""
    return {
        prefix: {
            "param": module.param,
            "bias": module.bias,
            "norm": None
            if module.norm is None
            else {"name": module.norm.name, "eps": repr(float(module.norm.eps))},
            "input": module.input,
            "is_transposed": module.is_transposed,
        }
        | ({"group": module.group_size} if has_groups else {})
        for prefix, module in modules.items()
    }


def parse_quantizers(value: object) -> dict[str, Quantizer]:
    """``{prefix: {"activation"} or {"steps", "zero_points"}}``."""
    quantizers = {}
    for prefix, item in _by_name(value, "quantizers").items():
        what = f"quantizer {shown(prefix)} of the graph"
        if isinstance(item, dict) and "activation" in item:
            fields = check_keys(item, what, ("activation",))
            name = check_name(fields["activation"], f"the activation of {what}", shortest=0)
            quantizers[prefix] = Quantizer(activation=name)
            continue
        fields = check_keys(item, what, ("steps", "zero_points"))
        steps = _by_width(fields["steps"], f"the steps of {what}")
        zero_points = _by_width(fields["zero_points"], f"the zero points of {what}")
        quantizers[prefix] = Quantizer(
            steps={b: _step(step, f"a step of {what}") for b, step in steps.items()},
            zero_points={
                b: check_integer(z, f"a zero point of {what}", 0, 255)
                for b, z in zero_points.items()
            },
        )
    return quantizers


def quantizer_fields(quantizers: Mapping[str, Quantizer]) -> dict[str, object]:
    """The inverse of :func:`parse_quantizers`."""
    return {
        prefix: {"activation": quantizer.activation}
        if quantizer.activation is not None
        else {
            "steps": {str(b): repr(float(s)) for b, s in quantizer.steps.items()},
            "zero_points": {str(b): int(z) for b, z in quantizer.zero_points.items()},
        }
        for prefix, quantizer in quantizers.items()
    }


def parse_tensor_names(value: object) -> dict[str, str]:
    """``{slot: tensor}``."""
    return {
        slot: check_name(name, f"the tensor of slot {shown(slot)}")
        for slot, name in _by_name(value, "tensors").items()
    }


def _by_name(value: object, what: str) -> Mapping[str, Any]:
    """An object with names as keys."""
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        raise header_error(
            f"the graph's {what} are {shown(value)}", f"they must be {MAX_ITEMS} at most"
        )
    for name in value:
        check_name(name, f"one of the graph's {what}")
    return value


def _by_width(value: object, what: str) -> dict[int, Any]:
    """An object with bit-widths as keys, in ascending order."""
    if not isinstance(value, dict) or not value.keys() <= _WIDTHS.keys() or not value:
        raise header_error(f"{what} are {shown(value)}", "they must be an object by bit-width")
    return {_WIDTHS[key]: value[key] for key in sorted(value)}


def _name_or_none(value: object, what: str) -> str | None:
    return None if value is None else check_name(value, what)


def _norm(value: object, where: str) -> Norm:
    what = f"the norm of {where}"
    fields = check_keys(value, what, ("name", "eps"))
    return Norm(check_name(fields["name"], f"the name of {what}"), _number(fields["eps"], what))


def _number(value: object, what: str) -> float:
    """A finite number of 0 or more, from its decimal string."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value) or not isfinite(float(value)):
        raise header_error(f"{what} is {shown(value)}", "it must be a decimal string like '1e-05'")
    return float(value)


def _step(value: object, what: str) -> float:
    """A number that is positive and finite as a float32."""
    number = _number(value, what)
    if not 2.0**-126 <= number < 2.0**128:  # subnormal numbers lose their precision
        raise header_error(f"{what} is {shown(value)}", "it must be a positive float32")
    return number


def _shape(value: object, name: str) -> tuple[int | str, ...]:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        raise header_error(
            f"the shape of {shown(name)} is {shown(value)}",
            f"it must be a list of at most {MAX_RANK} numbers and names",
        )
    return tuple(
        check_name(dim, f"a dimension of {shown(name)}")
        if isinstance(dim, str)
        else check_integer(dim, f"a dimension of {shown(name)}", 1, MAX_DIM)
        for dim in value
    )
