"""Keeps this machine's own ups and downs out of a lab.

A core that sleeps between steps is slow for many milliseconds when it wakes, and neighbours on the same host
take memory bandwidth for seconds: 30 % both. So a process of the lowest priority keeps every core awake, and
where devices take turns a thread reads some memory ten times a second and lets their slow-down factors follow
what it finds: a device of speed 0.4 takes 1 / 0.4 of the time that this machine takes when it is as quick as
when the lab opened.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle

import numpy as np

from shoal.engine.host import usable_cpus

_BYTES, _PARTS = 32_000_000, 6  # a part that is read again has left every cache meanwhile
_PAUSE_SECONDS = 0.1
_FIRST, _LAST = 24, 10
_SPIN = """
import ctypes, os, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True:
    pass
"""


@contextmanager
def awake() -> Iterator[list[int]]:
    """No core sleeps meanwhile; the ids of the processes that see to it."""
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in usable_cpus()]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def followed(
    turn: Callable[[], AbstractContextManager[None]], tell: Callable[[float], None], crowded: threading.Event
) -> Iterator[None]:
    """Tells how quick this machine is, 1 being as now, some times a second; each time it looks within a
    `turn`, since whoever else computes takes memory bandwidth. While `crowded` it looks between any two
    turns: what it reads takes the place, in the last cache, of the weights of whoever has a turn, as those of
    the other devices do in a run. A node that measures itself alone would find some of its own there."""
    parts, ended = cycle(np.ones((_PARTS, _BYTES // 8), np.int64)), threading.Event()

    def rate() -> float:
        with turn():
            part, start = next(parts), time.thread_time()
            part.max()
            return 1 / (time.thread_time() - start)

    nominal = statistics.median(rate() for _ in range(_FIRST))
    recent = deque([nominal] * _LAST, _LAST)

    def follow() -> None:
        while not ended.wait(0 if crowded.is_set() else _PAUSE_SECONDS):
            recent.append(rate())
            tell(statistics.median(recent) / nominal)

    thread = threading.Thread(target=follow, name="pace", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
