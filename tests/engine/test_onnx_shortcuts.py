"""A shortcut as a convolution gives the bytes of Slice and Pad; what is none is left alone."""

import platform
from collections import Counter

import numpy as np
import onnx
import pytest
from engine.running import run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from plyweight.engine.onnx_constants import MOST_INTEGERS, integers_of
from plyweight.engine.onnx_nodes import OnnxModel
from plyweight.engine.onnx_requantized import MACHINES, requantized
from plyweight.engine.onnx_shortcuts import MOST_CHANNELS, shortcuts

pytestmark = pytest.mark.skipif(
    platform.machine() not in MACHINES, reason="nothing is replaced on this kind of machine"
)
SIDE = 16
END = 2**63 - 1


def initializer(name, numbers):
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def spelled_out(name, numbers):
    return helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)


def constant_tensor(name, numbers):
    return helper.make_node("Constant", [], [name], value=initializer("", numbers))


def constant_list(name, numbers):
    return helper.make_node("Constant", [], [name], value_ints=numbers)


WAYS = (initializer, spelled_out, constant_tensor, constant_list)


class Model:
    """Levels 0 to 255 in every channel, of which a shortcut is an output beside them.

    ``slices`` are starts, ends, axes and steps; ``pads`` the eight numbers of a Pad.
    """

    def __init__(
        self,
        *,
        zero_point=0,
        channels=2,
        slices=(([0], [END], [2], [2]), ([0], [END], [3], [2])),
        pads=(0, 1, 0, 0, 0, 2, 0, 0),
        mode="constant",
        way=initializer,
        outputs=("source", "y"),
        constant="zero",
        weight="values",
    ):
        self.values = {
            "step": np.float32(1),
            "zero": np.uint8(zero_point),
            "other": np.uint8(zero_point),
            "levels": np.eye(channels, dtype=np.int8)[:, :, None, None],
            "scale": np.float32(1),
            "floats": np.eye(channels, dtype=np.float32)[:, :, None, None],
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["x.q"]),
            helper.make_node("DequantizeLinear", ["x.q", "step", "zero"], ["x.y"]),
            helper.make_node("DequantizeLinear", ["levels", "scale"], ["values"]),
            helper.make_node("Conv", ["x.y", weight], ["sums"]),
            helper.make_node("QuantizeLinear", ["sums", "step", "zero"], ["source"]),
        ]
        constants, last = [], "source"
        for number, lists in enumerate(slices):
            names = [f"s{number}.{which}" for which in range(len(lists))]
            constants += [way(*pair) for pair in zip(names, lists, strict=True)]
            nodes.append(helper.make_node("Slice", [last, *names], [f"s{number}"]))
            last = f"s{number}"
        constants.append(way("pads", pads))
        nodes.append(helper.make_node("Pad", [last, "pads", constant], ["y"], mode=mode))
        inline = [numpy_helper.from_array(np.uint8(zero_point), "inline")]
        inline += [c for c in constants if isinstance(c, TensorProto)]
        nodes[:0] = [c for c in constants if not isinstance(c, TensorProto)]
        for name, value in self.values.items():
            dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
            slot = TensorProto(name=name, data_type=dtype, dims=value.shape)
            slot.data_location = TensorProto.EXTERNAL
            slot.external_data.add(key="location", value="slots")
            inline.append(slot)
        shape = ["n", channels, SIDE, SIDE]
        ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in outputs]
        graph = helper.make_graph(nodes, "g", ports, ends, inline)
        self.data = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
        ).SerializeToString()
        order = np.random.default_rng(0).permuted(np.tile(np.arange(256), (channels, 1)), axis=1)
        self.x = (order.reshape(1, channels, SIDE, SIDE) - float(zero_point)).astype(np.float32)

    def changed(self):
        return requantized(OnnxModel(self.data), {n: np.asarray(v) for n, v in self.values.items()})


def operators(data):
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


