"""OpenVINO as a backend.

It wants a model whole, so the slots' values are written into the model's bytes in memory first;
nothing goes to disk. Convolutions and products run as integers, as in ONNX Runtime; between them it
multiplies by the reciprocal of a step where ONNX Runtime divides by it, so that a value beside a
threshold may fall to its other side. docs/method.md, section 12, has by how much answers differ.
"""

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from plyweight.artifact import Graph, Port
from plyweight.engine.exactness import COLUMNS, INNER, LARGEST_SIGNED, LARGEST_UNSIGNED, ROWS
from plyweight.engine.forms import Loaded
from plyweight.engine.onnx_filled import filled
from plyweight.engine.openvino_model import fused
from plyweight.engine.session import (
    Array,
    SessionOptions,
    check_ports,
    first_line,
)
from plyweight.errors import EngineError, GraphError, listed

__all__ = ["SETTINGS", "OpenVinoSession", "check_openvino"]

DEVICE = "CPU"
COPIES = 2
SETTINGS: Mapping[str, object] = {
    "PERFORMANCE_HINT": "LATENCY",  # all threads on one request
    # What is float stays float32: no bfloat16, no rounding of activations that the graph has not.
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


class OpenVinoSession:
    """A compiled model of OpenVINO.

    Args:
        graph: that the model is of.
        ready: the model and its values, which are taken out of their dict.
        options: how to compute.

    Raises:
        GraphError: If the runtime refuses the model.
    """

    provider_names = (DEVICE,)

    def __init__(self, graph: Graph, ready: Loaded, options: SessionOptions) -> None:
        runtime = openvino()
        settings = dict(SETTINGS)
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        data = filled(ready.model.data, ready.values)
        ready.values.clear()
        try:
            core = _core(runtime)
            whole = core.read_model(data)
            fused(whole)
            self._compiled = core.compile_model(whole, DEVICE, settings)
        except Exception as error:  # those of the runtime have no class in common
            raise GraphError(
                f"OpenVINO {runtime.__version__} refuses the graph for "
                f"{listed(ready.model.bit_widths)} bits ({first_line(error)}); open it with "
                "another backend, or install a newer one."
            ) from error
        self.num_bytes = COPIES * len(data)
        inputs = _places(self._compiled.inputs, graph.inputs)
        places = _places(self._compiled.outputs, graph.outputs)
        check_ports(graph, inputs, places)
        self._places = [places[port.name] for port in graph.outputs]
        # A request has memory of its own and is one thread's at a time.
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""
        with self._request() as request:
            try:
                request.infer(dict(feeds), share_inputs=True)
            except Exception as error:
                raise GraphError(
                    f"OpenVINO failed to compute the graph ({first_line(error)}); try another "
                    "backend or a smaller batch."
                ) from error
            return [request.get_output_tensor(place).data.copy() for place in self._places]

    @contextmanager
    def _request(self) -> Iterator[Any]:
        """One that no other thread has, made where all are in use."""
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self._compiled.create_infer_request()
        try:
            yield request
        finally:
            self._idle.put(request)


def check_openvino(options: SessionOptions) -> None:
    """Whether OpenVINO is there; it has no providers.

    Raises:
        EngineError: If some are asked for.
        ImportError: If OpenVINO is not installed.
    """
    runtime = openvino()
    if options.providers is not None:
        raise EngineError(
            f"the providers {listed(map(str, options.providers))} were asked for, but OpenVINO "
            "has none, and computes on the CPU; give no providers."
        )
    if does_saturate(runtime):
        raise EngineError(
            f"OpenVINO {runtime.__version__} computes wrong sums of products of bytes on this "
            'processor, which has no VNNI instructions; use the backend "onnxruntime", whose are '
            "exact."
        )


@functools.cache
def does_saturate(runtime: Any) -> bool:
    """Whether ``runtime``, the module openvino, computes wrong sums of products here.

    Without VNNI instructions x86 adds products of bytes in pairs of 16 bits, see ``exactness``, and
    OpenVINO has no option against it. Its answer is found once per process.
    """
    operators = importlib.import_module("openvino.opset13")
    x = operators.parameter([ROWS, INNER], np.float32)
    ends = (np.float32(0), np.float32(LARGEST_UNSIGNED))
    levels = operators.fake_quantize(x, *ends, *ends, LARGEST_UNSIGNED + 1)
    weight = operators.convert(
        operators.constant(np.full((INNER, COLUMNS), LARGEST_SIGNED, np.int8)), np.float32
    )
    scaled = operators.multiply(weight, np.ones((1, COLUMNS), np.float32))
    product = operators.matmul(levels, scaled, False, False)
    model = runtime.Model([product], [x])
    compiled = _core(runtime).compile_model(model, DEVICE, dict(SETTINGS))
    sums = compiled([np.full((ROWS, INNER), LARGEST_UNSIGNED, np.float32)])[0]
    exact = INNER * LARGEST_UNSIGNED * LARGEST_SIGNED
    # Rounded to float32 somewhere on the way; saturated, it is about half.
    return bool(np.abs(sums - exact).max() > exact / 1000)


def openvino() -> Any:
    """The module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            'OpenVINO is not installed; run: pip install "plyweight[openvino]"'
        ) from error
    return openvino


@functools.cache
def _core(runtime: Any) -> Any:
    """One for the process: it loads the device's library once."""
    return runtime.Core()


def _places(ports: Sequence[Any], said: Sequence[Port]) -> dict[str, int]:
    """The place of each port by its name, or names.

    A tensor has all names of the nodes that OpenVINO found to change nothing, in no order, so that
    the one that the graph says is looked for first.
    """
    known, places = {port.name for port in said}, {}
    for place, port in enumerate(ports):
        for name in known & set(port.get_names()) or {str(port.get_any_name())}:
            places[name] = place
    return places
