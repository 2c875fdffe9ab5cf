"""Forms: how each module of a graph computes in a runtime, and the model that does it.

    integer       its input is quantized: products of bytes, as the graph has them
    nibbles       products of 4-bit codes with floats, see ``nibbles``
    rows          an embedding: the rows that are asked for are read as bytes and made floats
    float         a float32 weight, decoded when the session is made
    dequantized   bytes, of which the runtime makes floats when it computes, or before

A graph says of a weight whose input is a float that it is ``DequantizeLinear(levels, scale)``,
which any runtime takes. ONNX Runtime makes the float weight of it at every call: six products of
2048 x 2048 with one row took 28 ms instead of 1 or 2. So for its CPU such weights are rewritten,
those that the artifact's graph has exactly so, and only they; for inputs that are finite, and sums
that float32 can hold, outputs stay what they were but for the rounding of sums. For all others the
graph stays as it is. Modules that share a weight, and fold the same into it, share what is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact import Graph, Model
from plyweight.engine.nibbles import BLOCK_SIZES, block_size_of, nibbles_of, sums_of_groups
from plyweight.engine.onnx_model import MICROSOFT, Declared
from plyweight.engine.onnx_nodes import Node, Nodes, OnnxModel, rewritten
from plyweight.engine.session import check_declared, check_model
from plyweight.engine.values import SlotValues

__all__ = ["Form", "FormKind", "Loaded", "Runtime", "loaded"]

Array = NDArray[Any]
FormKind = Literal["integer", "nibbles", "rows", "float", "dequantized"]

FLOATS_STAY = 1  # accuracy_level: 4 would round what a weight is multiplied with to 8 bits
NUM_BITS = 4


@dataclass(frozen=True)
class Form:
    """How a module computes.

    Attributes:
        kind: one of those above.
        reason: why so.
    """

    kind: FormKind
    reason: str


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a runtime, or whoever reads a file, does with weights whose inputs are floats.

    Attributes:
        has_nibbles: whether it multiplies floats with 4-bit codes.
        takes_bytes: whether it is to make floats of bytes itself.
        group_multiple: what the size of groups is a multiple of where it can, if none has fewer
            inputs than the others; None for any groups.
        only_multiplied: whether it can only where products and convolutions read the weight.
    """

    has_nibbles: bool
    takes_bytes: bool
    group_multiple: int | None = None
    only_multiplied: bool = False


@dataclass
class Loaded:
    """A model as a runtime is given it.

    Attributes:
        model: whose slots are the names of ``values``.
        onnx: its data, read.
        values: by slot.
        forms: by prefix of the module.
    """

    model: Model
    onnx: OnnxModel
    values: dict[str, Array]
    forms: Mapping[str, Form]

    @property
    def is_integer(self) -> bool:
        """Whether all products are of integers: the input of every module is quantized."""
        return all(form.kind == "integer" for form in self.forms.values())


def loaded(
    graph: Graph,
    model: Model,
    values: SlotValues,
    runtime: Runtime,
    onnx: OnnxModel | None = None,
) -> Loaded:
    """The ``model`` of ``graph`` with the values of a bit-width, in the forms for ``runtime``.

    Args:
        graph: that says what the slots are.
        model: one of it.
        values: of its slots.
        runtime: that is given it.
        onnx: ``model.data``, if it may have been read before.

    Raises:
        GraphError: If slots of the model are not what the artifact fills, it reads a file, or it
            has names of the engine's own.
    """
    onnx = OnnxModel(model.data) if onnx is None else onnx
    forms = {name: _as_in_graph(graph, name) for name in sorted(graph.modules)}
    weights = [name for name, form in forms.items() if form.kind == "dequantized"]
    if not weights:
        filled = {name: values.of(name) for name in model.slots}
        check_model(onnx.slots, filled)
        return Loaded(model, onnx, filled, forms)
    change = _Change(graph, onnx.nodes, values)
    for prefix in weights:
        forms[prefix] = change.take(prefix, runtime)
    for prefix in change.taken:
        for leaf, dtype in (("levels", "int8"), ("scale", "float32")):
            name, shape = f"{prefix}.{leaf}", values.shape_of(prefix, leaf)
            check_declared(name, onnx.slots.get(name), Declared(dtype, shape))
    dropped = {f"{prefix}.{leaf}" for prefix in change.taken for leaf in ("levels", "scale")}
    added = {n: Declared(v.dtype.name, v.shape) for n, v in change.values.items()}
    onnx.nodes.check_new_names(change.replaced, added)
    kept = tuple(name for name in model.slots if name not in dropped)
    changed = OnnxModel(rewritten(onnx.data, change.replaced, dropped=dropped, added=added))
    filled = {name: values.of(name) for name in kept} | change.values
    check_model(changed.slots, filled)
    model = Model(bit_widths=model.bit_widths, slots=(*kept, *added), data=changed.data)
    return Loaded(model, changed, filled, forms)


