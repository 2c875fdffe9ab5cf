"""Exported graphs: they load in their own runtimes and compute what the engine does."""

import hashlib
import json
import sys
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from graph.nets import SmallTransformer, prepared
from graph.packed import IMAGES, NETS, Packed
from safetensors.torch import load_file

import plyweight
from plyweight.errors import GraphError, LayeringError, OutputError
from plyweight.exporting import export
from plyweight.exporting import onnx as onnx_export
from plyweight.exporting import openvino as openvino_export

TOKENS = torch.randint(0, 12, (16, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """With the embedding tied to the head: activations quantized, or weights only."""

    def make(activations):
        torch.manual_seed(0)
        model = prepared(SmallTransformer(), TOKENS, (2, 4, 8), activations=activations)
        return Packed(model, TOKENS, tmp_path_factory.mktemp("transformer"))

    return {activations: make(activations) for activations in (8, None)}


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory):
    """The same with weights only, by size of groups: of 8 inputs, 16 are one group of a few."""

    def make(group_size):
        torch.manual_seed(0)
        options = {"activations": None, "group_size": group_size}
        model = prepared(SmallTransformer(), TOKENS, (2, 4, 8), **options)
        return Packed(model, TOKENS, tmp_path_factory.mktemp("weights_only"))

    return {group_size: make(group_size) for group_size in (None, 3, 16)}


def of_engine(path, bit_width, inputs):
    with plyweight.open(path, bit_width=bit_width) as engine:
        return engine.run({engine.inputs[0].name: inputs})[engine.outputs[0].name]


def of_file(path, inputs):
    """What stock ONNX Runtime makes of a file, with the setting that weight-only nets need."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def digests_of(model):
    return [
        hashlib.sha256(repr((t.data_type, tuple(t.dims))).encode() + t.raw_data).hexdigest()
        for t in model.graph.initializer
    ]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("bit_width", [2, 8])
def test_an_onnx_file_gives_the_engines_numbers(net, bit_width, packed_nets, tmp_path):
    packed, path = packed_nets(net), tmp_path / "net.onnx"
    report = export(packed.path, path, bit_width=bit_width, to="onnx")
    assert (report.path, report.format, report.bit_width) == (path, "onnx", bit_width)
    assert (report.num_bytes, report.difference) == (path.stat().st_size, 0.0)
    assert np.array_equal(of_file(path, IMAGES.numpy()), of_engine(packed.path, bit_width, IMAGES))


@pytest.mark.parametrize("activations", [8, None])
def test_tied_weights_are_in_the_file_once(activations, transformers, tmp_path):
    packed, path = transformers[activations], tmp_path / "net.onnx"
    report = export(packed.path, path, bit_width=4, to="onnx")
    found, expected = of_file(path, TOKENS.numpy()), of_engine(packed.path, 4, TOKENS)
    if activations:
        assert report.difference == 0
        assert np.array_equal(found, expected)
    else:  # sums of floats are rounded otherwise in nibbles
        assert report.difference < 1e-6
        assert np.abs(found - expected).max() < 1e-5 * expected.std()
    model = onnx.load(path)
    digests = digests_of(model)
    assert len(set(digests)) == len(digests)
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert (
        sum(len(t.raw_data) for t in weights if len(t.dims) == 2)
        == sum(int(np.prod(weight.shape)) for weight in packed.header.weights.values()) + 12 * 8
    )  # the head multiplies with it transposed


@pytest.mark.parametrize("bit_width", [2, 3, 4])
def test_half_bytes_give_the_same_numbers_on_integers(bit_width, packed_nets, tmp_path):
    packed, path, whole = packed_nets("SmallResNet"), tmp_path / "net.onnx", tmp_path / "whole.onnx"
    export(packed.path, path, bit_width=bit_width, to="onnx-int4")
    export(packed.path, whole, bit_width=bit_width, to="onnx")
    assert np.array_equal(of_file(path, IMAGES.numpy()), of_file(whole, IMAGES.numpy()))
    model, other = onnx.load(path), onnx.load(whole)
    codes = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT4]
    levels = [t for t in other.graph.initializer if t.name.endswith(".levels")]
    assert sum((len(t.raw_data) + 1) // 2 for t in levels) == sum(len(t.raw_data) for t in codes)
    assert not any(t.name.endswith(".levels") for t in model.graph.initializer)


@pytest.mark.parametrize("to", ["onnx", "onnx-int4", "openvino"])
@pytest.mark.parametrize("group_size", [None, 3, 16])
@pytest.mark.parametrize("bit_width", [2, 4])
def test_networks_of_weights_only_are_exported_and_read_back(
    to, group_size, bit_width, weights_only, tmp_path
):
    packed, path = weights_only[group_size], tmp_path / ("net.xml" if to == "openvino" else "net")
    report = export(packed.path, path, bit_width=bit_width, to=to)
    assert 0 <= report.difference < 1e-6
    expected = packed.expected(bit_width, TOKENS)
    if to == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        found = openvino.Core().compile_model(path, "CPU", settings)([TOKENS.numpy()])[0]
    else:
        found = of_file(path, TOKENS.numpy())
        onnx.checker.check_model(onnx.load(path), full_check=True)
    assert np.abs(found - expected).max() < 1e-5 * expected.std()


def test_half_bytes_of_weights_only_need_no_setting_and_are_the_engines_nibbles(
    weights_only, tmp_path
):
    """The operator says itself that activations stay floats."""
    packed, path = weights_only[None], tmp_path / "net.onnx"
    assert export(packed.path, path, bit_width=4, to="onnx-int4").difference == 0
    stock = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = stock.run(None, {stock.get_inputs()[0].name: TOKENS.numpy()})
    assert np.array_equal(found, of_engine(packed.path, 4, TOKENS))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulNBits") == 7
    assert "DequantizeLinear" not in kinds
    with pytest.raises(GraphError, match="no weight has 4 bits or fewer at 8 bits"):
        export(packed.path, tmp_path / "wide.onnx", bit_width=8, to="onnx-int4")


@pytest.mark.parametrize("group_size", [None, 3, 16])
def test_a_torch_program_and_a_state_dict_of_weights_only(group_size, weights_only, tmp_path):
    packed, path = weights_only[group_size], tmp_path / "net.pt2"
    options = {"model": SmallTransformer(), "example_inputs": TOKENS[:2]}
    assert export(packed.path, path, bit_width=4, to="torch", **options).difference == 0
    with torch.no_grad():
        found = torch.export.load(path).module()(TOKENS).numpy()
    expected = of_engine(packed.path, 4, TOKENS)
    assert np.abs(found - expected).max() < 1e-5 * expected.std()
    export(packed.path, tmp_path / "weights", bit_width=4)
    weights = load_file(tmp_path / "weights")
    loaded = plyweight.load(packed.path, SmallTransformer(), bit_width=4)
    assert torch.equal(weights["embedding.weight"], loaded.head.weight)


def test_pinned_weights_stay_bytes_and_only_bytes_are_refused(tmp_path):
    torch.manual_seed(0)
    model = prepared(NETS["SmallResNet"](), IMAGES, pinned={"conv1": 8})
    packed, path = Packed(model, IMAGES, tmp_path), tmp_path / "net.onnx"
    export(packed.path, path, bit_width=4, to="onnx-int4")
    names = {t.name for t in onnx.load(path).graph.initializer}
    assert {"conv1.levels", "linear.levels/codes"} <= names
    assert np.array_equal(of_file(path, IMAGES.numpy()), of_engine(packed.path, 4, IMAGES))
    with pytest.raises(GraphError, match="no weight has 4 bits or fewer at 8 bits"):
        export(packed.path, tmp_path / "wide.onnx", bit_width=8, to="onnx-int4")
    assert not (tmp_path / "wide.onnx").exists()


@pytest.mark.parametrize("bit_width", [2, 8])
def test_a_torch_program_equals_the_loaded_model(bit_width, packed_nets, tmp_path):
    packed, path, net = packed_nets("SmallResNet"), tmp_path / "net.pt2", NETS["SmallResNet"]()
    report = export(
        packed.path, path, bit_width=bit_width, to="torch", model=net, example_inputs=IMAGES[:1]
    )
    assert (report.format, report.difference) == ("torch", 0.0)
    program = torch.export.load(path).module()
    loaded = plyweight.load(packed.path, net, bit_width=bit_width)
    with torch.no_grad():
        assert torch.equal(program(IMAGES[:5]), loaded(IMAGES[:5]))


def test_a_torch_program_needs_a_network_and_inputs(packed_nets, tmp_path):
    packed, net = packed_nets("SmallResNet"), NETS["SmallResNet"]()
    for options in ({"model": net}, {"example_inputs": IMAGES}):
        with pytest.raises(LayeringError, match="give model= and example_inputs="):
            export(packed.path, tmp_path / "net.pt2", to="torch", **options)

    class Choosing(type(net)):
        def forward(self, images):
            return super().forward(images) if images.sum() > 0 else images

    with pytest.raises(LayeringError, match=r"Choosing cannot be traced by torch\.export"):
        export(
            packed.path, tmp_path / "net.pt2", to="torch", model=Choosing(), example_inputs=IMAGES
        )
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_checked_complete_and_says_what_it_is(packed_nets, tmp_path):
    packed, path = packed_nets("SmallResNet"), tmp_path / "net.onnx"
    export(packed.path, path, bit_width=3, to="onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    digests = digests_of(model)
    assert len(set(digests)) == len(digests)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["plyweight.artifact"] == packed.header.artifact_id
    assert said["plyweight.bit_width"] == "3"
    assert json.loads(said["plyweight.io"]) == packed.header.io
    again = tmp_path / "again.onnx"
    export(packed.path, again, bit_width=3, to="onnx")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("net", NETS)
def test_openvino_reads_its_files_and_is_close(net, packed_nets, tmp_path):
    packed, path = packed_nets(net), tmp_path / "net.xml"
    report = export(packed.path, path, bit_width=8, to="openvino")
    files = [path, tmp_path / "net.bin"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert report.num_bytes == sum(file.stat().st_size for file in files)
    compiled = openvino.Core().compile_model(path, "CPU")
    expected = of_engine(packed.path, 8, IMAGES)
    difference = np.abs(compiled([IMAGES.numpy()])[0] - expected).mean() / expected.std()
    assert difference < 0.1
    assert 0 <= report.difference < 0.1
    # Levels stay bytes: floats would take four times as much.
    levels = sum(int(np.prod(w.shape)) for w in packed.header.weights.values())
    assert levels <= files[1].stat().st_size < 4 * levels


def test_what_the_artifact_says_was_measured_is_reported(tmp_path):
    torch.manual_seed(0)
    model = prepared(NETS["SmallResNet"](), IMAGES)
    packed = Packed(model, IMAGES, tmp_path, evaluation={8: {"accuracy": "0.91"}})
    assert export(packed.path, tmp_path / "a.onnx", to="onnx").evaluation == {"accuracy": "0.91"}
    assert export(packed.path, tmp_path / "b.onnx", to="onnx", bit_width=2).evaluation == {}


@pytest.mark.parametrize(("to", "name"), [("onnx", "net.onnx"), ("openvino", "net.xml")])
def test_an_artifact_without_a_graph_says_how_to_get_one(to, name, tmp_path):
    plyweight.pack(prepared(NETS["SmallResNet"](), IMAGES), tmp_path / "net")
    with pytest.raises(GraphError, match=r"has no graph.*example_inputs"):
        export(tmp_path / "net", tmp_path / name, to=to)
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize(("to", "name"), [("onnx", "net.onnx"), ("openvino", "net.xml")])
def test_what_computes_something_else_is_not_written(to, name, packed_nets, tmp_path):
    filled = onnx_export.Filled.answers

    def wrong(self):
        return [(feeds, [3 * y + 1 for y in outputs]) for feeds, outputs in filled(self)]

    with (
        mock.patch.object(onnx_export.Filled, "answers", wrong),
        pytest.raises(GraphError, match="computes something else"),
    ):
        export(packed_nets("SmallResNet").path, tmp_path / name, to=to)
    assert list(tmp_path.iterdir()) == []


def test_openvinos_name_ends_in_xml(packed_nets, tmp_path):
    with pytest.raises(LayeringError, match=r"ends in \.xml.*net\.bin"):
        export(packed_nets("SmallResNet").path, tmp_path / "net.onnx", to="openvino")


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_folder_that_is_not_there_is_said(to, packed_nets, tmp_path):
    with pytest.raises(OutputError, match="create it first"):
        export(packed_nets("SmallResNet").path, tmp_path / "nowhere" / "net.xml", to=to)


def test_a_model_too_large_for_one_file_is_said_before_it_is_made(packed_nets, tmp_path):
    with (
        mock.patch.object(onnx_export, "MAX_BYTES", 100),
        pytest.raises(GraphError, match="an ONNX file holds 100"),
    ):
        export(packed_nets("SmallResNet").path, tmp_path / "net.onnx", to="onnx")


@pytest.mark.parametrize(
    ("to", "module", "extra"), [("onnx", "onnx", "export"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_is_named_with_its_extra(to, module, extra, packed_nets, tmp_path):
    with (
        mock.patch.dict(sys.modules, {module: None}),
        pytest.raises(ImportError, match=rf"plyweight\[{extra}\]"),
    ):
        export(packed_nets("SmallResNet").path, tmp_path / "net.xml", to=to)


def test_no_other_network_is_within_the_bound_that_openvino_has(packed_nets):
    outputs = [of_engine(packed_nets(net).path, 8, IMAGES) for net in NETS]
    for one in outputs:
        for other in outputs:
            if one is not other:
                difference = onnx_export.mean_difference([one], [other])
                assert difference > openvino_export.MOST_DIFFERENCE


def test_a_nan_is_a_difference():
    nan, numbers = np.full((2, 3), np.nan), np.arange(6.0).reshape(2, 3)
    assert np.isnan(onnx_export.mean_difference([nan, numbers], [numbers, numbers]))


def test_the_artifact_itself_is_not_written_over(tmp_path):
    torch.manual_seed(0)
    packed = Packed(prepared(NETS["SmallResNet"](), IMAGES), IMAGES, tmp_path)
    source = packed.path.rename(tmp_path / "net.bin")
    content = source.read_bytes()
    for to, path in (("openvino", tmp_path / "net.xml"), ("onnx", source)):
        with pytest.raises(OutputError, match=r"net\.bin is the artifact itself"):
            export(source, path, to=to)
    assert source.read_bytes() == content


def test_what_a_format_does_not_take_is_refused(packed_nets, tmp_path):
    with pytest.raises(LayeringError, match="are for 'torch', not 'onnx'"):
        export(packed_nets("SmallResNet").path, tmp_path / "a", to="onnx", example_inputs=IMAGES)
