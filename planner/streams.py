"""What follows from the costs of a chain: the tokens/s of concurrent sequences, and when the first token of a
prompt is there.

Concurrent sequences are a formula (groups.py). The chunks of a prompt are followed along the chain by a
walker of messages, which plan_svg draws.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from . import cost
from .chunks import best_chunking
from .cost import PAUSE_SECONDS, StageCost, Step
from .groups import best_groups, round_seconds
from .rows import Assignment, Question

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
        return self.seconds[min(sum(rows for rows, _, _ in steps), len(self.seconds) - 1)]


@dataclass(frozen=True, slots=True)
class Way:
    """A chain as messages pass it. Of each stage what its calls take; of each hop, coordinator to first and
    last to coordinator included, its latency, and for how long a row (on the last, a message) takes the
    link. `together`: pairs of stages that one CPU computes."""

    stages: Sequence[StageCost | Fixed]
    latency: Sequence[float]
    busy: Sequence[float]
    together: Sequence[tuple[int, int]] = ()


class Walker:
    """Messages on their way through a chain, each of them a call; a subclass says what happens when one is
    `returned`. Times in seconds. `idle_since`: stages have been idle since then."""

    def __init__(self, way: Way, idle_since: float = 0.0) -> None:
        count = len(way.stages)
        self.stages = list(way.stages)
        self._latency, self._busy = way.latency, way.busy
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

    def call(self) -> tuple[int, float, float, Message]:
        """The next call: which stage, from when to when, and of which message."""
        now, _, at = heapq.heappop(self._heap)
        times, arrivals = self.stages[at], self.arrivals[at]
        arrivals.popleft()
        message = self.waiting[at].popleft()
        done = now + times.call_seconds([message[:3]])
        if now - self.free[at] > PAUSE_SECONDS:
            done += times.pause
        self.free[at] = done
        if arrivals:
            self._schedule(max(arrivals[0], done), at)
        else:
            self._scheduled[at] = False
        if at + 1 < len(self.stages):
            self.send(at + 1, (message,), done)
        else:
            self._give_back(message, done)
        return at, now, done, message

    def _give_back(self, message: Message, done: float) -> None:
        self.link_free[-1] = max(done, self.link_free[-1]) + self._busy[-1]
        self.returned(message, self.link_free[-1] + self._latency[-1], done)

    def returned(self, message: Message, at: float, left: float) -> None:
        """A result is back at the coordinator at that time; it left the last stage before."""
        raise NotImplementedError


class _Prompt(Walker):
    """The chunks of one prompt, a call each, sent one after another; every stage was idle before."""

    done = math.inf

    def __init__(self, way: Way, chunks: Sequence[tuple[int, int]]) -> None:
        super().__init__(way, idle_since=-math.inf)
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
        cluster = self._question.cluster
        hops = cost.chain_hops(self._question.model, cluster, stages)
        names = [stage.device for stage in stages]
        beside = [cluster.device(name).beside for name in names]
        return Way(
            stages=[self.cost(stage) for stage in stages],
            latency=[link.latency_s for link, _ in hops],
            busy=[cost.link_busy_seconds(link, size) for link, size in hops],
            together=[(names.index(one), j) for j, one in enumerate(beside) if one in names],
        )

    def grouped(self, stages: Sequence[Assignment]) -> tuple[float, int]:
        """Seconds a token of all the concurrent sequences together on such stages, in the best number of
        groups, and the rows of the largest. ValueError: a link is not there."""
        way, load = self.way(stages), self._question.workload
        groups = best_groups(way, load.streams, load.decode_depth)
        seconds = round_seconds(way, load.streams, groups, load.decode_depth)
        return seconds / load.streams, -(-load.streams // groups)

    def first_token(self, stages: Sequence[Assignment]) -> float:
        """Seconds from the prompt's arrival at the coordinator to its first token there, in the chunks that
        are best for these stages, pipelined along them. ValueError: a link is not there."""
        way, load = self.way(stages), self._question.workload
        cut = best_chunking(way, load.prompt_tokens, load.chunk_tokens)
        walker = _Prompt(way, cut.cut(0, load.prompt_tokens))
        while walker.done == math.inf:
            walker.call()
        return walker.done
