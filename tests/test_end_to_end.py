"""Real digits: train once, ship one file, start from its narrowest prefix, step up and down."""

import pytest
import torch
from nets import ALL_BIT_WIDTHS
from torch.nn import functional as F

import plyweight
from plyweight.artifact import ByteRange, MemorySource
from plyweight.demo import Digits, DigitsNet


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return Digits.load()


def train(digits):
    torch.manual_seed(0)
    model = plyweight.prepare(
        DigitsNet(), ALL_BIT_WIDTHS, activations={b: max(b, 4) for b in ALL_BIT_WIDTHS}
    )
    objective = plyweight.JointObjective(model, F.cross_entropy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    batches = list(digits.batches(64, torch.Generator().manual_seed(0)))
    for images, labels in batches:
        objective.backward(images, labels)
        optimizer.step()
        optimizer.zero_grad()
    plyweight.recalibrate(model, batches)
    return model.eval()


def logits(model, images):
    with torch.no_grad():
        return model(images)


def test_from_training_to_a_device_that_upgrades_step_by_step_the_logits_stay_equal(
    digits, tmp_path
):
    model = train(digits)
    path = tmp_path / "digits.layered.safetensors"
    receipt = plyweight.pack(model, path, license="Apache-2.0")
    assert receipt.held == ALL_BIT_WIDTHS
    data = path.read_bytes()
    images, labels = digits.test_images[:100], digits.test_labels[:100]

    trained = {}
    for bit_width in plyweight.bit_widths_of(model):
        with plyweight.at_bit_width(model, bit_width):
            trained[bit_width] = logits(model, images)
    # One epoch, far above the 10 % of guessing: equal logits of an untrained net would say less.
    assert (trained[8].argmax(dim=1) == labels).float().mean() > 0.5

    stops = {layer.bit_width: layer.total_bytes for layer in receipt.layers}
    net = plyweight.load(MemorySource(data[: stops[1]]), DigitsNet())
    assert torch.equal(logits(net, images), trained[1])
    for bit_width in ALL_BIT_WIDTHS[1:]:
        source = MemorySource(data[: stops[bit_width]])
        plyweight.upgrade(net, source)
        assert source.reads[-1] == ByteRange(stops[bit_width - 1], stops[bit_width])
        assert sum(read.num_bytes for read in source.reads) == (
            receipt.header_bytes + stops[bit_width] - stops[bit_width - 1]
        )
        for held in ALL_BIT_WIDTHS[:bit_width]:
            plyweight.set_bit_width(net, held)
            assert torch.equal(logits(net, images), trained[held])
        plyweight.set_bit_width(net, bit_width)
    for bit_width in reversed(ALL_BIT_WIDTHS[:-1]):
        plyweight.downgrade(net, bit_width)
        assert torch.equal(logits(net, images), trained[bit_width])
