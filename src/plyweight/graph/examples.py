"""Example inputs: what a model is traced with and edges are calibrated on."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.errors import LayeringError

__all__ = ["Batch", "batches_of", "dynamic_shapes", "input_names", "two_or_more"]

Batch = tuple[Tensor, ...]  # the arguments of the model's forward


def batches_of(model: nn.Module, example_inputs: Any) -> list[Batch]:
    """``example_inputs`` as batches of arguments, on the CPU.

    A tensor is the one argument of one batch, a tuple of tensors are the arguments of one.
    Whatever else can be iterated over gives batches: a tensor, or a tuple or list that begins
    with the inputs, of which the model takes as many as its forward has to have.

    Raises:
        LayeringError: If they are something else, or none.
    """
    if isinstance(example_inputs, Tensor):
        found = [(example_inputs,)]
    elif isinstance(example_inputs, tuple):
        found = [example_inputs]
    elif isinstance(example_inputs, Iterable) and not isinstance(example_inputs, (str, Mapping)):
        wanted = _num_required(model)
        found = [
            (batch,) if isinstance(batch, Tensor) else tuple(batch)[:wanted]
            for batch in example_inputs
            if _is_batch(batch)
        ]
    else:
        raise _unknown(example_inputs)
    if not found:
        raise LayeringError("example_inputs gave no batch; a graph needs at least one.")
    for batch in found:
        if not batch or not all(isinstance(item, Tensor) and item.numel() for item in batch):
            raise _unknown(batch)
    first = found[0]
    for batch in found:
        if [(t.dtype, t.dim()) for t in batch] != [(t.dtype, t.dim()) for t in first]:
            raise LayeringError("the batches of example_inputs differ in dtypes or dimensions.")
    return [tuple(item.detach().cpu() for item in batch) for batch in found]


def dynamic_shapes(batches: Sequence[Batch]) -> list[dict[int, Any]]:
    """For each argument, the dimensions that may have any length: the first, and what differs."""
    batch = torch.export.Dim("batch")
    found = []
    for argument in range(len(batches[0])):
        shapes = [tuple(b[argument].shape) for b in batches]
        dims: dict[int, Any] = {}
        for axis in range(len(shapes[0])):
            if axis == 0:
                dims[axis] = batch
            elif len({shape[axis] for shape in shapes}) > 1:
                dims[axis] = torch.export.Dim.DYNAMIC
        found.append(dims)
    return found


def input_names(model: nn.Module, num_inputs: int) -> list[str]:
    """The names of the first arguments of the model's forward."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"input_{index}" for index in range(len(names), num_inputs)]  # of *args
    return names[:num_inputs]


def two_or_more(item: Tensor) -> Tensor:
    """torch.export takes a dimension of length 1 for one that always has it."""
    return item if len(item) > 1 else item.repeat(2, *[1] * (item.dim() - 1))


def _num_required(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return max(len(required), 1)


def _is_batch(batch: Any) -> bool:
    if isinstance(batch, (Tensor, tuple, list)):
        return True
    raise _unknown(batch)


def _unknown(what: Any) -> LayeringError:
    return LayeringError(
        f"example_inputs has a {type(what).__name__} with something that is no tensor of values; "
        "give a tensor, a tuple of the model's arguments, or batches of either."
    )
