"""A small residual network as graph and artifact, made by hand: onnx.helper and numpy alone.

    image ─Q8─ stem ─relu─Q8─┬─────────────── skip ──────────────┐
                             └─Qb─ conv1 ─relu─Qb─ conv2 ─Q8─ add ─relu─Q8─ pool ─Qb─ fc ─ logits

Qb is a grid of the artifact's, clipped below 8 bits; Q8 one of the graph's own. ``stem`` is pinned
to 8 bits, ``conv1`` has a batch norm whose factors are partly negative, ``fc`` a signed input.
"""

import numpy as np
from onnx import TensorProto, helper

from plyweight.artifact import (
    Activation,
    Graph,
    LayerContent,
    LayeredWeight,
    Model,
    ModelInfo,
    Module,
    Norm,
    Port,
    Quantizer,
    TensorData,
    write_artifact,
)
from plyweight.codec import encode, spread, to_planes

BIT_WIDTHS = (2, 4, 8)
CHANNELS, CLASSES, SIDE = 16, 10, 9
WEIGHTS = {
    "stem.weight": LayeredWeight((CHANNELS, 3, 3, 3), None, 8),
    "conv1.weight": LayeredWeight((CHANNELS, CHANNELS, 3, 3)),
    "conv2.weight": LayeredWeight((CHANNELS, CHANNELS, 3, 3)),
    "fc.weight": LayeredWeight((CLASSES, CHANNELS)),
}
ACTIVATIONS = {
    "conv1": Activation("unsigned", {b: b for b in BIT_WIDTHS}),
    "conv2": Activation("unsigned", {b: b for b in BIT_WIDTHS}),
    "fc": Activation("signed", {b: b for b in BIT_WIDTHS}),
}
MODULES = {
    "stem": Module(param="stem.weight", bias="stem.bias", input="image"),
    "conv1": Module(param="conv1.weight", norm=Norm("bn1", 1e-5), input="conv1.in"),
    "conv2": Module(param="conv2.weight", bias="conv2.bias", input="conv2.in"),
    "fc": Module(param="fc.weight", bias="fc.bias", input="fc.in"),
}
# What layered.io of the artifact says.
IO = {
    "inputs": [{"name": "input", "shape": ["batch", 3, SIDE, SIDE]}],
    "labels": [f"class {i}" for i in range(CLASSES)],
}


def own(step, zero_point=0):
    """A grid of the graph's own, a little different at every bit-width."""
    return Quantizer(
        steps={b: step * (1 + 1 / b) for b in BIT_WIDTHS},
        zero_points=dict.fromkeys(BIT_WIDTHS, zero_point),
    )


QUANTIZERS = {
    "image": own(0.02, 128),
    "stem.out": own(0.03),
    "conv1.in": Quantizer(activation="conv1"),
    "conv2.in": Quantizer(activation="conv2"),
    "conv2.out": own(0.05, 120),
    "add.out": own(0.04),
    "fc.in": Quantizer(activation="fc"),
}
# ONNX dtype and bytes of an item, by kind of owner and leaf.
SLOT_DTYPES = {
    ("module", "levels"): (TensorProto.INT8, 1),
    ("module", "scale"): (TensorProto.FLOAT, 4),
    ("module", "zero_point"): (TensorProto.INT8, 1),
    ("module", "bias"): (TensorProto.INT32, 4),
    ("module", "bias_scale"): (TensorProto.FLOAT, 4),
    ("quantizer", "step"): (TensorProto.FLOAT, 4),
    ("quantizer", "zero_point"): (TensorProto.UINT8, 1),
    ("quantizer", "highest"): (TensorProto.UINT8, 1),
}


