"""The operators of packed weights whose planes a kernel holds.

    plyweight::product(x, scale, row, bias, number)
                                                (..., in) to (..., out), of x's dtype
    plyweight::values(scale, row, like, number) the weight (out, in), of like's dtype
    plyweight::rows(ids, scale, row, like, number)
                                                (...) to (..., in), rows of the weight

The planes are in a kernel's own layout and no tensors, so a weight goes by its number, one for as
long as the process runs. Gains are found with the planes; the scale is the one that is given. What
an operator computes depends on the bit-width, which is why ``row`` is among its arguments, and a
compiled graph serves every bit-width.

Under ``torch.compile``, ``torch.export`` and with fake tensors only shapes are followed. A program
that was exported holds no planes: it runs in this process, as long as the weight is there.

There is no derivative, backward or forward: who asks for one is refused.
"""

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

from plyweight.errors import KernelError

__all__ = ["Multiplier", "numbered", "product", "rows", "values"]


class Multiplier(Protocol):
    """A packed weight whose planes a kernel holds."""

    shape: tuple[int, ...]

    def product_of(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """``(..., in)`` to ``(..., out)``, at the current bit-width."""
        ...

    def values_of(self, scale: Tensor) -> Tensor:
        """The weight at the current bit-width, in the model's dtype."""
        ...

    def rows_of_values(self, ids: Tensor, scale: Tensor) -> Tensor:
        """Rows ``ids`` of it, ``(..., in)``."""
        ...


_numbers = count(1)
_weights: "WeakValueDictionary[int, Multiplier]" = WeakValueDictionary()


def numbered(weight: Multiplier) -> int:
    """A number for ``weight``, by which the operators find it as long as it lives."""
    number = next(_numbers)
    _weights[number] = weight
    return number


def product(x: Tensor, scale: Tensor, row: Tensor, bias: Tensor | None, number: int) -> Tensor:
    """Activations times the weight of that number, plus ``bias``, through the dispatcher.

    Raises:
        KernelError: If a derivative would be needed, or shapes or dtypes do not fit.
    """
    result: Tensor = torch.ops.plyweight.product.default(x, scale, row, bias, number)
    return result


def values(scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:
    """The weight of that number, through the dispatcher."""
    result: Tensor = torch.ops.plyweight.values.default(scale, row, like, number)
    return result


def rows(ids: Tensor, scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:
    """Rows of the weight of that number, through the dispatcher."""
    result: Tensor = torch.ops.plyweight.rows.default(ids, scale, row, like, number)
    return result


def _weight(number: int) -> Multiplier:
    weight = _weights.get(number)
    if weight is None:
        raise KernelError(
            f"the planes of weight {number} are not in this process. A program that was compiled "
            "or exported with a kernel runs beside its model; export with the kernel 'reference'."
        )
    if not hasattr(weight, "product_of"):  # plain by now
        raise KernelError(
            f"the planes of weight {number} are held by no kernel any more. A program that was "
            "compiled or exported with a kernel needs one; choose one with plyweight.set_kernel, "
            "or export again."
        )
    return weight


def _checked(x: Tensor, number: int) -> Multiplier:
    weight = _weight(number)
    if not x.is_floating_point() or not x.dim() or x.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"activations are {x.dtype} {tuple(x.shape)}; a weight {tuple(weight.shape)} takes "
            f"floats (..., {weight.shape[1]})."
        )
    return weight


def _product(
    x: Tensor,
    scale: Tensor,
    row: Tensor,  # noqa: ARG001
    bias: Tensor | None,
    number: int,
) -> Tensor:
    return _checked(x, number).product_of(x, scale, bias)


def _values(scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:  # noqa: ARG001
    return _weight(number).values_of(scale)


def _rows(ids: Tensor, scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:  # noqa: ARG001
    return _weight(number).rows_of_values(ids, scale)


def _fake_product(
    x: Tensor,
    scale: Tensor,  # noqa: ARG001
    row: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    number: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _checked(x, number).shape[0]))


def _fake_values(scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:  # noqa: ARG001
    return like.new_empty(_weight(number).shape)


def _fake_rows(
    ids: Tensor,
    scale: Tensor,  # noqa: ARG001
    row: Tensor,  # noqa: ARG001
    like: Tensor,
    number: int,
) -> Tensor:
    return like.new_empty((*ids.shape, _weight(number).shape[1]))


def _refuse_derivatives(*tensors: Tensor | None) -> None:
    has_gradients, has_tangents = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor is None:
            continue
        is_backward = has_gradients and tensor.requires_grad
        if is_backward or (has_tangents and forward_ad.unpack_dual(tensor).tangent is not None):
            raise KernelError(
                f"a {'gradient' if is_backward else 'forward-mode derivative'} through what a "
                "kernel computes was asked for, and there is none. Compute under torch.no_grad(), "
                "without tangents, or with plyweight.set_kernel(model, 'reference')."
            )


def _refusing_product(
    x: Tensor, scale: Tensor, row: Tensor, bias: Tensor | None, number: int
) -> Tensor:
    _refuse_derivatives(x, scale, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return product(x, scale, row, bias, number)


def _refusing_values(scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:
    _refuse_derivatives(scale)
    with torch._C._AutoDispatchBelowAutograd():
        return values(scale, row, like, number)


def _refusing_rows(ids: Tensor, scale: Tensor, row: Tensor, like: Tensor, number: int) -> Tensor:
    _refuse_derivatives(scale)
    with torch._C._AutoDispatchBelowAutograd():
        return rows(ids, scale, row, like, number)


# Not `torch.library.custom_op`, whose wrapper takes 9 µs a call, twice this one's: a product of a
# small weight takes 10.
_library = torch.library.Library("plyweight", "DEF")
_library.define("product(Tensor x, Tensor scale, Tensor row, Tensor? bias, int number) -> Tensor")
_library.define("values(Tensor scale, Tensor row, Tensor like, int number) -> Tensor")
_library.define("rows(Tensor ids, Tensor scale, Tensor row, Tensor like, int number) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("product", _product, _device)
    _library.impl("values", _values, _device)
    _library.impl("rows", _rows, _device)
_library.impl("product", _refusing_product, "Autograd")
_library.impl("values", _refusing_values, "Autograd")
_library.impl("rows", _refusing_rows, "Autograd")
torch.library.register_fake("plyweight::product", _fake_product, lib=_library)
torch.library.register_fake("plyweight::values", _fake_values, lib=_library)
torch.library.register_fake("plyweight::rows", _fake_rows, lib=_library)
