"""Better stages for a chain in use: which layers one device should take from another, by the cost model of
plans, and what travels with them.

A steal moves units from any stage to any other, or to a device without a stage: the stages between the two
pass on as many as they get, so that every stage stays a range. Whoever sees the cluster at work asks, with
devices and links as measured now and a workload of the depth that the sequences have (net/rebalance.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from typing import NamedTuple

from . import cost
from .evaluation import Plan, check_stages, token_seconds
from .rows import Assignment, Question
from .solve import QUICK_EXACT, plan
from .streams import Follower

SIZES = (1, 2, 4, 8)
"""The numbers of units of one steal, beside all that the giver has. Other numbers are several of them."""
MOST_ADDED = 2
"""The number of devices without a stage that are tried."""
MOST_NEAR = 150
"""So many stages near to either end are tried for a way between them that takes three changes."""
NOTHING = 1e-9
"""A steal that gains less than this part of a token gains nothing."""


@dataclass(frozen=True, slots=True)
class Steal:
    """`units` units that move from the stage of `giver` to that of `taker`, which may have had none; the
    stages after it, and the seconds that a token takes then (or those until the first one, where that is the
    objective). A giver without any unit left has no stage."""

    giver: str
    taker: str
    units: int
    stages: tuple[Assignment, ...]
    seconds: float


def steals(
    question: Question,
    stages: Sequence[Assignment],
    follower: Follower | None = None,
    allowed: Callable[[Sequence[Assignment]], bool] = lambda stages: True,
) -> Iterator[Steal]:
    """The steal that gains most, then the one that gains most after that, and so on, until none gains
    anything. All stages that change stay within the RAM caps, the ends of a chain that has to begin or end on
    some device stay there, and all stages that follow are `allowed`. `follower`:
    one of the same question, which keeps what it computed. ValueError: stages that are no chain of the
    question's."""
    check_stages(question, stages)
    follower, fits = follower or Follower(question), room(question)
    others = [name for name in _by_speed(question) if question.allowed(name)]
    keeps_ends = question.constraints.keeps_ends
    now, seconds = tuple(stages), token_seconds(question, stages, follower)
    while True:
        used = [stage.device for stage in now]
        spare = [name for name in others if name not in used][:MOST_ADDED]
        best = None
        for ranges, giver, taker in _pairs(now, spare):
            whole = ranges[giver].last - ranges[giver].first
            for units in sorted({*(size for size in SIZES if size < whole), whole}):
                after = _stolen(ranges, giver, taker, units)
                if not fits(now, after) or not keeps_ends(after) or not allowed(after):
                    continue
                try:
                    found = token_seconds(question, after, follower)
                except ValueError:  # there is no link
                    continue
                if found < (seconds if best is None else best.seconds):
                    best = Steal(ranges[giver].device, ranges[taker].device, units, after, found)
        if best is None or best.seconds >= seconds * (1 - NOTHING):
            return
        yield best
        now, seconds = best.stages, best.seconds


class _Range(NamedTuple):
    """A stage, or the place of one that has no units yet."""

    device: str
    first: int
    last: int


def _pairs(stages: Sequence[Assignment], spare: Sequence[str]) -> Iterator[tuple[list[_Range], int, int]]:
    """The ranges of a chain with the places of a giver and a taker: two stages, or a stage and a device
    without one, anywhere among them."""
    ranges = [_Range(stage.device, stage.first, stage.last) for stage in stages]
    for giver, taker in permutations(range(len(ranges)), 2):
        yield ranges, giver, taker
    for name in spare:
        for at in range(len(ranges) + 1):
            edge = ranges[at].first if at < len(ranges) else ranges[-1].last
            more = [*ranges[:at], _Range(name, edge, edge), *ranges[at:]]
            yield from ((more, giver, at) for giver in range(len(more)) if giver != at)


def _stolen(ranges: Sequence[_Range], giver: int, taker: int, units: int) -> tuple[Assignment, ...]:
    """The stages after a steal between the stages at two places."""
    low, high, by = (taker, giver, units) if taker < giver else (giver, taker, -units)
    return tuple(
        Assignment(device, first, last)
        for at, (device, start, end) in enumerate(ranges)
        if (first := start + (by if low < at <= high else 0))
        < (last := end + (by if low <= at < high else 0))
    )


def room(question: Question) -> Callable[[Sequence[Assignment], Sequence[Assignment]], bool]:
    """Whether all stages that get units in a change from some stages to others fit under the RAM caps of
    their devices, and are among the units that these hold, for any change; it keeps what it computed.
    ValueError: a device is not there."""
    model, load, device = question.model, question.workload, question.cluster.device
    holds = question.constraints.holds

    @cache
    def fits(stage: Assignment) -> bool:
        row = device(stage.device)
        ram = cost.range_ram_bytes(model, row, load, stage.first, stage.last)
        return ram <= row.ram_bytes and holds(stage.device, stage.first, stage.last)

    def change(old: Sequence[Assignment], new: Sequence[Assignment]) -> bool:
        held = {stage.device: stage for stage in old}
        return all(
            ((had := held.get(one.device)) is not None and had.first <= one.first and one.last <= had.last)
            or fits(one)
            for one in new
        )

    return change


def room_beside(
    question: Question, old: Sequence[Assignment], new: Sequence[Assignment], positions: int
) -> bool:
    """Whether every device has room for the units of its old stage and of its new one at the same time, with
    keys and values of so many positions: in the middle of a change it holds both. ValueError: a device is not
    there."""
    return _beside(question, positions)(old, new)


