"""Inputs: what a caller gives, against what the graph takes; nothing is converted silently."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plyweight.artifact import Port
from plyweight.errors import InputError, listed

__all__ = ["check_inputs", "described"]


def check_inputs(ports: Sequence[Port], inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """``inputs`` as C-contiguous arrays, once they have the names, dtypes and shapes of ``ports``.

    A dimension that has a name may have any length of 1 or more, the same wherever it is named.

    Raises:
        InputError: If one is not.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"the inputs are a {type(inputs).__name__}; give a dictionary of arrays by name: "
            f"{_expected(ports)}."
        )
    names = [port.name for port in ports]
    if list(inputs) != names and set(inputs) != set(names):
        wrong = [repr(name) for name in inputs if name not in names]
        found = f"{listed(wrong)} is no input" if wrong else "too few inputs were given"
        raise InputError(f"{found}; the model expects {_expected(ports)}.")
    lengths: dict[str, int] = {}
    return {port.name: _checked(port, inputs[port.name], lengths) for port in ports}


def described(port: Port) -> str:
    """``input: float32 (batch, 3, 32, 32)``."""
    return f"{port.name}: {port.dtype} ({', '.join(map(str, port.shape))})"


def _expected(ports: Sequence[Port]) -> str:
    return "; ".join(map(described, ports))


def _checked(port: Port, value: Any, lengths: dict[str, int]) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:  # a ragged list, a tensor on a GPU
        raise InputError(
            f"input {port.name!r} is no array ({error}); the model expects {described(port)}."
        ) from error
    if array.dtype != np.dtype(port.dtype):
        raise InputError(
            f"input {port.name!r} is {array.dtype}; the model expects {described(port)}, so give "
            f"x.astype({port.dtype!r}) if its values are right."
        )
    if not _fits(array.shape, port, lengths):
        known = ", ".join(f"{name} = {length}" for name, length in lengths.items())
        raise InputError(
            f"input {port.name!r} has shape {array.shape}; the model expects {described(port)}"
            f"{f' where {known}' if known else ''}."
        )
    return np.ascontiguousarray(array)


def _fits(shape: tuple[int, ...], port: Port, lengths: dict[str, int]) -> bool:
    if len(shape) != len(port.shape):
        return False
    for length, dim in zip(shape, port.shape, strict=True):
        wanted = lengths.setdefault(dim, length) if isinstance(dim, str) else dim
        if length != wanted or not length:
            return False
    return True
