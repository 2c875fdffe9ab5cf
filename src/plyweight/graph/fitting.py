"""Fitting: let the torch network round what its graph rounds.

The graph of a network rounds two things that nobody trained with: edges (see ``edges``) and
biases, which are whole numbers of ``step * scale`` there. Where activations have four levels each
of both changes one answer in thirty. So the network takes them over: an edge becomes an output
quantizer of the module that computes it, and each bias is moved to the number that it will be.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from plyweight.artifact import ArtifactReader, Graph
from plyweight.engine.values import SlotValues
from plyweight.graph.build import Plan
from plyweight.graph.ranges import EDGE_LEVELS, Grid
from plyweight.nn.bit_width import switch, switchable_modules
from plyweight.nn.norm import SwitchableBatchNorm1d, SwitchableBatchNorm2d
from plyweight.nn.outputs import round_output
from plyweight.nn.quantized import BiasByBitWidth
from plyweight.quantizers import ActivationQuantizer

__all__ = ["place_edges", "round_biases"]

EDGE_WIDTH = EDGE_LEVELS.bit_length() - 1


def place_edges(model: nn.Module, plan: Plan) -> tuple[list[str], list[str]]:
    """Round the edges of ``plan`` in ``model`` too, in place.

    Returns:
        The modules that round their output now, and the edges that no module gives.
    """
    placed, left = [], []
    bit_width = switchable_modules(model)[0].bit_width
    assert plan.grids is not None
    for edge in plan.edges:
        if edge.place is None or edge.place in placed:
            left.append(edge.prefix)
            continue
        module = model.get_submodule(edge.place)
        round_output(module, _quantizer(plan.grids[edge.prefix], model))
        placed.append(edge.place)
    switch(model, bit_width)  # the new ones too
    return placed, left


def round_biases(model: nn.Module, graph: Graph, artifact: ArtifactReader) -> list[str]:
    """Move each bias of ``model`` to what it is in ``graph``, in place.

    A bias gets a row for each bit-width where it has none. That of a batch norm which all
    bit-widths share, or of a parameter which modules share, cannot be right for all of them.

    Args:
        model: a layered model.
        graph: of it, with any edges.
        artifact: of it, with or without the graph.

    Returns:
        The modules, by their prefix in the graph, whose biases stay as they are.
    """
    owners = {p: m.norm.name if m.norm else m.bias for p, m in graph.modules.items() if m.input}
    num_users = Counter(owners.values())
    layers = [artifact.read_layer(i) for i in range(len(artifact.header.layers))]
    left = []
    rows: dict[str, Tensor] = {}
    for prefix, owner in owners.items():
        if owner is None:
            continue  # there is none
        found = _rows(model, owner) if num_users[owner] == 1 else None
        if found is None:
            left.append(prefix)
        else:
            rows[prefix] = found
    changes = []  # all are known before the first is made
    for index, bit_width in enumerate(artifact.header.bit_widths):
        values = SlotValues(artifact.header, graph, layers, bit_width)
        for prefix, bias in rows.items():
            change = torch.from_numpy(values.bias_change(prefix)).to(bias.device)
            changes.append((bias, index, (bias[index].double() + change).to(bias.dtype)))
    with torch.no_grad():
        for bias, index, value in changes:
            bias[index] = value
    return left


def _rows(model: nn.Module, owner: str) -> Tensor | None:
    """``(bit-widths, out)``, the bias that ``owner`` names: a batch norm or a bias itself."""
    module = model.get_submodule(owner.removesuffix(".bias")) if owner != "bias" else model
    if isinstance(module, BiasByBitWidth):
        return module.give_bias_rows()
    if isinstance(module, (SwitchableBatchNorm1d, SwitchableBatchNorm2d)):
        return module.bias
    return None


def _quantizer(grids: Mapping[int, Grid], model: nn.Module) -> ActivationQuantizer:
    """One of 8 bits at every bit-width, with these grids."""
    bit_widths = tuple(grids)
    device = next(model.parameters()).device
    quantizer = ActivationQuantizer(EDGE_WIDTH, bit_widths, device=device)
    is_positive = all(grid.zero_point == 0 for grid in grids.values())
    quantizer.set_kind("unsigned" if is_positive else "offset")
    for bit_width, grid in grids.items():
        quantizer.set_step(bit_width, grid.step, grid.zero_point)
    return quantizer
