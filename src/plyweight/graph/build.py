"""build_graph: from a layered model to the graph that its artifact carries.

model -> float network -> ONNX -> levels instead of weights -> marks where values are rounded
      -> edges, calibrated with that very graph -> one ONNX model per set of clips
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from torch import nn

from plyweight.artifact import ArtifactReader, Graph, Model, Module, Port, Quantizer
from plyweight.engine.values import SlotValues
from plyweight.errors import LayeringError, listed
from plyweight.graph.edges import Edge, insert_edges, readers_of
from plyweight.graph.examples import Batch, batches_of
from plyweight.graph.marks import (
    Bounds,
    bounds_of,
    clamp_again,
    expand_marks,
    marks_of,
    prefix_of,
)
from plyweight.graph.network import exported, finished, plain_slots
from plyweight.graph.places import Places
from plyweight.graph.ranges import Grid, Sample, best_grid
from plyweight.graph.skeleton import GraphSkeleton
from plyweight.graph.weights import INPUT, replace_weights

__all__ = ["Plan", "build_graph", "calibrated_plan"]

DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}
Array = npt.NDArray[Any]


def build_graph(model: nn.Module, example_inputs: Any, artifact: ArtifactReader) -> Graph:
    """The graph of ``model``, one for all bit-widths.

    Args:
        model: a layered model.
        example_inputs: see :func:`plyweight.graph.examples.batches_of`.
        artifact: of the same model, without a graph.

    Raises:
        LayeringError: If the model cannot be exported, or example_inputs are none.
    """
    plan = calibrated_plan(model, example_inputs, artifact)
    graph = plan.graph()
    graph.check(artifact.header)
    return graph


def calibrated_plan(
    model: nn.Module, example_inputs: Any, artifact: ArtifactReader, *, finds_places: bool = False
) -> "Plan":
    """What :func:`build_graph` makes a graph of; the arguments and errors are its own.

    With ``finds_places`` edges know the module whose output they are.
    """
    batches = batches_of(model, example_inputs)
    skeleton = GraphSkeleton(model)
    _check(skeleton)
    base = exported(skeleton, batches)
    weights = replace_weights(base, skeleton)
    tensors = plain_slots(base, skeleton)
    places = None
    if finds_places:
        few = tuple(item[:2] for item in batches[0])
        places = Places(skeleton.model, few, weights.convolutions)
    edges = insert_edges(base.graph, weights.convolutions, places)
    plan = Plan(base, skeleton, weights.modules, tensors, edges)
    plan.grids = _calibrated(plan, batches, artifact)
    return plan


@dataclass
class Plan:
    """What all models of a graph have in common.

    Attributes:
        base: with marks.
        grids: of the edges, by prefix and bit-width.
    """

    base: ir.Model
    skeleton: GraphSkeleton
    modules: Mapping[str, Module]
    tensors: Mapping[str, str]
    edges: Sequence[Edge]
    grids: Mapping[str, Mapping[int, Grid]] | None = None

    def graph(self) -> Graph:
        """The graph: bit-widths whose clips are the same share a model."""
        variants: dict[object, list[int]] = {}
        for bit_width in self.skeleton.bit_widths:
            variants.setdefault(self._variant(bit_width), []).append(bit_width)
        models = [self._model(tuple(widths)) for widths in variants.values()]
        inputs, outputs = self.base.graph.inputs, self.base.graph.outputs
        return Graph(
            models=tuple(models),
            inputs=tuple(_port(value) for value in inputs),
            outputs=tuple(_port(value) for value in outputs),
            modules=self.modules,
            quantizers=self._quantizers(),
            tensors=self.tensors,
        )

    def calibration(self) -> tuple[Graph, list[tuple[str, str, Bounds]]]:
        """A graph whose edges are not rounded but given back.

        Also returns prefix, name of the output, and what clamps it, for each mark of an edge.
        """
        model = self.base.clone()
        outputs: list[tuple[str, str, Bounds]] = []
        for node in marks_of(model.graph):
            prefix = prefix_of(node)
            if prefix in {edge.prefix for edge in self.edges}:
                source = node.inputs[0]
                assert source is not None
                assert source.name is not None
                outputs.append((prefix, source.name, bounds_of(node)))
                clamped = clamp_again(node)
                node.outputs[0].replace_all_uses_with(clamped, replace_graph_outputs=True)
                model.graph.remove(node, safe=True)
                if source not in model.graph.outputs:
                    model.graph.outputs.append(source)
        # Every clip is there: one of 255 changes nothing.
        expand_marks(model.graph, lambda _, bounds: (bounds.lowest is not None, True), {})
        data, slots = finished(model)
        whole = Model(bit_widths=self.skeleton.bit_widths, slots=slots, data=data)
        graph = Graph(
            models=(whole,),
            inputs=tuple(_port(value) for value in self.base.graph.inputs),
            outputs=tuple(_port(value) for value in self.base.graph.outputs),
            modules=self.modules,
            quantizers=self._quantizers(),
            tensors=self.tensors,
        )
        return graph, outputs

    def grid(self, prefix: str, bit_width: int) -> Grid:
        """The grid of a quantizer, learned or calibrated."""
        if self.grids is not None and prefix in self.grids:
            return self.grids[prefix][bit_width]
        return _learned_grid(self.skeleton, prefix.removesuffix(INPUT), bit_width)

    def _variant(self, bit_width: int) -> tuple[object, ...]:
        """What distinguishes the model that ``bit_width`` computes with."""
        clips = tuple(
            self._clips(prefix_of(node), bounds_of(node), (bit_width,))
            for node in marks_of(self.base.graph)
        )
        return clips, tuple(self._alias((bit_width,)).items())

    def _clips(self, prefix: str, bounds: Bounds, bit_widths: Sequence[int]) -> tuple[bool, bool]:
        grids = [self.grid(prefix, b) for b in bit_widths]
        lowest = bounds.lowest is not None and any(
            _level(bounds.lowest, grid) > 0 for grid in grids
        )
        highest = any(
            grid.highest < 255
            or (bounds.largest is not None and _level(bounds.largest, grid) < 255)
            for grid in grids
        )
        return lowest, highest

    def _alias(self, bit_widths: Sequence[int]) -> dict[str, str]:
        """The edges that are rounded to the very grid of a learned quantizer that reads them."""
        readers = {edge.prefix: edge.readers for edge in self.edges}
        readers |= readers_of(self.base.graph, self.skeleton.outputs.values())
        found = {}
        for prefix, learned in readers.items():
            for reader in learned:
                if all(self.grid(prefix, b) == self.grid(reader, b) for b in bit_widths):
                    found[prefix] = reader
                    break
        return found

    def _model(self, bit_widths: tuple[int, ...]) -> Model:
        model = self.base.clone()
        expand_marks(
            model.graph,
            lambda prefix, bounds: self._clips(prefix, bounds, bit_widths),
            self._alias(bit_widths),
        )
        data, slots = finished(model)
        return Model(bit_widths=bit_widths, slots=slots, data=data)

    def _quantizers(self) -> dict[str, Quantizer]:
        found = {
            module.input: Quantizer(activation=module.input.removesuffix(INPUT))
            for module in self.modules.values()
            if module.input is not None
        }
        found |= {key: Quantizer(activation=key) for key in self.skeleton.outputs.values()}
        for prefix, grids in (self.grids or {}).items():
            found[prefix] = Quantizer(
                steps={b: grid.step for b, grid in grids.items()},
                zero_points={b: grid.zero_point for b, grid in grids.items()},
            )
        return found


def _calibrated(
    plan: Plan, batches: Sequence[Batch], artifact: ArtifactReader
) -> dict[str, dict[int, Grid]]:
    """A grid for every edge and bit-width: of the values it has when no edge is rounded."""
    grids: dict[str, dict[int, Grid]] = {edge.prefix: {} for edge in plan.edges}
    if not plan.edges:
        return grids
    graph, outputs = plan.calibration()
    layers = [artifact.read_layer(i) for i in range(len(artifact.header.layers))]
    wanted = list(dict.fromkeys(name for _, name, _ in outputs))
    for bit_width in plan.skeleton.bit_widths:
        session = _session(graph, SlotValues(artifact.header, graph, layers, bit_width).all())
        samples = {edge.prefix: Sample() for edge in plan.edges}
        for batch in batches:
            feeds = {
                port.name: item.numpy() for port, item in zip(graph.inputs, batch, strict=True)
            }
            values = dict(zip(wanted, session.run(wanted, feeds), strict=True))
            for prefix, name, bounds in outputs:
                clamped = np.clip(values[name], bounds.lowest, bounds.largest)
                samples[prefix].add(clamped, num_batches=len(batches))
        for edge in plan.edges:
            learned = [plan.grid(reader, bit_width) for reader in edge.readers]
            grids[edge.prefix][bit_width] = best_grid(
                samples[edge.prefix], learned, is_read_as_float=edge.is_read_as_float
            )
    return grids


def _session(graph: Graph, slots: Mapping[str, Array]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in slots.values()]
    options.add_external_initializers(list(slots), values)
    return onnxruntime.InferenceSession(
        graph.models[0].data, options, providers=["CPUExecutionProvider"]
    )


def _learned_grid(skeleton: GraphSkeleton, activation: str, bit_width: int) -> Grid:
    quantizer = skeleton.quantizers[activation]
    own = quantizer.own_bit_widths.index(quantizer.own_bit_width(bit_width))
    step = float(quantizer.steps[own].detach())
    zero_point = round(float(quantizer.zero_points[own].detach()))
    return Grid(step, zero_point, (1 << int(quantizer.widths[own])) - 1)


def _check(skeleton: GraphSkeleton) -> None:
    """Whether a graph can compute what the model does.

    Raises:
        LayeringError: If it cannot; it names the module.
    """
    for name, layered in skeleton.layered.items():
        group_size = skeleton.group_sizes[layered.param]
        if group_size is not None and layered.activation is not None:
            raise LayeringError(
                f"the weight of {name or 'the model'} has a scale for each group of {group_size} "
                "inputs, and its input is quantized, but sums of integers have one scale for each "
                "output channel; prepare with activations=None or without group_size, or pack "
                "without example_inputs."
            )
    for name, quantizer in skeleton.quantizers.items():
        if quantizer.kind == "signed" and 1 in quantizer.widths.tolist():
            raise LayeringError(
                f"the input of {name or 'the model'} is signed and has 1 bit, whose two levels, "
                "-1/2 and 1/2, are on no integer grid; give it more by `activations` of prepare, "
                "or pack without example_inputs."
            )


def _level(value: float, grid: Grid) -> float:
    return float(np.rint(np.float32(value) / np.float32(grid.step))) + grid.zero_point


def _port(value: ir.Value) -> Port:
    assert value.name is not None
    assert value.shape is not None
    if value.dtype not in DTYPES:
        raise LayeringError(
            f"{value.name} is {value.dtype}, but a graph takes and gives {listed(DTYPES.values())}."
        )
    shape = tuple(
        dim if isinstance(dim, int) else ("batch" if axis == 0 else str(dim))
        for axis, dim in enumerate(value.shape)
    )
    return Port(value.name, DTYPES[value.dtype], shape)
