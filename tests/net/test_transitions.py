"""Layers move between nodes while answers are computed. The coordinator of these tests is moved by hand: it
sends orders and rows, and the tokens that return are those of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from shoal.engine.batch import Sampling, Want
from shoal.net import carry
from shoal.net.connection import Connection, dial
from shoal.net.errors import NetError
from shoal.net.messages import (
    Abort,
    Assign,
    Broken,
    Close,
    Commit,
    Epoch,
    Failed,
    Gift,
    Kept,
    Loaded,
    Open,
    Prepared,
    Refill,
    Result,
    Step,
    Take,
)

ME = 99
Kind = TypeVar("Kind")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that contexts of these tests fill."""
    monkeypatch.setattr(carry, "CHUNK", 4)


Place = tuple[int, int, int]
"""A stage: the port of its node, and its units [first, last)."""


@dataclass
class Hand:
    """A coordinator moved by hand: connections to the nodes, the stages in force, and what each session has
    computed."""

    lab: ModuleType
    net: Any
    controls: dict[int, Connection]
    down: AsyncExitStack
    """It closes the connection to the first node."""
    counter: int = 0
    newest: int = 0
    """The counter of the epoch that was assigned last; it may have been given up."""
    places: list[Place] = field(default_factory=list)
    steps: Connection | None = None
    known: dict[int, list[int]] = field(default_factory=dict)
    samplings: dict[int, Sampling] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    loaded: dict[int, Loaded] = field(default_factory=dict)

    @property
    def epoch(self) -> Epoch:
        return Epoch(5, self.counter)

    def stage(self, port: int) -> Any:
        """The newest stage of a node."""
        return self.net.nodes[port].stages[-1]

    def assigns(
        self, places: Sequence[Place], *, base: bool, history: Sequence[int] = ()
    ) -> dict[int, Assign]:
        """The orders for the next epoch, by port, to those that have or get units. Nodes in `history` are
        told tokens."""
        self.newest += 1
        epoch, old = Epoch(5, self.newest), {port: range(a, b) for port, a, b in self.places}
        new = {port: range(a, b) for port, a, b in places}
        following = {a: port for port, a, _ in places}
        orders = {}
        for port in new if not base else new | old:
            mine, before = new.get(port, range(0)), old.get(port, range(0))
            gives = [
                Gift(self.net.peer(other), both.start, both.stop, other in history)
                for other, theirs in new.items()
                if other != port and (both := common(before, theirs))
            ]
            takes = [
                Take(other, both.start, both.stop)
                for other, theirs in old.items()
                if other != port and (both := common(mine, theirs))
            ]
            last = mine.stop in (0, self.lab.UNITS)
            before_me = [other for other, units in new.items() if units.stop == mine.start and mine]
            orders[port] = Assign(
                epoch, mine.start, mine.stop,
                None if last else self.net.peer(following[mine.stop]),
                8, ME if mine.start == 0 else before_me[0],
                base=self.counter if base else None,
                gives=tuple(gives) if base else (), takes=tuple(takes) if base else (),
            )  # fmt: skip
        return orders

    async def load(self, *places: Place) -> None:
        """An epoch without a base."""
        for port, assign in self.assigns(places, base=False).items():
            await self.controls[port].send(assign)
        self.counter = self.newest
        await self.serve(places)

    async def serve(self, places: Sequence[Place]) -> None:
        """All have loaded: rows of the epoch go to the first of them."""
        for port, _, _ in places:
            self.loaded[port] = await self.hear(port, Loaded)
            assert self.loaded[port].epoch == self.epoch
        self.places = list(places)
        await self.down.aclose()
        self.steps = await self.down.enter_async_context(connected(self.lab, self.net, places[0][0], "step"))

    async def prepare(self, *places: Place, history: Sequence[int] = ()) -> set[int]:
        """Orders a transition, and waits until it is prepared; returns the ports that take part."""
        orders = self.assigns(places, base=True, history=history)
        for port, assign in orders.items():
            await self.controls[port].send(assign)
        for port in orders:
            assert (await self.hear(port, Prepared)).epoch == Epoch(5, self.newest)
        return set(orders)

    async def hear(self, port: int, kind: type[Kind]) -> Kind:
        """The next report of a node, but for Prepared of transitions that were given up."""
        while True:
            report = await self.controls[port].receive()
            if isinstance(report, kind):
                return report
            assert isinstance(report, Prepared) and report.epoch < Epoch(5, self.newest)

    async def abort(self, ports: Iterable[int]) -> None:
        """Gives the transition up."""
        for port in ports:
            await self.controls[port].send(Abort(Epoch(5, self.newest)))
        self.newest += 1

    async def commit(self, ports: set[int], *places: Place, lost: tuple[int, int] = (0, 0)) -> None:
        """Changes to what is prepared."""
        self.counter = self.newest
        kept = tuple(Kept(session, positions) for session, positions in self.positions.items())
        for port in ports:
            await self.controls[port].send(Commit(self.epoch, kept, *lost))
        for port in ports - {place[0] for place in places}:
            assert (await self.hear(port, Loaded)).room is None
        await self.serve(places)

    async def move(self, *places: Place, history: Sequence[int] = ()) -> None:
        await self.commit(await self.prepare(*places, history=history), *places)

    async def open(self, session: int, *prompt: int, seed: int = 0) -> None:
        """Opens a session and reads its prompt."""
        sampling = self.samplings[session] = Sampling(seed=seed)
        assert self.steps is not None
        await self.steps.send(Open(session, self.epoch, sampling, self.lab.CONTEXT))
        self.known[session], self.positions[session] = list(prompt), 0
        await self.step(session)

    async def step(self, session: int, count: int = 1) -> None:
        """Computes the next `count` tokens of a session."""
        assert self.steps is not None
        for _ in range(count):
            first, known = self.positions[session], self.known[session]
            await self.steps.send(Step(session, self.epoch, first, tuple(known[first:]), Want.TOKEN))
            result = await self.hear(self.places[-1][0], Result)
            assert (result.session, result.epoch, result.first) == (session, self.epoch, first)
            assert result.token is not None
            self.positions[session] = len(known)
            known.append(result.token)

    async def rewind(self, session: int, positions: int, *tokens: int) -> None:
        """Goes back to a position, and on with other tokens."""
        self.known[session][positions:] = tokens
        self.positions[session] = positions
        await self.step(session)

    async def close(self, session: int) -> None:
        assert self.steps is not None
        await self.steps.send(Close(session, self.epoch))
        for part in (self.known, self.samplings, self.positions):
            part.pop(session)

    def check(self, **prompts: int) -> None:
        """The tokens after each prompt of so many tokens are those of one process."""
        assert {int(session[1:]) for session in prompts} == self.known.keys()
        for name, length in prompts.items():
            known = self.known[int(name[1:])]
            expected = self.lab.oracle(known[:length], len(known) - length, self.samplings[int(name[1:])])
            assert known[length:] == expected

    def ran(self) -> int:
        """How many rows of all units the nodes have run so far."""
        return sum(
            rows for node in self.net.nodes.values() for stage in node.stages for batch in stage.batches
            for _, _, rows in batch
        )  # fmt: skip