class ModelBuilder:
    """Nodes one after the other, and the slots that they read."""

    def __init__(self, *, is_clipped):
        self.is_clipped = is_clipped
        self.nodes, self.slots = [], {}

    def slot(self, name, shape=()):
        prefix, _, leaf = name.rpartition(".")
        dtype, item_bytes = SLOT_DTYPES["module" if prefix in MODULES else "quantizer", leaf]
        tensor = TensorProto(name=name, data_type=dtype, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = str(item_bytes * np.prod(shape, dtype=int))
        for key, value in (("location", "slots"), ("offset", "0"), ("length", length)):
            tensor.external_data.add(key=key, value=value)
        self.slots[name] = tensor
        return name

    def node(self, op_type, *inputs, **attributes):
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def quantize(self, x, prefix):
        """Onto a grid and back to float."""
        grid = self.slot(f"{prefix}.step"), self.slot(f"{prefix}.zero_point")
        x = self.node("QuantizeLinear", x, *grid)
        if self.is_clipped and QUANTIZERS[prefix].activation is not None:
            x = self.node("Clip", x, "", self.slot(f"{prefix}.highest"))
        return self.node("DequantizeLinear", x, *grid)

    def product(self, op_type, x, prefix, **attributes):
        shape = WEIGHTS[MODULES[prefix].param].shape
        levels, scale = (
            self.slot(f"{prefix}.levels", shape),
            self.slot(f"{prefix}.scale", shape[:1]),
        )
        zero_point = self.slot(f"{prefix}.zero_point", shape[:1])
        weight = self.node("DequantizeLinear", levels, scale, zero_point, axis=0)
        bias = self.slot(f"{prefix}.bias", shape[:1])
        bias_scale = self.slot(f"{prefix}.bias_scale", shape[:1])
        bias = self.node("DequantizeLinear", bias, bias_scale, axis=0)
        return self.node(op_type, x, weight, bias, **attributes)

    def finish(self, output):
        """The serialized model."""
        self.nodes[-1].output[0] = output
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", CLASSES])],
            list(self.slots.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        return model.SerializeToString(deterministic=True)


def residual_model(*, is_clipped):
    """The network above as ``(bytes, slots)``."""
    net = ModelBuilder(is_clipped=is_clipped)
    x = net.quantize("input", "image")
    x = net.node("Relu", net.product("Conv", x, "stem", pads=[1] * 4))
    skip = net.quantize(x, "stem.out")
    x = net.product("Conv", net.quantize(skip, "conv1.in"), "conv1", pads=[1] * 4)
    x = net.quantize(net.node("Relu", x), "conv2.in")
    x = net.quantize(net.product("Conv", x, "conv2", pads=[1] * 4), "conv2.out")
    x = net.quantize(net.node("Relu", net.node("Add", x, skip)), "add.out")
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    net.product("Gemm", net.quantize(x, "fc.in"), "fc", transB=1)
    data = net.finish("logits")
    return data, tuple(net.slots)


def residual_graph():
    """The graph, with a model for 2 and 4 bits and one for 8."""
    narrow, wide = residual_model(is_clipped=True), residual_model(is_clipped=False)
    return Graph(
        models=(
            Model(bit_widths=BIT_WIDTHS[:-1], slots=narrow[1], data=narrow[0]),
            Model(bit_widths=BIT_WIDTHS[-1:], slots=wide[1], data=wide[0]),
        ),
        inputs=(Port("input", "float32", ("batch", 3, SIDE, SIDE)),),
        outputs=(Port("logits", "float32", ("batch", CLASSES)),),
        modules=MODULES,
        quantizers=QUANTIZERS,
        tensors={},
    )


def float32(name, array):
    array = np.ascontiguousarray(array, dtype="<f4")
    return TensorData(name, "F32", array.shape, array.tobytes())


def layer_contents(graph, seed=0):
    """What ``write_artifact`` wants; batch norm, steps and gains differ at every bit-width."""
    rng = np.random.default_rng(seed)
    planes, scales = {}, {}
    for name, weight in WEIGHTS.items():
        values = rng.normal(0, 0.2, weight.shape).astype(np.float32)
        scales[name] = rng.uniform(0.003, 0.005, weight.shape[:1]).astype(np.float32)
        planes[name] = to_planes(encode(values, spread(scales[name], weight.shape, None)), 8)
    layers, previous = [], 0
    for index, bit_width in enumerate(BIT_WIDTHS):
        tensors = []
        if not index and graph is not None:
            data = graph.to_bytes() if isinstance(graph, Graph) else graph
            tensors.append(TensorData("__graph__", "U8", (len(data),), data))
        for name, weight in WEIGHTS.items():
            count = weight.planes_in(bit_width, previous)
            if count:
                first = weight.width_at(previous) if index else 0
                rows = planes[name][first : first + count]
                tensors.append(TensorData(f"{name}.q", "U8", rows.shape, rows.tobytes()))
                gain = rng.uniform(0.9, 1.1, weight.shape[:1] if index else 1)
                tensors.append(float32(f"{name}.gain", gain))
            if not index:
                tensors.append(float32(f"{name}.scale", scales[name]))
        for name, activation in ACTIVATIONS.items():
            levels = 2 ** activation.bit_widths[bit_width] - 1
            tensors.append(float32(f"{name}.step", [2.0 / levels]))
        for name, length in (("stem", CHANNELS), ("conv2", CHANNELS), ("fc", CLASSES)):
            tensors += [float32(f"{name}.bias", rng.normal(0, 0.3, length))]
        tensors.append(float32("bn1.weight", rng.normal(0, 1, CHANNELS)))
        tensors.append(float32("bn1.bias", rng.normal(0, 0.3, CHANNELS)))
        tensors.append(float32("bn1.running_mean", rng.normal(0, 0.3, CHANNELS)))
        tensors.append(float32("bn1.running_var", rng.uniform(0.5, 2, CHANNELS)))
        layers.append(LayerContent(bit_width, tensors))
        previous = bit_width
    return layers


def write(path, graph, seed=0, **changes):
    """The artifact of the network at ``path``; its header."""
    content = {
        "layers": layer_contents(graph, seed),
        "weights": WEIGHTS,
        "activations": ACTIVATIONS,
        "model": ModelInfo(name="residual", revision=1, created_by="plyweight tests"),
        "io": IO,
    } | changes
    return write_artifact(path, **content)


def images(count=3, seed=5):
    """Pictures that use most of the first grid."""
    return np.random.default_rng(seed).normal(0, 1, (count, 3, SIDE, SIDE)).astype(np.float32)


def answers(engine, expected):
    """The one bit-width whose logits an engine gives, bit for bit."""
    logits = engine.run({"input": images()})["logits"]
    found = [b for b, reference in expected.items() if np.array_equal(logits, reference)]
    assert len(found) == 1, "the logits are those of no bit-width"
    return found[0]
