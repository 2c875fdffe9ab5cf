"""Small artifacts made of numpy alone, the same in every test.

Two layered weights (a convolution pinned to 8 bits, a linear one in groups), one quantized
activation, a batch norm with statistics of its own at every bit-width, a bias and a counter.
"""

import itertools
import json
import math

import numpy as np

from plyweight.artifact import (
    Activation,
    LayerContent,
    LayeredWeight,
    MemorySource,
    ModelInfo,
    TensorData,
    write_artifact,
)
from plyweight.codec import codes_at, encode, spread, to_planes

BIT_WIDTHS = (2, 3, 8)
MODEL = ModelInfo(name="tiny", revision=3, created_by="plyweight tests", license="Apache-2.0")
WEIGHTS = {
    "conv.weight": LayeredWeight((3, 2, 3, 3), None, 8),
    "fc.weight": LayeredWeight((5, 10), 4, None),
}
EVALUATION = {2: {"top1": "66.1"}, 8: {"top1": "71.25"}}
IO = {"inputs": [{"name": "image", "shape": [1, 2, 8, 8]}], "labels": ["cat", "dög"]}


def float32(array):
    array = np.ascontiguousarray(array, dtype="<f4")
    return {"dtype": "F32", "shape": array.shape, "data": array.tobytes()}


def values(seed=0):
    """The float weights and their scales, by parameter name."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, weight in WEIGHTS.items():
        scale = rng.uniform(0.005, 0.02, weight.scale_shape).astype(np.float32)
        result[name] = rng.normal(0, 0.5, weight.shape).astype(np.float32), scale
    return result


def planes_of(name, seed=0):
    """All eight planes of a weight."""
    weight, scale = values(seed)[name]
    spec = WEIGHTS[name]
    return to_planes(encode(weight, spread(scale, spec.shape, spec.group_size)), 8)


def layer_contents(bit_widths=BIT_WIDTHS, seed=0):
    """What ``write_artifact`` wants, for any ascending bit-widths."""
    rng = np.random.default_rng(seed + 1)
    layers = []
    for index, bit_width in enumerate(bit_widths):
        previous = bit_widths[index - 1] if index else 0
        tensors = []
        for name, weight in WEIGHTS.items():
            count = weight.planes_in(bit_width, previous)
            if count:
                first = weight.width_at(previous) if index else 0
                planes = planes_of(name, seed)[first : first + count]
                tensors.append(TensorData(f"{name}.q", "U8", planes.shape, planes.tobytes()))
            if not index:
                tensors.append(TensorData(f"{name}.scale", **float32(values(seed)[name][1])))
        if not index:
            tensors.append(TensorData("fc.bias", **float32(rng.normal(size=5))))
            tensors.append(TensorData("__graph__", "U8", (7,), b"a graph"))
            tensors.append(TensorData("empty", "F32", (0, 3), b""))
        else:
            tensors.append(TensorData("fc.weight.gain", **float32([1 + index / 8])))
        tensors.append(TensorData("fc.step", **float32([0.1 / bit_width])))
        tensors.append(TensorData("fc.zero_point", **float32([1.0])))
        tensors.append(TensorData("bn.bias", **float32(rng.normal(size=3))))
        tensors.append(TensorData("bn.running_var", **float32(rng.uniform(0.5, 2, 3))))
        counter = np.array(100 * index, "<i8").tobytes()
        tensors.append(TensorData("bn.num_batches_tracked", "I64", (), counter))
        layers.append(LayerContent(bit_width, tensors))
    return layers


def content(bit_widths=BIT_WIDTHS, **changes):
    """Keyword arguments of ``write_artifact``."""
    activation = Activation("offset", {b: min(8, b + 1) for b in bit_widths})
    return {
        "layers": layer_contents(bit_widths),
        "weights": WEIGHTS,
        "activations": {"fc": activation},
        "model": MODEL,
        "evaluation": {b: m for b, m in EVALUATION.items() if b in bit_widths},
        "io": IO,
    } | changes


def build(path, **changes):
    """Write the artifact to ``path``; its bytes."""
    write_artifact(path, **content(**changes))
    return path.read_bytes()


def big_content(shape=(512, 1024), bit_widths=(2, 3)):
    """One weight whose base layer needs several chunks of 64 KiB."""
    rng = np.random.default_rng(0)
    weight = LayeredWeight(shape)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    planes = to_planes(codes_at(codes, bit_widths[-1]), bit_widths[-1])
    tensors = [
        TensorData("w.q", "U8", planes[: bit_widths[0]].shape, planes[: bit_widths[0]].tobytes()),
        TensorData("w.scale", **float32(np.ones(shape[0]))),
    ]
    layers = [LayerContent(bit_widths[0], tensors)]
    for low, high in itertools.pairwise(bit_widths):
        rows = planes[low:high]
        layers.append(LayerContent(high, [TensorData("w.q", "U8", rows.shape, rows.tobytes())]))
    return {
        "layers": layers,
        "weights": {"w": weight},
        "activations": {},
        "model": MODEL,
        "chunk_bytes": 64 * 2**10,
    }


def source(data, name="tiny.layered.safetensors"):
    return MemorySource(bytes(data), name)


# --- headers, to be broken ---------------------------------------------------------------------


def table_of(data):
    """The JSON object of a file, and where its data starts."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def with_table(data, table, *, alignment=8):
    """The file with another JSON object (or JSON text) as its header, and the same data."""
    text = table if isinstance(table, str) else json.dumps(table)
    return with_text(data, text.encode(), alignment=alignment)


def with_text(data, text, *, alignment=8):
    """The file with another text as its header, padded, and the same data."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = text.ljust(math.ceil((len(text) + 8) / alignment) * alignment - 8, b" ")
    return len(text).to_bytes(8, "little") + text + bytes(data[start:])


def with_field(data, key, change, *, alignment=8):
    """The file with ``change`` applied to the value of one JSON field of ``__metadata__``."""
    table, _ = table_of(data)
    value = json.loads(table["__metadata__"][key])
    changed = change(value)
    table["__metadata__"][key] = json.dumps(value if changed is None else changed)
    return with_table(data, table, alignment=alignment)
