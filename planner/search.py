"""The searches that need no solver: exact for a given order of devices, each free to be left out; exact over
all orders of a few devices; local search over the orders of many. `cheapest` and `cheapest_any_order` find
the least sum of stages and hops; `best_chain` the least of a goal that also looks at the busiest resource, by
searching for the limit on resources under which the cheapest chain is best."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations, cycle, pairwise, permutations
from typing import Any

from .tables import INF, Tables, TimeTables

SAME = 1e-9  # relative: below it nothing is gained
TRADES = 400  # steps along a prompt's trade-off of lap and busiest resource
EXACT_DEVICES = 8  # 2^n: some tens of milliseconds for one search at 8 devices and 32 layers
TRIALS = 400  # orders that local search tries
STARTS = 3  # from so many of the first guesses


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain by device index: (device, first, last) of each stage, and the cost that the search summed."""

    stages: tuple[tuple[int, int, int], ...]
    total: float


Search = Callable[[TimeTables], Chain | None]
Solve = Callable[[Sequence[int], float], tuple[float, Chain | None]]
"""What an order comes to, and its chain; it may be (INF, None) where that is no less than a given bound."""


def cheapest(tables: Tables, order: Sequence[int], must: int = -1) -> Chain | None:
    """The chain of least total cost that visits devices in this order, leaving out any but those that are
    pinned and the one at place `must`; None: there is none. Time: devices^2 * units, and what `extend`
    takes."""
    if len(tables.pins) > sum(j in tables.pins for j in order):
        return None
    musts = [at for at, j in enumerate(order) if at == must or j in tables.pins]

    def states() -> Iterator[_State]:
        for at, j in enumerate(order):
            nearest = max((m for m in musts if m < at), default=-1)  # nothing may pass over it
            yield at, j, range(max(nearest, 0), at), nearest < 0, not musts or at >= musts[-1]

    return _cheapest(tables, states())


def cheapest_any_order(tables: Tables, devices: Sequence[int], must: int = -1) -> Chain | None:
    """The chain of least total cost over all subsets and orders of `devices` that hold the pinned ones, and
    device `must` (Held and Karp). None: there is none. 2^n in the number of devices."""
    if len(tables.pins) > sum(j in tables.pins for j in devices):
        return None
    musts = sum(1 << p for p, j in enumerate(devices) if j in tables.pins or j == must)

    def states() -> Iterator[_State]:
        for used in range(1, 1 << len(devices)):
            members = [p for p in range(len(devices)) if used >> p & 1]
            for p in members:
                rest = used & ~(1 << p)
                befores = [(rest, q) for q in members if q != p]
                yield (used, p), devices[p], befores, not rest, used & musts == musts

    return _cheapest(tables, states())


_State = tuple[Any, int, Iterable[Any], bool, bool]
"""A device as the last one used: a key that tells how, the device, the keys from which it can be reached,
whether the chain may begin with it, and whether it may end."""


def _cheapest(tables: Tables, states: Iterable[_State]) -> Chain | None:
    """The cheapest chain through such states; the boundary is the rest of each state, and the device is in it
    because the next hop's cost depends on the pair."""
    units, lap = tables.units, tables.lap
    known: dict[
        Any, tuple[int, list[float], range]
    ] = {}  # device, cheapest ends by boundary, which are there
    steps: dict[Any, tuple[list[int], list[Any]]] = {}  # [c]: start of the stage; [b]: key of the one before
    best, best_key = INF, None
    for key, j, befores, begins, finishes in states:
        arrive, came = [INF] * (units + 1), [None] * (units + 1)
        if begins:
            arrive[0] = lap.enter[j]
        for before in befores:
            if before not in known:
                continue
            i, ends, span = known[before]
            hop = lap.hop[i][j]
            if hop is None:
                continue
            for b in span:
                value = ends[b] + hop[b]
                if value < arrive[b]:
                    arrive[b], came[b] = value, before
        end, start = tables.extend(j, arrive)
        finite = [c for c, seconds in enumerate(end) if seconds < INF]
        if not finite:
            continue
        known[key] = j, end, range(finite[0], min(finite[-1] + 1, units))
        steps[key] = start, came
        if finishes and end[units] + lap.leave[j] < best:
            best, best_key = end[units] + lap.leave[j], key
    if best_key is None:
        return None
    stages, key, last = [], best_key, units
    while key is not None:
        start, came = steps[key]
        stages.append((known[key][0], start[last], last))
        last = start[last]
        key = came[last]
    return Chain(tuple(reversed(stages)), best)


