"""Several processes, one model: when the passes of a step are reduced, and what starts alike.

Every bit-width of a step has a backward pass of its own, while DistributedDataParallel thinks of
one. Gradients add up (the rows of one bit-width in a table of all included, for a table is one
parameter), so one reduction in the last pass does for the mean. A balance needs the gradient of
every bit-width over all processes, so each pass is reduced.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plyweight.quantizers import ActivationQuantizer

__all__ = ["Synchronizer"]


class Synchronizer:
    """The reductions of ``model``'s processes; nothing to do where there is a single one."""

    def __init__(self, model: nn.Module) -> None:
        inner: Any = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self._parallel = inner if isinstance(inner, DistributedDataParallel) else None

    @property
    def reuses_gradients(self) -> bool:
        """Whether the memory of a gradient is written again by the next backward pass."""
        return self._parallel is not None and bool(self._parallel.gradient_as_bucket_view)

    def reduced(self, is_reduced: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass: whether its gradients are reduced at its end."""
        if self._parallel is None or is_reduced:
            return nullcontext()
        result: AbstractContextManager[None] = self._parallel.no_sync()
        return result

    def any_process(self, flags: Tensor) -> Tensor:
        """``flags``, bool, each true where it is true in any process."""
        if self._parallel is None:
            return flags
        counts = flags.int()
        torch.distributed.all_reduce(counts, group=self._parallel.process_group)
        return counts > 0

    @torch.no_grad()
    def broadcast(self, quantizers: list[ActivationQuantizer]) -> None:
        """Give every process the kinds, steps and offsets that the first one read off its batch."""
        if self._parallel is None:
            return
        group = self._parallel.process_group
        source = torch.distributed.get_global_rank(group, 0)
        for quantizer in quantizers:
            for tensor in (quantizer.kind_index, quantizer.clip, quantizer.offset):
                torch.distributed.broadcast(tensor.data, source, group=group)
            quantizer.restore_kind()