def common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


@asynccontextmanager
async def connected(
    lab: ModuleType, net: Any, port: int, purpose: str, number: int = ME
) -> AsyncIterator[Connection]:
    me, peer = lab.identity("laptop", number), net.peer(port)
    async with dial(net.open_stream, "host", port, me, purpose, seconds=5, peer=peer) as (connection, _):  # type: ignore[arg-type]
        yield connection


def with_nodes(lab: ModuleType, test: Callable[[Hand], Awaitable[None]], *names: str, **changes: Any) -> None:
    """Runs a test with nodes of these names, at ports from 7001 on."""

    async def main() -> None:
        async with lab.network() as net, AsyncExitStack() as stack, AsyncExitStack() as down:
            controls = {}
            for name in names or ("a", "b"):
                _, port = net.add(name, **changes)
                controls[port] = await stack.enter_async_context(connected(lab, net, port, "control"))
            await test(Hand(lab, net, controls, down))

    lab.run(main)


BOUNDARIES = [
    ((0, 3, 6), (0, 4, 6)),
    ((0, 3, 6), (0, 1, 6)),
    ((0, 2, 4, 6), (0, 1, 5, 6)),
    ((0, 2, 4, 6), (0, 4, 5, 6)),
]


def places(edges: Sequence[int]) -> list[Place]:
    return [(7001 + i, a, b) for i, (a, b) in enumerate(pairwise(edges))]


