"""Figures of the times at which the tokens of several streams came. All times are seconds of one clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

Times = Sequence[Sequence[float]]
"""Of each stream, in order."""


def count(times: Times, start: float, end: float) -> int:
    """The tokens of all streams that came after `start`, and not after `end`."""
    return sum(start < at <= end for own in times for at in own)


def speed(times: Times, start: float, end: float) -> float:
    """Tokens/s of all streams together."""
    return count(times, start, end) / (end - start)


def slowest(times: Times, start: float, end: float, seconds: float) -> float:
    """The least speed of all windows of so many seconds, one beside the other."""
    windows = max(1, int((end - start) / seconds))
    edges = [start + (end - start) * i / windows for i in range(windows + 1)]
    return min(speed(times, a, b) for a, b in pairwise(edges))


def settled(times: Times, start: float, end: float, least: float, seconds: float) -> float | None:
    """How long after `start` the first window of so many seconds begins in which, and after which until
    `end`, the streams are at least as fast as `least`; None if there is none."""
    edges = [at for at in sorted({start, *(t for own in times for t in own)}) if start <= at <= end - seconds]
    for at in edges:
        if speed(times, at, at + seconds) >= least and speed(times, at, end) >= least:
            return at - start
    return None


def gap(own: Sequence[float], start: float, end: float) -> float:
    """The longest time without a token of a stream, of those that are at least partly between `start` and
    `end`. One that has not ended counts as far as `end`."""
    gaps = [b - a for a, b in pairwise(own) if b > start and a < end]
    if own and own[-1] < end:
        gaps.append(end - max(own[-1], start))
    return max(gaps, default=end - start)


def longest_gap(times: Times, start: float, end: float) -> float:
    """Of all streams."""
    return max(gap(own, start, end) for own in times)


def usual_gap(own: Sequence[float], spans: Sequence[tuple[float, float]]) -> float:
    """The median time between two tokens of a stream that came within one of these spans. ValueError: there
    are none."""
    gaps = [b - a for a, b in pairwise(own) if any(start <= a and b <= end for start, end in spans)]
    if not gaps:
        raise ValueError("no two tokens came one after the other")
    return statistics.median(gaps)


def lost(times: Times, start: float, end: float, pace: float) -> float:
    """How many tokens fewer came than at `pace` tokens/s; less than 0: more came."""
    return pace * (end - start) - count(times, start, end)
