"""A simulator: discrete events over the planner's own cost model, for what no machine here can hold.

Requests arrive at the coordinator, prompts go in chunks, stages choose their calls with the inbox of nodes
(net/inbox.py), links carry one message at a time, answers grow token by token. Devices get slower or
die at given times; a dead one means a new plan on the others, and a replay of everything known; a slow one
loses layers if the rebalancer says so. Nothing is random but what random_requests draws from its seed.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from shoal.engine.batch import Want
from shoal.net.inbox import Batch, Inbox, decodes, load
from shoal.net.messages import Close, Epoch, Step
from shoal.net.pace import slowed
from shoal.net.placement import Outcome as Moved
from shoal.net.placement import Proposal, Usage
from shoal.net.rebalance import Memory, View, happened, look
from shoal.net.scheduler import Load
from shoal.planner import Assignment, Cluster, Question
from shoal.planner.chunks import Chunking, best_chunking
from shoal.planner.cost import PAUSE_SECONDS, StageCost, hop_seconds
from shoal.planner.evaluation import check_stages
from shoal.planner.groups import Grouping, Way, grouping
from shoal.planner.moves import travel
from shoal.planner.rows import LOOPBACK, MOST_ROWS, check_name, check_real, check_seconds, check_whole
from shoal.planner.streams import Follower

EPOCH = Epoch(0, 0)
ROW = Chunking(1)
TOKENS = (0,) * MOST_ROWS
HIDDEN = np.zeros((MOST_ROWS, 0), np.float32)
"""The output of a stage: its values do not matter here."""


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
    """How the system behaves. `chunk_rows`: the most rows of a chunk; `window`: chunks of a prompt in flight.
    `replan` gives the stages for the devices that are left; `recover_s` passes between a death and the new
    assignment. `look_every_s`: how often the rebalancer looks at the paces; 0 never."""

    chunk_rows: int = 128
    window: int = 4
    recover_s: float = 1.0
    replan: Callable[[Cluster], Sequence[Assignment]] | None = None
    look_every_s: float = 0.0

    def __post_init__(self) -> None:
        check_whole("chunk_rows", self.chunk_rows, 1)
        check_whole("window", self.window, 1)
        check_seconds("recover_s", self.recover_s)
        check_seconds("look_every_s", self.look_every_s)


@dataclass(slots=True)
class Outcome:
    """What happened. Lists go by request; a time is None where it never came."""

    seconds: float = 0.0
    tokens: int = 0
    tokens_at: list[list[float]] = field(default_factory=list)
    first_token_at: list[float | None] = field(default_factory=list)
    done_at: list[float | None] = field(default_factory=list)
    changes: int = 0
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
    """Positions known, sent and answered. `born`: the prompt's length; the answer ends at `end`; `cut`: how
    what is known is sent. `flying`: the ends of the chunks in flight."""

    known: int
    end: int
    born: int
    cut: Chunking = ROW
    sent: int = 0
    acked: int = 0
    flying: deque[int] = field(default_factory=deque)


class _Groupings(Sequence[Grouping]):
    """The groupings of 1, 2, 3 … sequences, each computed when it is asked for."""

    def __init__(self, way: Way, depth: int, most: int) -> None:
        self._most = most
        self._grouping = cache(lambda count: grouping(way, count, depth))

    def __len__(self) -> int:
        return self._most

    def __getitem__(self, index: Any) -> Any:
        return self._grouping(index + 1)


@dataclass(slots=True)
class _Stage:
    """A stage: what its calls take, its inbox, and the Steps on their way there with their arrivals. `asked`:
    when it looks into its inbox next."""

    cost: StageCost
    inbox: Inbox
    free: float
    coming: deque[tuple[float, Step]] = field(default_factory=deque)
    asked: float = math.inf


class _Chain:
    """The stages of one epoch. What comes back is `heard` at its time."""

    def __init__(self, question: Question, stages: Sequence[Assignment], now: float, run: "_Run") -> None:
        self._way, self._run = Follower(question).way(stages), run
        self._latency, self._busy = self._way.latency, self._way.busy
        depth, rows = question.workload.decode_depth, run.rules.chunk_rows
        groupings = _Groupings(self._way, depth, max(1, len(run.requests)))
        self._stages: list[_Stage] = []
        for at, times in enumerate(self._way.stages):
            assert isinstance(times, StageCost)
            expect = partial(self._expect, at)
            inbox = Inbox(EPOCH, MOST_ROWS, rows, groupings, expect)
            self._stages.append(_Stage(times, inbox, now))
        self._link_free = [0.0] * (len(stages) + 1)
        self._heap: list[tuple[float, int, int]] = []
        self._count = 0
        self.dead: dict[int, float] = {}  # stages whose device died, with the time
        self.cut = cache(lambda tokens: best_chunking(self._way, tokens, rows))

    @property
    def next_call(self) -> float:
        """When a stage looks into its inbox next; infinite where nothing waits."""
        return self._heap[0][0] if self._heap else math.inf

    def slow(self, at: int, cost: StageCost) -> None:
        """From now on the calls of a stage take what `cost` says."""
        self._stages[at].cost = cost

    def send(self, to: int, steps: Sequence[Step], left: float) -> None:
        """Sends Steps to stage `to`, one after another from `left` on."""
        start, stage = max(left, self._link_free[to]), self._stages[to]
        for step in steps:
            start += step.rows * self._busy[to]
            stage.coming.append((start + self._latency[to], step))
        self._link_free[to] = start
        self._look(to, max(stage.coming[0][0], stage.free))

    def call(self) -> bool:
        """The next stage looks into its inbox; whether it began a call."""
        now, _, at = heapq.heappop(self._heap)
        stage = self._stages[at]
        if now != stage.asked:
            return False  # it has looked earlier, or its device has died
        stage.asked, inbox, coming = math.inf, stage.inbox, stage.coming
        while coming and coming[0][0] <= now:
            arrived, step = coming.popleft()
            inbox.put(step, arrived)
        batch = inbox.take(now)
        while isinstance(batch, Batch) and not batch.steps:  # sessions that have ended
            batch = inbox.take(now)
        after = [coming[0][0]] if coming else []
        if not isinstance(batch, Batch):
            after += [] if batch is None else [batch]
        else:
            done = stage.free = now + self._seconds(stage, batch.steps, now)
            inbox.ran(batch, now, done)
            after = [max(done, when) for when in [*after, *([done] if inbox else [])]]
            self._onward(at, batch.steps, done)
        if after:
            self._look(at, min(after))
        return isinstance(batch, Batch)

    def close(self, session: int, now: float) -> None:
        """Ends a session on all stages."""
        for stage in self._stages:
            stage.inbox.put(Close(session, EPOCH), now)

    def die(self, at: int, now: float) -> None:
        """A stage is gone: what it had not finished never leaves it."""
        self.dead[at] = now
        self._stages[at].asked = math.inf
        if at + 1 < len(self._stages):
            late, stage = now + self._latency[at + 1], self._stages[at + 1]
            stage.coming = deque(one for one in stage.coming if one[0] <= late)

    def _look(self, at: int, when: float) -> None:
        """Lets a stage look into its inbox at that time, if it does not do so earlier."""
        stage = self._stages[at]
        if when < stage.asked and at not in self.dead:
            stage.asked = when
            self._count += 1
            heapq.heappush(self._heap, (when, self._count, at))

    def _onward(self, at: int, steps: Sequence[Step], done: float) -> None:
        if at + 1 < len(self._stages):
            last = next((one for one in reversed(steps) if decodes(one)), None)
            self.send(
                at + 1,
                [
                    Step(
                        one.session,
                        EPOCH,
                        one.first,
                        (),
                        one.want,
                        HIDDEN[: one.rows],
                        decodes(one) and one is not last,
                    )
                    for one in steps
                ],
                done,
            )
            return
        start = max(done, self._link_free[-1])
        for step in steps:
            start += self._busy[-1]
            self._run.at(start + self._latency[-1], self._heard, step, done)
        self._link_free[-1] = start

    def _heard(self, step: Step, left: float) -> None:
        if self._run.chain is self and left <= self.dead.get(len(self._stages) - 1, left):
            self._run.answer(step)

    def _expect(self, at: int, loads: Sequence[Load], pause: float) -> float:
        return self._stages[at].cost.call_seconds(loads)

    def _seconds(self, stage: _Stage, steps: Sequence[Step], now: float) -> float:
        """What a call takes."""
        cost, depth = stage.cost, 0
        pause = cost.pause if now - stage.free > PAUSE_SECONDS else 0.0
        for step in steps:
            if step.rows > 1 or step.want is not Want.TOKEN:
                return cost.call_seconds([load(step) for step in steps]) + pause
            depth += step.first
        return cost.rows(len(steps)) + depth * cost.position + pause  # only decoded rows: the usual call


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
        self.outcome = Outcome(
            tokens_at=[[] for _ in requests],
            first_token_at=[None] * self.left,
            done_at=[None] * self.left,
        )
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.now = 0.0
        self.moving = False
        self.memory = Memory()
        self.slower: dict[str, float] = {}
        self._assign(stages)
        for index, request in enumerate(requests):
            self.at(request.at, self._arrive, index)
        for event in events:
            self.at(event.at, self._happen, event)
        if rules.look_every_s:
            self.at(rules.look_every_s, self._balance)

    def run(self) -> Outcome:
        heap = self.heap
        while self.left:
            if heap and heap[0][0] <= self.chain.next_call:
                self.now, _, act = heapq.heappop(heap)
                act()
            else:
                self.now = self.chain.next_call
                self.outcome.calls += self.chain.call()
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
        self.sessions[index] = session = _Session(
            request.prompt, request.prompt + request.answer, request.prompt, self.chain.cut(request.prompt)
        )
        self._feed(index, session)

    def _feed(self, index: int, session: _Session) -> None:
        """Sends what is known and not sent, within the window."""
        while session.sent < session.known and len(session.flying) < self.rules.window:
            first = session.sent
            rows = min(session.cut.at(first), session.known - first)
            session.sent += rows
            session.flying.append(session.sent)
            want = Want.TOKEN if session.sent == session.known else Want.NOTHING
            self.chain.send(0, (Step(index, EPOCH, first, TOKENS[:rows], want),), self.now)

    def answer(self, step: Step) -> None:
        """A result is back at the coordinator."""
        session = self.sessions[step.session]
        if session is None:
            return
        session.acked += step.rows
        while session.flying and session.flying[0] <= session.acked:  # stages may divide and join chunks
            session.flying.popleft()
        if step.want is Want.TOKEN:
            session.known += 1
            self.outcome.tokens += 1
            self.outcome.tokens_at[step.session].append(self.now)
            if session.known == session.born + 1:
                self.outcome.first_token_at[step.session] = self.now
            if session.known == session.end:
                self.outcome.done_at[step.session] = self.now
                self.sessions[step.session] = None
                self.left -= 1
                self.chain.close(step.session, self.now)
                return
        self._feed(step.session, session)

    # What happens to devices.

    def _happen(self, event: Event) -> None:
        cluster = self.question.cluster
        if event.device not in [device.name for device in cluster.devices]:
            return
        where = [at for at, stage in enumerate(self.stages) if stage.device == event.device]
        if event.kind == "slow":
            hot = slowed(self.start.cluster.device(event.device), event.factor)
            self.slower[event.device] = event.factor
            self._change(
                replace(cluster, devices=tuple(hot if d.name == hot.name else d for d in cluster.devices))
            )
            for at in where:
                stage = self.stages[at]
                self.chain.slow(at, StageCost(self.question.model, hot, stage.first, stage.last))
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
                session.sent = session.acked
                session.flying.clear()
                session.cut = self.chain.cut(session.known - session.sent)
                self._feed(index, session)

    def _balance(self) -> None:
        """Asks the rebalancer. The state of the units that it moves travels before they do."""
        self.at(self.now + self.rules.look_every_s, self._balance)
        live = [session for session in self.sessions if session is not None]
        if self.moving or self.chain.dead or not live:
            return
        load = self.question.workload
        depth = min(load.context, sum(session.acked for session in live) // len(live))
        load = replace(load, sequences=len(live), streams=len(live), depth=depth)
        kept = [device.name for device in self.question.cluster.devices]
        devices = tuple(self.start.cluster.device(name) for name in kept)
        cluster = replace(self.question.cluster, devices=devices)
        asked = replace(self.question, cluster=cluster, workload=load, objective="throughput")
        usage = Usage(
            streams=len(live),
            depth=depth,
            remaining=sum(session.end - session.known for session in live),
            tokens=self.outcome.tokens,
            positions=sum(session.acked for session in live),
            reading=any(session.acked < session.born for session in live),
        )
        view = View(asked, self.slower, self.stages, usage, self.now)
        self.memory, proposal = look(self.memory, view)
        if proposal is not None:
            self.moving = True
            needed = travel(asked, self.stages, proposal.placement.stages, {})
            seconds = max(
                hop_seconds(asked.cluster.link(*ends) or LOOPBACK, usage.positions * size)
                for ends, size in needed.state.items()
            )
            self.at(self.now + seconds, self._moved, proposal, self.chain)

    def _moved(self, proposal: Proposal, chain: _Chain) -> None:
        """The state is there: a new epoch, steps in flight are sent again."""
        self.moving = False
        done = chain is self.chain and not self.chain.dead
        self.memory = happened(self.memory, Moved(done))
        if done:
            self._assign(proposal.placement.stages)
            self.outcome.changes += 1
            self._resend(replay=False)
