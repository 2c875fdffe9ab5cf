"""fit_edges: a layered model computes in torch what its graph will compute without it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plyweight.errors import LayeringError, listed
from plyweight.nn.swap import unwrapped
from plyweight.packing.contents import Contents, checked_state
from plyweight.packing.verbs import draft, graph_extra

__all__ = ["EdgeReport", "fit_edges"]


@dataclass(frozen=True)
class EdgeReport:
    """What :func:`plyweight.fit_edges` did.

    Attributes:
        placed: the modules that round their output to 8 bits now.
        edges_left: edges of the graph that no module gives, so that torch does not round them.
        biases_left: modules whose biases the graph rounds and torch does not.
    """

    placed: tuple[str, ...]
    edges_left: tuple[str, ...]
    biases_left: tuple[str, ...]

    def __str__(self) -> str:
        """A line, and one for each kind of thing that stays different."""
        lines = [f"{len(self.placed)} modules round their output to 8 bits"]
        if self.edges_left:
            lines.append(f"  rounded without torch only: {listed(self.edges_left)}")
        if self.biases_left:
            lines.append(f"  biases rounded without torch only: {listed(self.biases_left)}")
        return "\n".join(lines)


@torch.inference_mode(False)  # what is made inside could not be trained outside
def fit_edges(model: nn.Module, example_inputs: Any) -> EdgeReport:
    """Let ``model`` round in torch what its graph rounds, in place.

    Where activations are quantized, ONNX Runtime computes additions on integers, so the graph that
    :func:`plyweight.pack` makes rounds what goes into them to 8 bits, and every bias to a whole
    number. Without this the engine's answers differ from torch's now and then, the more the fewer
    the bits; with it they are the same but for the last bits of float sums.

    Modules get an ``output_quantizer`` with a step for each bit-width, chosen on the example
    inputs; those that are there stay. Their steps learn like all others if training goes on, and
    biases then move again: call it once more at the end. Biases may get a row for each bit-width,
    so make the optimizer afterwards; and a checkpoint of such a model goes into one that was fitted
    too. What torch computes changes a little: measure the accuracy
    after it.

    Args:
        model: a layered model, trained or calibrated.
        example_inputs: as for :func:`plyweight.pack`; some hundred real samples.

    Returns:
        Which modules round now, and what no module could.

    Raises:
        LayeringError: If the model is not layered or cannot be exported, or the example inputs
            are none.
        ImportError: If the extra ``[onnx]`` is not installed.
    """
    if not isinstance(model, nn.Module):
        raise LayeringError(f"model is a {type(model).__name__}; give a layered module.")
    with graph_extra():
        from plyweight.graph.build import calibrated_plan
        from plyweight.graph.fitting import place_edges, round_biases
    inner = unwrapped(model)
    contents = Contents.of(checked_state(inner), by_object=True)
    with draft(contents) as artifact:
        plan = calibrated_plan(inner, example_inputs, artifact, finds_places=True)
        biases_left = round_biases(inner, plan.graph(), artifact)
        placed, edges_left = place_edges(inner, plan)
    return EdgeReport(tuple(placed), tuple(edges_left), tuple(biases_left))
