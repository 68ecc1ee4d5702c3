"""What keeps a machine's ups and downs out of a lab, and what says whether somebody else was at work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from bench.lab import others, pace, runs
from bench.lab.others import Others
from bench.lab.runs import Timed, rate


def test_cores_are_kept_awake_by_processes_that_anybody_else_comes_before() -> None:
    with pace.awake() as numbers:
        assert len(numbers) == len(os.sched_getaffinity(0))
        until = time.monotonic() + 10
        while any(os.sched_getscheduler(number) != os.SCHED_IDLE for number in numbers):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)


def test_the_pace_is_told_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_PAUSE_SECONDS", 0.001)
    told, heard, turns = list[float](), threading.Event(), list[bool]()

    def tell(value: float) -> None:
        told.append(value)
        if len(told) == 3:
            heard.set()

    @contextmanager
    def turn() -> Iterator[None]:
        turns.append(True)
        yield
        turns.append(False)

    with pace.followed(turn, tell, threading.Event()):
        assert heard.wait(10)
    count = len(told)
    assert all(value > 0 for value in told)
    assert turns == [True, False] * (len(turns) // 2)
    time.sleep(0.02)
    assert len(told) == count


def test_while_it_is_crowded_there_are_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_PAUSE_SECONDS", 3600)
    told, heard, crowded = list[float](), threading.Event(), threading.Event()
    crowded.set()

    def tell(value: float) -> None:
        told.append(value)
        if len(told) == 5:
            heard.set()

    with pace.followed(nullcontext, tell, crowded):
        assert heard.wait(60)


def test_a_machine_that_reads_half_as_fast_has_half_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_PAUSE_SECONDS", 0.001)
    took, clock, heard = [0.5], [0.0], threading.Event()

    def thread_time() -> float:
        clock[0] += took[0] / 2  # once before reading and once after
        return clock[0]

    def tell(value: float) -> None:
        took[0] = 1.0
        if value == pytest.approx(0.5):
            heard.set()

    monkeypatch.setattr(pace.time, "thread_time", thread_time)
    with pace.followed(nullcontext, tell, threading.Event()):
        assert heard.wait(10)


class LabOf:
    """Stands for a lab of these processes."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def processes(self) -> list[int]:
        return list(self._numbers)


def test_others_are_all_but_the_lab_and_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"busy": 100.0, "own": 10.0, 5: 20.0}
    now = iter([50.0, 54.0])
    monkeypatch.setattr(others.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(others, "_busy", lambda: seconds["busy"])
    monkeypatch.setattr(others, "_own", lambda: seconds["own"])
    monkeypatch.setattr(others, "_of", lambda number: seconds[number])
    watch = Others(LabOf(5))
    seconds |= {"busy": 108.0, "own": 11.0, 5: 25.0}
    assert watch.cores() == pytest.approx((8 - 1 - 5) / 4)


def test_what_this_machine_counts_can_be_read() -> None:
    before = others._busy()
    assert 0 < others._of(os.getpid()) <= before
    assert others._of(2**22 + 1) == 0.0


def test_a_run_that_somebody_disturbed_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        assert seconds > 0

    monkeypatch.setattr(runs.trio, "sleep", at_once)

    def runs_with(*others: float) -> list[float]:
        left = iter(others)
        made: list[float] = []

        async def once() -> Timed:
            made.append(next(left))
            return Timed(1.0, (), (), made[-1])

        found = runs.trio.run(runs.quiet, once)
        return [*made, found.others]

    assert runs_with(0.01) == [0.01, 0.01]
    assert runs_with(0.9, 0.1) == [0.9, 0.1, 0.1]
    assert runs_with(0.9, 0.5, 0.7, 0.8) == [0.9, 0.5, 0.7, 0.8, 0.5]


def test_a_rate_counts_while_all_streams_decode() -> None:
    assert rate([[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]) == pytest.approx((2 + 2) / 2)
