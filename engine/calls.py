"""Calls that threads make to one stage: one at a time, in order, and cancelled if asked."""

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
"""`[1]`: 1 once a run is cancelled. The backend reads it between two operations."""


class FairLock:
    """A lock that goes to the thread that has waited longest. The thread that holds it may take it again.

    A `threading.Lock` may be taken again by the thread that has just released it: a thread that generates
    tokens in a loop would keep the others waiting for its whole answer."""

    def __init__(self) -> None:
        # One thread at a time waits for `_turn`, within the door. A thread that releases `_turn` and
        # wants it again has to pass the door, which the waiting thread leaves only once it has `_turn`.
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
    """What the calls of one stage share: whose turn it is, which sequences run, and which are
    cancelled."""

    def __init__(self, tidy: Callable[[], None], restart: Callable[[list[int]], None]) -> None:
        """`tidy` is called before and after each call; `restart` before the first one in a forked
        process, with the sequences that other threads were running: it has none of those threads, nor the
        stage's own."""
        self._tidy, self._restart = tidy, restart
        self.closed = False
        self._runs: list[tuple[frozenset[int], Flag]] = []
        self._cancelled: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = FairLock()
        self._busy = False  # read and written by the thread whose turn it is
        self._state = threading.RLock()  # of runs and cancellations; never held while a batch runs

    def check(self) -> None:
        """Makes a forked process ready. ValueError: the stage has been closed."""
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
                raise RuntimeError("a stage was called in the middle of a call by the same thread")
            self.check()
            self._busy = True
            try:
                self._tidy()
                yield
            finally:
                self._tidy()
                self._busy = False

    def tidy(self) -> None:
        """Tidies when it is this thread's turn. Called by the garbage collector in the middle of a call
        of this thread, it leaves that to the call's end."""
        if self._process != os.getpid():
            return  # a fork's first call tidies
        with self._lock:
            if not self._busy:
                self._tidy()

    def close(self, end: Callable[[], None]) -> None:
        """Refuses calls from now on; calls `end` once those that came before have returned."""
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
        """Waits for this thread's turn to run these sequences, with the flag that cancels it. ValueError:
        one of them is there twice, or in a run of another thread. CancelledRunError: cancelled
        meanwhile."""
        mine = frozenset(sequences), np.zeros(1, np.int32)
        if len(mine[0]) != len(sequences):
            raise ValueError("a sequence is in one batch twice")
        self.check()
        with self._state:
            for others, _ in self._runs:
                for sequence in mine[0] & others:
                    raise ValueError(
                        f"sequence {sequence} is being run by another thread: use a number of your own"
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
        """Sets the flags of the runs with this sequence, or of all, and notes that it was cancelled, or
        that all the known ones were."""
        with self._state:
            self._cancelled.update(known if sequence is None else [sequence])
            for sequences, flag in self._runs:
                if sequence is None or sequence in sequences:
                    flag[0] = 1

    def cancelled(self, sequence: int) -> bool:
        """Whether the sequence was cancelled; asked once, it is forgotten."""
        with self._state:
            noted = sequence in self._cancelled
            self._cancelled.discard(sequence)
            return noted

    def forget(self, sequences: Iterable[int]) -> None:
        """Forgets that they were cancelled."""
        with self._state:
            self._cancelled.difference_update(sequences)
