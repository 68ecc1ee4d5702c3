"""Sessions whose tokens begin alike compute the beginning once on every stage, and give the same tokens."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import pytest
import trio
import trio.testing

from shoal.engine import sharing
from shoal.engine.batch import Sampling
from shoal.engine.sharing import Source, source_for
from shoal.net import chain, tags
from shoal.net.carry import KvReceiver
from shoal.net.connection import in_thread
from shoal.net.coordinator import Coordinator
from shoal.net.placement import Links, NodeInfo, Placement, plan_at
from shoal.net.tags import CHUNK
from shoal.net.work import Session
from shoal.planner import Assignment

SPREAD = plan_at((0, 2, 4, 6), 4)
PREFIX = [random.Random(1).randrange(97) for _ in range(30)]
LIVELY = Sampling(temperature=0.8, seed=5, presence_penalty=0.5)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the tests has a context of 64 tokens."""
    monkeypatch.setattr(sharing, "LEAST", 4)


@dataclass(eq=False)
class Held:
    tokens: list[int]
    held: int
    will_hold: int = 0


A, B = Held([1, 2, 3, 4, 5, 6, 7, 8, 9], 8), Held([1, 2, 3, 4, 5, 6, 7, 8, 20, 21], 5, 9)
WAITS = Held([*range(30)], 0, 29)
LESS = Held([*range(7)], 4, 6)


@pytest.mark.parametrize(
    ("tokens", "sessions", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [A], Source(A, 8)),
        ([1, 2, 3, 4, 5, 6], [A], Source(A, 5)),  # a row of its own remains
        ([1, 2, 3, 4, 6], [A], Source(A, 4)),
        ([1, 2, 3, 6, 7], [A], None),  # too little
        ([1, 2, 3, 4, 5, 6, 7, 8, 20, 21], [A, B], Source(A, 8)),  # one more is not waited for
        ([1, 2, 3, 4, 5, 6, 7, 8, 20, 21], [B], Source(B, 9, later=True)),
        ([1, 2, 3, 4, 5, 6, 7, 8], [A, B], Source(A, 7)),  # they hold as much, and A holds it now
        ([*range(30)], [A, WAITS], Source(WAITS, 29, later=True)),
        ([*range(30)], [Held([*range(30)], 0)], None),
        ([*range(7)], [LESS], Source(LESS, 4)),
        ([9], [A, B, WAITS], None),
    ],
)
def test_a_session_begins_with_the_most_that_another_holds(
    tokens: list[int], sessions: list[Held], expected: Source[Held] | None
) -> None:
    assert source_for(tokens, sessions) == expected


def rows(net: Any) -> list[int]:
    """Rows that each node has computed."""
    return [
        sum(n for stage in node.stages for batch in stage.batches for _, _, n in batch)
        for node in net.nodes.values()
    ]


def prompts(count: int, tail: int = 3) -> list[list[int]]:
    return [[*PREFIX, *(i + j for j in range(tail))] for i in range(count)]


async def ask(
    lab: ModuleType, coordinator: Coordinator, wanted: Sequence[Sequence[int]], tokens: int = 6, **how: Any
) -> list[list[int]]:
    """The answers to all prompts, asked at once; each is that of one process."""
    got: list[list[int]] = [[] for _ in wanted]

    async def one(i: int) -> None:
        got[i] = await lab.collect(coordinator, wanted[i], tokens, sampling=LIVELY, **how)

    async with trio.open_nursery() as tasks:
        for i in range(len(wanted)):
            tasks.start_soon(one, i)
    assert got == [lab.oracle(prompt, tokens, LIVELY) for prompt in wanted]
    return got


def scenario(lab: ModuleType, main: Any, *, plan: Any = SPREAD, pages: int | None = None, hop: float = 0.01,
             **options: Any) -> None:  # fmt: skip
    async def run() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(hop), pages=pages)
            async with net.coordinator(plan=plan, **options) as coordinator:
                await main(net, coordinator)

    lab.run(run)


@pytest.mark.parametrize("on", [True, False])
def test_requests_at_once_compute_their_prefix_once_on_every_stage(lab: ModuleType, on: bool) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        await ask(lab, coordinator, prompts(16), 4)
        own = 16 * (3 + 3)  # the last token is not run
        assert rows(net) == [own + (30 if on else 16 * 30)] * 3
        if on:
            assert all(node.stages[-1].most_pages <= 7 + 16 * 3 + 16 for node in net.nodes.values())

    scenario(lab, main, share_prefixes=on)


