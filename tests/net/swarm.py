"""A chain whose devices change their speed, as a flow of tokens, to test the rebalancer with. Nothing waits
for a clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from shoal import planner
from shoal.net import rebalance
from shoal.net.pace import slowed
from shoal.net.placement import Outcome, Proposal, Usage
from shoal.net.rebalance import Memory, View
from shoal.planner import Assignment, Cluster, Device, LinkSpeed, ModelCosts, Question, Unit, Workload
from shoal.planner.evaluation import token_seconds
from shoal.planner.streams import Follower

LAYER = Unit("layer", 3_600_000, 3_600_000, 3_540_000, 1536, 0, 2304, 1_000_000, 1152)
TABLE = Unit("embedding", 29_000_000, 576, 0, 0, 0, 2304, 1_000_000)
HEAD = Unit("head", 29_000_000, 29_000_000, 28_000_000, 0, 0, 4, 1_000_000)
MODEL = ModelCosts((TABLE, *[LAYER] * 30, HEAD), 28_000_000, 64)
ROOM = 150_000_000
PHONES = (0.8, 0.5, 0.2, 0.2), tuple(70_000_000 + layers * 6_750_000 for layers in (16, 12, 8, 8))
"""Speeds, and RAM for a table and so many layers with the state of four sequences."""
EVERY = 0.5
MOVING_SECONDS, STANDSTILL = 0.3, 0.1

Factors = Callable[[float], Mapping[str, float]]
"""By how much each device is slower than offered at a time; 1 for those that are not named."""


def question(
    streams: int,
    speeds: Sequence[float] = (0.5, 0.4, 0.4, 0.4),
    rooms: Sequence[int] = (ROOM,) * 8,
    latency: float = 0.004,
) -> Question:
    """Devices a, b, c … of those speeds and RAM caps."""
    devices = tuple(
        Device(
            name,
            room,
            20e9 * s,
            40e9 * s,
            40_000_000,
            2e-4 / s,
            2e-4 / s,
            ((1, 10e9 * s), (4, 25e9 * s), (8, 35e9 * s)),
        )
        for name, s, room in zip("abcdefgh", speeds, rooms, strict=False)
    )
    names = ["head", *(device.name for device in devices)]
    links = {ends: LinkSpeed(latency, 1e7) for ends in permutations(names, 2)}
    load = Workload(512, sequences=max(streams, 4), streams=streams, depth=200)
    return Question(MODEL, Cluster(devices, links, "head"), load, "latency" if streams == 1 else "throughput")


def slower(asked: Question, factors: Mapping[str, float]) -> Question:
    """The question with devices that are slower."""
    devices = tuple(slowed(d, factors.get(d.name, 1.0)) for d in asked.cluster.devices)
    return replace(asked, cluster=replace(asked.cluster, devices=devices))


def fresh(asked: Question, factors: Mapping[str, float] | None = None) -> planner.Plan:
    """A new plan for devices that are slower."""
    found = planner.plan(slower(asked, factors or {}), method="dp", explain=False)
    assert isinstance(found, planner.Plan)
    return found


@dataclass
class Swarm:
    """Answers that flow through a chain, with a rebalancer or without. `factors`: the devices' real speeds;
    the measured ones follow within a second, with `noise` as a share. `wrong`: how many times as long as the
    model says tokens take with some stages."""

    asked: Question
    factors: Factors = lambda now: {}
    noise: float = 0.0
    seed: int = 0
    moves: bool = True
    remaining: float = 1e6
    wrong: Callable[[Sequence[Assignment]], float] = lambda stages: 1.0
    copies: Mapping[str, frozenset[int]] = field(default_factory=dict)
    waiting: Mapping[str, float] = field(default_factory=dict)
    aborts: bool = False
    stages: tuple[Assignment, ...] = ()
    now: float = 0.0
    tokens: float = 0.0
    memory: Memory = field(default_factory=Memory)
    changes: list[tuple[float, Proposal]] = field(default_factory=list)
    verdicts: list[tuple[float, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = self.stages or fresh(self.asked, self.factors(0.0)).assignments
        self._rates: dict[object, float] = {}
        self._measured: dict[str, float] = {}
        self._random = random.Random(self.seed)

    def rate(self, stages: Sequence[Assignment] | None = None) -> float:
        """Tokens/s now."""
        stages, factors = self.stages if stages is None else tuple(stages), self.factors(self.now)
        key = (stages, *sorted(factors.items()))
        if key not in self._rates:
            real = slower(self.asked, factors)
            seconds = token_seconds(real, stages, Follower(real)) * self.wrong(stages)
            self._rates[key] = 1 / seconds
        return self._rates[key]

    def run(self, seconds: float) -> float:
        """Lets time pass; returns the tokens."""
        before, end = self.tokens, self.now + seconds
        while self.now < end - 1e-9:
            self._flow(EVERY)
            if self.moves:
                self._look()
        return self.tokens - before

    def _flow(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            self.tokens += 0.1 * self.rate()
            self.now += 0.1

    def _look(self) -> None:
        real = self.factors(self.now)
        for device in self.asked.cluster.devices:
            name = device.name
            was, now = self._measured.get(name, 1.0), real.get(name, 1.0)
            if any(stage.device == name for stage in self.stages):
                self._measured[name] = now + (was - now) * math.exp(-EVERY / 0.35)
        told = {n: f * (1 + self.noise * self._random.uniform(-1, 1)) for n, f in self._measured.items()}
        streams = self.asked.workload.streams
        usage = Usage(
            streams, 200, self.remaining, int(self.tokens), waiting=self.waiting, copies=self.copies
        )
        self.memory, proposal = rebalance.look(
            self.memory, View(self.asked, told, self.stages, usage, self.now)
        )
        if self.memory.verdict is not None:
            self.verdicts.append((self.now, self.memory.verdict))
        if proposal is not None:
            self.changes.append((self.now, proposal))
            self._flow(MOVING_SECONDS)
            if self.aborts:
                self.memory = rebalance.happened(self.memory, Outcome(False, MOVING_SECONDS))
                return
            self.now += STANDSTILL
            self.stages = proposal.placement.stages
            outcome = Outcome(True, MOVING_SECONDS + STANDSTILL, STANDSTILL)
            self.memory = rebalance.happened(self.memory, outcome)
