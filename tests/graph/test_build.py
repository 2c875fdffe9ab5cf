"""A graph computes what the layered model does, at every bit-width, on integers."""

from collections import Counter

import onnx
import pytest
import torch
from graph.nets import SmallResNet, SmallTransformer, prepared
from graph.packed import IMAGES, NETS, Packed
from nets import ConvNet, ZooNet
from torch import nn

from plyweight.artifact import GRAPH_NAME, ArtifactReader, Graph
from plyweight.nn import bit_widths_of
from plyweight.packing import pack

SMALL_IMAGES = IMAGES[:, :, :8, :8].contiguous()
TOKENS = torch.randint(0, 12, (16, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("net", NETS)
def test_a_graph_computes_what_torch_does_and_no_convolution_in_float(net, packed_nets):
    packed = packed_nets(net)
    for bit_width in bit_widths_of(packed.model):
        # Edges round once more; an activation next to the middle of two levels becomes the other.
        assert packed.error(bit_width, IMAGES) < {8: 0.03, 4: 0.1}.get(bit_width, 0.3)
        operators = packed.operators()
        assert operators["Conv"] == operators["FusedConv"] == 0
        assert operators["MaxPool"] == 0  # NhwcMaxPool, of levels


def test_what_one_learned_quantizer_reads_alone_gets_no_other_grid(packed_nets):
    quantizers = packed_nets("SmallSqueezeNet").graph.quantizers
    own = {name for name, quantizer in quantizers.items() if quantizer.activation is None}
    # Two convolutions read what is squeezed, and a pooling the classes.
    assert own == {"fire1.squeeze:conv", "fire2.squeeze:conv", "classes:conv"}


def test_bit_widths_of_which_some_have_activations_of_8_bits_have_two_models(packed_nets):
    packed = packed_nets("SmallResNet")
    assert [model.bit_widths for model in packed.graph.models] == [(2, 3, 4), (8,)]
    clips = [
        Counter(n.op_type for n in onnx.load_from_string(m.data).graph.node)["Clip"]
        for m in packed.graph.models
    ]
    assert clips[0] > 0
    assert clips[1] == 0


def test_without_edges_only_biases_are_rounded_otherwise_than_in_torch(tmp_path):
    torch.manual_seed(0)
    packed = Packed(prepared(ConvNet(), SMALL_IMAGES, activations=8), SMALL_IMAGES, tmp_path)
    assert len(packed.graph.models) == 1
    for bit_width in bit_widths_of(packed.model):
        assert packed.error(bit_width, SMALL_IMAGES) < 0.005
    assert packed.operators()["QGemm"] == 1


@pytest.mark.parametrize("activations", ["match", 8, None])
def test_a_transformer(activations, tmp_path):
    torch.manual_seed(0)
    model = prepared(SmallTransformer(), TOKENS, (2, 4, 8), activations=activations)
    packed = Packed(model, TOKENS, tmp_path)
    tolerance = {"match": 0.2, 8: 0.02, None: 1e-4}[activations]
    for bit_width in bit_widths_of(model):
        assert packed.error(bit_width, TOKENS) < tolerance
    weights = {module.param for module in packed.graph.modules.values()}
    assert "embedding.weight" in weights
    assert "head.weight" not in weights  # it is tied to that of the embedding
    if activations == 8:
        assert packed.operators()["MatMulIntegerToFloat"] == 7


def test_pinned_modules_shared_ones_and_everything_else_of_a_zoo(tmp_path):
    torch.manual_seed(0)
    model = prepared(ZooNet(), SMALL_IMAGES, (2, 4, 8), pinned={"stem": 8, "head": 5})
    packed = Packed(model, SMALL_IMAGES, tmp_path)
    for bit_width in (2, 4, 8):
        assert packed.error(bit_width, SMALL_IMAGES) < 0.2
    operators = packed.operators()
    assert operators["Conv"] == operators["FusedConv"] == 0
    assert operators["QLinearConv"] == 5


def test_the_first_dimension_may_have_any_length(tmp_path):
    torch.manual_seed(0)
    packed = Packed(prepared(SmallResNet(), IMAGES), IMAGES[:1], tmp_path)
    for length in (1, 3, 32):
        assert packed.run(8, IMAGES[:length]).shape == (length, 5)
    assert packed.graph.inputs[0].shape == ("batch", 3, 16, 16)


def test_no_weight_is_in_the_models_and_none_twice(packed_nets):
    packed = packed_nets("SmallResNet")
    for model in packed.graph.models:
        initializers = onnx.load_from_string(model.data).graph.initializer
        inside = [t for t in initializers if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(len(t.SerializeToString()) for t in inside) < 500
        names = [t.name for t in initializers]
        assert len(set(names)) == len(names)
        outside = [t.name for t in initializers if t.data_location == onnx.TensorProto.EXTERNAL]
        assert tuple(outside) == model.slots


@pytest.mark.parametrize("bit_width", [2, 8])
def test_the_checker_passes_a_model_whose_slots_are_filled(bit_width, packed_nets):
    packed = packed_nets("SmallMobileNet")
    model = onnx.load_from_string(packed.graph.model_for(bit_width).data)
    for name, value in packed.slots(bit_width).items():
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        assert tuple(tensor.dims) == value.shape
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)


def test_the_same_model_and_examples_make_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    model = prepared(SmallResNet(), IMAGES)
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        pack(model, path, example_inputs=[IMAGES[:16], IMAGES[16:]])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"/site-packages/" not in packed_models(paths[0])  # nor any other path of a machine


def packed_models(path):
    graph = Graph.from_bytes(ArtifactReader(path).read_layer(0)[GRAPH_NAME].data)
    return b"".join(model.data for model in graph.models)


def test_batch_norms_that_nothing_precedes_stay_and_change_with_the_bit_width(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.plain = nn.BatchNorm2d(4, affine=False)
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, images):
            return self.linear(self.plain(self.conv(self.bn(images))).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = prepared(Net(), SMALL_IMAGES, (4, 8), activations=8)
    with torch.no_grad():
        model.bn.bias[0] += 1
    packed = Packed(model, SMALL_IMAGES, tmp_path)
    assert "bn.bias" in packed.graph.tensors.values()
    for bit_width in (4, 8):
        assert packed.error(bit_width, SMALL_IMAGES) < 0.03
