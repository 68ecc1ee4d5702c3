"""How concurrent sequences share calls: in how many groups, how long they may wait for each other, and the
tokens/s that follow.

A group is a set of sequences whose rows are computed together on every stage. Groups follow each other along
the chain. A round, in which each sequence gets one token, takes a lap of the largest group, or the time for
which all groups together occupy the busiest stage or link, or the memory of a machine that has several
stages, whichever is longest. Many small groups keep all stages busy; few large ones share the reading of the
weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .cost import CALL_STEPS, PAUSE_SECONDS, Step
from .rows import MOST_ROWS, check_real, check_seconds, check_whole

MOST_SEQUENCES = CALL_STEPS
"""The numbers of sequences for which a chain's groups are computed in advance: 1 up to this one."""
NEAR = 1.05
"""Numbers of groups whose round takes at most so many times as long as the best count as equal. The one
nearest to a group for each stage is chosen: measured costs are not exact, and fuller calls lose less where
links or devices are slower than measured."""
SHARED = 1.25
"""How many times as fast as one stage several of a machine read weights at once. A core alone reads most of
what the memory gives: on two cores of a virtual Zen 5, two stages get 1.3 to 2 times as much as one."""
LAPS = 3
"""A group may wait for a sequence for as long as having it back saves the busiest stage in so many laps."""
STRETCH = 2.0
"""In how many rounds of sequences that decode a stage, or a link, must be done with a slice of a prompt."""
MOST_SLICE = 256
DEEP = 1024
"""The position of a prompt whose attention tells how chunks and slices of it should shrink."""


class Calls(Protocol):
    """The costs of a stage's calls, such as cost.StageCost."""

    @property
    def pause(self) -> float:
        """Seconds that a call takes longer after a pause."""

    @property
    def position(self) -> float:
        """Seconds of the attention of one row to one position."""

    def rows(self, count: int, /) -> float:
        """Seconds of a call of so many decoded rows without the positions that they attend to."""

    def call_seconds(self, steps: Sequence[Step], /) -> float:
        """Seconds of a call of any steps."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """The costs of a stage whose calls have decoded rows alone: seconds by their rows, entry 0 unused."""

    seconds: Sequence[float]
    pause: float = 0.0
    position: float = 0.0

    def rows(self, count: int) -> float:
        return self.seconds[count]

    def call_seconds(self, steps: Sequence[Step]) -> float:
        return self.seconds[min(sum(rows for rows, _, _ in steps), len(self.seconds) - 1)]


@dataclass(frozen=True, slots=True)
class Way:
    """A chain as rows pass it. Of each stage what its calls take; of each hop, coordinator to first and last
    to coordinator included, its latency, and for how long a row (on the last, a message) takes the link.
    `together`: pairs of stages that one CPU computes. `shared`: stages that read from one memory."""

    stages: Sequence[Calls]
    latency: Sequence[float]
    busy: Sequence[float]
    together: Sequence[tuple[int, int]] = ()
    shared: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a number of sequences that decode share calls: the number of groups, the longest time in seconds
    that the rows of a group wait for another of its sequences while the stage is idle, and the most rows of
    prompts in a call: `rows` at their beginning, and at position p a part of 1 / (1 + p · slope) of them."""

    groups: int
    wait: float = 0.0
    rows: int = MOST_ROWS
    slope: float = 0.0

    def __post_init__(self) -> None:
        check_whole("the number of groups", self.groups, 1)
        check_seconds("the wait of a group", self.wait)
        check_whole("the rows of prompts", self.rows, 1, MOST_ROWS)
        check_real("the slope of rows of prompts", self.slope, least=0)

    def slice(self, position: int) -> int:
        """The most rows of prompts from that position on in a call."""
        return max(1, int(self.rows / (1 + position * self.slope)))


def sizes(count: int, groups: int) -> list[int]:
    """The sequences of each group, largest first: as equal as possible."""
    small, more = divmod(count, groups)
    return [small + 1] * more + [small] * (groups - more)


