"""How much each bit-width counts, as a user says it."""

from collections.abc import Mapping, Sequence
from numbers import Real

from plyweight.errors import BitWidthError, LayeringError

__all__ = ["checked_weights"]


def checked_weights(
    weights: Mapping[int, float] | None, bit_widths: Sequence[int]
) -> dict[int, float]:
    """A number for each of ``bit_widths``, in their order; 1 for each where ``weights`` is None.

    Raises:
        BitWidthError: If ``weights`` names a bit-width that is not there.
        LayeringError: If it is no mapping, lacks one, has one that is negative or not finite, or
            all are 0.
    """
    if weights is None:
        return dict.fromkeys(bit_widths, 1.0)
    if not isinstance(weights, Mapping):
        raise LayeringError(f"weights is {weights!r}; give a mapping such as {{2: 2.0, 8: 1.0}}.")
    for bit_width, weight in weights.items():
        if bit_width not in bit_widths:
            raise BitWidthError(bit_width, stored=bit_widths, where="the model")
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < float("inf"):
            raise LayeringError(f"weights[{bit_width}] is {weight!r}; give a number of 0 or more.")
    if any(b not in weights for b in bit_widths) or not sum(weights.values()) > 0:
        raise LayeringError(
            f"weights is {dict(weights)}; give one for each of {tuple(bit_widths)}, not all of "
            "them 0."
        )
    return {b: float(weights[b]) for b in bit_widths}
