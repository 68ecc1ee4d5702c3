"""Layers move between nodes while answers are computed (hand.py has the coordinator): the tokens are those of
one process, and nothing is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from tests.net.hand import Hand, Place, places, step_of, with_nodes

from shoal.engine.batch import Want
from shoal.net import carry, tags
from shoal.net.errors import NetError, RemoteProtocolError
from shoal.net.messages import Abort, Broken, Epoch, Failed, Kept, Open, Refill, Result, Step


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that contexts of these tests fill."""
    monkeypatch.setattr(tags, "CHUNK", 4)


BOUNDARIES = [
    ((0, 3, 6), (0, 4, 6)),
    ((0, 3, 6), (0, 1, 6)),
    ((0, 2, 4, 6), (0, 1, 5, 6)),
    ((0, 2, 4, 6), (0, 4, 5, 6)),
]


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


def test_finished_chunks_are_sent_ahead_and_once(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(10))
        ports = await hand.prepare(*places((0, 2, 6)))
        sent = hand.stage(7001).exported
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
        ports = [hand.net.nodes[port].node._limits for port in hand.controls]
        before = [len(limits._guests) for limits in ports]
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
                assert not hand.net.nodes[port].node._assignment.work._rewinds
            assert [len(limits._guests) for limits in ports] == before
        await hand.move(*places((0, 4, 6)))
        await hand.step(1, 3)
        hand.check(s1=6)

    with_nodes(lab, test)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_transitions_that_follow_an_abort_at_once_do_not_cost_the_running_connection(
    lab: ModuleType, count: int
) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(6))
        for i in range(count):
            await hand.prepare(*places((0, 4 - i % 2 * 2, 6)))
            for control in hand.controls.values():
                await control.send(Abort(Epoch(5, hand.newest)))
        await trio.sleep(1)
        await hand.step(1, 3)
        await hand.move(*places((0, 4, 6)))
        await hand.step(1, 3)
        hand.check(s1=6)

    with_nodes(lab, test)


def test_few_chunks_are_in_memory_at_a_time(lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a long prompt was read after everything before had been sent."""
    read: list[int] = []
    export = lab.FakeStage.export_cuts

    def counted(stage: Any, sequence: int, units: Sequence[int], cuts: Sequence[tuple[int, int]]) -> Any:
        read.append(len(cuts))
        return export(stage, sequence, units, cuts)

    monkeypatch.setattr(lab.FakeStage, "export_cuts", counted)
    monkeypatch.setattr(carry, "LOOK_SECONDS", 1000.0)

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(30))
        ports = await hand.prepare(*places((0, 1, 6)))
        await hand.step(1)
        hand.known[1] += range(22)
        await hand.step(1)
        await hand.commit(ports, *places((0, 1, 6)))
        assert (max(read), sum(read)) == (carry.MOST_CHUNKS, 7 + 7)
        await hand.step(1, 2)
        hand.check(s1=len(hand.known[1]) - 3)

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
        assert not hand.net.nodes[7001 + empty].node._limits._guests
        await hand.move(*places((0, 2, 4, 6)), history=[7001 + empty])
        await hand.step(1, 5)
        hand.check(s1=9)

    with_nodes(lab, test, *"abc")


def test_the_first_call_of_a_node_that_is_used_again_is_bounded_by_what_it_reads(lab: ModuleType) -> None:
    """Two units of 20 MB, at 20 MB/s, and 3 s."""
    hop = lab.Hangs()

    def room(first: int, last: int, beside: range = range(0)) -> int:
        return 10**9 - 20_000_000 * len({*range(first, last), *beside})

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 2, 4, 6)))
        await hand.open(1, *range(9))
        await hand.move((7002, 0, 3), (7003, 3, 6))
        await hand.step(1, 5)
        await hand.move(*places((0, 2, 4, 6)), history=[7001])
        hop.hung = True
        with trio.move_on_after(30), suppress(NetError):
            await hand.step(1, 1)
        (line,) = [line for line in hand.net.nodes[7001].log if "has not returned" in line]
        assert "for 5 s" in line
        hop.freed.set()

    with_nodes(lab, test, *"abc", hop=hop, kv_bytes=room, expect=lambda *_: lambda *_: 0.001)


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
        for session in hand.samplings:
            await hand.steps.send(Open(session, hand.epoch, lab.CONTEXT))
        for first, last in ((0, 4), (4, 9)):
            part = step_of(1, hand.epoch, hand.known[1], first, last, Want.NOTHING, part=(0, 4))
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
    for session in hand.samplings:
        await hand.steps.send(Open(session, hand.epoch, hand.lab.CONTEXT))


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
            part = step_of(1, hand.epoch, hand.known[1], cut, 20, Want.NOTHING, part=(0, 4))
            await hand.steps.send(part)
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


@pytest.mark.parametrize(("enter", "until"), [(3, 3), (3, 2), (3, 7)])
def test_a_refill_through_units_that_do_not_follow_ends_the_connection(
    lab: ModuleType, enter: int, until: int
) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(20))
        await hand.controls[7001].send(Refill(1, hand.epoch, 0, 20, enter, until))
        with pytest.raises(RemoteProtocolError, match=rf"through units \[{enter}, {until}\) of 6"):
            await hand.hear(7001, Failed)

    with_nodes(lab, test)
