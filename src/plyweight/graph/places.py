"""Places: the modules of the torch network that give what a value of the graph is.

A value that ONNX Runtime has to round is rounded in torch too if some module returns it (see
``plyweight.nn.outputs``). Which does is read off the modules that the exporter notes at each node:

    the output of a convolution             its batch norm, or itself
    what no node inside a module reads      that module, which gives it to those outside
    that behind a ReLU                      or else what is before it, for rounding commutes

and then off one run of the network, for a module must be called once and return a tensor.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from plyweight.graph.examples import Batch
from plyweight.graph.marks import Bounds, clamp_of, is_mark
from plyweight.graph.scopes import scopes_of
from plyweight.nn.outputs import can_round

__all__ = ["Places"]


class Places:
    """Where values of the graph of ``model`` can be rounded in it.

    Args:
        model: the float network, as exported.
        batch: its arguments, to run it once.
        owners: the modules that give the outputs of convolutions, behind their batch norms.
    """

    def __init__(self, model: nn.Module, batch: Batch, owners: Mapping[ir.Value, str]) -> None:
        self._model, self._owners = model, owners
        self._free = _called_once(model, batch)

    def of(self, values: Sequence[ir.Value]) -> str | None:
        """The name of a module that returns one of ``values``; None if none does."""
        candidates = (name for value in values for name in self._candidates(value))
        return next((name for name in candidates if name in self._free), None)

    def _candidates(self, value: ir.Value) -> Iterator[str]:
        producer = value.producer()
        if producer is None:
            return
        if value in self._owners:
            yield self._owners[value]
        scopes, readers = scopes_of(producer), list(_readers(value))
        clamped = producer.inputs[0] if clamp_of(producer) == Bounds(lowest=0.0) else None
        if clamped is not None and clamped in self._owners:
            yield self._owners[clamped]
        for name in reversed(scopes[1:]):  # the first is the network itself
            if any(name in scopes_of(reader) for reader in readers):
                return
            yield name


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Who computes with ``value``, rounded or not."""
    for node in value.consumers():
        if is_mark(node):
            yield from _readers(node.outputs[0])
        else:
            yield node


def _called_once(model: nn.Module, batch: Batch) -> frozenset[str]:
    """The modules whose output can be rounded: called once, for one tensor."""
    # What the network counts or keeps in buffers stays as it is.
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    calls: dict[str, list[bool]] = {}
    handles = []

    def noted(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls.setdefault(name, []).append(isinstance(output, Tensor))

        return hook

    for name, module in model.named_modules():
        if can_round(module):
            handles.append(module.register_forward_hook(noted(name)))
    try:
        with torch.no_grad():
            model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name, gave in calls.items() if name and gave == [True])
