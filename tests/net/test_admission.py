"""Admission: who gets room for keys and values, who waits and who is set aside, and that no token changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from tests.models import TINY

from shoal.engine.batch import Sampling
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError, OperatingSystemError
from shoal.engine.generate import generate
from shoal.engine.kv_page import page_bytes
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.net.admission import Admission, ChainRoom, Claim, Decision, decide
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import Links, NodeInfo, Placement, plan_at
from shoal.planner import Assignment

SAMPLING = Sampling(temperature=0.8, seed=5, repetition_penalty=1.3)


def claims(text: str) -> list[Claim[str]]:
    """Claims as "a4 b5:6": session b has or needs 5 pages, and soon 6."""
    found = []
    for word in text.split():
        pages, _, soon = word[1:].partition(":")
        found.append(Claim(word[0], int(pages), int(soon or pages)))
    return found


@pytest.mark.parametrize(
    ("why", "running", "waiting", "idle", "pages", "slots", "expected"),
    [
        ("nothing", "", "", "", 0, 1, ("", "", "")),
        ("until it is full", "", "a4 b4 c3", "", 10, 9, ("", "", "ab")),
        ("a later small one waits", "", "a4 b9 c1", "", 10, 9, ("", "", "a")),
        ("a small one waits behind a large one", "a4", "b9 c1", "", 10, 9, ("", "", "")),
        ("no limit", "", "a4 b4", "", None, 9, ("", "", "ab")),
        ("slots", "a1", "b1 c1", "", 99, 2, ("", "", "b")),
        ("those that run will soon need it", "a4:5", "b5", "", 9, 9, ("", "", "")),
        ("it would soon need more than there is", "a4", "b5:6", "", 9, 9, ("", "", "")),
        ("a single one may fill all", "", "a9:10", "", 9, 9, ("", "", "a")),
        ("the longest idle is dropped", "a3", "b4", "x2 y3", 10, 9, ("x", "", "b")),
        ("idle ones stay while there is room", "a3", "b4", "x2 y1", 10, 9, ("", "", "b")),
        ("none is dropped in vain", "a5", "b6", "x2", 10, 9, ("", "", "")),
        ("idle ones have slots", "a1", "b1", "x1 y1", 99, 3, ("x", "", "b")),
        ("a session takes over its own state", "a2", "x6", "x5 y3", 10, 9, ("y", "", "x")),
        ("the youngest is set aside", "a5 b5 c1", "", "", 10, 9, ("", "c", "")),
        ("as many as it takes", "a9 b5 c1", "", "", 10, 9, ("", "cb", "")),
        ("idle ones go first", "a7 b4", "", "x1 y1", 11, 9, ("xy", "", "")),
        ("idle ones, then the youngest", "a7 b4", "", "x1 y1", 10, 9, ("xy", "b", "")),
        ("room that one leaves is not a later one's", "a5 b6", "c1", "", 10, 9, ("", "b", "")),
        ("a single one is never set aside", "a12", "", "", 10, 9, ("", "", "")),
        ("alone it is tried", "", "a12 b1", "x1", 10, 9, ("x", "", "a")),
    ],
)
def test_decisions(
    why: str, running: str, waiting: str, idle: str, pages: int | None, slots: int, expected: tuple[str, ...]
) -> None:
    found = decide(claims(running), claims(waiting), claims(idle), pages=pages, slots=slots)
    assert found == Decision(*map(tuple, expected)), why


class Guest:
    """A session as admission sees it."""

    def __init__(self) -> None:
        self.left = 0

    busy = True

    def leave(self) -> None:
        self.left += 1

    def lender(self) -> None:
        return None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_room_suffices_and_everybody_is_served(lab: ModuleType, seed: int) -> None:
    """Guests that arrive, grow, end, are cancelled or come back, in rooms that change."""
    rng = random.Random(seed)
    slots, page = rng.randint(2, 6), rng.choice((4, 7))
    served = 0

    async def main() -> None:
        nonlocal served
        admission = Admission(slots)
        room = ChainRoom("b", 12, page)
        admission.open(room)

        def check() -> None:
            idle = [guest for guest in admission._idle if guest not in admission._running]
            used = sum(room.of(place.positions) for place in admission._running.values())
            used += sum(room.of(admission._idle[guest].positions) for guest in idle)
            assert room.pages is not None and used <= room.pages
            assert len(admission._running) + len(idle) <= slots
            assert not admission._waiting or admission._running  # somebody makes room

        async def guest(seed: int) -> None:
            nonlocal served
            own, me = random.Random(seed), Guest()
            for _ in range(own.randint(1, 3)):
                most = own.randint(1, 8 * page)
                positions = own.randint(1, most)
                await trio.sleep(own.random() * 4)
                with trio.move_on_after(own.choice((0.5, 1e9))) as patience:
                    await admission.begin(me, positions, most)
                if patience.cancelled_caught:
                    check()
                    continue
                patience.deadline = float("inf")
                while positions < most:
                    check()
                    await admission.admitted(me)
                    positions += 1
                    left = me.left
                    if not admission.grow(me, positions):
                        assert me.left == left + 1
                    if own.random() < 0.02:
                        break
                    await trio.sleep(0.1)
                admission.end(me, keep=own.random() < 0.5)
                check()
                served += 1
            admission.forget(me)

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(guest, 1000 * seed + number)
            for _ in range(3):
                await trio.sleep(5)
                room = replace(room, pages=rng.choice((8, 9, 15)))
                rng.choice((admission.open, admission.change))(room)
                check()
        assert not admission._running and not admission._waiting and not admission._idle

    lab.run(main)
    assert served >= 25


def spread(nodes: list[NodeInfo], links: Links) -> Placement:
    edges = [6 * i // len(nodes) for i in range(len(nodes) + 1)]
    ranges = zip(nodes, edges, edges[1:], strict=False)
    return Placement(tuple(Assignment(node.label, a, b) for node, a, b in ranges), 4)


def prompt_of(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(n)]


def held(net: Any) -> list[int]:
    """Sessions open at each node."""
    return [len(node.stages[-1].sequences) for node in net.nodes.values()]


async def settled(net: Any) -> None:
    """Waits until no node holds a session. A Close may wait for the next heartbeat."""
    await trio.sleep(2)
    await trio.testing.wait_all_tasks_blocked()
    assert held(net) == [0] * len(net.nodes)


def failures(net: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what nodes refuse from now on."""
    from shoal.net.work import StageWork

    found: list[str] = []
    failed = StageWork._failed

    def noting(self: StageWork, session: int, error: Exception) -> Any:
        found.append(str(error))
        return failed(self, session, error)

    monkeypatch.setattr(StageWork, "_failed", noting)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 70])
