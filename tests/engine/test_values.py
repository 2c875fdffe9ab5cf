"""What fills the slots of a graph, from planes, scales, gains, norms and steps."""

import numpy as np
import pytest
from engine.handmade import (
    ACTIVATIONS,
    BIT_WIDTHS,
    MODULES,
    QUANTIZERS,
    float32,
    layer_contents,
    residual_graph,
    write,
)

from plyweight.artifact import (
    Activation,
    ArtifactReader,
    Graph,
    LayerContent,
    MemorySource,
    Module,
    TensorData,
)
from plyweight.codec import decode, from_planes, spread
from plyweight.engine.values import SlotValues
from plyweight.errors import GraphError

NEAR = 1e-6  # of a float32 that was rounded once more than its definition


def values_of(tmp_path, bit_width, *, change=None, graph=None, **changes):
    """The slots' values of an artifact whose plain tensors ``change`` replaces, by name."""
    graph = graph or residual_graph()
    contents = [
        LayerContent(
            layer.bit_width,
            [
                float32(t.name, (change or {})[t.name]) if t.name in (change or {}) else t
                for t in layer.tensors
            ],
        )
        for layer in layer_contents(graph)
    ]
    path = tmp_path / "net.layered.safetensors"
    write(path, graph, layers=contents, **changes)
    reader = ArtifactReader(path)
    graph.check(reader.header)
    layers = [reader.read_layer(i) for i in range(len(BIT_WIDTHS))]
    return SlotValues(reader.header, graph, layers, bit_width), layers, reader.header


def float_module(layers, header, prefix, bit_width):
    """Weight and bias of a module with its norm folded, by the definition, in float64."""
    module, index = MODULES[prefix], BIT_WIDTHS.index(bit_width)
    held = {}
    for views in layers[: index + 1]:
        if f"{module.param}.q" in views:
            held.pop(f"{module.param}.gain", None)
        held |= {name: view.numpy() for name, view in views.items()}
    record = header.weights[module.param]
    rows = [
        row
        for views in layers[: index + 1]
        if f"{module.param}.q" in views
        for row in views[f"{module.param}.q"].numpy()
    ]
    levels = decode(from_planes(rows, record.shape), len(rows)).astype(np.float64)
    scale = held[f"{module.param}.scale"] * held[f"{module.param}.gain"]
    weight = levels * spread(scale, record.shape, None)
    bias = held[module.bias].astype(np.float64) if module.bias else 0.0
    if module.norm:
        norm = {k: held[f"{module.norm.name}.{k}"].astype(np.float64) for k in NORM}
        factor = norm["weight"] / np.sqrt(norm["running_var"] + module.norm.eps)
        bias = norm["bias"] + (bias - norm["running_mean"]) * factor
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return weight, bias


NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
@pytest.mark.parametrize("prefix", MODULES)
def test_levels_times_scale_are_the_weight_with_its_norm_folded(tmp_path, prefix, bit_width):
    values, layers, header = values_of(tmp_path, bit_width)
    weight, bias = float_module(layers, header, prefix, bit_width)
    levels, scale = values.of(f"{prefix}.levels"), values.of(f"{prefix}.scale")
    assert levels.dtype == np.int8
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    folded = levels * spread(scale, levels.shape, None)
    np.testing.assert_allclose(folded, weight, rtol=NEAR, atol=0)
    unit = values.of(f"{prefix}.bias_scale")
    step = values.of(f"{MODULES[prefix].input}.step")
    np.testing.assert_array_equal(unit, step * scale)
    half_a_unit = unit / 2 + np.abs(bias) * NEAR
    assert (np.abs(values.of(f"{prefix}.bias") * unit.astype(float) - bias) <= half_a_unit).all()


def test_channels_with_a_negative_factor_have_negated_levels(tmp_path):
    values, layers, header = values_of(tmp_path, 4)
    factor = layers[1]["bn1.weight"].numpy()
    assert (factor < 0).any()
    record = header.weights["conv1.weight"]
    rows = [row for i in (0, 1) for row in layers[i]["conv1.weight.q"].numpy()]
    levels = decode(from_planes(rows, record.shape), 4)
    sign = np.sign(factor).astype(int).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(values.of("conv1.levels"), levels * sign)


def test_every_slot_of_a_model_has_the_dtype_and_shape_that_it_declares(tmp_path):
    from plyweight.engine.onnx_model import external_initializers
    from plyweight.engine.session import check_model

    graph = residual_graph()
    for bit_width in BIT_WIDTHS:
        values, _, _ = values_of(tmp_path, bit_width)
        model = graph.model_for(bit_width)
        check_model(external_initializers(model.data), values.all())
        assert list(values.all()) == list(model.slots)


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_grids_come_from_the_artifact_or_from_the_graph(tmp_path, bit_width):
    values, layers, _ = values_of(tmp_path, bit_width)
    index = BIT_WIDTHS.index(bit_width)
    assert values.of("conv1.in.step") == layers[index]["conv1.step"].numpy()[0]
    assert values.of("conv1.in.zero_point") == 0
    assert values.of("conv1.in.highest") == 2**bit_width - 1
    assert values.of("fc.in.zero_point") == 2 ** (bit_width - 1)  # signed
    assert values.of("image.step") == np.float32(QUANTIZERS["image"].steps[bit_width])
    assert values.of("image.zero_point") == 128
    assert values.of("image.highest") == 255


