"""What a product is: the definition that every faster kernel must equal.

With ``v = scale * level`` the value of a weight at a bit-width (:mod:`plyweight.codec`),

    mode "float"   y = sum over inputs of x * v
    mode "int8"    y = sum over groups of float32(sum over inputs of q * level) * (sx * scale)

where ``q`` and ``sx`` are the activations, rounded to 8 bits by :func:`quantize_rows` for each row
and group.

In "int8" everything is fixed, so kernels agree bit for bit: the inner sum is an integer and has no
order; it becomes a float32, rounded once; the groups are added in ascending order, in float32, by
a multiplication and an addition that each round. A kernel may leave a common power of two out of
its levels (at ``b`` bits all are odd multiples of ``2**(7 - b)``) and multiply by it afterwards:
a power of two rounds nothing.

In "float" the order of the sum is open, for it decides about the speed. Whatever the order,

    |y - exact| <= error_bound(...)

holds in float32 (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), also
where a group's sum is multiplied by its scale at the end instead of every weight by its own: as
long as activations and scales are finite and no sum of ``x * level`` or ``x * v``, in whatever
order, grows beyond float32. Beyond that a kernel may answer infinite or NaN where the definition,
which sums in float64 and multiplies values first, is finite, and the other way round.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from plyweight.codec import decode, from_planes, spread
from plyweight.kernels.matrix import Mode, PlaneMatrix

__all__ = [
    "ReferenceMatrix",
    "error_bound",
    "float_product",
    "groups_of",
    "int8_product",
    "quantize_rows",
]

MAX_CODE = 127  # of an activation; -128 is left out, so that codes and levels are symmetric


def groups_of(num_inputs: int, group_size: int | None) -> Iterator[slice]:
    """The inputs that share a scale, ascending; the last group may be shorter."""
    size = group_size or num_inputs
    for start in range(0, num_inputs, size):
        yield slice(start, min(start + size, num_inputs))


def quantize_rows(
    x: NDArray[np.float32], group_size: int | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round activations to 8 bits, each row and group of inputs by a scale of its own.

    ``scale = max|x| / 127`` and ``code = round(x / scale)``, half to even, both in float32. Where
    all is zero, or so small that the scale rounds to zero, codes are 0. Where a value is not
    finite the scale is NaN, and so are all outputs of that row.

    Args:
        x: float32 ``(m, in)``.
        group_size: as of the weight.

    Returns:
        int8 codes ``(m, in)``, -127 ... 127, and float32 scales ``(m, groups)``.
    """
    codes = np.zeros(x.shape, np.int8)
    scales = []
    with np.errstate(all="ignore"):  # what is not finite is answered below
        for group in groups_of(x.shape[1], group_size):
            part = x[:, group]
            peak = abs(part).max(axis=1, keepdims=True)  # NaN if there is one
            scale = peak / np.float32(MAX_CODE)
            # Of a scale that is itself rounded, far below 1e-38, the peak may be more than 127.
            rounded = np.rint(part / scale).clip(-MAX_CODE, MAX_CODE)
            is_plain = (scale > 0) & np.isfinite(peak)
            codes[:, group] = np.where(is_plain, rounded, 0).astype(np.int8)
            scales.append(np.where(np.isfinite(peak), scale, np.float32(np.nan)))
    return codes, np.concatenate(scales, axis=1)


def int8_product(
    x: NDArray[np.float32],
    levels: NDArray[np.int8],
    scale: NDArray[np.float32],
    group_size: int | None = None,
) -> NDArray[np.float32]:
    """The product in the mode "int8".

    Args:
        x: float32 ``(m, in)``.
        levels: int8 ``(out, in)``.
        scale: float32 ``(out,)`` or ``(out, groups)``.
        group_size: inputs that share a scale.

    Returns:
        float32 ``(m, out)``.
    """
    codes, row_scales = quantize_rows(x, group_size)
    scales = scale.reshape(len(levels), -1)
    y = np.zeros((len(x), len(levels)), np.float32)
    for index, group in enumerate(groups_of(x.shape[1], group_size)):
        # A float64 holds every integer on the way, and has a BLAS.
        sums = codes[:, group].astype(np.float64) @ levels[:, group].astype(np.float64).T
        with np.errstate(all="ignore"):  # too large is infinite, and NaN stays NaN
            y += sums.astype(np.float32) * (row_scales[:, index, None] * scales[:, index])
    return y


