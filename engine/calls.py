"""Serialises the calls that several threads make to one stage, in order of arrival, with cancellation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .errors import CancelledRunError

Flag = NDArray[np.int32]
"""Cancel flag `[1]`: 1 once a run is cancelled. The backend reads it between two operations."""


class FairLock:
    """A fair, re-entrant lock: the thread that has waited longest acquires it next.

    A `threading.Lock` can be re-acquired by the thread that has just released it, so a thread that
    generates tokens in a loop would block the others for its whole answer."""

    def __init__(self) -> None:
        # One thread at a time waits for `_turn`, and holds `_door` meanwhile. A thread that releases `_turn`
        # and wants it again needs `_door` first, which the waiting thread releases only once it has `_turn`.
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


class Calls:
    """The state that all calls of one stage share: the lock, the sequences that run, and those that are
    cancelled."""

    def __init__(self, tidy: Callable[[], None], restart: Callable[[list[int]], None]) -> None:
        """`tidy` is called before and after each call. `restart` is called before the first call in a
        forked process, which has no thread but the one that forked, with the sequences that other threads
        were running."""
        self._tidy, self._restart = tidy, restart
        self.closed = False
        self._runs: list[tuple[frozenset[int], Flag]] = []
        self._cancelled: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = FairLock()
        self._busy = False  # read and written by the thread whose turn it is
        self._state = threading.RLock()  # guards _runs and _cancelled; never held while a batch runs

    def check(self) -> None:
        """Checks that calls are possible; restarts threads in a forked process. ValueError: the stage has
        been closed."""
        if self._process != os.getpid():
            lost = [sequence for sequences, _ in self._runs for sequence in sequences]
            self._runs = []
            self._begin()
            if not self.closed:
                self._restart(lost)
        if self.closed:
            raise ValueError("the stage has been closed")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for this thread's turn. Errors: see `check`."""
        self.check()
        with self._lock:
            if self._busy:
                raise RuntimeError("the stage was called from within one of its own calls")
            self.check()
            self._busy = True
            try:
                self._tidy()
                yield
            finally:
                self._tidy()
                self._busy = False

    def tidy(self) -> None:
        """Waits for this thread's turn and tidies. If the garbage collector calls it during a call of this
        thread, that call tidies at its end instead."""
        if self._process != os.getpid():
            return  # the first call in the forked process tidies
        with self._lock:
            if not self._busy:
                self._tidy()

    def close(self, end: Callable[[], None]) -> None:
        """Refuses new calls, and calls `end` once all earlier ones have returned."""
        if self.closed:
            return
        self.check()
        with self._lock:
            if not self.closed:
                self.closed = True
                self._tidy()
                end()

    @contextmanager
    def run(self, sequences: list[int]) -> Iterator[Flag]:
        """Waits for this thread's turn to run these sequences; yields the flag that cancels the run.
        ValueError: a sequence is listed twice, or another thread is running it. CancelledRunError: the run
        was cancelled."""
        mine = frozenset(sequences), np.zeros(1, np.int32)
        if len(mine[0]) != len(sequences):
            raise ValueError("a sequence is in one batch twice")
        self.check()
        with self._state:
            for others, _ in self._runs:
                for sequence in mine[0] & others:
                    raise ValueError(
                        f"sequence {sequence} is being run by another thread: use another sequence number"
                    )
            self._runs.append(mine)
        try:
            with self.alone():
                yield mine[1]
        except CancelledRunError:
            self.forget(sequences)
            raise
        finally:
            with self._state:
                self._runs = [run for run in self._runs if run is not mine]

    def cancel(self, sequence: int | None, known: Iterable[int]) -> None:
        """Sets the cancel flags of the runs that include `sequence`, and remembers it as cancelled. None:
        all runs, and all sequences in `known`."""
        with self._state:
            self._cancelled.update(known if sequence is None else [sequence])
            for sequences, flag in self._runs:
                if sequence is None or sequence in sequences:
                    flag[0] = 1

    def cancelled(self, sequence: int) -> bool:
        """Whether the sequence was cancelled since the last call, which this call resets."""
        with self._state:
            noted = sequence in self._cancelled
            self._cancelled.discard(sequence)
            return noted

    def forget(self, sequences: Iterable[int]) -> None:
        """Clears the cancellation of these sequences."""
        with self._state:
            self._cancelled.difference_update(sequences)
