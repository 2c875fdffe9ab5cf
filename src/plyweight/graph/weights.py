"""Weights: the nodes that compute with layered weights read levels, scales and biases.

    Conv(x, W, b) -> BatchNormalization     becomes     Conv(x', DQ(levels, scale), DQ(bias))
    Gemm(x, W, b)                                       Gemm(x', DQ(levels, scale), DQ(bias))
    Add(MatMul(x, Transpose(W)), b)                     Add(MatMul(x', DQ(levels, scale)), DQ(bias))
    Gather(W, ids)                                      Gather(levels, ids) * Gather(scale, ids)

(a scale for each group of inputs is spread over them: by DequantizeLinear itself, or by a Gather),
where ``DQ`` is DequantizeLinear, ``x'`` is ``x`` behind the quantizer of the module's input if it
has one (a *mark*, see ``marks``), and the batch norm is folded into scale and bias, per bit-width,
by whoever fills the slots. Wherever else a layered weight is read, its values are.
"""

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir as ir

from plyweight.artifact import Module, Norm
from plyweight.errors import LayeringError
from plyweight.graph.marks import mark
from plyweight.graph.scopes import scopes_of
from plyweight.graph.skeleton import GraphSkeleton, Layered
from plyweight.graph.slots import FLOAT, INT8, Slots, new_node

__all__ = ["INPUT", "TENSOR", "Weights", "replace_weights", "stored_name"]

# A quantizer's slots and those of the module behind it are told apart; no module has a colon.
INPUT = ":input"
# Nor are a module's bias that is folded and the artifact's own tensor of that name the same.
TENSOR = "tensor:"


