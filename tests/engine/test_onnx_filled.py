"""A model with its slots filled is what onnx would have made of it; nothing else changes."""

import numpy as np
import onnx
import pytest
from engine.handmade import residual_model
from onnx import TensorProto, helper, numpy_helper

from plyweight.engine.onnx_filled import filled
from plyweight.engine.onnx_model import DTYPES, external_initializers


@pytest.mark.parametrize("is_clipped", [False, True])
def test_every_slot_has_its_value_and_all_else_is_as_before(is_clipped):
    data, _ = residual_model(is_clipped=is_clipped)
    rng = np.random.default_rng(0)
    declared = external_initializers(data)
    values = {n: rng.integers(0, 100, d.shape).astype(d.dtype) for n, d in declared.items()}
    found = filled(data, values)
    assert external_initializers(found) == {}
    model, before = onnx.ModelProto.FromString(found), onnx.ModelProto.FromString(data)
    onnx.checker.check_model(model, full_check=True)
    assert [t.name for t in model.graph.initializer] == [t.name for t in before.graph.initializer]
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        assert (array.dtype, array.shape) == (
            values[tensor.name].dtype,
            declared[tensor.name].shape,
        )
        np.testing.assert_array_equal(array, values[tensor.name])
    del model.graph.initializer[:], before.graph.initializer[:]
    assert model == before


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (200, 2)])
def test_values_of_any_dtype_and_shape_come_back_and_those_in_the_model_stay(dtype, shape):
    number = {name: number for number, name in DTYPES.items()}[dtype]
    slot = TensorProto(name="w", data_type=number, dims=shape, data_location=TensorProto.EXTERNAL)
    slot.external_data.add(key="location", value="slots")
    here = numpy_helper.from_array(np.arange(5), "here")
    data = helper.make_model(helper.make_graph([], "g", [], [], [here, slot])).SerializeToString()
    value = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    first, second = onnx.ModelProto.FromString(filled(data, {"w": value})).graph.initializer
    assert first == here
    found = numpy_helper.to_array(second)
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


def test_a_value_that_is_no_contiguous_array_is_written_in_its_own_order():
    slot = TensorProto(name="w", data_type=TensorProto.INT32, dims=(3, 2))
    slot.external_data.add(key="location", value="slots")
    data = helper.make_model(helper.make_graph([], "g", [], [], [slot])).SerializeToString()
    value = np.arange(6, dtype=np.int32).reshape(2, 3).T
    (tensor,) = onnx.ModelProto.FromString(filled(data, {"w": value})).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), value)
