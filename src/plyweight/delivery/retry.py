"""Retry: how long to wait before another attempt, and when it is enough.

    wait = uniform(0, min(MOST_S, FIRST_S * 2 ** failures))     and never less than Retry-After

The wait is drawn from the whole interval ("full jitter"), so that devices which failed together do
not come back together. It is enough when ``patience_s`` pass without one byte that was wanted:
a slow link is no reason to give up, a dead one is.
"""

import random
import threading
import time
from collections.abc import Callable

from plyweight.errors import LayeringError, TransferError

__all__ = ["Patience"]

FIRST_S, MOST_S = 0.5, 30.0


class Patience:
    """The waits of one download; its threads share it.

    Args:
        patience_s: after which it is enough, counted from the last byte that was wanted.
        clock: seconds that only go forward.
        draw: a number in [0, 1), another one at every call.

    Raises:
        LayeringError: If the time is not a positive number.
    """

    def __init__(
        self,
        patience_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < patience_s < float("inf"):
            raise LayeringError(f"patience_s is {patience_s!r}; give a positive number.")
        self.patience_s = patience_s
        self._clock, self._draw = clock, draw
        self._lock = threading.Lock()
        self._last_progress = clock()

    def progressed(self) -> None:
        """A byte that was wanted has arrived: the deadline starts anew."""
        with self._lock:
            self._last_progress = self._clock()

    def wait_s(self, failures: int, error: TransferError) -> float:
        """How long to wait after ``failures`` attempts in a row, of which ``error`` was the last.

        Raises:
            TransferError: If it is enough, or the server asks for more than what is left.
        """
        with self._lock:
            left = self._last_progress + self.patience_s - self._clock()
        if left <= 0:
            raise TransferError(
                f"nothing arrived for {self.patience_s:g} s; the last attempt says: {error} What "
                "was verified is kept, so run it again to continue."
            ) from error
        asked = error.retry_after_s or 0.0
        if asked > left:
            raise TransferError(
                f"the server asks to wait for {asked:g} s, longer than the {self.patience_s:g} s "
                "allowed without progress. What was verified is kept, so run it again then.",
                retry_after_s=asked,
            ) from error
        drawn = self._draw() * min(MOST_S, FIRST_S * 2.0 ** min(failures, 16))
        return max(asked, min(drawn, left))

    def pause(self, failures: int, error: TransferError) -> None:
        """Wait that long.

        Raises:
            TransferError: If it is enough.
        """
        time.sleep(self.wait_s(failures, error))
