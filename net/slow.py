"""A device that plays a slower one: a step that took t ends after F * t.

It sleeps in the thread that ran the step, so neither the event loop's clock (milliseconds) nor the way into
the thread is stretched. t is what the thread computed, not what it waited for a core: on a machine that
hosts several such devices one's waiting would else be multiplied as well. They can also take turns: then one
of them computes at a time, with the machine's memory to itself, and its wait is hidden in its sleep.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..engine.batch import Result, Run, Sampling
from ..engine.errors import ShoalError
from .work import StageLike


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that passed, seconds that this thread computed, and how to wait. Tests replace it."""

    now: Callable[[], float] = time.perf_counter
    computed: Callable[[], float] = time.thread_time
    sleep: Callable[[float], None] = time.sleep


class Slowness:
    """The factor F, from 1 up. With a file F is what the file says, read again when it changes, so that
    somebody outside can let a device get hot; the file is to be replaced whole (rename)."""

    def __init__(self, factor: float = 1.0, path: Path | None = None) -> None:
        """ShoalError: the file is missing or says no such number; here, or at any `factor`."""
        self._factor, self._path, self._seen = _checked(str(factor), "--slow"), path, (0, 0)
        self.factor()

    def factor(self) -> float:
        """F now."""
        if self._path is not None:
            try:
                stat = self._path.stat()
                seen = (stat.st_mtime_ns, stat.st_ino)
                if seen != self._seen:
                    self._factor = _checked(self._path.read_text("ascii", "replace").strip(), str(self._path))
                    self._seen = seen
            except OSError as error:
                raise ShoalError(f"{self._path} cannot be read: {error.strerror or error}") from error
        return self._factor


def _checked(text: str, where: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1e6:  # false for NaN
        raise ShoalError(f"{where} {text} would be faster than this device, or is no factor: give 1 or more")
    return factor


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Nobody else has a turn at this file meanwhile, and nobody has two while somebody waits. ShoalError: it
    cannot be opened."""
    queue = _locked(path.with_name(f"{path.name}.queue"))  # held by the first of those that wait
    try:
        held = _locked(path)
    finally:
        os.close(queue)
    try:
        yield
    finally:
        os.close(held)


def _locked(path: Path) -> int:
    """A file that is this descriptor's until it is closed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ShoalError(f"{path} cannot be opened: {error.strerror or error}") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


Turn = Callable[[], AbstractContextManager[None]]


class SlowWatch:
    """How long a call takes on the device that is played; it does not sleep. See engine.measure.Watch."""

    def __init__(self, slowness: Slowness, clock: Clock = Clock(), turn: Turn = nullcontext) -> None:
        self._slowness, self._clock, self._turn = slowness, clock, turn

    def __call__(self, call: Callable[[], object]) -> float:
        factor = self._slowness.factor()
        with self._turn():
            start = self._clock.computed()
            call()
            return factor * (self._clock.computed() - start)


class SlowStage:
    """A stage whose runs take F times as long, each computed within a `turn`. See StageLike."""

    def __init__(
        self,
        stage: StageLike,
        slowness: Slowness,
        clock: Clock = Clock(),
        turn: Turn = nullcontext,
    ) -> None:
        self._stage, self._slowness, self._clock, self._turn = stage, slowness, clock, turn
        self._late = 0.0

    def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> None:
        self._stage.open_sequence(sequence, sampling, context)

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """Runs the batch and sleeps. A step that ended late is made up for by the next one, as far as one
        step can."""
        clock, factor = self._clock, self._slowness.factor()
        start = clock.now()
        with self._turn():
            computed = clock.computed()
            results = self._stage.run(batch)
            seconds = factor * (clock.computed() - computed)
        if factor > 1:
            until = start + seconds - self._late
            left = until - clock.now()
            if left > 0:
                clock.sleep(left)
            self._late = min(max(0.0, clock.now() - until), seconds)
        return results

    def close_sequence(self, sequence: int) -> None:
        self._stage.close_sequence(sequence)

    def close(self) -> None:
        self._stage.close()
