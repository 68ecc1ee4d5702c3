"""The cost model evaluated for one question and goal, in the shape that the searches step through.

Their state is "the last used device ends at boundary c"; one step takes the cheapest arrivals at device j
(`arrive[b]`: the chain before and the hop into j, when j starts at unit b) and gives the cheapest ends
(`ends[c]`) with the start of each. `TimeTables` counts seconds; `LackTables` counts bytes over the caps, for
the answer to a question that has no plan. Devices are known by their index. Formulas run once per kind of
unit and device, and room is found by one sliding window per device: a re-plan of 32 devices and 80 layers
takes milliseconds.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from . import cost
from .chunks import Chunking
from .cost import CALL_STEPS, TOKEN_BYTES, Kinds, unit_costs
from .rows import (
    LEAST_CHUNK,
    LOOPBACK,
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Objective,
    Question,
    Unit,
)

INF = math.inf
SMALLER = 3  # how often the largest chunk of a prompt is halved for another goal


@dataclass(frozen=True, slots=True)
class Goal:
    """An objective with its numbers. latency: a lap of one sequence. throughput: `streams` tokens a lap, of
    which a stage takes `batch` in one call; a resource that is taken longer than their share holds all of
    them up. first_token: a lap of one chunk, and for every other of the prompt's `chunks`, of at most `rows`,
    the busiest resource's time."""

    objective: Objective
    streams: int = 1
    batch: int = 1
    chunks: int = 1
    rows: int = 0

    def value(self, lap: float, busiest: float) -> float:
        """What a chain is worth, from the seconds of its lap and of its busiest resource; less is better."""
        if self.objective == "latency":
            return lap
        if self.objective == "throughput":
            return max(lap / self.streams, busiest / self.batch)
        return lap + (self.chunks - 1) * busiest