@pytest.mark.parametrize(("old", "new"), [*BOUNDARIES, *((new, old) for old, new in BOUNDARIES)])
def test_boundaries_move_in_mid_answer_and_nothing_is_computed_again(
    lab: ModuleType, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places(old))
        await hand.open(1, 5, 6, 7, 8, 9, 10)
        await hand.open(2, 11, seed=3)
        await hand.step(1, 5)
        await hand.step(2, 2)
        rows = hand.ran()
        await hand.move(*places(new))
        await hand.step(2, 6)
        await hand.step(1, 6)
        hand.check(s1=6, s2=1)
        assert hand.ran() - rows == 12 * (len(new) - 1)
        for port, first, last in places(new):
            (stage,) = hand.net.nodes[port].stages
            assert (stage.first, stage.last, stage.prepared) == (first, last, [])
            assert all(staged.closed for staged in stage.staged)

    with_nodes(lab, test, *"abc"[: len(old) - 1])


def test_answers_go_on_while_a_transition_is_prepared(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, 5, 6, 7, 8, 9)
        ports = await hand.prepare(*places((0, 5, 6)))
        await hand.step(1, 9)
        await hand.open(2, 9, 9, 9, 9, 9, 9)
        await trio.sleep(1)
        await hand.step(2, 3)
        await hand.commit(ports, *places((0, 5, 6)))
        await hand.step(1, 9)
        await hand.step(2, 9)
        hand.check(s1=5, s2=6)

    with_nodes(lab, test)


def test_finished_chunks_are_sent_ahead_and_once(lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int, int, int]] = []
    export = lab.FakeStage.export_positions

    def noted(stage: Any, sequence: int, unit: int, first: int, last: int) -> bytes:
        sent.append((sequence, unit, first, last))
        return export(stage, sequence, unit, first, last)  # type: ignore[no-any-return]

    monkeypatch.setattr(lab.FakeStage, "export_positions", noted)

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(10))
        ports = await hand.prepare(*places((0, 2, 6)))
        assert sent == [(1, 2, 0, 4), (1, 2, 4, 8)]
        await hand.step(1, 3)
        await trio.sleep(1)
        assert sent[2:] == [(1, 2, 8, 12)]
        await hand.commit(ports, *places((0, 2, 6)))
        assert sent[3:] == [(1, 2, 12, 13)]

    with_nodes(lab, test)


@pytest.mark.parametrize("back", [1, 3, 4, 7, 9])
@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_positions_that_a_session_has_gone_back_over_are_sent_again(
    lab: ModuleType, back: int, pause: float
) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(11))
        ports = await hand.prepare(*places((0, 2, 6)))
        await hand.rewind(1, back, *(50 + i for i in range(12 - back)))
        await trio.sleep(pause)
        await hand.step(1, 2)
        await hand.commit(ports, *places((0, 2, 6)))
        await hand.step(1, 5)
        hand.check(s1=12)

    with_nodes(lab, test)


