"""A simulator: discrete events over the planner's own cost model, for what no machine here can hold.

Requests arrive at the head, prompts go in chunks, a stage that is free takes what waits as one call, links
carry one message at a time, answers grow token by token. Devices get slower or die at given times; a dead one
means a new plan on the others, and a replay of everything known; a slow one loses boundary layers to a
neighbour that holds copies. Nothing is random but what scenario.random_requests draws from its seed.

A message is queued at its receiver at once, with the time when it will be there: queues stay in order, since
each has one sender, and the heap holds one event per call instead of one per message.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.scenario import Event, Outcome, Request, Rules

from shoal.planner import cost
from shoal.planner.evaluation import check_stages
from shoal.planner.refresh import slowed
from shoal.planner.rows import TOKEN_BYTES, Cluster, Model, Stage, Workload
from shoal.planner.stagecost import CALL_STEPS, PAUSE_SECONDS, StageCost, Step

USUAL = Rules()


def simulate(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    requests: Sequence[Request],
    events: Sequence[Event] = (),
    rules: Rules = USUAL,
) -> Outcome:
    """Runs until every answer is complete. `workload` sizes RAM for copies; ValueError: stages that are no
    plan of the model, also those of `replan`; links that are not there; a device that dies without one."""
    return _Run(model, cluster, workload, stages, requests, events, rules).run()


@dataclass(slots=True)
class _Session:
    """Positions known, sent and answered. `born`: the prompt's length; the answer ends at `end`."""

    known: int
    end: int
    born: int
    sent: int = 0
    acked: int = 0
    flying: int = 0


