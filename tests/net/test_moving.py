"""A coordinator and nodes: layers move in the middle of answers, or are lost, and no token changes."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from tests.models import TINY

from shoal.engine.batch import Sampling
from shoal.engine.convert import convert
from shoal.engine.errors import NoPlanError
from shoal.engine.generate import generate
from shoal.engine.layout import CHUNK
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.net import tags
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.inbox import Batch
from shoal.net.messages import Epoch, Kept, Loaded
from shoal.net.placement import Links, NodeInfo, Outcome, Placement, Proposal, Usage
from shoal.planner import Assignment

SAMPLING = Sampling(temperature=0.8, seed=3, repetition_penalty=1.3)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that contexts of these tests fill."""
    monkeypatch.setattr(tags, "CHUNK", 4)


def spread(nodes: Sequence[NodeInfo], links: Links) -> Placement:
    """As equal as can be over whoever is there."""
    n = len(nodes)
    edges = [6 * i // n for i in range(n + 1)]
    return Placement(
        tuple(Assignment(node.label, a, b) for node, a, b in zip(nodes, edges, edges[1:], strict=False)), 4
    )


def stages(text: str) -> list[Assignment]:
    """Stages as "a3 c5 b6": up to which unit each node holds them."""
    words = text.split()
    edges = [0, *(int(word[1:]) for word in words)]
    return [Assignment(w[0], a, b) for w, a, b in zip(words, edges, edges[1:], strict=False)]


Test = Callable[[Any, Coordinator], Awaitable[None]]


def with_chain(
    lab: ModuleType,
    test: Test,
    names: str = "abc",
    begin: Any = None,
    moves: str = "move",
    hop: Any = None,
    **options: Any,
) -> None:
    """Runs a test with nodes of these names, at ports from 7001 on, and a coordinator."""

    async def main() -> None:
        async with lab.network() as net:
            for name in names:
                net.add(name, hop=hop or lab.slow_hop(0.01))
            plan = spread if begin is None else lambda nodes, links: Placement(tuple(stages(begin)), 4)
            async with net.coordinator(plan=plan, moves=moves, **options) as coordinator:
                await test(net, coordinator)

    lab.run(main)


async def until(condition: Callable[[], bool]) -> None:
    """Waits, for a virtual minute at most."""
    for _ in range(6000):
        if condition():
            return
        await trio.sleep(0.01)
    raise AssertionError("it has not happened within a minute")


async def moved(coordinator: Coordinator, text: str, why: str = "it is a test") -> Any:
    """Moves, and waits until that has ended; returns the record."""
    before = len(coordinator.moves)
    coordinator.move(stages(text), why)
    await until(lambda: len(coordinator.moves) > before)
    return coordinator.moves[-1]


def ran(net: Any) -> int:
    """Rows of the first unit that have been computed, on whatever node."""
    return sum(
        rows for node in net.nodes.values() for stage in node.stages for batch in stage.batches
        for _, _, rows in batch
    )  # fmt: skip


MOVES = [
    ("a2 b4 c6", "a1 b4 c6"),
    ("a2 b4 c6", "a3 b4 c6"),
    ("a2 b4 c6", "a1 b2 c6"),
    ("a2 b4 c6", "a4 b5 c6"),
    ("a2 b4 c6", "a3 c6"),
    ("a2 b4 c6", "b3 c6"),
    ("a2 b4 c6", "a6"),
    ("a2 b4 c6", "c6"),
    ("a2 b4 c6", "c2 b4 a6"),
    ("a2 b4 c6", "b2 c4 a6"),
    ("a6", "b6"),
    ("a6", "b2 c4 a6"),
    ("b3 c6", "a2 b4 c6"),
    ("a3 c6", "a2 b4 c6"),
]


@pytest.mark.parametrize(("old", "new"), MOVES)
@pytest.mark.parametrize("after", [0, 6])
def test_layers_move_in_mid_answer_and_nothing_is_computed_again(
    lab: ModuleType, old: str, new: str, after: int
) -> None:
    async def test(net: Any, coordinator: Coordinator) -> None:
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
        async with coordinator.generate(prompt, SAMPLING, max_tokens=24) as tokens:
            got = [await anext(tokens) for _ in range(after)]
            move = await moved(coordinator, new)
            got += [token async for token in tokens]
        assert got == lab.oracle(prompt, 24, SAMPLING)
        assert not move.aborted, move.moved
        assert coordinator.placement.stages == tuple(stages(new))
        sequences = [batch for node in net.nodes.values() for s in node.stages for batch in s.batches]
        spans = [run[1:] for batch in sequences for run in batch]
        most = max(len(old.split()), len(new.split()))
        assert max(spans.count(span) for span in spans) <= most

    with_chain(lab, test, begin=old)


def test_many_answers_go_on_through_many_moves(lab: ModuleType) -> None:
    rng = random.Random(7)

    async def test(net: Any, coordinator: Coordinator) -> None:
        done = 0

        async def one(seed: int) -> None:
            nonlocal done
            own = random.Random(seed)
            await trio.sleep(own.random())
            for _ in range(3):
                prompt, sampling = [own.randrange(97) for _ in range(own.randint(1, 30))], Sampling(seed=seed)
                count = own.randint(1, 30)
                got = await lab.collect(coordinator, prompt, count, sampling=sampling)
                assert got == lab.oracle(prompt, count, sampling)
            done += 1

        async with trio.open_nursery() as tasks:
            for seed in range(6):
                tasks.start_soon(one, seed)
            while done < 6:
                names = rng.sample("abc", rng.randint(1, 3))
                edges = sorted(rng.sample(range(1, 6), len(names) - 1))
                await moved(coordinator, " ".join(f"{n}{e}" for n, e in zip(names, [*edges, 6], strict=True)))
                await trio.sleep(rng.random() * 0.2)
        ended = [move for move in coordinator.moves if not move.aborted]
        assert len(ended) > 5
        assert ended == list(coordinator.moves)
        assert coordinator.recoveries == 0

    with_chain(lab, test)


def test_sessions_between_answers_move_too(lab: ModuleType) -> None:
    async def test(net: Any, coordinator: Coordinator) -> None:
        async with coordinator.session(SAMPLING) as session:
            known = [1, 2, 3, 4, 5, 6, 7]
            for new in ("a1 b5 c6", "b3 c6", "a6", "a2 b4 c6"):
                async with session.answer(known, max_tokens=5) as tokens:
                    answer = [token async for token in tokens]
                assert answer == lab.oracle(known, 5, SAMPLING)
                known += [*answer, 8]
                before = ran(net)
                assert not (await moved(coordinator, new)).aborted
                assert ran(net) == before
            async with session.answer(known[:9], max_tokens=5) as tokens:  # back to an earlier position
                assert [token async for token in tokens] == lab.oracle(known[:9], 5, SAMPLING)
            assert ran(net) - before <= 3 * 6

    with_chain(lab, test)


def test_a_move_that_cannot_be_begun_is_recorded_with_its_reason(lab: ModuleType) -> None:
    async def test(net: Any, coordinator: Coordinator) -> None:
        coordinator.move(stages("a1 b4 c6"), "the first")
        assert not coordinator.moves
        coordinator.move(stages("a3 b4 c6"), "the second")
        (refused,) = coordinator.moves
        assert refused.aborted and refused.moved.why == "the second"
        await until(lambda: len(coordinator.moves) == 2)
        assert not coordinator.moves[-1].aborted
        assert coordinator.placement.stages == tuple(stages("a1 b4 c6"))

    with_chain(lab, test)


@pytest.mark.parametrize("port", [7001, 7002, 7003])
@pytest.mark.parametrize("after", [1, 7])
def test_after_a_death_only_lost_units_are_computed_again(lab: ModuleType, port: int, after: int) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]

    async def test(net: Any, coordinator: Coordinator) -> None:
        async with coordinator.generate(prompt, SAMPLING, max_tokens=20) as tokens:
            got = [await anext(tokens) for _ in range(after)]
            await net.kill(port)
            got += [token async for token in tokens]
        assert got == lab.oracle(prompt, 20, SAMPLING)
        assert [len(node.stages) for node in net.nodes.values()] == [1, 1, 1]  # none was loaded anew
        (move,) = coordinator.moves
        assert move.moved.recovery and not move.aborted
        assert coordinator.recoveries == 1
        first, last = move.moved.lost
        parts = [part for node in net.nodes.values() for stage in node.stages for part in stage.parts]
        # From the rows that the stage before has kept, or from the tokens if there is none.
        assert min(enter for enter, _ in parts) == first < last == max(until for _, until in parts)

    with_chain(lab, test)


