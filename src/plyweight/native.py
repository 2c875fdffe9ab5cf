"""The native library: whether it is there, what it can run here, and what it therefore runs.

A kernel is a way to compute something: ``reference`` is its definition in numpy or torch, and each
of the others is a variant of the native library for one kind of processor. All give the same
numbers. Which one runs is chosen once, and never in silence:

    choose()                      the fastest that runs here, or what PLYWEIGHT_KERNEL demands
    choose("avx2")                a demand: that one, or a KernelError that says what there is
    missing_because()             why there is no native library; None if there is one

``plyweight info`` shows all of it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from plyweight.errors import KernelError, listed

if TYPE_CHECKING:
    from types import ModuleType

    from plyweight._native import Variant

__all__ = [
    "DEMAND",
    "KERNELS",
    "REFERENCE",
    "Choice",
    "available",
    "choose",
    "cpu_features",
    "library",
    "missing_because",
]

DEMAND = "PLYWEIGHT_KERNEL"
REFERENCE = "reference"
KERNELS = ("avx512", "avx2", "neon", "portable", REFERENCE)  # on a processor with several: by speed
NOTE = Path(__file__).with_name("_native_missing.txt")  # native/build_hook.py leaves it

_missing_because: str | None = None
try:
    import plyweight._native as _library
except ModuleNotFoundError as error:
    if error.name != "plyweight._native":
        raise
    _missing_because = NOTE.read_text().strip() if NOTE.exists() else "it was never built here"
except ImportError as error:  # there, and unusable: another system's, or half copied
    _missing_because = str(error)


@dataclass(frozen=True)
class Choice:
    """A kernel, and the reason for it.

    Attributes:
        name: one of ``KERNELS``.
        why: half a sentence for a person.
        variant: of the native library; None for the reference.
    """

    name: str
    why: str
    variant: "Variant | None"


def missing_because() -> str | None:
    """Why there is no native library; None if there is one."""
    return _missing_because


def library() -> "ModuleType":
    """The native library.

    Raises:
        KernelError: If there is none.
    """
    if _missing_because is not None:
        raise KernelError(f"there is no native library: {_missing_because}. {ADVICE}")
    return _library


ADVICE = (
    "Install a C++ compiler, then plyweight again; "
    "PLYWEIGHT_NATIVE=require makes that fail where it cannot be built."
)


@cache
def cpu_features() -> tuple[str, ...]:
    """What the processor has of the instruction sets that kernels use; empty if nobody can say."""
    return () if _missing_because is not None else tuple(_library.cpu_features())


@cache
def _variants() -> "dict[str, Variant]":
    if _missing_because is not None:
        return {}
    return {variant.name: variant for variant in _library.variants()}


def available() -> tuple[str, ...]:
    """The kernels that run here, the fastest first."""
    return (*_variants(), REFERENCE)


def choose(kernel: str = "auto", *, among: Sequence[str] = KERNELS) -> Choice:
    """The kernel to run.

    Args:
        kernel: "auto", or one of ``KERNELS``, which is then a demand.
        among: the kernels that can do what is wanted; all, by default.

    Raises:
        KernelError: If a kernel that is not available is demanded, here or in the environment.
    """
    return _choose(kernel, tuple(among), os.environ.get(DEMAND, ""))


@cache
def _choose(kernel: str, among: tuple[str, ...], demand: str) -> Choice:
    variants = _variants()
    names = [name for name in available() if name in among]
    if kernel != "auto":
        wanted, why = kernel, "it was asked for"
    elif demand:
        wanted, why = demand, f"{DEMAND} demands it"
    else:
        wanted = names[0]
        why = (
            f"there is no native library: {_missing_because}"
            if wanted == REFERENCE and _missing_because is not None
            else "the fastest that runs here"
        )
    if wanted not in names:
        origin = f"{DEMAND} is {demand!r}" if kernel == "auto" else f"the kernel is {kernel!r}"
        lack = f" There is no native library: {_missing_because}. {ADVICE}"
        raise KernelError(
            f"{origin}, but what runs here is {listed(names)}."
            + (lack if _missing_because is not None and wanted in KERNELS else "")
        )
    return Choice(wanted, why, variants.get(wanted))