class _Run:
    """State of one simulation; times in seconds, `now` the current one."""

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        workload: Workload,
        stages: Sequence[Stage],
        requests: Sequence[Request],
        events: Sequence[Event],
        rules: Rules,
    ) -> None:
        self.model, self.start, self.workload, self.rules = model, cluster, workload, rules
        self.cluster = cluster
        self.requests = requests
        self.sessions: list[_Session | None] = [None] * len(requests)
        self.left = len(requests)
        self.outcome = Outcome(first_token_at=[None] * self.left, done_at=[None] * self.left)
        self.heap: list[tuple[float, int, int, Any]] = []  # stage and epoch of a call; or -1 and what to do
        self.count = 0
        self.epoch = 0
        self.now = 0.0
        self.moving = False
        self._assign(stages)
        for index, request in enumerate(requests):
            self._at(request.at, self._arrive, index)
        for event in events:
            self._at(event.at, self._happen, event)
        if rules.steal_every_s:
            self._at(rules.steal_every_s, self._balance)

    def run(self) -> Outcome:
        heap, pop = self.heap, heapq.heappop
        while self.left:
            self.now, _, stage, act = pop(heap)
            if stage >= 0:
                self._call(stage, act)
            else:
                act()
        self.outcome.seconds = self.now
        self.outcome.stages = self.stages
        return self.outcome

    def _at(self, when: float, act: Callable[..., None], *what: object) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, -1, partial(act, *what)))

    def _call_at(self, when: float, stage: int) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, stage, self.epoch))

    def _assign(self, stages: Sequence[Stage]) -> None:
        """A new epoch: these stages, empty queues and links."""
        check_stages(self.model, self.cluster, stages)
        self.epoch += 1
        self.stages = tuple(stages)
        self.costs = [StageCost(self.model, self.cluster.device(s.device), s.first, s.last) for s in stages]
        hops = cost.chain_hops(self.model, self.cluster, stages)
        self.latency = [link.latency_s for link, _ in hops]
        self.row_busy = [size / link.bytes_per_s for link, size in hops]
        self.token_busy = TOKEN_BYTES / hops[-1][0].bytes_per_s
        count = len(stages)
        self.link_free = [0.0] * (count + 1)
        self.queues: list[deque[Step]] = [deque() for _ in stages]
        self.free = [self.now] * count
        self.scheduled = [False] * count
        self.chunks = [0] * count  # of prompts, in each queue
        self.last = count - 1
        self.dead: dict[int, float] = {}  # stages whose device died, with the time

    # The head.

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
            self._send(0, index, rows, first, session.sent == session.known, self.now)

    def _answer(self, index: int, rows: int, token: bool, left: float, epoch: int) -> None:
        """A result is back at the head, `left` when the last stage had it."""
        session = self.sessions[index]
        if session is None or epoch != self.epoch or left > self.dead.get(self.last, left):
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

    # Links and stages.

    def _send(self, to: int, index: int, rows: int, first: int, wants: bool, left: float) -> None:
        """Queues a message at stage `to`, sent at `left`."""
        self._pass_on(to, [(left, index, rows, first, wants)], left)

    def _pass_on(self, to: int, steps: Sequence[Step], left: float) -> None:
        """Queues messages at stage `to`, sent one after another from `left` on."""
        start, busy, latency = self.link_free[to], self.row_busy[to], self.latency[to]
        if left > start:
            start = left
        if not self.scheduled[to]:
            self.scheduled[to] = True
            first, free = start + steps[0][2] * busy + latency, self.free[to]
            self._call_at(first if first > free else free, to)
        append = self.queues[to].append
        for _, index, rows, position, wants in steps:
            start += rows * busy
            append((start + latency, index, rows, position, wants))
            if rows > 1:
                self.chunks[to] += 1
        self.link_free[to] = start

    def _call(self, at: int, epoch: int) -> None:
        """A stage that is free takes what waits as one call. The inner loop."""
        if epoch != self.epoch or at in self.dead:
            return
        now, queue, cost_of = self.now, self.queues[at], self.costs[at]
        steps: list[Step]
        if self.chunks[at]:
            steps = self._take(queue)
            self.chunks[at] -= sum(step[2] > 1 for step in steps)
            done = now + cost_of.call_seconds(steps)
        else:
            steps = []
            depth = 0
            while queue and queue[0][0] <= now and len(steps) < CALL_STEPS:
                step = queue.popleft()
                depth += step[3]
                steps.append(step)
            done = now + cost_of.rows[len(steps)] + depth * cost_of.position
        if not steps:  # what it was to take never left a device that has died
            self.scheduled[at] = False
            return
        if now - self.free[at] > PAUSE_SECONDS:
            done += cost_of.pause
        self.free[at] = done
        self.outcome.calls += 1
        if at < self.last:
            self._pass_on(at + 1, steps, done)
        else:
            self._give_back(steps, done)
        if queue:
            there = queue[0][0]
            self._call_at(there if there > done else done, at)
        else:
            self.scheduled[at] = False

    def _give_back(self, steps: Sequence[Step], done: float) -> None:
        """Sends the last stage's results to the head."""
        start = max(done, self.link_free[-1])
        for _, index, rows, _, wants in steps:
            start += self.token_busy
            self._at(start + self.latency[-1], self._answer, index, rows, wants, done, self.epoch)
        self.link_free[-1] = start

    def _take(self, queue: deque[Step]) -> list[Step]:
        """What is here by now and goes into one call: a step of each session, one chunk of prompts."""
        now, prompt = self.now, 0
        steps: list[Step] = []
        kept: list[Step] = []
        served: set[int] = set()
        while queue and queue[0][0] <= now and len(steps) < CALL_STEPS:
            step = queue.popleft()
            rows = step[2]
            if rows > 1:
                crowded = steps and prompt + rows > self.rules.chunk_rows
                if crowded or step[1] in served:
                    kept.append(step)
                    served.add(step[1])
                    continue
                prompt += rows
            elif served and step[1] in served:
                kept.append(step)
                continue
            if rows > 1:
                served.add(step[1])
            steps.append(step)
        queue.extendleft(reversed(kept))
        return steps

    # What happens to devices.

    def _happen(self, event: Event) -> None:
        names = [device.name for device in self.cluster.devices]
        if event.device not in names:
            return
        where = [at for at, stage in enumerate(self.stages) if stage.device == event.device]
        if event.kind == "slow":
            hot = slowed(self.start.device(event.device), event.factor)
            devices = tuple(hot if d.name == hot.name else d for d in self.cluster.devices)
            self.cluster = replace(self.cluster, devices=devices)
            for at in where:
                stage = self.stages[at]
                self.costs[at] = StageCost(self.model, hot, stage.first, stage.last)
            return
        devices = tuple(d for d in self.cluster.devices if d.name != event.device)
        links = {ends: link for ends, link in self.cluster.links.items() if event.device not in ends}
        if not devices or (where and self.rules.replan is None):
            raise ValueError(f"{event.device} dies, and there is nobody to take over")
        self.cluster = Cluster(devices, links, self.cluster.head)
        for at in where:
            self.dead[at] = self.now
            if at + 1 < len(self.queues):  # what it had not finished never leaves it
                late = self.now + self.latency[at + 1]
                kept = deque(step for step in self.queues[at + 1] if step[0] <= late)
                self.queues[at + 1], self.chunks[at + 1] = kept, sum(step[2] > 1 for step in kept)
            self._at(self.now + self.rules.recover_s, self._recover, self.epoch)

    def _recover(self, epoch: int) -> None:
        """The survivors' plan, unless another death has brought it; everything known is sent again."""
        if epoch != self.epoch:
            return
        assert self.rules.replan is not None, "checked when the device died"
        self._assign(self.rules.replan(self.cluster))
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
        """Moves the boundary layer that helps most, if any does; its state travels first."""
        self._at(self.now + self.rules.steal_every_s, self._balance)
        if self.moving or self.dead:
            return
        seconds = [cost_of.rows[1] for cost_of in self.costs]
        copies = spare_copies(self.model, self.cluster, self.workload, self.stages, seconds)
        best: tuple[float, int, int, int] | None = None
        for taker, units in enumerate(copies):
            stage = self.stages[taker]
            for giver, unit in ((taker - 1, stage.first - 1), (taker + 1, stage.last)):
                if unit not in units or seconds[giver] <= seconds[taker]:
                    continue
                other = self.stages[giver]
                rest = replace(other, last=unit) if giver < taker else replace(other, first=unit + 1)
                more = replace(stage, first=unit) if giver < taker else replace(stage, last=unit + 1)
                slower = max(self._alone_seconds(rest), self._alone_seconds(more))
                gain = 1 - slower / seconds[giver]
                if gain >= self.rules.steal_gain and (best is None or gain > best[0]):
                    best = (gain, giver, taker, unit)
        if best is None:
            return
        _, giver, taker, unit = best
        link = self.cluster.link(self.stages[giver].device, self.stages[taker].device)
        positions = sum(session.acked for session in self.sessions if session is not None)
        size = positions * self.model.units[unit].kv_bytes_per_token
        if link is not None:
            self.moving = True
            self._at(self.now + cost.hop_seconds(link, size), self._steal, giver, taker, unit, self.epoch)

    def _alone_seconds(self, stage: Stage) -> float:
        cost_of = StageCost(self.model, self.cluster.device(stage.device), stage.first, stage.last)
        return cost_of.rows[1]

    def _steal(self, giver: int, taker: int, unit: int, epoch: int) -> None:
        """The layer's state is there: a new epoch, steps in flight are sent again."""
        self.moving = False
        if epoch != self.epoch or self.dead:
            return
        stages = list(self.stages)
        if giver < taker:
            stages[giver] = replace(stages[giver], last=unit)
            stages[taker] = replace(stages[taker], first=unit)
        else:
            stages[giver] = replace(stages[giver], first=unit + 1)
            stages[taker] = replace(stages[taker], last=unit + 1)
        self._assign(stages)
        self.outcome.steals += 1
        self._resend(replay=False)


