"""A graph and its artifact: whatever the one names is in the other, of the shape it is used as."""

import dataclasses

import pytest
from artifact.builders import content, float32, layer_contents
from artifact.graphs import WIDTHS, graph

from plyweight.artifact import (
    Activation,
    ArtifactReader,
    LayerContent,
    LayeredWeight,
    Model,
    Module,
    Norm,
    Quantizer,
    TensorData,
    write_artifact,
)
from plyweight.errors import HeaderError

EXTRA = (
    TensorData("bn.running_mean", **float32([0.0] * 3)),
    TensorData("whole", "I64", (3,), bytes(24)),
)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Of an artifact with what :func:`graph` names; ``fc`` is in groups and has an activation."""
    path = tmp_path_factory.mktemp("graph") / "tiny"
    signed = TensorData("signed.step", **float32([1.0]))
    layers = layer_contents()
    first = LayerContent(2, [*layers[0].tensors, *EXTRA, signed])
    activations = content()["activations"] | {
        "signed": Activation("signed", {2: 1, 3: 2, 8: 8}),
    }
    write_artifact(path, **content(layers=[first, *layers[1:]], activations=activations))
    return ArtifactReader(path).header


def test_a_graph_whose_names_exist_passes(header):
    graph().check(header)


CONV = Module(param="conv.weight")


def conv(**changes):
    return {"modules": {"conv": dataclasses.replace(CONV, **changes)}}


def quantizer(**changes):
    return {"quantizers": {"conv.in": Quantizer(**changes)}, **conv(input="conv.in")}


MISFITS = {
    "widths": (
        {"models": (Model(bit_widths=(2,), slots=(), data=b"m"),)},
        r"models for \[2\] bits, but the artifact stores \[2, 3, 8\]",
    ),
    "a weight": (conv(param="conv.bias"), "'conv.bias', but the artifact has no such layered weig"),
    "a weight in groups": (
        conv(param="fc.weight"),
        "'fc.weight' in groups of None inputs, but the artifact has it in groups of 4",
    ),
    "other groups": (
        conv(param="fc.weight", group_size=2),
        "'fc.weight' in groups of 2 inputs, but the artifact has it in groups of 4",
    ),
    "groups of a weight that has none": (conv(group_size=2), "has it in groups of None"),
    "groups of integers": (
        conv(param="fc.weight", group_size=4, input="conv.in"),
        "has groups of inputs, which 'conv.in' quantizes",
    ),
    "a transposed kernel": (conv(is_transposed=True), "only two dimensions can be exchanged"),
    "a bias": (conv(bias="conv.bias"), "'conv.bias', but the artifact has no such plain tensor"),
    "a bias of another length": (conv(bias="fc.bias"), r"floats of shape \[3\]"),
    "a bias of integers": (conv(bias="whole"), r"'whole', I64 of shape \[3\]"),
    "planes as a bias": (conv(bias="conv.weight.q"), "no such plain tensor"),
    "the graph as a bias": (conv(bias="__graph__"), "no such plain tensor"),
    "a norm": (conv(norm=Norm("norm", 0.0)), "'norm.running_mean'"),
    "an activation": (quantizer(activation="conv"), "'conv', but the artifact has no such activ"),
    "steps for other widths": (
        quantizer(steps={2: 1.0}, zero_points={2: 0}),
        r"values for \[2\] bits, but the artifact stores \[2, 3, 8\]",
    ),
    "a tensor": ({"tensors": {"table": "none"}}, "'none', but the artifact has no such plain ten"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_name_or_shape_that_the_artifact_has_not_is_refused(header, name):
    changes, message = MISFITS[name]
    one = {"models": (Model(bit_widths=WIDTHS, slots=(), data=b"m"),)} | changes
    with pytest.raises(HeaderError, match=message):
        graph(**one).check(header)


def test_a_signed_activation_of_one_bit_is_refused_by_name(header):
    weights = {"conv.weight": LayeredWeight((3, 2, 3, 3))}
    unpinned = dataclasses.replace(header, weights=weights)
    one = graph(
        models=(Model(bit_widths=WIDTHS, slots=(), data=b"m"),),
        tensors={},
        **quantizer(activation="signed"),
    )
    with pytest.raises(HeaderError, match=r"quantizer 'conv\.in' .* signed activation of 1 bit"):
        one.check(unpinned)


def test_a_quantizer_that_nobody_reads_has_no_width(header):
    one = graph(
        models=(Model(bit_widths=WIDTHS, slots=(), data=b"m"),),
        modules={"conv": CONV},
        quantizers={"x": Quantizer(activation="signed")},
    )
    with pytest.raises(HeaderError, match="no module reads quantizer 'x'"):
        one.check(header)


def with_output(path, widths):
    """Write an artifact in which what ``bn`` gives is rounded too."""
    step = TensorData("bn.output_quantizer.step", **float32([0.5]))
    layers = layer_contents()
    first = LayerContent(2, [*layers[0].tensors, *EXTRA, step])
    activations = content()["activations"] | {
        "bn.output_quantizer": Activation("unsigned", dict.fromkeys(widths, 8))
    }
    write_artifact(path, **content(layers=[first, *layers[1:]], activations=activations))
    return ArtifactReader(path).header


def test_what_a_module_gives_is_rounded_whether_or_not_a_weight_reads_it(tmp_path):
    header = with_output(tmp_path / "net", (2, 3, 8))
    output = {"bn.out": Quantizer(activation="bn.output_quantizer")}
    graph(quantizers={**graph().quantizers, **output}).check(header)


def test_an_output_has_a_width_at_each_bit_width_of_the_model(tmp_path):
    with pytest.raises(HeaderError, match=r"widths for \[2, 8\], but the model has \[2, 3, 8\]"):
        with_output(tmp_path / "net", (2, 8))
    assert not (tmp_path / "net").exists()
