"""Turns: how long a call takes after others, whose threads may still be awake.

Two threads on two cores are easily disturbed, so every variant gets the same treatment whenever it
has its turn:

    nothing runs    the threads of ONNX Runtime spin for 40 ms after a request, and those of the
                    variant before would take a core from this one
    calls that are  a thread that wakes up may share the caller's core until the system moves it,
    not timed       which takes up to 80 ms
    calls that are
"""

import time
from collections.abc import Callable

__all__ = ["seconds", "turn"]

LOOK_S, IDLE_S, PATIENCE_S = 0.003, 0.0003, 1.0  # idle: at most so much CPU time in one look
SETTLING_S, TIMED_S, TIMED = 0.1, 0.02, 3  # at least so long, and at least so many calls


def turn(call: Callable[[], object]) -> list[float]:
    """The seconds of each of the calls that are timed."""
    _wait_until_idle()
    _repeated(call, for_s=SETTLING_S, at_least=1)
    return _repeated(call, for_s=TIMED_S, at_least=TIMED)


def seconds(call: Callable[[], object]) -> float:
    """That ``call`` takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _wait_until_idle() -> None:
    """Until no thread of this process runs, or for as long as one can bear."""
    end = time.perf_counter() + PATIENCE_S
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(LOOK_S)
        if time.process_time() - before < IDLE_S:
            return


def _repeated(call: Callable[[], object], *, for_s: float, at_least: int) -> list[float]:
    found: list[float] = []
    end = time.perf_counter() + for_s
    while len(found) < at_least or time.perf_counter() < end:
        found.append(seconds(call))
    return found
