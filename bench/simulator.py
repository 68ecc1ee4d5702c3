"""A simulator: discrete events over the planner's own cost model, for what no machine here can hold.

Requests arrive at the coordinator, prompts go in chunks, a stage that is free takes what waits as one call,
links carry one message at a time, answers grow token by token (the planner's walker). Devices get slower or
die at given times; a dead one means a new plan on the others, and a replay of everything known; a slow one
loses boundary layers to a neighbour. Nothing is random but what random_requests draws from its seed.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from shoal.net.pace import slowed
from shoal.planner import Assignment, Cluster, Question
from shoal.planner.cost import StageCost, hop_seconds
from shoal.planner.evaluation import check_stages
from shoal.planner.moves import Move, best_move
from shoal.planner.rows import check_name, check_real, check_seconds, check_whole
from shoal.planner.streams import Follower, Message, Walker


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of so many tokens that arrives at a time, and the tokens of its answer."""

    at: float
    prompt: int
    answer: int

    def __post_init__(self) -> None:
        check_seconds("a request's arrival", self.at)
        check_whole("a request's prompt", self.prompt, 1)
        check_whole("a request's answer", self.answer, 1)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens to a device: it takes `factor` times as long as at the start, or it dies."""

    at: float
    device: str
    kind: Literal["slow", "die"]
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_seconds("an event's time", self.at)
        check_name("an event's device", self.device)
        if self.kind not in ("slow", "die"):
            raise ValueError(f"an event is of kind slow or die, not {self.kind!r}")
        check_real("an event's factor", self.factor, above=0)


@dataclass(frozen=True, slots=True)
class Rules:
    """How the system behaves. `replan` gives the stages for the devices that are left; `recover_s` passes
    between a death and the new assignment. `steal_every_s`: how often neighbours compare themselves; 0 never.
    A layer moves when the slower of the two gains at least `steal_gain`."""

    chunk_rows: int = 128
    window: int = 4  # chunks of one prompt in flight
    recover_s: float = 1.0
    replan: Callable[[Cluster], Sequence[Assignment]] | None = None
    steal_every_s: float = 0.0
    steal_gain: float = 0.1

    def __post_init__(self) -> None:
        check_whole("chunk_rows", self.chunk_rows, 1)
        check_whole("window", self.window, 1)
        check_seconds("recover_s", self.recover_s)
        check_seconds("steal_every_s", self.steal_every_s)
        check_seconds("steal_gain", self.steal_gain)


@dataclass(slots=True)
class Outcome:
    """What happened. Lists go by request; a time is None where it never came."""

    seconds: float = 0.0
    tokens: int = 0
    first_token_at: list[float | None] = field(default_factory=list)
    done_at: list[float | None] = field(default_factory=list)
    steals: int = 0
    recoveries: int = 0
    calls: int = 0
    stages: tuple[Assignment, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """All answers together, over the whole time."""
        return self.tokens / self.seconds if self.seconds else 0.0


def random_requests(
    seed: int, count: int, per_s: float, prompt: tuple[int, int], answer: tuple[int, int]
) -> list[Request]:
    """Requests that arrive as a Poisson process, lengths uniform within the bounds."""
    rng, at, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(per_s)
        requests.append(Request(at, rng.randint(*prompt), rng.randint(*answer)))
    return requests


USUAL = Rules()


def simulate(
    question: Question,
    stages: Sequence[Assignment],
    requests: Sequence[Request],
    events: Sequence[Event] = (),
    rules: Rules = USUAL,
) -> Outcome:
    """Runs until every answer is complete. ValueError: stages that are no plan of the question's model, also
    those of `replan`; links that are not there; a device that dies without one."""
    return _Run(question, stages, requests, events, rules).run()


@dataclass(slots=True)
class _Session:
    """Positions known, sent and answered. `born`: the prompt's length; the answer ends at `end`."""

    known: int
    end: int
    born: int
    sent: int = 0
    acked: int = 0
    flying: int = 0