@dataclass
class Weights:
    """What was found.

    Attributes:
        modules: by prefix of their slots.
        convolutions: outputs of those with a quantized input, behind their batch norm, and the
            modules that give them: the batch norm, or the convolution.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    convolutions: dict[ir.Value, str] = field(default_factory=dict)


def replace_weights(model: ir.Model, skeleton: GraphSkeleton) -> Weights:
    """Let every node that reads a layered weight of ``skeleton`` read slots instead, in place.

    Raises:
        LayeringError: If a node of a layered module is not one of those above.
    """
    replacer = _Replacer(model, skeleton)
    params = {layered.param for layered in skeleton.layered.values()}
    for value in list(model.graph.initializers.values()):
        param = stored_name(skeleton, value)
        if param in params:
            for node, index in list(value.uses()):
                replacer.replace(node, index, param)
    return replacer.found


class _Replacer:
    def __init__(self, model: ir.Model, skeleton: GraphSkeleton) -> None:
        self._graph, self._skeleton = model.graph, skeleton
        self._slots = Slots(model.graph)
        self._uses: Counter[str] = Counter()
        self.found = Weights()

    def replace(self, node: ir.Node, index: int, param: str) -> None:
        """Let ``node``, which reads the layered weight as input ``index``, read slots."""
        name = scopes_of(node)[-1]
        layered = self._skeleton.layered.get(name)
        if layered is None or layered.param != param:
            self._replace_value(node, index, param)  # somebody computes with `module.weight`
            return
        kind, op_type = layered.kind, node.op_type
        is_convolution = kind == "convolution" and op_type == "Conv"
        if index == 1 and (is_convolution or (kind == "linear" and _is_linear(node))):
            self._replace_product(node, name, layered)
        elif kind == "linear" and op_type == "Transpose" and _sole(node, "MatMul", 1) is not None:
            self._replace_product(_sole(node, "MatMul", 1), name, layered)
        elif kind == "embedding" and op_type == "Gather" and index == 0:
            self._replace_gather(node, name, layered)
        else:
            raise LayeringError(
                f"module {name!r} computes with its weight by {op_type}, which has no counterpart "
                "on levels; name it in `exclude` of prepare, or pack without example_inputs."
            )

    def _replace_product(self, node: ir.Node | None, name: str, layered: Layered) -> None:
        assert node is not None
        out = node.outputs[0]
        if node.op_type == "MatMul" and layered.bias is not None:
            added = _sole(node, "Add", None)
            if added is None or not any(
                stored_name(self._skeleton, v) == layered.bias for v in added.inputs
            ):
                raise LayeringError(
                    f"the bias of module {name!r} is not added right after its product; name it "
                    "in `exclude` of prepare, or pack without example_inputs."
                )
            out = added.outputs[0]
        norm, folded = self._norm_of(out, node)
        quantizer = None
        if layered.activation is not None:
            quantizer = f"{layered.activation}{INPUT}"
            mark(node, 0, quantizer, name=f"{out.name}/input")
        module = Module(
            param=layered.param,
            bias=layered.bias,
            norm=norm,
            input=quantizer,
            is_transposed=node.op_type == "MatMul",
            group_size=self._skeleton.group_sizes[layered.param],
        )
        prefix = self._prefix(name or "model", module)
        weight = self._weight(node, prefix, module)
        bias = self._bias(node, prefix, module)
        if node.op_type == "MatMul":
            node.replace_input_with(1, weight)
            if layered.bias is not None:
                added = out.producer()
                assert added is not None
                index = next(i for i, v in enumerate(added.inputs) if v is not node.outputs[0])
                added.replace_input_with(index, bias)
        else:
            node.resize_inputs(2 if bias is None else 3)
            node.replace_input_with(1, weight)
            if bias is not None:
                node.replace_input_with(2, bias)
        if folded is not None:
            folded.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
            self._graph.remove(folded, safe=True)
        if layered.kind == "convolution" and quantizer is not None:
            owner = name if folded is None else scopes_of(folded)[-1]
            self.found.convolutions[out] = owner

    def _replace_gather(self, node: ir.Node, name: str, layered: Layered) -> None:
        ids, out = node.inputs[1], node.outputs[0]
        group_size = self._skeleton.group_sizes[layered.param]
        module = Module(param=layered.param, group_size=group_size)
        prefix = self._prefix(name or "model", module)
        levels = self._slots.of_module(prefix, "levels", self._shape(layered.param))
        scale = self._slots.of_module(prefix, "scale", self._scale_shape(module))
        rows = new_node(node, "Gather", [levels, ids], f"{out.name}/levels", dtype=INT8)
        values = new_node(node, "Cast", [rows], f"{out.name}/cast", {"to": int(FLOAT)})
        scales = new_node(node, "Gather", [scale, ids], f"{out.name}/scale")
        if group_size is None:
            axis = self._constant("last_axis", [-1])
            column = new_node(node, "Unsqueeze", [scales, axis], f"{out.name}/column")
        else:
            length = self._shape(layered.param)[1]
            groups = self._constant(
                f"groups.{length}.{group_size}", [i // group_size for i in range(length)]
            )
            column = new_node(node, "Gather", [scales, groups], f"{out.name}/column", {"axis": -1})
        new = new_node(node, "Mul", [values, column], f"{out.name}/values", like=out)
        out.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)

    def _replace_value(self, node: ir.Node, index: int, param: str) -> None:
        module = Module(param=param, group_size=self._skeleton.group_sizes[param])
        prefix = self._prefix(f"{param}:value", module)
        node.replace_input_with(index, self._weight(node, prefix, module))

    def _weight(self, node: ir.Node, prefix: str, module: Module) -> ir.Value:
        """The module's weight in float, which the runtime does not compute where it can fuse."""
        shape = self._shape(module.param)
        own = shape[::-1] if module.is_transposed else shape
        inputs = [
            self._slots.of_module(prefix, "levels", own),
            self._slots.of_module(prefix, "scale", self._scale_shape(module)),
        ]
        if module.input is not None and node.op_type != "Conv":
            # Without one ONNX Runtime multiplies matrices in float, though it means zero.
            inputs.append(self._slots.of_module(prefix, "zero_point", shape[:1]))
        self._uses["weight"] += 1
        name = f"{prefix}/values{self._uses['weight']}"
        attributes = {"axis": 1 if module.is_transposed else 0}
        if module.group_size is not None:
            attributes = {"axis": 1 - attributes["axis"], "block_size": module.group_size}
        return new_node(node, "DequantizeLinear", inputs, name, attributes)

    def _bias(self, node: ir.Node, prefix: str, module: Module) -> ir.Value | None:
        if module.bias is None and module.norm is None:
            return None
        size = self._shape(module.param)[:1]
        if module.input is None:
            return self._slots.get(f"{prefix}.bias", FLOAT, size)
        bias = self._slots.of_module(prefix, "bias", size)
        scale = self._slots.of_module(prefix, "bias_scale", size)
        self._uses["bias"] += 1
        name = f"{prefix}/biases{self._uses['bias']}"
        return new_node(node, "DequantizeLinear", [bias, scale], name, {"axis": 0})

    def _norm_of(self, out: ir.Value, node: ir.Node) -> tuple[Norm | None, ir.Node | None]:
        """The batch norm behind ``out`` that can be folded into it, and its node."""
        if node.op_type == "MatMul":  # of more than two dimensions: channels are not the second
            return None, None
        found = _sole_use(out, "BatchNormalization", 0)
        if found is None:
            return None, None
        mean = found.inputs[3]
        stored = stored_name(self._skeleton, mean)
        if stored is None or not stored.endswith(".running_mean"):
            return None, None
        module = self._skeleton.model.get_submodule(scopes_of(found)[-1])
        # The node has it in float32.
        return Norm(stored.removesuffix(".running_mean"), float(module.eps)), found  # type: ignore[arg-type]

    def _prefix(self, name: str, module: Module) -> str:
        """What the slots of ``module`` begin with: its name, or that and a number."""
        prefix, number = name, 1
        while self.found.modules.get(prefix, module) != module:
            number += 1
            prefix = f"{name}:{number}"
        self.found.modules[prefix] = module
        return prefix

    def _shape(self, param: str) -> tuple[int, ...]:
        return self._skeleton.shapes[param]

    def _scale_shape(self, module: Module) -> tuple[int, ...]:
        """The shape of a module's scale: one for each output channel, or for each group too."""
        out, *inputs = self._shape(module.param)
        if module.group_size is None:
            return (out,)
        shape = out, -(-inputs[0] // module.group_size), *inputs[1:]
        return shape[::-1] if module.is_transposed else shape

    def _constant(self, name: str, values: list[int]) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
            self._graph.register_initializer(
                ir.Value(
                    name=name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape([len(values)]),
                    const_value=tensor,
                )
            )
        return self._graph.initializers[name]


def stored_name(skeleton: GraphSkeleton, value: ir.Value | None) -> str | None:
    """What the artifact calls the tensor that ``value`` stands for; None if it stands for none."""
    if value is None or value.name is None or not value.name.startswith(TENSOR):
        return None
    return skeleton.stored.get(value.name.removeprefix(TENSOR))


def _sole_use(value: ir.Value, op_type: str, index: int | None) -> ir.Node | None:
    """The node of this type that alone reads ``value``, as input ``index``."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node if index in (None, uses[0].idx) else None


def _sole(node: ir.Node, op_type: str, index: int | None) -> ir.Node | None:
    return _sole_use(node.outputs[0], op_type, index)


def _is_linear(node: ir.Node) -> bool:
    """Whether ``node`` is a Gemm, ``x @ W.T + b`` and no more."""
    if node.op_type != "Gemm":
        return False
    expected = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    attributes = node.attributes
    return all(
        (attributes[key].value if key in attributes else defaults[key]) == value
        for key, value in expected.items()
    )
