"""A session's next answer computes only what is new, and gives the tokens that a fresh one gives."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from shoal.engine.batch import Sampling
from shoal.engine.errors import ContextError
from shoal.net.placement import Links, NodeInfo, Placement, plan_at
from shoal.planner import Assignment

SAMPLING = Sampling(temperature=0.8, seed=5, repetition_penalty=1.3)


def spread(nodes: list[NodeInfo], links: Links) -> Placement:
    """As equal as can be over whoever is there."""
    edges = [6 * i // len(nodes) for i in range(len(nodes) + 1)]
    ranges = zip(nodes, edges, edges[1:], strict=False)
    return Placement(tuple(Assignment(node.label, a, b) for node, a, b in ranges), 4)


async def said(session: Any, prompt: list[int], count: int, **how: Any) -> list[int]:
    async with session.answer(prompt, max_tokens=count, **how) as tokens:
        return [token async for token in tokens]


def rows(net: Any) -> list[int]:
    """Rows that each node has computed in the stage it holds."""
    return [sum(n for batch in node.stages[-1].batches for _, _, n in batch) for node in net.nodes.values()]


def held(net: Any) -> list[int]:
    """Sessions open at each node."""
    return [len(node.stages[-1].sequences) for node in net.nodes.values()]


@pytest.mark.parametrize("names", ["a", "abc"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING], ids=["greedy", "seeded"])
def test_each_turn_of_a_chat_computes_only_what_is_new(
    lab: ModuleType, names: str, sampling: Sampling
) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in names:
                net.add(name)
            async with net.coordinator(plan=spread) as coordinator, coordinator.session(sampling) as session:
                known: list[int] = []
                for turn in range(10):
                    prompt = [*known, turn, 90, turn]
                    before = rows(net)
                    answer = await said(session, prompt, 3)
                    assert answer == lab.oracle(prompt, 3, sampling)
                    # The last token of an answer is drawn and never computed, so it is new in the next turn.
                    new = 3 + 2 + (1 if turn else 0)
                    assert [b - a for a, b in zip(before, rows(net), strict=True)] == [new] * len(names)
                    known = prompt + answer
                assert held(net) == [1] * len(names)
            await trio.testing.wait_all_tasks_blocked()

    lab.run(main)


def test_prompts_that_part_anywhere_give_the_tokens_of_a_fresh_session(lab: ModuleType) -> None:
    rng = random.Random(2)

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with (
                net.coordinator(plan=plan_at((0, 3, 6), 4)) as coordinator,
                coordinator.session(SAMPLING) as session,
            ):
                known = [1]
                for _ in range(40):
                    kept = known[: rng.randint(0, len(known))]
                    prompt = [*kept, *(rng.randrange(3) for _ in range(rng.randint(0 if kept else 1, 9)))][
                        :50
                    ]
                    count = rng.randint(0, 8)
                    end = (rng.randrange(97),)
                    answer = await said(session, prompt, count, end=end)
                    assert answer == lab.oracle(prompt, count, SAMPLING, end)
                    known = prompt + answer

    lab.run(main)


def test_a_session_that_is_closed_frees_its_state_and_one_that_waits_keeps_it(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with net.coordinator(plan=plan_at((0, 3, 6), 4), share_prefixes=False) as coordinator:
                async with coordinator.session() as session:
                    await said(session, [1, 2], 2)
                    await trio.testing.wait_all_tasks_blocked()
                    assert held(net) == [1, 1]
                await trio.testing.wait_all_tasks_blocked()
                assert held(net) == [0, 0]
                await lab.collect(coordinator, [1, 2], 2)  # one answer alone keeps nothing
                await trio.testing.wait_all_tasks_blocked()
                assert held(net) == [0, 0]

    lab.run(main)


@pytest.mark.parametrize("after", [0.4, 1.5, 2.5, 6.0, 9.5])
def test_an_answer_that_is_left_in_the_middle_does_not_disturb_the_next(
    lab: ModuleType, after: float
) -> None:
    """Prompt or answer, whatever is in flight."""

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(1.0))
            async with net.coordinator(plan=spread) as coordinator, coordinator.session(SAMPLING) as session:
                with trio.move_on_after(after) as scope:
                    await said(session, [7] * 20, 30)
                assert scope.cancelled_caught
                for prompt in ([7] * 10 + [3], [7] * 20 + [5, 5]):
                    assert await said(session, prompt, 4) == lab.oracle(prompt, 4, SAMPLING)
                await trio.sleep(20)
                assert held(net) == [1, 1, 1]

    lab.run(main)


@pytest.mark.parametrize("port", [7001, 7002, 7003])
@pytest.mark.parametrize("during", [False, True])
def test_a_node_that_dies_between_or_within_answers_changes_no_token(
    lab: ModuleType, port: int, during: bool
) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=spread) as coordinator, coordinator.session(SAMPLING) as session:
                known = [1, 2, 3, 4, 5]
                known += await said(session, known, 4)
                if not during:
                    await net.kill(port)
                    await trio.sleep(1)
                prompt = [*known, 8]
                async with session.answer(prompt, max_tokens=6) as tokens:
                    answer = [await anext(tokens)]
                    if during:
                        await net.kill(port)
                    answer += [token async for token in tokens]
                assert answer == lab.oracle(prompt, 6, SAMPLING)
                assert coordinator.recoveries == 1
                prompt += [*answer, 2]
                assert await said(session, prompt, 5) == lab.oracle(prompt, 5, SAMPLING)

    lab.run(main)


def test_a_waiting_session_gives_its_place_to_one_that_answers(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with net.coordinator(
                plan=plan_at((0, 3, 6), 4), max_sessions=2, share_prefixes=False
            ) as coordinator:
                async with coordinator.session() as first, coordinator.session() as second:
                    await said(first, [1, 2], 2)
                    await said(second, [3, 4], 2)
                    assert await lab.collect(coordinator, [5, 6], 3) == lab.oracle([5, 6], 3)
                    await trio.testing.wait_all_tasks_blocked()
                    assert held(net) == [1, 1]  # the first, idle for longest, had to go
                    before = rows(net)
                    again = [3, 4, *lab.oracle([3, 4], 2), 9]
                    assert await said(second, again, 1) == lab.oracle(again, 1)
                    assert rows(net)[0] - before[0] == 2
                    again = [1, 2, *lab.oracle([1, 2], 2), 9]
                    assert await said(first, again, 3) == lab.oracle(again, 3)
                await trio.testing.wait_all_tasks_blocked()
                assert held(net) == [0, 0]

    lab.run(main)


def test_the_memory_of_waiting_sessions_goes_to_one_that_answers(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b", room=60)
            async with net.coordinator(plan=plan_at((0, 3, 6), 4)) as coordinator:
                async with coordinator.session() as first, coordinator.session() as second:
                    for session in (first, second):
                        await said(session, [1] * 20, 2)
                    assert await lab.collect(coordinator, [5] * 30, 3) == lab.oracle([5] * 30, 3)
                    again = [1] * 20 + [4]
                    assert await said(first, again, 3) == lab.oracle(again, 3)
                with pytest.raises(ContextError, match="have filled"):
                    await lab.collect(coordinator, [5] * 60, 3)
                await trio.testing.wait_all_tasks_blocked()
                assert held(net) == [0, 0]

    lab.run(main)


def test_a_failure_of_an_answer_that_was_left_is_not_the_next_ones(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(1.0))
            net.add("b", hop=lab.slow_hop(1.0), room=10)
            async with (
                net.coordinator(plan=plan_at((0, 3, 6), 4)) as coordinator,
                coordinator.session() as session,
            ):
                with trio.move_on_after(0.5):
                    await said(session, [7] * 40, 3)
                assert await said(session, [7, 7, 1], 3) == lab.oracle([7, 7, 1], 3)
                with pytest.raises(ContextError, match="have filled"):
                    await said(session, [7] * 40, 3)
                assert await said(session, [7, 2], 3) == lab.oracle([7, 2], 3)

    lab.run(main)


def test_a_node_that_forgot_a_session_gets_it_again(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with (
                net.coordinator(plan=plan_at((0, 3, 6), 4)) as coordinator,
                coordinator.session(SAMPLING) as session,
            ):
                await said(session, [1, 2, 3], 3)
                net.nodes[7002].stages[0].room = 2  # the next rows fail there
                with pytest.raises(ContextError):
                    await said(session, [1, 2, 3, 4], 3)
                net.nodes[7002].stages[0].room = 10**9
                assert await said(session, [1, 2, 3, 4], 3) == lab.oracle([1, 2, 3, 4], 3, SAMPLING)

    lab.run(main)


def test_a_session_gives_one_answer_at_a_time(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator, coordinator.session() as session:
                async with session.answer([1], max_tokens=4) as tokens:
                    got = [await anext(tokens)]
                    with pytest.raises(ValueError, match="one answer at a time"):
                        await said(session, [2], 1)
                    got += [token async for token in tokens]
                assert got == lab.oracle([1], 4)
                assert await said(session, [2], 2) == lab.oracle([2], 2)

    lab.run(main)


def test_a_prompt_beyond_the_context_is_refused_and_the_session_goes_on(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with (
                net.coordinator(plan=spread) as coordinator,
                coordinator.session(context=20) as session,
            ):
                known = [1, 2, 3, *await said(session, [1, 2, 3], 4)]
                with pytest.raises(ContextError, match="the context holds 20"):
                    session.answer([*known, *range(13)], max_tokens=1)
                before = rows(net)
                assert await said(session, [*known, 5], 99) == lab.oracle([*known, 5], 99, context=20)
                assert rows(net)[0] - before[0] == 20 - len(known) + 1

    lab.run(main)


def test_a_reader_that_stops_reading_does_not_hold_up_its_answer_or_others(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "ab":
                net.add(name, hop=lab.slow_hop(0.1))
            async with net.coordinator(plan=plan_at((0, 3, 6))) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=20) as tokens:
                    got = [await anext(tokens)]
                    await trio.sleep(10)
                    start = trio.current_time()
                    assert await lab.collect(coordinator, [3], 5) == lab.oracle([3], 5)
                    alone = trio.current_time() - start
                    start = trio.current_time()
                    got += [token async for token in tokens]
                    assert trio.current_time() == start  # they were there
                    assert got == lab.oracle([1, 2], 20)
                assert alone < 2

    lab.run(main)


def test_an_answer_that_was_left_is_not_continued(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.1))
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator, coordinator.session() as session:
                async with session.answer([1, 2], max_tokens=20) as tokens:
                    await anext(tokens)
                await trio.sleep(5)
                (report,) = await coordinator.stats()
                assert report.stats.decode.rows <= 2
                async with session.answer([1, 2], max_tokens=20) as tokens:
                    assert [token async for token in tokens] == lab.oracle([1, 2], 20)

    lab.run(main)