@pytest.mark.parametrize("names", ["a", "abc"])
def test_more_prompts_than_there_is_room_for_wait_and_all_are_answered(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch, names: str, count: int
) -> None:
    """Twenty-four prompts of ten pages where one node has room for four; short answers, and answers up to the
    end of the context, which is sixteen."""
    order: list[int] = []

    async def main() -> None:
        async with lab.network() as net:
            for name in names:
                net.add(name, hop=lab.slow_hop(0.01), pages=40 if name == names[-1] else 55)
            async with net.coordinator(plan=spread, share_prefixes=False) as coordinator:
                refused = failures(net, monkeypatch)

                async def one(seed: int) -> None:
                    prompt = prompt_of(seed, 38)
                    async with coordinator.generate(prompt, SAMPLING, max_tokens=count) as tokens:
                        got = [await anext(tokens)]
                        order.append(seed)
                        got += [token async for token in tokens]
                    assert got == lab.oracle(prompt, count, SAMPLING)

                async with trio.open_nursery() as tasks:
                    for seed in range(24):
                        tasks.start_soon(one, seed)
                        await trio.sleep(0.001)
                assert refused == []
                await settled(net)
                assert net.nodes[7001].stages[0].most_open in ((4,) if count == 3 else (3, 4))

    lab.run(main)
    assert sorted(order) == list(range(24))
    if count == 3:
        assert all(abs(place - seed) < 4 for place, seed in enumerate(order))


def test_a_large_prompt_is_not_passed_over_by_later_small_ones(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01), pages=12)
            done: list[str] = []
            async with net.coordinator(plan=plan_at((0, 6), 4), share_prefixes=False) as coordinator:

                async def one(name: str, n: int, count: int) -> None:
                    prompt = prompt_of(n, n)
                    assert await lab.collect(coordinator, prompt, count) == lab.oracle(prompt, count)
                    done.append(name)

                async with trio.open_nursery() as tasks:
                    for name, n, count in (("first", 20, 8), ("second", 17, 2), ("large", 45, 2)):
                        tasks.start_soon(one, name, n, count)
                        await trio.sleep(0.001)
                    for i in range(30):
                        await trio.sleep(0.01)
                        tasks.start_soon(one, f"small {i}", 1, 3)
            assert done[:3] == ["second", "first", "large"]

    lab.run(main)


