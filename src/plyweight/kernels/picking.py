"""Which kernel multiplies: "auto" chooses by device and by what is built; a name is a demand.

On the CPU :mod:`plyweight.native` chooses, as it does for everything else that is native. A demand
that cannot be met is an error that says what there is, and nothing falls back in silence:
:attr:`Kernel.reason` says why it is this one.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from plyweight import native
from plyweight.errors import KernelError, listed
from plyweight.kernels.matrix import PlaneMatrix
from plyweight.kernels.native_matrix import NativeMatrix
from plyweight.kernels.reference import ReferenceMatrix

__all__ = ["KERNELS", "Kernel", "available", "pick", "triton_missing_because"]

TRITON = "triton"
KERNELS = (*native.KERNELS, TRITON)


@dataclass(frozen=True)
class Kernel:
    """What computes products.

    Attributes:
        name: of :data:`KERNELS`.
        device: the type of device it computes on.
        reason: why it was picked, half a sentence.
    """

    name: str
    device: str
    reason: str

    def matrix(
        self,
        shape: tuple[int, int],
        *,
        group_size: int | None = None,
        device: str | None = None,
    ) -> PlaneMatrix:
        """One that holds no plane yet.

        Args:
            shape: of the weight, ``(out, in)``.
            group_size: inputs that share a scale; None for all.
            device: of the type that the kernel computes on, "cuda:1"; None for the current one.
        """
        if self.name == native.REFERENCE:
            return ReferenceMatrix(shape, group_size=group_size)
        if self.name == TRITON:
            from plyweight.kernels.triton_matrix import TritonMatrix  # imports torch and triton

            return TritonMatrix(shape, group_size=group_size, device=device or self.device)
        return NativeMatrix(shape, group_size=group_size, variant=self.name)


def available(device: str = "cpu") -> tuple[str, ...]:
    """The kernels that multiply on devices of that type, the fastest first."""
    if device == "cpu":
        return native.available()
    return () if triton_missing_because(device) is not None else (TRITON,)


def pick(kernel: str = "auto", *, device: str = "cpu") -> Kernel:
    """The kernel to multiply with on devices of type ``device``.

    Args:
        kernel: "auto", or a name of :data:`KERNELS`, which is a demand.
        device: "cpu", "cuda", …

    Raises:
        KernelError: If there is no kernel of that name, or it is not here, or not for that device.
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise KernelError(
            f"there is no kernel {kernel!r}; give 'auto' or one of {listed(KERNELS)}."
        )
    if device == "cpu" and kernel != TRITON:
        choice = native.choose(kernel)
        return Kernel(choice.kernel, device, choice.why)
    because = f"it computes on {'cpu'!r}"
    if kernel in ("auto", TRITON):
        missing = triton_missing_because(device)
        if missing is None:
            why = "it was asked for" if kernel == TRITON else f"the one for {device!r}"
            return Kernel(TRITON, device, why)
        because = missing
    raise KernelError(
        f"the kernel {kernel!r} was asked for on {device!r}, where there is "
        f"{listed(available(device))}: {because}. On every device "
        "plyweight.set_kernel(model, 'reference') decodes weights and multiplies with torch."
    )


def triton_missing_because(device: str) -> str | None:
    """Why the kernel ``triton`` does not run on devices of that type; None if it does."""
    if find_spec("triton") is None:
        return (
            "triton is not installed, which torch for CUDA and for ROCm brings; elsewhere "
            "pip install 'plyweight[triton]'"
        )
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton runs on a GPU; TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    return None if device in ("cpu", "cuda") else f"triton does not run on {device!r}"
