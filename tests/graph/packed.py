"""Artifacts with a graph, and ONNX Runtime on them."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import torch
from graph.nets import PaddedResNet, SmallMobileNet, SmallResNet, SmallSqueezeNet, prepared

from plyweight.artifact import GRAPH_NAME, ArtifactReader, Graph
from plyweight.engine.values import SlotValues
from plyweight.nn import at_bit_width
from plyweight.packing import pack

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
NETS = {net.__name__: net for net in (SmallResNet, PaddedResNet, SmallMobileNet, SmallSqueezeNet)}


class Packed:
    """An artifact with a graph, and ONNX Runtime on it."""

    def __init__(self, model, inputs, folder, **options):
        self.path, self.model = folder / "packed", model
        pack(model, self.path, example_inputs=inputs, **options)
        reader = ArtifactReader(self.path)
        self.header = reader.header
        self.layers = [reader.read_layer(i) for i in range(len(reader.header.layers))]
        self.graph = Graph.from_bytes(self.layers[0][GRAPH_NAME].data)
        self.optimized = folder / "optimized.onnx"

    def slots(self, bit_width):
        return SlotValues(self.header, self.graph, self.layers, bit_width).all()

    def run(self, bit_width, *inputs):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(self.optimized)
        # Otherwise products of weight-only modules round their activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        slots = self.slots(bit_width)
        options.add_external_initializers(
            list(slots), [onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in slots.values()]
        )
        session = onnxruntime.InferenceSession(
            self.graph.model_for(bit_width).data, options, providers=["CPUExecutionProvider"]
        )
        feeds = {p.name: x.numpy() for p, x in zip(self.graph.inputs, inputs, strict=True)}
        return session.run(None, feeds)[0]

    def operators(self):
        """How often each operator is in the graph that ONNX Runtime made of the last one."""
        model = onnx.load(self.optimized, load_external_data=False)
        return Counter(node.op_type for node in model.graph.node)

    def expected(self, bit_width, *inputs):
        with torch.no_grad(), at_bit_width(self.model, bit_width):
            return self.model(*inputs).numpy()

    def error(self, bit_width, *inputs):
        """The mean difference, in parts of the outputs' own spread."""
        expected = self.expected(bit_width, *inputs)
        return float(np.abs(self.run(bit_width, *inputs) - expected).mean() / expected.std())


def packed_in(folder, name):
    """One of the networks above, packed in a folder of its own."""
    torch.manual_seed(0)
    return Packed(prepared(NETS[name](), IMAGES), IMAGES, folder)
