"""Waiting for sockets: looking again and again for a while, then sleeping."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Iterator, Sequence

from .errors import MissingDependencyError

Wait = Callable[[Sequence[int], float, float | None], int]

GAVE_UP = 1 << 16
"""Added to what a wait returns if another program had this core meanwhile, so that looking is no use."""
SPIN_SECONDS = 0.01
"""The longest time for which `Spin` looks again and again."""
CALM_WAITS = 100
"""How many waits it does not look after another program had the core. A thread that sleeps is woken in the
midst of that program's time; one that never sleeps has used up its own."""


def waiter() -> Wait:
    """A function `wait(handles, spin_s, wait_s)`, which returns when one of the sockets or pipes (file
    descriptors, at most 64) can be read, and after `wait_s` seconds (never for None) otherwise. It returns
    how many can be read, plus GAVE_UP if another program had this core meanwhile.

    For the first `spin_s` seconds the thread looks again and again without holding the interpreter's lock,
    since a thread that sleeps wakes tens of microseconds late on a core that has cooled down. Without the C
    library it sleeps at once."""
    try:
        from .backends._abi import ffi
        from .backends.native import library

        call = library().shoal_wait
    except MissingDependencyError:
        return _sleeping

    def wait(handles: Sequence[int], spin_s: float, wait_s: float | None) -> int:
        found: int = call(
            ffi.new("int32_t[]", handles),
            len(handles),
            int(spin_s * 1e9),
            -1 if wait_s is None else math.ceil(max(0.0, wait_s) * 1e9),
        )
        return found

    return wait


class Spin:
    """Looks for data on sockets for a while, where the waits of late were short, and no other program wants
    the core."""

    def __init__(self, wait: Wait) -> None:
        self._wait = wait
        self._calm = 0
        self._pause = 0.0
        """Seconds of a wait, of late."""

    def looks(self, handles: Sequence[int], every: float, until: float = math.inf) -> Iterator[None]:
        """Ends when a handle can be read, or when it is better to sleep; yields every so many seconds.
        `until` is by time.perf_counter."""
        if self._calm:
            self._calm -= 1
            return
        if self._pause > SPIN_SECONDS:
            return
        end = min(until, time.perf_counter() + SPIN_SECONDS)
        while (left := end - time.perf_counter()) > 0:
            ready = self._wait(handles, every, min(every, left))
            if ready >= GAVE_UP:
                self._calm = CALM_WAITS
            if ready:
                return
            yield

    def waited(self, seconds: float) -> None:
        """Learns how long a wait was, by looking and sleeping."""
        self._pause += 0.5 * (min(seconds, 2 * SPIN_SECONDS) - self._pause)


def _sleeping(handles: Sequence[int], spin_s: float, wait_s: float | None) -> int:
    watch = select.poll()
    for handle in handles:
        watch.register(handle, select.POLLIN)
    return len(watch.poll(None if wait_s is None else math.ceil(max(0.0, wait_s) * 1000)))
