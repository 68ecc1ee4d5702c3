"""Levels of measured values: what is noise, what is a jump, and how long a value should last."""

import math
import random
from collections.abc import Iterable

import pytest

from shoal.net.levels import RECENT, UNSETTLED_SECONDS, Level


def after(
    values: Iterable[float], *, every: float = 0.5, start: float = 0.0, level: Level | None = None
) -> Level:
    for at, value in enumerate(values):
        level = Level.of(value) if level is None else level.seen(value, start + at * every)
    assert level is not None
    return level


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_noise_is_measured_and_smoothed(share: float) -> None:
    rng = random.Random(1)
    level = after(2.5 * (1 + share * rng.uniform(-1, 1)) for _ in range(200))
    assert level.jumps == ()
    assert level.measured == pytest.approx(2.5, rel=share / 2)
    assert level.noise == pytest.approx(share / math.sqrt(3), rel=0.6)


def test_two_values_elsewhere_are_a_jump_and_the_average_begins_there() -> None:
    steady = after([1.0] * 20)
    once = steady.seen(2.0, 10.0)
    assert once.measured == 1.0
    assert not once.settled(10.0)
    assert once.seen(1.0, 10.5).settled(10.5)  # a hiccup
    assert once.seen(1.0, 10.5).jumps == ()
    rising = once.seen(2.4, 10.5)
    assert rising.measured == pytest.approx(2.4)
    assert not rising.settled(10.5)
    there = rising.seen(2.48, 11.0)
    assert there.settled(11.0)
    assert there.measured == pytest.approx(2.4 * (2.48 / 2.4) ** 0.2)
    assert there.jumps == (10.0,)  # one, however long it took
    assert after([2.5] * 20, start=11.5, level=there).measured == pytest.approx(2.5, rel=0.01)


def test_a_value_that_is_known_is_a_jump_at_once() -> None:
    steady = after([1.0] * 20)
    there = steady.seen(2.4, 10.0, (1.0, 2.5))
    assert there.settled(10.0)
    assert (there.measured, there.jumps) == (pytest.approx(2.5), (10.0,))
    assert not steady.seen(2.0, 10.0, (1.0, 2.5)).settled(10.0)
    passing = steady.seen(1.5, 10.0, (2.5,)).seen(2.4, 10.5, (2.5,))
    assert passing.settled(10.5)
    assert passing.jumps == (10.0,)
    assert steady.seen(1.05, 10.0, (1.1,)).jumps == ()  # it belongs to the average


def test_a_jump_does_not_count_as_noise() -> None:
    level = after([1.0, 1.01] * 10)
    jumped = after([2.0, 2.02] * 3, start=20.0, level=level)
    assert jumped.jumps == (20.0,)
    assert jumped.noise < 2 * level.noise


def test_a_value_that_does_not_come_to_rest_is_taken_as_it_is() -> None:
    level = after([1.0] * 20)
    for at in range(10):
        level = level.seen(2.0 + at, 10 + at / 2)
        assert level.settled(10 + at / 2) == (at / 2 > UNSETTLED_SECONDS)


def test_a_steady_value_costs_nothing() -> None:
    level = after([3.0] * (RECENT + 1))
    assert level.steady
    assert level.seen(3.0, 99.0) is level


def test_a_value_that_swings_will_swing_again() -> None:
    level = after([1.0] * 20)
    assert level.lasts(10.0) == math.inf
    level = after([2.0] * 20, start=10.0, level=level)
    assert level.lasts(12.0) == math.inf  # it has jumped once
    level = after([1.0] * 20, start=20.0, level=level)
    assert level.jumps == (10.0, 20.0)
    assert level.lasts(21.0) == pytest.approx(9.0)
    assert level.lasts(45.0) == pytest.approx(25.0)  # and it seems to have stopped
