"""The exact plan for a fixed order of devices, each free to be left out. Needs no solver and no third-party
package.

Two objectives. Latency: the sum of stages and hops, by one pass over (last used device, boundary): the device
must be in the state because the next hop's cost depends on the pair. Throughput of k streams: the largest of
round / k, the slowest stage and the busiest link, by searching for the least limit T on stages and links
whose cheapest round is within k T.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .rows import Objective
from .tables import INF, Tables, TimeTables


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain by device index: (device, first, last) of each stage, and the cost that the search summed."""

    stages: tuple[tuple[int, int, int], ...]
    total: float


def cheapest(tables: Tables, order: Sequence[int], must: int = -1) -> Chain | None:
    """The chain of least total cost that visits devices in this order, leaving out any but the one at place
    `must`.

    None: there is none. Time: devices^2 * units, plus what `extend` takes.
    """
    units = tables.units
    ends: list[list[float]] = []
    starts: list[list[int]] = []
    befores: list[list[int]] = []  # [position][b]: the position before, of the cheapest arrival at b
    best, best_at = INF, -1
    for at, j in enumerate(order):
        nearest = must if at > must else 0  # nothing may pass over the one that must be used
        arrive, before = arrivals(tables, j, [(p, order[p], ends[p]) for p in range(max(nearest, 0), at)])
        if at > must >= 0:
            arrive[0] = INF
        end, start = tables.extend(j, arrive)
        ends.append(end)
        starts.append(start)
        befores.append(before)
        if at >= must and end[units] + tables.leave[j] < best:
            best, best_at = end[units] + tables.leave[j], at
    if best_at < 0:
        return None
    stages, at, last = [], best_at, units
    while at >= 0:
        first = starts[at][last]
        stages.append((order[at], first, last))
        at, last = befores[at][first], first
    return Chain(tuple(reversed(stages)), best)


def arrivals(
    tables: Tables, j: int, befores: Sequence[tuple[int, int, Sequence[float]]]
) -> tuple[list[float], list[int]]:
    """Cheapest arrivals at device j per boundary, from the head (unit 0) or from one of `befores`: (key,
    device, its ends); with the key of each, -1 for the head."""
    arrive, came = [INF] * (tables.units + 1), [-1] * (tables.units + 1)
    arrive[0] = tables.enter[j]
    for key, i, ends in befores:
        hop = tables.hop[i][j]
        if hop is None:
            continue
        for b in range(1, tables.units):
            value = ends[b] + hop[b]
            if value < arrive[b]:
                arrive[b], came[b] = value, key
    return arrive, came


def period(tables: TimeTables, chain: Chain, streams: int) -> float:
    """Seconds a token with that many streams in flight."""
    places = [tables.stage(*stage) for stage in chain.stages]
    places += [tables.busy_enter[chain.stages[0][0]], tables.busy_leave[chain.stages[-1][0]]]
    for (i, _, last), (j, _, _) in zip(chain.stages, chain.stages[1:], strict=False):
        busy = tables.busy[i][j]
        assert busy is not None, "a chain only uses links that are there"
        places.append(busy[last])
    return max(chain.total / streams, *places)


def least_period(
    tables: TimeTables, streams: int, search: Callable[[TimeTables], Chain | None]
) -> Chain | None:
    """The chain of least period, given a `search` for the cheapest chain of a problem.

    Let f(T) be the cheapest round with all stages and links within T: it falls as T grows. The best period is
    either at the least T with f(T) / k <= T, or f / k just below it. T needs trying only where a stage or
    link has that time.
    """
    free = search(tables)
    if free is None or period(tables, free, streams) <= free.total / streams:
        return free
    limits = tables.limits(free.total / streams, period(tables, free, streams))
    low, high = 0, len(limits) - 1  # the last limit allows `free` itself, whose round / k is below it
    best = free
    while low <= high:
        middle = (low + high) // 2
        chain = search(tables.within(limits[middle]))
        if chain is not None and _better(tables, streams, chain, best):
            best = chain
        if chain is not None and chain.total / streams <= limits[middle]:
            high = middle - 1
        else:
            low = middle + 1
    return best


def _better(tables: TimeTables, streams: int, chain: Chain, other: Chain) -> bool:
    mine, others = period(tables, chain, streams), period(tables, other, streams)
    return (mine, chain.total) < (others, other.total)


def best_chain(
    tables: TimeTables, objective: Objective, streams: int, search: Callable[[TimeTables], Chain | None]
) -> Chain | None:
    """The best chain for an objective, given a `search` for the cheapest."""
    return search(tables) if objective == "latency" else least_period(tables, streams, search)


def value(tables: TimeTables, objective: Objective, streams: int, chain: Chain) -> float:
    """The objective's value, seconds a token: what `best_chain` makes least."""
    return chain.total if objective == "latency" else period(tables, chain, streams)