def test_draws_from_one_prompt_compute_it_once(lab: ModuleType) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        got: dict[int, list[int]] = {}

        async def draw(seed: int) -> None:
            got[seed] = await lab.collect(
                coordinator, PREFIX, 4, sampling=Sampling(temperature=1.0, seed=seed)
            )

        async with trio.open_nursery() as tasks:
            for seed in range(8):
                tasks.start_soon(draw, seed)
        for seed, tokens in got.items():
            assert tokens == lab.oracle(PREFIX, 4, Sampling(temperature=1.0, seed=seed))
        assert rows(net) == [30 + 7 + 8 * 3] * 3

    scenario(lab, main)


def test_a_chat_in_requests_of_their_own_computes_what_is_new(lab: ModuleType) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        known, before = PREFIX[:20], [0, 0, 0]
        for turn in range(6):
            prompt = [*known, turn, 90]
            known = prompt + (await ask(lab, coordinator, [prompt], 3))[0]
            new = [b - a for a, b in zip(before, rows(net), strict=True)]
            assert new == [20 + 2 + 2 if turn == 0 else 1 + 2 + 2] * 3
            before = rows(net)

    scenario(lab, main)


@pytest.mark.parametrize("rests", [True, False])
def test_an_answer_that_is_left_leaves_its_state_if_told_to(lab: ModuleType, rests: bool) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        for turn in range(3):  # the next one replaces what this one holds
            async with coordinator.generate([*PREFIX, 1], LIVELY, max_tokens=30) as tokens:
                for _ in range(turn + 1):
                    await anext(tokens)
                if rests:
                    tokens.rest()
        await trio.sleep(1)  # rows that were on their way
        assert [len(node.stages[-1].sequences) for node in net.nodes.values()] == [1 if rests else 0] * 3
        before = rows(net)
        await ask(lab, coordinator, [[*PREFIX, 1]], 4)
        assert [b - a for a, b in zip(before, rows(net), strict=True)] == [4 if rests else 34] * 3

    scenario(lab, main)


@pytest.mark.parametrize("pages", [16, 17, 20, 30])
def test_little_room_holds_many_that_share(lab: ModuleType, pages: int) -> None:
    """Eight pages hold the prefix: without sharing only one of ten requests fits at a time."""

    async def main(net: Any, coordinator: Coordinator) -> None:
        await ask(lab, coordinator, prompts(10), 12)
        await ask(lab, coordinator, [[7] * 40, *prompts(4), [8] * 40], 12)
        for node in net.nodes.values():
            assert len(node.stages) == 1 and node.stages[0].most_pages <= pages
            assert not node.stages[0].refused
            assert node.stages[0].most_open >= (2 if pages == 16 else 3)

    scenario(lab, main, pages=pages)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_asked_tokens_are_right_and_the_room_suffices(lab: ModuleType, seed: int) -> None:
    """Requests and chats that begin alike, are left, go back and come again, where there is little room."""
    rng = random.Random(seed)
    pages = rng.choice((16, 18, 24, 40))

    def some() -> list[int]:
        cut = rng.choice((0, 5, 12, 20, 30))
        return [*PREFIX[:cut], *(rng.randrange(3) for _ in range(rng.randint(1, 8)))]

    async def main(net: Any, coordinator: Coordinator) -> None:
        async def request(turns: Iterator[list[int]]) -> None:
            for prompt in turns:
                await trio.sleep(rng.random() / 4)
                with trio.move_on_after(rng.choice((0.05, 0.2, 1e9))):
                    tokens = rng.randint(1, 12)
                    assert await lab.collect(coordinator, prompt, tokens, sampling=LIVELY) == lab.oracle(
                        prompt, tokens, LIVELY
                    )

        async def chat() -> None:
            async with coordinator.session(LIVELY) as session:
                for _ in range(4):
                    await trio.sleep(rng.random() / 4)
                    prompt = some()
                    with trio.move_on_after(rng.choice((0.1, 1e9))):
                        async with session.answer(prompt, max_tokens=9) as tokens:
                            assert [t async for t in tokens] == lab.oracle(prompt, 9, LIVELY)

        async with trio.open_nursery() as tasks:
            for _ in range(6):
                tasks.start_soon(request, iter([some() for _ in range(4)]))
            for _ in range(2):
                tasks.start_soon(chat)
        await trio.sleep(1)  # what was closed last is closed everywhere
        for node in net.nodes.values():
            assert node.stages[0].most_pages <= pages and not node.stages[0].refused
            assert len(node.stages[0].sequences) == len(coordinator._epochs.chain.sessions)

    scenario(lab, main, pages=pages, max_sessions=rng.choice((3, 32)))


