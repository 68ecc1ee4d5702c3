"""Limits of a port: strangers, however many there are, keep nobody out who has been sent."""

import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from bench.chaos.strangers import crowd

from shoal.engine.batch import Want
from shoal.net.connection import Connection
from shoal.net.connection_limits import (
    CALLERS,
    CROWD,
    CROWD_SECONDS,
    GUESTS,
    LEAVING,
    PATIENCE_SECONDS,
    WAITING,
    ConnectionLimits,
    most_waiting,
)
from shoal.net.dial import dial
from shoal.net.errors import NetError, NodeLostError, RemoteProtocolError
from shoal.net.messages import Assign, Epoch, Loaded, Open, Peer, Ping, Pong, Result, Step
from shoal.net.node import PROBE_HANDSHAKES
from shoal.net.placement import plan_at
from shoal.net.rate_limited_log import LINES

EPOCH = Epoch(99, 1)


@asynccontextmanager
async def shown(
    lab: ModuleType, net: Any, purpose: str, ticket: int, number: int = 99
) -> AsyncIterator[Connection]:
    """A connection of the process `number` to the node "a" that shows a ticket."""
    peer, me = Peer("a", "host", 7001, 7001, ticket), lab.identity(f"n{number}", number)
    async with dial(net.open_stream, "host", 7001, me, purpose, seconds=50, peer=peer) as (connection, _):  # type: ignore[arg-type]
        yield connection


@asynccontextmanager
async def served(lab: ModuleType, net: Any, number: int = 99) -> AsyncIterator[tuple[Connection, int]]:
    """The coordinator's connection, and the ticket that it was told."""
    me = lab.identity("laptop", number)
    async with dial(net.open_stream, "host", 7001, me, "control", seconds=10) as (connection, hello):
        yield connection, hello.ticket


def one(lab: ModuleType, test: Callable[[Any], Awaitable[None]]) -> None:
    """A network of the node "a"."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            await test(net)

    lab.run(main)


def open_connections(net: Any) -> int:
    """Connections that the network's nodes serve, or have not closed yet."""
    return len(net.nursery.child_tasks)


async def refused(connection: Any, words: str) -> None:
    with pytest.raises(NetError, match=words):
        async with connection as link:
            await link.receive()


async def refused_at_last(connection: Connection, words: str) -> None:
    async def listen() -> None:
        while True:
            await connection.expect(Pong)

    with pytest.raises(NetError, match=words):
        await listen()


def test_idle_connections_let_a_coordinator_in_and_stay_bounded(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        idle = []
        for _ in range(3 * WAITING):
            idle.append(await net.open_stream("host", 7001))
            await trio.testing.wait_all_tasks_blocked()
            assert open_connections(net) <= WAITING
        start = trio.current_time()
        async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
            idle += [await net.open_stream("host", 7001) for _ in range(200)]
            assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)
        assert trio.current_time() - start < 0.1
        assert await idle[0].receive_some(1) == b""

    one(lab, test)


def test_strangers_that_come_back_neither_keep_a_coordinator_out_nor_disturb_a_rebuild(
    lab: ModuleType,
) -> None:
    async def main() -> None:
        async with lab.network() as net, trio.open_nursery() as tasks:
            for name in ("a", "b", "c"):
                net.add(name)
            for port in net.nodes:
                opener, me = partial(net.open_stream, "host", port), lab.identity("stranger", 66)
                tasks.start_soon(partial(crowd, opener, me, idle=WAITING + 9, probes=9, squatters=9))
            await trio.sleep(0.2)
            start = trio.current_time()
            async with (
                net.coordinator(plan=plan_at((0, 3, 6))) as coordinator,
                coordinator.generate([1, 2], max_tokens=60) as tokens,
            ):
                got = [await anext(tokens) for _ in range(5)]
                await net.kill(7002)
                got += [token async for token in tokens]
                assert (got, coordinator.recoveries) == (lab.oracle([1, 2], 60), 1)
                assert [node.label for node in coordinator.nodes] == ["a", "c"]
                await trio.sleep(0.2)
                assert open_connections(net) <= 2 * (WAITING + LEAVING + 2 * GUESTS)
            assert trio.current_time() - start < 0.3
            tasks.cancel_scope.cancel()

    lab.run(main)