@settings(max_examples=40, deadline=None)
@given(
    zero_point=st.integers(0, 255),
    channels=st.integers(2, 20),
    rows=st.integers(1, 3),
    columns=st.integers(1, 5),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
    way=st.sampled_from(WAYS),
)
def test_every_level_of_every_channel_stays(
    zero_point, channels, rows, columns, before, after, way
):
    model = Model(
        zero_point=zero_point,
        channels=channels,
        slices=(([0], [END], [2], [rows]), ([0], [END], [3], [columns])),
        pads=(0, before, 0, 0, 0, after, 0, 0),
        way=way,
    )
    data, values = model.changed()
    assert not {"Slice", "Pad"} & operators(data).keys()
    source, found = run(data, values, {"x": model.x})
    assert set(source.reshape(-1)) == set(range(256))
    wanted = np.full((1, before + channels + after, *found.shape[2:]), zero_point, np.uint8)
    wanted[:, before : before + channels] = source[:, :, ::rows, ::columns]
    assert np.array_equal(found, wanted)
    assert np.array_equal(found, run(model.data, model.values, {"x": model.x})[1])


@pytest.mark.parametrize(
    "slices",
    [
        (([0, 0], [END, 2**31 - 1], [2, 3], [2, 3]),),
        (([0], [END], [2], [2]), ([0], [END], [2], [2])),
        (([0], [END], [0]), ([0], [END], [3], [2])),
    ],
    ids=["both at once", "the same axis twice", "one that leaves all, without steps"],
)
def test_slices_are_taken_together_however_they_are_split(slices):
    model = Model(slices=slices, zero_point=7)
    data, values = model.changed()
    assert operators(data)["QLinearConv"] == 1
    assert "Slice" not in operators(data)
    wanted = run(model.data, model.values, {"x": model.x})
    assert all(map(np.array_equal, run(data, values, {"x": model.x}), wanted))


@pytest.mark.parametrize(
    "different",
    [
        {"mode": "reflect", "slices": (([0], [END], [2], [2]),), "pads": [0, 1] + 6 * [0]},
        {"pads": (0, 1, 1, 0, 0, 0, 0, 0)},
        {"pads": (0, -1, 0, 0, 0, 2, 0, 0)},
        {"slices": (([1], [END], [2], [2]),)},
        {"slices": (([0], [5], [2], [2]),)},
        {"slices": (([0], [END], [1], [2]),)},
        {"slices": (([0], [END], [-1], [2]),)},
        {"slices": ()},
        {"outputs": ("source", "s0", "y")},
        {"constant": "inline"},
        {"channels": MOST_CHANNELS + 1},
        {"channels": 1},
        {"weight": "floats"},
    ],
    ids=[
        "reflected channels",
        "a border of pixels",
        "channels that are cut off",
        "a later start",
        "an end",
        "every second channel",
        "an axis from the end",
        "nothing left out",
        "read on the way",
        "a constant of its own",
        "many channels",
        "one channel, which may be all",
        "channels that no weight of integers tells",
    ],
)
def test_what_is_no_shortcut_is_left_alone(different):
    model = Model(**different)
    data, _ = model.changed()
    assert operators(data) == operators(model.data)


def test_shortcuts_share_their_ones_and_zeros():
    (found,) = shortcuts(OnnxModel(Model().data))
    assert sorted(found.values) == ["shortcut/one", "shortcut/zero", "y/ones"]
    assert found.values["y/ones"][:, :, 0, 0].tolist() == [[0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("write", [initializer, spelled_out])
@pytest.mark.parametrize("numbers", [[], [-1, 2**62], list(range(MOST_INTEGERS))])
def test_integers_are_read_as_onnx_writes_them(write, numbers):
    data = write("n", numbers).SerializeToString()
    assert integers_of(memoryview(data)) == tuple(numbers)


@pytest.mark.parametrize(
    "tensor",
    [
        initializer("n", range(MOST_INTEGERS + 1)),
        spelled_out("n", list(range(MOST_INTEGERS + 1))),
        initializer("n", [[1, 2]]),
        initializer("n", 1),
        numpy_helper.from_array(np.array([1, 2], np.int32)),
        TensorProto(data_type=TensorProto.INT64, dims=[1], raw_data=b"1234567"),
        TensorProto(data_type=TensorProto.INT64, dims=[2], int64_data=[1]),
    ],
    ids=["long", "long, spelled out", "a matrix", "a number", "int32", "a cut one", "too few"],
)
def test_what_is_no_short_list_of_integers_is_not_read(tensor):
    assert integers_of(memoryview(tensor.SerializeToString())) is None