class _Chain(Walker):
    """The stages of one epoch. What comes back is `heard` at its time."""

    def __init__(self, question: Question, stages: Sequence[Assignment], now: float, run: "_Run") -> None:
        super().__init__(Follower(question).way(stages), idle_since=now)
        self._chunks = [0] * len(stages)  # parts of prompts, in each queue
        self._run = run
        self.dead: dict[int, float] = {}  # stages whose device died, with the time

    def send(self, to: int, messages: Sequence[Message], left: float) -> None:
        super().send(to, messages, left)
        for rows, _, wants, _ in messages:
            if rows > 1 or not wants:
                self._chunks[to] += 1

    def take(self, at: int, now: float) -> list[Message]:
        """Where parts of prompts wait: one step of each sequence, and chunks up to chunk_rows."""
        if not self._chunks[at]:
            return super().take(at, now)
        arrivals, waiting, prompt = self.arrivals[at], self.waiting[at], 0
        taken: list[Message] = []
        kept: list[tuple[float, Message]] = []
        served: set[int] = set()
        while arrivals and arrivals[0] <= now and len(taken) < self._most:
            arrived, message = arrivals.popleft(), waiting.popleft()
            rows, _, wants, sequence = message
            crowded = rows > 1 and taken and prompt + rows > self._run.rules.chunk_rows
            if crowded or sequence in served:
                kept.append((arrived, message))
            else:
                prompt += rows if rows > 1 else 0
                taken.append(message)
                self._chunks[at] -= rows > 1 or not wants
            served.add(sequence)
        for arrived, message in reversed(kept):
            arrivals.appendleft(arrived)
            waiting.appendleft(message)
        return taken

    def die(self, at: int, now: float) -> None:
        """A stage is gone: what it had not finished never leaves it."""
        self.dead[at] = now
        if at + 1 < len(self.stages):
            late = now + self._latency[at + 1]
            kept = [
                one for one in zip(self.arrivals[at + 1], self.waiting[at + 1], strict=True) if one[0] <= late
            ]
            self.arrivals[at + 1] = deque(arrival for arrival, _ in kept)
            self.waiting[at + 1] = deque(message for _, message in kept)
            self._chunks[at + 1] = sum(rows > 1 or not wants for _, (rows, _, wants, _) in kept)
        self._heap = [call for call in self._heap if call[2] != at]
        heapq.heapify(self._heap)
        self._scheduled[at] = True  # so that nothing that arrives there begins a call

    def returned(self, message: Message, at: float, left: float) -> None:
        self._run.at(at, self._heard, message, left)

    def _heard(self, message: Message, left: float) -> None:
        if self._run.chain is self and left <= self.dead.get(len(self.stages) - 1, left):
            self._run.answer(message)


