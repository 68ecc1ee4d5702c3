"""Measures tokens/s of a chain of nodes, for `shoal bench --nodes`: the cases of benchmark.py, predicted
beside measured, and the time of a lap split into computing, wire and waiting.

What each figure means: docs/performance.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import trio

from . import planner
from .benchmark import Case, figures, random_tokens, warm_up
from .cluster_view import cluster_of, coordinator_identity
from .engine.batch import Sampling
from .engine.errors import ContextError, ShoalError
from .engine.model_directory import Model
from .net.coordinator import DEFAULT_OPTIONS, Coordinator
from .net.identity import shape_of
from .net.messages import MOST_SESSIONS, Work
from .net.placement import StageReport
from .net.session import Session
from .network_planner import NetworkPlanner
from .planner.cost import chain_hops, hop_seconds
from .portal import Portal, open_portal

_SECOND = 1_000_000_000  # nanoseconds
_PATIENCE_S, _POLL_S = 1.0, 0.01


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage of the chain during a case: its node and units, and its calls."""

    node: str
    first: int
    last: int
    calls: int
    rows_per_call: float
    call_ns: float
    """Mean time of a call."""
    ram_bytes: int
    """Resident memory of the node's process when the stage was loaded."""


@dataclass(frozen=True, slots=True)
class ChainRow:
    """The measurement of a case over nodes: first llama-bench's fields under its names, then ours."""

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_ubatch: int
    """Most rows of a prompt in one message."""
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    test: str
    n_sequences: int
    nodes: tuple[StageRow, ...]
    """The stages, in the order of the chain."""
    predicted_ts: float | None
    """Tokens/s by the measurements of nodes and links before the case. None for a prompt behind a context,
    and if a link was not measured."""
    lap_ns: float
    """Time of one token of a sequence, or of a prompt until its first token."""
    compute_ns: float
    """Computing in a lap: one call of each stage. For a prompt: all calls of the stage that computed
    longest."""
    wire_ns: float | None
    """Sending in a lap: messages with the rows of one call on every link, by the measurements of the links.
    None if a link was not measured."""
    waiting_ns: float | None
    """The rest of a lap: waiting for other rows, for a thread to wake, for the coordinator."""
    open_ns: int
    """Time from the first dial until the chain served."""
    model_hash: str


def check_chain(cases: Sequence[Case], model: Model) -> None:
    """Checks the cases before the long work. ContextError: a case exceeds the model's context. ShoalError: it
    has more sequences than a node serves."""
    for case in cases:
        if _positions(case) > model.config.context:
            raise ContextError(
                f"{case.name} over nodes needs a context of {_positions(case)} tokens and the model's is "
                f"{model.config.context}{model.config.limit}: lower -p, -n or -d"
            )
        if case.sequences > MOST_SESSIONS:
            raise ShoalError(
                f"a node serves at most {MOST_SESSIONS} sequences: give --batch no more than that, not "
                f"{case.sequences}"
            )


def _positions(case: Case) -> int:
    """The context of a session of the case. An answer has a prompt of one token or more, and room for one
    more."""
    return case.depth + max(case.prompt + 1, case.generated, 2)


