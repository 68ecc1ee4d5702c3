"""Measurements of nodes and links at work: factors and links that correct the offers for the next plan.

A node compares the time of each step with its own offer, and pings the next node right after rows that it
sends; every Pong to the coordinator reports both. The coordinator pings each node itself. Nothing here waits
or reads a clock; times are in seconds of any clock that never goes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from ..planner import Device, LinkSpeed
from ..planner.rows import FASTEST, MOST_SECONDS, SLOWEST, check_real
from .cluster import ClusterState
from .inbox import Batch
from .messages import Pace, Pong, Step
from .placement import COORDINATOR

Expect = Callable[[Sequence[tuple[int, int, bool]], float], float]
"""Seconds that a call should take by profile: of (rows, first position, wants a token) for each of its steps,
after a pause of so many seconds."""

PING_SECONDS = 0.5
"""At most so often behind rows."""
WEIGHT = 0.1
"""Of one measurement: about the last twenty count."""
MOST_CHANGE = 4.0
"""Times quicker or slower that one measurement may look: beyond, it is a hiccup."""


class NodePace:
    """A node's steps against its offer, from one assignment to the next."""

    def __init__(self) -> None:
        self.slower = 1.0
        """How many times as long as its offer says its steps take."""
        self._expect: Expect | None = None
        self._ended: float | None = None

    def assigned(self, expect: Expect | None) -> None:
        """A stage begins, which should take so long; None: nobody knows."""
        self._expect, self._ended = expect, None

    def count(self, batch: Batch, start: float, end: float) -> None:
        """A call of the stage. The first one is not counted: weights come from the disk, pages are new."""
        if not batch.steps:
            return
        before, self._ended = self._ended, end
        if self._expect is None or before is None:
            return
        rows = [(len(step.tokens), step.first, step.want.value > 0) for step in batch.steps]
        expected = self._expect(rows, start - before)
        if expected > 0 and end > start:
            self.slower = refreshed_factor(self.slower, expected, end - start)


class Onward:
    """The link to the next node as rows find it, from what was measured before; None: nothing was."""

    def __init__(self, measured: LinkSpeed | None) -> None:
        self.measured = measured
        self._pinged = -PING_SECONDS
        self._size = 0
        self._nonce = 0

    def due(self, rows: Sequence[object], start: float) -> int | None:
        """The nonce of a ping to send behind these rows, which began to leave at `start`; None: no ping."""
        size = sum(row_bytes(row) for row in rows if isinstance(row, Step))
        if self.measured is None or not size or start - self._pinged < PING_SECONDS:
            return None
        self._pinged, self._size, self._nonce = start, size, self._nonce + 1
        return self._nonce

    def answered(self, nonce: int, now: float) -> None:
        """Its answer is here; one to an older ping says nothing."""
        if self.measured is not None and nonce == self._nonce:
            way = now - self._pinged - self.measured.latency_s
            self.measured = after(self.measured, self._size, way)


def row_bytes(step: Step) -> int:
    """About what a Step takes on the wire."""
    return 64 + 4 * len(step.tokens) + (0 if step.hidden is None else step.hidden.nbytes)


def slowed(device: Device, factor: float) -> Device:
    """The device with everything it does taking `factor` times as long (below 1: quicker): one that gets hot,
    or shares its cores, is slower in all it does, and the shape that its profile found stays. ValueError: a
    factor that is not above 0."""
    check_real(f"the slow factor of {device.name}", factor, above=0)

    def slower(rate: float) -> float:
        return _within(rate / factor) if rate < FASTEST else FASTEST  # the latter was never measured

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
    """The factor by which something takes longer than its row says, after it took `measured_s` where the row
    says `expected_s`: an exponentially weighted mean, in which a hiccup counts no more than MOST_CHANGE.
    ValueError: values that are not above 0."""
    for what, value in (("factor", factor), ("expected time", expected_s), ("measured time", measured_s)):
        check_real(f"the {what}", value, above=0)
    ratio = min(MOST_CHANGE, max(1 / MOST_CHANGE, measured_s / (factor * expected_s)))
    return factor * (1 + WEIGHT * (ratio - 1))


def refreshed_link(link: LinkSpeed, size: int, measured_s: float) -> LinkSpeed:
    """The link after a message of `size` bytes that took `measured_s` (see refreshed_factor). Latency and
    rate share the blame by their parts in what was expected, so a small message moves the one and a large one
    the other; the spread of the latency moves with it. ValueError: a time that is not above 0."""
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
    """A link after a message of `size` bytes that took so long, or no time that a clock shows."""
    return refreshed_link(link, size, max(seconds, 1e-6))


class ChainPace:
    """What a coordinator hears of its nodes, by label; it keeps `links` true."""

    def __init__(self, links: dict[tuple[str, str], LinkSpeed]) -> None:
        self._links = links
        self._slower: dict[str, float] = {}
        self._pinged: dict[int, tuple[int, float]] = {}
        self._nonce = 0

    def slower(self, label: str) -> float:
        """How many times as long as it offered a node takes; 1 as long as it has said nothing."""
        return self._slower.get(label, 1.0)

    def pinged(self, member: int, now: float) -> int:
        """The nonce for a ping that is sent to a member now."""
        self._nonce += 1
        self._pinged[member] = (self._nonce, now)
        return self._nonce

    def answered(self, state: ClusterState, member: int, pong: Pong, now: float) -> None:
        """A member's Pong: half of the way there and back is each link's latency; and what it says of itself,
        when it is of the current epoch."""
        label = state.members[member].label
        nonce, sent = self._pinged.get(member, (-1, now))
        if pong.nonce == nonce:
            for ends in ((COORDINATOR, label), (label, COORDINATOR)):
                if ends in self._links:
                    self._links[ends] = after(self._links[ends], 0, (now - sent) / 2)
        labels = [stage.device for stage in state.placement.stages]
        if pong.pace is not None and pong.pace.epoch == state.epoch and label in labels:
            self._told(label, dict(pairwise(labels)).get(label), pong.pace)

    def _told(self, label: str, following: str | None, pace: Pace) -> None:
        """A radio that is slow one way is taken to be so the other way too: else the next plan would turn a
        chain round for nothing."""
        self._slower[label] = pace.slower
        if following is not None and pace.onward is not None:
            self._links[label, following] = pace.onward
            back = self._links.get((following, label))
            if back is not None:
                self._links[following, label] = replace(pace.onward, bytes_per_s=back.bytes_per_s)
