"""From a trained torch model to an engine: what is packed answers as the reference says."""

import numpy as np
import pytest
import torch
from engine import reference
from graph.nets import PaddedResNet, SmallMobileNet, SmallResNet, prepared

import plyweight
from plyweight.artifact import GRAPH_NAME, ArtifactReader, Graph
from plyweight.engine.values import SlotValues
from plyweight.nn import at_bit_width

IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
NETS = (SmallResNet, PaddedResNet, SmallMobileNet)


@pytest.mark.parametrize("net", NETS)
def test_a_packed_model_answers_as_the_reference_says_and_nearly_as_torch_does(net, tmp_path):
    torch.manual_seed(0)
    model = prepared(net(), IMAGES)
    plyweight.pack(model, tmp_path / "net", example_inputs=IMAGES)
    reader = ArtifactReader(tmp_path / "net")
    layers = [reader.read_layer(i) for i in range(len(reader.held_bit_widths))]
    graph = Graph.from_bytes(layers[0][GRAPH_NAME].data)
    (port,), (output,) = graph.inputs, graph.outputs
    feeds = {port.name: IMAGES.numpy()}
    with plyweight.open(tmp_path / "net", threads=1) as engine:
        for bit_width in engine.bit_widths:
            engine.set_bit_width(bit_width)
            found = engine.run(feeds)[output.name]
            slots = SlotValues(reader.header, graph, layers, bit_width).all()
            expected = reference.run(graph.model_for(bit_width).data, slots, feeds)[output.name]
            np.testing.assert_array_equal(found, expected)
            with torch.no_grad(), at_bit_width(model, bit_width):
                logits = model(IMAGES).numpy()
            assert np.abs(found - logits).mean() < 0.3 * logits.std()
