"""ONNX Runtime as a backend, the default one.

Its session takes the model's bytes and the values in memory: nothing is written to disk. There are
two ways, and the runtime packs the weights into a form of its own in both:

    beside    the values as "external initializers", which the session reads and does not own, so
              that they stay beside its own form: made soonest (a cold switch of ResNet-18 49 ms),
              and held twice. Networks whose products all are of integers (``is_integer``),
              which are small and switch.
    inside    the values in the model's message: the runtime owns them, and gives back what it has
              packed. Held once, for 9 to 15 ms of copies. All others, on any provider: weights
              alone may be large. Only a model that is too large for one message has them beside
              it all the same.

Integer products are the exact ones on every machine: where its instructions would saturate
(``exactness`` finds out), ONNX Runtime is told to make the weights unsigned first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from plyweight.artifact import Graph
from plyweight.engine.exactness import does_saturate
from plyweight.engine.forms import Loaded
from plyweight.engine.onnx_filled import filled
from plyweight.engine.onnx_requantized import requantized
from plyweight.engine.session import (
    Array,
    Provider,
    SessionOptions,
    check_ports,
    first_line,
    num_bytes_of,
)
from plyweight.errors import EngineError, GraphError, listed

__all__ = ["OnnxRuntimeSession", "check_onnxruntime", "is_cpu"]

CPU = "CPUExecutionProvider"
FATAL_ONLY = 4  # of ONNX Runtime's levels of logging: what goes wrong is raised
# Of a protocol buffer; and room for the model itself.
MAX_MESSAGE_BYTES = 2**31 - 2**24
COPIES_BESIDE = 2  # the values, and the runtime's own form of them


class OnnxRuntimeSession:
    """A session of ONNX Runtime.

    Args:
        graph: that the model is of.
        ready: the model and its values. They are taken out of their dict, so that their memory is
            free as soon as the runtime has what it needs.
        options: how to compute.

    Raises:
        GraphError: If the runtime refuses the model.
        EngineError: If a provider is not there.
    """

    def __init__(self, graph: Graph, ready: Loaded, options: SessionOptions) -> None:
        runtime = onnxruntime()
        providers = _providers(options)
        self.provider_names = _names(providers)
        self._outputs = [port.name for port in graph.outputs]
        model = ready.model
        data, left = requantized(ready.onnx, ready.values)
        num_bytes = num_bytes_of(left)
        settings = runtime.SessionOptions()
        settings.log_severity_level = FATAL_ONLY
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        settings.add_session_config_entry("session.load_model_format", "ONNX")
        # Where only weights are quantized, activations are not to be rounded to 8 bits on the way.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if does_saturate(runtime):
            settings.add_session_config_entry("session.x64quantprecision", "1")
        self._values: dict[str, Array] = {}
        if not ready.is_integer and num_bytes <= MAX_MESSAGE_BYTES:
            data = filled(data, left)
            self.num_bytes = len(data)
        else:
            self.num_bytes = len(data) + COPIES_BESIDE * num_bytes
            self._values = dict(left)
            wrapped = [runtime.OrtValue.ortvalue_from_numpy(v) for v in self._values.values()]
            settings.add_external_initializers(list(self._values), wrapped)
        ready.values.clear()
        del left
        try:
            self._session = runtime.InferenceSession(
                data,
                settings,
                providers=list(providers),
                enable_fallback=0,  # a provider is a demand, never a hint
                read_config_from_model=0,
            )
        except Exception as error:  # those of the runtime have no class in common
            raise GraphError(
                f"ONNX Runtime {runtime.__version__} refuses the graph for "
                f"{listed(model.bit_widths)} bits ({first_line(error)}); pack the model again, "
                "or install a newer one."
            ) from error
        # Kept by the package for a second session on other providers, which is never made here.
        self._session._model_bytes = None
        _require_used(self.provider_names, self._session.get_providers())
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        check_ports(graph, (node.name for node in inputs), (node.name for node in outputs))

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""
        try:
            outputs: list[Array] = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise GraphError(
                f"ONNX Runtime failed to compute the graph ({first_line(error)}); try other "
                "providers or a smaller batch."
            ) from error
        return outputs


def check_onnxruntime(options: SessionOptions) -> None:
    """Whether ONNX Runtime and its providers are there.

    Raises:
        EngineError: If a provider is not.
        ImportError: If ONNX Runtime is not installed.
    """
    available = onnxruntime().get_available_providers()
    asked = _names(_providers(options))
    missing = [name for name in asked if name not in available]
    if missing or not asked:
        raise EngineError(
            f"the providers {listed(missing)} were asked for, but this ONNX Runtime has "
            f"{listed(available)}; give some of those, or install a build that has more."
        )


def is_cpu(options: SessionOptions) -> bool:
    """Whether it is the runtime's CPU that computes."""
    return _names(_providers(options))[:1] == (CPU,)


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


def _providers(options: SessionOptions) -> Sequence[Provider]:
    return (CPU,) if options.providers is None else options.providers


def _names(providers: Sequence[Provider]) -> tuple[str, ...]:
    """Without their own options."""
    return tuple(p if isinstance(p, str) else p[0] for p in providers)


def _require_used(asked: Sequence[str], used: Sequence[str]) -> None:
    """Some builds know a provider whose libraries this machine has not."""
    missing = [name for name in asked if name not in used]
    if missing:
        raise EngineError(
            f"ONNX Runtime cannot start {listed(missing)} here and would use {listed(used)}; ask "
            "for those, or install the libraries that it needs."
        )
