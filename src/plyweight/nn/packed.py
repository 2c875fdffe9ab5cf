"""Packed modules: what is resident is the bit planes that are held, never a float weight.

A packed weight decodes when it is used: the first planes of its own bit-width make the codes, the
codes make the levels, times the scale. It is the definition that faster kernels must equal, and
the default, for it computes what was trained bit for bit. With another kernel the planes are in
its layout instead (:mod:`plyweight.nn.kernel_weight`).

On the CPU that happens a block of rows at a time. Beside the planes and the one weight that is
being computed with, a call then takes no memory worth counting, and the blocks are small enough
to come back to the system: what a model holds is what its process takes.
"""

from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from plyweight.codec import decode, from_planes, levels_from_planes, plane_bytes, spread
from plyweight.nn.pages import empty
from plyweight.nn.quantized import (
    BiasByBitWidth,
    InputQuantizer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLinear,
)
from plyweight.quantizers import ActivationQuantizer, Switchable

__all__ = [
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedModule",
    "PackedWeight",
]

BLOCK_WEIGHTS = 2**17  # decoded at a time: a block of :mod:`plyweight.codec.planes`


class PackedWeight(Switchable):
    """The planes of one weight, and its scale and gains.

    Buffers, where ``i`` counts the artifact's layers and only held layers have theirs:
        scale: float32 ``(out,)``, or ``(out, ceil(in / group_size))``.
        planes_<i>: uint8 ``(planes, bytes)`` that layer ``i`` brought.
        gain_<b>: float32 ``(1,)`` or the scale's shape, at own bit-width ``b`` where it is not 1.
    """

    scale: Tensor
    _like: Tensor
    kernel_reason = ""

    def __init__(
        self,
        shape: tuple[int, ...],
        scale: Tensor,
        bit_widths: Sequence[int],
        *,
        dtype: torch.dtype,
        group_size: int | None = None,
        pinned: int = 0,
    ) -> None:
        super().__init__()
        self.make_switchable(bit_widths, pinned=pinned, device=scale.device)
        self.register_buffer("scale", scale)
        self.shape, self.group_size = shape, group_size
        # An empty tensor and not a dtype, so that `model.to(dtype)` applies to it. It rounds the
        # scale as well; load into a model of that dtype instead, and only the values are.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=scale.device))
        self.num_held = 0

    @property
    def available_bit_widths(self) -> tuple[int, ...]:
        """Those whose layer is held."""
        return self._all_bit_widths[: self.num_held]

    def ready(self, layer: int, planes: Tensor) -> object:  # noqa: ARG002  # nothing takes long
        """What of :meth:`hold` takes long and changes nothing, done before; for its ``ready``."""
        return None

    def hold(
        self, layer: int, planes: Tensor | None, gain: Tensor | None, ready: object = None
    ) -> None:
        """Take what layer number ``layer``, the next one, brings; None where it brings none."""
        assert layer == self.num_held
        self._hold_planes(layer, planes, ready)
        own = self._own(self._all_bit_widths[layer])
        if gain is not None:
            self.register_buffer(f"gain_{own}", gain)
        self.num_held += 1

    def release(self, layer: int) -> None:
        """Give back layer number ``layer``, the last one held: its planes and its gain."""
        assert 0 < layer == self.num_held - 1
        self._release_planes(layer)
        own, before = (self._own(self._all_bit_widths[i]) for i in (layer, layer - 1))
        if own != before and f"gain_{own}" in self._buffers:
            delattr(self, f"gain_{own}")
        self.num_held -= 1

    @property
    def kernel_name(self) -> str:
        """What computes with the planes, and why if nobody asked for it."""
        return f"reference ({self.kernel_reason})" if self.kernel_reason else "reference"

    def planes_of(self, layer: int) -> Tensor | None:
        """What :meth:`hold` was given for a layer that is held, as it is on the wire."""
        return self._buffers[f"planes_{layer}"]

    def _hold_planes(self, layer: int, planes: Tensor | None, ready: object) -> None:  # noqa: ARG002
        self.register_buffer(f"planes_{layer}", planes)

    def _release_planes(self, layer: int) -> None:
        delattr(self, f"planes_{layer}")

    def forward(self) -> Tensor:
        """The weight at the current bit-width, in the model's dtype."""
        own = self._own(self.bit_width)
        rows = self._planes_held(own)
        scale = self.scale_at(own)
        # A compiler fuses the definition into one pass by itself, and on a GPU a block is a
        # dozen launches. A type is not exactly Tensor where torch only follows shapes.
        if torch.compiler.is_compiling() or any(
            type(row) is not Tensor or not row.is_cpu for row in rows
        ):
            return self._decoded(rows, scale)
        return self._decoded_by_block(rows, scale)

    def rows_of(self, ids: Tensor) -> Tensor:
        """The values of rows ``ids`` of the weight, ``(..., in)``: no other row is decoded."""
        row_weights = prod(self.shape[1:])
        if row_weights % 8:
            return F.embedding(ids, self())  # a row that begins inside a byte
        flat, shape = ids.reshape(-1), (ids.numel(), *self.shape[1:])
        own = self._own(self.bit_width)
        held = [plane.view(self.shape[0], row_weights // 8) for plane in self._planes_held(own)]
        # Not by brackets, which count from the end where an id is negative.
        rows = [plane.index_select(0, flat).flatten() for plane in held]
        scale = self.scale_at(own)
        scale = scale.index_select(0, flat) if len(scale) > 1 else scale
        levels = decode(from_planes(rows, shape), own).float()
        factors: Tensor = spread(scale, shape, self.group_size)
        values: Tensor = (levels * factors).to(self._like.dtype)
        return values.view(*ids.shape, *self.shape[1:])

    def times(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, ``(..., in)`` to ``(..., out)``."""
        return F.linear(inputs, self(), bias)

    def scale_at(self, own: int, scale: Tensor | None = None) -> Tensor:
        """``scale``, or the weight's, at own bit-width ``own``, its gain included, float32."""
        gain = self._buffers.get(f"gain_{own}")
        scale = (self.scale if scale is None else scale).float()
        return scale if gain is None else scale * gain.float()

    def _planes_held(self, num: int) -> list[Tensor]:
        """The first ``num``, each as it is on the wire."""
        brought = [self.planes_of(i) for i in range(self.num_held)]
        return [row for planes in brought if planes is not None for row in planes][:num]

    def _decoded(self, rows: list[Tensor], scale: Tensor) -> Tensor:
        """The definition: the values of the planes ``rows``."""
        levels = decode(from_planes(rows, self.shape), len(rows)).float()
        values: Tensor = (levels * spread(scale, self.shape, self.group_size)).to(self._like.dtype)
        return values

    def _decoded_by_block(self, rows: list[Tensor], scale: Tensor) -> Tensor:
        """The same; what is computed on the way never grows beyond a block."""
        planes = [row.numpy() for row in rows]  # numpy unpacks bits several times faster
        row_weights = prod(self.shape[1:])

        def levels_of(start: int, stop: int) -> NDArray[np.int8]:
            shape, first = (stop - start, *self.shape[1:]), start * row_weights // 8
            cut = [p[first : first + plane_bytes(shape)] for p in planes]
            return levels_from_planes(cut, shape)

        # Rows of the weight that end with a byte of its planes.
        return self._values_by_block(levels_of, scale, unit=8 // gcd(8, row_weights))

    def _values_by_block(
        self, levels_of: Callable[[int, int], NDArray[np.int8]], scale: Tensor, *, unit: int = 1
    ) -> Tensor:
        """The values of ``levels_of(start, stop)``, some multiple of ``unit`` rows at a time."""
        values = empty(self.shape, self._like.dtype)
        step = max(BLOCK_WEIGHTS // (prod(self.shape[1:]) * unit), 1) * unit
        for first in range(0, len(values), step):
            block = values[first : first + step]
            levels = levels_of(first, first + len(block))
            scales = scale[first : first + step] if len(scale) > 1 else scale
            factors = spread(scales, tuple(block.shape), self.group_size)
            block.copy_(torch.from_numpy(levels) * factors)  # int8 times float32 is float32
        return values

    @property
    def _all_bit_widths(self) -> tuple[int, ...]:
        """The bit-widths of the artifact, of which the first ``num_held`` are held."""
        return tuple(self._rows)

    def _own(self, bit_width: int) -> int:
        return self.own_bit_widths[self._rows[bit_width]]

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        held = f"shape={self.shape}, bit_widths={self.available_bit_widths}"
        return f"{held}, kernel={self.kernel_name}"


class PackedModule(BiasByBitWidth):
    """What packed modules share.

    Attributes:
        packed_weight: the planes; tied modules share one.
        input_quantizer: quantizes the input; ``nn.Identity`` where activations stay float.
    """

    packed_weight: PackedWeight
    input_quantizer: InputQuantizer

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        packed_weight: PackedWeight,
        input_quantizer: ActivationQuantizer | None = None,
    ) -> Self:
        """Turn ``module``, an exact instance of the float class, into a packed one in place."""
        module.__class__ = cls
        assert isinstance(module, cls)
        del module._parameters["weight"]
        module.packed_weight = packed_weight
        module.input_quantizer = input_quantizer or nn.Identity()
        return module

    def _weight(self) -> Tensor:
        """The weight at the current bit-width, decoded anew at each access."""
        values: Tensor = self.packed_weight()
        return values

    weight: Tensor = property(_weight)  # type: ignore[assignment]  # torch declares an attribute

    def switch_of_bias(self) -> Switchable:
        """The weight, which knows the current bit-width."""
        return self.packed_weight


class PackedLinear(PackedModule, QuantizedLinear):
    """``nn.Linear`` whose weight ``(out, in)`` is resident as planes."""

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T + bias``, both operands on their grids."""
        return self.packed_weight.times(self.input_quantizer(inputs), self.bias)


class PackedConv1d(PackedModule, QuantizedConv1d):
    """``nn.Conv1d`` whose weight ``(out, in / groups, length)`` is resident as planes."""


class PackedConv2d(PackedModule, QuantizedConv2d):
    """``nn.Conv2d`` whose weight ``(out, in / groups, height, width)`` is resident as planes."""


class PackedEmbedding(PackedModule, nn.Embedding):
    """``nn.Embedding`` whose weight ``(num_embeddings, dim)`` is resident as planes."""

    def forward(self, ids: Tensor) -> Tensor:
        """``(...)`` int to ``(..., dim)``."""
        return self.packed_weight.rows_of(ids)
