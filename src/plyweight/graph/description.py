"""Description: what ``layered.io`` says of a model, so that others can feed it."""

from collections.abc import Mapping, Sequence
from typing import Any

from plyweight.artifact import Graph, Port
from plyweight.errors import LayeringError

__all__ = ["described"]


def described(
    graph: Graph | None, preprocessing: Mapping[str, Any] | None, labels: Sequence[str] | None
) -> dict[str, Any] | None:
    """``layered.io``: ``inputs`` and ``outputs`` of the graph, ``preprocessing``, ``labels``.

    Args:
        graph: None if the artifact has none.
        preprocessing: what inputs are made of data with; strings, integers, lists and mappings.
        labels: what the last dimension of the first output stands for.

    Returns:
        None where there is nothing to say.

    Raises:
        LayeringError: If an argument is wrong.
    """
    io: dict[str, Any] = {}
    if graph is not None:
        io["inputs"] = [_port(port) for port in graph.inputs]
        io["outputs"] = [_port(port) for port in graph.outputs]
    if preprocessing is not None:
        if not isinstance(preprocessing, Mapping):
            raise LayeringError(f"preprocessing is {preprocessing!r}; give a mapping or None.")
        io["preprocessing"] = _plain("preprocessing", preprocessing)
    if labels is not None:
        io["labels"] = _checked_labels(labels, graph)
    return io or None


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def _plain(what: str, value: object) -> Any:
    """``value`` as plain JSON values; it has none that the header refuses."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise LayeringError(f"{what} has keys that are no texts.")
        return {key: _plain(f"{what}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{what}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise LayeringError(
        f"{what} is {value!r}; give texts, integers of 0 or more, lists and mappings, and "
        "fractions as decimal texts such as '0.485'."
    )


def _checked_labels(labels: object, graph: Graph | None) -> list[str]:
    if (
        isinstance(labels, str)
        or not isinstance(labels, Sequence)
        or not all(isinstance(label, str) for label in labels)
        or not labels
    ):
        raise LayeringError(f"labels is {labels!r}; give a sequence of texts, or None.")
    shape = graph.outputs[0].shape if graph is not None else ()
    if shape and isinstance(shape[-1], int) and shape[-1] != len(labels):
        raise LayeringError(
            f"there are {len(labels)} labels, but the model tells {shape[-1]} classes apart; give "
            "one label for each."
        )
    return list(labels)
