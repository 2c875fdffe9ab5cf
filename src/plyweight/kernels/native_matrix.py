"""The native kernels: a plane matrix of ``plyweight._native``, in one of its variants.

``native/matrix.hpp`` says what the layout is. The library lets go of the GIL where it computes.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from plyweight import native
from plyweight.errors import KernelError
from plyweight.kernels.matrix import Mode, PlaneMatrix

if TYPE_CHECKING:
    from plyweight._native import Variant

__all__ = ["NativeMatrix"]


class NativeMatrix(PlaneMatrix):
    """A plane matrix in the compute layout of the native library.

    Attributes:
        kernel: the name of the variant that computes.
    """

    _variant: "Variant"

    def __init__(
        self, shape: tuple[int, int], *, group_size: int | None = None, variant: str
    ) -> None:
        super().__init__(shape, group_size=group_size)
        chosen = native.choose(variant)
        if chosen.variant is None:
            raise KernelError(
                f"{variant!r} is no variant of the native library, which this matrix needs."
            )
        self.kernel, self._variant = chosen.kernel, chosen.variant
        self._matrix = native.library().PlaneMatrix(*self.shape, group_size or 0)

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

    def _ready(self, plane: NDArray[np.uint8], index: int) -> Callable[[], None]:
        return partial(self._matrix.add_ready, self._matrix.ready_plane(plane, index))

    def _drop_plane(self) -> None:
        self._matrix.drop_plane()

    def _plane(self, index: int) -> NDArray[np.uint8]:
        plane: NDArray[np.uint8] = self._matrix.plane(index)
        return plane

    def _levels(self, bit_width: int, start: int, stop: int) -> NDArray[np.int8]:
        levels: NDArray[np.int8] = self._matrix.levels(bit_width, start, stop, self._variant, 1)
        return levels

    def _ready_scale(self, scale: NDArray[np.float32]) -> Any:
        return self._matrix.tiled_scales(scale.reshape(-1))

    def _product(
        self,
        x: NDArray[np.float32],
        scale: Any,
        gain: float,
        bit_width: int,
        mode: Mode,
        num_threads: int,
    ) -> NDArray[np.float32]:
        y: NDArray[np.float32] = self._matrix.product(
            x, scale, gain, bit_width, mode, self._variant, num_threads
        )
        return y
