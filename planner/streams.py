"""Several streams under way in one chain: how they gather in shared calls, and what a token then takes.

A stage that is free takes what waits as one call and waits for nobody; a link carries one message at a time;
the head sends a token's row at once. So streams form groups that split where a stage is idle and merge where
one is busy, and no formula of a round and a slowest place says where that ends. It is simple to follow,
though: nobody overtakes, so it soon repeats itself, and one repetition is the answer. simulate.py does the
same for requests that come and go.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from . import cost
from .kinds import Kinds
from .rows import Cluster, Model, Stage, Workload
from .stagecost import CALL_STEPS, PAUSE_SECONDS

STARTS = (0.0, 1.0)  # over which part of a round streams begin: at once, and evenly spread
ROUNDS, ANSWERS = 64, 4096  # that a run lasts if nothing repeats before: of each stream, and of all
ALIKE = 1e-7  # of a round: times that differ by less are the same


@dataclass(frozen=True, slots=True)
class Way:
    """A chain as a decoded row passes it. Of each stage: seconds of a call by its rows (entry 0 unused), and
    what a call after a pause takes more. Of each hop, head to first and last to head included: its latency,
    and for how long a row takes the link."""

    calls: Sequence[Sequence[float]]
    pauses: Sequence[float]
    latency: Sequence[float]
    busy: Sequence[float]


@dataclass(frozen=True, slots=True)
class Steady:
    """What streams settle to: seconds a token of all together, and the mean rows of each stage's calls."""

    seconds: float
    rows: tuple[float, ...]


class Streams:
    """The streams of a workload on any chains of a cluster; formulas run once a device and kind of unit."""

    def __init__(self, model: Model, cluster: Cluster, workload: Workload) -> None:
        self._model, self._cluster, self._workload = model, cluster, workload
        self._kinds = Kinds(model)
        self._prefixes: dict[str, list[list[float]]] = {}  # [rows - 1][u]: units [0, u) on that device

    def way(self, stages: Sequence[Stage]) -> Way:
        """The chain of such stages. ValueError: a link is not there."""
        hops = cost.chain_hops(self._model, self._cluster, stages)
        return Way(
            calls=[self._calls(stage) for stage in stages],
            pauses=[self._cluster.device(stage.device).idle_overhead_s for stage in stages],
            latency=[link.latency_s for link, _ in hops],
            busy=[cost.link_busy_seconds(link, size) for link, size in hops],
        )

    def steady(self, stages: Sequence[Stage]) -> Steady:
        """What the streams settle to on such stages: the mean of what they settle to from different starts,
        since that can depend on the start for good. ValueError: a link is not there."""
        way, count = self.way(stages), self._workload.streams
        found = [settle(way, count, start) for start in STARTS]
        rate = sum(cost.per_second(one.seconds) for one in found) / len(found)
        rows = [sum(each) / len(found) for each in zip(*(one.rows for one in found), strict=True)]
        return Steady(1.0 / rate, tuple(rows))

    def _calls(self, stage: Stage) -> list[float]:
        device = self._cluster.device(stage.device)
        if stage.device not in self._prefixes:
            self._prefixes[stage.device] = [
                list(
                    accumulate(
                        self._kinds.each(
                            lambda u, rows=rows: cost.unit_decode_seconds(u, device, self._workload, rows)  # type: ignore[misc]
                        ),
                        initial=0.0,
                    )
                )
                for rows in range(1, min(self._workload.streams, CALL_STEPS) + 1)
            ]
        lines, overhead = self._prefixes[stage.device], device.step_overhead_s
        return [0.0, *(overhead + line[stage.last] - line[stage.first] for line in lines)]


def settle(way: Way, streams: int, spread: float = 0.0) -> Steady:
    """Follows streams that begin within `spread` rounds, evenly, until their rounds repeat: when every stream
    comes back to the head as long after the first as some rounds before, twice in a row."""
    return _Run(way, streams, spread).steady()


class _Run:
    """Times in seconds. Rows keep their order, so answer n is of stream n modulo their number."""

    def __init__(self, way: Way, streams: int, spread: float) -> None:
        self._way, self._streams = way, streams
        count = len(way.calls)
        self._queues: list[deque[float]] = [deque() for _ in range(count)]  # when each row is there
        self._free = [0.0] * count
        self._scheduled = [False] * count
        self._link_free = [0.0] * (count + 1)
        self._heap: list[tuple[float, int]] = []
        self._answers: list[float] = []
        self._made = [0] * count  # calls
        round_s = sum(call[1] for call in way.calls) + sum(way.latency) + sum(way.busy)
        self._unit = ALIKE * round_s or 1.0
        self._pass_on(0, [spread * round_s * at / streams for at in range(streams)])

    def steady(self) -> Steady:
        streams, answers = self._streams, self._answers
        marks: list[list[int]] = []  # calls until each round
        seen: dict[tuple[int, ...], int] = {}
        before: tuple[int, ...] = ()
        rounds = max(8, min(ROUNDS, ANSWERS // streams))
        first = rounds // 4
        for turn in range(rounds + 1):
            while len(answers) < streams * (turn + 1):
                self._call()
            own = answers[turn * streams : (turn + 1) * streams]
            behind = tuple([round((at - own[0]) / self._unit) for at in own])
            marks.append(list(self._made))
            if before and before + behind in seen:
                first = seen[before + behind]
                break
            seen[before + behind] = turn
            before = behind
        turns = turn - first
        calls = [now - then for now, then in zip(marks[turn], marks[first], strict=True)]
        return Steady(
            (answers[turn * streams] - answers[first * streams]) / turns / streams,
            tuple(turns * streams / max(count, 1) for count in calls),
        )

    def _pass_on(self, to: int, left: Sequence[float]) -> None:
        """Queues rows at a stage, each sent when it left; beyond the last stage they are back at the head,
        and each sends the next row of its stream."""
        start, busy, latency = self._link_free[to], self._way.busy[to], self._way.latency[to]
        there = []
        for at in left:
            start = (at if at > start else start) + busy
            there.append(start + latency)
        self._link_free[to] = start
        if to == len(self._queues):
            self._answers += there
            self._pass_on(0, there)
            return
        if not self._scheduled[to]:
            self._scheduled[to] = True
            heapq.heappush(self._heap, (max(there[0], self._free[to]), to))
        self._queues[to].extend(there)

    def _call(self) -> None:
        """The next call: a stage takes what is there."""
        now, at = heapq.heappop(self._heap)
        queue, rows = self._queues[at], 0
        while queue and queue[0] <= now and rows < CALL_STEPS:
            queue.popleft()
            rows += 1
        done = now + self._way.calls[at][rows]
        if now - self._free[at] > PAUSE_SECONDS:
            done += self._way.pauses[at]
        self._free[at] = done
        self._made[at] += 1
        if queue:
            heapq.heappush(self._heap, (max(queue[0], done), at))
        else:
            self._scheduled[at] = False
        self._pass_on(at + 1, [done] * rows)
