"""Products of 4-bit codes are the weight, and ONNX Runtime multiplies with them as it should."""

import itertools

import numpy as np
import onnxruntime
import pytest
from engine import reference
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from plyweight.codec import decode, spread
from plyweight.engine.nibbles import BLOCK_SIZES, block_size_of, nibbles_of, sums_of_groups
from plyweight.engine.values import DecodedWeight

WIDTHS = range(1, 9)
GROUPS = (None, 16, 32, 64, 128, 256, 512, 48, 80)
UNIT = 2.0**-24  # of rounding to float32


def weight_of(shape, bit_width, group_size, seed=0):
    """A weight with all levels that the bit-width has, some of them negated."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bit_width, shape, dtype=np.uint8)
    levels = decode(codes, bit_width) * np.where(rng.random((shape[0], 1)) < 0.3, -1, 1)
    scale_shape = shape[:1] if group_size is None else (shape[0], -(-shape[1] // group_size))
    scale = rng.uniform(1e-4, 1e-2, scale_shape).astype(np.float32)
    return DecodedWeight(levels.astype(np.int8), scale, bit_width, group_size)


def exact(weight):
    """In float64, ``(out, in)``."""
    scale = spread(weight.scale.astype(np.float64), weight.levels.shape, weight.group_size)
    return weight.levels * scale


def arguments(nibbles, product):
    return {
        "K": nibbles.num_inputs,
        "N": len(product.codes),
        "bits": 4,
        "block_size": nibbles.block_size,
        "accuracy_level": 1,
    }


@given(
    out=st.sampled_from([1, 3, 10, 17]),
    num_inputs=st.integers(1, 70),
    bit_width=st.sampled_from(WIDTHS),
    group_size=st.sampled_from(GROUPS),
    seed=st.integers(0, 99),
)
def test_the_products_and_the_half_cell_are_the_weight(
    out, num_inputs, bit_width, group_size, seed
):
    weight = weight_of((out, num_inputs), bit_width, group_size, seed)
    nibbles = nibbles_of(weight)
    eye = np.eye(num_inputs)
    found = np.zeros((out, num_inputs))
    for product in nibbles.products:
        found += reference.mat_mul_n_bits(
            eye, product.codes, product.scale, **arguments(nibbles, product)
        ).T
    if nibbles.half is not None:
        sums = sums_of_groups(num_inputs, nibbles.group_size)
        found += (eye @ sums @ nibbles.half.astype(np.float64)).T
    np.testing.assert_allclose(found, exact(weight), rtol=1e-14, atol=0)
    assert len(nibbles.products) == (1 if bit_width <= 4 else 2)
    assert (nibbles.half is not None) == (bit_width >= 4)


def test_a_group_is_blocks_and_a_channel_has_as_few_bytes_as_can_be():
    assert [block_size_of(512, group) for group in (16, 32, 64, 128, 256, 512)] == [
        *BLOCK_SIZES,
        256,
    ]
    assert [block_size_of(512, group) for group in (48, 80, 96)] == [16, 16, 32]
    assert [block_size_of(512, group) for group in (1, 3, 8, 24, 100)] == [None] * 5
    assert block_size_of(2048, None) == 256
    assert block_size_of(257, None) == 32  # 9 blocks of 20 bytes; 2 of 132 would be more
    assert block_size_of(3, None) == 16


def session(nibbles, out):
    """Of MatMulNBits alone, one for each product."""
    nodes, slots = [], {}
    for number, product in enumerate(nibbles.products):
        names = {f"codes{number}": product.codes, f"scale{number}": product.scale}
        slots |= names
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", *names],
                [f"y{number}"],
                domain="com.microsoft",
                **arguments(nibbles, product),
            )
        )
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", length])
        for name, length in [("x", nibbles.num_inputs)]
        + [(f"y{number}", out) for number in range(len(nodes))]
    ]
    tensors = [
        helper.make_tensor(
            name,
            helper.np_dtype_to_tensor_dtype(value.dtype),
            value.shape,
            value.tobytes(),
            raw=True,
        )
        for name, value in slots.items()
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("group_size", [None, 16, 48, 128])
@pytest.mark.parametrize("num_inputs", [1, 15, 16, 17, 100, 130, 512, 515])
def test_the_runtime_multiplies_floats_with_them(num_inputs, group_size):
    """Each sum of float32 is off by no more than its roundings: one for every product and sum."""
    rng = np.random.default_rng(num_inputs)
    for out, bit_width in itertools.product((1, 3, 10, 17), (3, 4, 8)):
        weight = weight_of((out, num_inputs), bit_width, group_size)
        nibbles = nibbles_of(weight)
        run = session(nibbles, out)
        for batch in (1, 2, 5, 33):
            x = rng.normal(size=(batch, num_inputs)).astype(np.float32)
            for product, found in zip(nibbles.products, run.run(None, {"x": x}), strict=True):
                parts = product.codes, product.scale
                expected = reference.mat_mul_n_bits(x, *parts, **arguments(nibbles, product))
                # The kernel may multiply codes, of 15 at most, and zero points apart.
                spread_x = np.add.reduceat(np.abs(x), starts(nibbles), axis=1)
                most = 15 * spread_x.astype(float) @ product.scale.T
                assert (np.abs(found - expected) <= (num_inputs + 8) * UNIT * most).all()


def starts(nibbles):
    """Where the blocks begin."""
    return np.arange(0, nibbles.num_inputs, nibbles.block_size)
