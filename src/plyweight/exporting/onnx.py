"""onnx: a graph with the values of one bit-width, as one ordinary ONNX file.

The levels of weights are int8 at every bit-width. Those of 4 bits and fewer are at most 16
different numbers, so "onnx-int4" has them as UINT4 codes and a table:

    levels = Gather(table int8 (16,), Cast(codes UINT4))

which a runtime computes once, when it folds constants, and then runs the very int8 model. Products
of floats with such weights are ONNX Runtime's own operator instead, ``MatMulNBits``, as in the
engine (see ``plyweight.engine.forms``).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact import Header, Model, Port, publish_atomically
from plyweight.engine.backends import ONNX_RUNTIME_CPU, PORTABLE
from plyweight.engine.engine import graph_of
from plyweight.engine.forms import Loaded, Runtime, loaded
from plyweight.engine.onnx_filled import filled
from plyweight.engine.onnx_nodes import OnnxModel
from plyweight.engine.onnxruntime_session import OnnxRuntimeSession, check_onnxruntime
from plyweight.engine.session import SessionOptions, num_bytes_of
from plyweight.engine.values import SlotValues, Views
from plyweight.errors import GraphError

__all__ = ["Filled", "mean_difference", "write_onnx"]

MAX_BYTES = 2**31 - 1  # of a protocol buffer
MAX_INT4_LEVELS, NIBBLE_BITS, INT4_OPSET = 16, 4, 21
NIBBLES = Runtime(has_nibbles=True, takes_bytes=True)  # of who reads "onnx-int4"
EXACT = {"integer", "rows"}  # forms that give the same numbers in every file
# Sums of floats are rounded where they are summed otherwise; a wrong weight is off by more, for at
# 8 bits the half of a step is 0.004 of the largest.
ROUNDING = 1e-4
OTHER_SIDES = 0.02  # and what is quantized after that may fall to the other side of a threshold
BATCH_SIZES = (1, 2)
OTHER_LENGTH = 8  # of dimensions besides the batch that may have any
Array = NDArray[Any]
Feeds = Mapping[str, Array]


class Filled:
    """The graph of an artifact at one bit-width, with its values.

    Attributes:
        graph: of the artifact.
        data: the ONNX model, complete.
        most_difference: the mean difference to the engine that is allowed, in parts of the
            outputs' standard deviation.

    Raises:
        GraphError: If the artifact has no graph, or the model would be too large for one file.
        ImportError: If onnx is not installed.
    """

    def __init__(
        self,
        header: Header,
        layers: Sequence[Views],
        bit_width: int,
        name: str,
        *,
        runtime: Runtime = PORTABLE,
    ) -> None:
        check_onnxruntime(SessionOptions(None, None))
        self.graph = graph_of(layers[0], header, name)
        self._whole = self.graph.model_for(bit_width)
        self._slots = SlotValues(header, self.graph, layers, bit_width)
        ready = loaded(self.graph, self._whole, self._slots, runtime)
        model, values = ready.model, ready.values
        num_bytes = num_bytes_of(values)
        if num_bytes + len(model.data) > MAX_BYTES:
            raise GraphError(
                f"the model has {num_bytes:,} bytes at {bit_width} bits, but an ONNX file holds "
                f"{MAX_BYTES:,}; open the artifact itself, or export safetensors."
            )
        narrow = self._narrow(values) if runtime.has_nibbles else frozenset()
        widths = [
            header.weights[self.graph.modules[prefix].param].width_at(bit_width)
            for prefix, form in ready.forms.items()
            if form.kind == "nibbles"
        ]
        if runtime.has_nibbles and not narrow and min(widths, default=8) > NIBBLE_BITS:
            raise GraphError(
                f"no weight has 4 bits or fewer at {bit_width} bits; export 'onnx' instead, or a "
                "narrower bit-width."
            )
        self.data = _filled(model, values, _metadata(header, bit_width), narrow)
        kinds = {form.kind for form in ready.forms.values()}
        self.most_difference = 0.0 if kinds <= EXACT else ROUNDING
        if "integer" in kinds and kinds - EXACT:
            self.most_difference = OTHER_SIDES

    def answers(self) -> list[tuple[Feeds, list[Array]]]:
        """Inputs, and what the engine makes of them."""
        ready = loaded(self.graph, self._whole, self._slots, ONNX_RUNTIME_CPU)
        session = OnnxRuntimeSession(self.graph, ready, SessionOptions(None, None))
        return [(feeds, session.run(feeds)) for feeds in map(self._feeds, BATCH_SIZES)]

    def _narrow(self, values: Mapping[str, Array]) -> frozenset[str]:
        """The slots whose levels are at most 16 different ones."""
        levels = {f"{prefix}.levels" for prefix in self.graph.modules}
        return frozenset(
            name
            for name, value in values.items()
            if name in levels and len(np.unique(value)) <= MAX_INT4_LEVELS
        )

    def _feeds(self, batch_size: int) -> Feeds:
        generator = np.random.default_rng(batch_size)
        return {port.name: _random(port, batch_size, generator) for port in self.graph.inputs}


def write_onnx(
    header: Header, layers: Sequence[Views], bit_width: int, path: Path, *, is_int4: bool = False
) -> tuple[float, list[Path]]:
    """Write ``path``, unless ONNX Runtime computes from it something else than the engine.

    Args:
        header: of the artifact.
        layers: from the base layer to that of the bit-width.
        bit_width: to compute at.
        path: the file.
        is_int4: whether levels of 4 bits and fewer take half a byte each.

    Returns:
        The difference, which is 0 where all products are of integers, and the files.
    """
    runtime = NIBBLES if is_int4 else PORTABLE
    whole = Filled(header, layers, bit_width, str(path), runtime=runtime)
    difference = 0.0
    with publish_atomically(path) as file:
        file.write(whole.data)
        file.flush()
        file.seek(0)
        read = Model(bit_widths=(bit_width,), slots=(), data=file.read())
        ready = Loaded(read, OnnxModel(read.data), {}, {})
        session = OnnxRuntimeSession(whole.graph, ready, SessionOptions(None, None))
        for feeds, expected in whole.answers():
            outputs = session.run(feeds)
            if not all(map(_is_equal, outputs, expected)):
                difference = float(np.maximum(difference, mean_difference(outputs, expected)))
                if not 0 < difference <= whole.most_difference:  # a NaN is no number
                    raise GraphError(
                        "ONNX Runtime computes something else from the exported file than from "
                        "the artifact; nothing was written. Please report this."
                    )
    return difference, [path]


def _is_equal(one: Array, other: Array) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def mean_difference(outputs: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest mean difference of an output, in parts of its standard deviation."""
    found = 0.0
    for one, other in zip(outputs, expected, strict=True):
        difference = np.abs(one.astype(np.float64) - other)
        part = difference.mean() / max(float(other.std()), 1e-12)
        found = float(np.maximum(found, part))  # a NaN stays one
    return found


