"""Names: what a tensor is called, and what its name says it is.

L<i>/<param>.q             planes that layer i adds to a layered weight
L0/<param>.scale           its quantization steps on the 8-bit grid
Li/<param>.gain            what multiplies them at the bit-width that layer i brings
Li/<module>.step           quantization step of the module's input; of its output, if that is
                           called <module>.output_quantizer
Li/<module>.zero_point     and its zero point, where the kind is "offset"
L0/__graph__               the computation without weights; see ``graph``
__pad__.<n>                zeros
Li/<anything else>         a plain tensor, which replaces the one of an earlier layer: a bias or a
                           batch norm that differs by bit-width, say
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from plyweight.artifact.strict_json import header_error, shown

__all__ = [
    "GRAPH_NAME",
    "MAX_NAME_BYTES",
    "Role",
    "check_name",
    "gain_name",
    "is_output",
    "is_pad",
    "pad_name",
    "planes_name",
    "roles_of",
    "scale_name",
    "split_name",
    "step_name",
    "tensor_name",
    "zero_point_name",
]

GRAPH_NAME = "__graph__"
MAX_NAME_BYTES = 512
OUTPUT_QUANTIZER = "output_quantizer"

_IN_LAYER = re.compile(r"L(0|[1-9][0-9]?)/(.+)", re.DOTALL)
_PAD = re.compile(r"__pad__\.(0|[1-9][0-9]{0,5})")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Role:
    """What a reserved name means: one of five kinds, of a parameter or module."""

    kind: Literal["planes", "scale", "gain", "step", "zero_point"]
    owner: str


def tensor_name(layer_index: int, name: str) -> str:
    """The name in the file of layer ``layer_index``'s tensor ``name``."""
    return f"L{layer_index}/{name}"


def pad_name(number: int) -> str:
    """The name of the ``number``-th run of padding."""
    return f"__pad__.{number}"


def planes_name(param: str) -> str:
    """The name, inside a layer, of the planes of a layered weight."""
    return f"{param}.q"


def scale_name(param: str) -> str:
    """The name, inside layer 0, of a layered weight's scale."""
    return f"{param}.scale"


def gain_name(param: str) -> str:
    """The name, inside a layer, of a layered weight's gain."""
    return f"{param}.gain"


def step_name(module: str) -> str:
    """The name, inside a layer, of the step of a module's input; the root module is ``""``."""
    return f"{module}.step" if module else "step"


def zero_point_name(module: str) -> str:
    """The name, inside a layer, of the zero point of a module's input."""
    return f"{module}.zero_point" if module else "zero_point"


def is_output(activation: str) -> bool:
    """Whether ``activation``, a key of ``layered.activations``, rounds what a module gives."""
    return f".{activation}".endswith(f".{OUTPUT_QUANTIZER}")


def is_pad(name: str) -> bool:
    """Whether ``name`` is that of padding."""
    return name.startswith("__pad__") and _PAD.fullmatch(name) is not None


def split_name(name: str) -> tuple[int, str]:
    """``"L2/bn.bias"`` as ``(2, "bn.bias")``.

    Raises:
        HeaderError: If the name does not say in which layer the tensor is.
    """
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        raise header_error(
            f"a tensor is called {shown(name)}", "names are L<layer>/<name> or __pad__.<number>"
        )
    return int(match.group(1)), match.group(2)


def check_name(name: object, what: str, *, shortest: int = 1) -> str:
    """``name`` if it is a text of ``shortest`` to 512 bytes without control characters.

    Raises:
        HeaderError: If it is not.
    """
    if not isinstance(name, str) or _CONTROL.search(name):
        raise header_error(
            f"{what} is {shown(name)}", "it must be a text without control characters"
        )
    if not shortest <= len(name.encode()) <= MAX_NAME_BYTES:
        raise header_error(
            f"{what} {shown(name)} has {len(name.encode())} bytes",
            f"names have {shortest} to {MAX_NAME_BYTES}",
        )
    return name


def roles_of(params: Iterable[str], modules: Iterable[str]) -> dict[str, Role]:
    """Every reserved name inside a layer, and what it means.

    Raises:
        HeaderError: If one name would mean two things.
    """
    roles: dict[str, Role] = {}

    def reserve(name: str, role: Role) -> None:
        if name in roles:
            raise header_error(
                f"the tensor name {shown(name)} belongs to both {shown(roles[name].owner)} and "
                f"{shown(role.owner)}",
                "a name means one thing",
                "rename one of them and pack again",
            )
        roles[name] = role

    for param in params:
        reserve(planes_name(param), Role("planes", param))
        reserve(scale_name(param), Role("scale", param))
        reserve(gain_name(param), Role("gain", param))
    for module in modules:
        reserve(step_name(module), Role("step", module))
        reserve(zero_point_name(module), Role("zero_point", module))
    return roles
