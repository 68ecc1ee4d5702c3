"""Transitions that fail, and peers that lie about keys and values: a node says what is wrong, the running
epoch goes on as it was, and after a commit nothing is left half done."""

from __future__ import annotations

import struct
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from tests.net.hand import Hand, connected, places, with_nodes

from shoal.engine.errors import ContextError, ModelFileError, NoPlanError
from shoal.net import stage_manager, tags
from shoal.net.carry import KvSender
from shoal.net.errors import NetError, NodeLostError, RemoteProtocolError
from shoal.net.messages import (
    MOST_SESSIONS,
    Abort,
    Assign,
    Broken,
    Carried,
    Commit,
    Complete,
    Epoch,
    Gift,
    Kept,
    Loaded,
    Message,
    Pages,
    Prepared,
    Release,
    Take,
)
from shoal.net.work import StageWork

GIVER, NEXT = 88, Epoch(5, 2)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "CHUNK", 4)


def pages(unit: int = 2, first: int = 0, last: int = 4, session: int = 1, epoch: Epoch = NEXT) -> Pages:
    return Pages(session, epoch, unit, first, last, struct.pack(f"<{last - first}I", *range(first, last)))


def told(session: int = 1, first: int = 0, count: int = 4) -> Carried:
    """Of positions from `first` on; the tag of each chunk is its end."""
    last = first + count
    return Carried(session, NEXT, 30, first, last, tuple(range(first // 4 * 4 + 4, last + 1, 4)))


async def intact(hand: Hand) -> None:
    """The running epoch goes on, and nothing of a transition is left."""
    await trio.testing.wait_all_tasks_blocked()
    for port, first, last in hand.places:
        stage = hand.stage(port)
        assert (stage.first, stage.last, stage.prepared, stage.closed) == (first, last, [], False)
        assert all(staged.closed for staged in stage.staged)
    await hand.step(1, 3)


async def alone(hand: Hand, *, joins: bool = False) -> Hand:
    """The node "a" with units 3 to 5 (unless it `joins`), and an order to take unit 2 from the process
    GIVER."""
    hand.counter = hand.newest = 1
    control = hand.controls[7001]
    if not joins:
        await control.send(Assign(hand.epoch, 3, 6, None, 8, 77))
        await control.expect(Loaded)
    await control.send(Assign(NEXT, 2, 6, None, 8, 77, base=1, takes=(Take(GIVER, 2, 3),)))
    await control.expect(Prepared)
    return hand


WRONG: dict[str, tuple[list[Message], str]] = {
    "another unit": ([pages(unit=3)], "unit 3 is not among those that this node takes over from it"),
    "a unit beyond the model": ([pages(unit=99)], "unit 99 is not among"),
    "a gap": ([pages(), pages(first=8, last=12)], r"positions \[8, 12\) do not follow the 4"),
    "another size": ([replace(pages(), data=b"123")], "do not follow"),
    "a session": ([told()], "session 1 is open here"),
    "many sessions": ([pages(session=s) for s in range(2 * MOST_SESSIONS + 1)], "more than 512 sessions"),
}


@pytest.mark.parametrize("what", WRONG)
def test_keys_and_values_that_do_not_fit_end_the_transition(lab: ModuleType, what: str) -> None:
    messages, words = WRONG[what]

    async def test(hand: Hand) -> None:
        await alone(hand)
        async with connected(lab, hand.net, 7001, "bulk", GIVER) as bulk:
            for message in messages:
                await bulk.send(message)
            with pytest.raises(RemoteProtocolError, match=words):
                await bulk.receive()
        broken = await hand.controls[7001].expect(Broken)
        assert (broken.epoch, broken.code, broken.peer) == (NEXT, RemoteProtocolError.exit_code, None)
        (stage,) = hand.net.nodes[7001].stages
        await trio.testing.wait_all_tasks_blocked()
        assert (stage.prepared, [staged.closed for staged in stage.staged]) == ([], [True])
        assert (stage.first, stage.closed) == (3, False)

    with_nodes(lab, test, "a")


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (told(first=1), "do not follow the 0"),
        (told(first=5), "do not follow the 0"),
        (replace(told(), tags=()), "have 0 tags"),
        (replace(told(), last=0), "positions .0, 0. have 1 tags"),
    ],
)
def test_a_session_with_a_gap_ends_the_transition_of_a_node_that_joins(
    lab: ModuleType, gap: Carried, words: str
) -> None:
    async def test(hand: Hand) -> None:
        await alone(hand, joins=True)
        async with connected(lab, hand.net, 7001, "bulk", GIVER) as bulk:
            await bulk.send(gap)
            with pytest.raises(RemoteProtocolError, match=words):
                await bulk.receive()
        await hand.controls[7001].expect(Broken)
        await trio.testing.wait_all_tasks_blocked()
        assert hand.stage(7001).closed

    with_nodes(lab, test, "a")


OTHERS: list[Message] = [pages(epoch=Epoch(5, 1)), pages(epoch=Epoch(4, 9)), Complete(Epoch(5, 1))]


@pytest.mark.parametrize(
    ("number", "message"), [(n, m) for n in (GIVER, 89) for m in OTHERS] + [(89, told(session=3))]
)
def test_what_is_of_another_epoch_or_from_another_peer_is_dropped(
    lab: ModuleType, number: int, message: Message
) -> None:
    async def test(hand: Hand) -> None:
        await alone(hand)
        async with connected(lab, hand.net, 7001, "bulk", number) as bulk:
            await bulk.send(message)
            if number != GIVER:
                await bulk.send(pages(unit=3))
                await bulk.send(Complete(NEXT))
            await trio.testing.wait_all_tasks_blocked()
            (staged,) = hand.stage(7001).staged
            assert not staged.arrived
            await hand.controls[7001].send(Commit(NEXT, ()))
            await trio.testing.wait_all_tasks_blocked()
            assert hand.stage(7001).first == 3  # the giver's Complete is still awaited
        async with connected(lab, hand.net, 7001, "bulk", GIVER) as bulk:
            await bulk.send(Complete(NEXT))
            assert (await hand.controls[7001].expect(Loaded)).epoch == NEXT

    with_nodes(lab, test, "a")


def test_keys_and_values_may_arrive_before_the_order(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        hand.counter = 1
        control = hand.controls[7001]
        await control.send(Assign(Epoch(5, 1), 3, 6, None, 8, 77))
        await control.expect(Loaded)
        async with connected(lab, hand.net, 7001, "bulk", GIVER) as bulk:
            await bulk.send(pages())
            await bulk.send(Complete(NEXT))
            await trio.testing.wait_all_tasks_blocked()
            assert not hand.stage(7001).staged
            await control.send(Assign(NEXT, 2, 6, None, 8, 77, base=1, takes=(Take(GIVER, 2, 3),)))
            await control.expect(Prepared)
            await trio.testing.wait_all_tasks_blocked()
            (staged,) = hand.stage(7001).staged
            assert staged.arrived[1].held(2) == 4
            await control.send(Commit(NEXT, ()))
            assert (await control.expect(Loaded)).epoch == NEXT

    with_nodes(lab, test, "a")


@pytest.mark.parametrize("kind", [NodeLostError, ContextError])
def test_a_transition_ends_where_there_is_no_room_or_no_giver(lab: ModuleType, kind: type[Exception]) -> None:
    """Keys and values without room are the taker's to report. A giver that disconnects reports itself, or is
    lost to the coordinator."""

    async def test(hand: Hand) -> None:
        await alone(hand)

        def full(*where: Any) -> None:
            raise ContextError("keys and values have filled the MB promised")

        (staged,) = hand.stage(7001).staged
        async with connected(lab, hand.net, 7001, "bulk", GIVER) as bulk:
            if kind is ContextError:
                staged.accept = full
                await bulk.send(pages())
                with pytest.raises(NodeLostError):
                    await bulk.receive()
        if kind is ContextError:
            assert (await hand.controls[7001].expect(Broken)).code == ContextError.exit_code
        else:
            await trio.testing.wait_all_tasks_blocked()
            assert not staged.closed

    with_nodes(lab, test, "a")


def test_the_connection_of_a_giver_ends_with_its_transition(lab: ModuleType) -> None:
    """A giver that has vanished without a word would keep its place for ever."""

    async def test(hand: Hand) -> None:
        await alone(hand)
        limits = hand.net.nodes[7001].node._limits
        async with (
            connected(lab, hand.net, 7001, "bulk", GIVER) as bulk,
            connected(lab, hand.net, 7001, "bulk", 89) as early,
        ):
            await bulk.send(pages())
            await early.send(pages(epoch=Epoch(5, 3)))  # of a transition that is still to be ordered
            await trio.testing.wait_all_tasks_blocked()
            assert len(limits._guests) == 2
            await hand.controls[7001].send(Abort(NEXT))
            with pytest.raises(NodeLostError, match="it closed the connection"):
                await bulk.receive()
            await trio.testing.wait_all_tasks_blocked()
            assert [guest.incarnation for guest in limits._guests.values()] == [89]

    with_nodes(lab, test, "a")


@pytest.mark.parametrize("wrong", ["ticket", "port", "incarnation"])
def test_a_taker_that_cannot_be_reached_is_named_and_the_chain_goes_on(lab: ModuleType, wrong: str) -> None:
    values: dict[str, Any] = {"ticket": 5, "port": 7009, "incarnation": 4}

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        orders = hand.assigns(places((0, 2, 6)), base=True)
        (gift,) = orders[7001].gives
        taker = replace(gift.taker, **{wrong: values[wrong]})
        await hand.controls[7001].send(replace(orders[7001], gives=(replace(gift, taker=taker),)))
        broken = await hand.controls[7001].expect(Broken)
        assert (broken.epoch, broken.peer) == (orders[7001].epoch, taker.incarnation)
        await intact(hand)
        await hand.move(*places((0, 2, 6)))
        await hand.step(1, 3)
        hand.check(s1=9)

    with_nodes(lab, test)


@pytest.mark.parametrize(
    "error", [NoPlanError("no room"), MemoryError(), ModelFileError("unit-3 is damaged")]
)
@pytest.mark.parametrize("where", ["kv_bytes", "prepare"])
def test_a_stage_that_cannot_be_prepared_is_told_and_the_chain_goes_on(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    faulty = True

    def room(first: int, last: int, beside: range = range(0)) -> int:
        if beside and faulty and where == "kv_bytes":
            raise error
        return 500 if beside else 1000

    def prepare(stage: Any, first: int, last: int, kv_bytes: int | None = None) -> None:
        raise error

    async def test(hand: Hand) -> None:
        nonlocal faulty
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        with monkeypatch.context() as patched:
            if where == "prepare":
                patched.setattr(lab.FakeStage, "prepare", prepare)
            for port, assign in hand.assigns(places((0, 4, 6)), base=True).items():
                await hand.controls[port].send(assign)
            for port in (7001, 7002):
                broken = await hand.hear(port, Broken)
                assert (broken.epoch, broken.peer) == (Epoch(5, hand.newest), None)
        assert all(hand.stage(port).limits[-1:] in ([], [1000]) for port in (7001, 7002))
        await intact(hand)
        faulty = False
        await hand.move(*places((0, 4, 6)))
        await hand.step(1, 3)
        hand.check(s1=9)
        assert [hand.stage(port).limits[-2:] for port in (7001, 7002)] == [[500, 1000]] * 2

    with_nodes(lab, test, kv_bytes=room)


def test_a_range_that_keys_and_values_leave_no_room_for_is_not_prepared(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(first: int, last: int, beside: range = range(0)) -> int:
        return 500 if beside else 1000

    monkeypatch.setattr(lab.FakeStage, "kv_bytes", 501)

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        for port, assign in hand.assigns(places((0, 4, 6)), base=True).items():
            await hand.controls[port].send(assign)
        broken = await hand.hear(7001, Broken)
        assert broken.code == NoPlanError.exit_code
        assert "units [0, 4) do not fit beside them" in broken.text
        await hand.hear(7002, Broken)
        await intact(hand)

    with_nodes(lab, test, kv_bytes=room)


def test_rows_that_need_the_room_of_a_prepared_range_end_the_transition(
    lab: ModuleType,
) -> None:
    """The answer goes on, and the same transition is possible later."""

    def room(first: int, last: int, beside: range = range(0)) -> int:
        return 12 if beside else 30

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        ports = await hand.prepare(*places((0, 4, 6)))
        await hand.step(1, 3)
        assert [hand.stage(port).prepared for port in ports] == [[range(4)], [range(4, 6)]]
        for _ in range(3):  # both nodes need the room
            await hand.step(1)
        for port in ports:
            broken = await hand.hear(port, Broken)
            assert (broken.epoch, broken.code) == (Epoch(5, hand.newest), NoPlanError.exit_code)
            assert "running answers need the room" in broken.text
        await hand.abort(ports)
        await intact(hand)
        hand.check(s1=9)

    with_nodes(lab, test, kv_bytes=room)


def test_rows_do_not_wait_for_weights_that_are_being_loaded(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(first: int, last: int, beside: range = range(0)) -> int:
        return 500 if beside else 1000

    monkeypatch.setattr(stage_manager, "LOAD_PATIENCE", 0.001)

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        prepare, made = lab.FakeStage.prepare, []

        def crowded(stage: Any, first: int, last: int, kv_bytes: int | None = None) -> Any:
            prepared = prepare(stage, first, last, kv_bytes)
            made.append((stage.room, hand.net.nodes[7001].node._manager._make_room(), stage.room))
            return prepared

        with monkeypatch.context() as patched:
            patched.setattr(lab.FakeStage, "prepare", crowded)
            orders = hand.assigns(places((0, 4, 6)), base=True)
            await hand.controls[7001].send(orders[7001])
            broken = await hand.hear(7001, Broken)
        assert (broken.code, made) == (NoPlanError.exit_code, [(500, True, 1000)])
        await intact(hand)
        assert hand.stage(7001).room == 1000
        hand.check(s1=9)

    with_nodes(lab, test, kv_bytes=room)


def test_chunks_are_read_in_portions_of_about_a_megabyte(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, 6), NEXT, None)
    units, cuts = list(range(32)), [(at, at + 64) for at in range(0, 640, 64)]
    giver = KvSender(lab.FakeStage(0, 6), work, NEXT, units, history=False, hop=lab.inline, bytes_per_s=None)
    for piece, most in ((1 << 22, 1), (256 * 1024, 4), (10_000, 104), (1000, 1048)):
        giver._piece = piece
        portions = giver._portions(cuts)
        pairs = [(cut, unit) for units_, some in portions for cut in some for unit in units_]
        assert pairs == [(cut, unit) for cut in cuts for unit in units]
        assert max(len(units_) * len(some) for units_, some in portions) <= most
    both = KvSender(
        lab.FakeStage(0, 6), work, NEXT, units, history=False, hop=lab.inline, bytes_per_s=None, takers=2
    )  # the two share the memory
    assert max(len(units_) * len(some) for units_, some in both._portions(cuts)) == 2


def test_a_next_node_that_is_lost_before_the_commit_ends_the_transition(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load((7001, 0, 3), (7002, 3, 6))
        await hand.open(1, *range(9))
        await hand.prepare((7001, 0, 2), (7003, 2, 3), (7002, 3, 6), history=[7003])
        await hand.net.kill(7003)
        broken = await hand.hear(7001, Broken)
        assert (broken.epoch, broken.peer) == (Epoch(5, hand.newest), 7003)
        await hand.abort([7001, 7002])
        await intact(hand)
        hand.check(s1=9)

    with_nodes(lab, test, *"abc")


@pytest.mark.parametrize("positions", [12, 40])
def test_a_commit_of_positions_that_a_stage_does_not_hold_drops_everything(
    lab: ModuleType, positions: int
) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        ports = await hand.prepare(*places((0, 2, 6)))
        for port in ports:
            await hand.controls[port].send(Commit(Epoch(5, hand.newest), (Kept(1, positions),)))
        broken = await hand.hear(7001, Broken)
        assert f"does not hold the {positions} positions" in broken.text
        await trio.testing.wait_all_tasks_blocked()
        assert hand.stage(7001).closed
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        await hand.step(1, 3)
        hand.check(s1=9)
        assert [len(hand.net.nodes[port].stages) for port in (7001, 7002)] == [2, 2]

    with_nodes(lab, test)


def test_a_commit_of_a_session_that_nobody_has_opened_drops_everything(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        ports = await hand.prepare(*places((0, 2, 6)))
        for port in ports:
            await hand.controls[port].send(Commit(Epoch(5, hand.newest), (Kept(1, 4),)))
        assert "has session 1, which is not open here" in (await hand.hear(7001, Broken)).text
        await trio.testing.wait_all_tasks_blocked()
        assert hand.stage(7001).closed

    with_nodes(lab, test)


@pytest.mark.parametrize("seconds", [0.1, 1.5, 2.5, 3.5, 4.5, 6.5, 9.5])
@pytest.mark.parametrize("end", ["coordinator", "release", "assign", "abort"])
def test_a_transition_can_end_at_any_moment_and_leaves_nothing(
    lab: ModuleType, seconds: float, end: str
) -> None:
    """Loading, copying, importing and changing take a second each."""

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        orders = hand.assigns(places((0, 4, 6)), base=True)
        for port, assign in orders.items():
            await hand.controls[port].send(assign)
        with trio.move_on_after(seconds):
            for port in orders:
                await hand.controls[port].expect(Prepared)
            for port in orders:
                await hand.controls[port].send(Commit(Epoch(5, hand.newest), (Kept(1, 9),)))
            await trio.sleep_forever()
        if end == "assign":
            fresh = hand.assigns(places((0, 3, 6)), base=False)
        for port, control in hand.controls.items():
            if end == "coordinator":
                await trio.aclose_forcefully(control._stream)
            elif end == "assign":
                await control.send(fresh[port])
            elif end == "release":
                await control.send(Release(Epoch(5, 9)))
        if end == "abort":
            await hand.abort(hand.controls)
        await trio.sleep(8)
        await trio.testing.wait_all_tasks_blocked()
        for port in hand.controls:
            stages = hand.net.nodes[port].stages
            assert all(staged.closed for stage in stages for staged in stage.staged)
            assert all(not stage.prepared for stage in stages if not stage.closed)
            open_ = [stage for stage in stages if not stage.closed]
            assert len(open_) == (end in ("assign", "abort"))
            if end in ("coordinator", "release"):
                bulk = [h for h in hand.net.nodes[port].node._limits._guests.values() if h.purpose == "bulk"]
                assert not bulk

    with_nodes(lab, test, hop=lab.slow_hop(1.0))


@pytest.mark.parametrize("session", [1, 2])
def test_a_stage_that_is_opened_after_a_change_was_dropped_knows_no_sessions(
    lab: ModuleType, session: int
) -> None:
    """The stage has changed, and the task that does so is about to say so, when a fresh order arrives."""

    async def hop(work: Any) -> Any:
        result = work()
        await trio.sleep(getattr(getattr(work, "func", None), "__name__", "") == "_change")
        return result

    async def test(hand: Hand) -> None:
        await hand.load(*places((0, 3, 6)))
        await hand.open(1, *range(9))
        ports = await hand.prepare(*places((0, 4, 6)))
        for port in ports:
            await hand.controls[port].send(Commit(Epoch(5, hand.newest), (Kept(1, 9),)))
        await trio.sleep(0.5)
        assert [hand.stage(port).last for port in ports] == [4, 6]
        await hand.load(*places((0, 3, 6)))
        hand.known.clear()
        await hand.open(session, *range(9))
        await hand.step(session, 3)
        hand.check(**{f"s{session}": 9})
        for port in ports:
            manager = hand.net.nodes[port].node._manager
            assert list(manager.current.work.sessions) == list(hand.stage(port).sequences) == [session]

    with_nodes(lab, test, hop=hop)


@pytest.mark.parametrize(
    "change",
    [
        {"first": 0, "last": 0},
        {"takes": (Take(8, 0, 1),)},
        {"takes": (Take(8, 3, 3),)},
        {"base": None, "takes": (Take(8, 3, 4),)},
        {"base": None, "gives": ()},
        {"last": 7},
    ],
)
def test_orders_that_make_no_chain_are_refused(lab: ModuleType, change: dict[str, Any]) -> None:
    async def test(hand: Hand) -> None:
        gift = Gift(hand.net.peer(7001), 3, 4)
        order = Assign(Epoch(5, 1), 3, 6, hand.net.peer(7001), 8, 77, base=1, gives=(gift,))
        await hand.controls[7001].send(replace(order, **change))
        with pytest.raises(RemoteProtocolError, match="such a stage cannot be in a chain"):
            await hand.controls[7001].receive()

    with_nodes(lab, test, "a")


def test_units_are_not_assigned_twice_in_an_epoch(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        for _ in range(2):
            await hand.controls[7001].send(Assign(Epoch(5, 1), 3, 6, None, 8, 77))
        with pytest.raises(RemoteProtocolError, match="assigned units twice in epoch"):
            await hand.controls[7001].receive()

    with_nodes(lab, test, "a")


def test_a_node_has_nothing_to_give_before_it_has_a_stage(lab: ModuleType) -> None:
    async def test(hand: Hand) -> None:
        gift = Gift(hand.net.peer(7001), 3, 4)
        await hand.controls[7001].send(Assign(Epoch(5, 2), 0, 0, None, 8, 77, base=1, gives=(gift,)))
        broken = await hand.controls[7001].expect(Broken)
        assert (broken.code, broken.text) == (NetError.exit_code, "there is nothing to give away here")

    with_nodes(lab, test, "a")