class ChainBenchmark:
    """The cases with one number of concurrent sequences, over a chain that was planned for them: for tokens/s
    of one sequence, as `shoal run` does, or of several together. `insecure` as for coordinator_identity."""

    def __init__(
        self, model: Model, cases: Sequence[Case], layers: Sequence[int], *, insecure: bool = False
    ) -> None:
        self._model, self._cases, self._insecure = model, cases, insecure
        streams = cases[0].sequences
        self._objective: planner.Objective = "latency" if streams == 1 else "throughput"
        context = max(map(_positions, cases))
        workload = planner.Workload(context, sequences=streams, streams=streams)
        self._plans = NetworkPlanner(model, workload, self._objective, layers=layers)

    @property
    def plan(self) -> planner.Plan:
        """The plan in force, once the chain is open."""
        assert self._plans.plan is not None, "an open chain was planned"
        return self._plans.plan

    def rows(self, addresses: Sequence[tuple[str, int]], repetitions: int) -> Iterator[ChainRow]:
        """Opens the chain and measures its cases in order. NetError: a node cannot be reached, or is lost.
        NoPlanError: the nodes cannot hold the model."""
        most = max(DEFAULT_OPTIONS.max_sessions, self._cases[0].sequences)
        options = replace(DEFAULT_OPTIONS, recover=False, max_sessions=most)
        identity = coordinator_identity(self._model, insecure=self._insecure)
        shape = shape_of(self._model)
        start = time.perf_counter_ns()
        with open_portal(
            partial(Coordinator.open, addresses, identity, shape, self._plans, options)
        ) as portal:
            opened = time.perf_counter_ns() - start
            for case in self._cases:
                yield self._row(portal, case, repetitions, opened)

    def _row(self, portal: Portal[Coordinator], case: Case, repetitions: int, opened: int) -> ChainRow:
        coordinator = portal.opened
        predicted = self._predicted(coordinator, case)
        samples, before, after = portal.call(lambda: time_case(coordinator, self._model, case, repetitions))
        stages = [_stage_row(b, a) for b, a in zip(before, after, strict=True)]
        lap = sum(samples) / repetitions / (1 if case.prompt else case.generated)
        if case.prompt:
            compute = max(stage.calls * stage.call_ns for stage in stages) / repetitions
        else:
            compute = sum(stage.call_ns for stage in stages)
        wire = self._wire(coordinator, max(stage.rows_per_call for stage in stages))
        return ChainRow(
            **figures(self._model, case, samples),
            n_ubatch=coordinator.placement.chunk_rows,
            nodes=tuple(stages),
            predicted_ts=predicted,
            lap_ns=lap,
            compute_ns=compute,
            wire_ns=wire,
            waiting_ns=None if wire is None else lap - compute - wire,
            open_ns=opened,
        )

    def _predicted(self, coordinator: Coordinator, case: Case) -> float | None:
        """Tokens/s of the case by the newest measurements of nodes and links."""
        if case.prompt and case.depth:
            return None
        middle = None if case.prompt else case.depth + case.generated // 2
        workload = planner.Workload(
            _positions(case),
            sequences=case.sequences,
            prompt_tokens=case.prompt or 1,
            streams=case.sequences,
            chunk_tokens=coordinator.placement.chunk_rows,
            depth=middle,
        )
        try:
            plan = self._plans.now(coordinator.nodes, coordinator.links, workload)
        except ValueError:  # a link is missing
            return None
        return case.prompt / plan.first_token_seconds if case.prompt else plan.tokens_per_s

    def _wire(self, coordinator: Coordinator, rows: float) -> float | None:
        """Nanoseconds on the wires of a lap whose messages have so many rows."""
        cluster = cluster_of(coordinator.nodes, coordinator.links)
        try:
            hops = chain_hops(self._plans.costs, cluster, coordinator.placement.stages)
        except ValueError:
            return None
        return sum(hop_seconds(link, size * rows) for link, size in hops) * _SECOND


async def time_case(
    coordinator: Coordinator, model: Model, case: Case, repetitions: int
) -> tuple[list[int], Sequence[StageReport], Sequence[StageReport]]:
    """Nanoseconds of each repetition, and the stages' work before and after all of them.

    The contexts are filled to their depth once, untimed, and the case is warmed up; each repetition starts
    from that depth: a session keeps what its next prompt shares with the last."""
    random = np.random.default_rng(0)
    sessions = [coordinator.session(Sampling(), context=_positions(case)) for _ in range(case.sequences)]
    fills = [random_tokens(model, case.depth, random) for _ in sessions]

    async def together(prompts: Sequence[list[int]], tokens: int) -> None:
        async with trio.open_nursery() as nursery:
            for session, prompt in zip(sessions, prompts, strict=True):
                nursery.start_soon(_answer, session, prompt, tokens)

    async def once(case: Case) -> int:
        more = [random_tokens(model, case.prompt or 1, random) for _ in sessions]
        prompts = [[*fill, *new] for fill, new in zip(fills, more, strict=True)]
        start = time.perf_counter_ns()
        await together(prompts, case.generated or 1)
        return time.perf_counter_ns() - start

    try:
        rows = min(map(_rows, await coordinator.stats()))
        if case.depth:
            await together(fills, 1)
        await once(warm_up(case))
        rows += case.depth * case.sequences + warm_up(case).tokens
        before = await _stats_after(coordinator, rows)
        samples = [await once(case) for _ in range(repetitions)]
        return samples, before, await _stats_after(coordinator, rows + repetitions * case.tokens)
    finally:
        for session in sessions:
            session.close()


async def _stats_after(coordinator: Coordinator, rows: int) -> Sequence[StageReport]:
    """The stages' work once each has counted so many rows: a stage counts a call when its rows are on their
    way already. A second later it is as it is."""
    reports = await coordinator.stats()
    with trio.move_on_after(_PATIENCE_S):
        while min(map(_rows, reports)) < rows:
            await trio.sleep(_POLL_S)
            reports = await coordinator.stats()
    return reports


def _rows(report: StageReport) -> int:
    return report.stats.decode.rows + report.stats.prefill.rows


async def _answer(session: Session, prompt: list[int], tokens: int) -> None:
    async with session.answer(prompt, max_tokens=tokens) as answer:
        async for _ in answer:
            pass


def _stage_row(before: StageReport, after: StageReport) -> StageRow:
    """The calls of a stage between two reports."""

    def between(field: str) -> Work:
        a, b = getattr(after.stats, field), getattr(before.stats, field)
        return Work(a.steps - b.steps, a.rows - b.rows, a.seconds - b.seconds)

    decode, prefill = between("decode"), between("prefill")
    calls = decode.steps + prefill.steps
    return StageRow(
        node=after.node,
        first=after.first,
        last=after.last,
        calls=calls,
        rows_per_call=(decode.rows + prefill.rows) / max(calls, 1),
        call_ns=(decode.seconds + prefill.seconds) * _SECOND / max(calls, 1),
        ram_bytes=after.ram_bytes,
    )
