"""Where a loss that is NaN or infinite comes from."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.errors import LossError
from plyweight.nn.bit_width import at_bit_width
from plyweight.nn.swap import unwrapped
from plyweight.train.distributed import Synchronizer

__all__ = ["check_losses"]


def check_losses(
    losses: Mapping[int, Tensor],
    model: nn.Module,
    compute: Callable[[], Any],
    *,
    step: int,
    synchronizer: Synchronizer,
) -> None:
    """Raise LossError for the first of ``losses`` that is not finite, widest bit-width first.

    Processes that share a step raise together: their gradients are added up already, so none of
    them may take it.

    Args:
        losses: what was differentiated, scalar by bit-width, in the order of computation.
        model: what computed them.
        compute: computes the loss again at the bit-width that is set.
        step: for the message.
        synchronizer: of the processes.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    is_bad = synchronizer.any_process(~values.isfinite())
    if not is_bad.any():  # waits for the device, once a step
        return
    index = int(is_bad.int().argmax())
    bit_width, value = list(losses)[index], float(values[index])
    module = first_non_finite(model, compute, bit_width)
    raise LossError(value, step=step, bit_width=bit_width, module=module)


@torch.no_grad()
def first_non_finite(model: nn.Module, compute: Callable[[], Any], bit_width: int) -> str | None:
    """The first module, in order of execution, whose outputs are not finite; None if all are.

    The model's buffers are the same afterwards.
    """
    found: list[str] = []

    def look(name: str, *called: Any) -> None:
        *_, outputs = called
        if isinstance(outputs, Tensor) and not outputs.isfinite().all():
            found.append(name)

    inner = unwrapped(model)  # names as the user knows them
    # The innermost modules come first: a hook runs when its module returns.
    hooks = [m.register_forward_hook(partial(look, n)) for n, m in inner.named_modules()]
    buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
    try:
        with at_bit_width(model, bit_width), torch.compiler.set_stance("force_eager"):
            compute()
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else None