def test_idle_sessions_move_and_closed_ones_end(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        for session in (1, 2, 3):
            await hand.open(session, *range(session, session + 6))
        ports = await hand.prepare(*places((0, 4, 6)))
        await hand.close(2)
        await hand.commit(ports, *places((0, 4, 6)))
        assert [set(hand.stage(port).sequences) for port in (7001, 7002)] == [{1, 3}, {1, 3}]
        await hand.step(1, 4)
        await hand.move(*places((0, 3, 6)))
        await hand.step(3, 4)
        hand.check(s1=6, s3=6)

    with_nodes(lab, test)


def test_a_session_is_cut_to_the_positions_of_the_commit(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(7))
        await hand.step(1, 6)
        ports = await hand.prepare(*places((0, 4, 6)))
        hand.positions[1], hand.known[1] = 6, hand.known[1][:7]
        await hand.commit(ports, *places((0, 4, 6)))
        await hand.step(1, 6)
        hand.check(s1=7)

    with_nodes(lab, test)


@pytest.mark.parametrize("when", ["at once", "prepared"])
def test_abort_leaves_everything_as_it_was(lab: ModuleType, when: str) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(6))
        doors = [hand.net.nodes[port].node._door for port in hand.controls]
        before = [len(door._guests) for door in doors]
        for edges in ((0, 4, 6), (0, 2, 6), (0, 3, 6)):
            if when == "prepared":
                await hand.prepare(*places(edges))
                await hand.step(1, 2)
            else:
                for port, assign in hand.assigns(places(edges), base=True).items():
                    await hand.controls[port].send(assign)
            await hand.abort(hand.controls)
            await hand.step(1, 2)
            await trio.testing.wait_all_tasks_blocked()
            for port, first, last in places((0, 3, 6)):
                (stage,) = hand.net.nodes[port].stages
                assert (stage.first, stage.last, stage.prepared) == (first, last, [])
                assert all(staged.closed for staged in stage.staged)
                assert set(stage.sequences) == {1}
            assert [len(door._guests) for door in doors] == before
        await hand.move(*places((0, 4, 6)))
        await hand.step(1, 3)
        hand.check(s1=6)

    with_nodes(lab, test)


JOINS = [((0, 3, 6), (0, 2, 4, 6)), ((0, 3, 6), (0, 3, 5, 6)), ((0, 6), (0, 1, 3, 6))]


@pytest.mark.parametrize(("old", "new"), JOINS)
def test_a_node_joins_in_mid_answer(lab: ModuleType, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places(old))
        await hand.open(1, *range(9), seed=4)
        await hand.open(2, 3)
        await hand.step(2, 2)
        newcomers = range(7000 + len(old), 7000 + len(new))
        ports = await hand.prepare(*places(new), history=newcomers)
        await hand.step(1, 6)
        await hand.rewind(2, 1, 8, 9)
        rows = hand.ran()
        await hand.commit(ports, *places(new))
        await hand.step(1, 4)
        await hand.step(2, 4)
        hand.check(s1=9, s2=3)
        assert hand.ran() - rows == 8 * len(newcomers) + 8 * (len(old) - 1)
        await hand.rewind(1, 3, 7)
        hand.check(s1=4, s2=3)

    with_nodes(lab, test, *"abc")


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_node_is_emptied_and_used_again(lab: ModuleType, empty: int) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 2, 4, 6)))
        await hand.open(1, *range(9))
        first, second = [port for port in (7001, 7002, 7003) if port != 7001 + empty]
        await hand.move((first, 0, 3), (second, 3, 6))
        await hand.step(1, 5)
        assert hand.stage(7001 + empty).closed
        assert not hand.net.nodes[7001 + empty].node._door._guests
        await hand.move(*places((0, 2, 4, 6)), history=[7001 + empty])
        await hand.step(1, 5)
        hand.check(s1=9)

    with_nodes(lab, test, *"abc")


