"""Measurements of nodes and links at work: factors and links that correct the offers for the next plan.

A node compares the time of each step with its own offer, and pings the next node right after rows that it
sends; every Pong to the coordinator reports both. The coordinator pings each node itself. Nothing here waits
or reads a clock; times are in seconds of any clock that never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from ..engine.measure import median
from ..planner import Device, LinkSpeed
from ..planner.rows import FASTEST, MOST_SECONDS, SLOWEST, check_real
from .inbox import Batch
from .liveness import LOAD_SECONDS, Stillness, call_bound
from .messages import Epoch, Progress, Step
from .scheduler import Expect

PING_SECONDS = 0.5
"""The shortest time between two pings after rows."""
WEIGHT = 0.1
"""The weight of a new measurement in the moving average: about the last twenty count."""
MOST_CHANGE = 4.0
"""The largest change, as a factor, that one measurement may show; a larger one is a hiccup and is clamped."""


JUMP, AGREEING = 1.3, 6
"""If so many decode calls in a row take longer than expected by this factor, or shorter, the device has
changed: their median is taken."""

MOST_SLOWER = 1e6
"""The largest factor, and its inverse the smallest, that a node reports."""

BUSY_TICKS = 4
"""For so many ticks after a call a stage counts as busy: it waits for the next one."""


class NodePace:
    """How many times as long as offered a node's steps take, and how far the current call is. The factor is
    kept from one assignment to the next. `first_call` bounds calls whose times are not predicted."""

    def __init__(self, first_call: float = LOAD_SECONDS) -> None:
        self.slower = 1.0
        """The time of the node's steps, divided by the time that its offer predicts."""
        self._expect: Expect | None = None
        self._ended: float | None = None
        self._first_call = first_call
        self._ratios = deque[float](maxlen=AGREEING)
        """Measured to expected times of the last decode calls."""
        self._running: Batch | None = None
        self._calls = 0
        self._age, self._still = 0.0, Stillness()
        self._unused, self._seen = BUSY_TICKS, 0
        """Ticks since a call ran, and the calls at the last one."""
        self._rest = 0.0
        self._reading, self._first = 0.0, True
        """What the first call may take longer; whether it has not been counted yet."""

    def assigned(self, expect: Expect | None, reading: float | None = None) -> None:
        """Begins a stage, whose times `expect` predicts; None if nothing is known. `reading`: it goes on from
        an earlier epoch, and its first call may take so many seconds more, to read units that have come."""
        self._expect, self._calls, self._rest = expect, 0, 0.0
        self._reading, self._first = reading or 0.0, True
        if reading is None:
            self._ended = None

    def began(self, batch: Batch) -> None:
        """Notes that a call of the stage begins. It is called in any thread."""
        self._running = batch

    def returned(self) -> None:
        """Notes that the call has returned, in any thread; `count` follows once its results are sent."""
        self._running, self._calls = None, self._calls + 1

    def rests(self, seconds: float) -> None:
        """Notes, in any thread, that the stage rests for so long after a call; 0: no longer."""
        self._rest = seconds

    def tick(self, now: float) -> None:
        """Measures how long the current call has been running, to the time between two ticks."""
        running = self._running
        self._age = self._still.seconds(now, self._calls, due=running is not None)
        worked = running is not None or self._calls != self._seen
        self._unused, self._seen = 0 if worked else self._unused + 1, self._calls

    @property
    def busy(self) -> bool:
        """Whether the stage computes, or has done so within the last BUSY_TICKS ticks."""
        return self._running is not None or self._unused < BUSY_TICKS

    def progress(self, epoch: Epoch, waiting: int) -> Progress:
        """How far the stage of that epoch is, with `waiting` bytes in its inbox. A rest is told as a call
        that has just begun and takes as long, so that it is waited for and never counts as too long."""
        running, rest = self._running, self._rest
        if running is None and rest > 0:
            return Progress(epoch, self._calls, 0.0, rest, waiting)
        if running is None:
            return Progress(epoch, self._calls, None, None, waiting)
        return Progress(epoch, self._calls, self._age, self.expected(running), waiting)

    def stuck(self, unseen: float = 0.0) -> float | None:
        """For how long the current call has been running, if that is too long; else None. `unseen` seconds
        have passed since the last tick."""
        running = self._running
        if running is None:
            return None
        expected = self.expected(running)
        bound = self._first_call if expected is None else call_bound(expected)
        age = self._age + unseen
        return age if age > bound else None

    def expected(self, batch: Batch) -> float | None:
        """The seconds that a call should take now; None for the first one of a node, or if nothing is
        known."""
        if self._expect is None or self._ended is None or not batch.steps:
            return None
        reading = self._reading if self._first else 0.0
        return max(1.0, self.slower) * self._expect(_rows(batch), 0.0) + reading

    def count(self, batch: Batch, start: float, end: float) -> None:
        """Counts a call of the stage. The first one, which reads weights from disk and allocates pages, does
        not count for the factor."""
        if not batch.steps:
            return
        before, self._ended = self._ended, end
        first, self._first = self._first, False
        if self._expect is None or before is None or first:
            return
        expected = self._expect(_rows(batch), start - before)
        if expected <= 0 or end <= start:
            return
        self.slower = refreshed_factor(self.slower, expected, end - start)
        if any(step.rows > 1 for step in batch.steps):
            self._ratios.clear()  # chunks of prompts are predicted less well
            return
        self._ratios.append((end - start) / expected)
        if len(self._ratios) == AGREEING and (
            min(self._ratios) > JUMP * self.slower or max(self._ratios) < self.slower / JUMP
        ):
            self.slower = min(MOST_SLOWER, max(1 / MOST_SLOWER, median(self._ratios)))
            self._ratios.clear()


