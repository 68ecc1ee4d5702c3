"""A device with known rates is measured as what it is; and the real one gives figures that a plan can use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytest

from shoal.engine import measure as measuring
from shoal.engine.batch import Run, Sampling
from shoal.engine.costs import unit_cost
from shoal.engine.host import default_threads
from shoal.engine.measure import best_threads, measure
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions

READ, MATMUL, MANY, ATTEND, PREFILL = 5e6, 40e6, 80e6, 2e6, 3e6
STEP, IDLE = 0.002, 0.003


@dataclass
class Clock:
    """Time that passes only by sleeping and by running the stage below."""

    now: float = 0.0
    rested: bool = False

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.rested = True


def stage_of(clock: Clock) -> Any:
    class KnownStage:
        """Takes what the formulas say, twice as long with one thread."""

        backend, exact = "native (known)", True

        def __init__(self, model: Model, first: int, last: int, options: StageOptions) -> None:
            self.model, self.first, self.last, self.options = model, first, last, options
            self.threads = options.threads

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> None:
            assert 0 < context <= self.model.config.context

        def close_sequence(self, sequence: int) -> None:
            pass

        def run(self, batch: Sequence[Run]) -> None:
            (run,) = batch
            rows = len(run.tokens)
            seconds = STEP + IDLE * clock.rested
            clock.rested = False
            for unit in range(max(self.first, 1), self.last):
                cost = unit_cost(self.model, unit)
                rate = MATMUL if rows < 16 else MANY
                seconds += max(cost.read_bytes / READ, rows * cost.macs / rate)
                seconds += rows * run.first * cost.attend_macs / (ATTEND if rows == 1 else PREFILL)
            clock.now += seconds * (2 if self.threads == 1 else 1)

    return KnownStage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    monkeypatch.setattr(measuring, "Stage", stage_of(clock))
    return clock


def test_a_device_with_known_rates_is_measured_as_what_it_is(tiny_int8: Model, clock: Clock) -> None:
    found = measure(tiny_int8, StageOptions(threads=2, max_rows=64))
    assert found.read_bytes_per_s == pytest.approx(READ)
    assert found.step_overhead_s == pytest.approx(STEP)
    assert found.idle_overhead_s == pytest.approx(IDLE)
    assert found.attend_macs_per_s == pytest.approx(ATTEND)
    assert found.prefill_attend_macs_per_s == pytest.approx(PREFILL)
    layer = unit_cost(tiny_int8, 1)
    for rows, rate in found.row_rates:
        seconds = max(layer.read_bytes / READ, rows * layer.macs / (MATMUL if rows < 16 else MANY))
        assert rate == pytest.approx(rows * layer.macs / seconds)
    assert [rows for rows, _ in found.row_rates] == [1, 2, 4, 8, 16, 64]  # no more than a call may have
    assert found.macs_per_s == found.row_rates[-1][1]
    assert found.threads == 2


def test_threads_that_gain_nothing_are_not_taken(tiny_int8: Model, clock: Clock) -> None:
    best, found = best_threads(tiny_int8, StageOptions(), 6)
    assert best == 2
    assert list(found) == [1, 2, 4, 6]
    assert found[2] == pytest.approx(2 * found[1]) == pytest.approx(found[6])


def test_the_device_here_gives_figures_that_a_plan_can_use(tiny_int8: Model) -> None:
    found = measure(tiny_int8, seconds=0.02)
    rates = [found.read_bytes_per_s, found.attend_macs_per_s, found.prefill_attend_macs_per_s]
    assert all(0 < rate < math.inf for rate in [*rates, *(rate for _, rate in found.row_rates)])
    assert found.idle_overhead_s >= 0 <= found.step_overhead_s
    assert found.exact == found.backend.startswith("native")
    assert found.threads == default_threads()


def test_attention_is_a_multiplication_with_key_and_value_of_every_query_head(tiny_int8: Model) -> None:
    assert unit_cost(tiny_int8, 1).attend_macs == 2 * 6 * 16
    assert unit_cost(tiny_int8, 0).attend_macs == 0