def _as_in_graph(graph: Graph, prefix: str) -> Form:
    if graph.modules[prefix].input is not None:
        return Form("integer", "its input is quantized")
    return Form("dequantized", "the runtime makes floats of bytes")


@dataclass(frozen=True)
class _Made:
    """Names of the slots of a weight as products of 4-bit codes, and the products' attributes."""

    bit_width: int
    arguments: list[list[str]]
    half: tuple[str, str] | None
    attributes: Mapping[str, int]


@dataclass
class _Change:
    """What is different from the graph's model.

    Attributes:
        replaced: what stands in place of nodes, by their index.
        values: of the slots that are added.
        taken: prefixes of the modules whose own slots are not there any more.
        nibbles: by the first module with that weight.
        first: that module, by what makes a weight another one.
    """

    graph: Graph
    nodes: Nodes
    slots: SlotValues
    replaced: dict[int, tuple[Node, ...]] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    nibbles: dict[str, "_Made"] = field(default_factory=dict)
    first: dict[tuple[object, ...], str] = field(default_factory=dict)

    def take(self, prefix: str, runtime: Runtime) -> Form:
        """Rewrite a module whose input is a float where that is better, and say how it is now."""
        levels, scale = f"{prefix}.levels", f"{prefix}.scale"
        readers = self.nodes.readers(levels)
        if readers and all(self._is_gather(index, levels) for index in readers):
            return Form("rows", "an embedding reads a few rows of bytes")
        weights = [index for index in readers if self._is_weight(index, prefix)]
        is_known = bool(weights) and all(
            self.nodes.num_readers[name] == len(weights) for name in (levels, scale)
        )
        if not is_known:
            return Form("dequantized", "its graph computes with it in a way of its own")
        module = self.graph.modules[prefix]
        shape = self.slots.shape_of(prefix, "levels")
        num_inputs = shape[0] if module.is_transposed else shape[1]
        products = [self._products_of(index, prefix) for index in weights]
        if not runtime.has_nibbles:
            reason = "the runtime has no products of 4-bit codes and floats"
        elif any(product is None for product in products):
            reason = "only matrices are multiplied in 4-bit codes"
        elif block_size_of(num_inputs, module.group_size) is None:
            reason = f"a group of {module.group_size} inputs is no multiple of {min(BLOCK_SIZES)}"
        else:
            return self._as_nibbles(prefix, weights, [p for found in products for p in found or ()])
        if not runtime.takes_bytes:
            return self._as_float(prefix, weights, f"{reason}, and bytes are slower")
        size, multiple = module.group_size, runtime.group_multiple
        if size and multiple and (num_inputs % size or size % multiple):
            rule = f"takes whole groups of a multiple of {multiple} inputs only"
            return self._as_float(prefix, weights, f"{reason}, and {rule}")
        if runtime.only_multiplied and not all(
            product is not None or self._is_convolved(index)
            for index, product in zip(weights, products, strict=True)
        ):
            rule = "is right only where products and convolutions read them"
            return self._as_float(prefix, weights, f"{reason}, and {rule}")
        return Form("dequantized", reason)

    def _is_convolved(self, index: int) -> bool:
        """Whether only convolutions read the weight that node ``index`` gives."""
        (name,) = self.nodes.all[index].outputs
        readers = self.nodes.readers(name)
        return self.nodes.num_readers[name] == len(readers) and all(
            (node.op_type, node.domain, node.inputs[1:2]) == ("Conv", "", (name,))
            for node in map(self.nodes.all.__getitem__, readers)
        )

    def _is_gather(self, index: int, levels: str) -> bool:
        node = self.nodes.all[index]
        return (
            (node.op_type, node.domain) == ("Gather", "")
            and node.inputs[:1] == (levels,)
            and node.inputs.count(levels) == 1
            and node.attributes.get("axis", 0) == 0
        )

    def _is_weight(self, index: int, prefix: str) -> bool:
        """Whether that node is ``levels * scale`` of the module, and nothing else."""
        node, module = self.nodes.all[index], self.graph.modules[prefix]
        output_axis = 1 if module.is_transposed else 0
        expected: dict[str, object] = {"axis": output_axis}
        if module.group_size is not None:
            expected = {"axis": 1 - output_axis, "block_size": module.group_size}
        return (
            (node.op_type, node.domain) == ("DequantizeLinear", "")
            and node.inputs == (f"{prefix}.levels", f"{prefix}.scale")
            and len(node.outputs) == 1
            and {"axis": 1, **node.attributes} == expected
        )

    def _products_of(self, index: int, prefix: str) -> list[int] | None:
        """The nodes that multiply with the weight that node ``index`` gives; None if others do."""
        (name,) = self.nodes.all[index].outputs
        readers = self.nodes.readers(name)
        is_sole = self.nodes.num_readers[name] == len(readers)
        is_product = all(self._is_product(reader, name, prefix) for reader in readers)
        return readers if readers and is_sole and is_product else None

    def _is_product(self, index: int, weight: str, prefix: str) -> bool:
        node = self.nodes.all[index]
        if node.domain or node.inputs[1:2] != (weight,) or node.inputs.count(weight) != 1:
            return False
        if len(node.outputs) != 1:
            return False
        if self.graph.modules[prefix].is_transposed:
            return node.op_type == "MatMul"
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        return node.op_type == "Gemm" and {**plain, **node.attributes} == {**plain, "transB": 1}

    def _as_float(self, prefix: str, weights: list[int], reason: str) -> Form:
        name = f"{self._first_with(prefix, 'float')}.values"
        if name not in self.values:
            value = self.slots.decoded_weight(prefix).numpy()
            if self.graph.modules[prefix].is_transposed:
                value = np.ascontiguousarray(value.T)
            self.values[name] = value
        for index in weights:
            outputs = self.nodes.all[index].outputs
            self.replaced[index] = (Node(op_type="Identity", inputs=(name,), outputs=outputs),)
        self.taken.append(prefix)
        return Form("float", reason)

    def _as_nibbles(self, prefix: str, weights: list[int], products: list[int]) -> Form:
        first = self._first_with(prefix, "nibbles")
        if first not in self.nibbles:
            self.nibbles[first] = self._made_nibbles(first)
        made = self.nibbles[first]
        for index in weights:
            self.replaced[index] = ()
        for index in products:
            self.replaced[index] = _product_nodes(
                self.nodes.all[index], made.arguments, made.half, made.attributes
            )
        self.taken.append(prefix)
        count = "a product" if len(made.arguments) == 1 else "two products"
        added = " and the sums of inputs" if made.half is not None else ""
        return Form("nibbles", f"{made.bit_width} bits are {count} of 4-bit codes{added}")

    def _made_nibbles(self, prefix: str) -> "_Made":
        """Slots for the weight of a module as products of 4-bit codes."""
        weight = self.slots.decoded_weight(prefix)
        nibbles = nibbles_of(weight)
        arguments = []
        for number, product in enumerate(nibbles.products):
            name = f"{prefix}.nibbles{number}"
            self.values[f"{name}.codes"] = product.codes
            self.values[f"{name}.scale"] = product.scale
            arguments.append([f"{name}.codes", f"{name}.scale"])
        half = None
        if nibbles.half is not None:
            sums = f"nibbles.sums.{nibbles.num_inputs}.{nibbles.group_size}"  # many share it
            if sums not in self.values:
                self.values[sums] = sums_of_groups(nibbles.num_inputs, nibbles.group_size)
            half = sums, f"{prefix}.nibbles.half"
            self.values[half[1]] = nibbles.half
        attributes = {
            "K": nibbles.num_inputs,
            "N": len(weight.levels),
            "bits": NUM_BITS,
            "block_size": nibbles.block_size,
            "accuracy_level": FLOATS_STAY,
        }
        return _Made(weight.bit_width, arguments, half, attributes)

    def _first_with(self, prefix: str, kind: FormKind) -> str:
        """The first module that has the same weight in that form; modules share what is made."""
        module = self.graph.modules[prefix]
        is_transposed = module.is_transposed and kind == "float"  # codes are the same either way
        key = kind, is_transposed, self.slots.weight_key(prefix)
        return self.first.setdefault(key, prefix)