def test_a_channel_without_a_factor_gives_its_bias_and_no_overflow(tmp_path):
    factor = np.full(16, 1.0)
    factor[:4] = 0.0, 1e-30, -1e-12, 1e-8
    values, _, _ = values_of(
        tmp_path, 8, change={"bn1.weight": factor, "bn1.bias": np.linspace(-2, 2, 16)}
    )
    levels, scale = values.of("conv1.levels"), values.of("conv1.scale")
    unit = values.of("conv1.bias_scale").astype(float)
    bias = values.of("conv1.bias") * unit
    np.testing.assert_allclose(bias[:3], np.linspace(-2, 2, 16)[:3], rtol=1e-6)
    assert np.isfinite(scale).all()
    assert not levels[0].any()
    # What the rounded levels of such a channel can add up to is next to nothing beside the bias.
    most = np.abs(levels[:3].astype(float)).sum((1, 2, 3)) * 255 * unit[:3]
    assert (most < 1e-3 * np.abs(bias[:3])).all()


@pytest.mark.parametrize("broken", [np.full(16, -1.0), np.full(16, np.nan)])
def test_a_norm_that_gives_no_number_is_refused_by_name(tmp_path, broken):
    values, _, _ = values_of(tmp_path, 8, change={"bn1.running_var": broken})
    with pytest.raises(GraphError, match="scale or bias of module 'conv1' are not finite at 8"):
        values.of("conv1.levels")


def test_an_offset_comes_from_the_artifact_and_must_be_whole(tmp_path):
    def of(zero_point):
        offsets = ACTIVATIONS | {"conv1": Activation("offset", {b: b for b in BIT_WIDTHS})}
        graph = residual_graph()
        contents = layer_contents(graph)
        contents[0].tensors.append(float32("conv1.zero_point", [zero_point]))
        write(tmp_path / "net", graph, layers=contents, activations=offsets)
        reader = ArtifactReader(tmp_path / "net")
        layers = [reader.read_layer(i) for i in range(3)]
        return SlotValues(reader.header, graph, layers, 4).of("conv1.in.zero_point")

    assert of(3.0) == 3
    with pytest.raises(GraphError, match=r"activation .conv1. is 2\.5 at 4 bits"):
        of(2.5)
    with pytest.raises(GraphError, match=r"is -1\.0"):
        of(-1.0)


def graph_with(modules, tensors=None):
    graph = residual_graph()
    return Graph(
        models=graph.models,
        inputs=graph.inputs,
        outputs=graph.outputs,
        modules=dict(graph.modules) | modules,
        quantizers=graph.quantizers,
        tensors=tensors or {},
    )


def test_a_module_with_a_float_input_has_a_float_bias(tmp_path):
    graph = graph_with({"head": Module(param="fc.weight", bias="fc.bias", is_transposed=True)})
    values, layers, _ = values_of(tmp_path, 8, graph=graph)
    assert values.of("head.bias").dtype == np.float32
    np.testing.assert_array_equal(values.of("head.bias"), layers[2]["fc.bias"].numpy())
    levels = values.of("head.levels")
    assert levels.flags.c_contiguous
    np.testing.assert_array_equal(levels, values.of("fc.levels").T)


def test_modules_that_share_a_weight_share_its_levels(tmp_path):
    graph = graph_with({"again": Module(param="fc.weight", input="fc.in")})
    values, _, _ = values_of(tmp_path, 4, graph=graph)
    assert values.of("again.levels") is values.of("fc.levels")


def test_plain_tensors_are_handed_on_and_bf16_as_float32(tmp_path):
    graph = graph_with({}, {"position": "table", "half": "bf16"})
    contents = layer_contents(graph)
    table = np.arange(6, dtype="<i8").reshape(2, 3)
    bits = (np.array([1.5, -2.0], "<f4").view("<u4") >> 16).astype("<u2")
    contents[0].tensors.append(TensorData("table", "I64", (2, 3), table.tobytes()))
    contents[0].tensors.append(TensorData("bf16", "BF16", (2,), bits.tobytes()))
    write(tmp_path / "net", graph, layers=contents)
    reader = ArtifactReader(MemorySource((tmp_path / "net").read_bytes()))
    values = SlotValues(reader.header, graph, [reader.read_layer(i) for i in range(3)], 2)
    np.testing.assert_array_equal(values.of("position"), table)
    np.testing.assert_array_equal(values.of("half"), np.array([1.5, -2.0], np.float32))