def test_of_many_idle_connections_the_oldest_of_the_busiest_address_ends(lab: ModuleType) -> None:
    log: list[str] = []

    async def main() -> None:
        limits = ConnectionLimits("a", 10.0, log.append)
        with ExitStack() as stack:
            friend = limits.arrive("10.0.0.2")
            crowded = [limits.arrive("10.0.0.9") for _ in range(WAITING + 5)]
            for slot in (friend, *crowded):
                stack.enter_context(limits.occupy(slot))
            assert not friend.scope.cancel_called
            assert [v.scope.cancel_called for v in crowded] == [True] * 6 + [False] * (WAITING - 1)
        assert log[0].startswith("10.0.0.9 did not say Hello")

    lab.run(main)


def test_a_place_is_settled_when_the_connection_that_had_it_has_closed(lab: ModuleType) -> None:
    async def main() -> None:
        limits, times = ConnectionLimits("a", 10.0, lambda line: None), []

        async def close_slowly(slot: Any) -> None:
            with limits.occupy(slot):
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(3)
            times.append(trio.current_time())

        async with trio.open_nursery() as tasks:
            for _ in range(WAITING):
                tasks.start_soon(close_slowly, limits.arrive("10.0.0.9"))
            await limits.settled()
            assert trio.current_time() == 0
            for wave in (1, 2):
                tasks.start_soon(close_slowly, limits.arrive("10.0.0.9"))
                await limits.settled()
                assert (trio.current_time(), times) == (3 * wave, [3.0, 6.0][:wave])
            tasks.cancel_scope.cancel()

    lab.run(main)


