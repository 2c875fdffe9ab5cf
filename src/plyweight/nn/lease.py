"""Leases: a request sees one bit-width from its start to its end.

A request holds a lease; many may be held at once. A change of the model (another bit-width, layers
that come or go) waits until the leases under way have ended, and whoever asks for a lease meanwhile
waits for the change, so neither is kept waiting for ever. The change itself is short: what it takes
was read, verified and brought to its device before.

A lease belongs to the thread that took it, and a thread that holds one takes further ones without
waiting, or it would wait for a change that waits for it. For the same reason nobody may wait, while
holding a lease, for another thread that asks for one.
"""

import copyreg
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock, get_ident
from typing import Any

import torch
from torch import nn

from plyweight.errors import LayeringError
from plyweight.quantizers import Switchable

__all__ = ["Leases", "change", "grant_leases", "leased_parts", "leases_of", "require_no_lease"]


class Leases:
    """Who computes with a model.

    Every lease is a lock that is locked as long as it lasts, and a change waits at these locks.
    What happens to them is ``with`` on a lock and single operations on a dictionary, and CPython
    raises a KeyboardInterrupt before or after such a step, never inside: no lease outlives its
    request, however that ends.

    A copy of a model, by ``copy`` or ``pickle``, starts with none.
    """

    def __init__(self) -> None:
        # Held while a lease is registered, and by a change until it is done. A signal handler may
        # interrupt one thing for the other, so it is not to wait for its own thread.
        self._gate = RLock()
        self._under_way: dict[Lock, int] = {}  # every lease, with its thread

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns, computed under a lease."""
        lock = Lock()
        with lock:
            try:
                self._register(lock)
                return function(*args, **kwargs)
            finally:
                self._under_way.pop(lock, None)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A lease for a ``with`` block.

        Interrupted in the few instructions between it and the block, it ends with the generator:
        when the exception is let go.
        """
        lock = Lock()
        with lock:
            try:
                self._register(lock)
                yield
            finally:
                self._under_way.pop(lock, None)

    def change(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, run while there is no lease.

        Raises:
            LayeringError: If this thread holds a lease.
        """
        self.require_none_here()
        with self._gate:
            while self._under_way:  # again, for those who hold a lease may take further ones
                for lock in list(self._under_way):
                    with lock:
                        self._under_way.pop(lock, None)
            return function()

    def require_none_here(self) -> None:
        """Raise LayeringError if this thread holds a lease, so that a change would wait for it."""
        if self._is_held_here():
            raise LayeringError(
                "this thread holds a lease of the model, and a change of the model waits until "
                "every lease has ended; change it outside of its calls and of "
                "`with plyweight.lease(model)`."
            )

    @property
    def num_under_way(self) -> int:
        """How many leases there are."""
        return len(self._under_way)

    def _register(self, lock: Lock) -> None:
        if self._is_held_here():
            self._under_way[lock] = get_ident()
        else:
            with self._gate:
                self._under_way[lock] = get_ident()

    def _is_held_here(self) -> bool:
        return get_ident() in list(self._under_way.values())  # a list: others come and go

    def __reduce__(self) -> tuple[type["Leases"], tuple[()]]:
        return Leases, ()


def leases_of(model: object) -> Leases | None:
    """The leases of ``model`` if it is one that :func:`grant_leases` was given, or None."""
    leases = getattr(model, "_plyweight_leases", None)
    return leases if isinstance(leases, Leases) else None


def leased_parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of a model's ``modules`` that have leases: mostly the model, or none."""
    return [module for module in modules if "_plyweight_leases" in vars(module)]


def change(model: nn.Module, function: Callable[[], Any]) -> Any:
    """What ``function`` returns, run while nobody computes with ``model``, which has leases.

    A lease on a model that lives on an accelerator ends when its work is in the queue, so what is
    queued is waited for too, and what ``function`` adds is done before the next request.

    Raises:
        LayeringError: If this thread holds a lease.
    """

    def alone() -> Any:
        _wait_for_devices(model)
        result = function()
        _wait_for_devices(model)
        return result

    return _required(model).change(alone)


def require_no_lease(model: nn.Module) -> None:
    """Raise LayeringError if this thread holds a lease of ``model``, which has leases."""
    _required(model).require_none_here()


def grant_leases(model: nn.Module) -> None:
    """Let every call of ``model`` hold a lease from now on, in place.

    Its class becomes a subclass of the same name, for it is the call as a whole that needs the
    lease, hooks and all. A ``forward`` set on the instance would be copied into the replicas of
    ``nn.DataParallel``, and compute with the weights of the original there; it would have to refer
    to its model, which then is not freed with its last reference; and a hook that ends a lease
    does not run after a KeyboardInterrupt.
    """
    model._plyweight_leases = Leases()  # type: ignore[assignment]
    base: Any = type(model)
    model.__class__ = _leased_class(base)


@functools.cache  # so that models of one class still are, and pickle finds it again
def _leased_class(base: Any) -> Any:  # a class of modules to one
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        # What is traced is computed later; the lease is for the one who runs it.
        if torch.compiler.is_compiling():
            return base.__call__(self, *args, **kwargs)
        return self._plyweight_leases.run(base.__call__, self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, max(protocol, 2))
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is leased:  # type: ignore[attr-defined]
            return (_new, (base, *reduced[1][1:]), *reduced[2:])
        return reduced

    def replicate(self: Any) -> nn.Module:
        # A replica lives as long as a call, made under a lease or not at all: one that waited for
        # a change in a thread of its own would be waited for by the thread that holds the lease.
        replica: nn.Module = base._replicate_for_data_parallel(self)
        replica.__class__ = base
        return replica

    own = {
        "__call__": call,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
        "_replicate_for_data_parallel": replicate,
    }
    leased = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(own))
    return leased


def _new(base: Any, *args: Any) -> nn.Module:
    """An instance as ``copy`` and ``pickle`` make it, before it has its state."""
    leased = _leased_class(base)
    instance: nn.Module = leased.__new__(leased, *args)
    return instance


def _required(model: nn.Module) -> Leases:
    leases = leases_of(model)
    assert leases is not None
    return leases


def _wait_for_devices(model: nn.Module) -> None:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        devices = {m.row.device for m in model.modules() if isinstance(m, Switchable)}
        for device in devices:
            if device.type == accelerator.type:
                torch.accelerator.synchronize(device)