def parts(tables: TimeTables, chain: Chain) -> tuple[float, float]:
    """Seconds of a chain's lap, and of its busiest resource."""
    stages, lap, busy = chain.stages, tables.lap, tables.busy
    ends = (stages[0][0], stages[-1][0])
    seconds = lap.enter[ends[0]] + lap.leave[ends[1]] + sum(tables.stage(*stage) for stage in stages)
    busiest = max(busy.enter[ends[0]], busy.leave[ends[1]], max(busy.stage(*stage) for stage in stages))
    for (i, _, last), (j, _, _) in pairwise(stages):
        hop, taken = lap.hop[i][j], busy.hop[i][j]
        assert hop is not None and taken is not None, "a chain only uses links that are there"
        seconds += hop[last]
        busiest = max(busiest, taken[last])
    return seconds, busiest


def value(tables: TimeTables, chain: Chain) -> float:
    """What `best_chain` makes least."""
    return tables.goal.value(*parts(tables, chain))


def best_chain(tables: TimeTables, search: Search) -> tuple[Chain | None, bool]:
    """The best chain for the tables' goal, given a `search` for the cheapest, and whether it is proved best
    as far as `search` is exact: always but for a prompt in chunks after TRADES steps."""
    free, goal = search(tables), tables.goal
    if free is None or goal.objective == "latency" or (goal.objective == "first_token" and goal.chunks == 1):
        return free, True
    if goal.objective == "throughput":
        return _least_period(tables, free, search), True
    return _trade(tables, free, search)


def _better(tables: TimeTables, best: Chain, other: Chain | None) -> Chain:
    """The better of two chains; of equal ones that with the quicker lap."""

    def rank(chain: Chain) -> tuple[float, float]:
        lap, busiest = parts(tables, chain)
        return tables.goal.value(lap, busiest), lap

    return best if other is None or rank(best) <= rank(other) else other


def _least_period(tables: TimeTables, free: Chain, search: Search) -> Chain:
    """Let f(T) be the quickest lap with all resources within T: it falls as T grows. The best period is
    either at the least T that is no less than f(T)'s share, or f's share just below it. T needs trying only
    where a resource has that time."""
    lap, busiest = parts(tables, free)
    calls = tables.goal.streams / tables.goal.batch  # in flight
    if busiest <= lap / calls:
        return free
    best, limits = free, tables.limits(lap / calls, busiest)
    low, high = 0, len(limits) - 2  # the last is `free` itself
    while low <= high:
        middle = (low + high) // 2
        chain = search(tables.within(limits[middle]))
        best = _better(tables, best, chain)
        if chain is not None and chain.total / calls <= limits[middle]:
            high = middle - 1
        else:
            low = middle + 1
    return best


def _trade(tables: TimeTables, free: Chain, search: Search) -> tuple[Chain, bool]:
    """Down the trade-off of lap and busiest resource: each next chain has the quickest lap of all whose
    resources are quicker than those of the chain before, until a lap alone takes as long as the best."""
    best = at = free
    for _ in range(TRADES):
        lap, busiest = parts(tables, at)
        if lap >= value(tables, best) * (1 - SAME):
            return best, True
        following = search(tables.within(busiest * (1 - SAME)))
        if following is None:
            return best, True
        best, at = _better(tables, best, following), following
    return best, False


