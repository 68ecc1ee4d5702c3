"""The exact plan for a fixed order of devices, each free to be left out. Needs no solver and no third-party
package.

`cheapest`: the least sum of stages and hops, by one pass over (last used device, boundary): the device must
be in the state because the next hop's cost depends on the pair. `best_chain`: the least of a goal that also
looks at the slowest place, by searching for the limit on places under which the cheapest chain is best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .goal import Goal
from .tables import INF, Tables, TimeTables

SEARCHES = 400  # of one goal, along its trade-off of round and slowest place
SAME = 1e-9  # relative: below it nothing is gained


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain by device index: (device, first, last) of each stage, and the cost that the search summed."""

    stages: tuple[tuple[int, int, int], ...]
    total: float


Search = Callable[[TimeTables], Chain | None]


def cheapest(tables: Tables, order: Sequence[int], must: int = -1) -> Chain | None:
    """The chain of least total cost that visits devices in this order, leaving out any but those that are
    pinned and the one at place `must`.

    None: there is none. Time: devices^2 * units, plus what `extend` takes.
    """
    units = tables.units
    ends: list[list[float]] = []
    starts: list[list[int]] = []
    spans: list[range] = []
    befores: list[list[int]] = []  # [position][b]: the position before, of the cheapest arrival at b
    musts = [at for at, j in enumerate(order) if at == must or j in tables.pins]
    if len(tables.pins) > sum(j in tables.pins for j in order):
        return None
    nearest = -1  # nothing may pass over one that must be used
    best, best_at = INF, -1
    for at, j in enumerate(order):
        earlier = [(p, order[p], ends[p], spans[p]) for p in range(max(nearest, 0), at)]
        arrive, before = arrivals(tables, j, earlier)
        if nearest >= 0:
            arrive[0] = INF
        end, start = tables.extend(j, arrive)
        ends.append(end)
        spans.append(reached(end))
        starts.append(start)
        befores.append(before)
        if at in musts:
            nearest = at
        if (not musts or at >= musts[-1]) and end[units] + tables.leave[j] < best:
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
    tables: Tables, j: int, befores: Sequence[tuple[int, int, Sequence[float], range]]
) -> tuple[list[float], list[int]]:
    """Cheapest arrivals at device j per boundary, from the head (unit 0) or from one of `befores`: (key,
    device, its ends, what it reaches); with the key of each, -1 for the head."""
    arrive, came = [INF] * (tables.units + 1), [-1] * (tables.units + 1)
    arrive[0] = tables.enter[j]
    for key, i, ends, span in befores:
        hop = tables.hop[i][j]
        if hop is None:
            continue
        for b in span:
            value = ends[b] + hop[b]
            if value < arrive[b]:
                arrive[b], came[b] = value, key
    return arrive, came


def reached(ends: Sequence[float]) -> range:
    """The boundaries inside the model at which a chain may end so far, and what lies between."""
    finite = [b for b, seconds in enumerate(ends) if 0 < b < len(ends) - 1 and seconds < INF]
    return range(finite[0], finite[-1] + 1) if finite else range(0)


def parts(tables: TimeTables, chain: Chain) -> tuple[float, float]:
    """Of a chain: seconds of a round and of its slowest place."""
    stages = chain.stages
    ends = (stages[0][0], stages[-1][0])
    round_s = tables.enter[ends[0]] + tables.leave[ends[1]] + sum(tables.stage(*stage) for stage in stages)
    slowest = max(
        tables.busy_enter[ends[0]],
        tables.busy_leave[ends[1]],
        max(tables.place(*stage) for stage in stages),
    )
    for (i, _, last), (j, _, _) in pairwise(stages):
        hop, busy = tables.hop[i][j], tables.busy[i][j]
        assert hop is not None and busy is not None, "a chain only uses links that are there"
        round_s += hop[last]
        slowest = max(slowest, busy[last])
    return round_s, slowest


def value(tables: TimeTables, goal: Goal, chain: Chain) -> float:
    """What `best_chain` makes least."""
    return goal.value(*parts(tables, chain))


def best_chain(tables: TimeTables, goal: Goal, search: Search) -> Chain | None:
    """The best chain for a goal, given a `search` for the cheapest of a problem."""
    return best_proved(tables, goal, search)[0]


def best_proved(tables: TimeTables, goal: Goal, search: Search) -> tuple[Chain | None, bool]:
    """The best chain, and whether it is proved best as far as `search` is exact: always but after SEARCHES
    steps of a prompt in chunks."""
    free = search(tables)
    if free is None or not goal.looks_at_places:
        return free, True
    if goal.objective == "throughput":
        return _least_period(tables, goal, free, search), True
    return _trade(tables, goal, free, search)


class _Best:
    """The best chain so far; of equal ones that with the quicker round."""

    def __init__(self, tables: TimeTables, goal: Goal, chain: Chain) -> None:
        self._tables, self._goal, self.chain = tables, goal, chain
        self._rank = self._ranked(chain)

    @property
    def value(self) -> float:
        return self._rank[0]

    def offer(self, chain: Chain | None) -> None:
        if chain is not None and self._ranked(chain) < self._rank:
            self.chain, self._rank = chain, self._ranked(chain)

    def _ranked(self, chain: Chain) -> tuple[float, float]:
        round_s, slowest = parts(self._tables, chain)
        return self._goal.value(round_s, slowest), round_s


def _least_period(tables: TimeTables, goal: Goal, free: Chain, search: Search) -> Chain:
    """Let f(T) be the cheapest round with all places within T: it falls as T grows. The best period is either
    at the least T that is no less than f(T)'s share, or f's share just below it. T needs trying only where a
    place has that time."""
    round_s, slowest = parts(tables, free)
    calls = goal.streams / goal.batch  # in flight
    if slowest <= round_s / calls:
        return free
    limits = tables.limits(round_s / calls, slowest)
    best = _Best(tables, goal, free)
    low, high = 0, len(limits) - 2  # the last is `free` itself
    while low <= high:
        middle = (low + high) // 2
        chain = search(tables.within(limits[middle]))
        best.offer(chain)
        if chain is not None and chain.total / calls <= limits[middle]:
            high = middle - 1
        else:
            low = middle + 1
    return best.chain


def _trade(tables: TimeTables, goal: Goal, free: Chain, search: Search) -> tuple[Chain, bool]:
    """Down the trade-off of round and slowest place: each next chain has the quickest round of all whose
    places are quicker than those of the chain before. It ends where no quicker place can make up for the
    round: none is quicker than the quickest that any chain can have."""
    best, at = _Best(tables, goal, free), free
    least = max(_quickest_place(tables, parts(tables, free)[1], search), 0.0)
    for _ in range(SEARCHES):
        round_s, slowest = parts(tables, at)
        if goal.value(round_s, least) >= best.value * (1 - SAME):
            return best.chain, True
        following = search(tables.within(slowest * (1 - SAME)))
        if following is None:
            return best.chain, True
        best.offer(following)
        at = following
    return best.chain, False


def _quickest_place(tables: TimeTables, most: float, search: Search) -> float:
    """The least time that the slowest place of any chain can have."""
    limits = tables.limits(0.0, most)
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        if search(tables.within(limits[middle])) is None:
            low = middle + 1
        else:
            high = middle
    return limits[low]
