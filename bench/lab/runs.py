"""Runs of a placement in a lab: tokens/s, what each stage took, and how far somebody else was at work.

Figures are worth nothing while other programs take cores and memory bandwidth, so each run says how many
cores they took, and `quiet` repeats what they disturbed.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import trio

from shoal import planner
from shoal.cluster_view import cluster_of, coordinator_identity
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.network_planner import placement_of
from shoal.planning import planner_model

from .lab import Lab
from .others import Others

PROMPT = 16
CHUNK_ROWS = 16
RUN_SECONDS = 4.0
FEWEST_TOKENS = 12
DISTURBED = 0.2
"""Cores that others may take during a run that counts."""
TRIES = 4


@dataclass(frozen=True, slots=True)
class Timed:
    """One run. Tokens/s of all streams together; seconds and rows of a decode call of each stage, in the
    chain's order; cores that others took meanwhile."""

    tokens_per_s: float
    call_seconds: tuple[float, ...]
    call_rows: tuple[float, ...]
    others: float

    def to_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self)


async def quiet(once: Callable[[], Awaitable[Timed]], tries: int = TRIES) -> Timed:
    """A run that nobody disturbed; after so many tries the least disturbed one."""
    runs: list[Timed] = []
    while len(runs) < tries and not any(run.others <= DISTURBED for run in runs):
        if runs:
            await trio.sleep(2.0)
        runs.append(await once())
    return min(runs, key=lambda run: run.others)


async def measure(
    lab: Lab,
    model: Model,
    stages: Sequence[planner.Assignment],
    streams: int,
    repeats: int,
    tokens: int,
    tries: int = TRIES,
) -> list[Timed]:
    """So many quiet runs of `tokens` tokens a stream, after a short one to warm up. Sequences share calls as
    the measurements of nodes and links say."""
    rows = planner_model(model, StageOptions())
    load = planner.Workload(PROMPT + tokens, sequences=streams, prompt_tokens=PROMPT, streams=streams)

    def fixed(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        question = planner.Question(rows, cluster_of(nodes, links), load)
        return replace(placement_of(question, stages), chunk_rows=CHUNK_ROWS)

    async with Coordinator.open(
        lab.addresses, coordinator_identity(model, insecure=True), shape_of(model), fixed,
        CoordinatorOptions(share_prefixes=False),  # the same prompts are computed again
    ) as coordinator:  # fmt: skip

        async def once() -> Timed:
            before, others = await coordinator.stats(), Others(lab)
            speed = await run(coordinator, model, streams, tokens)
            cores, after = others.cores(), await coordinator.stats()
            work = [(b.stats.decode, a.stats.decode) for b, a in zip(before, after, strict=True)]
            calls = [max(a.steps - b.steps, 1) for b, a in work]
            return Timed(
                speed,
                tuple((a.seconds - b.seconds) / n for (b, a), n in zip(work, calls, strict=True)),
                tuple((a.rows - b.rows) / n for (b, a), n in zip(work, calls, strict=True)),
                cores,
            )

        await run(coordinator, model, streams, FEWEST_TOKENS // 2)
        return [await quiet(once, tries) for _ in range(repeats)]


def tokens_for(predicted: float, streams: int, context: int, seconds: float = RUN_SECONDS) -> int:
    """Tokens of each stream in a run of about so many seconds, that stays within the context."""
    return min(max(FEWEST_TOKENS, int(predicted / streams * seconds)), context - PROMPT)


async def run(coordinator: Coordinator, model: Model, streams: int, tokens: int) -> float:
    """Tokens/s while all streams decode: from the last one's first token to the first one's last."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.program.vocab, (streams, PROMPT))
    times: list[list[float]] = [[] for _ in range(streams)]

    async def answer(i: int) -> None:
        prompt = [int(token) for token in prompts[i]]
        async with coordinator.generate(prompt, max_tokens=tokens, context=PROMPT + tokens) as answers:
            async for _ in answers:
                times[i].append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for i in range(streams):
            nursery.start_soon(answer, i)
    return rate(times)


def rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens/s of streams whose tokens came at these times, while all of them decode."""
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    return sum(sum(start < t <= end for t in own) for own in times) / (end - start)


def median(runs: Sequence[Timed]) -> float:
    """The median's tokens/s."""
    return statistics.median(run.tokens_per_s for run in runs)