def test_nodes_may_change_their_order(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load((7001, 0, 2), (7002, 2, 5), (7003, 5, 6))
        await hand.open(1, *range(9))
        await hand.move((7002, 0, 3), (7003, 3, 4), (7001, 4, 6))
        await hand.step(1, 5)
        await hand.move((7003, 0, 2), (7001, 2, 3), (7002, 3, 6))
        await hand.step(1, 5)
        hand.check(s1=9)

    with_nodes(lab, test, *"abc")


def test_a_stage_stands_when_its_next_node_is_lost_and_only_lost_units_are_computed_again(
    lab: ModuleType,
) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 2, 4, 6)))
        await hand.open(1, *range(9))
        await hand.open(2, 5)
        await hand.net.kill(7002)
        broken = await hand.hear(7001, Broken)
        assert (broken.epoch, broken.peer) == (hand.epoch, 7002)
        hand.places = [(7001, 0, 2), (7003, 4, 6)]  # nobody gives units 2 and 3
        ports = await hand.prepare((7001, 0, 3), (7003, 3, 6))
        await hand.commit(ports, (7001, 0, 3), (7003, 3, 6), lost=(2, 4))
        assert hand.steps is not None
        for session, sampling in hand.samplings.items():
            await hand.steps.send(Open(session, hand.epoch, sampling, lab.CONTEXT))
        for first, last in ((0, 4), (4, 9)):
            part = Step(1, hand.epoch, first, tuple(hand.known[1][first:last]), Want.NOTHING, part=(0, 4))
            await hand.steps.send(part)
            assert await hand.hear(7003, Result) == Result(1, hand.epoch, first, last - first, None)
        await hand.steps.send(Step(2, hand.epoch, 0, (5,), Want.NOTHING, part=(0, 4)))
        await hand.hear(7003, Result)
        await hand.step(1, 5)
        await hand.step(2, 5)
        hand.check(s1=9, s2=1)

    with_nodes(lab, test, *"abc")


AFTER_A_LOSS = [
    ((7001, 0, 2), (7003, 2, 6)),
    ((7001, 0, 4), (7003, 4, 6)),
    ((7001, 0, 3), (7003, 3, 6)),
    ((7001, 0, 5), (7003, 5, 6)),
]


async def lose_the_second_of_three(hand: Hand, after: Sequence[Place]) -> None:
    """Units 2 and 3 are lost; two sessions have a part of an answer."""
    await hand.load(*places((0, 2, 4, 6)))
    await hand.open(1, *range(9))
    await hand.step(1, 3)
    await hand.rewind(1, 7, *range(40, 53))
    await hand.open(2, 5, seed=3)
    await hand.net.kill(7002)
    await hand.hear(7001, Broken)
    hand.places = [(7001, 0, 2), (7003, 4, 6)]
    ports = await hand.prepare(*after)
    await hand.commit(ports, *after, lost=(2, 4))
    assert hand.steps is not None
    for session, sampling in hand.samplings.items():
        await hand.steps.send(Open(session, hand.epoch, sampling, hand.lab.CONTEXT))