def test_the_youngest_is_set_aside_and_goes_on_with_the_same_tokens(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01))
            net.add("b", hop=lab.slow_hop(0.01), pages=16)
            ends: list[int] = []
            async with net.coordinator(plan=plan_at((0, 3, 6), 4), share_prefixes=False) as coordinator:
                refused = failures(net, monkeypatch)

                async def one(seed: int) -> None:
                    prompt = prompt_of(seed, 8)
                    got = await lab.collect(coordinator, prompt, 50, sampling=SAMPLING)
                    assert got == lab.oracle(prompt, 50, SAMPLING)
                    ends.append(seed)

                async with trio.open_nursery() as tasks:
                    for seed in range(3):
                        tasks.start_soon(one, seed)
                        await trio.sleep(0.001)
                assert ends == [0, 1, 2]
                assert refused == []
                # Each had to compute its prompt again, and opened a session for it, but the oldest.
                firsts = [
                    s for batch in net.nodes[7002].stages[0].batches for s, first, _ in batch if first == 0
                ]
                assert len(set(firsts)) >= 5 and firsts.count(min(firsts)) == 1
                await settled(net)

    lab.run(main)


def test_a_slow_reader_is_set_aside_while_it_reads_nothing(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", pages=16)
            async with net.coordinator(plan=plan_at((0, 6), 4), share_prefixes=False) as coordinator:
                prompts = prompt_of(1, 8), prompt_of(2, 20)
                async with coordinator.generate(prompts[0], max_tokens=50) as first:
                    got = [await anext(first)]
                    async with coordinator.generate(prompts[1], max_tokens=30) as second:
                        late = [await anext(second) for _ in range(3)]
                        got += [token async for token in first]
                        await trio.testing.wait_all_tasks_blocked()
                        assert held(net) == [0]  # the first is complete, and the second was set aside
                        late += [token async for token in second]
                assert got == lab.oracle(prompts[0], 50)
                assert late == lab.oracle(prompts[1], 30)

    lab.run(main)


def test_an_answer_that_is_complete_has_no_room_while_it_is_read(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", pages=4)
            async with net.coordinator(plan=plan_at((0, 6), 4), share_prefixes=False) as coordinator:
                async with coordinator.generate([5] * 9, max_tokens=5) as first:
                    got = [await anext(first)]
                    with trio.fail_after(5):
                        assert await lab.collect(coordinator, [6] * 9, 5) == lab.oracle([6] * 9, 5)
                    got += [token async for token in first]
                assert got == lab.oracle([5] * 9, 5)
                await settled(net)

    lab.run(main)


def test_a_failure_of_state_that_was_dropped_is_not_the_next_answers(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(1.0))
            async with net.coordinator(
                plan=plan_at((0, 6), 4), max_sessions=1, share_prefixes=False
            ) as coordinator:
                refused = failures(net, monkeypatch)
                async with coordinator.session() as session:
                    with trio.move_on_after(0.5):
                        async with session.answer([7] * 20, max_tokens=3) as tokens:
                            await anext(tokens)
                    net.nodes[7001].stages[0].room = 3
                    await trio.sleep(3)
                    assert refused
                    net.nodes[7001].stages[0].room = 100
                    assert await lab.collect(coordinator, [5] * 9, 5) == lab.oracle([5] * 9, 5)
                    async with session.answer([7] * 20, max_tokens=3) as tokens:
                        assert [token async for token in tokens] == lab.oracle([7] * 20, 3)

    lab.run(main)


def test_a_request_that_can_never_fit_is_refused_at_once_with_numbers(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01), pages=20)
            net.add("b", hop=lab.slow_hop(0.01), pages=12)
            async with net.coordinator(plan=plan_at((0, 3, 6), 4), share_prefixes=False) as coordinator:
                async with coordinator.generate([1] * 40, max_tokens=9) as running:  # all 48 positions
                    got = [await anext(running)]
                    start = trio.current_time()
                    for prompt, count, needed in ((40, 10, 49), (48, 2, 49), (1, 99, 64), (60, 99, 64)):
                        words = (
                            f"a prompt of {prompt} tokens and an answer of up to {needed - prompt + 1} needs "
                            f"keys and values for {needed} tokens, and b has room for 48: shorten the prompt"
                        )
                        with pytest.raises(ContextError, match=words):
                            await lab.collect(coordinator, [1] * prompt, count)
                    assert trio.current_time() == start
                    got += [token async for token in running]
                assert got == lab.oracle([1] * 40, 9)
                for prompt, count, context in ((48, 1, 64), (1, 48, 64), (1, 99, 48)):
                    expected = lab.oracle([1] * prompt, count, context=context)
                    assert await lab.collect(coordinator, [1] * prompt, count, context=context) == expected
                await settled(net)

    lab.run(main)


def test_a_cancelled_request_leaves_the_queue(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01), pages=12)
            done: list[str] = []
            async with net.coordinator(plan=plan_at((0, 6), 4), share_prefixes=False) as coordinator:

                async def one(name: str, n: int, count: int) -> None:
                    prompt = prompt_of(n, n)
                    assert await lab.collect(coordinator, prompt, count) == lab.oracle(prompt, count)
                    done.append(name)

                async with trio.open_nursery() as tasks:
                    tasks.start_soon(one, "first", 20, 29)  # 48 positions in the end
                    await trio.sleep(0.001)
                    large = trio.CancelScope()

                    async def wait() -> None:
                        with large:
                            await one("large", 40, 2)

                    tasks.start_soon(wait)
                    await trio.sleep(0.001)
                    tasks.start_soon(one, "small", 1, 3)
                    await trio.sleep(0.1)
                    assert done == []  # behind the large one
                    large.cancel()
                assert done == ["small", "first"]
                assert large.cancelled_caught
                await settled(net)

    lab.run(main)