def goals(question: Question) -> list[Goal]:
    """The goals whose best chains a plan chooses from. Sequences that wait share a call, so for throughput
    there is one for each of some numbers of rows in a call; what they settle to is groups.py's to say. For a
    prompt there is one for each of some sizes of chunks; chunks.py has the best size of given stages."""
    workload = question.workload
    if question.objective == "latency":
        return [Goal("latency")]
    if question.objective == "first_token":
        rows, end = workload.chunk_tokens, workload.prompt_tokens
        smaller = [rows >> by for by in range(1, SMALLER + 1) if LEAST_CHUNK <= rows >> by < end]
        return [Goal("first_token", chunks=-(-end // size), rows=size) for size in [rows, *smaller]]
    largest = min(workload.streams, CALL_STEPS)
    sizes = [size for size in (1, 2, 4, 8, 16) if size < largest]
    return [Goal("throughput", workload.streams, batch) for batch in [*sizes, largest]]


@dataclass(frozen=True, slots=True)
class Sums:
    """What a chain is summed from: entering device j, hops from i to j before unit b (None: no link),
    leaving, and of a stage its overhead and its units as prefix sums ([j][u]: units [0, u)). Infinite where
    there is no way."""

    enter: Sequence[float]
    leave: Sequence[float]
    hop: Sequence[Sequence[Sequence[float] | None]]
    overhead: Sequence[float] = ()
    prefix: Sequence[Sequence[float]] = ()

    def stage(self, j: int, first: int, last: int) -> float:
        """Units [first, last) on device j."""
        return self.overhead[j] + (self.prefix[j][last] - self.prefix[j][first])


def starts_of(units: int, layers: int, c: int) -> range:
    """The starts b for which [b, c) has exactly `layers` >= 1 of the units 1 … units - 2."""
    b = min(c, units - 1) - layers
    if b == 1:
        return range(2)  # with the embedding, or without
    return range(b, b + 1) if b > 1 else range(0)


@dataclass(frozen=True, slots=True)
class TimeTables:
    """Seconds of one call that passes through the chain: of decoded rows, or of a chunk of a prompt. `lap` is
    summed over stages and hops; `busy` is what each resource, stage or link, is taken for by one call of
    many. The two differ by what happens once: latencies, pauses, a prompt's one row of logits."""

    units: int
    goal: Goal
    lap: Sums
    busy: Sums
    first_fit: Sequence[Sequence[int]]  # [j][c]: the least b such that [b, c) fits on j; c when none does
    relief: Sequence[float]  # what a lap saves when the device holds everything: it never pauses then
    pins: Mapping[int, int]  # devices that hold exactly so many layers
    alike: bool  # counts of layers say everything: they cost the same, and no device holds only some of them

    def stage(self, j: int, first: int, last: int) -> float:
        """Seconds of units [first, last) on device j in a lap."""
        seconds = self.lap.stage(j, first, last)
        return seconds - self.relief[j] if last - first == self.units else seconds

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
        prefix, overhead = self.lap.prefix[j], self.lap.overhead[j]
        fit, units = self.first_fit[j], self.units
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
        """The same problem where no resource may be taken for more than `limit` seconds."""
        fits = []
        for j, fit in enumerate(self.first_fit):
            tight, b = list(fit), 0
            line, room = self.busy.prefix[j], limit - self.busy.overhead[j]
            for c in range(1, self.units + 1):
                b = max(b, fit[c])
                while b < c and line[c] - line[b] > room:
                    b += 1
                tight[c] = b
            fits.append(tight)
        hop = [
            [
                None if hop is None or busy is None else _cut(hop, busy, limit)
                for hop, busy in zip(hops, busies, strict=True)
            ]
            for hops, busies in zip(self.lap.hop, self.busy.hop, strict=True)
        ]
        enter = _cut(self.lap.enter, self.busy.enter, limit)
        leave = _cut(self.lap.leave, self.busy.leave, limit)
        return replace(self, first_fit=fits, lap=replace(self.lap, enter=enter, leave=leave, hop=hop))

    def limits(self, least: float, most: float) -> list[float]:
        """Every time that a stage with room or a link can be taken for within [least, most], and both,
        ascending; a hair more each, so that rounding leaves them allowed."""
        found = {least, most}
        for j, fit in enumerate(self.first_fit):
            line, overhead = self.busy.prefix[j], self.busy.overhead[j]
            for c in range(1, self.units + 1):
                for b in range(c - 1, fit[c] - 1, -1):
                    seconds = overhead + (line[c] - line[b])
                    if seconds > most:
                        break
                    if seconds >= least:
                        found.add(seconds)
        links = {*self.busy.enter, *self.busy.leave}
        links.update(
            seconds for busies in self.busy.hop for busy in busies if busy is not None for seconds in busy[1:]
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
    lap: Sums
    lack: Sequence[Sequence[Sequence[float]]]  # [j][b][c - b - 1]; infinite where the range is not for j
    pins: Mapping[int, int]

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


Tables = TimeTables | LackTables


def tables_of(question: Question, goal: Goal) -> TimeTables:
    """The tables of a question for one of its goals: of a chunk of the prompt, the mean one since a later
    chunk attends to more, or of decoded rows."""
    model, devices, load = question.model, question.cluster.devices, question.workload
    kinds, depth = Kinds(model), load.decode_depth
    steps = [device.step_overhead_s for device in devices]
    pauses = [device.idle_overhead_s for device in devices]
    if goal.objective == "first_token":
        pieces = Chunking(goal.rows).cut(0, load.prompt_tokens)
        at, end = load.prompt_tokens - 1, model.units[-1]
        rows, back, relief = load.prompt_tokens / len(pieces), 1.0, [0.0] * len(devices)

        def mean(unit: Unit, device: Device) -> float:
            return math.fsum(cost.chunk_seconds(unit, device, r, at) for at, r in pieces) / len(pieces)

        lines = [(kinds.each(mean, device)[:-1], device) for device in devices]
        busy = [_prefix([*line, 0.0]) for line, _ in lines]
        lap = [_prefix([*line, cost.chunk_seconds(end, device, 1, at)]) for line, device in lines]
    else:
        rows = back = goal.batch
        if goal.objective == "throughput" and goal.streams > 1:
            pauses = [0.0] * len(devices)  # stages that many sequences keep busy never pause

        def decode(unit: Unit, device: Device) -> float:
            return cost.decode_seconds(unit, device, goal.batch, depth)

        busy = lap = [_prefix(kinds.each(decode, device)) for device in devices]
        at_once = [_at_once(question.cluster, device.name) for device in devices]
        relief = [pause if free else 0.0 for pause, free in zip(pauses, at_once, strict=True)]
    first = [step + pause for step, pause in zip(steps, pauses, strict=True)]
    for front, second in _second_ranges(question):  # one CPU is taken for as long as both need
        steps[front] += busy[second][-1] - busy[second][-2] + steps[second]
    lap_links = _links(question, cost.hop_seconds, rows, back)
    busy_links = _links(question, cost.link_busy_seconds, rows, back)
    return TimeTables(
        units=len(model.units),
        goal=goal,
        lap=replace(lap_links, overhead=first, prefix=lap),
        busy=replace(busy_links, overhead=steps, prefix=busy),
        first_fit=_first_fits(question),
        relief=relief,
        pins=_pins(question),
        alike=counts_suffice(question),
    )


def lack_tables(question: Question, joined: bool = False) -> LackTables:
    """What each range lacks on each device, whether or not it holds the files; `joined`: as if every pair of
    nodes had a link."""
    model, devices = question.model, question.cluster.devices
    if joined:
        ends = {question.cluster.coordinator, *(device.name for device in devices)}
        links = {(a, b): LOOPBACK for a in ends for b in ends if a != b}
        question = replace(question, cluster=replace(question.cluster, links=links))
    held = cost.held_bytes(model, question.workload)
    return LackTables(
        units=len(model.units),
        lap=_links(question, lambda link, size: 0.0, 1, 1),
        lack=[
            [
                [_lack(device, size, b, b + 1 + at, model) for at, size in enumerate(line)]
                for b, line in enumerate(held)
            ]
            for device in devices
        ],
        pins=_pins(question),
    )


def _lack(device: Device, size: int, b: int, c: int, model: ModelCosts) -> float:
    """The bytes that a device lacks to hold `size` bytes, of units [b, c)."""
    if device.beside:
        if not b == c - 1 == len(model.units) - 1:
            return INF
        size -= model.tied_bytes
    return max(0, device.base_bytes + size - device.ram_bytes)


def layers_alike(model: ModelCosts) -> bool:
    """Whether all layers cost the same, and any two boundaries pass the same bytes."""
    costs = {(*unit_costs(unit), unit.workspace_bytes) for unit in model.units[1:-1]}
    return len(costs) <= 1 and len({unit.cut_bytes for unit in model.units[:-1]}) == 1


def counts_suffice(question: Question) -> bool:
    """Whether a plan is said by the number of layers on each device: any layer may be anywhere."""
    return layers_alike(question.model) and not question.constraints.held


def _prefix(values: Sequence[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


def _second_ranges(question: Question) -> list[tuple[int, int]]:
    """Devices with the second range that the question has for them, by index."""
    devices = question.cluster.devices
    names = [device.name for device in devices]
    return [(names.index(devices[j].beside), j) for j in question.devices if devices[j].beside]


def _pins(question: Question) -> dict[int, int]:
    names = [device.name for device in question.cluster.devices]
    return {names.index(name): count for name, count in question.constraints.layers.items() if count}


def _at_once(cluster: Cluster, name: str) -> bool:
    """Whether the coordinator is the device itself, so that it never waits for a message when it holds all
    units."""
    link = cluster.link(name, name)
    return name == cluster.coordinator and link is not None and cost.hop_seconds(link, TOKEN_BYTES) == 0.0


def _links(question: Question, way: Callable[[LinkSpeed, float], float], rows: float, back: float) -> Sums:
    """What a message takes by `way` on each link, where a call passes `rows` rows along, and `back` tokens
    return. The hop before unit b has the cut of unit b - 1; that of b = 0 means nothing."""
    cluster, ends = question.cluster, question.constraints
    cuts = [unit.cut_bytes for unit in question.model.units[:-1]]
    sizes, here = set(cuts), cluster.coordinator
    names = [device.name for device in cluster.devices]

    def line(link: LinkSpeed | None) -> list[float] | None:
        if link is None:
            return None
        if len(sizes) == 1:
            return [way(link, rows * cuts[0])] * (len(cuts) + 1)
        by_size = {size: way(link, rows * size) for size in sizes}
        return [0.0, *(by_size[size] for size in cuts)]

    def at_end(only: str | None, name: str, link: LinkSpeed | None, tokens: float) -> float:
        return INF if link is None or only not in (None, name) else way(link, TOKEN_BYTES * tokens)

    return Sums(
        [at_end(ends.first, name, cluster.link(here, name), rows) for name in names],
        [at_end(ends.last, name, cluster.link(name, here), back) for name in names],
        [[None if a == b else line(cluster.links.get((a, b))) for b in names] for a in names],
    )


def _first_fits(question: Question) -> list[list[int]]:
    """Per device, for every end c, the least start b whose range fits, and of which it holds all units; it
    never moves back, since more units never take less."""
    model, holds = question.model, question.constraints.holds
    held, fits = cost.held_bytes(model, question.workload), []
    for device in question.cluster.devices:
        room, fit, b, units = device.ram_bytes - device.base_bytes, [0], 0, len(model.units)
        if device.beside:
            room += model.tied_bytes
        for c in range(1, units + 1):
            if not holds(device.name, c - 1, c) or (device.beside and c < units):
                b = c
            while b < c and held[b][c - b - 1] > room:
                b += 1
            fit.append(b)
        fits.append(fit)
    return fits
