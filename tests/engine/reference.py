"""The definition that a runtime's integer kernels must equal: a graph, interpreted with numpy.

What stands between a quantizer and the next one is one step here, as it is one fused kernel there:

    convolution, product     clamp(rint(float32(sums + bias) * (x_step * scale / y_step)) + z)
    addition                 clamp(rint(fma(a, a_step / y_step, fma(b, b_step / y_step, c))))
                             c = z - (a_step / y_step * a_zero + b_step / y_step * b_zero)

with sums in integers and all else in float32, halves to even. Sources: MlasRequantizeOutput,
MlasQLinearAddKernelAvx2Helper in onnxruntime/core/mlas/lib. (The kernel for additions on Arm
multiplies in fixed point, and may differ from this by one where a half is rounded.)

Products of floats are computed in float64, which a runtime's float32 is compared with by a bound.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view

F32 = np.float32


@dataclass
class Grid:
    """A dequantized tensor: ``step * (levels - zero_point)``, step and zero point per channel."""

    levels: Any
    step: Any
    zero_point: Any
    axis: int = 1

    def numpy(self):
        step, zero_point = (_along(value, self.levels.ndim, self.axis) for value in self._grid())
        return (self.levels.astype(F32) - F32(zero_point)) * step

    def centred(self):
        return self.levels.astype(np.int64) - int(np.max(self.zero_point))

    def _grid(self):
        return self.step, self.zero_point


@dataclass
class Sums:
    """Sums of products with their bias, in units of ``x_step * scale``, channels on axis 1."""

    sums: Any
    x_step: Any
    scale: Any
    is_rectified: bool = False

    def quantized(self, step, zero_point):
        assert not self.is_rectified or zero_point == 0  # where the clamp is the ReLU
        factor = _along(self.x_step * self.scale / step, self.sums.ndim, 1)
        return _clamped(np.rint(self.sums.astype(F32) * factor), zero_point)

    def numpy(self):
        return self.sums.astype(F32) * _along(self.x_step * self.scale, self.sums.ndim, 1)


@dataclass
class Addition:
    """Two grids to add."""

    a: Grid
    b: Grid
    is_rectified: bool = False

    def quantized(self, step, zero_point):
        assert not self.is_rectified or zero_point == 0
        ratio_a, ratio_b = self.a.step / step, self.b.step / step
        fixed = F32(zero_point) - (
            ratio_a * F32(self.a.zero_point) + ratio_b * F32(self.b.zero_point)
        )
        inner = _fma(self.b.levels, ratio_b, fixed)
        return np.rint(_fma(self.a.levels, ratio_a, inner)).clip(0, 255).astype(np.uint8)


def run(model_bytes, slots, inputs):
    """The outputs of an ONNX model by name, its slots filled with ``slots``."""
    graph = onnx.load_from_string(model_bytes).graph
    here = [t for t in graph.initializer if t.name not in slots]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in here} | dict(slots) | dict(inputs)
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        arguments = [values[name] if name else None for name in node.input]
        (output,) = node.output
        values[output] = OPERATORS[node.op_type](*arguments, **attributes)
    return {output.name: _float(values[output.name]) for output in graph.output}


def quantize_linear(x, step, zero_point):
    if isinstance(x, (Sums, Addition)):
        return x.quantized(step, zero_point)
    return _clamped(np.rint(_float(x) / step), zero_point)


def dequantize_linear(levels, step, zero_point=None, axis=1, block_size=0):
    if block_size:
        spread = np.repeat(step, block_size, axis)
        return levels * spread[tuple(slice(length) for length in levels.shape)]
    return Grid(levels, step, F32(0) if zero_point is None else zero_point, axis)


def mat_mul_n_bits(x, codes, scale, *, K, N, bits, block_size, accuracy_level):
    """The definition of com.microsoft.MatMulNBits, a weight at a time."""
    assert (bits, accuracy_level) == (4, 1)
    weight = np.zeros((N, K))
    for n in range(N):
        for k in range(K):
            pair = int(codes[n].reshape(-1)[k // 2])  # the lower half comes first
            code = pair >> 4 * (k % 2) & 15
            weight[n, k] = np.float64(scale[n, k // block_size]) * (code - 8)
    return x @ weight.T


def clip(x, lowest=None, highest=None):
    return x if highest is None else np.minimum(x, highest)


def conv(x, weight, bias=None, pads=(0, 0, 0, 0), strides=(1, 1), dilations=(1, 1), group=1, **_):
    levels = np.pad(x.centred(), ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    kernels = weight.levels.astype(np.int64)
    out, _, *size = kernels.shape
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilations, strict=True)]
    windows = sliding_window_view(levels, reach, (2, 3))[:, :, :: strides[0], :: strides[1]]
    windows = windows[..., :: dilations[0], :: dilations[1]]
    parts = [
        np.einsum("nchwij,ocij->nohw", part, kernel)
        for part, kernel in zip(
            np.split(windows, group, axis=1), np.split(kernels, group), strict=True
        )
    ]
    sums = np.concatenate(parts, axis=1)
    if bias is not None:
        sums = sums + bias.levels.reshape(1, out, 1, 1)
    return Sums(sums, x.step, weight.step)


def gemm(x, weight, bias=None, transB=0, **_):
    if not isinstance(x, Grid):
        kernel = _float(weight).astype(np.float64)
        return x @ (kernel.T if transB else kernel) + (0 if bias is None else bias)
    kernel = weight.levels.astype(np.int64)
    sums = x.centred() @ (kernel.T if transB else kernel)
    return Sums(sums + (0 if bias is None else bias.levels), x.step, weight.step)


def add(a, b):
    return Addition(a, b) if isinstance(a, Grid) and isinstance(b, Grid) else _float(a) + _float(b)


def relu(x):
    if isinstance(x, (Sums, Addition)):
        x.is_rectified = True
        return x
    return np.maximum(_float(x), 0)


def max_pool(x, kernel_shape, pads=(0, 0, 0, 0), strides=(1, 1), **_):
    edges = ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3]))

    def largest(levels):
        padded = np.pad(levels, edges, constant_values=0)  # no level is less
        windows = sliding_window_view(padded, kernel_shape, (2, 3))
        return windows[:, :, :: strides[0], :: strides[1]].max(axis=(-2, -1))

    return _moved(x, largest)


def global_average_pool(x):
    """Of floats: the runtime sums them in its own order, so grids should be on either side."""
    return _float(x).mean(axis=(2, 3), keepdims=True, dtype=F32)


def flatten(x, axis=1):
    assert axis == 1
    return _moved(x, lambda array: array.reshape(len(array), -1))


def constant(**attributes):
    ((name, value),) = attributes.items()
    if name == "value":
        return onnx.numpy_helper.to_array(value)
    return np.array(value, F32 if "float" in name else np.int64)


def shape(x, start=0, end=None):
    return np.array(np.shape(getattr(x, "levels", x))[start:end], np.int64)


def reshape(x, new, **_):
    return _moved(x, lambda array: array.reshape([int(length) for length in new]))


def squeeze(x, axes=None):
    return np.squeeze(x, None if axes is None else tuple(axes))


def slice_(x, starts, ends, axes=None, steps=None):
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    taken = [slice(None)] * np.ndim(getattr(x, "levels", x))
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        taken[axis] = slice(int(start), int(end), int(step))
    return _moved(x, lambda array: array[tuple(taken)])


def pad(x, pads, value=None, axes=None, mode=b"constant"):
    assert mode == b"constant"
    before, after = np.split(np.asarray(pads), 2)
    edges = list(zip(before, after, strict=True))
    fill = 0 if value is None else np.asarray(value).item()
    return _moved(x, lambda array: np.pad(array, edges, constant_values=fill))


def reduce_mean(x, axes, keepdims=1, **_):
    """Of floats: the runtime sums them in its own order, so grids should be on either side."""
    return _float(x).mean(axis=tuple(int(a) for a in axes), keepdims=bool(keepdims), dtype=F32)


OPERATORS = {
    "Add": add,
    "Clip": clip,
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Constant": constant,
    "Conv": conv,
    "DequantizeLinear": dequantize_linear,
    "Flatten": flatten,
    "Identity": lambda x: x,
    "Cast": lambda x, to: x.astype(onnx.helper.tensor_dtype_to_np_dtype(to)),
    "Gather": lambda x, index, axis=0: np.take(x, index, axis),
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "MatMul": gemm,
    "MatMulNBits": mat_mul_n_bits,
    "MaxPool": max_pool,
    "Min": np.minimum,
    "Mul": lambda x, y: _float(x) * _float(y),
    "Pad": pad,
    "QuantizeLinear": quantize_linear,
    "ReduceMean": reduce_mean,
    "ReduceSum": lambda x, keepdims=1: np.sum(x, keepdims=bool(keepdims)),
    "Relu": relu,
    "Reshape": reshape,
    "Shape": shape,
    "Slice": slice_,
    "Squeeze": squeeze,
    "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(axes)),
}


def _moved(x, move):
    """``x`` with its values elsewhere: a grid stays one."""
    if isinstance(x, Grid):
        return Grid(move(x.levels), x.step, x.zero_point)
    return move(_float(x))


def _float(x):
    return x.numpy() if isinstance(x, (Grid, Sums)) else x


def _clamped(rounded, zero_point):
    low, high = -F32(zero_point), F32(255) - F32(zero_point)
    return (rounded.clip(low, high) + F32(zero_point)).astype(np.uint8)


def _fma(levels, ratio, addend):
    """``levels * ratio + addend`` rounded once: float64 holds the product and sum exactly."""
    return (levels.astype(np.float64) * np.float64(ratio) + np.float64(addend)).astype(F32)


def _along(value, ndim, axis):
    value = np.asarray(value)
    return (
        value if value.ndim == 0 else value.reshape([-1 if i == axis else 1 for i in range(ndim)])
    )