@pytest.mark.parametrize("after", AFTER_A_LOSS)
@pytest.mark.parametrize("cut", [20, 11, 1])
def test_lost_units_are_filled_from_kept_rows(lab: ModuleType, after: Sequence[Place], cut: int) -> None:
    """All rows or the first `cut` of them, and Steps for the others. No other unit is computed again."""

    async def test(hand: Hand) -> None:
        await lose_the_second_of_three(hand, after)
        assert hand.loaded[7001].rows == (Kept(1, 20), Kept(2, 1))
        filler = next(port for port, first, last in after if first < 4 <= last)
        units = [
            stage for port, first, last in after for stage in [hand.stage(port)] if first < 4 and last > 2
        ]
        before = [len(stage.batches) for stage in units]
        await hand.controls[7001].send(Refill(1, hand.epoch, 0, cut, 2, 4))
        done = 0
        while done < cut:
            result = await hand.hear(filler, Result)
            assert (result.session, result.first, result.token) == (1, done, None)
            done += result.rows
        for stage, n in zip(units, before, strict=True):
            assert sum(rows for batch in stage.batches[n:] for _, _, rows in batch) == cut
        assert hand.steps is not None
        if cut < 20:
            tokens = tuple(hand.known[1][cut:20])
            await hand.steps.send(Step(1, hand.epoch, cut, tokens, Want.NOTHING, part=(0, 4)))
            assert (await hand.hear(filler, Result)).rows == 20 - cut
        await hand.controls[7001].send(Refill(2, hand.epoch, 0, 1, 2, 4))
        assert await hand.hear(filler, Result) == Result(2, hand.epoch, 0, 1, None)
        await hand.step(1, 5)
        await hand.step(2, 5)
        hand.check(s1=20, s2=1)

    with_nodes(lab, test, *"abc")


def test_kept_rows_serve_a_second_loss(lab: ModuleType) -> None:
    """Of a session that was filled, and of one that began after the first loss."""

    async def test(hand: Hand) -> None:
        await lose_the_second_of_three(hand, ((7001, 0, 4), (7003, 4, 6)))
        for session, positions in hand.positions.items():
            await hand.controls[7001].send(Refill(session, hand.epoch, 0, positions, 2, 4))
            done = 0
            while done < positions:
                done += (await hand.hear(7001, Result)).rows
        await hand.step(1, 2)
        await hand.open(3, 8, 9)
        await hand.net.kill(7003)
        await hand.hear(7001, Broken)
        hand.places = [(7001, 0, 4)]
        ports = await hand.prepare((7001, 0, 6))
        await hand.commit(ports, (7001, 0, 6), lost=(4, 6))
        assert hand.loaded[7001].rows == (Kept(1, 22), Kept(2, 1), Kept(3, 2))
        for session, positions in hand.positions.items():
            await hand.controls[7001].send(Refill(session, hand.epoch, 0, positions, 4, 6))
            done = 0
            while done < positions:
                done += (await hand.hear(7001, Result)).rows
            await hand.step(session, 3)
        hand.check(s1=20, s2=1, s3=2)

    with_nodes(lab, test, *"abc")


def test_rows_that_were_dropped_meanwhile_end_the_session_alone(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await lose_the_second_of_three(hand, ((7001, 0, 2), (7003, 2, 6)))
        del hand.stage(7001).kept[1]
        await hand.controls[7001].send(Refill(1, hand.epoch, 0, 20, 2, 4))
        failed = await hand.hear(7001, Failed)
        assert failed.session == 1 and "are not kept" in failed.text
        await hand.controls[7001].send(Refill(1, hand.epoch, 0, 20, 2, 4))  # it is gone: nothing happens
        await hand.controls[7001].send(Refill(2, Epoch(5, 1), 0, 1, 2, 4))  # of an epoch that is over
        await hand.controls[7001].send(Refill(2, hand.epoch, 0, 1, 2, 4))
        assert (await hand.hear(7003, Result)).session == 2
        await hand.step(2, 3)

    with_nodes(lab, test, *"abc")


@pytest.mark.parametrize("bounds", [(0, 21), (3, 3), (5, 2), (20, 30)])
def test_a_refill_of_positions_that_a_session_has_not_ends_the_connection(
    lab: ModuleType, bounds: tuple[int, int]
) -> None:
    async def test(hand: Hand) -> None:
        await lose_the_second_of_three(hand, ((7001, 0, 2), (7003, 2, 6)))
        await hand.controls[7001].send(Refill(1, hand.epoch, *bounds, 2, 4))
        with pytest.raises(NetError, match=r"asked for positions .* of session 1, which has 20"):
            await hand.hear(7001, Failed)

    with_nodes(lab, test, *"abc")