def test_state_that_is_kept_can_be_freed(lab: ModuleType) -> None:
    """A chat whose state is freed computes it again."""

    async def main(net: Any, coordinator: Coordinator) -> None:
        def open_sessions() -> list[int]:
            return [len(node.stages[0].sequences) for node in net.nodes.values()]

        async with coordinator.session(LIVELY) as chat:
            for prompt in ([5] * 15, [5] * 15 + [6]):
                await lab.collect(coordinator, [7] * 30, 4, sampling=LIVELY)
                async with chat.answer(prompt, max_tokens=4) as tokens:
                    assert [t async for t in tokens] == lab.oracle(prompt, 4, LIVELY)
                assert min(open_sessions()) > 1
                coordinator.free_idle()
                await trio.sleep(1)
                assert set(open_sessions()) == {0}
                assert not coordinator._epochs.chain.sessions

    scenario(lab, main)


def test_state_that_is_kept_for_others_takes_half_of_the_room(lab: ModuleType) -> None:
    """The longest idle is closed, and what two share counts once. A chat keeps its state."""

    async def main(net: Any, coordinator: Coordinator) -> None:
        def open_sessions() -> int:
            return len(net.nodes[7001].stages[0].sequences)

        async with coordinator.session(LIVELY) as chat:
            async with chat.answer([5] * 15, max_tokens=1) as tokens:  # four pages
                assert len([t async for t in tokens]) == 1
            for first in (1, 2, 3, 4):
                await ask(lab, coordinator, [[first] * 20], 1)  # five pages each, of 32
            await trio.sleep(1)
            assert open_sessions() == 1 + 3
            assert coordinator._admission.positions == (4 + 3 * 5) * lab.PAGE
            await ask(lab, coordinator, [[4] * 16 + [1, 1, 1]], 1)  # a page more
            await trio.sleep(1)
            assert open_sessions() == 1 + 4
            assert coordinator._admission.positions == (4 + 3 * 5 + 1) * lab.PAGE
            async with chat.answer([5] * 15 + [6], max_tokens=1) as tokens:
                assert [t async for t in tokens] == lab.oracle([5] * 15 + [6], 1, LIVELY)
        assert rows(net) == [15 + 4 * 20 + 3 + 1] * 3

    scenario(lab, main, pages=32)


def test_a_session_that_a_node_cannot_begin_with_another_is_computed_anew(lab: ModuleType) -> None:
    """The node says that it cannot begin with it, and the answer goes on without."""

    async def main(net: Any, coordinator: Coordinator) -> None:
        def lost(*where: object) -> None:
            raise ValueError("the session is not open here")

        await ask(lab, coordinator, [PREFIX], 2)
        net.nodes[7002].stages[0].fork_sequence = lost
        before = rows(net)
        await ask(lab, coordinator, [[*PREFIX, 4]], 2)
        new = [b - a for a, b in zip(before, rows(net), strict=True)]
        assert new[1:] == [30 + 1 + 1] * 2 and new[0] >= 32

    scenario(lab, main)


def test_requests_wait_for_one_that_is_left_and_then_compute_by_themselves(lab: ModuleType) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        async def leaver() -> None:
            with trio.move_on_after(0.5):
                await lab.collect(coordinator, PREFIX, 9)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(leaver)
            await trio.sleep(0.1)
            await ask(lab, coordinator, prompts(3), 3)

    scenario(lab, main, hop=0.2)


# --- moves and deaths


def stages(text: str) -> list[Assignment]:
    """Stages as "a3 c5 b6": up to which unit each node holds them."""
    words = text.split()
    edges = [0, *(int(word[1:]) for word in words)]
    return [Assignment(w[0], a, b) for w, a, b in zip(words, edges, edges[1:], strict=False)]


async def until(condition: Callable[[], bool]) -> None:
    """Waits, for a virtual minute at most."""
    for _ in range(6000):
        if condition():
            return
        await trio.sleep(0.01)
    raise AssertionError("it has not happened within a minute")


