"""Results that belong together: who hears of them one by one may wait for the last one.

A thread that wakes another one for the first of many results has to contend with it for the lock of Python
while it gives the others, and the other wakes several times instead of once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Burst(threading.local):
    calls: list[Callable[[], object]] | None = None


_burst = _Burst()


@contextmanager
def burst() -> Iterator[None]:
    """While the block runs, what is given to `after_burst` in this thread waits for its end."""
    calls: list[Callable[[], object]] = []
    before, _burst.calls = _burst.calls, calls
    try:
        yield
    finally:
        _burst.calls = before
        for call in calls:
            call()


def after_burst(call: Callable[[], object]) -> None:
    """Calls a function at the end of the burst in this thread; at once if there is none."""
    if _burst.calls is None:
        call()
    else:
        _burst.calls.append(call)
