"""The Triton kernel: a plane matrix on a GPU.

Planes stay on the device, in the layout of :mod:`plyweight.kernels.triton_layout`, an int32 tensor
each: an upgrade adds one, a downgrade frees one, and a switch only launches another kernel. For up
to 64 rows of activations planes are decoded in registers on the way to the matrix unit; for more,
the weight is decoded once and the BLAS multiplies.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plyweight.codec import plane_bytes
from plyweight.errors import KernelError
from plyweight.kernels import triton_launch
from plyweight.kernels.matrix import Mode, PlaneMatrix, ReadyScale, check_gain
from plyweight.kernels.triton_layout import from_words, to_words

__all__ = ["GROUP_SIZES", "TritonMatrix"]

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Given = Tensor | NDArray[Any]


class TritonMatrix(PlaneMatrix):
    """A plane matrix in the compute layout of the Triton kernels.

    Where other plane matrices take and give arrays, it takes and gives tensors on its device. On
    the CPU, in Triton's interpreter, it takes arrays as well.

    Attributes:
        device: on which the planes are.
    """

    kernel = "triton"
    has_cheap_gain = False

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        group_size: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__(shape, group_size=group_size)
        if group_size is not None and group_size not in GROUP_SIZES:
            raise KernelError(
                f"the kernel 'triton' computes groups of 32, 64 and 128 inputs; this weight has "
                f"groups of {group_size}. Take the kernel 'reference' for it."
            )
        self.device = torch.empty(0, device=device).device  # "cuda" is the one that is current
        self._planes: list[Tensor] = []

    @property
    def num_planes(self) -> int:
        """How many are held."""
        return len(self._planes)

    @property
    def nbytes(self) -> int:
        """The memory that the planes take, padding included."""
        return sum(plane.nbytes for plane in self._planes)

    def ready_scale(self, scale: Given) -> ReadyScale:
        """``scale`` as a tensor that is known to fit; see :meth:`PlaneMatrix.ready_scale`."""
        tensor = self._tensor(scale, "the scale", (torch.float32,), self._scale_shape)
        return ReadyScale(type(self), self._scale_shape, tensor.contiguous())

    def values(self, scale: Given | ReadyScale, bit_width: int, dtype: torch.dtype) -> Tensor:
        """The weight at ``bit_width``, ``(out, in)``: what a packed module decodes, bit for bit.

        Raises:
            BitWidthError: If fewer planes are held.
            KernelError: If the scale or the dtype do not fit.
        """
        self._require(bit_width)
        if dtype not in DTYPES:
            raise KernelError(f"a weight of {dtype} was asked for; {DTYPES} can be decoded.")
        planes = self._planes[:bit_width]
        held = self._held_scale(scale)
        return triton_launch.values(planes, held, self.shape, self.group_size, dtype)

    def product(
        self,
        x: Given,
        scale: Given | ReadyScale,
        bit_width: int,
        *,
        mode: Mode,
        gain: float = 1.0,
        num_threads: int = 1,  # noqa: ARG002  # the device's own
    ) -> Any:
        """Activations times the weight at ``bit_width``: ``(m, in)`` to ``(m, out)``, of x's dtype.

        Levels are exact in every dtype, and so are products. Sums are float32, a scale is applied
        to a sum, and the result is rounded once. From 65 rows on it is torch's product with the
        decoded weight, which is rounded to x's dtype first. A float32 activation is computed with
        as three bfloat16; where it is infinite, the result is NaN.

        Args:
            x: float16, bfloat16 or float32 ``(m, in)``.
            scale: of the weight at ``bit_width``, float32 ``(out,)``, or ``(out, groups)``.
            bit_width: at most as many planes as are held.
            mode: "float"; this kernel has no other.
            gain: multiplies the scale, which is a launch of its own.
            num_threads: as of other kernels; without effect.

        Raises:
            BitWidthError: If fewer planes are held.
            KernelError: If an argument is not as said above.
        """
        self._require(bit_width)
        out, num_inputs = self.shape
        rows = self._tensor(x, "activations", DTYPES, (*x.shape[:1], num_inputs)).contiguous()
        held = self._held_scale(scale)
        check_gain(gain)
        if gain != 1.0:
            held = held * gain
        if mode != "float":
            raise KernelError(f"the kernel 'triton' has the mode 'float' only, not {mode!r}.")
        if not len(rows):
            y = rows.new_empty(0, out)
        elif len(rows) <= triton_launch.MAX_ROWS:
            planes = self._planes[:bit_width]
            y = triton_launch.product(rows, planes, held, out, self.group_size)
        else:
            y = rows @ self.values(held, bit_width, rows.dtype).T
        return y

    def tune(self, x: Tensor, bit_width: int, seconds_of: triton_launch.Seconds) -> None:
        """Measure how products like this one are best launched, and remember it.

        Without it a plan is chosen by shape.

        Args:
            x: activations, at most 64 rows.
            bit_width: at most as many planes as are held.
            seconds_of: how long ``triton_launch.product(…, plan)`` takes. Measure with weights
                that the device's caches do not hold, for that is how a model runs.
        """
        self._require(bit_width)
        planes = self._planes[:bit_width]
        triton_launch.tune(x, planes, self.shape[0], self.group_size, seconds_of)

    def _drop_plane(self) -> None:
        self._planes.pop()

    def _checked_plane(self, plane: Given) -> Any:
        return self._tensor(plane, "a plane", (torch.uint8,), (plane_bytes(self.shape),))

    def _add_plane(self, plane: Any) -> None:
        self._ready(plane, self.num_planes)()

    def _ready(self, plane: Any, index: int) -> Callable[[], None]:
        words = to_words(plane, self.shape, is_wide=triton_launch.IS_WIDE)
        signs = self._planes[0] if index else None
        # Ones' complement; see plyweight.kernels.triton_code.
        words = ~words if signs is None else words ^ ~signs

        def add() -> None:
            self._require_next(index)
            if index and self._planes[0] is not signs:
                raise KernelError("the plane was made ready for a matrix of other signs")
            self._planes.append(words)

        return add

    def _held_scale(self, scale: Any) -> Any:
        held = super()._held_scale(scale)
        if held.device != self.device:
            raise KernelError(f"the scale is on {held.device}, the planes are on {self.device}.")
        return held

    def _plane(self, index: int) -> Any:
        words = ~self._planes[0]
        if index:
            words ^= self._planes[index]
        return from_words(words, self.shape, is_wide=triton_launch.IS_WIDE)

    def _levels(self, bit_width: int, start: int, stop: int) -> Any:
        ones = torch.ones(self.shape[0], device=self.device)
        planes = self._planes[:bit_width]
        levels = triton_launch.values(planes, ones, self.shape, None, torch.float16)  # exact
        return levels[start:stop].to(torch.int8)

    def _product(self, *_: Any) -> NDArray[np.float32]:
        raise AssertionError("product takes tensors")

    def _tensor(
        self, given: Given, what: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
    ) -> Tensor:
        """``given`` as a tensor, if it is what it should be."""
        is_emulated_array = isinstance(given, np.ndarray) and self.device.type == "cpu"
        tensor = torch.from_numpy(np.ascontiguousarray(given)) if is_emulated_array else given
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype not in dtypes
            or tuple(tensor.shape) != shape
            or tensor.device != self.device
        ):
            kind = f"a {type(given).__name__}"
            if isinstance(tensor, Tensor):
                kind = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise KernelError(
                f"{what}: {kind} where a weight {self.shape} with group_size={self.group_size} "
                f"takes {' or '.join(map(str, dtypes))} {shape} on {self.device}."
            )
        return tensor.detach()