def search_orders(
    tables: TimeTables, devices: Sequence[int], *, exact_devices: int = EXACT_DEVICES, trials: int = TRIALS
) -> tuple[Chain | None, bool]:
    """The best chain over orders, and whether that is proved: exact up to `exact_devices`, else local
    search."""
    if len(devices) <= exact_devices:
        return best_chain(tables, partial(cheapest_any_order, devices=devices))
    goal = tables.goal

    @lru_cache(maxsize=1)
    def better_than(bound: float) -> TimeTables:
        return tables.within(bound * goal.batch)

    def solve(order: Sequence[int], bound: float) -> tuple[float, Chain | None]:
        if goal.objective == "throughput" and bound < INF:
            # Most orders are no better: one search tells, where the best takes many.
            chain = cheapest(better_than(bound), order)
            if chain is None or chain.total >= bound * goal.streams:
                return INF, None
        chain, _ = best_chain(tables, partial(cheapest, order=order))
        return (INF, None) if chain is None else (value(tables, chain), chain)

    return _improve(solve, seed_orders(tables, devices), trials), False


def first_guess(tables: TimeTables, devices: Sequence[int]) -> Chain | None:
    """The best chain over the first guesses' orders alone: in some milliseconds, for others to better."""
    return search_orders(tables, devices, exact_devices=1, trials=0)[0]


def least_lack(tables: Tables, devices: Sequence[int]) -> tuple[Chain | None, bool]:
    """The chain that lacks least under the caps, and whether that is proved."""
    if len(devices) <= EXACT_DEVICES:
        return cheapest_any_order(tables, devices), True

    def solve(order: Sequence[int], bound: float) -> tuple[float, Chain | None]:
        chain = cheapest(tables, order)
        return (INF, None) if chain is None else (chain.total, chain)

    seeds = [_ends_in_place(tables, order) for order in (devices, devices[::-1])]
    return _improve(solve, seeds, TRIALS), False


def seed_orders(tables: TimeTables, devices: Sequence[int]) -> list[list[int]]:
    """Orders to start from: by speed both ways, and the nearest next, from the likeliest first devices."""
    enter, hop = tables.lap.enter, tables.lap.hop
    whole = [line[-1] for line in tables.lap.prefix]
    by_speed = sorted(devices, key=lambda j: whole[j])
    seeds = [by_speed, by_speed[::-1]]

    def far(i: int, j: int) -> float:
        line = hop[i][j]
        return INF if line is None else max(line)

    for start in sorted(devices, key=lambda j: enter[j] + whole[j])[:4]:
        order, left = [start], [j for j in devices if j != start]
        while left:
            near = min(left, key=lambda j: (far(order[-1], j), whole[j]))
            order.append(near)
            left.remove(near)
        seeds.append(order)
    return [_ends_in_place(tables, order) for order in seeds]


def _ends_in_place(tables: Tables, order: Sequence[int]) -> list[int]:
    """The order with a device in front that can be the first, and one at the end that can be the last: where
    hardly any can, an order without them leads nowhere, nor does any that a move makes of it."""
    first = [j for j in order if tables.lap.enter[j] < INF][:1]
    last = [j for j in order if tables.lap.leave[j] < INF and j not in first][-1:]
    return [*first, *(j for j in order if j not in first + last), *last]


def _improve(solve: Solve, seeds: Sequence[list[int]], trials: int) -> Chain | None:
    """From each of the best seeds, moves one device or swaps two wherever that gains; until nothing does, or
    for `trials` orders at most, which the starts share."""
    solved = sorted(((*solve(seed, INF), seed) for seed in seeds), key=lambda entry: entry[0])
    least, chain = solved[0][:2]
    places = range(len(seeds[0]))
    moves = [(False, *ends) for ends in permutations(places, 2)]
    moves += [(True, *ends) for ends in combinations(places, 2)]
    for start, (cost, found, order) in enumerate(solved[:STARTS]):
        budget, since = trials // (STARTS - start), 0  # since the last gain: all moves, a local optimum
        for used, (swap, a, b) in enumerate(cycle(moves)):
            if used == budget or since == len(moves):
                trials -= used
                break
            moved = list(order)
            if swap:
                moved[a], moved[b] = moved[b], moved[a]
            else:
                moved.insert(b, moved.pop(a))
            least_moved, other = solve(moved, cost)
            since += 1
            if least_moved < cost:
                cost, found, order, since = least_moved, other, moved, 0
        if cost < least:
            least, chain = cost, found
    return chain
