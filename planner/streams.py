"""One walker of messages through the stages and links of a chain, and what follows from walking: what several
concurrent sequences settle to, and when the first token of a prompt is there. plan_svg draws what it walks,
and the simulator of bench/ adds requests that come and devices that change.

A stage that is free takes what waits as one call and waits for nobody; a link carries one message at a time.
So sequences form groups that split where a stage is idle and merge where one is busy, and no formula says
where that ends. Following them does: nobody overtakes, so it soon repeats itself, and one repetition is the
answer. A message is queued at its receiver at once, with its arrival: the heap holds one event per call, not
one per message.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from . import cost
from .cost import CALL_STEPS, PAUSE_SECONDS, StageCost, Step
from .rows import Assignment, Question

STARTS = (0.0, 1.0)  # over which part of a lap sequences begin: at once, and evenly spread
LAPS, ANSWERS = 64, 4096  # that a run lasts if nothing repeats before: of each sequence, and of all
ALIKE = 1e-7  # of a lap: times that differ by less are the same
Message = tuple[int, int, bool, int]  # a Step, and whose it is: rows, first position, wants a token, sequence


@dataclass(frozen=True, slots=True)
class Fixed:
    """Like a StageCost of calls of decoded rows alone: seconds by their rows, entry 0 unused."""

    seconds: Sequence[float]
    pause: float = 0.0
    position: float = 0.0

    def rows(self, count: int) -> float:
        return self.seconds[count]

    def call_seconds(self, steps: Sequence[Step]) -> float:
        return self.seconds[len(steps)]


@dataclass(frozen=True, slots=True)
class Way:
    """A chain as messages pass it. Of each stage what its calls take; of each hop, coordinator to first and
    last to coordinator included, its latency, and for how long a row (on the last, a message) takes the
    link."""

    stages: Sequence[StageCost | Fixed]
    latency: Sequence[float]
    busy: Sequence[float]


class Walker:
    """Messages on their way through a chain; a subclass says what happens when one is `returned`. Times in
    seconds. `idle_since`: stages have been idle since then; `most`: steps of one call."""

    def __init__(self, way: Way, idle_since: float = 0.0, most: int = CALL_STEPS) -> None:
        count = len(way.stages)
        self.stages = list(way.stages)
        self._latency, self._busy, self._most = way.latency, way.busy, most
        self.arrivals: list[deque[float]] = [deque() for _ in range(count)]  # of what waits at each stage
        self.waiting: list[deque[Message]] = [deque() for _ in range(count)]
        self.free = [idle_since] * count
        self.link_free = [0.0] * (count + 1)
        self._scheduled = [False] * count
        self._heap: list[tuple[float, int, int]] = []
        self._count = 0

    @property
    def next_call(self) -> float:
        """When the next call begins; infinite where nothing waits."""
        return self._heap[0][0] if self._heap else math.inf

    def send(self, to: int, messages: Sequence[Message], left: float) -> None:
        """Queues messages at stage `to`, sent one after another from `left` on."""
        start, busy, latency = self.link_free[to], self._busy[to], self._latency[to]
        if left > start:
            start = left
        arrive = self.arrivals[to].append
        if not self._scheduled[to]:
            self._schedule(max(start + messages[0][0] * busy + latency, self.free[to]), to)
        for message in messages:
            start += message[0] * busy
            arrive(start + latency)
        self.waiting[to].extend(messages)
        self.link_free[to] = start

    def _schedule(self, when: float, at: int) -> None:
        self._scheduled[at] = True
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, at))

    def call(self) -> tuple[int, float, float, Sequence[Message]]:
        """The next call: which stage, from when to when, and what it took. The inner loop."""
        now, _, at = heapq.heappop(self._heap)
        times, arrivals, taken = self.stages[at], self.arrivals[at], self.take(at, now)
        if not taken:  # what it was to take never left a device that has died
            self._scheduled[at] = False
            return at, now, now, taken
        depth, decoding = 0, True
        for rows, first, wants, _ in taken:
            depth += first
            decoding = decoding and rows == 1 and wants
        if decoding:
            done = now + times.rows(len(taken)) + depth * times.position
        else:
            done = now + times.call_seconds([message[:3] for message in taken])
        if now - self.free[at] > PAUSE_SECONDS:
            done += times.pause
        self.free[at] = done
        if arrivals:
            there = arrivals[0]
            self._schedule(there if there > done else done, at)
        else:
            self._scheduled[at] = False
        if at + 1 < len(self.stages):
            self.send(at + 1, taken, done)
        else:
            self._give_back(taken, done)
        return at, now, done, taken

    def take(self, at: int, now: float) -> list[Message]:
        """What is there by now and goes into one call, where no sequence has two messages under way."""
        arrivals, waiting, most = self.arrivals[at], self.waiting[at], self._most
        taken: list[Message] = []
        while arrivals and arrivals[0] <= now and len(taken) < most:
            arrivals.popleft()
            taken.append(waiting.popleft())
        return taken

    def _give_back(self, messages: Sequence[Message], done: float) -> None:
        start = max(done, self.link_free[-1])
        for message in messages:
            start += self._busy[-1]
            self.returned(message, start + self._latency[-1], done)
        self.link_free[-1] = start

    def returned(self, message: Message, at: float, left: float) -> None:
        """A result is back at the coordinator at that time; it left the last stage before."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Steady:
    """What sequences settle to: seconds a token of all together, and the mean rows of each stage's calls."""

    seconds: float
    rows: tuple[float, ...]