def spare_copies(
    model: Model, cluster: Cluster, workload: Workload, stages: Sequence[Stage], seconds: Sequence[float]
) -> tuple[tuple[int, ...], ...]:
    """Per stage, the units of its neighbours that its spare RAM can hold beside its own, with their state,
    ascending. `seconds`: what each stage takes.

    Layers only, from the boundary inwards, at most half of a neighbour's (beyond, that one would be the idle
    one); from the slower neighbour first, in turn. An end of the model stays where it is.
    """
    copies = []
    for at, stage in enumerate(stages):
        device = cluster.device(stage.device)
        sides = [
            (-seconds[other], _boundary(model, stages[other], before=other < at))
            for other in (at - 1, at + 1)
            if 0 <= other < len(stages)
        ]
        lines = [list(line) for _, line in sorted(sides)]
        first, last, taken = stage.first, stage.last, []
        while any(lines):
            for line in lines:
                if not line:
                    continue
                unit = line.pop(0)
                low, high = min(first, unit), max(last, unit + 1)
                if cost.range_ram_bytes(model, device, workload, low, high) > device.ram_bytes:
                    line.clear()
                    continue
                first, last = low, high
                taken.append(unit)
        copies.append(tuple(sorted(taken)))
    return tuple(copies)


def _boundary(model: Model, stage: Stage, *, before: bool) -> list[int]:
    """The layers of a neighbour that lie nearest, nearest first; `before`: it is the one before."""
    layers = list(range(max(stage.first, 1), min(stage.last, len(model.units) - 1)))
    nearest = layers[::-1] if before else layers
    return nearest[: len(layers) // 2]
