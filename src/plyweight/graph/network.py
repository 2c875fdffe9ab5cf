"""Network: the float network of a layered model as a small ONNX graph, and a graph as bytes.

What the exporter gives is cleaned and its ports are named; parameters have no values in it. Later,
when nodes read levels and no marks are left, it becomes the bytes that an artifact carries.
"""

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.version_converter import convert_version

from plyweight.engine.onnx_model import MAX_FIELDS, MAX_NODES, external_initializers
from plyweight.errors import GraphError, LayeringError
from plyweight.graph.examples import Batch, dynamic_shapes, input_names, two_or_more
from plyweight.graph.marks import mark
from plyweight.graph.scopes import scopes_of
from plyweight.graph.skeleton import GraphSkeleton
from plyweight.graph.slots import empty_slot, is_slot
from plyweight.graph.weights import TENSOR, stored_name

__all__ = ["exported", "finished", "plain_slots"]

# Numbers of the network that are no parameters: masks, positions, shapes.
MAX_CONSTANT_BYTES = 16 * 2**20
IR_VERSION = 10  # what onnxruntime 1.20 reads
BLOCKS_OPSET = 21  # the first in which DequantizeLinear knows groups


def exported(skeleton: GraphSkeleton, batches: Sequence[Batch]) -> ir.Model:
    """The float network as a small clean ONNX graph; parameters have no values in it."""
    example = tuple(two_or_more(item) for item in batches[0])
    model: ir.Model = skeleton.export(example, dynamic_shapes(batches))
    if any(group_size is not None for group_size in skeleton.group_sizes.values()):
        convert_version(model, BLOCKS_OPSET)
    _name_ports(model, input_names(skeleton.model, len(example)))
    for name, value in list(model.graph.initializers.items()):
        if name in skeleton.stored:
            value.const_value = None  # so nothing is computed of it in advance
            value.name = TENSOR + name
    _mark_outputs(model, skeleton)
    passes.IdentityEliminationPass()(model)
    fold_constants(model)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _mark_outputs(model: ir.Model, skeleton: GraphSkeleton) -> None:
    """Put a mark where the network rounds what a module gives."""
    for node in list(model.graph):
        key = skeleton.outputs.get(scopes_of(node)[-1])
        if node.op_type == "Identity" and key is not None:
            mark(node, 0, key, name=f"{node.outputs[0].name}/output")


def _name_ports(model: ir.Model, inputs: Sequence[str]) -> None:
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    outputs = model.graph.outputs
    for index, value in enumerate(outputs):
        value.name = "output" if len(outputs) == 1 else f"output_{index}"


def plain_slots(model: ir.Model, skeleton: GraphSkeleton) -> dict[str, str]:
    """Make slots of all float parameters and buffers that are left; their tensors by name."""
    passes.RemoveUnusedNodesPass()(model)
    tensors, constant_bytes = {}, 0
    for name, value in model.graph.initializers.items():
        stored = stored_name(skeleton, value)
        if stored is not None:
            empty_slot(value)
            tensors[name] = stored
        elif not is_slot(value) and value.const_value is not None:
            constant_bytes += value.const_value.nbytes
    if constant_bytes > MAX_CONSTANT_BYTES:
        raise LayeringError(
            f"the network computes with {constant_bytes:,} bytes of constants that are no "
            "parameters; register them as persistent buffers, or pack without example_inputs."
        )
    return tensors


def finished(model: ir.Model) -> tuple[bytes, tuple[str, ...]]:
    """A model without marks as bytes, and the names of its slots.

    Raises:
        LayeringError: If the engine would refuse to read it.
    """
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)  # which has paths of this machine in it
    model.producer_name, model.producer_version = "plyweight", None
    model.ir_version = IR_VERSION
    model.graph.name = "layered"
    slots = tuple(name for name, value in model.graph.initializers.items() if is_slot(value))
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    try:
        external_initializers(data)
    except GraphError as error:
        raise LayeringError(
            f"the graph of this network is more than an engine reads, {MAX_NODES:,} nodes and "
            f"{MAX_FIELDS:,} parts of them; a loop is copied for each of its rounds. Make it "
            "smaller, or pack without example_inputs."
        ) from error
    return data, slots
