"""Real nodes and weights: requests with a common prefix of 1,000 tokens compute it once on every stage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio
from tests.patience import LIMIT

from shoal.cluster_view import coordinator_identity
from shoal.engine.batch import Sampling
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner import Assignment
from shoal.processes import NodeSpec, RunningNode, nodes

pytestmark = pytest.mark.slow

PREFIX, REQUESTS, TAIL, TOKENS = 1000, 16, 4, 6
LIVELY = Sampling(temperature=0.8, seed=11)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model.open(smollm2)


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    ids = np.random.default_rng(3).integers(100, 40_000, PREFIX + REQUESTS * TAIL).tolist()
    return [ids[:PREFIX] + ids[PREFIX + i * TAIL :][:TAIL] for i in range(REQUESTS)]


@pytest.fixture(scope="module")
def expected(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """What one process says, which computes every prompt by itself."""
    with Stage(model, 0, model.n_units) as stage:
        return [list(generate(stage, p, LIVELY, max_tokens=TOKENS, end=())) for p in prompts[:3]]


@pytest.fixture
def three(model: Model, tmp_path: Path) -> Iterator[list[RunningNode]]:
    specs = [NodeSpec(f"node{i}", ram_mb=400, threads=1) for i in range(3)]
    with nodes(model.path, specs, tmp_path) as running:
        yield running


def equal(nodes: Sequence[NodeInfo], links: Links) -> Placement:
    """As equal as can be over whoever is there."""
    edges = [32 * i // len(nodes) for i in range(len(nodes) + 1)]
    ranges = zip(nodes, edges, edges[1:], strict=False)
    return Placement(tuple(Assignment(node.label, a, b) for node, a, b in ranges), 64)


async def ask(
    coordinator: Coordinator, prompts: Sequence[Sequence[int]], during: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """The answers to all prompts, asked at once. `during` is called at their third token."""
    answers: list[list[int]] = [[] for _ in prompts]

    async def one(i: int) -> None:
        async with coordinator.generate(prompts[i], LIVELY, max_tokens=TOKENS) as tokens:
            async for token in tokens:
                answers[i].append(token)
                if i == 0 and len(answers[i]) == 3:
                    during()

    async with trio.open_nursery() as nursery:
        for i in range(len(prompts)):
            nursery.start_soon(one, i)
    return answers


async def rows(coordinator: Coordinator) -> list[int]:
    """The rows that each stage has computed in this epoch."""
    stats = [report.stats for report in await coordinator.stats()]
    return [told.decode.rows + told.prefill.rows for told in stats]


def run(
    model: Model, running: Sequence[RunningNode], test: Callable[[Coordinator], Awaitable[None]],
    share_prefixes: bool = True,
) -> None:  # fmt: skip
    async def main() -> None:
        options = CoordinatorOptions(measure_links=False, share_prefixes=share_prefixes)
        where = [node.address for node in running]
        who = coordinator_identity(model), shape_of(model)
        with trio.fail_after(LIMIT):
            async with Coordinator.open(where, *who, equal, options) as coordinator:
                await test(coordinator)

    trio.run(main)


def test_a_prefix_is_computed_once_on_every_stage_and_moves_once(
    model: Model, prompts: list[list[int]], expected: list[list[int]], three: list[RunningNode]
) -> None:
    async def test(coordinator: Coordinator) -> None:
        first = await ask(coordinator, prompts)
        assert first[:3] == expected
        own = REQUESTS * (TAIL + TOKENS - 1)  # an answer's last token is not run
        assert await rows(coordinator) == [PREFIX + own] * 3
        stages = [Assignment(f"node{i}", a, b) for i, (a, b) in enumerate(((0, 14), (14, 20), (20, 32)))]
        await ask(coordinator, prompts[:2], partial(coordinator.move, stages, "it is a test"))
        while not coordinator.moves:
            await ask(coordinator, prompts[:1])
        assert not coordinator.moves[0].aborted, coordinator.moves[0].moved
        assert await ask(coordinator, prompts) == first
        more = await rows(coordinator)
        assert max(more) < PREFIX, more

    run(model, three, test)


def test_tokens_are_the_same_after_a_death_and_without_sharing(
    model: Model, prompts: list[list[int]], expected: list[list[int]], three: list[RunningNode]
) -> None:
    async def alone(coordinator: Coordinator) -> None:
        assert await ask(coordinator, prompts[:3]) == expected
        assert await rows(coordinator) == [3 * (PREFIX + TAIL + TOKENS - 1)] * 3

    async def test(coordinator: Coordinator) -> None:
        assert (await ask(coordinator, prompts[:5], three[1].process.kill))[:3] == expected
        assert coordinator.recoveries == 1
        assert await ask(coordinator, prompts[:3]) == expected

    run(model, three, alone, share_prefixes=False)
    run(model, three, test)
