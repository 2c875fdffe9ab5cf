"""Session: a graph with one bit-width's values in its slots, ready to answer.

A runtime is behind one small protocol; ``onnxruntime`` is the one there is. Its session takes the
model's bytes and the values in memory: nothing is written to disk, and the values are not copied
into the model first. It computes with those arrays for as long as it lives, so it keeps them.

Integer products are the exact ones on every machine: where its instructions would saturate
(``exactness`` finds out), ONNX Runtime is told to make the weights unsigned first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact import Graph, Model
from plyweight.engine.exactness import does_saturate
from plyweight.engine.onnx_model import external_initializers
from plyweight.errors import EngineError, GraphError, listed

__all__ = ["BACKENDS", "Provider", "Session", "SessionOptions", "check_model", "check_options"]

Array = NDArray[Any]
Provider = str | tuple[str, Mapping[str, object]]

CPU = "CPUExecutionProvider"
FATAL_ONLY = 4  # of ONNX Runtime's levels of logging: what goes wrong is raised
# ONNX Runtime packs the weights into a form of its own, about as large, beside the values.
COPIES = 2


class Session(Protocol):
    """A graph at one bit-width. Any number of threads may run it at a time."""

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes, activations not counted."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order.

        Raises:
            GraphError: If the runtime fails.
        """
        ...


class SessionOptions:
    """How to compute, the same at every bit-width.

    Attributes:
        providers: of the runtime, the preferred one first.
        threads: that one request is spread over; None for as many as the runtime chooses.
    """

    def __init__(self, providers: Sequence[Provider] | None, threads: int | None) -> None:
        self.providers: tuple[Provider, ...] = (CPU,) if providers is None else tuple(providers)
        self.threads = threads

    @property
    def provider_names(self) -> tuple[str, ...]:
        """Without their own options."""
        return tuple(p if isinstance(p, str) else p[0] for p in self.providers)


class OnnxRuntimeSession:
    """A session of ONNX Runtime.

    Args:
        graph: that the model is of.
        model: whose slots are the names of ``values``.
        values: by slot; they must not be written to any more.
        options: how to compute.

    Raises:
        GraphError: If the runtime refuses the model.
        EngineError: If a provider is not there.
    """

    def __init__(
        self, graph: Graph, model: Model, values: Mapping[str, Array], options: SessionOptions
    ) -> None:
        runtime = onnxruntime()
        self._values = dict(values)  # the runtime reads this memory and does not own it
        self._outputs = [port.name for port in graph.outputs]
        self.num_bytes = len(model.data) + COPIES * _num_bytes(values)
        settings = runtime.SessionOptions()
        settings.log_severity_level = FATAL_ONLY
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        settings.add_session_config_entry("session.load_model_format", "ONNX")
        # Where only weights are quantized, activations are not to be rounded to 8 bits on the way.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if does_saturate(runtime):
            settings.add_session_config_entry("session.x64quantprecision", "1")
        wrapped = [runtime.OrtValue.ortvalue_from_numpy(value) for value in self._values.values()]
        settings.add_external_initializers(list(self._values), wrapped)
        try:
            self._session = runtime.InferenceSession(
                model.data,
                settings,
                providers=list(options.providers),
                enable_fallback=0,  # a provider is a demand, never a hint
                read_config_from_model=0,
            )
        except Exception as error:  # those of the runtime have no class in common
            raise GraphError(
                f"ONNX Runtime {runtime.__version__} refuses the graph for "
                f"{listed(model.bit_widths)} bits ({_first_line(error)}); pack the model again, "
                "or install a newer one."
            ) from error
        _require_used(options.provider_names, self._session.get_providers())
        _require_ports(graph, self._session)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""
        try:
            outputs: list[Array] = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise GraphError(
                f"ONNX Runtime failed to compute the graph ({_first_line(error)}); try other "
                "providers or a smaller batch."
            ) from error
        return outputs


Backend = Callable[[Graph, Model, Mapping[str, Array], SessionOptions], Session]
BACKENDS: Mapping[str, Backend] = {"onnxruntime": OnnxRuntimeSession}


def check_options(backend: str, options: SessionOptions) -> None:
    """Whether that runtime and its providers are there.

    Raises:
        EngineError: If not, or if the number of threads is none.
        ImportError: If the runtime is not installed.
    """
    if backend not in BACKENDS:
        raise EngineError(f"backend is {backend!r}; give one of {listed(BACKENDS)}.")
    threads = options.threads
    if threads is not None and (type(threads) is not int or threads < 1):
        raise EngineError(f"threads is {threads!r}; give an integer of 1 or more, or None.")
    available = onnxruntime().get_available_providers()
    missing = [name for name in options.provider_names if name not in available]
    if missing or not options.providers:
        raise EngineError(
            f"the providers {listed(missing)} were asked for, but this ONNX Runtime has "
            f"{listed(available)}; give some of those, or install a build that has more."
        )


def check_model(model: Model, values: Mapping[str, Array]) -> None:
    """Whether a model's slots are those of ``values``, in dtype and shape, and it reads no file.

    Raises:
        GraphError: If not.
    """
    declared = external_initializers(model.data)
    for name in sorted(declared.keys() ^ values.keys()):
        has, has_not = ("model", "list") if name in declared else ("list", "model")
        raise GraphError(
            f"the graph's {has} has a slot {name!r}, but its {has_not} has not; pack the model "
            "again."
        )
    for name, there in declared.items():
        value = values[name]
        if value.dtype != np.dtype(there.dtype) or value.shape != there.shape:
            raise GraphError(
                f"the graph's model has {there.dtype} of shape {list(there.shape)} for {name!r}, "
                f"but the artifact gives {value.dtype} of shape {list(value.shape)}; pack the "
                "model again."
            )


def onnxruntime() -> Any:
    """The module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            'plyweight.open needs ONNX Runtime; run: pip install "plyweight[engine]"'
        ) from error
    return onnxruntime


def _num_bytes(values: Mapping[str, Array]) -> int:
    """Of the arrays, each counted once."""
    return sum({id(value): value.nbytes for value in values.values()}.values())


def _require_used(asked: Sequence[str], used: Sequence[str]) -> None:
    """Some builds know a provider whose libraries this machine has not."""
    missing = [name for name in asked if name not in used]
    if missing:
        raise EngineError(
            f"ONNX Runtime cannot start {listed(missing)} here and would use {listed(used)}; ask "
            "for those, or install the libraries that it needs."
        )


def _require_ports(graph: Graph, session: Any) -> None:
    """The model takes and gives what the graph says."""
    for what, ports, nodes in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        said, there = [port.name for port in ports], [node.name for node in nodes]
        if sorted(said) != sorted(there):
            raise GraphError(
                f"the graph names the {what} {listed(said)}, but its model has {listed(there)}; "
                "pack the model again."
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