def _filled(
    model: Model,
    values: Mapping[str, Array],
    metadata: Mapping[str, str],
    narrow: frozenset[str],
) -> bytes:
    """``model`` with ``values`` for slots, equal ones once, and those of ``narrow`` as UINT4."""
    onnx = _onnx()
    proto = onnx.load_from_string(filled(model.data, values))
    first: dict[object, str] = {}
    names: dict[str, str] = {}  # of what is there twice, and which stays
    kept = []
    for tensor in proto.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        digest = hashlib.sha256(value.tobytes()).digest()
        content = value.dtype.str, value.shape, digest
        if first.setdefault(content, tensor.name) == tensor.name:
            kept.append(tensor)
        else:
            names[tensor.name] = first[content]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _rename(proto.graph, names)
    if narrow:
        _make_int4(onnx, proto, values, narrow - names.keys())
    for key, text in metadata.items():
        proto.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _make_int4(onnx: Any, proto: Any, values: Mapping[str, Array], narrow: frozenset[str]) -> None:
    """Let the initializers ``narrow`` be looked up in tables of at most 16 levels, in place."""
    graph = proto.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in narrow]
    tables: dict[bytes, str] = {}  # most weights of a bit-width have the same levels
    nodes = []
    for name in sorted(narrow):
        table, codes = np.unique(values[name], return_inverse=True)
        if table.tobytes() not in tables:
            tables[table.tobytes()] = f"{name}/table"
            kept.append(onnx.numpy_helper.from_array(table, f"{name}/table"))
        flat = codes.reshape(-1).astype(np.uint8)
        pairs = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
        tensor = onnx.TensorProto(
            name=f"{name}/codes",
            data_type=onnx.TensorProto.UINT4,
            dims=codes.reshape(values[name].shape).shape,
            raw_data=(pairs[0::2] | pairs[1::2] << 4).tobytes(),  # the first in the low half
        )
        kept.append(tensor)
        index, source = f"{name}/index", tables[table.tobytes()]
        cast = {"to": onnx.TensorProto.INT32}
        nodes.append(onnx.helper.make_node("Cast", [tensor.name], [index], **cast))
        nodes.append(onnx.helper.make_node("Gather", [source, index], [name]))
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    # The first in which Cast takes UINT4; what else it changed are more types, too.
    (opset,) = (opset for opset in proto.opset_import if opset.domain in ("", "ai.onnx"))
    opset.version = max(opset.version, INT4_OPSET)


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Let the nodes of ``graph``, and of graphs inside of them, read other names."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names)


def _metadata(header: Header, bit_width: int) -> dict[str, str]:
    found = {"plyweight.artifact": header.artifact_id, "plyweight.bit_width": str(bit_width)}
    if header.io:
        found["plyweight.io"] = json.dumps(header.io, sort_keys=True)
    return found


def _random(port: Port, batch_size: int, generator: np.random.Generator) -> Array:
    """An input that the port takes: normal numbers; zeros where integers may be an index."""
    shape = [
        dim if isinstance(dim, int) else batch_size if index == 0 else OTHER_LENGTH
        for index, dim in enumerate(port.shape)
    ]
    if port.dtype.startswith("float"):
        return generator.normal(size=shape).astype(port.dtype)
    return np.zeros(shape, port.dtype)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ModuleNotFoundError as error:
        raise ImportError(
            "an ONNX file needs onnx, which is not installed; install it with: "
            'pip install "plyweight[export]"'
        ) from error
    return onnx
