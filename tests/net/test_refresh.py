"""Rows follow what is measured: they settle where prediction and measurement agree, and shrug at hiccups."""

import random

import pytest

from shoal.net.pace import MOST_CHANGE, WEIGHT, refreshed_factor, refreshed_link, slowed
from shoal.planner import Device, LinkSpeed, ModelCosts, Unit
from shoal.planner.cost import StageCost
from shoal.planner.rows import FASTEST

UNIT = Unit("layer", 1_000_000, 1_000_000, 900_000, 100, 0, 1000, attend_macs=50)
MODEL = ModelCosts((UNIT, UNIT, UNIT))
DEVICE = Device("d", 10**9, 1e9, 2e9, 0, 1e-4, 5e-4, ((1, 1e9), (8, 4e9)), 1e8, 2e8)


def step(device: Device) -> float:
    stage = StageCost(MODEL, device, 0, 3)
    return stage.decode_seconds(1, 50) + stage.pause


def test_a_slowed_device_takes_so_many_times_as_long_in_all_it_does() -> None:
    hot = slowed(DEVICE, 2.5)
    assert step(hot) == pytest.approx(2.5 * step(DEVICE))
    for rows in (1, 5, 300):
        before = StageCost(MODEL, DEVICE, 0, 3).call_seconds([(rows, 64, True)])
        after = StageCost(MODEL, hot, 0, 3).call_seconds([(rows, 64, True)])
        assert after == pytest.approx(2.5 * before)
    assert hot.ram_bytes == DEVICE.ram_bytes
    assert slowed(Device("d", 1, 1e9, 1e9), 2.0).attend_macs_per_s == FASTEST  # never measured: costs nothing


def test_however_slow_a_device_says_it_is_its_row_can_be_planned_with() -> None:
    """A stranger's factor and figures are within bounds each; together they are not."""
    assert slowed(Device("d", 1, 1e-3, 1e-3, step_overhead_s=1e9), 1e6) == Device(
        "d", 1, 1e-3, 1e-3, step_overhead_s=1e9
    )
    slow = LinkSpeed(1e9, 1e-3, 1e9)
    assert refreshed_link(slow, 1, 1e10) == slow


def test_a_device_that_gets_hot_is_followed_within_some_dozens_of_steps() -> None:
    rng, factor, truth = random.Random(0), 1.0, slowed(DEVICE, 2.0)
    for _ in range(60):
        factor = refreshed_factor(factor, step(DEVICE), step(truth) * rng.uniform(0.9, 1.1))
    assert step(slowed(DEVICE, factor)) == pytest.approx(step(truth), rel=0.05)


def test_what_was_expected_changes_nothing() -> None:
    assert refreshed_factor(1.0, 0.01, 0.01) == 1.0
    assert refreshed_link(LinkSpeed(0.004, 1e6), 1000, 0.005) == LinkSpeed(0.004, 1e6)


def test_one_hiccup_counts_no_more_than_a_little() -> None:
    assert refreshed_factor(1.0, 0.01, 10.0) == pytest.approx(1 + WEIGHT * (MOST_CHANGE - 1))


def test_small_messages_find_the_latency_and_large_ones_the_rate() -> None:
    link, truth = LinkSpeed(0.004, 10e6), LinkSpeed(0.010, 2e6)
    for at in range(600):
        size = 4 if at % 2 else 1_000_000
        link = refreshed_link(link, size, truth.latency_s + size / truth.bytes_per_s)
    assert link.latency_s == pytest.approx(truth.latency_s, rel=0.05)
    assert link.bytes_per_s == pytest.approx(truth.bytes_per_s, rel=0.05)
    free = LinkSpeed(0.0, float("inf"))
    assert refreshed_link(free, 4, 0.5) == LinkSpeed(0.05, float("inf"))


@pytest.mark.parametrize(("expected", "measured"), [(0.0, 1.0), (1.0, 0.0), (1.0, float("nan"))])
def test_times_that_are_none_are_refused(expected: float, measured: float) -> None:
    with pytest.raises(ValueError, match="time must be"):
        refreshed_factor(1.0, expected, measured)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="the slow factor of d must be"):
        slowed(DEVICE, factor)
