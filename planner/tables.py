"""The cost formulas evaluated for one problem, in the shape that the searches step through.

A search builds chains device by device. Its state is "the last used device ends at boundary c"; one step
takes the cheapest arrivals at device j (`arrive[b]`: all of the chain before, the hop into j included, when j
starts at unit b) and gives the cheapest ends (`ends[c]`) with the start of each. `TimeTables` counts seconds;
`LackTables` counts the bytes that a chain lacks under the caps, for the answer to a problem that has no plan.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from . import cost
from .rows import TOKEN_BYTES, Cluster, Device, Model, Workload

INF = math.inf
Hops = tuple[tuple[Sequence[float] | None, ...], ...]  # [i][j][b]: None where there is no link i -> j


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
    def extend(self, j: int, arrive: Sequence[float]) -> tuple[list[float], list[int]]: ...


@dataclass(frozen=True, slots=True)
class TimeTables:
    """Seconds of one decoded token. Infinite where there is no link or no room."""

    units: int
    enter: Sequence[float]
    leave: Sequence[float]
    hop: Hops
    busy_enter: Sequence[float]
    busy_leave: Sequence[float]
    busy: Hops
    overhead: Sequence[float]
    prefix: Sequence[Sequence[float]]  # [j][u]: units [0, u) on device j, without the overhead
    first_fit: Sequence[Sequence[int]]  # [j][c]: the least b such that [b, c) fits on j; c when none does

    def stage(self, j: int, first: int, last: int) -> float:
        """Seconds of units [first, last) on device j."""
        return self.overhead[j] + (self.prefix[j][last] - self.prefix[j][first])

    def extend(self, j: int, arrive: Sequence[float]) -> tuple[list[float], list[int]]:
        """Cheapest ends and their starts. Room shrinks monotonically, so each end's starts are a sliding
        window, and `arrive[b] - prefix[b]` is all of the cost that depends on b: a queue of minima makes it
        linear."""
        prefix, fit, overhead = self.prefix[j], self.first_fit[j], self.overhead[j]
        ends, starts = [INF] * (self.units + 1), [-1] * (self.units + 1)
        queue: deque[tuple[float, int]] = deque()
        for c in range(1, self.units + 1):
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
        return ends, starts

    def within(self, limit: float) -> "TimeTables":
        """The same problem where no stage and no link may take more than `limit` seconds."""
        fits = []
        for j, fit in enumerate(self.first_fit):
            tight, b = list(fit), 0
            for c in range(1, self.units + 1):
                b = max(b, fit[c])
                while b < c and self.stage(j, b, c) > limit:
                    b += 1
                tight[c] = b
            fits.append(tight)
        return replace(
            self,
            first_fit=fits,
            enter=_cut(self.enter, self.busy_enter, limit),
            leave=_cut(self.leave, self.busy_leave, limit),
            hop=tuple(
                tuple(
                    None if hop is None or busy is None else _cut(hop, busy, limit)
                    for hop, busy in zip(hops, busies, strict=True)
                )
                for hops, busies in zip(self.hop, self.busy, strict=True)
            ),
        )

    def limits(self, least: float, most: float) -> list[float]:
        """Every time that a stage with room or a link can take within [least, most], and `least`,
        ascending."""
        found = {least}
        for j, fit in enumerate(self.first_fit):
            for c in range(1, self.units + 1):
                for b in range(c - 1, fit[c] - 1, -1):
                    seconds = self.stage(j, b, c)
                    if seconds > most:
                        break
                    if seconds >= least:
                        found.add(seconds)
        links = [*self.busy_enter, *self.busy_leave]
        links += [seconds for busies in self.busy for busy in busies if busy is not None for seconds in busy]
        found.update(seconds for seconds in links if least <= seconds <= most)
        return sorted(found)


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

    def extend(self, j: int, arrive: Sequence[float]) -> tuple[list[float], list[int]]:
        """Cheapest ends and their starts, over all starts: the part over a cap is not additive."""
        ends, starts = [INF] * (self.units + 1), [-1] * (self.units + 1)
        for b, before in enumerate(arrive[: self.units]):
            if before < INF:
                for c, lack in enumerate(self.lack[j][b], b + 1):
                    if before + lack < ends[c]:
                        ends[c], starts[c] = before + lack, b
        return ends, starts


def time_tables(model: Model, cluster: Cluster, workload: Workload) -> TimeTables:
    """Evaluate the cost model for every device, in the cluster's order."""
    units, devices = len(model.units), cluster.devices
    held = [cost.held_bytes_from(model, workload, first) for first in range(units)]
    prefix = []
    for device in devices:
        line = [0.0]
        for unit in model.units:
            line.append(line[-1] + cost.unit_decode_seconds(unit, device, workload))
        prefix.append(line)
    return TimeTables(
        units=units,
        enter=[_way(cluster, cluster.head, device.name, TOKEN_BYTES)[0] for device in devices],
        leave=[_way(cluster, device.name, cluster.head, TOKEN_BYTES)[0] for device in devices],
        hop=_hops(model, cluster, 0),
        busy_enter=[_way(cluster, cluster.head, device.name, TOKEN_BYTES)[1] for device in devices],
        busy_leave=[_way(cluster, device.name, cluster.head, TOKEN_BYTES)[1] for device in devices],
        busy=_hops(model, cluster, 1),
        overhead=[device.step_overhead_s for device in devices],
        prefix=prefix,
        first_fit=[_first_fit(held, device) for device in devices],
    )


