"""Which kernel multiplies: "auto" chooses by device and by what is built; a name is a demand.

On the CPU :mod:`plyweight.native` chooses, as it does for everything else that is native. A demand
that cannot be met is an error that says what there is, and nothing falls back in silence:
:attr:`Kernel.reason` says why it is this one.
"""

from dataclasses import dataclass

from plyweight import native
from plyweight.errors import KernelError, listed
from plyweight.kernels.matrix import PlaneMatrix
from plyweight.kernels.native_matrix import NativeMatrix
from plyweight.kernels.reference import ReferenceMatrix

__all__ = ["KERNELS", "Kernel", "available", "pick"]

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

    def matrix(self, shape: tuple[int, int], *, group_size: int | None = None) -> PlaneMatrix:
        """One of ``shape`` ``(out, in)`` that holds no plane yet."""
        if self.name == native.REFERENCE:
            return ReferenceMatrix(shape, group_size=group_size)
        return NativeMatrix(shape, group_size=group_size, variant=self.name)


def available(device: str = "cpu") -> tuple[str, ...]:
    """The kernels that multiply on devices of that type, the fastest first."""
    return native.available() if device == "cpu" else ()


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
    raise KernelError(
        f"the kernel {kernel!r} was asked for on {device!r}, where there is "
        f"{listed(available(device))}. On every device plyweight.set_kernel(model, 'reference') "
        "decodes weights and multiplies with torch."
    )
