"""Which bit-widths a training step visits."""

import random
from collections.abc import Sequence
from typing import Any, Protocol

from plyweight.errors import LayeringError

__all__ = ["AllBitWidths", "Sampler", "Sandwich", "sampler_named"]


class Sampler(Protocol):
    """Chooses the bit-widths of a step; ``state_dict`` makes a resumed run choose the same."""

    def sample(self, bit_widths: Sequence[int]) -> tuple[int, ...]:
        """The bit-widths to visit, a subset of ``bit_widths`` (ascending), the widest included."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain values, so that ``weights_only`` loads it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""


class AllBitWidths:
    """Every bit-width in every step."""

    def sample(self, bit_widths: Sequence[int]) -> tuple[int, ...]:
        """All of ``bit_widths``."""
        return tuple(bit_widths)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class Sandwich:
    """The sandwich rule: the widest, the narrowest, and ``num_random`` of those between.

    Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques" (ICCV 2019).
    """

    def __init__(self, num_random: int = 1, *, seed: int = 0) -> None:
        if type(num_random) is not int or num_random < 0:
            raise LayeringError(f"num_random is {num_random!r}; give an integer of 0 or more.")
        self.num_random = num_random
        self._random = random.Random(seed)

    def sample(self, bit_widths: Sequence[int]) -> tuple[int, ...]:
        """The ends of ``bit_widths`` and a few between, ascending."""
        between = list(bit_widths[1:-1])
        chosen = self._random.sample(between, min(self.num_random, len(between)))
        return tuple(sorted({bit_widths[0], bit_widths[-1], *chosen}))

    def state_dict(self) -> dict[str, Any]:
        """The state of the random generator."""
        version, state, gauss = self._random.getstate()
        return {"random": [version, list(state), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same random choices."""
        version, inner, gauss = state["random"]
        self._random.setstate((version, tuple(inner), gauss))


def sampler_named(sampling: str | Sampler) -> Sampler:
    """The sampler itself, or the one of that name: "all" or "sandwich".

    Raises:
        LayeringError: If there is none of that name, or it is no sampler.
    """
    if sampling == "all":
        return AllBitWidths()
    if sampling == "sandwich":
        return Sandwich()
    if not isinstance(sampling, str) and callable(getattr(sampling, "sample", None)):
        return sampling
    raise LayeringError(f"sampling is {sampling!r}; give 'all', 'sandwich' or a Sampler.")