def _rows(batch: Batch) -> list[tuple[int, int, bool]]:
    return [(step.rows, step.first, step.want.value > 0) for step in batch.steps]


class Onward:
    """The link to the next node, measured with the rows that are sent. It starts from the value measured by a
    probe; with None it is not measured at all."""

    def __init__(self, measured: LinkSpeed | None) -> None:
        self.measured = measured
        self._pinged = -PING_SECONDS
        self._size = 0
        self._nonce = 0

    def due(self, rows: Sequence[object], start: float) -> int | None:
        """The nonce of a ping to send after rows whose sending began at `start`; None if no ping is due."""
        if self.measured is None or start - self._pinged < PING_SECONDS:
            return None
        size = sum(row_bytes(row) for row in rows if isinstance(row, Step))
        if not size:
            return None
        self._pinged, self._size, self._nonce = start, size, self._nonce + 1
        return self._nonce

    def answered(self, nonce: int, now: float) -> None:
        """Updates the link from the Pong with that nonce; a Pong to an older ping is ignored."""
        if self.measured is not None and nonce == self._nonce:
            way = now - self._pinged - self.measured.latency_s
            self.measured = after(self.measured, self._size, way)


def row_bytes(step: Step) -> int:
    """The approximate size of a Step on the wire."""
    return 64 + (4 * step.rows if step.hidden is None else step.hidden.nbytes)


def slowed(device: Device, factor: float) -> Device:
    """The device with all of its times multiplied by `factor`. A device that is hot or shares its cores is
    slower in everything it does, so one factor for all rates is a good model. ValueError: a factor that is
    not above 0."""
    check_real(f"the slow factor of {device.name}", factor, above=0)

    def slower(rate: float) -> float:
        return (
            _within(rate / factor) if rate < FASTEST else FASTEST
        )  # FASTEST means that the rate was not measured

    return replace(
        device,
        read_bytes_per_s=slower(device.read_bytes_per_s),
        macs_per_s=slower(device.macs_per_s),
        step_overhead_s=min(MOST_SECONDS, device.step_overhead_s * factor),
        idle_overhead_s=min(MOST_SECONDS, device.idle_overhead_s * factor),
        row_rates=tuple((rows, slower(rate)) for rows, rate in device.row_rates),
        attend_macs_per_s=slower(device.attend_macs_per_s),
        prefill_attend_macs_per_s=slower(device.prefill_attend_macs_per_s),
    )


def refreshed_factor(factor: float, expected_s: float, measured_s: float) -> float:
    """The factor between measured and expected times, updated by one measurement: an exponentially weighted
    moving average, in which one measurement changes by at most MOST_CHANGE. ValueError: values that are not
    above 0."""
    for what, value in (("factor", factor), ("expected time", expected_s), ("measured time", measured_s)):
        check_real(f"the {what}", value, above=0)
    ratio = min(MOST_CHANGE, max(1 / MOST_CHANGE, measured_s / (factor * expected_s)))
    return factor * (1 + WEIGHT * (ratio - 1))


def refreshed_link(link: LinkSpeed, size: int, measured_s: float) -> LinkSpeed:
    """The link, updated by a message of `size` bytes that took `measured_s` (see refreshed_factor). The
    change is divided between latency and rate by their shares in the expected time, so a small message mostly
    changes the latency and a large one the rate. The 95th percentile of the latency changes with the latency.
    ValueError: a time that is not above 0."""
    check_real("the measured hop", measured_s, above=0)
    busy = size / link.bytes_per_s
    expected = link.latency_s + busy
    if expected == 0:
        return replace(link, latency_s=WEIGHT * measured_s)
    change, share = refreshed_factor(1.0, expected, measured_s) - 1, busy / expected
    later, rate = 1 + (1 - share) * change, link.bytes_per_s / (1 + share * change)
    return LinkSpeed(
        min(MOST_SECONDS, link.latency_s * later),
        rate if rate == math.inf else _within(rate),
        min(MOST_SECONDS, link.latency_p95_s * later),
    )


def _within(rate: float) -> float:
    return min(FASTEST, max(SLOWEST, rate))


def after(link: LinkSpeed, size: int, seconds: float) -> LinkSpeed:
    """refreshed_link for a time that may be 0 or less, within the clock's resolution."""
    return refreshed_link(link, size, max(seconds, 1e-6))
