"""What a bit-width has of its own."""

from nets import ConvNet, ZooNet

from plyweight.nn import prepare
from plyweight.nn.rows import row_parameters

WIDTHS = (2, 4, 8)


def rows_by_name(model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(row.parameter)]: row.bit_widths for row in row_parameters(model)}


def test_gains_steps_offsets_and_batch_norms_have_a_row_for_each_bit_width():
    rows = rows_by_name(prepare(ConvNet(), WIDTHS))
    endings = ("gain", "input_quantizer.clip", "input_quantizer.offset")
    quantizers = {n for n in rows if n.endswith(endings)}
    assert set(rows) - quantizers == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    assert len(quantizers) == 3 * 3
    assert set(rows.values()) == {WIDTHS}


def test_a_pinned_module_has_fewer_rows_each_named_by_the_widest_that_takes_it():
    rows = rows_by_name(prepare(ConvNet(), WIDTHS, pinned={"conv1": 8, "conv2": 4}))
    assert rows["conv1.weight_quantizer.gain"] == (8,)
    assert rows["conv2.weight_quantizer.gain"] == (4, 8)
    assert rows["fc.weight_quantizer.gain"] == WIDTHS


def test_a_bias_has_rows_once_it_was_given_them():
    model = prepare(ConvNet(), WIDTHS, pinned={"conv2": 8})
    assert "conv2.bias" not in rows_by_name(model)
    model.conv2.give_bias_rows()
    assert rows_by_name(model)["conv2.bias"] == WIDTHS  # the inputs still change


def test_tied_weights_are_counted_once():
    model = prepare(ZooNet(), WIDTHS)
    gain = model.head.weight_quantizer.gain
    assert gain is model.embedding.weight_quantizer.gain
    assert sum(row.parameter is gain for row in row_parameters(model)) == 1