def test_a_death_where_no_ram_has_room_for_two_stages_loads_nothing_anew(lab: ModuleType) -> None:
    """Nodes drop the weights of their old stages before they load those of their new ones."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]

    def room(first: int, last: int, beside: range = range(0)) -> int:
        if set(beside) - set(range(first, last)):
            raise NoPlanError("there is no room")
        return 1000

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(0.01), kv_bytes=room)
            async with net.coordinator(plan=spread, moves="move") as coordinator:
                async with coordinator.generate(prompt, SAMPLING, max_tokens=20) as tokens:
                    got = [await anext(tokens) for _ in range(5)]
                    await net.kill(7002)
                    got += [token async for token in tokens]
                assert got == lab.oracle(prompt, 20, SAMPLING)
                assert [len(node.stages) for node in net.nodes.values()] == [1, 1, 1]
                (move,) = coordinator.moves
                assert move.moved.recovery and not move.aborted
                # While answers go on, nothing makes room.
                assert (await moved(coordinator, "a2 c6")).aborted

    lab.run(main)


def test_what_a_node_says_of_other_epochs_does_not_count(lab: ModuleType) -> None:
    async def test(net: Any, coordinator: Coordinator) -> None:
        for counter in (0, 5):
            coordinator._hear(0, Loaded(Epoch(99, counter), 0.0, 1, rows=(Kept(0, 9),)))
        assert len(await coordinator.stats()) == 3
        assert not (await moved(coordinator, "a1 b4 c6")).aborted
        assert await lab.collect(coordinator, [1, 2], 9) == lab.oracle([1, 2], 9)

    with_chain(lab, test)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a2 b4 c6", "a2 d4 c6"),
        ("a2 b4 c6", "a3 d4 c6"),
        ("b2 a4 c6", "d2 a4 c6"),
        ("a2 c4 b6", "a2 c4 d6"),
        ("a2 c4 b6", "a2 c5 d6"),  # the newcomer has the LM head alone
        ("b1 a3 c6", "d1 a3 c6"),
    ],
)
def test_a_newcomer_takes_the_place_of_a_node_that_died(lab: ModuleType, old: str, new: str) -> None:
    prompt, texts = [3, 1, 4, 1, 5, 9, 2, 6, 5], [old, new]

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        there = {node.label for node in nodes}
        text = next(text for text in texts if {word[0] for word in text.split()} <= there)
        return Placement(tuple(stages(text)), 4)

    async def main() -> None:
        async with lab.network() as net:
            for name in "abcd":
                net.add(name, hop=lab.slow_hop(0.01))
            async with net.coordinator(plan=plan, moves="move") as coordinator:
                async with coordinator.generate(prompt, SAMPLING, max_tokens=20) as tokens:
                    got = [await anext(tokens) for _ in range(5)]
                    await net.kill(7002)
                    got += [token async for token in tokens]
                assert got == lab.oracle(prompt, 20, SAMPLING)
                assert coordinator.placement.stages == tuple(stages(new))
                assert [len(node.stages) for node in net.nodes.values()] == [1, 1, 1, 1]
                (move,) = coordinator.moves
                assert move.moved.recovery and not move.aborted

    lab.run(main)


@pytest.mark.parametrize("dies", [7001, 7002, 7003])
def test_a_session_between_answers_survives_a_death(lab: ModuleType, dies: int) -> None:
    async def test(net: Any, coordinator: Coordinator) -> None:
        async with coordinator.session(SAMPLING) as session:
            known = [1, 2, 3, 4, 5, 6, 7]
            async with session.answer(known, max_tokens=5) as tokens:
                known += [token async for token in tokens]
            await net.kill(dies)
            await trio.sleep(1)
            known.append(8)
            async with session.answer(known, max_tokens=5) as tokens:
                assert [token async for token in tokens] == lab.oracle(known, 5, SAMPLING)
            assert [len(node.stages) for node in net.nodes.values()] == [1, 1, 1]

    with_chain(lab, test)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_deaths_returns_and_moves_at_random_times_change_no_answer(lab: ModuleType, seed: int) -> None:
    rng = random.Random(seed)

    async def test(net: Any, coordinator: Coordinator) -> None:
        done = 0

        async def one(number: int) -> None:
            nonlocal done
            own = random.Random(100 * seed + number)
            for _ in range(6):
                prompt, sampling = [own.randrange(97) for _ in range(own.randint(1, 30))], Sampling(seed=seed)
                count = own.randint(1, 30)
                got = await lab.collect(coordinator, prompt, count, sampling=sampling)
                assert got == lab.oracle(prompt, count, sampling)
                await trio.sleep(own.random() / 2)
            done += 1

        async with trio.open_nursery() as tasks:
            for number in range(5):
                tasks.start_soon(one, number)
            while done < 5:
                await trio.sleep(rng.random() * 0.4)
                names = [node.label for node in coordinator.nodes]
                if rng.random() < 0.7:
                    names = rng.sample(names, rng.randint(1, len(names)))
                    edges = sorted(rng.sample(range(1, 6), len(names) - 1))
                    cuts = [f"{name}{edge}" for name, edge in zip(names, [*edges, 6], strict=True)]
                    coordinator.move(stages(" ".join(cuts)), "at random")
                elif len(names) > 2:
                    port = 7001 + "abcd".index(rng.choice(names))
                    await net.kill(port)
                    await trio.sleep(rng.random())
                    net.restart(port)
        assert [m for m in coordinator.moves if m.moved.recovery and not m.aborted]
        assert [m for m in coordinator.moves if not m.moved.recovery and not m.aborted]

    with_chain(lab, test, "abcd")


class Once:
    """A rebalancer with one proposal, which notes what it is asked and told."""

    def __init__(self, text: str) -> None:
        self.proposal: Proposal | None = Proposal(
            Placement(tuple(stages(text)), 999), "a is hot", 0.05, 0.04, 0.1, 0
        )
        self.usages: list[Usage] = []
        self.outcomes: list[Outcome] = []
        self.placements: list[Placement] = []

    def look(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement, usage: Usage, now: float
    ) -> Proposal | None:
        assert [node.label for node in nodes] == ["a", "b", "c"][: len(nodes)]
        self.usages.append(usage)
        proposal = self.proposal if usage.tokens > 10 else None
        self.proposal = None if proposal else self.proposal
        return proposal

    def happened(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def copies(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement
    ) -> dict[str, tuple[int, ...]]:
        self.placements.append(placement)
        return {}


@pytest.mark.parametrize("moves", ["move", "off"])
def test_a_rebalancer_is_asked_and_told(lab: ModuleType, moves: str) -> None:
    rebalancer, said = Once("a1 b5 c6"), list[str]()

    async def test(net: Any, coordinator: Coordinator) -> None:
        async def one(prompt: list[int]) -> None:
            got = await lab.collect(coordinator, prompt, 30, sampling=SAMPLING)
            assert got == lab.oracle(prompt, 30, SAMPLING)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(one, [5, 6, 7])
            tasks.start_soon(one, [8] * 9)
        await trio.sleep(1)
        (move,) = coordinator.moves
        committed = moves == "move"
        assert move.aborted is not committed and move.proposal is not None
        assert [outcome.committed for outcome in rebalancer.outcomes] == [committed]
        asked = rebalancer.usages[0]
        assert (asked.streams, asked.reading, 0 < asked.tokens < 60) == (2, False, True)
        assert 6 < asked.depth < 40 and asked.remaining > 10 and set(asked.waiting) <= {"a", "b", "c"}
        assert rebalancer.usages[-1].streams == 0 and rebalancer.usages[-1].tokens == 60
        assert coordinator.placement.chunk_rows == (8 if committed else 4)  # as much as a node accepts
        assert [p.stages for p in rebalancer.placements] == [
            tuple(stages(text)) for text in ("a2 b4 c6", "a1 b5 c6")[: 1 + committed]
        ]
        lines = [text for text in said if text.startswith("moved")]
        assert lines == [move.line()] * committed

    with_chain(lab, test, moves=moves, rebalancer=rebalancer, log=said.append)


def test_a_session_that_waits_to_be_filled_does_not_end_balancing(lab: ModuleType) -> None:
    rebalancer = Once("a1 b5 c6")

    async def test(net: Any, coordinator: Coordinator) -> None:
        async with coordinator.session(SAMPLING) as session:
            async with session.answer([1, 2, 3], max_tokens=3) as tokens:
                known = [1, 2, 3, *[token async for token in tokens]]
            await net.kill(7003)
            await until(lambda: coordinator.recoveries == 1)
            before = len(rebalancer.usages)
            await trio.sleep(3)
            assert len(rebalancer.usages) >= before + 4
            async with session.answer([*known, 9], max_tokens=3) as tokens:
                assert [token async for token in tokens] == lab.oracle([*known, 9], 3, SAMPLING)

    with_chain(lab, test, rebalancer=rebalancer)


async def by_rows(call: Callable[[], Any], /) -> Any:
    """A hop that takes as long as the rows of a batch should."""
    batch = getattr(call, "args", (None,))[0]
    rows = sum(step.rows for step in batch.steps) if isinstance(batch, Batch) else 0
    with trio.CancelScope(shield=True):
        await trio.sleep(0.01 * (1 + rows))
    return call()


@pytest.mark.parametrize("beside", [False, True])
def test_an_answer_stands_still_for_a_few_of_its_token_gaps(lab: ModuleType, beside: bool) -> None:
    """Also while another prompt is read, of which several Steps are on their way."""

    async def test(net: Any, coordinator: Coordinator) -> None:
        gaps: list[float] = []

        async def answer() -> None:
            async with coordinator.generate([5], SAMPLING, max_tokens=60) as tokens:
                got, before = [await anext(tokens)], trio.current_time()
                async for token in tokens:
                    gaps.append(trio.current_time() - before)
                    got, before = [*got, token], trio.current_time()
            assert got == lab.oracle([5], 60, SAMPLING)

        async def read() -> None:
            while len(coordinator.moves) < 4:
                assert await lab.collect(coordinator, [7] * 60, 2) == lab.oracle([7] * 60, 2)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(answer)
            await until(lambda: len(gaps) > 10)
            alone = max(gaps)
            if beside:
                tasks.start_soon(read)
                await until(lambda: len(gaps) > 14)
            usual = max(gaps)
            for text in ("a1 b4 c6", "a1 b5 c6", "a2 b4 c6", "a3 b5 c6"):
                move = await moved(coordinator, text)
                assert not move.aborted
                assert move.standstill <= 2 * alone
        assert max(gaps) <= (1.1 if beside else 2) * usual

    with_chain(lab, test, hop=by_rows, share_prefixes=False)  # the prompt is the same again and again


@pytest.mark.slow
def test_real_stages_move_die_and_return_and_the_tokens_are_those_of_one_process(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tags, "CHUNK", CHUNK)
    convert(TINY, tmp_path / "model", dtype="int8")
    model = Model.open(tmp_path / "model")
    n = model.n_units
    rng = random.Random(11)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (3, 70, 140, 200)]
    with Stage(model, 0, n) as stage:
        expected = [list(generate(stage, prompt, SAMPLING, max_tokens=100, end=())) for prompt in prompts]

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        edges = [n * i // len(nodes) for i in range(len(nodes) + 1)]
        parts = zip(nodes, edges, edges[1:], strict=False)
        return Placement(tuple(Assignment(node.label, a, b) for node, a, b in parts), 8)

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(
                    name,
                    open_stage=lambda a, b: Stage(model, a, b, StageOptions(threads=1, keep_rows=True)),
                    units=n,
                    stateless=frozenset(u for u, unit in enumerate(model.program.units) if not unit.states),
                    hop=lab.slow_hop(0.01),
                )
            options = CoordinatorOptions(
                hop=lab.inline, open_stream=net.open_stream, measure_links=False, moves="move"
            )
            async with Coordinator.open(
                [("host", port) for port in net.nodes],
                lab.identity("laptop", 99),
                shape_of(model),
                plan,
                options,
            ) as coordinator:
                found: dict[int, list[int]] = {}

                async def one(i: int) -> None:
                    found[i] = await lab.collect(coordinator, prompts[i], 100, sampling=SAMPLING)

                async def move(names: Sequence[str], why: str) -> None:
                    edges = [0, *sorted(rng.sample(range(1, n), len(names) - 1)), n]
                    parts, count = zip(names, edges, edges[1:], strict=False), len(coordinator.moves)
                    coordinator.move([Assignment(name, a, b) for name, a, b in parts], why)
                    while len(coordinator.moves) == count:  # noqa: ASYNC110
                        await trio.sleep(0.01)

                async def disturb() -> None:
                    for i in range(8):
                        await trio.sleep(rng.random() / 4)
                        there = [node.label for node in coordinator.nodes]
                        await move(rng.sample(there, rng.randint(1, len(there))), "at random")
                        if i in (2, 5):
                            await move(there, "so that the next loss loses units")
                            await trio.sleep(rng.random() / 4)
                            await net.kill(7001 + i % 3)
                            net.restart(7001 + i % 3)

                async with trio.open_nursery() as tasks:
                    for i in range(len(prompts)):
                        tasks.start_soon(one, i)
                    await disturb()
                assert [found[i] for i in range(len(prompts))] == expected
                assert [m for m in coordinator.moves if m.moved.recovery and not m.aborted]
                assert [m for m in coordinator.moves if not m.moved.recovery and not m.aborted]

    lab.run(main)