@pytest.mark.parametrize(
    ("descriptors", "places"),
    [(resource.RLIM_INFINITY, WAITING), (1024, WAITING), (4 * WAITING, WAITING), (128, 32), (3, 1)],
)
def test_few_descriptors_have_few_places(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, places: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert most_waiting() == places


def test_in_a_crowd_there_is_less_time_for_a_hello(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        for _ in range(CROWD):
            await net.open_stream("host", 7001)
        await trio.testing.wait_all_tasks_blocked()
        late = await net.open_stream("host", 7001)
        assert await late.receive_some(1) == b""
        assert trio.current_time() == CROWD_SECONDS
        await trio.sleep(5)
        async with served(lab, net) as (control, _):
            await control.send(Ping(1))
            assert (await control.expect(Pong)).nonce == 1

    one(lab, test)


@pytest.mark.parametrize("purpose", ["step", "probe"])
def test_only_peers_with_the_coordinators_ticket_are_guests(lab: ModuleType, purpose: str) -> None:
    async def test(net: Any) -> None:
        await refused(shown(lab, net, purpose, 0), f"a has no coordinator, so it accepts no {purpose} conn")
        async with served(lab, net) as (_, old):
            await refused(shown(lab, net, purpose, 0), "accepts .* only from its coordinator")
            await refused(shown(lab, net, purpose, old ^ 1), "accepts .* only from its coordinator")
            async with shown(lab, net, purpose, old, 5) as guest:
                await guest.send(Ping(3))
                assert (await guest.expect(Pong)).nonce == 3
        async with served(lab, net) as (_, new):
            assert 0 not in (old, new) and old != new
            await refused(shown(lab, net, purpose, old), "accepts .* only from its coordinator")

    one(lab, test)


@pytest.mark.parametrize("purpose", ["step", "probe", "bulk"])
def test_guests_leave_with_their_coordinator(lab: ModuleType, purpose: str) -> None:
    async def test(net: Any) -> None:
        async with served(lab, net) as (control, ticket), shown(lab, net, purpose, ticket, 5) as guest:
            await trio.aclose_forcefully(control._stream)
            with pytest.raises(NodeLostError, match="it closed the connection"):
                await guest.receive()

    one(lab, test)


@pytest.mark.parametrize(("purpose", "most"), [("step", 3), ("bulk", 1), ("probe", 4)])
def test_a_newer_connection_of_a_peer_replaces_its_oldest(lab: ModuleType, purpose: str, most: int) -> None:
    async def test(net: Any) -> None:
        start = trio.current_time()
        async with served(lab, net) as (_, ticket), AsyncExitStack() as stack:
            other = await stack.enter_async_context(shown(lab, net, purpose, ticket, 6))
            own = [await stack.enter_async_context(shown(lab, net, purpose, ticket, 5)) for _ in range(4)]
            await trio.testing.wait_all_tasks_blocked()
            for connection in own[:-most]:
                with pytest.raises(NodeLostError, match="it closed the connection"):
                    await connection.receive()
            assert len(net.nodes[7001].node._limits._guests) == 1 + most
            if purpose != "bulk":
                for connection in (other, *own[-most:]):
                    await connection.send(Ping(3))
                    assert (await connection.expect(Pong)).nonce == 3
        assert trio.current_time() == start

    one(lab, test)


def test_guests_are_limited_for_each_purpose(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        async with served(lab, net) as (_, ticket), AsyncExitStack() as stack:
            for number in range(GUESTS):
                await stack.enter_async_context(shown(lab, net, "probe", ticket, number))
            await refused(shown(lab, net, "probe", ticket, GUESTS), f"a has {GUESTS} probe connections")
            async with shown(lab, net, "step", ticket) as steps:
                await steps.send(Ping(3))
                assert (await steps.expect(Pong)).nonce == 3

    one(lab, test)


def test_a_probe_ends_in_time_though_it_pings(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        async with served(lab, net) as (control, ticket), trio.open_nursery() as tasks:

            async def ping(connection: Connection) -> None:
                while True:
                    await connection.send(Ping(1))
                    await trio.sleep(1)

            tasks.start_soon(ping, control)
            start = trio.current_time()
            async with shown(lab, net, "probe", ticket) as probe, trio.open_nursery() as pings:
                pings.start_soon(ping, probe)
                await refused_at_last(probe, "has measured the link for 30 s")
                pings.cancel_scope.cancel()
            assert trio.current_time() - start == pytest.approx(10 * PROBE_HANDSHAKES, abs=2)
            tasks.cancel_scope.cancel()

    one(lab, test)


def test_rows_of_an_epoch_are_accepted_from_the_previous_stage_only(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        async with (
            served(lab, net) as (control, ticket),
            shown(lab, net, "step", ticket, 5) as other,
            shown(lab, net, "step", ticket, 6) as previous,
        ):
            await control.send(Assign(EPOCH, 0, 6, None, 4, 6))
            await control.expect(Loaded)
            old = Epoch(99, 0)
            await other.send(Step(1, old, 0, (5,), Want.TOKEN))  # late rows of an epoch that is over
            await previous.send(Open(1, EPOCH, 30))
            await previous.send(Step(1, EPOCH, 0, (5,), Want.TOKEN))
            assert await control.expect(Result) == Result(1, EPOCH, 0, 1, lab.oracle([5], 1)[0])
            await other.send(Step(1, EPOCH, 1, (5,), Want.TOKEN))
            words = "n5 .* sent Step, and it is not the node before a in the chain"
            with pytest.raises(RemoteProtocolError, match=words):
                await other.receive()
            await previous.send(Step(1, EPOCH, 1, (5,), Want.TOKEN))
            assert (await control.expect(Result)).first == 1

    one(lab, test)


def test_a_coordinator_that_connects_again_replaces_its_older_connection(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        async with served(lab, net) as (older, _):
            start = trio.current_time()
            async with served(lab, net) as (newer, _):
                assert trio.current_time() == start
                with pytest.raises(NodeLostError, match="it closed the connection"):
                    await older.receive()
                await newer.send(Ping(1))
                assert (await newer.expect(Pong)).nonce == 1

    one(lab, test)


def test_few_coordinators_wait_for_the_one_that_is_served(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        times: list[float] = []

        async def call(number: int) -> None:
            with pytest.raises(NetError, match="a is busy with laptop"):
                async with served(lab, net, number):
                    pass
            times.append(trio.current_time())

        async with served(lab, net):
            async with trio.open_nursery() as tasks:
                for number in range(CALLERS + 3):
                    tasks.start_soon(call, number)
            assert times == [0.0] * 3 + [PATIENCE_SECONDS] * CALLERS

    one(lab, test)


def test_refused_connections_that_do_not_end_are_bounded(lab: ModuleType) -> None:
    async def test(net: Any) -> None:
        for _ in range(5 * LEAVING):
            stream = await net.open_stream("host", 7001)
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked()
            assert open_connections(net) <= LEAVING + 1
        await trio.sleep(3)
        assert open_connections(net) == 0
        assert len(net.nodes[7001].log) == LINES
        await trio.sleep(10)
        await refused(shown(lab, net, "step", 0), "a has no coordinator")
        assert net.nodes[7001].log[LINES] == f"{5 * LEAVING - LINES} more connections were refused or closed"

    one(lab, test)
