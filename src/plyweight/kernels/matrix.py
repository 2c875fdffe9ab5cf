"""A plane matrix: a weight ``(out, in)`` as bit planes, in the compute layout of one kernel.

What goes in and comes out of it is the wire layout: a plane of ``plane_bytes(shape)`` bytes, eight
weights to a byte in C order, the first in the lowest bit. What it holds in between is the kernel's
own affair, as long as a plane can be added and dropped without the others being moved.

The border is here: what is wrong raises before a kernel reads a byte of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from plyweight.codec import MAX_BIT_WIDTH, plane_bytes
from plyweight.errors import BitWidthError, KernelError

__all__ = ["MAX_GROUP_INPUTS", "MODES", "Mode", "PlaneMatrix", "ReadyScale", "check_gain"]

Mode = Literal["float", "int8"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Inputs that share a scale, in the mode "int8": 2**17 products of at most 127 * 127 are a sum that
# an int32 holds.
MAX_GROUP_INPUTS = 2**17

MAX_INT = 2**31 - 1  # of sizes and threads: what an int holds everywhere


@dataclass(frozen=True, eq=False)
class ReadyScale:
    """A scale in the compute layout, what :meth:`PlaneMatrix.ready_scale` gives.

    Attributes:
        of: the type of the matrices that it is for.
        shape: of the scale, and of theirs.
        held: what they compute with.
    """

    of: type["PlaneMatrix"]
    shape: tuple[int, ...]
    held: Any


class PlaneMatrix(ABC):
    """A weight ``(out, in)`` of which the first planes are held.

    Products may be computed by several threads at once; planes are added and dropped by one while
    there is no other (:mod:`plyweight.nn.lease` sees to that in a loaded model).

    Attributes:
        kernel: the name of the one that computes.
        shape: ``(out, in)``.
        group_size: inputs that share a scale; None for one scale per output channel.
        has_cheap_gain: whether a product with a gain takes about as long as one without. Not so
            on a GPU, where it is a launch more, and to read it from a tensor is to wait.
    """

    kernel: str
    has_cheap_gain = True

    def __init__(self, shape: tuple[int, int], *, group_size: int | None = None) -> None:
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        if len(sizes) != 2 or not all(_is_int(n, 1, MAX_INT) for n in sizes):
            raise KernelError(
                f"a plane matrix of shape {shape} was asked for; products are computed with "
                f"weights (out, in), both 1 to {MAX_INT}."
            )
        if group_size is not None and not _is_int(group_size, 1, MAX_INT):
            raise KernelError(
                f"group_size is {group_size!r}; give None or an integer from 1 to {MAX_INT}."
            )
        self.shape, self.group_size = sizes, group_size

    @property
    def num_groups(self) -> int:
        """Scales per output channel."""
        return 1 if self.group_size is None else -(-self.shape[1] // self.group_size)

    @property
    @abstractmethod
    def num_planes(self) -> int:
        """How many planes are held: the widest bit-width that can be computed."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that the planes take, padding included."""

    def add_plane(self, plane: NDArray[np.uint8]) -> None:
        """Take the next plane, in the wire layout; it is copied.

        Raises:
            KernelError: If it is not a uint8 array of ``plane_bytes(shape)`` bytes, or 8 planes
                are held.
        """
        plane = self._checked_plane(plane)
        if self.num_planes == MAX_BIT_WIDTH:
            raise KernelError(f"a plane more than {MAX_BIT_WIDTH}; a code has no more bits.")
        self._add_plane(plane)

    def ready(self, plane: NDArray[np.uint8], index: int) -> Callable[[], None]:
        """What adds ``plane``, number ``index``, at once when it is called.

        Bringing it into the compute layout takes longer, and happens here; others may compute
        meanwhile. It holds as long as the first plane does, and can be called when ``index``
        planes are held: it raises a ValueError otherwise.

        Raises:
            KernelError: If it is not such a plane, or there is no such number or no first plane.
        """
        plane = self._checked_plane(plane)
        if not _is_int(index, 0, MAX_BIT_WIDTH - 1) or (index and not self.num_planes):
            raise KernelError(
                f"plane {index!r} cannot be made ready: {self.num_planes} planes are held, the "
                f"first comes before all others, and the last is number {MAX_BIT_WIDTH - 1}."
            )
        return self._ready(plane, index)

    def ready_scale(self, scale: NDArray[np.float32]) -> ReadyScale:
        """``scale`` as the kernel wants it, which :meth:`product` takes as well, and sooner.

        Raises:
            KernelError: If it is not a scale of this weight.
        """
        wanted = self._scale_shape
        if not _is_array(scale, np.float32, wanted):
            raise KernelError(
                f"the scale is {_kind(scale)}; a weight {self.shape} with "
                f"group_size={self.group_size} takes float32 {wanted}."
            )
        _check_memory("the scale is", scale)
        return ReadyScale(type(self), wanted, self._ready_scale(scale))

    def _checked_plane(self, plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
        wanted = (plane_bytes(self.shape),)
        if not _is_array(plane, np.uint8, wanted):
            raise KernelError(
                f"a plane is {_kind(plane)}; a weight {self.shape} has planes of uint8 {wanted}."
            )
        return np.ascontiguousarray(plane)

    def drop_plane(self) -> None:
        """Give back the last plane.

        Raises:
            KernelError: If none is held.
        """
        if not self.num_planes:
            raise KernelError("there is no plane to drop.")
        self._drop_plane()

    def plane(self, index: int) -> NDArray[np.uint8]:
        """Plane number ``index`` in the wire layout, ``(plane_bytes(shape),)``.

        It is what was added, bit for bit; bits after the last weight, which the wire format wants
        to be 0, may have become 0.

        Raises:
            KernelError: If it is not held.
        """
        if not _is_int(index, 0, self.num_planes - 1):
            raise KernelError(f"plane {index!r} was asked for; {self.num_planes} are held.")
        return self._plane(index)

    def levels(self, bit_width: int, start: int = 0, stop: int | None = None) -> NDArray[np.int8]:
        """The levels at ``bit_width`` of output channels ``start`` to ``stop``, ``(rows, in)``.

        Raises:
            BitWidthError: If fewer planes are held.
            KernelError: If there are no such output channels.
        """
        self._require(bit_width)
        stop = self.shape[0] if stop is None else stop
        if not _is_int(stop, 0, self.shape[0]) or not _is_int(start, 0, stop):
            raise KernelError(
                f"output channels {start!r} to {stop!r} were asked for; there are {self.shape[0]}."
            )
        return self._levels(bit_width, start, stop)

    def product(
        self,
        x: NDArray[np.float32],
        scale: NDArray[np.float32] | ReadyScale,
        bit_width: int,
        *,
        mode: Mode,
        gain: float = 1.0,
        num_threads: int = 1,
    ) -> NDArray[np.float32]:
        """Activations times the weight at ``bit_width``: ``(m, in)`` to ``(m, out)``.

        The result does not depend on ``num_threads``, nor, in the mode "int8", on the other rows
        of ``x``. In "float" a row may be summed in another order where there are other rows.

        Args:
            x: float32 ``(m, in)``, C-contiguous.
            scale: of the weight at ``bit_width``, float32 ``(out,)``, or ``(out, groups)`` where
                there is a group size; C-contiguous. Or what :meth:`ready_scale` made of it.
            bit_width: at most as many planes as are held.
            mode: "int8": activations are rounded to 8 bits, sums are integers. "float": nothing
                is rounded but sums.
            gain: multiplies the scale, in float32: for widths that share a scale, of which only
                one has to be made ready.
            num_threads: to compute with.

        Raises:
            BitWidthError: If fewer planes are held.
            KernelError: If an argument is not as said above.
        """
        self._require(bit_width)
        out, num_inputs = self.shape
        if not _is_array(x, np.float32, (*getattr(x, "shape", ())[:1], num_inputs)):
            raise KernelError(
                f"activations are {_kind(x)}; a weight {self.shape} takes float32 "
                f"(m, {num_inputs})."
            )
        _check_memory("the activations are", x)
        held = self._held_scale(scale)
        if mode not in MODES:
            raise KernelError(f"the mode is {mode!r}; give one of {', '.join(MODES)}.")
        per_scale = min(self.group_size or num_inputs, num_inputs)
        if mode == "int8" and per_scale > MAX_GROUP_INPUTS:
            raise KernelError(
                f"{per_scale} inputs share a scale; sums of more than {MAX_GROUP_INPUTS} "
                "may not fit an int32. Take groups, or the mode 'float'."
            )
        if not _is_int(num_threads, 1, MAX_INT):
            raise KernelError(
                f"num_threads is {num_threads!r}; give an integer from 1 to {MAX_INT}."
            )
        check_gain(gain)
        if not len(x):
            return np.empty((0, out), np.float32)
        return self._product(x, held, gain, bit_width, mode, num_threads)

    @property
    def _scale_shape(self) -> tuple[int, ...]:
        out = self.shape[0]
        return (out,) if self.group_size is None else (out, self.num_groups)

    def _held_scale(self, scale: Any) -> Any:
        """What the kernel computes with."""
        if not isinstance(scale, ReadyScale):
            scale = self.ready_scale(scale)
        elif scale.of is not type(self) or scale.shape != self._scale_shape:
            raise KernelError(
                f"the scale was made ready for a {scale.of.__name__} with scales {scale.shape}; "
                f"this is a {type(self).__name__} with scales {self._scale_shape}."
            )
        return scale.held

    def _require(self, bit_width: int) -> None:
        if not _is_int(bit_width, 1, self.num_planes):
            raise BitWidthError(
                bit_width,
                stored=range(1, self.num_planes + 1),
                where="the plane matrix",
                advice="Add the planes that are missing first.",
            )

    @abstractmethod
    def _add_plane(self, plane: NDArray[np.uint8]) -> None: ...

    def _ready(self, plane: NDArray[np.uint8], index: int) -> Callable[[], None]:
        def add() -> None:
            self._require_next(index)
            self._add_plane(plane)

        return add

    def _require_next(self, index: int) -> None:
        if self.num_planes != index:
            raise KernelError(
                f"the plane was made ready as number {index}; the next one is {self.num_planes}"
            )

    def _ready_scale(self, scale: NDArray[np.float32]) -> Any:
        return scale

    @abstractmethod
    def _drop_plane(self) -> None: ...

    @abstractmethod
    def _plane(self, index: int) -> NDArray[np.uint8]: ...

    @abstractmethod
    def _levels(self, bit_width: int, start: int, stop: int) -> NDArray[np.int8]: ...

    @abstractmethod
    def _product(
        self,
        x: NDArray[np.float32],
        scale: Any,
        gain: float,
        bit_width: int,
        mode: Mode,
        num_threads: int,
    ) -> NDArray[np.float32]: ...


def _is_int(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_array(array: object, dtype: type[np.generic], shape: tuple[int, ...]) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == shape


def check_gain(gain: object) -> None:
    """Raise KernelError if a product cannot take ``gain``."""
    if type(gain) is not float:
        raise KernelError(f"the gain is {gain!r}; give a float.")


def _check_memory(name: str, array: NDArray[Any]) -> None:
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise KernelError(f"{name} not C-contiguous and aligned; copy first.")


def _kind(array: object) -> str:
    """What ``array`` is, for a message."""
    if isinstance(array, np.ndarray):
        return f"{array.dtype} {array.shape}"
    return f"a {type(array).__name__}"
