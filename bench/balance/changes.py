"""Scenes in which layers are moved by hand, and nodes end and begin."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from bench.chain import streamed
from bench.lab.lab import Lab

from shoal import planner
from shoal.cluster_view import cluster_of
from shoal.engine.layout import CHUNK
from shoal.engine.stage import StageOptions
from shoal.net.members import Moves
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.network_planner import placement_of
from shoal.planning import planner_model

from . import figures
from .company import Company
from .play import Cast, CopiesOnly, Playing
from .scenes import Theatre

_MOST_SECONDS = 20.0
"""For a change of the placement that must come."""
_SOME = 20
"""Tokens of each stream between two events."""
_AHEAD_SECONDS = 0.1
"""How long a prompt has been read when a layer begins to move."""


def shifted(
    stages: Sequence[planner.Assignment], boundary: int, units: int
) -> tuple[planner.Assignment, ...]:
    """The stages with so many units more before a boundary: 0 is that between the first two. ValueError: a
    stage would have none."""
    edges = [stages[0].first, *(stage.last for stage in stages)]
    edges[boundary + 1] += units
    if sorted(set(edges)) != edges:
        raise ValueError(f"{units} units cannot move over the boundary {boundary} of {stages}")
    return tuple(
        planner.Assignment(stage.device, first, last)
        for stage, first, last in zip(stages, edges, edges[1:], strict=False)
    )


@dataclass(frozen=True, slots=True)
class Even:
    """A planner that gives all nodes parts with equally many layers, whatever their speed."""

    cast: Cast
    streams: int

    def __call__(self, nodes: Sequence[NodeInfo], links: Links) -> Placement:
        units = self.cast.model.n_units
        edges = [units * i // len(nodes) for i in range(len(nodes) + 1)]
        stages = [
            planner.Assignment(node.label, first, last)
            for node, first, last in zip(nodes, edges, edges[1:], strict=False)
        ]
        load = planner.Workload(self.cast.context, sequences=self.streams, streams=self.streams)
        rows = planner_model(self.cast.model, StageOptions())
        return placement_of(planner.Question(rows, cluster_of(nodes, links), load), stages)


@dataclass(frozen=True, slots=True)
class Standstill:
    """Layers move over one boundary and back, each time by hand, while streams decode. `beside`: the tokens
    of a prompt that is read meanwhile; 0: there is none."""

    lab: Lab
    chain: Sequence[planner.Assignment]
    streams: int
    units: int
    moves: int
    beside: int

    @property
    def what(self) -> str:
        beside = f", a prompt of {self.beside} tokens is read" if self.beside else ""
        moved = "a layer moves" if self.units == 1 else f"{self.units} layers move"
        return f"{moved}, {streamed(self.streams)}{beside}"

    def play(self, theatre: Theatre, mode: Moves, number: int) -> None:
        moved: list[_Carried] = []
        quiet: list[tuple[float, float]] = []

        async def act(playing: Playing) -> None:
            await playing.tokens(_SOME)
            for i in range(-1, self.moves):
                async with trio.open_nursery() as tasks:
                    if self.beside:
                        tasks.start_soon(_read, theatre.cast, playing, self.beside)
                        await trio.sleep(_AHEAD_SECONDS)
                    start = trio.current_time()
                    if i < 0:  # what a gap is when nothing moves
                        await playing.tokens(_SOME)
                        quiet.append((start, trio.current_time()))
                    else:
                        units = -self.units if i % 2 else self.units
                        moved.append(await self._move(theatre, playing, units))
                await playing.tokens(_SOME)
                if not self.beside:
                    quiet.append((trio.current_time() - _AHEAD_SECONDS, trio.current_time()))

        name = f"{self.what}, {mode}, round {number + 1}"
        prompts = theatre.cast.prompts(self.streams)
        trace = theatre.play(name, mode, prompts, act, self.chain, rebalancer=CopiesOnly)
        usual = [figures.usual_gap(own, quiet) for own in trace.times]
        gaps = [
            figures.gap(own, one.start, one.end) / gap
            for one in moved
            for own, gap in zip(trace.times, usual, strict=True)
        ]
        still = [figures.longest_gap(trace.times, one.start, one.end) for one in moved]
        rows = {
            "a token gap, ms": statistics.median(usual) * 1e3,
            "standstill, token gaps, p50": statistics.median(gaps),
            "standstill, token gaps, worst": max(gaps),
            "standstill, s, p50": statistics.median(still),
            "a move, s, p50": statistics.median(one.seconds for one in moved),
        }
        if not self.beside:
            rows["bytes sent, of the keys and values of the layers"] = statistics.median(
                one.sent / one.held for one in moved
            )
        for figure, value in rows.items():
            theatre.samples.add(f"{self.what}: {figure}", mode, number, value)

    async def _move(self, theatre: Theatre, playing: Playing, units: int) -> _Carried:
        """Moves the units over the first boundary, and waits until they have moved."""
        coordinator, rows = playing.coordinator, planner_model(theatre.cast.model, StageOptions()).units
        before = coordinator.placement.stages
        stages = shifted(before, 0, units)
        edges = sorted((before[0].last, stages[0].last))
        bytes_of_token = sum(unit.kv_bytes_per_token for unit in rows[edges[0] : edges[1]])
        sent, start = self.lab.sent()["bulk"], trio.current_time()
        coordinator.move(stages, "it is asked for")
        if not await playing.until(lambda: coordinator.placement.stages == stages, _MOST_SECONDS):
            said = [move.line() for move in coordinator.moves][-1:]
            raise RuntimeError(f"no move within {_MOST_SECONDS:g} s: {said}")
        end = trio.current_time()
        chunks = sum(
            -(-(len(p) + len(own)) // CHUNK)
            for p, own in zip(playing.trace.prompts, playing.trace.times, strict=True)
        )
        await playing.tokens(2)
        sent = self.lab.sent()["bulk"] - sent
        return _Carried(start, trio.current_time(), end - start, chunks * CHUNK * bytes_of_token, sent)


@dataclass(frozen=True, slots=True)
class _Carried:
    """A move: when it was asked for, and when each stream had tokens after it; the seconds until it was over;
    the bytes of the keys and values of its layers, in whole chunks of positions, and those that were sent
    over links for them."""

    start: float
    end: float
    seconds: float
    held: int
    sent: int


async def _read(cast: Cast, playing: Playing, length: int) -> None:
    """Reads a prompt of so many tokens, as far as its first token."""
    prompt = cast.prompts(1, length)[0]
    async with playing.coordinator.generate(prompt, max_tokens=1, context=length + 1) as answer:
        async for _ in answer:
            pass


@dataclass(frozen=True, slots=True)
class Loss:
    """One of the nodes, which all hold as many layers, is killed. `tokens` is the length of the prompts."""

    company: Company
    victim: int
    streams: int
    tokens: int

    def play(self, theatre: Theatre, mode: Moves, number: int) -> None:
        self.company.all_running()
        victim = self.company.members[self.victim]

        async def act(playing: Playing) -> None:
            await playing.tokens(_SOME)
            playing.mark("kill")
            await self.company.apart(victim.kill)
            names = {member.spec.name for member in self.company.members} - {victim.spec.name}
            there = await playing.until(
                lambda: {stage.device for stage in playing.coordinator.placement.stages} == names,
                _MOST_SECONDS,
            )
            if not there:
                raise RuntimeError(f"nobody took the layers over within {_MOST_SECONDS:g} s")
            await playing.tokens(_SOME)
            reports = await playing.coordinator.stats()
            loading.append(max(report.load_seconds for report in reports))

        loading: list[float] = []
        where = f"node {self.victim + 1} of {len(self.company.members)} is killed"
        what = f"{where}, {streamed(self.streams)} of {self.tokens} tokens"
        prompts = theatre.cast.prompts(self.streams, self.tokens)
        trace = theatre.play(
            f"{what}, {mode}, round {number + 1}", mode, prompts, act, plan=Even(theatre.cast, self.streams)
        )
        still = figures.longest_gap(trace.times, trace.marks["kill"], trace.marks["end"])
        theatre.samples.add(f"{what}: next token after, s", mode, number, still)
        theatre.samples.add(f"{what}: loading, s", mode, number, loading[0])


@dataclass(frozen=True, slots=True)
class Join:
    """A node that the coordinator knows by its address only is started while the others answer; it is killed
    when it has layers, and started once more."""

    company: Company
    streams: int
    rest: float = 5.0

    def play(self, theatre: Theatre, mode: Moves, number: int) -> None:
        newcomer = self.company.members[-1]
        self.company.all_running()
        newcomer.kill()

        async def act(playing: Playing) -> None:
            await trio.sleep(1.0)
            playing.mark("alone")
            await trio.sleep(self.rest)
            for name in ("new", "back"):
                playing.mark(f"{name} started")
                await self.company.apart(newcomer.start)
                playing.mark(f"{name} listens")
                await self._until(playing, holds=True)
                playing.mark(f"{name} holds layers")
                await trio.sleep(self.rest)
                playing.mark(f"{name} rested")
                await self.company.apart(newcomer.kill)
                await self._until(playing, holds=False)
                await playing.tokens(_SOME)

        what = f"a node joins, {streamed(self.streams)}"
        trace = theatre.play(
            f"{what}, {mode}, round {number + 1}", mode, theatre.cast.prompts(self.streams), act
        )
        at = trace.marks
        rows = {"tokens/s without it": trace.speed("alone", "new started")}
        for name in ("new", "back"):
            listens, holds, rested = (at[f"{name} {what}"] for what in ("listens", "holds layers", "rested"))
            still = figures.longest_gap(trace.times, listens, rested - 1.0)  # before it is killed
            rows |= {
                f"{name}: holds layers after, s": holds - listens,
                f"{name}: longest time without a token, s": still,
                f"{name}: tokens/s with it": figures.speed(trace.times, holds + 1.0, rested),
            }
        for figure, value in rows.items():
            theatre.samples.add(f"{what}: {figure}", mode, number, value)

    async def _until(self, playing: Playing, *, holds: bool) -> None:
        name = self.company.members[-1].spec.name

        def there() -> bool:
            return (name in {stage.device for stage in playing.coordinator.placement.stages}) == holds

        if not await playing.until(there, _MOST_SECONDS):
            raise RuntimeError(f"{name} {'got no' if holds else 'kept its'} layers for {_MOST_SECONDS:g} s")


@dataclass(frozen=True, slots=True)
class Drain:
    """One of the nodes is asked to end, as by Ctrl-C."""

    company: Company
    leaver: int
    streams: int

    def play(self, theatre: Theatre, mode: Moves, number: int) -> None:
        self.company.all_running()
        leaver = self.company.members[self.leaver]

        async def act(playing: Playing) -> None:
            await playing.tokens(_SOME)
            playing.mark("quiet")
            await playing.tokens(_SOME)
            playing.mark("asked")
            leaver.ask_to_end()
            if not await playing.until(lambda: leaver.code is not None, _MOST_SECONDS):
                raise RuntimeError(f"{leaver.spec.name} did not end within {_MOST_SECONDS:g} s")
            playing.mark("ended")
            await playing.tokens(_SOME)

        where = f"node {self.leaver + 1} of {len(self.company.members)} is asked to end"
        what = f"{where}, {streamed(self.streams)}"
        prompts = theatre.cast.prompts(self.streams)
        trace = theatre.play(
            f"{what}, {mode}, round {number + 1}", mode, prompts, act, plan=Even(theatre.cast, self.streams)
        )
        at = trace.marks
        usual = [figures.usual_gap(own, [(at["quiet"], at["asked"])]) for own in trace.times]
        gaps = [
            figures.gap(own, at["asked"], at["ended"]) / gap
            for own, gap in zip(trace.times, usual, strict=True)
        ]
        code = leaver.code
        assert code is not None
        rows = {
            "exit code": float(code),
            "ends after, s": at["ended"] - at["asked"],
            "standstill, token gaps, worst": max(gaps),
        }
        for figure, value in rows.items():
            theatre.samples.add(f"{what}: {figure}", mode, number, value)