def _beside(
    question: Question, positions: int
) -> Callable[[Sequence[Assignment], Sequence[Assignment]], bool]:
    """`room_beside`, for any change; it keeps what it computed."""
    units = question.model.units

    @cache
    def fits(before: Assignment, stage: Assignment) -> bool:
        both = {*range(before.first, before.last), *range(stage.first, stage.last)}
        device = question.cluster.device(stage.device)
        need = device.base_bytes + max(units[u].workspace_bytes for u in both)
        need += sum(units[u].bytes + positions * units[u].kv_bytes_per_token for u in both)
        if len(both) == len(units) or device.beside:
            need -= question.model.tied_bytes
        return before == stage or need <= device.ram_bytes

    def change(old: Sequence[Assignment], new: Sequence[Assignment]) -> bool:
        held = {stage.device: stage for stage in old}
        return all(fits(held.get(stage.device, stage), stage) for stage in new)

    return change


def way(
    question: Question,
    old: Sequence[Assignment],
    new: Sequence[Assignment],
    positions: int,
    follower: Follower,
) -> tuple[tuple[Assignment, ...], ...] | None:
    """The stages between some stages and others, so that `room_beside` holds for each change from one to the
    next: none where it holds for a single change, at most two else, each a steal away from either end. Of all
    such ways one of the shortest, and of these the one on which tokens take least time. None: there is none.
    ValueError: a device is not there."""
    fits, beside = room(question), _beside(question, positions)
    if beside(old, new):
        return ()
    seconds: dict[tuple[Assignment, ...], float] = {}

    def near(stages: Sequence[Assignment]) -> list[tuple[Assignment, ...]]:
        used = {stage.device for stage in stages}
        spare = [name for name in _by_speed(question) if question.allowed(name) and name not in used]
        found = {
            _stolen(ranges, giver, taker, units)
            for ranges, giver, taker in _pairs(stages, spare[:MOST_ADDED])
            for units in range(1, ranges[giver].last - ranges[giver].first + 1)
        }
        for one in found - seconds.keys():
            if fits((), one) and question.constraints.keeps_ends(one):
                with suppress(ValueError):  # there is no link
                    seconds[one] = token_seconds(question, one, follower)
        return sorted(found & seconds.keys(), key=seconds.__getitem__)

    after = [one for one in near(old) if beside(old, one)]
    single = next((one for one in after if beside(one, new)), None)
    if single is not None:
        return (single,)
    before = [one for one in near(new) if beside(one, new)]
    pairs = ((a, b) for a in after[:MOST_NEAR] for b in before[:MOST_NEAR] if beside(a, b))
    return min(pairs, key=lambda pair: max(seconds[one] for one in pair), default=None)


@dataclass(frozen=True, slots=True)
class Travel:
    """What a change of stages needs: the bytes of weights that each device has to load, and the bytes of
    state for each position that go from one device to another."""

    weights: Mapping[str, int]
    state: Mapping[tuple[str, str], int]


def travel(
    question: Question,
    old: Sequence[Assignment],
    new: Sequence[Assignment],
    copies: Mapping[str, frozenset[int]],
) -> Travel:
    """What the change from some stages to others needs. `copies`: the units whose weights each device holds
    beside those of its old stage."""
    units = question.model.units
    holder = [stage.device for stage in old for _ in range(stage.first, stage.last)]
    weights: dict[str, int] = {}
    state: dict[tuple[str, str], int] = {}
    for stage in new:
        taker, there = stage.device, copies.get(stage.device, frozenset())
        for u in range(stage.first, stage.last):
            giver = holder[u]
            if giver == taker:
                continue
            if u not in there:
                weights[taker] = weights.get(taker, 0) + units[u].bytes
            state[giver, taker] = state.get((giver, taker), 0) + units[u].kv_bytes_per_token
    return Travel(weights, state)


def replans(question: Question, stages: Sequence[Assignment]) -> Iterator[tuple[Assignment, ...]]:
    """The stages of new plans: for the same devices in the same order, and for any of up to QUICK_EXACT
    devices in any order. Those with a stage come first among the devices, then the quickest. Where more have
    a stage, others are added to their order one at a time."""
    held = question.constraints
    used = [stage.device for stage in stages]
    spare = [name for name in _by_speed(question) if name not in used and question.allowed(name)]
    orders = [used]
    if len(used) > QUICK_EXACT:
        orders += [
            [*used[:at], name, *used[at:]]
            for name in spare[:MOST_ADDED]
            for at in range(held.first is not None, len(used) + (held.last is None))
        ]
    asked = [replace(held, order=tuple(order)) for order in orders]
    if len(used) <= QUICK_EXACT:
        others = spare[QUICK_EXACT - len(used) :]
        asked.append(replace(held, exclude=held.exclude | frozenset(others)))
    for constraints in asked:
        found = plan(replace(question, constraints=constraints), method="dp", explain=False)
        if isinstance(found, Plan):
            yield found.assignments


def _by_speed(question: Question) -> list[str]:
    """The devices by the time that they need for one row through a layer, the quickest first."""
    units = question.model.units
    layer = units[len(units) // 2]
    devices = sorted(question.cluster.devices, key=lambda device: cost.matmul_seconds(layer, device, 1))
    return [device.name for device in devices]
