"""Rows follow what is measured: they settle where prediction and measurement agree, and shrug at hiccups."""

import random

import pytest

from shoal.planner import cost
from shoal.planner.refresh import MOST, refreshed, refreshed_link, slowed
from shoal.planner.rows import Device, Link, Model, Unit, Workload

UNIT = Unit("layer", 1_000_000, 1_000_000, 900_000, 100, 0, 1000, attend_macs=50)
MODEL = Model((UNIT, UNIT, UNIT))
LOAD = Workload(context=100)
DEVICE = Device("d", 10**9, 1e9, 2e9, 0, 1e-4, 5e-4, ((1, 1e9), (8, 4e9)), 1e8, 2e8)


def step(device: Device) -> float:
    return cost.stage_decode_seconds(MODEL, device, LOAD, 0, 3, idle=True)


def test_a_slowed_device_takes_so_many_times_as_long_in_all_it_does() -> None:
    hot = slowed(DEVICE, 2.5)
    assert step(hot) == pytest.approx(2.5 * step(DEVICE))
    for rows in (1, 5, 300):
        before = cost.stage_prefill_seconds(MODEL, DEVICE, 0, 3, rows, 64, 1)
        assert cost.stage_prefill_seconds(MODEL, hot, 0, 3, rows, 64, 1) == pytest.approx(2.5 * before)
    assert hot.ram_bytes == DEVICE.ram_bytes


def test_a_device_that_gets_hot_is_followed_within_some_dozens_of_steps() -> None:
    rng, device, truth = random.Random(0), DEVICE, slowed(DEVICE, 2.0)
    for _ in range(60):
        device = refreshed(device, step(device), step(truth) * rng.uniform(0.9, 1.1))
    assert step(device) == pytest.approx(step(truth), rel=0.05)


def test_what_was_expected_changes_nothing() -> None:
    assert refreshed(DEVICE, 0.01, 0.01) == DEVICE
    assert refreshed_link(Link(0.004, 1e6), 1000, 0.005) == Link(0.004, 1e6)


def test_one_hiccup_counts_no_more_than_a_little() -> None:
    assert step(refreshed(DEVICE, 0.01, 10.0, 0.1)) == pytest.approx(step(DEVICE) * (1 + 0.1 * (MOST - 1)))


def test_small_messages_find_the_latency_and_large_ones_the_rate() -> None:
    link, truth = Link(0.004, 10e6), Link(0.010, 2e6)
    for at in range(600):
        size = 4 if at % 2 else 1_000_000
        link = refreshed_link(link, size, truth.latency_s + size / truth.bytes_per_s)
    assert link.latency_s == pytest.approx(truth.latency_s, rel=0.05)
    assert link.bytes_per_s == pytest.approx(truth.bytes_per_s, rel=0.05)
    assert refreshed_link(Link(0.0, float("inf")), 4, 0.5, 0.1) == Link(0.05, float("inf"))


@pytest.mark.parametrize(("expected", "measured"), [(0.0, 1.0), (1.0, 0.0), (1.0, float("nan"))])
def test_times_that_are_none_are_refused(expected: float, measured: float) -> None:
    with pytest.raises(ValueError, match="of d must be"):
        refreshed(DEVICE, expected, measured)
