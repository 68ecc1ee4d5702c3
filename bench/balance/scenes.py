"""What happens to the devices in a run, and the figures of it. Each scene is played with and without moves
in turns, on the same nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import trio
from bench.chain import streamed
from bench.lab.lab import Lab
from bench.lab.others import Others, Processes
from bench.lab.runs import DISTURBED
from bench.rounds import Samples

from shoal import planner
from shoal.engine.model_directory import Model
from shoal.net.members import Moves
from shoal.net.placement import Planner, Rebalancer
from shoal.network_planner import NetworkPlanner
from shoal.network_rebalancer import NetworkRebalancer

from . import figures
from .audit import Audit
from .play import Act, Cast, Given, Playing, Trace, options_of

SLOWER = 2.5
"""A step of a device that is hot takes so many times as long: 40 % of its speed."""
QUICK_SECONDS = 5.0
"""So long after a device has changed, layers should have moved."""
SHARE = 0.92
"""Of the speed of a fresh plan."""
WINDOW_SECONDS = 2.0


@dataclass(slots=True)
class Theatre:
    """What is kept of all runs."""

    model: Model
    samples: Samples
    audit: Audit
    cast: Cast = field(init=False)
    nodes: Processes = field(init=False)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def play(
        self,
        name: str,
        mode: Moves,
        prompts: Sequence[list[int]],
        act: Act,
        stages: Sequence[planner.Assignment] = (),
        before: Sequence[Sequence[int]] = (),
        plan: Planner | None = None,
        rebalancer: Callable[[NetworkPlanner], Rebalancer] = NetworkRebalancer,
    ) -> Trace:
        """One run, which begins with these stages, if any are given, else with those of a plan. `before`: the
        answers with which the prompts end, for a run that goes on with them. `plan`: another planner, whose
        placements nobody changes."""
        plans, others = self.cast.plans(len(prompts)), Others(self.nodes)
        options = options_of(mode, None if plan else rebalancer(plans))
        trace = trio.run(self.cast.play, plan or Given(plans, stages), options, prompts, act)
        earlier = before or [()] * len(prompts)
        answers = [[*a, *b] for a, b in zip(earlier, trace.tokens, strict=True)]
        self.audit.add(name, len(prompts[0]) - len(earlier[0]), answers)
        cores = others.cores()
        kept = {name: getattr(trace, name) for name in ("marks", "chains", "moves", "said", "times")}
        self.runs.append({"run": name, "others": cores, **kept})
        told = " -> ".join(
            ", ".join(f"{device} {last - first}" for device, first, last in stages)
            for _, stages in trace.chains
        )
        crowd = f"; other programs took {cores:.1f} cores" if cores > DISTURBED else ""
        print(f"{name}: {told}{crowd}", flush=True)
        return trace


@dataclass(frozen=True, slots=True)
class Drop:
    """The device of one stage becomes slow, and after a while as quick as before. Seconds before, meanwhile
    and after."""

    lab: Lab
    chain: Sequence[planner.Assignment]
    position: int
    streams: int
    before: float = 4.0
    slow: float = 14.0
    after: float = 10.0

    @property
    def what(self) -> str:
        return f"stage {self.position} of {len(self.chain)} at {1 / SLOWER:.0%}, {streamed(self.streams)}"

    @property
    def device(self) -> str:
        return self.chain[self.position - 1].device

    def play(self, theatre: Theatre, mode: Moves, number: int) -> Trace:
        """A run in one mode, and its figures."""

        async def act(playing: Playing) -> None:
            await trio.sleep(self.before)
            playing.mark("drop")
            self.lab.node(self.device).slow(SLOWER)
            await trio.sleep(self.slow)
            playing.mark("back")
            self.lab.node(self.device).slow(1)
            await trio.sleep(self.after)

        try:
            trace = theatre.play(
                f"{self.what}, {mode}, round {number + 1}",
                mode,
                theatre.cast.prompts(self.streams),
                act,
                self.chain,
            )
        finally:
            self.lab.node(self.device).slow(1)
        drop, back = trace.marks["drop"], trace.marks["back"]
        rows = {
            "tokens/s before": trace.speed("start", "drop", 1.0),
            "tokens/s while slow": trace.speed("drop", "back"),
            f"tokens/s while slow, from {QUICK_SECONDS:g} s on": trace.speed("drop", "back", QUICK_SECONDS),
            f"tokens/s as quick as before, from {QUICK_SECONDS:g} s on": trace.speed(
                "back", "end", QUICK_SECONDS
            ),
            "longest time without a token while slow, s": figures.longest_gap(trace.times, drop, back),
            "changes of the placement while slow": trace.changes("drop", "back"),
            "changes of the placement afterwards": trace.changes("back", "end"),
        }
        for figure, value in rows.items():
            theatre.samples.add(f"{self.what}: {figure}", mode, number, value)
        return trace

    def fresh(self, theatre: Theatre, mode: Moves, number: int, other: Trace) -> None:
        """The speed of a plan that was made for the slow device, from a cold start, at the depth that the
        streams of the other run had by then; and how long that one needed to be near it."""
        prompts, answers = other.until(other.marks["drop"] + QUICK_SECONDS)

        async def act(playing: Playing) -> None:
            await trio.sleep(1.0)
            playing.mark("warm")
            await trio.sleep(self.slow - QUICK_SECONDS)

        stages, gain = theatre.cast.fresh(self.chain, self.streams, self.device, SLOWER)
        self.lab.node(self.device).slow(SLOWER)
        try:
            trace = theatre.play(
                f"{self.what}, fresh plan, round {number + 1}", "off", prompts, act, stages, answers
            )
        finally:
            self.lab.node(self.device).slow(1)
        fresh = trace.speed("warm", "end")
        figure = f"{self.what}: tokens/s while slow, from {QUICK_SECONDS:g} s on"
        theatre.samples.add(figure, "fresh plan", number, fresh)
        theatre.samples.add(f"{self.what}: gain of a fresh plan, predicted", "planner", number, gain)
        drop, back = other.marks["drop"], other.marks["back"]
        theatre.samples.add(
            f"{self.what}: tokens lost in the first {QUICK_SECONDS:g} s, by the fresh plan's speed",
            mode, number, figures.lost(other.times, drop, drop + QUICK_SECONDS, fresh),
        )  # fmt: skip
        took = figures.settled(other.times, drop, back, SHARE * fresh, WINDOW_SECONDS)
        theatre.samples.add(
            f"{self.what}: s until {SHARE:g} of the fresh plan's speed",
            mode, number, self.slow if took is None else took,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Steady:
    """Nothing happens."""

    chain: Sequence[planner.Assignment]
    streams: int
    seconds: float

    def play(self, theatre: Theatre, mode: Moves, number: int) -> None:
        async def act(playing: Playing) -> None:
            await trio.sleep(1.0)
            playing.mark("warm")
            before = time.process_time()  # of the coordinator, which this process is
            await trio.sleep(self.seconds)
            spent.append(time.process_time() - before)

        spent: list[float] = []
        what = f"steady, {streamed(self.streams)}"
        trace = theatre.play(
            f"{what}, {mode}, round {number + 1}", mode, theatre.cast.prompts(self.streams), act, self.chain
        )
        tokens = figures.count(trace.times, trace.marks["warm"], trace.marks["end"])
        theatre.samples.add(f"{what}: tokens/s", mode, number, trace.speed("warm", "end"))
        theatre.samples.add(
            f"{what}: coordinator, CPU ms a token", mode, number, spent[0] / max(tokens, 1) * 1e3
        )
        theatre.samples.add(f"{what}: changes of the placement", mode, number, trace.changes("start", "end"))


@dataclass(frozen=True, slots=True)
class Swing:
    """The device of one stage is slow and quick in turns, each for so many seconds."""

    lab: Lab
    chain: Sequence[planner.Assignment]
    position: int
    streams: int
    seconds: float = 10.0
    swings: int = 4

    @property
    def what(self) -> str:
        where = f"stage {self.position} of {len(self.chain)}"
        return f"{where} swings every {self.seconds:g} s, {streamed(self.streams)}"

    def play(self, theatre: Theatre, mode: Moves, number: int) -> Trace:
        async def act(playing: Playing) -> None:
            for i in range(self.swings):
                playing.mark(f"swing {i}")
                self.lab.node(device).slow(1 if i % 2 else SLOWER)
                await trio.sleep(self.seconds)

        device, what = self.chain[self.position - 1].device, self.what
        try:
            trace = theatre.play(
                f"{what}, {mode}, round {number + 1}",
                mode,
                theatre.cast.prompts(self.streams),
                act,
                self.chain,
            )
        finally:
            self.lab.node(device).slow(1)
        marks = [*(f"swing {i}" for i in range(self.swings)), "end"]
        for i, (a, b) in enumerate(pairwise(marks)):
            state = "quick" if i % 2 else "slow"
            theatre.samples.add(f"{what}: tokens/s, swing {i + 1}, {state}", mode, number, trace.speed(a, b))
        theatre.samples.add(f"{what}: tokens/s", mode, number, trace.speed("swing 0", "end"))
        most = max(trace.changes(a, b) for a, b in pairwise(marks))
        theatre.samples.add(f"{what}: most changes of the placement in a swing", mode, number, most)
        return trace

    def alike(self, theatre: Theatre, number: int, other: Trace) -> None:
        """The speed of the chain that never changes in each quick swing of another run, at the same depth:
        the streams of a run with moves are deeper by then, and so each of their tokens takes longer."""

        async def act(playing: Playing) -> None:
            playing.mark("quick")
            await trio.sleep(self.seconds)

        for i in range(1, self.swings, 2):
            prompts, answers = other.until(other.marks[f"swing {i}"])
            name = f"{self.what}, swing {i + 1} at the same depth, round {number + 1}"
            trace = theatre.play(name, "off", prompts, act, self.chain, answers)
            figure = f"{self.what}: tokens/s, swing {i + 1}, quick"
            theatre.samples.add(figure, "off, as deep", number, trace.speed("quick", "end"))
