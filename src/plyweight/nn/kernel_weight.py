"""Packed weights whose planes a kernel holds: a linear module multiplies with them as they are.

The planes are resident once, in the kernel's layout. Whoever asks for the weight itself (a tied
embedding, an export) gets the same values as ever, decoded from there; and what leaves the process
or the module, a state dict, a copy, a pickle, is in the layout of the wire. A state dict says
nothing about kernels, so it is loaded with any. A copy or a pickle asks anew for the kernel that
was asked for: "auto" finds the best where it arrives, and a demand that cannot be met is an error.

    :func:`plyweight.set_kernel` chooses (:mod:`plyweight.nn.choosing`); ``print(model)`` shows
    what was chosen, and why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from plyweight.codec import spread
from plyweight.errors import KernelError, listed
from plyweight.kernels import MAX_GROUP_INPUTS, MODES, Kernel, Mode, PlaneMatrix, pick
from plyweight.nn import products
from plyweight.nn.kept_scales import KeptScales, array_of
from plyweight.nn.packed import PackedWeight

__all__ = ["KernelWeight", "choose", "chosen", "require_kernel"]

REFERENCE, TRITON = "reference", "triton"
TILE_ROWS = 32  # that the native library decodes at a time

# From how many rows of activations on it is faster, in the mode "float", to decode the weight and
# let torch multiply, as the reference does. Elsewhere the kernel is as fast up to 256 rows at least
# (1024 x 1024, one thread of an EPYC with AVX-512, 256 rows: avx512 takes 2.7 ms in "float" and 1.1
# in "int8", avx2 5.9 and 3.5, torch 7.2 in float32 and 1.2 in bfloat16, and decoding 0.6; measured
# once by hand, `python benchmarks/kernels_dispatch.py` does it anew). What multiplies bfloat16 in
# hardware has AVX-512.
DENSE_ROWS = {
    ("portable", torch.float32): 16,
    ("portable", torch.bfloat16): 8,
    ("avx512", torch.bfloat16): 256,
}


@dataclass(frozen=True)
class _ReadyPlanes:
    """Planes that are in the layout of ``matrix`` already; each adder adds one."""

    matrix: PlaneMatrix
    adders: list[Callable[[], None]]


class KernelWeight(PackedWeight):
    """A weight ``(out, in)`` whose planes are in the layout of ``kernel``.

    Attributes:
        kernel: what multiplies, and why it.
        mode: "float" or "int8", see :mod:`plyweight.kernels.reference`.
    """

    kernel: Kernel
    mode: Mode
    _asked: str
    _matrix: PlaneMatrix
    _num_planes: list[int]
    _scales: KeptScales
    _number: int

    @classmethod
    def take(cls, packed: PackedWeight, asked: str, mode: Mode) -> None:
        """Let ``asked``, a kernel's name or "auto", hold the planes of ``packed``, in place.

        While it happens they are there twice.

        Raises:
            KernelError: If there is no such kernel for the device of ``packed``.
        """
        assert len(packed.shape) == 2
        device = packed.scale.device
        kernel = pick(asked, device=device.type)
        matrix = kernel.matrix(packed.shape, group_size=packed.group_size, device=str(device))
        layers = [packed.planes_of(layer) for layer in range(packed.num_held)]
        for planes in layers:
            _add(matrix, planes)
        for layer in range(packed.num_held):
            packed._buffers.pop(f"planes_{layer}", None)
        packed.__class__ = cls
        assert isinstance(packed, cls)
        packed.kernel, packed.mode, packed._asked = kernel, mode, asked
        packed._matrix, packed._scales = matrix, KeptScales()
        packed._num_planes = [0 if planes is None else len(planes) for planes in layers]
        packed._number = products.numbered(packed)

    def give_back(self) -> None:
        """Become a plain packed weight again, in place."""
        layers = [self.planes_of(layer) for layer in range(self.num_held)]
        for name in KernelWeight.__annotations__:
            delattr(self, name)
        _become_plain(self)
        for layer, planes in enumerate(layers):
            self.register_buffer(f"planes_{layer}", planes)

    @property
    def kernel_name(self) -> str:
        """What computes with the planes, how, and why."""
        return f"{self.kernel.name} ({self.kernel.reason}), mode={self.mode}"

    @property
    def kernel_bytes(self) -> int:
        """The memory that the planes take in the kernel's layout."""
        return self._matrix.nbytes

    def forward(self) -> Tensor:
        """The weight at the current bit-width, in the model's dtype."""
        return products.values(self.scale, self.row, self._like, self._number)

    def times(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, ``(..., in)`` to ``(..., out)``.

        Under ``torch.autocast`` the result has the dtype that the reference would have.

        Raises:
            KernelError: If inputs are not of the model's dtype, or do not fit the weight.
        """
        device = self.kernel.device  # asking the inputs takes half a microsecond
        if torch.is_autocast_enabled(device):
            if inputs.is_floating_point() and inputs.dtype != torch.float64:  # as torch does
                inputs = inputs.to(torch.get_autocast_dtype(device))
        elif inputs.dtype != self._like.dtype:
            raise KernelError(
                f"activations are {inputs.dtype}; a weight {tuple(self.shape)} takes floats "
                f"(..., {self.shape[1]}) of the model's {self._like.dtype}. Convert them, or the "
                "model with model.to(dtype)."
            )
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            # A bias may be trained; the operator has no gradients.
            y = products.product(inputs, self.scale, self.row, None, self._number)
            return (y + bias).to(y.dtype)
        return products.product(inputs, self.scale, self.row, bias, self._number)

    def product_of(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """What the operator computes: the kernel's product plus ``bias``, rounded to x's dtype.

        Once; only ``triton`` rounds its product before the bias is added.
        """
        if self._is_faster_decoded(x):
            weight = self.values_of(scale)
            return F.linear(x.detach(), weight, None if bias is None else bias.to(x.dtype))
        # A small product takes 8 µs and every call into torch half of one, so none is made that
        # would do nothing.
        rows = x.detach() if x.dim() == 2 else x.detach().reshape(-1, self.shape[1])
        if not rows.is_contiguous():
            rows = rows.contiguous()
        if rows.dtype != torch.float32 and self.kernel.name != TRITON:  # which takes others too
            rows = rows.float()
        own = self._own(self.bit_width)
        given, gain = self._scales.at(own, scale, self._buffers.get(f"gain_{own}"), self._matrix)
        y = _taken(
            self._matrix.product(
                array_of(rows),
                given,
                own,
                mode=self.mode,
                gain=gain,
                num_threads=torch.get_num_threads(),
            )
        )
        if bias is not None:
            y += bias
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.shape[0])

    def _is_faster_decoded(self, x: Tensor) -> bool:
        most = DENSE_ROWS.get((self.kernel.name, x.dtype))
        if most is None or self.mode != "float" or x.dtype != self._like.dtype:
            return False
        return x.numel() >= most * self.shape[1]

    def values_of(self, scale: Tensor) -> Tensor:
        """What the operator computes: the weight with that scale, decoded."""
        own = self._own(self.bit_width)
        scale = self.scale_at(own, scale)
        if self.kernel.name == TRITON:
            levels = _taken(self._matrix.levels(own)).float()
            factors: Tensor = spread(scale, self.shape, self.group_size)
            return (levels * factors).to(self._like.dtype)

        def levels_of(start: int, stop: int) -> NDArray[np.int8]:
            return self._matrix.levels(own, start, stop)

        return self._values_by_block(levels_of, scale, unit=TILE_ROWS)

    def rows_of(self, ids: Tensor) -> Tensor:
        """The values of rows ``ids`` of the weight, ``(..., in)``: few others are decoded."""
        return products.rows(ids, self.scale, self.row, self._like, self._number)

    def rows_of_values(self, ids: Tensor, scale: Tensor) -> Tensor:
        """What the operator computes: rows of the weight, each that is asked for decoded once."""
        unique, places = torch.unique(ids, return_inverse=True)
        # A row is decoded with its tile.
        if self.kernel.name == TRITON or len(unique) * TILE_ROWS >= self.shape[0]:
            return F.embedding(ids, self.values_of(scale))
        own = self._own(self.bit_width)
        factors = self.scale_at(own, scale).index_select(0, unique)  # refuses what is out of range
        rows = [self._matrix.levels(own, i, i + 1) for i in unique.tolist()]
        levels = torch.from_numpy(np.concatenate([np.empty((0, self.shape[1]), np.int8), *rows]))
        values = levels.float() * spread(factors, tuple(levels.shape), self.group_size)
        return F.embedding(places, values.to(self._like.dtype))

    def planes_of(self, layer: int) -> Tensor | None:
        """What :meth:`hold` was given for a layer that is held, as it is on the wire."""
        first, num = sum(self._num_planes[:layer]), self._num_planes[layer]
        if not num:
            return None
        return torch.stack([_taken(self._matrix.plane(i)) for i in range(first, first + num)])

    def ready(self, layer: int, planes: Tensor) -> object:
        """The planes in the kernel's layout: what is left to do takes no time."""
        matrix = vars(self).get("_matrix")  # another thread may be changing the kernel
        if matrix is None or not matrix.num_planes:
            return None  # the first planes: nobody waits for them yet
        first = self._own(self._all_bit_widths[layer - 1])  # the layer before ends there
        adders = [matrix.ready(array_of(row), first + i) for i, row in enumerate(planes)]
        return _ReadyPlanes(matrix, adders)

    def _hold_planes(self, layer: int, planes: Tensor | None, ready: object) -> None:
        while self._matrix.num_planes > sum(self._num_planes[:layer]):
            self._matrix.drop_plane()  # of a change that was interrupted
        if isinstance(ready, _ReadyPlanes) and ready.matrix is self._matrix:
            for add in ready.adders:
                add()
        else:  # the kernel is another one by now
            _add(self._matrix, planes)
        self._num_planes[layer:] = [0 if planes is None else len(planes)]

    def _release_planes(self, layer: int) -> None:
        self._scales = KeptScales()  # one may have had the gain of that layer
        for _ in range(self._num_planes[layer]):
            self._matrix.drop_plane()
        del self._num_planes[layer:]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        device = fn(self._like).device
        if device == self._like.device:
            self._scales = KeptScales()
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        asked, mode = self._asked, self.mode
        pick(asked, device=device.type)  # raises before anything is moved
        self.give_back()
        result = self._apply(fn, recurse)  # of a plain weight, whose planes are buffers
        choose(self, asked, mode)
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for layer in range(self.num_held):
            if (planes := self.planes_of(layer)) is not None:
                destination[f"{prefix}planes_{layer}"] = planes

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        asked, mode = self._asked, self.mode
        self.give_back()  # a plain one knows how
        try:
            self._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            choose(self, asked, mode)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_buffers": dict(self._buffers)}
        for name in ("kernel", "_matrix", "_num_planes", "_scales", "_number"):
            del state[name]
        for layer in range(self.num_held):
            state["_buffers"][f"planes_{layer}"] = self.planes_of(layer)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        asked, mode = state.pop("_asked"), state.pop("mode")  # a plain weight has neither
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _become_plain(self)
        choose(self, asked, mode)


def _become_plain(weight: PackedWeight) -> None:
    weight.__class__ = PackedWeight


def _add(matrix: PlaneMatrix, planes: Tensor | None) -> None:
    for row in () if planes is None else planes:
        matrix.add_plane(array_of(row))


def _taken(array: Any) -> Tensor:
    """What a kernel gave, as a tensor."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def require_kernel(weight: PackedWeight, kernel: str, mode: Mode) -> None:
    """Raise KernelError if ``kernel`` cannot compute with ``weight`` in ``mode``."""
    assert len(weight.shape) == 2
    if mode not in MODES:
        raise KernelError(f"the mode is {mode!r}; give one of {listed(MODES)}.")
    if (kernel, mode) != (REFERENCE, "float"):
        device = weight.scale.device
        picked = pick(kernel, device=device.type)
        if picked.name == TRITON and mode != "float":
            raise KernelError(f"the kernel 'triton' has the mode 'float' only, not {mode!r}.")
        # An empty one; or refuses.
        picked.matrix(weight.shape, group_size=weight.group_size, device=str(device))
    per_scale = min(weight.group_size or weight.shape[1], weight.shape[1])
    if mode == "int8" and per_scale > MAX_GROUP_INPUTS:
        raise KernelError(
            f"{per_scale} inputs of a weight {weight.shape} share a scale; the mode 'int8' sums "
            f"at most {MAX_GROUP_INPUTS}. Take the mode 'float'."
        )


def choose(weight: PackedWeight, kernel: str, mode: Mode) -> None:
    """Let ``kernel`` compute with ``weight``, which may be plain or held by another kernel."""
    reason = _plain_because(weight, kernel, mode)
    if isinstance(weight, KernelWeight):
        if reason is None:
            picked = pick(kernel, device=weight.scale.device.type)
            if picked.name == weight.kernel.name:  # the layout is the same
                weight.kernel, weight.mode, weight._asked = picked, mode, kernel
                return
        weight.give_back()
    if reason is None:
        KernelWeight.take(weight, kernel, mode)
    else:
        weight.kernel_reason = reason


def chosen(weight: PackedWeight) -> tuple[str, Mode]:
    """What :func:`choose` was given for ``weight``, or would have to be."""
    if isinstance(weight, KernelWeight):
        return weight._asked, weight.mode
    return REFERENCE, "float"


def _plain_because(weight: PackedWeight, kernel: str, mode: Mode) -> str | None:
    """Why that is what a plain weight does, decode and let torch multiply; None if it is not."""
    if mode != "float":
        return None
    if kernel == REFERENCE:
        return ""
    picked = pick(kernel, device=weight.scale.device.type)
    return picked.reason if picked.name == REFERENCE else None