def float_product(
    x: NDArray[np.float32],
    levels: NDArray[np.int8],
    scale: NDArray[np.float32],
    group_size: int | None = None,
) -> NDArray[np.float32]:
    """The product in the mode "float", summed in float64 and rounded once; as for int8_product."""
    values = _values(levels, scale, group_size).astype(np.float64)
    with np.errstate(all="ignore"):
        y: NDArray[np.float32] = (x.astype(np.float64) @ values.T).astype(np.float32)
    return y


def error_bound(
    x: NDArray[np.float32],
    levels: NDArray[np.int8],
    scale: NDArray[np.float32],
    group_size: int | None = None,
) -> NDArray[np.float64]:
    """How far a product in the mode "float" may be from :func:`float_product`, ``(m, out)``.

    A sum of ``in`` products in float32 rounds each term at most ``in`` times: once as a product
    and ``in - 1`` times in a sum; its value, or its group's sum, once more in the multiplication
    by the scale; and the definition above rounds its values and its result. With ``u = 2**-24``
    that is at most ``(in + 3) u / (1 - (in + 3) u)`` of the sum of absolute terms. What is too
    small for a normal float32 is left out of account, and it says nothing where a sum of absolute
    ``x * level`` overflows float32, or an activation or a scale is not finite.
    """
    rounded = (x.shape[1] + 3) * 2.0**-24
    terms = abs(x.astype(np.float64)) @ abs(_values(levels, scale, group_size).astype(np.float64)).T
    bound: NDArray[np.float64] = rounded / (1 - rounded) * terms
    return bound


def _values(
    levels: NDArray[np.int8], scale: NDArray[np.float32], group_size: int | None
) -> NDArray[np.float32]:
    """What a packed module decodes to, bit for bit."""
    values: NDArray[np.float32] = levels.astype(np.float32) * spread(
        scale, levels.shape, group_size
    )
    return values


class ReferenceMatrix(PlaneMatrix):
    """A plane matrix in numpy: planes stay as they came, and are decoded at each product."""

    kernel = "reference"

    def __init__(self, shape: tuple[int, int], *, group_size: int | None = None) -> None:
        super().__init__(shape, group_size=group_size)
        self._planes: list[NDArray[np.uint8]] = []

    @property
    def num_planes(self) -> int:
        """How many are held."""
        return len(self._planes)

    @property
    def nbytes(self) -> int:
        """As many as on the wire."""
        return sum(plane.nbytes for plane in self._planes)

    def _add_plane(self, plane: NDArray[np.uint8]) -> None:
        self._planes.append(plane.copy())

    def _drop_plane(self) -> None:
        self._planes.pop()

    def _plane(self, index: int) -> NDArray[np.uint8]:
        return self._planes[index].copy()

    def _levels(self, bit_width: int, start: int, stop: int) -> NDArray[np.int8]:
        codes = from_planes(self._planes[:bit_width], self.shape)[start:stop]
        levels: NDArray[np.int8] = decode(codes, bit_width)
        return levels

    def _product(
        self,
        x: NDArray[np.float32],
        scale: NDArray[np.float32],
        gain: float,
        bit_width: int,
        mode: Mode,
        num_threads: int,  # noqa: ARG002  # numpy's own
    ) -> NDArray[np.float32]:
        product = int8_product if mode == "int8" else float_product
        return product(x, self.levels(bit_width), scale * np.float32(gain), self.group_size)
