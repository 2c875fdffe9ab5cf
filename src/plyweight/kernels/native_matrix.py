"""The native kernels: a plane matrix of ``plyweight._native``, in one of its variants.

What this file asks of the native module, which trusts what it is given, for the border is in
:class:`PlaneMatrix`:

    product_variants()            dict: each variant's name, and why it does not run here, or ""
    PlaneMatrix(out, in, group)   group 0 for none; no plane yet
      .add_plane(uint8 (bytes,))  in the wire layout, the next one; copied into the compute layout
      .drop_plane()               the last one; its memory goes back to the system
      .num_planes  .nbytes
      .plane(index)               uint8 (bytes,) in the wire layout again
      .levels(bits, start, stop)  int8 (stop - start, in)
      .product(x, scale, bits, mode, variant, threads)
                                  float32 (m, in), float32 (out * groups,) -> float32 (m, out)

It lets go of the GIL where it computes.
"""

from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from plyweight.errors import KernelError
from plyweight.kernels.matrix import Mode, PlaneMatrix

__all__ = ["VARIANTS", "NativeMatrix", "variants_missing"]

VARIANTS = ("avx512", "avx2", "neon", "portable")


def _module() -> ModuleType | None:
    try:
        return import_module("plyweight._native")
    except ModuleNotFoundError as error:
        if error.name != "plyweight._native":
            raise
        return None


def variants_missing() -> dict[str, str]:
    """Why each of :data:`VARIANTS` is not here; "" if it is."""
    module = _module()
    if module is None:
        return dict.fromkeys(VARIANTS, "the native library is not built")
    found: dict[str, str] = module.product_variants()
    return {name: found.get(name, "it is not part of this build") for name in VARIANTS}


class NativeMatrix(PlaneMatrix):
    """A plane matrix in the compute layout of the native library.

    Attributes:
        kernel: the variant that computes, of :data:`VARIANTS`.
    """

    def __init__(
        self, shape: tuple[int, int], *, group_size: int | None = None, variant: str
    ) -> None:
        super().__init__(shape, group_size=group_size)
        module = _module()
        if module is None:
            raise KernelError("the native library is not built.")
        self.kernel = variant
        self._matrix = module.PlaneMatrix(*shape, group_size or 0)

    @property
    def num_planes(self) -> int:
        """How many are held."""
        num: int = self._matrix.num_planes
        return num

    @property
    def nbytes(self) -> int:
        """The memory that the planes take, padding included."""
        size: int = self._matrix.nbytes
        return size

    def _add_plane(self, plane: NDArray[np.uint8]) -> None:
        self._matrix.add_plane(plane)

    def _drop_plane(self) -> None:
        self._matrix.drop_plane()

    def _plane(self, index: int) -> NDArray[np.uint8]:
        plane: NDArray[np.uint8] = self._matrix.plane(index)
        return plane

    def _levels(self, bit_width: int, start: int, stop: int) -> NDArray[np.int8]:
        levels: NDArray[np.int8] = self._matrix.levels(bit_width, start, stop)
        return levels

    def _product(
        self,
        x: NDArray[np.float32],
        scale: NDArray[np.float32],
        bit_width: int,
        mode: Mode,
        num_threads: int,
    ) -> NDArray[np.float32]:
        y: NDArray[np.float32] = self._matrix.product(
            x, scale.reshape(-1), bit_width, mode, self.kernel, num_threads
        )
        return y
