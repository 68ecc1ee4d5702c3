"""The CPUs worth using: a phone's small cores slow the big ones down, which wait for their parts."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_BIG = 0.7
"""Least speed of a big core, as a share of the fastest: middle cores have 0.75 to 0.9 of it, small ones 0.5
to 0.65."""
_MOST_THREADS = 4
"""More have to share one memory, and heat a phone."""


def usable_cores() -> frozenset[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def big_cores(usable: Collection[int] | None = None, cpus: Path = _CPUS) -> frozenset[int]:
    """Those of the usable CPUs (default: all that this process may use) that are nearly as fast as the
    fastest; all of them where the system does not say how fast they are."""
    usable = usable_cores() if usable is None else usable
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = {cpu: _number(cpus / f"cpu{cpu}" / name) for cpu in usable}
        known = [speed for speed in speeds.values() if speed is not None]
        if len(known) == len(speeds):
            return frozenset(cpu for cpu, speed in speeds.items() if (speed or 0) >= _BIG * max(known))
    return frozenset(usable)


def default_threads() -> int:
    """Threads to run with where nobody said how many: one a big core, four at most."""
    return min(_MOST_THREADS, len(big_cores()))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # many phones hide one or the other
        return None
