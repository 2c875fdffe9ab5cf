"""recalibrate: batch-norm statistics measured again, one set for each bit-width.

Running averages lag behind weights that still move; after training, the plain mean over a few
thousand training images (through the very augmentation of training) is better.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.errors import LayeringError
from plyweight.nn.bit_width import at_bit_width, bit_widths_of
from plyweight.nn.norm import shared_batch_norms, switchable_batch_norms

__all__ = ["check_arguments", "inputs_of", "recalibrate"]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Measure the running statistics of every switchable batch norm at every bit-width.

    One that is shared by the bit-widths takes the mean over all of them.
    Only batch norms compute as in training; dropout and the rest are as in evaluation. Each batch
    is seen by all bit-widths, so the loader is read once. The model keeps its mode and bit-width,
    also when the loader fails midway; the statistics are then those of the batches so far.

    Args:
        model: a layered model; one whose batch norms all stayed float is left as it is.
        loader: gives batches: a tensor, or a tuple or list whose first item is the input.
        num_batches: how many to use; None for all.
        forward: ``forward(batch)`` runs the model on a batch of any other kind.

    Raises:
        LayeringError: If the model has no bit-widths, an argument is wrong, or the loader gives
            no batch or one of a kind that is not known.
    """
    check_arguments(model, loader, num_batches, forward)
    bit_widths = bit_widths_of(model)
    switchable, shared = switchable_batch_norms(model), shared_batch_norms(model)
    norms = [*switchable, *shared]
    if not norms:
        return
    run = forward or (lambda batch: model(inputs_of(batch)))
    was_training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # a cumulative average over the batches
    is_first = True
    try:
        # Eager, for a cumulative average reads its count in Python.
        with torch.compiler.set_stance("force_eager"):
            for batch in islice(loader, num_batches):
                if is_first:
                    for norm in shared:
                        norm.reset_running_stats()
                for bit_width in bit_widths:
                    with at_bit_width(model, bit_width):
                        if is_first:
                            for norm in switchable:
                                norm.reset_row()
                        run(batch)
                is_first = False
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in was_training.items():
            module.training = training
    if is_first:
        raise LayeringError("the loader gave no batch; recalibrate needs at least one.")


def check_arguments(model: object, loader: object, num_batches: object, forward: object) -> None:
    """Whether these are what :func:`recalibrate` and ``calibrate`` take.

    Raises:
        LayeringError: If one is not.
    """
    if not isinstance(model, nn.Module):
        raise LayeringError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    if not isinstance(loader, Iterable):
        raise LayeringError(f"loader is a {type(loader).__name__}; give batches to go through.")
    if num_batches is not None and (type(num_batches) is not int or num_batches < 1):
        raise LayeringError(f"num_batches is {num_batches!r}; give a positive integer or None.")
    if forward is not None and not callable(forward):
        raise LayeringError(f"forward is {forward!r}; give a function of a batch, or None.")


def inputs_of(batch: Any) -> Any:
    """What the model takes of ``batch``.

    Raises:
        LayeringError: If it is neither a tensor nor a tuple or list that begins with the input.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0]
    raise LayeringError(
        f"the loader gave a {type(batch).__name__}; give batches that are tensors, or tuples that "
        "begin with the input, or give forward=lambda batch: model(...)."
    )
