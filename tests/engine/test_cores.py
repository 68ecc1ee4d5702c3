"""Big cores by what the system says of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.engine.backends.native import pinned
from shoal.engine.cores import big_cores, default_threads, usable_cores


def system(folder: Path, name: str, values: dict[int, object]) -> Path:
    for cpu, value in values.items():
        path = folder / f"cpu{cpu}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return folder


def test_a_phone(tmp_path: Path) -> None:
    """Four small cores, three middle ones, one that is faster still."""
    speeds = dict(enumerate([1600, 1600, 1600, 1600, 2400, 2400, 2400, 3000]))
    system(tmp_path, "cpufreq/cpuinfo_max_freq", {cpu: mhz * 1000 for cpu, mhz in speeds.items()})
    assert big_cores(range(8), tmp_path) == {4, 5, 6, 7}
    assert big_cores({0, 1, 2}, tmp_path) == {0, 1, 2}
    assert big_cores({0, 4}, tmp_path) == {4}


def test_capacity_counts_before_frequency(tmp_path: Path) -> None:
    """A small core may run at the frequency of a big one and do a third of its work."""
    system(tmp_path, "cpufreq/cpuinfo_max_freq", dict.fromkeys(range(4), 2000000))
    system(tmp_path, "cpu_capacity", {0: 300, 1: 300, 2: 1024, 3: 1024})
    assert big_cores(range(4), tmp_path) == {2, 3}


@pytest.mark.parametrize("values", [{}, {0: 2000000}, {0: 2000000, 1: "?"}])
def test_all_where_nothing_is_known(tmp_path: Path, values: dict[int, object]) -> None:
    system(tmp_path, "cpufreq/cpuinfo_max_freq", values)
    assert big_cores({0, 1}, tmp_path) == {0, 1}


def test_here() -> None:
    assert big_cores() <= usable_cores()
    assert 1 <= default_threads() <= 4


def test_pinned_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    with pinned(one):
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before
