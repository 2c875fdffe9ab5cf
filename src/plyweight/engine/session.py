"""Session: a graph with one bit-width's values in its slots, ready to answer.

A runtime is behind one small protocol; ``backends`` lists those there are. What is the same for all
of them is here: how to compute, and whether a model is one that may be given to a runtime.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from plyweight.artifact import Graph
from plyweight.engine.onnx_model import Declared
from plyweight.errors import GraphError, listed

__all__ = [
    "Provider",
    "Session",
    "SessionOptions",
    "check_declared",
    "check_model",
    "check_ports",
    "first_line",
    "num_bytes_of",
]

Array = NDArray[Any]
Provider = str | tuple[str, Mapping[str, object]]


class Session(Protocol):
    """A graph at one bit-width. Any number of threads may run it at a time."""

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes, activations not counted."""
        ...

    @property
    def provider_names(self) -> tuple[str, ...]:
        """The parts of the runtime that compute, the preferred one first."""
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
        providers: of the runtime, the preferred one first; None for its CPU.
        threads: that one request is spread over; None for as many as the runtime chooses.
    """

    def __init__(self, providers: Sequence[Provider] | None, threads: int | None) -> None:
        self.providers: tuple[Provider, ...] | None
        self.providers = None if providers is None else tuple(providers)
        self.threads = threads


def check_model(declared: Mapping[str, Declared], values: Mapping[str, Array]) -> None:
    """Whether a model's slots are those of ``values``, in dtype and shape.

    Args:
        declared: what :func:`~plyweight.engine.onnx_model.external_initializers` found.
        values: by slot.

    Raises:
        GraphError: If not.
    """
    for name in sorted(declared.keys() ^ values.keys()):
        has, has_not = ("model", "list") if name in declared else ("list", "model")
        raise GraphError(
            f"the graph's {has} has a slot {name!r}, but its {has_not} has not; pack the model "
            "again."
        )
    for name, there in declared.items():
        check_declared(name, there, Declared(values[name].dtype.name, values[name].shape))


def check_declared(name: str, there: Declared | None, given: Declared) -> None:
    """Whether the slot ``name`` is what an artifact fills it with.

    Raises:
        GraphError: If not, or if it is not in the model.
    """
    if there is None:
        raise GraphError(f"the graph's model has no slot {name!r}; pack the model again.")
    if there != given:
        raise GraphError(
            f"the graph's model has {there.dtype} of shape {list(there.shape)} for {name!r}, "
            f"but the artifact gives {given.dtype} of shape {list(given.shape)}; pack the "
            "model again."
        )


def check_ports(graph: Graph, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Whether the model takes and gives what the graph says.

    Args:
        graph: that names them.
        inputs: names that the runtime found in the model.
        outputs: the same.

    Raises:
        GraphError: If not.
    """
    for what, ports, there in (
        ("inputs", graph.inputs, list(inputs)),
        ("outputs", graph.outputs, list(outputs)),
    ):
        said = [port.name for port in ports]
        if sorted(said) != sorted(there):
            raise GraphError(
                f"the graph names the {what} {listed(said)}, but its model has {listed(there)}; "
                "pack the model again."
            )


def num_bytes_of(values: Mapping[str, Array]) -> int:
    """Bytes of the arrays, each counted once."""
    return sum({id(value): value.nbytes for value in values.values()}.values())


def first_line(error: Exception) -> str:
    """What a runtime says is wrong, without its traces."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
