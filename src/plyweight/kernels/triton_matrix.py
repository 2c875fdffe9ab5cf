"""The Triton kernel: a plane matrix on a GPU.

Planes stay on the device, in the layout of :mod:`plyweight.kernels.triton_layout`, an int32 tensor
each: an upgrade adds one, a downgrade frees one, and a switch only launches another kernel. For up
to 64 rows of activations planes are decoded in registers on the way to the matrix unit; for more,
the weight is decoded once and the BLAS multiplies.

Importing this module imports torch; triton is imported when a matrix is made.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plyweight.codec import decode, from_planes
from plyweight.errors import KernelError
from plyweight.kernels.matrix import Mode, PlaneMatrix
from plyweight.kernels.triton_layout import from_words, to_words, words_shape

if TYPE_CHECKING:
    from plyweight.kernels import triton_launch

__all__ = ["GROUP_SIZES", "TritonMatrix", "missing_because"]

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def missing_because(device: str) -> str | None:
    """Why the Triton kernel does not run on devices of that type; None if it does."""
    if find_spec("triton") is None:
        return (
            "triton is not installed. Torch for CUDA and for ROCm brings it; elsewhere, "
            "pip install 'plyweight[triton]'"
        )
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on a GPU; TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    return None if device in ("cpu", "cuda") else f"it does not run on {device!r}"


class TritonMatrix(PlaneMatrix):
    """A plane matrix in the compute layout of the Triton kernels.

    Attributes:
        device: on which the planes are.
    """

    kernel = "triton"

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        group_size: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__(shape, group_size=group_size)
        self.device = torch.device(device)
        if (because := missing_because(self.device.type)) is not None:
            raise KernelError(f"the kernel 'triton' was asked for, but {because}.")
        if group_size is not None and group_size not in GROUP_SIZES:
            raise KernelError(
                f"the kernel 'triton' computes groups of 32, 64 and 128 inputs; this weight has "
                f"groups of {group_size}. Take the kernel 'reference' for it."
            )
        self._launch = _launch()
        self._planes: list[Tensor] = []

    @property
    def num_planes(self) -> int:
        """How many are held."""
        return len(self._planes)

    @property
    def nbytes(self) -> int:
        """The memory that the planes take, padding included."""
        return sum(plane.nbytes for plane in self._planes)

    def multiply(self, x: Tensor, scale: Tensor, bit_width: int) -> Tensor:
        """Activations times the weight at ``bit_width``: ``(…, in)`` to ``(…, out)``, of x's dtype.

        Levels are exact in every dtype, products too, sums are float32, and the scale is applied
        to a sum: what is rounded is sums, and the result once. An infinite activation gives a
        result that is not finite, in float32 NaN.

        Args:
            x: float16, bfloat16 or float32, on the device.
            scale: of the weight at ``bit_width``, float32 ``(out,)``, or ``(out, groups)``.
            bit_width: at most as many planes as are held.

        Raises:
            BitWidthError: If fewer planes are held.
            KernelError: If an argument is not as said above.
        """
        self._require(bit_width)
        out, num_inputs = self.shape
        if x.dtype not in DTYPES or not x.dim() or x.shape[-1] != num_inputs:
            raise KernelError(
                f"activations are {x.dtype} {tuple(x.shape)}; a weight {self.shape} takes "
                f"float16, bfloat16 or float32 (…, {num_inputs})."
            )
        scale = self._checked(scale)
        if not self._is_here(x):
            raise KernelError(f"activations are on {x.device}, the planes on {self.device}.")
        rows = x.detach().reshape(-1, num_inputs).contiguous()
        if not len(rows):
            y = x.new_empty(0, out)
        elif len(rows) <= self._launch.MAX_ROWS:
            y = self._launch.product(rows, self._planes[:bit_width], scale, out, self.group_size)
        else:
            y = rows @ self.values(scale, bit_width, rows.dtype).T
        return y.view(*x.shape[:-1], out)

    def values(self, scale: Tensor, bit_width: int, dtype: torch.dtype) -> Tensor:
        """The weight at ``bit_width``, ``(out, in)``: what a packed module decodes, bit for bit.

        Raises:
            BitWidthError: If fewer planes are held.
            KernelError: If the scale or the dtype do not fit.
        """
        self._require(bit_width)
        if dtype not in DTYPES:
            raise KernelError(f"a weight of {dtype} was asked for; {DTYPES} can be decoded.")
        scale = self._checked(scale)
        planes = self._planes[:bit_width]
        return self._launch.values(planes, scale, self.shape, self.group_size, dtype)

    def _checked(self, scale: Tensor) -> Tensor:
        out = self.shape[0]
        wanted = (out,) if self.group_size is None else (out, self.num_groups)
        if scale.dtype != torch.float32 or tuple(scale.shape) != wanted or not self._is_here(scale):
            raise KernelError(
                f"the scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; a weight "
                f"{self.shape} with group_size={self.group_size} takes float32 {wanted} on "
                f"{self.device}."
            )
        return scale.contiguous()

    def _is_here(self, tensor: Tensor) -> bool:
        # "cuda" is whichever GPU is current when the first plane comes.
        return tensor.device == (self._planes[0].device if self._planes else self.device)

    def _add_plane(self, plane: NDArray[np.uint8]) -> None:
        self.add_tensor(torch.from_numpy(plane.copy()).to(self.device))

    def add_tensor(self, plane: Tensor) -> None:
        """Take the next plane, uint8 ``(bytes,)`` in the layout of the wire, on the device."""
        words = to_words(plane, self.shape, is_wide=self._launch.IS_WIDE)
        # Ones' complement; see plyweight.kernels.triton_code.
        self._planes.append(~words if not self._planes else words ^ ~self._planes[0])

    def _drop_plane(self) -> None:
        self._planes.pop()

    def _plane(self, index: int) -> NDArray[np.uint8]:
        words = ~self._planes[0]
        if index:
            words ^= self._planes[index]
        plane = from_words(words, self.shape, is_wide=self._launch.IS_WIDE)
        wire: NDArray[np.uint8] = plane.cpu().numpy()
        return wire

    def _levels(self, bit_width: int, start: int, stop: int) -> NDArray[np.int8]:
        planes = [self._plane(index) for index in range(bit_width)]
        levels: NDArray[np.int8] = decode(from_planes(planes, self.shape)[start:stop], bit_width)
        return levels

    def _product(
        self,
        x: NDArray[np.float32],
        scale: NDArray[np.float32],
        bit_width: int,
        mode: Mode,
        num_threads: int,  # noqa: ARG002  # the device's own
    ) -> NDArray[np.float32]:
        if mode != "float":
            raise KernelError(
                "the kernel 'triton' computes in the mode 'float' only: activations are not "
                "what takes time on a GPU."
            )
        rows, scales = (torch.from_numpy(a).to(self.device) for a in (x, scale))
        y: NDArray[np.float32] = self.multiply(rows, scales, bit_width).cpu().numpy()
        return y


def _launch() -> "triton_launch":
    from plyweight.kernels import triton_launch  # imports triton

    return triton_launch