def round_seconds(way: Way, count: int, groups: int, depth: int = 0) -> float:
    """Seconds in which each of `count` sequences at that depth gets one token, in so many groups."""
    small, more = divmod(count, groups)
    large = small + 1 if more else small

    def call(stage: Calls, rows: int) -> float:
        return stage.rows(rows) + rows * depth * stage.position if rows else 0.0

    def lap_of(rows: int) -> float:
        return sum(call(stage, rows) for stage in way.stages) + sum(way.latency) + rows * sum(way.busy)

    calls = [call(stage, large) for stage in way.stages]
    taken = [
        more * seconds + (groups - more) * call(stage, small) if more else groups * seconds
        for stage, seconds in zip(way.stages, calls, strict=True)
    ]
    lap = lap_of(large)
    either = (lap + lap_of(small)) / 2 if more else lap
    shared = [taken[i] + taken[j] for i, j in way.together]
    shared += [groups * sum(way.stages[i].rows(1) for i in one) / SHARED for one in way.shared]
    busiest = max(*taken, *shared, count * max(way.busy))
    seconds, paused = max(lap, busiest), 0.0
    while True:
        # Groups follow each other closely, so a stage is idle once in a round, and the group that comes first
        # pays for a pause: a large one or a small one.
        pauses = sum(
            stage.pause
            for stage, busy in zip(way.stages, taken, strict=True)
            if seconds - busy > PAUSE_SECONDS
        )
        if pauses <= paused:
            return seconds
        paused = pauses
        seconds = max(lap, either + pauses, busiest)


def best_groups(way: Way, count: int, depth: int = 0) -> int:
    """The number of groups with which `count` sequences get the most tokens/s. No group has more rows than a
    call may have; of all numbers of groups with the same largest group, the smallest is best."""
    usual = min(count, len(way.stages))
    numbers = {-(-count // rows) for rows in range(1, min(count, CALL_STEPS) + 1)}
    if usual * CALL_STEPS >= count:
        numbers.add(usual)
    rounds = {groups: round_seconds(way, count, groups, depth) for groups in sorted(numbers)}
    limit = NEAR * min(rounds.values())
    near = [groups for groups, seconds in rounds.items() if seconds <= limit]
    return min(near, key=lambda groups: abs(groups - usual))


def grouping(way: Way, count: int, depth: int = 0) -> Grouping:
    """The best number of groups; the wait that pays: the time of the busiest stage that is saved, in LAPS
    laps, if a sequence has its row in the call of its group instead of a call of its own; and the rows of
    prompts that go with a group."""
    groups = best_groups(way, count, depth)
    rows = -(-count // groups)
    longest = STRETCH * round_seconds(way, count, groups, depth)
    start, deep = (slice_rows(way, rows, depth, position, longest) for position in (0, DEEP))
    slope = (start / deep - 1) / DEEP
    if rows == 1:
        return Grouping(groups, 0.0, start, slope)
    busiest = max(way.stages, key=lambda stage: stage.rows(rows) + rows * depth * stage.position)
    saved = busiest.rows(1) + busiest.rows(rows - 1) - busiest.rows(rows)
    return Grouping(groups, LAPS * max(0.0, saved), start, slope)


def slice_rows(way: Way, rows: int, depth: int, position: int, seconds: float) -> int:
    """The most rows of a prompt from that position on with which a call of `rows` decoded rows takes at most
    so many seconds on every stage, and which a link carries in as many; at least one."""
    decoding = [(1, depth, True)] * rows
    row = max(way.busy)

    def fits(count: int) -> bool:
        steps = [*decoding, (count, position, False)]
        return count * row <= seconds and all(s.call_seconds(steps) <= seconds for s in way.stages)

    low, high = 1, MOST_SLICE + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
    return replace(last, groups=-(-count // most))
