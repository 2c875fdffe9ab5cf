"""Artifacts whose weights are quantized and whose activations are not, made by hand.

x ─ fc ─ bias ─┬─ y          as MatMul and Add, or as Gemm
ids ─ rows ────┘             an embedding, where it is asked for
"""

import numpy as np
from engine.handmade import float32
from onnx import TensorProto, helper

from plyweight.artifact import (
    Graph,
    LayerContent,
    LayeredWeight,
    Model,
    ModelInfo,
    Module,
    Port,
    TensorData,
    write_artifact,
)
from plyweight.codec import encode, spread, to_planes

ALL = tuple(range(1, 9))
NUM_ROWS = 7


def slot(name, data_type, dims=()):
    tensor = TensorProto(name=name, data_type=data_type, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="slots")
    return tensor


class WeightOnly:
    """A product ``(in,)`` to ``(out,)``, perhaps with an embedding of ``NUM_ROWS`` added.

    Attributes:
        graph: of it.
        weights: of the artifact, by name.
    """

    def __init__(
        self,
        num_inputs,
        num_outputs,
        group_size=None,
        *,
        is_gemm=False,
        has_embedding=False,
        pinned=None,
        bit_widths=ALL,
        edit=None,
    ):
        self.shape = num_outputs, num_inputs
        self.group_size, self.bit_widths = group_size, bit_widths
        self.weights = {"fc.weight": LayeredWeight(self.shape, group_size, pinned)}
        in_groups = self.weights["fc.weight"].scale_shape[1:] not in ((), (1,))
        self.modules = {
            "fc": Module(
                param="fc.weight",
                bias="fc.bias",
                is_transposed=not is_gemm,
                group_size=group_size if in_groups else None,
            )
        }
        self.nodes, self.slots, self.ports = [], [], [self.port("x", TensorProto.FLOAT, num_inputs)]
        self.add_product(is_gemm=is_gemm, in_groups=in_groups)
        if has_embedding:
            self.add_embedding()
        if edit is not None:
            edit(self)
        self.graph = self.made()

    def port(self, name, data_type, *dims):
        return helper.make_tensor_value_info(name, data_type, ["batch", *dims])

    def add_product(self, *, is_gemm, in_groups):
        out = self.shape[0]
        scale_shape = self.weights["fc.weight"].scale_shape if in_groups else (out,)
        exchanged = slice(None, None, 1 if is_gemm else -1)
        self.slots += [
            slot("fc.levels", TensorProto.INT8, self.shape[exchanged]),
            slot("fc.scale", TensorProto.FLOAT, scale_shape[exchanged]),
            slot("fc.bias", TensorProto.FLOAT, (out,)),
        ]
        attributes = {"axis": 0 if is_gemm else 1}
        if in_groups:
            attributes = {"axis": 1 if is_gemm else 0, "block_size": self.group_size}
        weight = ["fc.levels", "fc.scale"]
        self.nodes.append(helper.make_node("DequantizeLinear", weight, ["w"], **attributes))
        if is_gemm:
            self.nodes.append(helper.make_node("Gemm", ["x", "w", "fc.bias"], ["y"], transB=1))
        else:
            self.nodes.append(helper.make_node("MatMul", ["x", "w"], ["product"]))
            self.nodes.append(helper.make_node("Add", ["product", "fc.bias"], ["y"]))

    def add_embedding(self):
        out = self.shape[0]
        self.weights["rows.weight"] = LayeredWeight((NUM_ROWS, out))
        self.modules["rows"] = Module(param="rows.weight")
        self.slots += [
            slot("rows.levels", TensorProto.INT8, (NUM_ROWS, out)),
            slot("rows.scale", TensorProto.FLOAT, (NUM_ROWS,)),
        ]
        self.ports.append(self.port("ids", TensorProto.INT64))
        self.nodes[-1].output[0] = "answer"
        last = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
        self.nodes += [
            helper.make_node("Gather", ["rows.levels", "ids"], ["picked"]),
            helper.make_node("Cast", ["picked"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["rows.scale", "ids"], ["scales"]),
            helper.make_node("Constant", [], ["last"], value=last),
            helper.make_node("Unsqueeze", ["scales", "last"], ["column"]),
            helper.make_node("Mul", ["floats", "column"], ["row"]),
            helper.make_node("Add", ["answer", "row"], ["y"]),
        ]

    def made(self):
        output = self.port("y", TensorProto.FLOAT, self.shape[0])
        graph = helper.make_graph(self.nodes, "net", self.ports, [output], self.slots)
        opset = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        dtypes = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}
        return Graph(
            models=(
                Model(
                    bit_widths=self.bit_widths,
                    slots=tuple(tensor.name for tensor in self.slots),
                    data=model.SerializeToString(),
                ),
            ),
            inputs=tuple(
                Port(
                    port.name,
                    dtypes[port.type.tensor_type.elem_type],
                    ("batch", *(d.dim_value for d in port.type.tensor_type.shape.dim[1:])),
                )
                for port in self.ports
            ),
            outputs=(Port("y", "float32", ("batch", self.shape[0])),),
            modules=self.modules,
            quantizers={},
            tensors={},
        )

    def write(self, path, seed=0):
        """The artifact at ``path``; some gains are there, and weights of every code."""
        rng = np.random.default_rng(seed)
        planes, scales = {}, {}
        for name, weight in self.weights.items():
            scales[name] = rng.uniform(0.001, 0.02, weight.scale_shape).astype(np.float32)
            scale = spread(scales[name], weight.shape, weight.group_size)
            values = rng.uniform(-128, 128, weight.shape).astype(np.float32) * scale
            planes[name] = to_planes(encode(values, scale), 8)
        data = self.graph.to_bytes()
        layers, previous = [], 0
        for bit_width in self.bit_widths:
            tensors = [] if previous else [TensorData("__graph__", "U8", (len(data),), data)]
            for name, weight in self.weights.items():
                count = weight.planes_in(bit_width, previous)
                if count:
                    first = weight.width_at(previous) if previous else 0
                    rows = planes[name][first : first + count]
                    tensors.append(TensorData(f"{name}.q", "U8", rows.shape, rows.tobytes()))
                    gain = rng.uniform(0.9, 1.1, weight.scale_shape if bit_width == 2 else 1)
                    tensors.append(float32(f"{name}.gain", gain))
                if not previous:
                    tensors.append(float32(f"{name}.scale", scales[name]))
            tensors.append(float32("fc.bias", rng.normal(size=self.shape[0])))
            layers.append(LayerContent(bit_width, tensors))
            previous = bit_width
        return write_artifact(
            path,
            layers=layers,
            weights=self.weights,
            activations={},
            model=ModelInfo(name="weight only", revision=0, created_by="plyweight tests"),
        )
