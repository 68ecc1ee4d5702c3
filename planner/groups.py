"""How concurrent sequences share calls: in how many groups, how long they may wait for each other, and the
tokens/s that follow.

A group is a set of sequences whose rows are computed together on every stage. Groups follow each other along
the chain. A round, in which each sequence gets one token, takes a lap of the largest group, or the time for
which all groups together occupy the busiest stage or link, whichever is longer. Many small groups keep all
stages busy; few large ones share the reading of the weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .cost import CALL_STEPS, PAUSE_SECONDS
from .rows import check_seconds, check_whole

MOST_SEQUENCES = CALL_STEPS
"""The numbers of sequences for which a chain's groups are computed in advance: 1 up to this one."""
NEAR = 1.01
"""The smallest number of groups is chosen among those whose round takes at most this much longer than the
best, since fewer groups leave the stages more time for delays."""
LAPS = 2
"""A group may wait for a sequence for as long as having it back saves the busiest stage in so many laps."""


class Calls(Protocol):
    """The costs of a stage's decode calls, such as cost.StageCost."""

    @property
    def pause(self) -> float:
        """Seconds that a call takes longer after a pause."""

    @property
    def position(self) -> float:
        """Seconds of the attention of one row to one position."""

    def rows(self, count: int, /) -> float:
        """Seconds of a call of so many rows without the positions that they attend to."""


class Way(Protocol):
    """A chain as rows pass it: the stages, and the latency and the seconds a row of every hop."""

    @property
    def stages(self) -> Sequence[Calls]: ...
    @property
    def latency(self) -> Sequence[float]: ...
    @property
    def busy(self) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Grouping:
    """The number of groups for a number of sequences, and the longest time in seconds that the rows of a
    group wait for another of its sequences while the stage is idle."""

    groups: int
    wait: float = 0.0

    def __post_init__(self) -> None:
        check_whole("the number of groups", self.groups, 1)
        check_seconds("the wait of a group", self.wait)


def sizes(count: int, groups: int) -> list[int]:
    """The sequences of each group, largest first: as equal as possible."""
    small, more = divmod(count, groups)
    return [small + 1] * more + [small] * (groups - more)


def round_seconds(way: Way, count: int, groups: int, depth: int = 0) -> float:
    """Seconds in which each of `count` sequences at that depth gets one token, in so many groups."""
    parts = sizes(count, groups)
    calls = [[stage.rows(rows) + rows * depth * stage.position for rows in parts] for stage in way.stages]
    lap = sum(times[0] for times in calls) + sum(way.latency) + parts[0] * sum(way.busy)
    taken = [sum(times) for times in calls]
    busiest = max(*taken, count * max(way.busy))
    seconds = max(lap, busiest)
    # A stage that is idle for long before each of its calls pays for a pause in each.
    pauses = [
        stage.pause if (seconds - busy) / groups > PAUSE_SECONDS else 0.0
        for stage, busy in zip(way.stages, taken, strict=True)
    ]
    paused = (busy + groups * pause for busy, pause in zip(taken, pauses, strict=True))
    return max(lap + sum(pauses), busiest, *paused)


def best_groups(way: Way, count: int, depth: int = 0) -> int:
    """The number of groups with which `count` sequences get the most tokens/s, or almost as many with fewer
    groups. No group has more rows than a call may have."""
    least = -(-count // CALL_STEPS)
    rounds = {groups: round_seconds(way, count, groups, depth) for groups in range(least, count + 1)}
    limit = min(rounds.values()) * NEAR
    return next(groups for groups, seconds in rounds.items() if seconds <= limit)


def grouping(way: Way, count: int, depth: int = 0) -> Grouping:
    """The best number of groups, and the wait that pays: the time of the busiest stage that is saved, in LAPS
    laps, if a sequence has its row in the call of its group instead of a call of its own."""
    groups = best_groups(way, count, depth)
    rows = sizes(count, groups)[0]
    if rows == 1:
        return Grouping(groups)
    busiest = max(way.stages, key=lambda stage: stage.rows(rows) + rows * depth * stage.position)
    saved = busiest.rows(1) + busiest.rows(rows - 1) - busiest.rows(rows)
    return Grouping(groups, LAPS * max(0.0, saved))


def groupings(way: Way, depth: int = 0) -> tuple[Grouping, ...]:
    """The groupings of 1, 2, 3 … MOST_SEQUENCES sequences at that depth."""
    return tuple(grouping(way, count, depth) for count in range(1, MOST_SEQUENCES + 1))


def plain_groupings(stages: int) -> tuple[Grouping, ...]:
    """Groupings where no costs are known: a group for each stage, and no wait."""
    return tuple(Grouping(min(count, stages)) for count in range(1, MOST_SEQUENCES + 1))


def of_many(known: Sequence[Grouping], count: int) -> Grouping:
    """The grouping of `count` sequences from a table of those of 1, 2, 3 … sequences. Beyond its end groups
    keep their size, within the rows of a call."""
    if count <= len(known):
        return known[count - 1]
    last = known[-1]
    most = min(CALL_STEPS, math.ceil(len(known) / last.groups))
    return Grouping(-(-count // most), last.wait)
