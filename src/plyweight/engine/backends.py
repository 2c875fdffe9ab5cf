"""Backends: the runtimes that an engine can compute with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plyweight.artifact import Graph
from plyweight.engine.forms import Loaded, Runtime
from plyweight.engine.onnxruntime_session import OnnxRuntimeSession, check_onnxruntime, is_cpu
from plyweight.engine.openvino_session import OpenVinoSession, check_openvino
from plyweight.engine.session import Session, SessionOptions
from plyweight.errors import EngineError, listed

__all__ = [
    "BACKENDS",
    "ONNX_RUNTIME_CPU",
    "OPENVINO",
    "PORTABLE",
    "Backend",
    "check_options",
]


@dataclass(frozen=True)
class Backend:
    """A runtime, which is imported when it is asked for.

    Attributes:
        check: raises an EngineError for options that it has not, an ImportError without it.
        session: of a graph's model as it is loaded, whose values it takes out of their dict.
        runtime: how it computes with weights whose inputs are floats.
    """

    check: Callable[[SessionOptions], None]
    session: Callable[[Graph, Loaded, SessionOptions], Session]
    runtime: Callable[[SessionOptions], Runtime]


ONNX_RUNTIME_CPU = Runtime(has_nibbles=True, takes_bytes=False)
# OpenVINO refuses groups of which the last is smaller, and computes something else with others:
# for one or two rows and groups of 5, 6, 7 or 9 inputs its sums are wrong by half their size
# (openvino 2026.4.1), for multiples of 4 they are right. So they are where a weight is read as a
# value, `x @ weight` with a scale for each of the inputs that are summed: it takes one for all.
OPENVINO = Runtime(has_nibbles=False, takes_bytes=True, group_multiple=16, only_multiplied=True)
PORTABLE = Runtime(has_nibbles=False, takes_bytes=True)  # what the graph says, in any runtime

BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        check_onnxruntime,
        OnnxRuntimeSession,
        lambda options: ONNX_RUNTIME_CPU if is_cpu(options) else PORTABLE,
    ),
    "openvino": Backend(check_openvino, OpenVinoSession, lambda _: OPENVINO),
}


def check_options(backend: str, options: SessionOptions) -> None:
    """Whether that runtime is there, and what is asked of it.

    Raises:
        EngineError: If not, or if the number of threads is none.
        ImportError: If the runtime is not installed.
    """
    if backend not in BACKENDS:
        raise EngineError(f"backend is {backend!r}; give one of {listed(BACKENDS)}.")
    threads = options.threads
    if threads is not None and (type(threads) is not int or threads < 1):
        raise EngineError(f"threads is {threads!r}; give an integer of 1 or more, or None.")
    BACKENDS[backend].check(options)