def test_an_answer_that_is_left_while_it_is_set_aside_leaves_the_queue(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01), pages=16)
            async with net.coordinator(plan=plan_at((0, 6), 4), share_prefixes=False) as coordinator:
                async with (
                    coordinator.session() as kept,
                    coordinator.generate([5] * 8, max_tokens=50) as first,
                ):
                    got = [await anext(first)]
                    async with kept.answer([6] * 20, max_tokens=30) as second:
                        await anext(second)
                        got += [token async for token in first]
                    assert held(net) == [1]
                    assert got == lab.oracle([5] * 8, 50)
                    with trio.move_on_after(1) as patience:
                        await lab.collect(coordinator, [7] * 2, 3)
                    assert not patience.cancelled_caught
                    async with kept.answer([6], max_tokens=2) as again:
                        assert [token async for token in again] == lab.oracle([6], 2)
                await settled(net)

    lab.run(main)


def test_idle_state_goes_before_anyone_waits(lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", pages=16)
            net.add("b", pages=12)
            async with net.coordinator(plan=plan_at((0, 3, 6), 4), share_prefixes=False) as coordinator:
                refused = failures(net, monkeypatch)
                async with coordinator.session() as one, coordinator.session() as two:
                    for session in (one, two):
                        async with session.answer([3] * 13, max_tokens=4) as tokens:  # four pages
                            async for _ in tokens:
                                pass
                    await trio.testing.wait_all_tasks_blocked()
                    assert held(net) == [2, 2]
                    assert await lab.collect(coordinator, [5] * 20, 9) == lab.oracle([5] * 20, 9)
                    await trio.testing.wait_all_tasks_blocked()
                    assert held(net) == [1, 1]  # the first has been idle for longer
                    assert await lab.collect(coordinator, [5] * 40, 9) == lab.oracle([5] * 40, 9)
                    await trio.testing.wait_all_tasks_blocked()
                    assert held(net) == [0, 0]
                    async with one.answer([3] * 14, max_tokens=2) as tokens:
                        assert [token async for token in tokens] == lab.oracle([3] * 14, 2)
                assert refused == []
                await settled(net)

    lab.run(main)


@pytest.mark.slow
@pytest.mark.parametrize("room", [80, 100])
def test_nodes_that_have_less_room_than_they_say_are_asked_again(lab: ModuleType, room: int) -> None:
    """A node may say nothing of its room, or run out of memory before its promise is used up."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01))
            net.add("b", hop=lab.slow_hop(0.01), room=room, pages=None if room == 80 else 1000)
            async with net.coordinator(plan=plan_at((0, 3, 6), 4), share_prefixes=False) as coordinator:

                async def one(seed: int) -> None:
                    prompt, sampling = prompt_of(seed, 30), Sampling(temperature=0.9, seed=seed)
                    got = await lab.collect(coordinator, prompt, 30, sampling=sampling)
                    assert got == lab.oracle(prompt, 30, sampling)

                async with trio.open_nursery() as tasks:
                    for seed in range(12):
                        tasks.start_soon(one, seed)
                await settled(net)
                net.nodes[7002].stages[0].room = 30
                with pytest.raises(ContextError, match="have filled"):
                    await lab.collect(coordinator, prompt_of(1, 40), 5)

    lab.run(main)


def test_a_node_without_memory_fails_an_answer_and_stays(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences beyond the second find no memory in one node; one answer finds none at all."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01))
            net.add("b", hop=lab.slow_hop(0.01))
            async with net.coordinator(plan=plan_at((0, 3, 6), 4), share_prefixes=False) as coordinator:
                (stage,) = net.nodes[7002].stages
                enough, most = stage.run, 2

                def run(batch: Any) -> Any:
                    if len(stage.sequences) > most:
                        raise MemoryError
                    return enough(batch)

                monkeypatch.setattr(stage, "run", run)

                async def one(token: int) -> None:
                    assert await lab.collect(coordinator, [token] * 9, 5) == lab.oracle([token] * 9, 5)

                async with trio.open_nursery() as tasks:
                    for token in range(6):
                        tasks.start_soon(one, token)
                most = 0
                with pytest.raises(OperatingSystemError, match="the system had no memory for these rows"):
                    await lab.collect(coordinator, [13] * 9, 5)
                most = 2
                await one(7)
                assert coordinator.recoveries == 0
                assert len(net.nodes[7002].log) == 1  # that the coordinator has connected
                await settled(net)

    lab.run(main)


def test_a_chain_with_less_room_sets_aside_what_does_not_fit(lab: ModuleType) -> None:
    """The node that is left of two has room for one of three answers, and never for the one that has grown
    the most."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.01), pages=60)
            net.add("b", hop=lab.slow_hop(0.01), pages=13)
            failed: dict[int, str] = {}

            def large_first(nodes: list[NodeInfo], links: Links) -> Placement:
                return Placement((Assignment(nodes[0].label, 0, 6),), 4)

            async with net.coordinator(plan=large_first, share_prefixes=False) as coordinator:

                async def one(seed: int, n: int, count: int) -> None:
                    prompt = prompt_of(seed, n)
                    try:
                        assert await lab.collect(coordinator, prompt, count) == lab.oracle(prompt, count)
                    except ContextError as error:
                        failed[seed] = str(error)

                async with trio.open_nursery() as tasks:
                    for seed, n, count in ((0, 20, 20), (1, 58, 6), (2, 30, 20), (3, 4, 40), (4, 40, 99)):
                        tasks.start_soon(one, seed, n, count)
                    await trio.sleep(0.25)
                    await net.kill(7001)
                assert sorted(failed) == [1, 4]
                for text in failed.values():
                    assert "an answer that has grown to" in text and "b has room for 52" in text
                assert coordinator.recoveries == 1

    lab.run(main)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 60])
