"""Choosing the bit-width a model computes at, and keeping it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn.lease import change, leased_parts, leases_of
from plyweight.nn.swap import unwrapped
from plyweight.quantizers import Switchable

__all__ = [
    "at_bit_width",
    "bit_widths_of",
    "lease",
    "set_bit_width",
    "switch",
    "switchable_modules",
]


def switchable_modules(model: nn.Module) -> list[Switchable]:
    """The modules of ``model`` that compute differently at each bit-width.

    Raises:
        LayeringError: If there is none.
    """
    return _switchable_among(model.modules(), model)


def _switchable_among(modules: Iterable[nn.Module], model: nn.Module) -> list[Switchable]:
    found = [module for module in modules if isinstance(module, Switchable)]
    if not found:
        raise LayeringError(
            f"{type(model).__name__} has no bit-widths; get a layered copy from "
            "plyweight.prepare(model, bit_widths) or plyweight.load(file, model)."
        )
    return found


def bit_widths_of(model: nn.Module) -> tuple[int, ...]:
    """The bit-widths that ``model`` can compute at now, ascending."""
    return _common(switchable_modules(model))


def set_bit_width(model: nn.Module, bit_width: int) -> None:
    """Let ``model`` compute at ``bit_width`` from now on. Nothing is fetched or freed.

    Other threads may compute with a loaded model meanwhile: their calls that are under way end at
    the bit-width they began with, and this one waits for them.

    Raises:
        BitWidthError: If ``model`` does not have that bit-width; it keeps the one it had.
        LayeringError: If this thread holds a lease of the model (see :func:`lease`).
    """
    everything = list(model.modules())  # once: looking through it is most of what a switch takes
    modules = _switchable_among(everything, model)
    _require(model, modules, bit_width)  # before anybody waits
    loaded = leased_parts(everything)
    if loaded == [model]:  # mostly
        change(model, partial(_switch_required, model, modules, bit_width))
        return
    # One after another: who holds the lease of one may be asking for that of the next.
    for part in loaded:
        change(part, partial(switch, part, bit_width))
    inside = {module for part in loaded for module in part.modules()}
    _switch_all([module for module in modules if module not in inside], bit_width)


def switch(model: nn.Module, bit_width: int) -> None:
    """:func:`set_bit_width` that waits for nobody.

    Raises:
        BitWidthError: If ``model`` does not have that bit-width; it keeps the one it had.
    """
    _switch_required(model, switchable_modules(model), bit_width)


@contextmanager
def at_bit_width(model: nn.Module, bit_width: int) -> Iterator[None]:
    """Compute at ``bit_width`` inside the ``with`` block, then at the earlier bit-width again.

    Run the backward pass inside too: modules under activation checkpointing run forward again.
    It is the model that changes, for the calls of other threads as well.
    """
    before = switchable_modules(model)[0].bit_width
    set_bit_width(model, bit_width)
    try:
        yield
    finally:
        set_bit_width(model, before)


@contextmanager
def lease(model: nn.Module) -> Iterator[int]:
    """Keep a loaded model as it is inside the ``with`` block; gives its bit-width.

    Every call of a loaded model holds a lease by itself, so that ``set_bit_width``, ``upgrade``
    and ``downgrade`` in other threads wait until it ends. This is for what takes several calls at
    one bit-width (a metric over a data set, a generation loop), for what reads the model
    (``state_dict``, ``copy.deepcopy``), and for calls that hold none: those of what
    ``torch.compile(model)`` returned (of a model compiled in place by ``model.compile()`` they
    do), of ``model.forward`` and of ``nn.DataParallel``.

    Leases of one thread nest. Do not wait inside for another thread that calls the model: where
    a change is waiting for this lease, that thread waits for the change.

    Raises:
        LayeringError: If the model is not one from :func:`plyweight.load` in packed form.
    """
    model = unwrapped(model)
    leases = leases_of(model)
    if leases is None:
        raise LayeringError(
            f"this {type(model).__name__} has no leases; give the very model that "
            "plyweight.load(file, model) returned, in packed form."
        )
    with leases.hold():
        yield switchable_modules(model)[0].bit_width


def _switch_required(model: nn.Module, modules: Sequence[Switchable], bit_width: int) -> None:
    _require(model, modules, bit_width)
    _switch_all(modules, bit_width)


def _common(modules: Sequence[Switchable]) -> tuple[int, ...]:
    """The bit-widths that all ``modules`` have, ascending."""
    return tuple(sorted(set.intersection(*(set(m.available_bit_widths) for m in modules))))


def _require(model: nn.Module, modules: Sequence[Switchable], bit_width: int) -> None:
    available = _common(modules)
    if type(bit_width) is not int or bit_width not in available:
        trained = {b for module in modules for b in module.model_bit_widths.tolist()}
        is_known = type(bit_width) is int and bit_width in trained
        advice = "Upgrade the model to it first." if is_known else ""
        where = f"this {type(model).__name__}"
        raise BitWidthError(bit_width, stored=available, where=where, advice=advice)


def _switch_all(modules: Sequence[Switchable], bit_width: int) -> None:
    before = [module.bit_width for module in modules]
    try:
        for module in modules:
            module.switch(bit_width)
    except BaseException:  # interrupted: not some at one and some at the other
        for module, earlier in zip(modules, before, strict=True):
            module.switch(earlier)
        raise
