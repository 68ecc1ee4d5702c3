"""A lock that goes to the thread that has waited longest.

A `threading.Lock` may be taken again by the thread that has just released it: a thread that generates tokens
in a loop would keep the others waiting for its whole answer."""

from __future__ import annotations

import threading
from types import TracebackType


class FairLock:
    """Used as `with lock:`. The thread that holds it may take it again, as with `threading.RLock`."""

    def __init__(self) -> None:
        # One thread at a time waits for `_turn`, within the door. A thread that releases `_turn` and wants it
        # again has to pass the door, which the waiting thread leaves only once it has `_turn`.
        self._door, self._turn = threading.RLock(), threading.RLock()

    def __enter__(self) -> None:
        if self._turn._is_owned():  # type: ignore[attr-defined]  # threading.Condition asks in the same way
            self._turn.acquire()
            return
        with self._door:
            self._turn.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._turn.release()
