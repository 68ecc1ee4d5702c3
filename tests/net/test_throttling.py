"""What a node may do by its policy and the readings of its device: the rules, and that it does not flap."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import pytest

from shoal.engine.power import Readings
from shoal.net.messages import Condition
from shoal.net.policy import NO_POLICY, PHONE, Policy
from shoal.net.throttling import (
    CALM_SECONDS,
    LEAVE_SECONDS,
    MOST_CALM,
    NOTHING,
    RAM_SECONDS,
    SHARES,
    STEP_SECONDS,
    Memory,
    decide,
    forbidden,
)

GOOD = Readings(
    plugged=True, battery=80, temperature=31, chip=55, clock=100, cpu_pressure=3, memory_pressure=0, ram=10**9
)  # fmt: skip
ALL = Policy(True, 30, 42, 85, 40, 50, 20, 100e6)
FREE = Condition()


def run(
    policy: Policy,
    readings: Iterable[Readings],
    memory: Memory = NOTHING,
    start: float = 0.0,
    every: float = 2.0,
) -> tuple[Memory, list[Condition]]:
    """The conditions for readings that are taken one after another."""
    found = []
    for i, reading in enumerate(readings):
        memory, condition = decide(policy, memory, reading, start + i * every)
        found.append(condition)
    return memory, found


def changes(conditions: Iterable[Condition]) -> list[float]:
    """The shares, without repetitions."""
    shares: list[float] = []
    for condition in conditions:
        if not shares or shares[-1] != condition.share:
            shares.append(condition.share)
    return shares


def for_seconds(seconds: float, **changed: object) -> list[Readings]:
    return [replace(GOOD, **changed)] * (int(seconds / 2) + 1)  # type: ignore[arg-type]


# Each rule.

LEAVE = {
    "charging": ({"plugged": False}, "it is not plugged in", LEAVE_SECONDS),
    "battery": ({"battery": 29}, "its battery has 29 %, less than 30 %", LEAVE_SECONDS),
    "ram": ({"ram": 99_500_000}, "programs can get 99.5 MB of RAM, less than 100 MB", RAM_SECONDS),
    "memory": ({"memory_pressure": 21}, "its RAM is short 21 % of the time, more than 20 %", LEAVE_SECONDS),
    "heat": ({"temperature": 47.5}, "its battery has 47.5 °C, more than 47 °C", LEAVE_SECONDS),
}  # fmt: skip
EASE = {
    "temperature": ({"temperature": 42.1}, {"temperature": 41}, "its battery has 42.1 °C, more than 42 °C"),
    "chip": ({"chip": 86}, {"chip": 82}, "its CPU has 86 °C, more than 85 °C"),
    "clock": ({"clock": 39}, {"clock": 45}, "its CPU is limited to 39 % of its frequency, less than 40 %"),
    "cpu": ({"cpu_pressure": 51}, {"cpu_pressure": 45}, "its CPU is short 51 % of the time, more than 50 %"),
}


@pytest.mark.parametrize(("bad", "why", "seconds"), LEAVE.values(), ids=LEAVE)
def test_rules_by_which_a_node_leaves(bad: dict[str, object], why: str, seconds: float) -> None:
    _, found = run(ALL, for_seconds(seconds, **bad))
    assert not any(condition.leaving for condition in found[:-1])
    assert found[-1].leaving
    assert found[-1].reason == why


@pytest.mark.parametrize(("bad", "why", "seconds"), LEAVE.values(), ids=LEAVE)
def test_a_node_that_leaves_does_not_come_back(bad: dict[str, object], why: str, seconds: float) -> None:
    memory, _ = run(ALL, for_seconds(seconds, **bad))
    _, found = run(ALL, for_seconds(3600), memory, start=100)
    assert {(condition.leaving, condition.reason) for condition in found} == {(True, why)}


@pytest.mark.parametrize(("bad", "why", "seconds"), LEAVE.values(), ids=LEAVE)
def test_a_reading_that_is_bad_for_a_moment_changes_nothing(
    bad: dict[str, object], why: str, seconds: float
) -> None:
    moment = [*for_seconds(seconds - 4, **bad), GOOD]
    _, found = run(replace(ALL, temperature=None) if "temperature" in bad else ALL, moment * 50)
    assert set(found) == {FREE}


@pytest.mark.parametrize(("bad", "near", "why"), EASE.values(), ids=EASE)
def test_rules_by_which_a_node_eases_off(bad: dict[str, object], near: dict[str, object], why: str) -> None:
    steps = len(SHARES) - 1
    memory, found = run(ALL, for_seconds(10 * STEP_SECONDS, **bad))
    assert changes(found) == list(SHARES[1:])
    assert found[0] == Condition(SHARES[1], False, why)
    assert [c.share for c in found[:: int(STEP_SECONDS / 2)][:steps]] == list(SHARES[1:])
    memory, found = run(ALL, for_seconds(10_000, **near), memory, start=1000)
    assert set(found) == {Condition(SHARES[-1], False, why)}  # near the limit it stays as it is
    memory, found = run(ALL, for_seconds(steps * CALM_SECONDS), memory, start=20_000)
    assert changes(found) == list(SHARES[::-1])
    assert found[-1] == FREE


def test_limits_themselves_break_no_rule() -> None:
    limits = Readings(True, 30, 42, 85, 40, 50, 20, 100_000_000)
    assert set(run(ALL, [limits] * 1000)[1]) == {FREE}


@pytest.mark.parametrize("share", [5, 60, 100])
def test_the_time_that_a_policy_allows_is_a_share(share: float) -> None:
    _, found = run(Policy(time=share), [Readings()] * 10)
    assert changes(found) == [pytest.approx(share / 100)]
    _, found = run(replace(ALL, time=share), for_seconds(200, temperature=43))
    assert changes(found) == [pytest.approx(share / 100 * step) for step in SHARES[1:]]
    assert all(0.01 <= condition.share <= 1 for condition in found)


def test_no_policy_and_no_readings_change_nothing() -> None:
    worst = Readings(False, 1, 90, 110, 5, 100, 100, 0)
    assert set(run(NO_POLICY, [worst] * 100)[1]) == {FREE}
    assert set(run(ALL, [Readings()] * 100)[1]) == {FREE}
    assert forbidden(NO_POLICY, worst) == forbidden(ALL, Readings()) == {}
    assert list(forbidden(ALL, worst)) == ["charging", "battery", "temperature", "memory", "ram"]


# Hysteresis.


def test_readings_around_a_limit_change_the_share_once() -> None:
    """A degree to either side, in an hour."""
    draw = random.Random(1)
    readings = [replace(GOOD, temperature=41.6 + draw.uniform(-1, 1)) for _ in range(1800)]
    _, found = run(PHONE, readings)
    assert len(changes(found)) <= len(SHARES)
    assert not any(condition.leaving for condition in found)
    readings = [replace(GOOD, battery=80, cpu_pressure=46 + draw.uniform(-5, 5)) for _ in range(1800)]
    assert len(changes(run(PHONE, readings)[1])) <= len(SHARES)


@pytest.mark.parametrize("half", [10, 30, 90, 300])
def test_readings_that_swing_change_the_share_less_and_less(half: int) -> None:
    swing = [*for_seconds(half, cpu_pressure=80), *for_seconds(half, cpu_pressure=5)]
    hour = int(3600 / (2 * len(swing)))
    memory, first = run(PHONE, swing * hour)
    _, second = run(PHONE, swing * hour, memory, start=2 * hour * len(swing))
    assert len(changes(second)) <= 2 * 3600 / MOST_CALM + 2
    assert len(changes(first)) <= 30


def test_the_wait_is_short_again_after_a_long_calm() -> None:
    swing = [*for_seconds(30, cpu_pressure=80), *for_seconds(90, cpu_pressure=5)]
    memory, _ = run(PHONE, swing * 60)
    assert memory.wait > CALM_SECONDS
    memory, _ = run(PHONE, for_seconds(4 * MOST_CALM * len(SHARES)), memory, start=10_000)
    assert memory.step == 0
    memory, found = run(PHONE, for_seconds(10, cpu_pressure=80), memory, start=50_000)
    assert (found[-1].share, memory.wait) == (SHARES[1], CALM_SECONDS)


def test_a_sensor_that_vanishes_counts_as_calm() -> None:
    memory, _ = run(PHONE, for_seconds(0, temperature=43))
    _, found = run(PHONE, for_seconds(CALM_SECONDS, temperature=None), memory, start=10)
    assert changes(found) == [SHARES[1], 1.0]
    memory, _ = run(ALL, for_seconds(LEAVE_SECONDS - 2, battery=20))
    _, found = run(
        ALL, [replace(GOOD, battery=None), *for_seconds(LEAVE_SECONDS - 2, battery=20)], memory, start=10
    )
    assert set(found) == {FREE}


def test_one_rule_eases_off_while_another_is_good_again() -> None:
    memory, found = run(PHONE, for_seconds(0, cpu_pressure=90))
    assert found[-1].reason.startswith("its CPU is short 90 %")
    memory, found = run(PHONE, for_seconds(STEP_SECONDS, temperature=44), memory, start=2)
    assert (found[-1].share, found[-1].reason) == (SHARES[2], "its battery has 44 °C, more than 42 °C")


def heated(share: Callable[[float], float], hours: float) -> tuple[list[float], list[float]]:
    """A battery that warms up towards 30 °C and 20 more at full work, with a time constant of ten minutes."""
    temperature, memory, temperatures, shares, condition = 30.0, NOTHING, [], [], FREE
    for i in range(int(hours * 1800)):
        temperature += 2 / 600 * (30 + 20 * share(condition.share) - temperature)
        memory, condition = decide(PHONE, memory, replace(GOOD, temperature=round(temperature, 1)), 2.0 * i)
        assert not condition.leaving
        temperatures.append(temperature)
        shares.append(condition.share)
    return temperatures, shares


def test_a_phone_stays_at_its_limit_and_works_on() -> None:
    temperatures, shares = heated(lambda share: share, 3)
    late = temperatures[len(temperatures) // 2 :]
    assert max(temperatures) < 43.5
    assert max(late) < 43.5 and sum(shares) / len(shares) > 0.4
    assert sum(a != b for a, b in pairwise(shares)) < 40
