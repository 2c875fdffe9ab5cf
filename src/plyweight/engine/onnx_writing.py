"""ONNX tensors, written: parts of a message, so that what is large is not copied more than once."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.engine.onnx_model import (
    DTYPES,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_NAME,
    TENSOR_RAW,
)
from plyweight.engine.protobuf import Part, counted, integer_field, text_field

__all__ = ["tensor"]

NUMBERS = {name: number for number, name in DTYPES.items()}


def tensor(name: str, value: NDArray[Any]) -> list[Part]:
    """The parts of a ``TensorProto``."""
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return [
        *(integer_field(TENSOR_DIMS, length) for length in value.shape),
        integer_field(TENSOR_DTYPE, NUMBERS[value.dtype.name]),
        text_field(TENSOR_NAME, name),
        *counted(TENSOR_RAW, [little.reshape(-1).view(np.uint8).data]),
    ]