def lack_tables(model: Model, cluster: Cluster, workload: Workload) -> LackTables:
    """What each range lacks on each device, in the cluster's order."""
    devices = cluster.devices
    held = [cost.held_bytes_from(model, workload, first) for first in range(len(model.units))]

    def presence(seconds: float) -> float:
        return 0.0 if seconds < INF else INF

    hop = tuple(
        tuple(None if line is None else [0.0] * len(line) for line in lines)
        for lines in _hops(model, cluster, 0)
    )
    return LackTables(
        units=len(model.units),
        enter=[presence(_way(cluster, cluster.head, device.name, 0)[0]) for device in devices],
        leave=[presence(_way(cluster, device.name, cluster.head, 0)[0]) for device in devices],
        hop=hop,
        lack=[
            [[max(0, device.base_bytes + size - device.ram_bytes) for size in line] for line in held]
            for device in devices
        ],
    )


def _way(cluster: Cluster, source: str, target: str, size: int) -> tuple[float, float]:
    """Hop and busy seconds of a message; both infinite without a link."""
    link = cluster.link(source, target)
    if link is None:
        return INF, INF
    return cost.hop_seconds(link, size), cost.link_busy_seconds(link, size)


def _hops(model: Model, cluster: Cluster, which: int) -> Hops:
    """Hop (which = 0) or busy (1) seconds per pair and boundary b, for the cut before unit b; b = 0 has
    none."""
    cuts = [unit.cut_bytes for unit in model.units[:-1]]
    lines: list[tuple[Sequence[float] | None, ...]] = []
    for source in cluster.devices:
        row: list[Sequence[float] | None] = []
        for target in cluster.devices:
            if source is target or cluster.link(source.name, target.name) is None:
                row.append(None)
                continue
            by_size = {size: _way(cluster, source.name, target.name, size)[which] for size in set(cuts)}
            row.append([0.0, *(by_size[size] for size in cuts)])
        lines.append(tuple(row))
    return tuple(lines)


def _first_fit(held: Sequence[Sequence[int]], device: Device) -> list[int]:
    """For every end c the least start b whose range fits; it never moves back, since more units never take
    less."""
    room, fit, b = device.ram_bytes - device.base_bytes, [0], 0
    for c in range(1, len(held) + 1):
        while b < c and held[b][c - b - 1] > room:
            b += 1
        fit.append(b)
    return fit
