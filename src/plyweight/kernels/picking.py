"""Which kernel computes: "auto" chooses by device and by what is built; a name is a demand.

A demand that cannot be met is an error that says what there is and why the rest is not there.
Nothing falls back in silence: what "auto" chose, and why, is :attr:`Kernel.reason`, and
``plyweight info`` prints :func:`standings`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from plyweight.errors import KernelError
from plyweight.kernels.matrix import PlaneMatrix
from plyweight.kernels.native_matrix import VARIANTS, NativeMatrix, variants_missing
from plyweight.kernels.reference import ReferenceMatrix

__all__ = ["KERNELS", "Kernel", "Standing", "pick", "standings"]

KERNELS = ("avx512", "avx2", "neon", "portable", "triton", "reference")  # the best first


@dataclass(frozen=True)
class Standing:
    """Whether a kernel is here.

    Attributes:
        name: of :data:`KERNELS`.
        device: the type of device it computes on, "cpu" or "cuda".
        missing: why it is not here; empty if it is.
    """

    name: str
    device: str
    missing: str = ""


@dataclass(frozen=True)
class Kernel:
    """What computes products.

    Attributes:
        name: of :data:`KERNELS`.
        device: the type of device it computes on.
        reason: why it was picked.
    """

    name: str
    device: str
    reason: str

    def matrix(self, shape: tuple[int, int], *, group_size: int | None = None) -> PlaneMatrix:
        """One of ``shape`` ``(out, in)`` that holds no plane yet."""
        if self.name in VARIANTS:
            return NativeMatrix(shape, group_size=group_size, variant=self.name)
        assert self.name == "reference"
        return ReferenceMatrix(shape, group_size=group_size)


def pick(kernel: str = "auto", *, device: str = "cpu") -> Kernel:
    """The kernel to compute with on devices of type ``device``.

    Args:
        kernel: "auto", or a name of :data:`KERNELS`, which is a demand.
        device: "cpu", "cuda", …

    Raises:
        KernelError: If there is no kernel of that name, or it is not here, or not for that device.
    """
    here = standings()
    usable = [s.name for s in here if not s.missing and s.device == device]
    if kernel == "auto":
        if not usable:
            raise KernelError(
                f"no kernel computes on {device!r}; {_what_is(here)}. Leave the model with "
                "kernel=None, which decodes weights with torch on every device."
            )
        better = [s for s in here[: _place(here, usable[0])] if s.device == device]
        because = "".join(f"; {s.name}: {s.missing}" for s in better)
        return Kernel(usable[0], device, f"the best here on {device}{because}")
    if kernel not in KERNELS:
        raise KernelError(
            f"there is no kernel {kernel!r}; give 'auto' or one of {_names(KERNELS)}."
        )
    standing = here[_place(here, kernel)]
    if standing.missing:
        raise KernelError(
            f"the kernel {kernel!r} is not here: {standing.missing}. {_what_is(here)}."
        )
    if standing.device != device:
        raise KernelError(
            f"the kernel {kernel!r} computes on {standing.device!r}, and the weight is on "
            f"{device!r}; there, {_names(usable) or 'no kernel'} can be had."
        )
    return Kernel(kernel, device, "asked for by name")


@cache  # what is built does not change while a process runs
def standings() -> tuple[Standing, ...]:
    """All kernels, the best first, each with whether it is here."""
    native_missing = variants_missing()
    found = []
    for name in KERNELS:
        if name == "reference":
            found.append(Standing(name, "cpu"))
        elif name == "triton":
            found.append(Standing(name, "cuda", _triton_missing()))
        else:
            found.append(Standing(name, "cpu", native_missing[name]))
    return tuple(found)


def _triton_missing() -> str:
    return "it is not built yet"


def _place(here: tuple[Standing, ...], name: str) -> int:
    return next(i for i, standing in enumerate(here) if standing.name == name)


def _what_is(here: tuple[Standing, ...]) -> str:
    return f"There are {_names(f'{s.name} on {s.device}' for s in here if not s.missing)}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
