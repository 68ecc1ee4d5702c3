"""Over orders of devices, without a solver: exact for a few devices, a good order for many.

`cheapest_any_order` is the fixed-order step over subsets (Held and Karp): the state is the set of devices
used, the last of them and the boundary. It takes any layers and any links, 2^n in the number of devices.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations, cycle, permutations

from .dp import Chain, arrivals, best_chain, best_proved, cheapest, reached, value
from .goal import Goal
from .tables import INF, Tables, TimeTables

EXACT_DEVICES = 8  # 2^n: some tens of milliseconds for one search at 8 devices and 32 layers
TRIALS = 400  # orders that local search tries
STARTS = 3  # from so many of the first guesses

Solve = Callable[[Sequence[int], float], tuple[float, Chain | None]]
"""What an order comes to, and its chain; it may be (INF, None) where that is no less than a given bound."""


def cheapest_any_order(tables: Tables, devices: Sequence[int], must: int = -1) -> Chain | None:
    """The chain of least total cost over all subsets and orders of `devices` that hold the pinned ones, and
    device `must`. None: there is none."""
    count, units = len(devices), tables.units
    if len(tables.pins) > sum(j in tables.pins for j in devices):
        return None
    pinned = sum(1 << p for p, j in enumerate(devices) if j in tables.pins or j == must)
    ends: dict[tuple[int, int], list[float]] = {}
    spans: dict[tuple[int, int], range] = {}
    steps: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    best, at = INF, (0, -1)
    for used in range(1, 1 << count):
        for p in range(count):
            if not used >> p & 1:
                continue
            rest = used & ~(1 << p)
            befores = [
                (q, devices[q], ends[rest, q], spans[rest, q]) for q in range(count) if (rest, q) in ends
            ]
            if rest and not befores:
                continue
            arrive, came = arrivals(tables, devices[p], befores)
            if rest:
                arrive[0] = INF  # used as the first device it stands in the set of itself alone
            end, start = tables.extend(devices[p], arrive)
            if min(end) == INF:
                continue
            ends[used, p], spans[used, p] = end, reached(end)
            steps[used, p] = (start, came)
            if used & pinned == pinned and end[units] + tables.leave[devices[p]] < best:
                best, at = end[units] + tables.leave[devices[p]], (used, p)
    if best == INF:
        return None
    stages, (used, p), last = [], at, units
    while p >= 0:
        start, came = steps[used, p]
        first = start[last]
        stages.append((devices[p], first, last))
        used, p, last = used & ~(1 << p), came[first], first
    return Chain(tuple(reversed(stages)), best)


def search_orders(
    tables: TimeTables,
    devices: Sequence[int],
    goal: Goal,
    *,
    exact_devices: int = EXACT_DEVICES,
    trials: int = TRIALS,
) -> tuple[Chain | None, bool]:
    """The best chain over orders, and whether it is proved best: exact up to `exact_devices`, else by local
    search."""
    if len(devices) <= exact_devices:
        return best_proved(tables, goal, lambda t: cheapest_any_order(t, devices))

    @lru_cache(maxsize=1)
    def better_than(bound: float) -> TimeTables:
        return tables.within(bound * goal.batch)

    def solve(order: Sequence[int], bound: float) -> tuple[float, Chain | None]:
        if (
            goal.objective == "throughput" and bound < INF
        ):  # most orders are no better: one search tells, where the best takes many
            chain = cheapest(better_than(bound), order)
            if chain is None or chain.total >= bound * goal.streams:
                return INF, None
        chain = best_chain(tables, goal, lambda t: cheapest(t, order))
        return (INF, None) if chain is None else (value(tables, goal, chain), chain)

    return _improve(solve, seed_orders(tables, devices), trials), False


def first_guess(tables: TimeTables, devices: Sequence[int], goal: Goal) -> Chain | None:
    """The best chain over the first guesses' orders alone, in some milliseconds: what other searches are to
    better."""
    return search_orders(tables, devices, goal, exact_devices=1, trials=0)[0]


def least_lack(tables: Tables, devices: Sequence[int]) -> tuple[Chain | None, bool]:
    """The chain that lacks least under the caps, and whether that is proved."""
    if len(devices) <= EXACT_DEVICES:
        return cheapest_any_order(tables, devices), True

    def solve(order: Sequence[int], bound: float) -> tuple[float, Chain | None]:
        chain = cheapest(tables, order)
        return (INF, None) if chain is None else (chain.total, chain)

    seeds = [ends_in_place(tables, order) for order in (devices, devices[::-1])]
    return _improve(solve, seeds, TRIALS), False


def seed_orders(tables: TimeTables, devices: Sequence[int]) -> list[list[int]]:
    """Orders to start from: by speed both ways, and the nearest neighbour next, from the likeliest first
    devices."""
    by_speed = sorted(devices, key=lambda j: tables.prefix[j][-1])
    seeds = [by_speed, by_speed[::-1]]

    def far(i: int, j: int) -> float:
        hop = tables.hop[i][j]
        return INF if hop is None else max(hop)

    for start in sorted(devices, key=lambda j: tables.enter[j] + tables.prefix[j][-1])[:4]:
        order, left = [start], [j for j in devices if j != start]
        while left:
            near = min(left, key=lambda j: (far(order[-1], j), tables.prefix[j][-1]))
            order.append(near)
            left.remove(near)
        seeds.append(order)
    return [ends_in_place(tables, order) for order in seeds]


def ends_in_place(tables: Tables, order: Sequence[int]) -> list[int]:
    """The order with a device in front that can be the first, and one at the end that can be the last: where
    hardly any can, an order without them leads nowhere, nor does any that a move makes of it."""
    first = [j for j in order if tables.enter[j] < INF][:1]
    last = [j for j in order if tables.leave[j] < INF and j not in first][-1:]
    return [*first, *(j for j in order if j not in first + last), *last]


def _improve(solve: Solve, seeds: Sequence[list[int]], trials: int) -> Chain | None:
    """From each of the best seeds, change the order as long as that helps; for `trials` orders at most, which
    the starts share."""
    solved = sorted(((*solve(seed, INF), seed) for seed in seeds), key=lambda entry: entry[0])
    best, chain = solved[0][:2]
    for start in range(min(STARTS, len(solved))):
        cost, other, used = _descend(solve, *solved[start], trials // (STARTS - start))
        trials -= used
        if cost < best:
            best, chain = cost, other
    return chain


def _descend(
    solve: Solve,
    best: float,
    chain: Chain | None,
    order: list[int],
    trials: int,
) -> tuple[float, Chain | None, int]:
    """Moves one device, or swaps two, wherever that gains; until nothing does, or for so many trials. The
    best, its chain, and the trials used."""
    count = len(order)
    moves = [(False, *ends) for ends in permutations(range(count), 2)]
    moves += [(True, *ends) for ends in combinations(range(count), 2)]
    since = 0  # trials since the last gain; all moves tried without one: a local optimum
    for used, (swap, a, b) in enumerate(cycle(moves) if moves else ()):
        if used == trials or since == len(moves):
            return best, chain, used
        moved = list(order)
        if swap:
            moved[a], moved[b] = moved[b], moved[a]
        else:
            moved.insert(b, moved.pop(a))
        cost, other = solve(moved, best)
        since += 1
        if cost < best:
            best, chain, order, since = cost, other, moved, 0
    return best, chain, 0
