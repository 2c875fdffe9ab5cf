"""onnx: a graph with the values of one bit-width, as one ordinary ONNX file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact import Header, Model, Port, publish_atomically
from plyweight.engine.engine import graph_of
from plyweight.engine.session import OnnxRuntimeSession, SessionOptions, check_model, check_options
from plyweight.engine.values import SlotValues, Views
from plyweight.errors import GraphError

__all__ = ["Filled", "mean_difference", "write_onnx"]

MAX_BYTES = 2**31 - 1  # of a protocol buffer
BATCH_SIZES = (1, 2)
OTHER_LENGTH = 8  # of dimensions besides the batch that may have any
Array = NDArray[Any]
Feeds = Mapping[str, Array]


class Filled:
    """The graph of an artifact at one bit-width, with its values.

    Attributes:
        graph: of the artifact.
        data: the ONNX model, complete.

    Raises:
        GraphError: If the artifact has no graph, or the model would be too large for one file.
        ImportError: If onnx is not installed.
    """

    def __init__(self, header: Header, layers: Sequence[Views], bit_width: int, name: str) -> None:
        check_options("onnxruntime", SessionOptions(None, None))
        self.graph = graph_of(layers[0], header, name)
        self._model = self.graph.model_for(bit_width)
        self._values = SlotValues(header, self.graph, layers, bit_width).all()
        check_model(self._model, self._values)
        num_bytes = sum({id(value): value.nbytes for value in self._values.values()}.values())
        if num_bytes + len(self._model.data) > MAX_BYTES:
            raise GraphError(
                f"the model has {num_bytes:,} bytes at {bit_width} bits, but an ONNX file holds "
                f"{MAX_BYTES:,}; open the artifact itself, or export safetensors."
            )
        self.data = _filled(self._model, self._values, _metadata(header, bit_width))

    def answers(self) -> list[tuple[Feeds, list[Array]]]:
        """Inputs, and what the engine makes of them."""
        session = OnnxRuntimeSession(
            self.graph, self._model, self._values, SessionOptions(None, None)
        )
        return [(feeds, session.run(feeds)) for feeds in map(self._feeds, BATCH_SIZES)]

    def _feeds(self, batch_size: int) -> Feeds:
        generator = np.random.default_rng(batch_size)
        return {port.name: _random(port, batch_size, generator) for port in self.graph.inputs}


def write_onnx(
    header: Header, layers: Sequence[Views], bit_width: int, path: Path
) -> tuple[float, list[Path]]:
    """Write ``path``, unless ONNX Runtime computes from it something else than the engine.

    Returns:
        The difference, which is 0, and the files.
    """
    filled = Filled(header, layers, bit_width, str(path))
    with publish_atomically(path) as file:
        file.write(filled.data)
        file.flush()
        file.seek(0)
        read = Model(bit_widths=(bit_width,), slots=(), data=file.read())
        session = OnnxRuntimeSession(filled.graph, read, {}, SessionOptions(None, None))
        for feeds, expected in filled.answers():
            for one, other in zip(session.run(feeds), expected, strict=True):
                if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
                    raise GraphError(
                        "ONNX Runtime computes something else from the exported file than from "
                        "the artifact; nothing was written. Please report this."
                    )
    return 0.0, [path]


def mean_difference(outputs: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest mean difference of an output, in parts of its standard deviation."""
    found = 0.0
    for one, other in zip(outputs, expected, strict=True):
        difference = np.abs(one.astype(np.float64) - other)
        found = max(found, float(difference.mean() / max(float(other.std()), 1e-12)))
    return found


def _filled(model: Model, values: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """``model`` with ``values`` in the place of slots, equal ones once."""
    onnx = _onnx()
    proto = onnx.load_from_string(model.data)
    first: dict[object, str] = {}
    names: dict[str, str] = {}  # of what is there twice, and which stays
    kept = []
    for tensor in proto.graph.initializer:
        value = values.get(tensor.name)
        if value is None:
            value = onnx.numpy_helper.to_array(tensor)
        else:
            tensor = onnx.numpy_helper.from_array(value, tensor.name)
        digest = hashlib.sha256(value.tobytes()).digest()
        content = value.dtype.str, value.shape, digest
        if first.setdefault(content, tensor.name) == tensor.name:
            kept.append(tensor)
        else:
            names[tensor.name] = first[content]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _rename(proto.graph, names)
    for key, text in metadata.items():
        proto.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


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
