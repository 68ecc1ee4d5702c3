"""The cost formulas evaluated for one problem, in the shape that the searches step through.

A search builds chains device by device. Its state is "the last used device ends at boundary c"; one step
takes the cheapest arrivals at device j (`arrive[b]`: all of the chain before, the hop into j included, when j
starts at unit b) and gives the cheapest ends (`ends[c]`) with the start of each. `TimeTables` counts seconds;
`LackTables` counts the bytes that a chain lacks under the caps, for the answer to a problem that has no plan.
tabulate.py fills them.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

INF = math.inf
Hops = Sequence[Sequence[Sequence[float] | None]]  # [i][j][b]: None where there is no link i -> j


class Tables(Protocol):
    """What a search needs: costs of entering, passing on and leaving, and the step. Devices by index."""

    @property
    def units(self) -> int: ...
    @property
    def enter(self) -> Sequence[float]: ...
    @property
    def leave(self) -> Sequence[float]: ...
    @property
    def hop(self) -> Hops: ...
    @property
    def pins(self) -> Mapping[int, int]: ...
    def extend(self, j: int, arrive: Sequence[float]) -> tuple[list[float], list[int]]: ...


def starts_of(units: int, layers: int, c: int) -> range:
    """The starts b for which [b, c) has exactly `layers` >= 1 of the units 1 … units - 2."""
    b = min(c, units - 1) - layers
    if b == 1:
        return range(2)  # with the embedding, or without
    return range(b, b + 1) if b > 1 else range(0)


@dataclass(frozen=True, slots=True)
class TimeTables:
    """Seconds of one call that passes through the chain: a decoded row, a row of each of some sequences, or
    a chunk of a prompt. Infinite where there is no link or no room.

    A *round* is the sum over stages and hops; the *places* are what each stage and link is taken for by one
    call of many. The two differ by what happens once: pauses, a prompt's one row of logits. All prefixes
    are [j][u]: units [0, u) on device j.
    """

    units: int
    enter: Sequence[float]
    leave: Sequence[float]
    hop: Hops
    busy_enter: Sequence[float]
    busy_leave: Sequence[float]
    busy: Hops
    overhead: Sequence[float]  # of a stage, in a round
    prefix: Sequence[Sequence[float]]
    place_overhead: Sequence[float]
    place_prefix: Sequence[Sequence[float]]
    first_fit: Sequence[Sequence[int]]  # [j][c]: the least b such that [b, c) fits on j; c when none does
    relief: Sequence[float]  # what a round saves when the device holds everything: it never pauses then
    pins: Mapping[int, int] = field(default_factory=dict)  # devices that hold exactly so many layers

    def stage(self, j: int, first: int, last: int) -> float:
        """Seconds of units [first, last) on device j in a round."""
        seconds = self.overhead[j] + (self.prefix[j][last] - self.prefix[j][first])
        return seconds - self.relief[j] if last - first == self.units else seconds

    def place(self, j: int, first: int, last: int) -> float:
        """Seconds for which one call takes units [first, last) on device j."""
        return self.place_overhead[j] + (self.place_prefix[j][last] - self.place_prefix[j][first])

    def fits(self, j: int, first: int, last: int) -> bool:
        """Whether device j may hold units [first, last)."""
        pinned = self.pins.get(j)
        return first >= self.first_fit[j][last] and (
            pinned is None or first in starts_of(self.units, pinned, last)
        )

    def extend(self, j: int, arrive: Sequence[float]) -> tuple[list[float], list[int]]:
        """Cheapest ends and their starts. Room shrinks monotonically, so each end's starts are a sliding
        window, and `arrive[b] - prefix[b]` is all of the cost that depends on b: a queue of minima makes it
        linear."""
        prefix, fit, overhead, units = self.prefix[j], self.first_fit[j], self.overhead[j], self.units
        ends, starts = [INF] * (units + 1), [-1] * (units + 1)
        if j in self.pins:
            for c in range(1, units + 1):
                for b in starts_of(units, self.pins[j], c):
                    if b >= fit[c] and arrive[b] + self.stage(j, b, c) < ends[c]:
                        ends[c], starts[c] = arrive[b] + self.stage(j, b, c), b
            return ends, starts
        queue: deque[tuple[float, int]] = deque()
        for c in range(1, units + 1):
            b = c - 1
            key = arrive[b] - prefix[b]
            if key < INF:
                while queue and queue[-1][0] >= key:
                    queue.pop()
                queue.append((key, b))
            while queue and queue[0][1] < fit[c]:
                queue.popleft()
            if queue:
                ends[c], starts[c] = queue[0][0] + prefix[c] + overhead, queue[0][1]
        if fit[units] == 0 and arrive[0] + self.stage(j, 0, units) < ends[units]:
            ends[units], starts[units] = arrive[0] + self.stage(j, 0, units), 0
        return ends, starts

    def within(self, limit: float) -> "TimeTables":
        """The same problem where no place may be taken for more than `limit` seconds."""
        fits = []
        for j, fit in enumerate(self.first_fit):
            tight, b = list(fit), 0
            line, room = self.place_prefix[j], limit - self.place_overhead[j]
            for c in range(1, self.units + 1):
                b = max(b, fit[c])
                while b < c and line[c] - line[b] > room:
                    b += 1
                tight[c] = b
            fits.append(tight)
        return replace(
            self,
            first_fit=fits,
            enter=_cut(self.enter, self.busy_enter, limit),
            leave=_cut(self.leave, self.busy_leave, limit),
            hop=[
                [
                    None if hop is None or busy is None else _cut(hop, busy, limit)
                    for hop, busy in zip(hops, busies, strict=True)
                ]
                for hops, busies in zip(self.hop, self.busy, strict=True)
            ],
        )

    def limits(self, least: float, most: float) -> list[float]:
        """Every time that a stage with room or a link can be taken for within [least, most], and both,
        ascending; a hair more each, so that rounding leaves them allowed."""
        found = {least, most}
        for j, fit in enumerate(self.first_fit):
            line, overhead = self.place_prefix[j], self.place_overhead[j]
            for c in range(1, self.units + 1):
                for b in range(c - 1, fit[c] - 1, -1):
                    seconds = overhead + (line[c] - line[b])
                    if seconds > most:
                        break
                    if seconds >= least:
                        found.add(seconds)
        links = {*self.busy_enter, *self.busy_leave}
        links.update(
            seconds for busies in self.busy for busy in busies if busy is not None for seconds in busy[1:]
        )
        found.update(seconds for seconds in links if least <= seconds <= most)
        return [seconds * (1 + 1e-12) for seconds in sorted(found)]


def _cut(seconds: Sequence[float], busy: Sequence[float], limit: float) -> Sequence[float]:
    if max(busy) <= limit:
        return seconds
    return [INF if taken > limit else value for value, taken in zip(seconds, busy, strict=True)]


@dataclass(frozen=True, slots=True)
class LackTables:
    """Bytes over the caps; links count only by being there."""

    units: int
    enter: Sequence[float]
    leave: Sequence[float]
    hop: Hops
    lack: Sequence[Sequence[Sequence[int]]]  # [j][b][c - b - 1]
    pins: Mapping[int, int] = field(default_factory=dict)

    def extend(self, j: int, arrive: Sequence[float]) -> tuple[list[float], list[int]]:
        """Cheapest ends and their starts, over all starts: the part over a cap is not additive."""
        units, pinned = self.units, self.pins.get(j)
        ends, starts = [INF] * (units + 1), [-1] * (units + 1)
        for b, before in enumerate(arrive[:units]):
            if before < INF:
                for c, lack in enumerate(self.lack[j][b], b + 1):
                    allowed = pinned is None or b in starts_of(units, pinned, c)
                    if allowed and before + lack < ends[c]:
                        ends[c], starts[c] = before + lack, b
        return ends, starts