def equal(nodes: Sequence[NodeInfo], links: Links) -> Placement:
    """As equal as can be over whoever is there."""
    edges = [6 * i // len(nodes) for i in range(len(nodes) + 1)]
    ranges = zip(nodes, edges, edges[1:], strict=False)
    return Placement(tuple(Assignment(node.label, a, b) for node, a, b in ranges), 4)


@pytest.mark.parametrize("after", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("new", ["a1 b4 c6", "a3 b4 c6", "a1 b3 c6", "a3 c6", "b3 d6", "d6", "c2 b4 a6"])
def test_sessions_share_after_a_move_what_they_shared_before(
    lab: ModuleType, new: str, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix travels once, and the room suffices to the end. Twenty pages do not hold two of the answers
    without sharing."""
    monkeypatch.setattr(tags, "CHUNK", 4)
    monkeypatch.setattr(chain, "WHOLE", 4)

    async def main() -> None:
        async with lab.network() as net:
            for name in "abcd":
                net.add(name, hop=lab.slow_hop(0.01), pages=40)
            plan = lambda nodes, links: Placement(tuple(stages("a2 b4 c6")), 4)  # noqa: E731
            async with net.coordinator(plan=plan) as coordinator, trio.open_nursery() as tasks:
                tasks.start_soon(partial(ask, lab, coordinator, prompts(6), 20))
                await trio.sleep(after)
                before = [stage for node in net.nodes.values() for stage in node.stages]
                coordinator.move(stages(new), "it is a test")
                await until(lambda: bool(coordinator.moves))
                assert not coordinator.moves[0].aborted, coordinator.moves[0].moved
                await ask(lab, coordinator, prompts(2), 3)
            sent = [cut for stage in before for cut in stage.exported]
            if after >= 1.0:  # all six have begun
                assert sum(first < 28 for _, _, first, _ in sent) <= 7 * 5
            for stage in (stage for node in net.nodes.values() for stage in node.stages):
                assert stage.most_pages <= 40 and not stage.refused

    lab.run(main)


@pytest.mark.parametrize("pages", [20, 40, 100])
@pytest.mark.parametrize("port", [7001, 7002, 7003])
@pytest.mark.parametrize("after", [0.5, 0.9])
def test_tokens_and_the_room_are_right_after_a_death(
    lab: ModuleType, port: int, after: float, pages: int
) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(partial(ask, lab, coordinator, prompts(6), 20))
            await trio.sleep(after)
            await net.kill(port)
        assert coordinator.recoveries == 1
        await ask(lab, coordinator, prompts(3), 3)
        for node in net.nodes.values():
            assert not node.up or not node.stages[-1].refused

    scenario(lab, main, plan=equal, pages=pages)


def test_state_that_is_kept_for_others_is_freed_by_a_death(lab: ModuleType) -> None:
    async def main(net: Any, coordinator: Coordinator) -> None:
        async with coordinator.session(LIVELY) as chat:
            async with chat.answer(PREFIX[:9], max_tokens=3) as tokens:
                assert [t async for t in tokens] == lab.oracle(PREFIX[:9], 3, LIVELY)
            await ask(lab, coordinator, [[9, *PREFIX]], 2)
            await net.kill(7002)
            await trio.sleep(1)
            assert [len(net.nodes[port].stages[-1].sequences) for port in (7001, 7003)] == [1, 1]
            await ask(lab, coordinator, [[9, *PREFIX]], 2)
            async with chat.answer([*PREFIX[:9], 4], max_tokens=3) as tokens:
                assert [t async for t in tokens] == lab.oracle([*PREFIX[:9], 4], 3, LIVELY)

    scenario(lab, main, plan=equal)


def test_a_session_that_has_ended_since_it_was_sent_is_compared_with_none() -> None:
    """What two sessions share is checked when layers have moved, and one of them may be gone by then."""

    class Incoming:
        def alike(self, session: int) -> dict[int, int]:
            return {8: 2 * CHUNK} if session == 7 else {7: 2 * CHUNK}

    def session(*tags: int) -> Session:
        return Session(512, len(tags) * CHUNK, array("Q", tags))

    taker = KvReceiver(cast("Any", Incoming()), in_thread, history=False)
    taker.check_alike({7: session(1, 2)}, {7: 2 * CHUNK})
    taker.check_alike({7: session(1, 2), 8: session(1, 3)}, {7: 2 * CHUNK, 8: CHUNK})
    with pytest.raises(ValueError, match="share positions of other tokens"):
        taker.check_alike({7: session(1, 2), 8: session(1, 3)}, {7: 2 * CHUNK, 8: 2 * CHUNK})
