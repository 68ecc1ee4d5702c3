"""Rows refuse what cannot be planned with, and name the culprit."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from shoal.planner.rows import (
    LOOPBACK,
    Assignment,
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Unit,
    Workload,
)

UNIT: dict[str, Any] = {
    "name": "layer 3",
    "bytes": 10,
    "read_bytes": 10,
    "macs": 10,
    "kv_bytes_per_token": 2,
    "fixed_state_bytes": 0,
    "cut_bytes": 4,
}
DEVICE: dict[str, Any] = {"name": "pi", "ram_bytes": 10, "read_bytes_per_s": 1e9, "macs_per_s": 1e9}
LOAD: dict[str, Any] = {"context": 64}


@pytest.mark.parametrize(
    ("kind", "base", "change", "message"),
    [
        (Unit, UNIT, {"name": ""}, "unit needs a name"),
        (Unit, UNIT, {"bytes": -1}, "unit layer 3: bytes must be a whole number >= 0, not -1"),
        (Unit, UNIT, {"macs": 1.5}, "unit layer 3: macs must be a whole number"),
        (Unit, UNIT, {"cut_bytes": True}, "unit layer 3: cut_bytes must be a whole number"),
        (Unit, UNIT, {"read_bytes": 11}, "unit layer 3: read_bytes 11 exceed its bytes 10"),
        (Device, DEVICE, {"name": None}, "device needs a name"),
        (Device, DEVICE, {"ram_bytes": -5}, "device pi: ram_bytes"),
        (Device, DEVICE, {"read_bytes_per_s": 0}, "device pi: read_bytes_per_s must be > 0"),
        (Device, DEVICE, {"macs_per_s": math.inf}, "device pi: macs_per_s must be finite"),
        (Device, DEVICE, {"macs_per_s": 1e19}, "device pi: macs_per_s is larger than 1e"),
        (Device, DEVICE, {"macs_per_s": 1e-4}, "device pi: macs_per_s must be >= 0.001"),
        (Device, DEVICE, {"ram_bytes": 1 << 61}, "device pi: ram_bytes is larger than"),
        (Device, DEVICE, {"name": "x" * 101}, "name of 101 characters"),
        (Device, DEVICE, {"idle_overhead_s": 2e9}, "device pi: idle_overhead_s is larger than"),
        (Device, DEVICE, {"row_rates": ((1, 1e9),) * 65}, "row_rates has 65 pairs, more than 64"),
        (Device, DEVICE, {"row_rates": ((5000, 1e9),)}, "rows of row_rates is larger than 4096"),
        (
            Device,
            DEVICE,
            {"row_rates": ((1, 5.0), (1, 6.0))},
            "rows of row_rates must be a whole number >= 2",
        ),
        (Device, DEVICE, {"row_rates": ((1, 5.0, 2),)}, "row_rates must be a tuple of"),
        (Device, DEVICE, {"row_rates": ((1, 0),)}, "MAC/s at 1 rows must be > 0"),
        (Device, DEVICE, {"attend_macs_per_s": 0}, "attend_macs_per_s must be > 0"),
        (Device, DEVICE, {"macs_per_s": "9"}, "device pi: macs_per_s must be a number"),
        (Device, DEVICE, {"step_overhead_s": -1e-9}, "device pi: step_overhead_s must be >= 0"),
        (Device, DEVICE, {"step_overhead_s": math.nan}, "device pi: step_overhead_s must be finite"),
        (
            LinkSpeed,
            {"latency_s": 0.0, "bytes_per_s": 1.0},
            {"latency_s": -1.0},
            "link's latency_s must be >= 0",
        ),
        (
            LinkSpeed,
            {"latency_s": 0.0, "bytes_per_s": 1.0},
            {"bytes_per_s": 0},
            "link's bytes_per_s must be > 0",
        ),
        (Workload, LOAD, {"context": 0}, "workload: context must be a whole number >= 1"),
        (Workload, LOAD, {"prompt_tokens": 65}, "a prompt of 65 exceeds the context of 64"),
        (Workload, LOAD, {"streams": 2}, "2 streams need as many sequences, and there are 1"),
        (Workload, LOAD, {"depth": 65}, "depth 65 exceeds the context of 64"),
        (Assignment, {"device": "pi", "first": 2, "last": 3}, {"last": 2}, "assignment to pi: last"),
    ],
)
def test_a_bad_field_is_refused(
    kind: Any, base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    kind(**base)
    with pytest.raises(ValueError, match=message):
        kind(**{**base, **change})


def test_a_model_needs_two_ends_and_shares_no_more_than_they_have() -> None:
    unit = Unit(**UNIT)
    ModelCosts((unit, unit), 10)
    with pytest.raises(ValueError, match="at least two units"):
        ModelCosts((unit,))
    with pytest.raises(ValueError, match="tied_bytes 11 exceed an end unit's 10 bytes"):
        ModelCosts((unit, unit), 11)
    with pytest.raises(ValueError, match="kv_page_tokens"):
        ModelCosts((unit, unit), kv_page_tokens=0)


def test_a_cluster_names_each_device_once_and_links_known_nodes() -> None:
    a, link = Device(**DEVICE), LinkSpeed(0.1, 1e6)
    with pytest.raises(ValueError, match="device pi is listed twice"):
        Cluster((a, a), {}, "head")
    with pytest.raises(ValueError, match="link pi -> pj: there is no device pj"):
        Cluster((a,), {("pi", "pj"): link}, "head")
    with pytest.raises(ValueError, match="at least one device"):
        Cluster((), {}, "head")
    with pytest.raises(ValueError, match="no device pj; there are pi"):
        Cluster((a,), {}, "head").device("pj")


def test_a_coordinator_that_computes_reaches_itself_for_nothing_unless_told() -> None:
    a, link = Device(**DEVICE), LinkSpeed(0.1, 1e6)
    assert Cluster((a,), {}, "pi").link("pi", "pi") == LOOPBACK
    assert Cluster((a,), {("pi", "pi"): link}, "pi").link("pi", "pi") == link
    assert Cluster((a,), {}, "head").link("head", "pi") is None


def test_rows_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Device(**DEVICE).ram_bytes = 11  # type: ignore[misc]
