"""The native library: whether it is there, what it can run here, and what therefore runs.

A kernel is a way to compute something: ``reference`` is its definition in Python, and each of the
others is a variant in the native library, for one kind of processor. Which one runs is chosen in
one place, and never in silence:

    choose()              the fastest that runs here, or what PLYWEIGHT_KERNEL demands
    choose("avx2")        a demand: that one, or a KernelError that says what there is
    missing_because()     why there is no native library; None if there is one

``plyweight info`` shows all of it, and docs/kernels.md says how the library is built.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from plyweight.errors import KernelError, listed

if TYPE_CHECKING:
    from plyweight._native import Variant

__all__ = [
    "ADVICE",
    "DEMAND",
    "KERNELS",
    "REFERENCE",
    "Choice",
    "available",
    "choose",
    "cpu_features",
    "demanded",
    "library",
    "missing_because",
]

DEMAND = "PLYWEIGHT_KERNEL"  # in the environment: what is demanded of every choice left to us
REFERENCE = "reference"
KERNELS = ("avx512", "avx2", "neon", "portable", REFERENCE)  # the fastest first
ADVICE = (
    "To have it, install a C++ compiler and then plyweight again from its sources; with "
    "PLYWEIGHT_NATIVE=require that fails, and says why, where the library cannot be built."
)
NOTE = Path(__file__).with_name("_native_missing.txt")  # native/build_hook.py leaves it

_missing_because: str | None = None
try:
    import plyweight._native as _library
except ModuleNotFoundError as error:
    if error.name != "plyweight._native":
        raise
    _missing_because = NOTE.read_text().strip() if NOTE.exists() else "it was not built"
except ImportError as error:  # a file is there that cannot be used here
    _missing_because = str(error)


@dataclass(frozen=True)
class Choice:
    """A kernel, and the reason for it.

    Attributes:
        kernel: one of ``KERNELS``.
        why: half a sentence.
        variant: of the native library; None for the reference.
    """

    kernel: str
    why: str
    variant: "Variant | None"


def missing_because() -> str | None:
    """Why there is no native library; None if there is one."""
    return _missing_because


def library() -> ModuleType:
    """The native library, ``plyweight._native``.

    Raises:
        KernelError: If there is none.
    """
    if _missing_because is not None:
        raise KernelError(f"there is no native library: {_missing_because}. {ADVICE}")
    return _library


@cache
def cpu_features() -> tuple[str, ...]:
    """Instruction sets that matter to kernels and that this processor has; () without library."""
    return () if _missing_because is not None else tuple(_library.cpu_features())


def available() -> tuple[str, ...]:
    """The kernels that run here, the fastest first; at least the reference."""
    return (*_variants(), REFERENCE)


def demanded() -> str | None:
    """The kernel that the environment demands, whether there is such a one or not."""
    return os.environ.get(DEMAND) or None


def choose(kernel: str = "auto", *, among: Sequence[str] = KERNELS) -> Choice:
    """The kernel to run.

    Args:
        kernel: one of ``KERNELS``, which is then a demand; "auto" leaves it to the environment
            and, where that demands nothing, takes the fastest.
        among: the kernels that can compute what is wanted; by default all.

    Raises:
        KernelError: If a kernel is demanded that does not run here.
    """
    return _choose(kernel, tuple(among), demanded() if kernel == "auto" else None)


@cache
def _choose(kernel: str, among: tuple[str, ...], from_environment: str | None) -> Choice:
    names = [name for name in available() if name in among]
    wanted = from_environment or kernel
    if wanted == "auto":
        why = "the fastest that runs here"
        if names[0] == REFERENCE and _missing_because is not None:
            why = f"there is no native library: {_missing_because}"
        return Choice(names[0], why, _variants().get(names[0]))
    if wanted not in names:
        asked = f"{DEMAND} demands" if from_environment else "the call demands"
        lack = f" There is no native library: {_missing_because}. {ADVICE}"
        raise KernelError(
            f"{asked} the kernel {wanted!r}, but what runs here is {listed(names)}."
            + (lack if _missing_because is not None and wanted in KERNELS else "")
        )
    why = f"{DEMAND} demands it" if from_environment else "it was asked for"
    return Choice(wanted, why, _variants().get(wanted))


@cache
def _variants() -> "dict[str, Variant]":
    """Of the native library, those that this processor runs, by name, the fastest first."""
    if _missing_because is not None:
        return {}
    return {variant.name: variant for variant in _library.variants()}
