"""One run: a coordinator over nodes that listen, streams that decode without an end, and what is done to the
devices meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import trio
from bench.chain_worker import prompt_of

from shoal import planner
from shoal.cluster_view import coordinator_identity
from shoal.engine.batch import Sampling
from shoal.engine.model_directory import Model
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.members import Moves
from shoal.net.moves import Move
from shoal.net.placement import Links, NodeInfo, Placement, Planner, Rebalancer
from shoal.net.survey import Survey, survey
from shoal.network_planner import NetworkPlanner
from shoal.network_rebalancer import NetworkRebalancer

from . import figures

PROMPT = 16
_LOOK_SECONDS = 0.02


@dataclass(slots=True)
class Trace:
    """What came of a run. `start` is when every stream had its first token; `marks` are later times by name.
    `chains` are the placements, each with the time since when it was in force, `moves` what the coordinator
    noted of its changes, and `said` its log."""

    prompts: list[list[int]]
    times: list[list[float]]
    tokens: list[list[int]]
    start: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)
    chains: list[tuple[float, list[list[Any]]]] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)
    said: list[tuple[float, str]] = field(default_factory=list)

    def speed(self, after: str, before: str, skip: float = 0.0) -> float:
        """Tokens/s from `skip` seconds after a mark to another."""
        return figures.speed(self.times, self.marks[after] + skip, self.marks[before])

    def depth(self, at: float) -> int:
        """The positions of the first stream at a time."""
        return len(self.prompts[0]) + sum(time <= at for time in self.times[0])

    def until(self, at: float) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts of a run that goes on with what the streams had at a time, and these answers."""
        have = [sum(time <= at for time in own) for own in self.times]
        answers = [own[:n] for own, n in zip(self.tokens, have, strict=True)]
        return [[*p, *own] for p, own in zip(self.prompts, answers, strict=True)], answers

    def changes(self, after: str, before: str) -> int:
        """How often the placement changed between two marks."""
        return sum(self.marks[after] < at <= self.marks[before] for at, _ in self.chains[1:])


@dataclass(slots=True)
class Playing:
    """A run under way, for what happens in it."""

    coordinator: Coordinator
    trace: Trace

    def mark(self, name: str) -> float:
        """Gives this moment a name."""
        self.trace.marks[name] = now = trio.current_time()
        return now

    async def tokens(self, count: int) -> None:
        """Waits until each stream has so many more tokens."""
        wanted = [len(own) + count for own in self.trace.times]
        while any(len(own) < least for own, least in zip(self.trace.times, wanted, strict=True)):  # noqa: ASYNC110
            await trio.sleep(_LOOK_SECONDS)

    async def until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Waits until something holds, at most so many seconds; whether it does."""
        with trio.move_on_after(seconds):
            while not ready():  # noqa: ASYNC110  there is no event for it
                await trio.sleep(_LOOK_SECONDS)
        return ready()


Act = Callable[[Playing], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Cast:
    """A model and the nodes that run it."""

    model: Model
    addresses: Sequence[tuple[str, int]]
    context: int

    def prompts(self, count: int, length: int = PROMPT) -> list[list[int]]:
        """Random token ids, the same each time."""
        return [prompt_of(self.model, seed, length) for seed in range(count)]

    def plans(self, streams: int) -> NetworkPlanner:
        """The planner of `shoal run` for so many streams."""
        workload = planner.Workload(self.context, sequences=streams, streams=streams, prompt_tokens=PROMPT)
        return NetworkPlanner(self.model, workload, "latency" if streams == 1 else "throughput")

    def fresh(
        self, chain: Sequence[planner.Assignment], streams: int, device: str, times: float
    ) -> tuple[Sequence[planner.Assignment], float]:
        """The stages of a plan for a device that takes so many times as long, and how many times as fast as
        with the stages of `chain` it should be."""
        found, plans = self._survey(), self.plans(streams)
        slow = [replace(node, slower=times if node.label == device else 1.0) for node in found.nodes]
        plan = plans(slow, found.links)
        before = plans.placement(slow, found.links, chain, plan)
        return plan.stages, plan.tokens_per_s / before.tokens_per_s

    def chain(self, streams: int) -> Sequence[planner.Assignment]:
        """The stages of a plan for so many streams, by what nodes and links are measured to be now."""
        found = self._survey()
        return self.plans(streams)(found.nodes, found.links).stages

    def _survey(self) -> Survey:
        who, shape = coordinator_identity(self.model, insecure=True), shape_of(self.model)
        return trio.run(partial(survey, self.addresses, who, shape))

    async def play(
        self, plan: Planner, options: CoordinatorOptions, prompts: Sequence[list[int]], act: Act
    ) -> Trace:
        """Runs a stream for each prompt while `act` lasts, and ends them then."""
        trace = Trace([list(p) for p in prompts], [[] for _ in prompts], [[] for _ in prompts])
        who, shape = coordinator_identity(self.model, insecure=True), shape_of(self.model)
        options = replace(options, log=lambda line: trace.said.append((trio.current_time(), line)))
        async with Coordinator.open(self.addresses, who, shape, plan, options) as coordinator:

            async def stream(i: int) -> None:
                async with coordinator.generate(
                    prompts[i], Sampling(), max_tokens=self.context - len(prompts[i]), context=self.context
                ) as answer:
                    async for token in answer:
                        trace.times[i].append(trio.current_time())
                        trace.tokens[i].append(token)
                raise RuntimeError(f"a stream has filled its context of {self.context}: give a longer one")

            async with trio.open_nursery() as tasks:
                tasks.start_soon(_follow, coordinator, trace)
                for i in range(len(prompts)):
                    tasks.start_soon(stream, i)
                playing = Playing(coordinator, trace)
                await playing.tokens(1)
                trace.start = playing.mark("start")
                await act(playing)
                playing.mark("end")
                tasks.cancel_scope.cancel()
            trace.moves = [_record(move) for move in coordinator.moves]
        return trace


class Given:
    """A planner that begins with these stages, and plans as another one when a node is lost or comes back: so
    all runs of a scene begin with the same placement."""

    def __init__(self, plans: NetworkPlanner, stages: Sequence[planner.Assignment]) -> None:
        self._plans, self._stages = plans, stages

    def __call__(self, nodes: Sequence[NodeInfo], links: Links) -> Placement:
        planned = self._plans(nodes, links)
        stages, self._stages = self._stages, ()
        return self._plans.placement(nodes, links, stages, planned) if stages else planned


class CopiesOnly(NetworkRebalancer):
    """Has nodes hold copies of weights, and proposes no change."""

    def look(self, *_: object) -> None:
        """Nothing."""


def options_of(mode: Moves, rebalancer: Rebalancer | None) -> CoordinatorOptions:
    """The options of a coordinator that moves layers as `shoal run --moves MODE` does. Every prompt is
    computed, also one that was asked before."""
    rebalancer = None if mode == "off" else rebalancer
    return CoordinatorOptions(moves=mode, rebalancer=rebalancer, share_prefixes=False)


def _record(move: Move) -> dict[str, Any]:
    """A move, for a file of results."""
    return {"line": move.line(), "before": move.before, "after": move.after, **asdict(move.moved)}


async def _follow(coordinator: Coordinator, trace: Trace) -> None:
    while True:
        stages = [[stage.device, stage.first, stage.last] for stage in coordinator.placement.stages]
        if not trace.chains or trace.chains[-1][1] != stages:
            trace.chains.append((trio.current_time(), stages))
        await trio.sleep(_LOOK_SECONDS)
