"""Choosing the bit-width a model computes at."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from plyweight.errors import BitWidthError, LayeringError
from plyweight.quantizers import Switchable

__all__ = ["at_bit_width", "bit_widths_of", "set_bit_width", "switchable_modules"]


def switchable_modules(model: nn.Module) -> list[Switchable]:
    """The modules of ``model`` that compute differently at each bit-width.

    Raises:
        LayeringError: If there is none.
    """
    found = [module for module in model.modules() if isinstance(module, Switchable)]
    if not found:
        raise LayeringError(
            f"{type(model).__name__} has no bit-widths; get a layered copy from "
            "plyweight.prepare(model, bit_widths) or plyweight.load(file, model)."
        )
    return found


def bit_widths_of(model: nn.Module) -> tuple[int, ...]:
    """The bit-widths that ``model`` can compute at now, ascending."""
    available = [set(module.available_bit_widths) for module in switchable_modules(model)]
    return tuple(sorted(set.intersection(*available)))


def set_bit_width(model: nn.Module, bit_width: int) -> None:
    """Let ``model`` compute at ``bit_width`` from now on. Nothing is fetched or freed.

    Raises:
        BitWidthError: If ``model`` does not have that bit-width; it keeps the one it had.
    """
    modules = switchable_modules(model)
    available = bit_widths_of(model)
    if type(bit_width) is not int or bit_width not in available:
        trained = {b for module in modules for b in module.model_bit_widths.tolist()}
        is_known = type(bit_width) is int and bit_width in trained
        advice = "Upgrade the model to it first." if is_known else ""
        where = f"this {type(model).__name__}"
        raise BitWidthError(bit_width, stored=available, where=where, advice=advice)
    for module in modules:
        module.switch(bit_width)


@contextmanager
def at_bit_width(model: nn.Module, bit_width: int) -> Iterator[None]:
    """Compute at ``bit_width`` inside the ``with`` block, then at the earlier bit-width again.

    Run the backward pass inside too: modules under activation checkpointing run forward again.
    """
    before = switchable_modules(model)[0].bit_width
    set_bit_width(model, bit_width)
    try:
        yield
    finally:
        set_bit_width(model, before)
