"""How far other programs are at work on this machine: they take cores and memory bandwidth from a lab."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol


class Processes(Protocol):
    """What is needed of a Lab."""

    def processes(self) -> list[int]:
        """Ids of its processes."""


class Others:
    """CPU time that this machine spends on what is not part of a lab."""

    def __init__(self, lab: Processes) -> None:
        self._lab = lab
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), _busy() - _own() - sum(_of(number) for number in self._lab.processes())

    def cores(self) -> float:
        """How many cores the others took since this was made."""
        (start, before), (now, after) = self._start, self._now()
        return max(0.0, after - before) / max(now - start, 1e-9)


def _busy() -> float:
    """Seconds of all cores, waiting for disks and idling excepted."""
    user, nice, system, _idle, _wait, irq, soft, stolen = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    times = os.times()
    return times.user + times.system


def _of(number: int) -> float:
    """User and system seconds of a process; 0 once it has gone."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text("ascii", "replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