class _Run:
    """State of one simulation; times in seconds, `now` the current one."""

    def __init__(
        self,
        question: Question,
        stages: Sequence[Assignment],
        requests: Sequence[Request],
        events: Sequence[Event],
        rules: Rules,
    ) -> None:
        self.start = self.question = question
        self.rules, self.requests = rules, requests
        self.sessions: list[_Session | None] = [None] * len(requests)
        self.left = len(requests)
        self.outcome = Outcome(first_token_at=[None] * self.left, done_at=[None] * self.left)
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.now = 0.0
        self.moving = False
        self._assign(stages)
        for index, request in enumerate(requests):
            self.at(request.at, self._arrive, index)
        for event in events:
            self.at(event.at, self._happen, event)
        if rules.steal_every_s:
            self.at(rules.steal_every_s, self._balance)

    def run(self) -> Outcome:
        heap = self.heap
        while self.left:
            if heap and heap[0][0] <= self.chain.next_call:
                self.now, _, act = heapq.heappop(heap)
                act()
            else:
                self.chain.call()
                self.outcome.calls += 1
        self.outcome.seconds = self.now
        self.outcome.stages = self.stages
        return self.outcome

    def at(self, when: float, act: Callable[..., None], *what: object) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, partial(act, *what)))

    def _assign(self, stages: Sequence[Assignment]) -> None:
        """A new epoch: these stages, empty queues and links."""
        check_stages(self.question, stages)
        self.stages = tuple(stages)
        self.chain = _Chain(self.question, stages, self.now, self)

    # The coordinator.

    def _arrive(self, index: int) -> None:
        request = self.requests[index]
        self.sessions[index] = _Session(request.prompt, request.prompt + request.answer, request.prompt)
        self._feed(index)

    def _feed(self, index: int) -> None:
        """Sends what is known and not sent, within the window."""
        session = self.sessions[index]
        assert session is not None, "only live sessions are fed"
        while session.sent < session.known and session.flying < self.rules.window:
            rows = min(self.rules.chunk_rows, session.known - session.sent)
            first, session.sent = session.sent, session.sent + rows
            session.flying += 1
            self.chain.send(0, ((rows, first, session.sent == session.known, index),), self.now)

    def answer(self, message: Message) -> None:
        """A result is back at the coordinator."""
        rows, _, token, index = message
        session = self.sessions[index]
        if session is None:
            return
        session.acked += rows
        session.flying -= 1
        if token:
            session.known += 1
            self.outcome.tokens += 1
            if session.known == session.born + 1:
                self.outcome.first_token_at[index] = self.now
            if session.known == session.end:
                self.outcome.done_at[index] = self.now
                self.sessions[index] = None
                self.left -= 1
                return
        self._feed(index)

    # What happens to devices.

    def _happen(self, event: Event) -> None:
        cluster = self.question.cluster
        if event.device not in [device.name for device in cluster.devices]:
            return
        where = [at for at, stage in enumerate(self.stages) if stage.device == event.device]
        if event.kind == "slow":
            hot = slowed(self.start.cluster.device(event.device), event.factor)
            self._change(
                replace(cluster, devices=tuple(hot if d.name == hot.name else d for d in cluster.devices))
            )
            for at in where:
                stage = self.stages[at]
                self.chain.stages[at] = StageCost(self.question.model, hot, stage.first, stage.last)
            return
        devices = tuple(d for d in cluster.devices if d.name != event.device)
        links = {ends: link for ends, link in cluster.links.items() if event.device not in ends}
        if not devices or (where and self.rules.replan is None):
            raise ValueError(f"{event.device} dies, and there is nobody to take over")
        self._change(Cluster(devices, links, cluster.coordinator))
        for at in where:
            self.chain.die(at, self.now)
            self.at(self.now + self.rules.recover_s, self._recover, self.chain)

    def _change(self, cluster: Cluster) -> None:
        self.question = replace(self.question, cluster=cluster)

    def _recover(self, chain: _Chain) -> None:
        """The survivors' plan, unless another death has brought it; everything known is sent again."""
        if chain is not self.chain:
            return
        assert self.rules.replan is not None, "checked when the device died"
        self._assign(self.rules.replan(self.question.cluster))
        self.outcome.recoveries += 1
        self.moving = False
        self._resend(replay=True)

    def _resend(self, *, replay: bool) -> None:
        for index, session in enumerate(self.sessions):
            if session is not None:
                session.acked = 0 if replay else session.acked
                session.sent, session.flying = session.acked, 0
                self._feed(index)

    def _balance(self) -> None:
        """Moves the boundary layer that helps most, if any helps enough; its state travels first."""
        self.at(self.now + self.rules.steal_every_s, self._balance)
        if self.moving or self.chain.dead:
            return
        live = [session for session in self.sessions if session is not None]
        if not live:
            return
        depth = min(self.question.workload.context, max(session.acked for session in live))
        load = replace(self.question.workload, sequences=len(live), streams=len(live), depth=depth)
        asked = replace(self.question, workload=load, objective="throughput")
        move = best_move(asked, self.stages, most_units=1)
        if move is None or move.gain < self.rules.steal_gain * (move.seconds + move.gain):
            return
        link = asked.cluster.link(move.giver, move.taker)
        if link is not None:
            self.moving = True
            self.at(self.now + hop_seconds(link, move.state_bytes), self._steal, move, self.chain)

    def _steal(self, move: Move, chain: _Chain) -> None:
        """The layer's state is there: a new epoch, steps in flight are sent again."""
        self.moving = False
        if chain is not self.chain or self.chain.dead:
            return
        self._assign(move.stages)
        self.outcome.steals += 1
        self._resend(replay=False)