@pytest.mark.parametrize("shared", [0, 256])
def test_real_stages_answer_more_prompts_than_they_have_room_for(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, shared: int
) -> None:
    """24 prompts of 240 to 300 tokens, a page or two, where one stage has room for 7 pages. With `shared`,
    they begin alike, and share that."""
    convert(TINY, tmp_path / "model", dtype="int8")
    model = Model.open(tmp_path / "model")

    def page(first: int, last: int) -> int:
        states = [state for unit in model.program.units[first:last] for state in unit.states]
        return sum(page_bytes(state, model.kv_dtype) for state in states)

    def opener(pages: int) -> Callable[[int, int], Stage]:
        return lambda a, b: Stage(model, a, b, StageOptions(threads=1, kv_bytes=pages * page(a, b)))

    same = prompt_of(99, shared)
    prompts = [[*same, *prompt_of(seed, max(4, 240 + seed * 5 % 61 - shared))] for seed in range(24)]
    with Stage(model, 0, model.n_units) as stage:
        expected = [list(generate(stage, prompt, SAMPLING, max_tokens=count, end=())) for prompt in prompts]

    async def main() -> None:
        async with lab.network() as net:
            for name, pages in (("a", 9), ("b", 7)):
                net.add(name, open_stage=opener(pages), units=model.n_units)
            refused = failures(net, monkeypatch)
            options = CoordinatorOptions(
                hop=lab.inline, open_stream=net.open_stream, measure_links=False,
                share_prefixes=shared > 0,
            )  # fmt: skip
            async with Coordinator.open(
                [("host", port) for port in net.nodes],
                lab.identity("laptop", 99), shape_of(model), plan_at((0, 2, model.n_units), 8), options,
            ) as coordinator:  # fmt: skip
                found: list[list[int]] = [[] for _ in prompts]

                async def one(i: int) -> None:
                    found[i] = await lab.collect(coordinator, prompts[i], count, sampling=SAMPLING)

                async with trio.open_nursery() as tasks:
                    for i in range(len(prompts)):
                        tasks.start_soon(one, i)
                assert found == expected
                assert refused == []

    lab.run(main)
