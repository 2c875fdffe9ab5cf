"""What others multiply weight-only with on a CPU, each made from the same kind of weight.

Each function gives something that takes float32 activations ``(m, in)`` and returns the product,
and the bytes of weights and scales that it reads. Before it does, it has been compared with a
float64 product of the very values that it holds, so nothing is timed that computes something else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Product", "onnxruntime_nbits", "torch_dense", "torch_int4", "torch_int8"]

TOLERANCE = 0.02  # of the largest output: int8 activations and bfloat16 are as far off as that
CHECKED_ROWS = 256  # outputs that are compared


@dataclass(frozen=True)
class Product:
    """Something that multiplies.

    Attributes:
        run: float32 ``(m, in)`` to ``(m, out)``, numpy or torch, whichever is its own.
        of: what turns numpy activations into what ``run`` takes.
        weight_bytes: that it reads.
    """

    run: Callable[[object], object]
    of: Callable[[np.ndarray], object]
    weight_bytes: int


def checked(product: Product, values: np.ndarray) -> Product:
    """``product`` once it agrees with float64, for the outputs of the first rows of ``values``."""
    x = np.random.default_rng(1).standard_normal((4, values.shape[1])).astype(np.float32)
    y = product.run(product.of(x))
    y = y.float().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    expected = x.astype(np.float64) @ values.astype(np.float64).T
    error = abs(y[:, : len(values)] - expected).max() / abs(expected).max()
    if not error < TOLERANCE:
        raise SystemExit(f"a variant computes something else: {error:.3g} of the largest output")
    return product


def torch_dense(weight: np.ndarray, dtype: torch.dtype) -> Product:
    """``F.linear`` in ``dtype``."""
    held = torch.from_numpy(weight).to(dtype)
    run = lambda x: torch.nn.functional.linear(x, held)  # noqa: E731
    product = Product(run, lambda x: torch.from_numpy(x).to(dtype), held.nbytes)
    return checked(product, held[:CHECKED_ROWS].float().numpy())


def torch_int8(weight: np.ndarray) -> Product:
    """``torch._weight_int8pack_mm``: int8 by output channel, activations bfloat16."""
    scale = np.abs(weight).max(axis=1) / 127
    codes = np.rint(weight / scale[:, None]).astype(np.int8)
    held, scales = torch.from_numpy(codes), torch.from_numpy(scale).bfloat16()
    product = Product(
        lambda x: torch._weight_int8pack_mm(x, held, scales),
        lambda x: torch.from_numpy(x).bfloat16(),
        held.nbytes + scales.nbytes,
    )
    rounded = scales[:CHECKED_ROWS].float().numpy()
    return checked(product, codes[:CHECKED_ROWS] * rounded[:, None])


def torch_int4(weight: np.ndarray, group: int) -> Product:
    """``torch._weight_int4pack_mm_for_cpu``: 4 bits by group, activations bfloat16."""
    out, num_inputs = weight.shape
    grouped = weight.reshape(out, -1, group)
    scale = np.abs(grouped).max(axis=2) / 7
    codes = np.rint(grouped / scale[..., None]).clip(-8, 7).astype(np.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(
        torch.from_numpy(codes.reshape(out, num_inputs) + 8), 2
    )
    scales = torch.from_numpy(scale).bfloat16()
    pairs = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    product = Product(
        lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs),
        lambda x: torch.from_numpy(x).bfloat16(),
        packed.nbytes + pairs.nbytes,
    )
    rounded = scales[:CHECKED_ROWS].float().numpy()
    values = codes[:CHECKED_ROWS] * rounded[..., None]
    return checked(product, values.reshape(-1, num_inputs))


def onnxruntime_nbits(weight: np.ndarray, bits: int, group: int, threads: int) -> Product:
    """ONNX Runtime's MatMulNBits, accuracy level 4: activations are rounded to int8 by group."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    out, num_inputs = weight.shape
    grouped = weight.reshape(out, -1, group)
    half = 2 ** (bits - 1)
    scale = (np.abs(grouped).max(axis=2) / max(half - 1, 1)).astype(np.float32)
    codes = (np.rint(grouped / scale[..., None]) + half).clip(0, 2 * half - 1).astype(np.uint8)
    per_byte = 8 // bits
    packed = np.zeros((*scale.shape, group // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= codes[..., place::per_byte] << (bits * place)
    values = (codes[:CHECKED_ROWS].astype(np.float32) - half) * scale[:CHECKED_ROWS, :, None]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scale"],
        ["y"],
        domain="com.microsoft",
        K=num_inputs,
        N=out,
        bits=bits,
        block_size=group,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, num_inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, out])],
        [
            onnx.numpy_helper.from_array(packed, "codes"),
            onnx.numpy_helper.from_array(scale, "scale"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    product = Product(
        lambda x: session.run(None, {"x": x})[0], lambda x: x, packed.nbytes + scale.nbytes
    )
    return checked(product, values.reshape(-1, num_inputs))
