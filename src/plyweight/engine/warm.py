"""Warm widths: sessions that are ready, and who computes with which.

A request takes the session that is current when it comes and keeps it to its end, so a change of
the bit-width neither waits for it nor mixes into it. A session leaves when too many bytes are warm
(the one least recently current first), or when its bit-width is given back; then the memory is
free as soon as the last request with it has ended, and :meth:`WarmWidths.drop` waits for that.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from plyweight.engine.forms import Form
from plyweight.engine.session import Session
from plyweight.errors import EngineError

__all__ = ["Warm", "WarmWidths"]


@dataclass(eq=False)
class Warm:
    """A session, its bit-width, the forms of its modules, and how many requests are in it now."""

    bit_width: int
    session: Session
    forms: Mapping[str, Form]
    num_requests: int = 0


class WarmWidths:
    """The sessions that are ready, of which one is current.

    Args:
        most_bytes: that the sessions beside the current one may take.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._by_width: OrderedDict[int, Warm] = OrderedDict()  # the current one last
        self._leaving: list[Warm] = []
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def current(self) -> Warm:
        """That which the next request takes.

        Raises:
            EngineError: If the engine is closed.
        """
        with self._changed:
            return self._current()

    def all(self) -> tuple[Warm, ...]:
        """Every session that is ready, the current one first, then by last use."""
        with self._changed:
            return tuple(reversed(self._by_width.values()))

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """What the current session gives; it stays until that is there.

        Raises:
            EngineError: If the engine is closed.
            GraphError: If the runtime fails.
        """
        with self._changed:
            warm = self._current()
            warm.num_requests += 1
        try:
            return warm.session.run(feeds)
        finally:
            with self._changed:
                warm.num_requests -= 1
                if not warm.num_requests:
                    self._changed.notify_all()

    def switch(self, bit_width: int) -> bool:
        """Make that one current, if it is ready; whether it is."""
        with self._changed:
            self._require_open()
            if bit_width not in self._by_width:
                return False
            self._by_width.move_to_end(bit_width)
            return True

    def install(self, bit_width: int, session: Session, forms: Mapping[str, Form]) -> None:
        """Make a new session current; the oldest ones leave for it where there is no room.

        Raises:
            EngineError: If the engine is closed.
        """
        with self._changed:
            self._require_open()
            self._by_width[bit_width] = Warm(bit_width, session, forms)
            self._by_width.move_to_end(bit_width)
            others = list(self._by_width.values())[-2::-1]
            room, leaving = self.most_bytes, []
            for warm in others:
                room -= warm.session.num_bytes
                if room < 0:
                    leaving.append(warm.bit_width)
            for width in leaving:
                self._let_go(width)

    def drop(self, is_dropped: Callable[[int], bool]) -> None:
        """Let go of the bit-widths for which that holds, and wait for requests with them."""
        with self._changed:
            for width in [width for width in self._by_width if is_dropped(width)]:
                self._let_go(width)
            dropped = [warm for warm in self._leaving if is_dropped(warm.bit_width)]
            self._changed.wait_for(lambda: not any(warm.num_requests for warm in dropped))
            self._leaving = [warm for warm in self._leaving if warm not in dropped]
        for warm in dropped:
            del warm.session  # the threads of those requests may hold ``warm`` for a moment more

    def close(self) -> None:
        """Let no request in any more, and wait for those under way."""
        with self._changed:
            self._is_closed = True
        self.drop(lambda _: True)

    def _let_go(self, bit_width: int) -> None:
        """Keep a session only for the requests that compute with it."""
        self._leaving = [warm for warm in self._leaving if warm.num_requests]
        self._leaving.append(self._by_width.pop(bit_width))

    def _current(self) -> Warm:
        self._require_open()
        return next(reversed(self._by_width.values()))

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("the engine is closed; open the artifact again.")
