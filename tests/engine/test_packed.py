"""From a trained torch model to an engine: what is packed answers as the reference says."""

import numpy as np
import pytest
from engine import reference
from graph.packed import IMAGES

import plyweight


@pytest.mark.parametrize("net", ["SmallResNet", "PaddedResNet", "SmallMobileNet"])
def test_a_packed_model_answers_as_the_reference_says_and_nearly_as_torch_does(net, packed_nets):
    packed = packed_nets(net)
    (port,), (output,) = packed.graph.inputs, packed.graph.outputs
    feeds = {port.name: IMAGES.numpy()}
    with plyweight.open(packed.path, threads=1) as engine:
        for bit_width in engine.bit_widths:
            engine.set_bit_width(bit_width)
            found = engine.run(feeds)[output.name]
            data, slots = packed.graph.model_for(bit_width).data, packed.slots(bit_width)
            expected = reference.run(data, slots, feeds)[output.name]
            np.testing.assert_array_equal(found, expected)
            logits = packed.expected(bit_width, IMAGES)
            assert np.abs(found - logits).mean() < 0.3 * logits.std()
