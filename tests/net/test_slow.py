"""A stage that plays a slower one, under a clock of its own."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

from shoal.engine.batch import Result, Run, Sampling, Want
from shoal.engine.errors import ShoalError
from shoal.net.slow import Clock, Slowness, SlowStage, SlowWatch, set_factor, turn


@dataclass
class Time:
    """A clock that moves when a stage computes, waits for a core, or sleeps; sleeps end `late`."""

    now: float = 100.0
    computed: float = 7.0
    late: float = 0.0
    sleeps: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.late

    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.computed, self.sleep)


class Stage:
    """Computes for `seconds` and waits for a core for `waits`."""

    def __init__(self, time: Time, seconds: float, waits: float = 0.0) -> None:
        self.time, self.seconds, self.waits = time, seconds, waits
        self.asked: list[str] = []

    def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> None:
        self.asked.append(f"open {sequence} {context}")

    def run(self, batch: Sequence[Run]) -> list[Result]:
        self.time.now += self.seconds + self.waits
        self.time.computed += self.seconds
        return [Result(run.sequence, run.first, len(run.tokens), token=5) for run in batch]

    def close_sequence(self, sequence: int) -> None:
        self.asked.append(f"close {sequence}")

    def close(self) -> None:
        self.asked.append("close")


RUNS = [Run(1, 0, (3,), Want.TOKEN)]


def steps(time: Time, stage: SlowStage, count: int) -> list[float]:
    """How long each took."""
    took = []
    for _ in range(count):
        start = time.now
        assert stage.run(RUNS) == [Result(1, 0, 1, token=5)]
        took.append(time.now - start)
    return took


def test_a_step_takes_f_times_as_long() -> None:
    time = Time()
    stage = SlowStage(Stage(time, 0.002), Slowness(4.0), time.clock())
    assert steps(time, stage, 3) == pytest.approx([0.008] * 3)
    assert time.sleeps == pytest.approx([0.006] * 3)


def test_a_factor_of_one_never_sleeps() -> None:
    time = Time()
    steps(time, SlowStage(Stage(time, 0.002), Slowness(), time.clock()), 3)
    assert time.sleeps == []


def test_waiting_for_a_core_is_not_multiplied() -> None:
    time = Time()
    stage = SlowStage(Stage(time, 0.002, waits=0.005), Slowness(4.0), time.clock())
    assert steps(time, stage, 2) == pytest.approx([0.008] * 2)
    late = SlowStage(Stage(time, 0.002, waits=0.009), Slowness(4.0), time.clock())
    assert steps(time, late, 2) == pytest.approx([0.011] * 2)


def test_sleeps_that_end_late_do_not_add_up() -> None:
    time = Time(late=0.001)
    stage = SlowStage(Stage(time, 0.002), Slowness(4.0), time.clock())
    assert sum(steps(time, stage, 100)) == pytest.approx(0.8 + 0.001)


def test_a_step_that_waited_too_long_is_made_up_for_by_the_next() -> None:
    time = Time()
    waits = iter([0.010, 0.0, 0.0])

    @contextmanager
    def turn() -> Iterator[None]:
        time.now += next(waits)
        yield

    stage = SlowStage(Stage(time, 0.002), Slowness(4.0), time.clock(), turn)
    assert steps(time, stage, 3) == pytest.approx([0.012, 0.004, 0.008])


def test_one_computes_at_a_time_where_nodes_take_turns(tmp_path: Path) -> None:
    path, order = tmp_path / "turns", list[str]()
    with turn(path):
        thread = Thread(target=lambda: _take(path, order))
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with (
        pytest.raises(ShoalError, match=r"turns\.queue cannot be opened: No such file"),
        turn(tmp_path / "no" / "turns"),
    ):
        pass


def _take(path: Path, order: list[str]) -> None:
    with turn(path):
        order.append("second")


def test_the_factor_in_a_file_counts_from_the_next_step_on(tmp_path: Path) -> None:
    path, time = tmp_path / "slow", Time()
    path.write_text("2.0\n")
    stage = SlowStage(Stage(time, 0.002), Slowness(9.0, path), time.clock())
    assert steps(time, stage, 1) == pytest.approx([0.004])
    (tmp_path / "new").write_text("5")
    os.replace(tmp_path / "new", path)
    assert steps(time, stage, 2) == pytest.approx([0.010] * 2)
    path.unlink()
    with pytest.raises(ShoalError, match="slow cannot be read: No such file"):
        stage.run(RUNS)


@pytest.mark.parametrize("text", ["", "fast", "0.5", "nan", "inf", "-3"])
def test_a_file_that_holds_no_factor_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slow"
    path.write_text(text)
    with pytest.raises(ShoalError, match=r"slow .*give a number from 1"):
        Slowness(1.0, path)


def test_a_factor_that_is_set_is_read_with_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "slow"
    set_factor(path, 2.0)
    slowness = Slowness(1.0, path)
    for factor in (3.5, 1.0, 1 / 0.3):
        set_factor(path, factor)
        assert slowness.factor() == factor
    assert list(tmp_path.iterdir()) == [path]


def test_all_else_is_the_stages_own() -> None:
    time = Time()
    inner = Stage(time, 0.002)
    stage = SlowStage(inner, Slowness(2.0), time.clock())
    stage.open_sequence(3, Sampling(), 99)
    stage.close_sequence(3)
    stage.close()
    assert inner.asked == ["open 3 99", "close 3", "close"]


def test_what_is_measured_is_the_device_that_is_played() -> None:
    time = Time()
    inner = Stage(time, 0.002, waits=0.005)
    watch = SlowWatch(Slowness(4.0), time.clock())
    assert watch(lambda: inner.run(RUNS)) == pytest.approx(0.008)
    assert time.sleeps == []


def test_the_real_clock_sleeps_in_this_thread(lab: ModuleType) -> None:
    stage = SlowStage(lab.FakeStage(0, lab.UNITS), Slowness(3.0))
    stage.open_sequence(1, Sampling(), 9)
    (result,) = stage.run([Run(1, 0, (4,), Want.TOKEN)])
    assert result.token == lab.oracle([4], 1)[0]


def test_time_that_passes_between_looks_at_the_clock_is_never_slept() -> None:
    """Every look at the clock takes a while: one can say that it is early, and the next that it is late."""
    time = Time()

    def now() -> float:
        time.now += 0.6
        return time.now

    def sleep(seconds: float) -> None:
        assert seconds >= 0
        time.sleep(seconds)

    clock = Clock(now, lambda: time.computed, sleep)
    stage = SlowStage(Stage(time, 1.0), Slowness(2.0), clock)
    for _ in range(20):
        stage.run(RUNS)
