"""Simulation of a slower device, for the lab: a step that takes t is made to last F * t.

The thread that ran the step sleeps for the rest, so the event loop and the hop into the thread are not
slowed. t is the CPU time of the thread, not wall time: on a machine that hosts several simulated devices,
waiting for a core would be multiplied as well. The devices can also take turns: then one computes at a time,
with the memory bandwidth of the machine to itself, and the wait for a turn is part of the sleep.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..engine.batch import Result, Run
from ..engine.errors import ShoalError
from .work import StageLike


@dataclass(frozen=True, slots=True)
class Clock:
    """Clocks for wall time and this thread's CPU time, and a sleep. Tests replace them."""

    now: Callable[[], float] = time.perf_counter
    computed: Callable[[], float] = time.thread_time
    sleep: Callable[[float], None] = time.sleep


class Slowness:
    """The factor F, at least 1. With a path, F is read from that file whenever it changes, so that a test can
    simulate a device that gets hot. The file must be replaced atomically (by rename)."""

    def __init__(self, factor: float = 1.0, path: Path | None = None) -> None:
        """ShoalError, here and in `factor`: the file is missing or has no valid factor."""
        self._factor, self._path, self._seen = _checked(str(factor), "--slow"), path, (0, 0)
        self.factor()

    def factor(self) -> float:
        """The current F."""
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


def set_factor(path: Path, factor: float) -> None:
    """Writes a factor for nodes that read it from this file."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"{factor!r}\n", encoding="ascii")
    part.replace(path)


def _checked(text: str, where: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1e6:  # false for NaN
        raise ShoalError(f"{where} {text} is not a slow factor: give a number from 1 to 1e6")
    return factor


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """A fair lock between processes: no other process holds it meanwhile, and none gets it twice while
    another waits. ShoalError: the file cannot be opened."""
    queue = _locked(path.with_name(f"{path.name}.queue"))  # held by the process that is next
    try:
        held = _locked(path)
    finally:
        os.close(queue)
    try:
        yield
    finally:
        os.close(held)


def _locked(path: Path) -> int:
    """Opens a file and locks it exclusively, until the returned descriptor is closed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ShoalError(f"{path} cannot be opened: {error.strerror or error}") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


Turn = Callable[[], AbstractContextManager[None]]


class SlowWatch:
    """An engine.measure.Watch that returns how long a call takes on the simulated device. It does not
    sleep."""

    def __init__(self, slowness: Slowness, clock: Clock = Clock(), turn: Turn = nullcontext) -> None:
        self._slowness, self._clock, self._turn = slowness, clock, turn

    def __call__(self, call: Callable[[], object]) -> float:
        factor = self._slowness.factor()
        with self._turn():
            start = self._clock.computed()
            call()
            return factor * (self._clock.computed() - start)


class SlowStage:
    """A StageLike whose runs take F times as long, each computed within a `turn`. All else is the stage's."""

    def __init__(
        self,
        stage: StageLike,
        slowness: Slowness,
        clock: Clock = Clock(),
        turn: Turn = nullcontext,
    ) -> None:
        self._stage, self._slowness, self._clock, self._turn = stage, slowness, clock, turn
        self._late = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """Runs the batch and sleeps. If a run ends late, the next one sleeps less, by at most its own
        time."""
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


def slow_stage(stage: Any, slowness: Slowness, turn: Turn) -> StageLike:
    """The SlowStage of a stage as a StageLike, which a type checker cannot see."""
    return cast("StageLike", SlowStage(stage, slowness, turn=turn))
