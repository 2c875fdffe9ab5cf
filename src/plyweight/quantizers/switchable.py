"""Modules that compute differently at each bit-width of the model.

The chosen bit-width lives in a small tensor (``row``) rather than in a Python number, so that
``torch.compile`` makes one graph that serves every bit-width: a graph per bit-width would pass its
limit of eight recompilations and fall back to eager.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plyweight.codec import MAX_BIT_WIDTH
from plyweight.errors import BitWidthError, LayeringError, ModelMismatchError, listed

__all__ = ["Switchable", "checked_bit_widths"]


def checked_bit_widths(bit_widths: Sequence[int]) -> tuple[int, ...]:
    """``bit_widths`` as an ascending tuple.

    Raises:
        LayeringError: If they are empty, repeated, not ascending, or not integers of 1 to 8.
    """
    if isinstance(bit_widths, (str, bytes)) or not isinstance(bit_widths, Sequence):
        raise LayeringError(
            f"bit_widths is {bit_widths!r}; give a sequence of integers such as (2, 4, 8)."
        )
    widths = tuple(bit_widths)
    if any(type(b) is not int or not 1 <= b <= MAX_BIT_WIDTH for b in widths):
        raise LayeringError(f"bit_widths is {widths}; each must be an integer of 1 to 8.")
    if not widths or list(widths) != sorted(set(widths)):
        raise LayeringError(
            f"bit_widths is {widths}; give at least one, ascending and each only once."
        )
    return widths


class Switchable(nn.Module):
    """A module whose computation depends on the bit-width of the model.

    Attributes:
        settings: the buffers that a state dict must agree with, for nothing else is made for them.
        bit_width: the bit-width of the *model* that is chosen now.
        model_bit_widths: those of the model, uint8 ``(num,)``; part of the state dict, so that
            a checkpoint says by itself what it was trained for.
        pinned: the bit-width below which this module never goes, uint8, 0 for none; likewise.
        own_bit_widths: those this module takes, ``max(b, pinned)`` for every ``b``, ascending.
        row: int64 scalar, the position of the current one in ``own_bit_widths``.
        model_row: int64 scalar, that of ``bit_width`` in ``model_bit_widths``. They differ where
            the module is pinned: its weight stays the same, but its inputs do not.
    """

    settings: ClassVar[tuple[str, ...]] = ("model_bit_widths", "pinned")

    bit_width: int
    model_bit_widths: Tensor
    pinned: Tensor
    row: Tensor
    model_row: Tensor
    own_bit_widths: tuple[int, ...]

    def make_switchable(
        self, bit_widths: Sequence[int], *, pinned: int = 0, device: torch.device | None = None
    ) -> None:
        """Add the state above. Not in ``__init__``, for a float module may become switchable."""
        widths = checked_bit_widths(bit_widths)
        as_tensor = torch.tensor(widths, dtype=torch.uint8, device=device)
        self.register_buffer("model_bit_widths", as_tensor)
        self.register_buffer("pinned", torch.tensor(pinned, dtype=torch.uint8, device=device))
        row = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("model_row", row.clone(), persistent=False)
        self.own_bit_widths = tuple(sorted({max(b, pinned) for b in widths}))
        self._rows = {b: self.own_bit_widths.index(max(b, pinned)) for b in widths}
        self.switch(widths[-1])

    @property
    def available_bit_widths(self) -> tuple[int, ...]:
        """The bit-widths of the model that can be chosen now, ascending."""
        return tuple(self._rows)

    def switch(self, bit_width: int) -> None:
        """Compute at ``bit_width`` (of the model) from now on."""
        if bit_width not in self._rows:
            raise BitWidthError(bit_width, stored=tuple(self._rows), where=type(self).__name__)
        self.bit_width = bit_width
        # Where buffers are: a module that has to look for them takes longer than to write them.
        self._buffers["row"].fill_(self._rows[bit_width])  # type: ignore[union-attr]
        self._buffers["model_row"].fill_(list(self._rows).index(bit_width))  # type: ignore[union-attr]

    def own_bit_width(self, bit_width: int) -> int:
        """What this module takes where the model is at ``bit_width``: that, or its pin."""
        return self.own_bit_widths[self._rows[bit_width]]

    def row_parameters(self) -> list[nn.Parameter]:
        """The parameters whose first dimension is the own bit-widths: one row for each."""
        return []

    def row_of(self, table: Tensor) -> Tensor:
        """The entry of ``table`` (its first dimension: own bit-widths) for the current one."""
        return _entry(table, self.row)

    def model_row_of(self, table: Tensor) -> Tensor:
        """The entry of ``table`` (its first dimension: bit-widths of the model) for this one."""
        return _entry(table, self.model_row)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.settings:
            mine, theirs = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(theirs, Tensor) and theirs.flatten().tolist() != mine.flatten().tolist():
                raise ModelMismatchError(
                    artifact_only=[f"{prefix}{name} = {listed(theirs.flatten().tolist())}"],
                    model_only=[f"{prefix}{name} = {listed(mine.flatten().tolist())}"],
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _entry(table: Tensor, position: Tensor) -> Tensor:
    # Cloned, for autograd keeps the index and `switch` may come before the backward pass.
    return table.index_select(0, position.clone().view(1)).squeeze(0)
