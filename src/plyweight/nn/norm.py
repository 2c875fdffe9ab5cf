"""Switchable batch norm: private statistics and affine parameters for every bit-width.

Activations at 2 bits have other means and variances than at 8, so each bit-width normalizes with
its own (Yu et al., "Slimmable Neural Networks", ICLR 2019; Jin et al., "AdaBits", CVPR 2020).
They are rows of one tensor, ``(bit-widths, features)``, so that one compiled graph serves all.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.quantizers import Switchable

__all__ = [
    "BATCH_COUNT",
    "BATCH_NORM_TENSORS",
    "SHARED",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
    "shared_batch_norms",
    "switchable_batch_norms",
]

# What a batch norm has of its own at each bit-width, by its names in a state dict, and the count
# of batches, which matters to nobody but a cumulative average in progress: it is not shipped.
BATCH_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
BATCH_COUNT = "num_batches_tracked"
# Why a batch norm stayed a float module although its neighbours are layered.
SHARED = "one batch norm is shared by all bit-widths"


class _SwitchableBatchNorm(Switchable, nn.modules.batchnorm._BatchNorm):
    @classmethod
    def from_float(cls, module: nn.Module, bit_widths: Sequence[int]) -> Self:
        """Turn ``module`` into one that starts from its statistics at every bit-width, in place."""
        module.__class__ = cls
        assert isinstance(module, cls)
        tensors = {n: getattr(module, n) for n in (*BATCH_NORM_TENSORS, BATCH_COUNT)}
        device = next((t.device for t in tensors.values() if t is not None), None)
        module.make_switchable(bit_widths, device=device)
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            rows = tensor.detach().expand(len(bit_widths), *tensor.shape).clone()
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(rows, requires_grad=tensor.requires_grad))
            else:
                module.register_buffer(name, rows)
        return module

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize ``(batch, features, ...)`` with what belongs to the current bit-width."""
        self._check_input_dim(inputs)  # type: ignore[no-untyped-call]
        weight = None if self.weight is None else self.row_of(self.weight)
        bias = None if self.bias is None else self.row_of(self.bias)
        if self.running_mean is None or self.running_var is None:
            return F.batch_norm(inputs, None, None, weight, bias, True, 0.0, self.eps)
        mean, var = self.row_of(self.running_mean), self.row_of(self.running_var)
        if not self.training:
            return F.batch_norm(inputs, mean, var, weight, bias, False, 0.0, self.eps)
        outputs = F.batch_norm(
            inputs, mean, var, weight, bias, True, self._average_factor(), self.eps
        )
        # `mean` and `var` are copies of a row, which batch_norm has brought up to date.
        row = self.row.view(1)
        self.running_mean.index_copy_(0, row, mean[None])
        self.running_var.index_copy_(0, row, var[None])
        return outputs

    def row_parameters(self) -> list[nn.Parameter]:
        """The affine parameters, if there are any."""
        return [p for p in (self.weight, self.bias) if p is not None]

    def _average_factor(self) -> float:
        """The weight of this batch in the running statistics; counts the batch."""
        tracked = self.num_batches_tracked
        if tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        tracked.index_add_(0, self.row.view(1), torch.ones_like(tracked[:1]))
        if self.momentum is None:  # a cumulative average, as in nn.BatchNorm
            return 1.0 / float(self.row_of(tracked))
        return self.momentum

    def reset_row(self) -> None:
        """Forget the running statistics of the current bit-width."""
        row = self.row.view(1)
        with torch.no_grad():
            for buffer, value in (
                (self.running_mean, 0),
                (self.running_var, 1),
                (self.num_batches_tracked, 0),
            ):
                if buffer is not None:
                    buffer.index_fill_(0, row, value)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        of_float: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{of_float}, bit_widths={self.available_bit_widths}"


class SwitchableBatchNorm1d(_SwitchableBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with statistics and affine parameters per bit-width."""


class SwitchableBatchNorm2d(_SwitchableBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with statistics and affine parameters per bit-width."""


def switchable_batch_norms(model: nn.Module) -> list[Any]:
    """The switchable batch norms of ``model`` that keep running statistics."""
    return [
        m
        for m in model.modules()
        if isinstance(m, _SwitchableBatchNorm) and m.running_mean is not None
    ]


def shared_batch_norms(model: nn.Module) -> list[Any]:
    """The batch norms of ``model`` that serve all bit-widths alike, with running statistics."""
    return [
        m
        for m in model.modules()
        if getattr(m, "kept_float", None) == SHARED and m.running_mean is not None
    ]