class _Decoding(Walker):
    """Sequences that all decode: who gets a token sends the next row at once. They keep their order, so
    answer n is of sequence n modulo their number."""

    def __init__(self, way: Way, count: int, depth: int, spread: float) -> None:
        super().__init__(way)
        self.answers: list[float] = []
        lap = sum(stage.rows(1) + depth * stage.position for stage in way.stages)
        self.lap = lap + sum(way.latency) + sum(way.busy)
        for at in range(count):
            self.send(0, [(1, depth, True, at)], spread * self.lap * at / count)

    def returned(self, message: Message, at: float, left: float) -> None:
        self.answers.append(at)
        self.send(0, (message,), at)


def settle(way: Way, count: int, spread: float = 0.0, depth: int = 0) -> Steady:
    """Follows `count` sequences at that depth that begin within `spread` laps, evenly, until their laps
    repeat: when every sequence comes back to the coordinator as long after the first as some laps before,
    twice in a row."""
    run = _Decoding(way, count, depth, spread)
    answers, made = run.answers, [0] * len(way.stages)
    unit = ALIKE * run.lap or 1.0
    marks: list[list[int]] = []  # calls of each stage until each lap
    seen: dict[tuple[int, ...], int] = {}
    before: tuple[int, ...] = ()
    laps = max(8, min(LAPS, ANSWERS // count))
    first = laps // 4
    for lap in range(laps + 1):
        while len(answers) < count * (lap + 1):
            made[run.call()[0]] += 1
        own = answers[lap * count : (lap + 1) * count]
        behind = tuple([round((at - own[0]) / unit) for at in own])
        marks.append(list(made))
        if before and before + behind in seen:
            first = seen[before + behind]
            break
        seen[before + behind] = lap
        before = behind
    passed = lap - first
    calls = [now - then for now, then in zip(marks[lap], marks[first], strict=True)]
    return Steady(
        (answers[lap * count] - answers[first * count]) / passed / count,
        tuple(passed * count / max(made, 1) for made in calls),
    )


class _Prompt(Walker):
    """The chunks of one prompt, a call each, sent one after another; every stage was idle before."""

    done = math.inf

    def __init__(self, way: Way, chunks: Sequence[tuple[int, int]]) -> None:
        super().__init__(way, idle_since=-math.inf, most=1)
        end = sum(chunks[-1])
        self.send(0, [(rows, at, at + rows == end, 0) for at, rows in chunks], 0.0)

    def returned(self, message: Message, at: float, left: float) -> None:
        if message[2]:
            self.done = at


class Follower:
    """Follows a question's workload along chains. Stages keep their costs from chain to chain."""

    def __init__(self, question: Question) -> None:
        self._question = question
        model, device = question.model, question.cluster.device
        self._cost = cache(lambda name, first, last: StageCost(model, device(name), first, last))

    def cost(self, stage: Assignment) -> StageCost:
        """What calls of that stage take."""
        return self._cost(stage.device, stage.first, stage.last)

    def way(self, stages: Sequence[Assignment]) -> Way:
        """The chain of such stages. ValueError: a link is not there."""
        hops = cost.chain_hops(self._question.model, self._question.cluster, stages)
        return Way(
            stages=[self.cost(stage) for stage in stages],
            latency=[link.latency_s for link, _ in hops],
            busy=[cost.link_busy_seconds(link, size) for link, size in hops],
        )

    def steady(self, stages: Sequence[Assignment]) -> Steady:
        """What the concurrent sequences settle to on such stages: the mean of what they settle to from
        different starts, since that can depend on the start for good. ValueError: a link is not there."""
        way, load = self.way(stages), self._question.workload
        found = [settle(way, load.streams, start, load.decode_depth) for start in STARTS]
        rate = sum(cost.per_second(one.seconds) for one in found) / len(found)
        rows = [sum(each) / len(found) for each in zip(*(one.rows for one in found), strict=True)]
        return Steady(1.0 / rate, tuple(rows))

    def first_token(self, stages: Sequence[Assignment]) -> float:
        """Seconds from the prompt's arrival at the coordinator to its first token there, its chunks pipelined
        along the chain. ValueError: a link is not there."""
        walker = _Prompt(self.way(stages), self._question.workload.chunks)
        while walker.done == math.inf:
            walker.call()
        return walker.done