def _product_nodes(
    node: Node,
    arguments: list[list[str]],
    half: tuple[str, str] | None,
    attributes: Mapping[str, int],
) -> tuple[Node, ...]:
    """What is in place of ``node``, a MatMul or Gemm."""
    x, (output,) = node.inputs[0], node.outputs
    nodes, terms = [], []
    for number, names in enumerate(arguments):
        terms.append(f"{output}/nibbles{number}")
        nodes.append(
            Node(
                op_type="MatMulNBits",
                inputs=(x, *names),
                outputs=(terms[-1],),
                attributes=attributes,
                domain=MICROSOFT,
            )
        )
    if half is not None:
        sums, terms = f"{output}/sums", [*terms, f"{output}/half"]
        nodes.append(Node(op_type="MatMul", inputs=(x, half[0]), outputs=(sums,)))
        nodes.append(Node(op_type="MatMul", inputs=(sums, half[1]), outputs=(terms[-1],)))
    if node.op_type == "Gemm" and node.inputs[2:3] not in ((), ("",)):
        terms.append(node.inputs[2])
    total = terms[0]
    for number, term in enumerate(terms[1:]):
        pair, total = (total, term), f"{output}/sum{number}"
        nodes.append(Node(op_type="Add", inputs=pair, outputs=(total,)))
    nodes[-1] = _named(nodes[-1], output)
    return tuple(nodes)


def _named(node: Node, output: str) -> Node:
    return Node(
        op_type=node.op_type,
        inputs=node.inputs,
        outputs=(output,),
        attributes=node.attributes,
        domain=node.domain,
    )
