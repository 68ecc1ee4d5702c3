"""Connections that carry nothing and stages that do not return: they are noticed, and answers go on."""

from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from shoal.net.connection import open_connection
from shoal.net.dial import dial
from shoal.net.errors import NodeLostError, StageStuckError
from shoal.net.liveness import Timing
from shoal.net.messages import Hello, Ping, Pong
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.net.watch import ConnectionStalledError, Watch, attend
from shoal.planner import Assignment


def spread(nodes: Sequence[NodeInfo], links: Links) -> Placement:
    """As equal as can be over whoever is there."""
    n = len(nodes)
    edges = [6 * i // n for i in range(n + 1)]
    return Placement(
        tuple(Assignment(node.label, a, b) for node, a, b in zip(nodes, edges, edges[1:], strict=False)), 4
    )


def black(stream: Any) -> None:
    """Nothing that is written to this end arrives any more, and no error says so."""

    async def lost(data: object) -> None:
        await trio.lowlevel.checkpoint()

    stream.send_all = lost


# The streams of a chain of three nodes, in the order in which they were opened: control to a, b and c; a to b
# and b to c in either order; the coordinator to a.
@pytest.mark.parametrize("direction", [0, 1], ids=["there", "back"])
@pytest.mark.parametrize("link", ["node to node", "coordinator to node"])
def test_a_step_connection_that_carries_nothing_is_replaced(
    lab: ModuleType, link: str, direction: int
) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=spread) as coordinator, coordinator.session() as session:
                async with session.answer([1, 2], max_tokens=12) as tokens:
                    got = [await anext(tokens)]
                    await trio.sleep(3)
                    node = net.nodes[7001 if link == "coordinator to node" else 7003]
                    black(node.streams[-2:][direction])
                    last, gap = trio.current_time(), 0.0
                    async for token in tokens:
                        got.append(token)
                        gap, last = max(gap, trio.current_time() - last), trio.current_time()
                        await trio.sleep(0.2)
                # At most half a second for the next ping, 0.3 s of suspicion, and 0.2 s of a last chance.
                assert gap < 1.6
                assert got == lab.oracle([1, 2], 12)
                assert coordinator.recoveries == 1
                assert [node.label for node in coordinator.nodes] == ["a", "b", "c"]

    lab.run(main)


def test_a_step_connection_to_a_node_that_nobody_reaches_ends_after_the_bound(lab: ModuleType) -> None:
    """The coordinator still hears the node, and its neighbour does not."""

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(0.04))
            async with net.coordinator(plan=spread) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=40) as tokens:
                    got = [await anext(tokens) for _ in range(20)]  # two and a half seconds
                    black(net.nodes[7003].streams[-2])
                    net.unreachable.add(7003)
                    got += await lab.with_gap(tokens, 2, 3.5)
                assert got == lab.oracle([1, 2], 40)
                assert [node.label for node in coordinator.nodes] == ["a", "b"]

    lab.run(main)


def expect(first: int, last: int) -> Callable[[object, float], float]:
    return lambda steps, pause: 0.01


@pytest.mark.parametrize("port", [7001, 7002, 7003])
def test_a_node_whose_stage_does_not_return_is_left_out_and_says_so(lab: ModuleType, port: int) -> None:
    async def main() -> None:
        async with lab.network() as net:
            hops = {7001 + i: lab.Hangs() for i in range(3)}
            for name, hop in zip("abc", hops.values(), strict=True):
                net.add(name, hop=hop, expect=expect)
            async with net.coordinator(plan=spread) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=12) as tokens:
                    got = [await anext(tokens) for _ in range(3)]
                    hops[port].hung = True
                    start = trio.current_time()
                    got += [token async for token in tokens]
                assert 3 <= trio.current_time() - start < 5
                assert got == lab.oracle([1, 2], 12)
                assert port not in [node.port for node in coordinator.nodes]
                log = net.nodes[port].log
                assert any("a call of the stage has not returned for 3 s" in line for line in log)
                await trio.sleep(20)
                assert port not in [node.port for node in coordinator.nodes]
                with pytest.raises(
                    StageStuckError, match="cannot be used: a call of the stage has not returned"
                ):
                    async with net.coordinator(port, plan=spread, number=98):
                        pass
                hops[port].freed.set()  # it has returned after all
                await trio.sleep(6)
                assert port in [node.port for node in coordinator.nodes]

    lab.run(main)


@pytest.mark.parametrize("seconds", [2.9, 0.5])
def test_a_node_that_is_only_slow_stays(lab: ModuleType, seconds: float) -> None:
    """Its calls should take 10 ms and take up to 290 times as long."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b", hop=lab.slow_hop(seconds), expect=expect)
            async with net.coordinator(plan=spread) as coordinator:
                assert await lab.collect(coordinator, [1] * 20, 5) == lab.oracle([1] * 20, 5)
                assert coordinator.recoveries == 0

    lab.run(main)


def test_the_first_call_may_read_the_weights(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(25.0), expect=expect)
            async with net.coordinator(plan=spread) as coordinator:
                assert await lab.collect(coordinator, [1], 1) == lab.oracle([1], 1)
                assert coordinator.recoveries == 0

    lab.run(main)


def pair(lab: ModuleType, test: Callable[[Any, Any], Awaitable[None]]) -> None:
    """Runs a test with the two ends of a `step` connection, that of the side that dialled first."""

    async def main() -> None:
        here, there = trio.testing.memory_stream_pair()
        async with (
            open_connection(here, "b", dialled=True) as down,
            open_connection(there, "a", dialled=False) as up,
        ):
            for one, other, name in ((down, up, "a"), (up, down, "b")):
                await one.send(lab.identity(name, 1).hello("step"))
                await other.expect(Hello)
            await test(down, up)

    lab.run(main)


def watch(down: Any, *, busy: bool, probe: Callable[[], Awaitable[object]]) -> Watch:
    return Watch(down, Timing(), busy=lambda: busy, probe=probe)


async def unreachable() -> None:
    raise NodeLostError("nobody there")


@pytest.mark.parametrize(
    ("busy", "greeted", "least", "most"),
    [(True, None, 5, 6), (True, 0.01, 2, 3), (True, 0.1, 3, 4), (False, 0.01, 10, 11.5)],
)
def test_silence_from_the_start_is_bounded(
    lab: ModuleType, busy: bool, greeted: float | None, least: float, most: float
) -> None:
    """By the time that the exchange of Hello took, until a ping is answered."""

    async def test(down: Any, up: Any) -> None:
        down.trip = greeted
        with pytest.raises(NodeLostError, match=r"b is lost: it has answered nothing for \d+\.\d s"):
            await watch(down, busy=busy, probe=unreachable).run()
        assert least <= trio.current_time() < most

    pair(lab, test)


def test_a_peer_that_is_late_is_not_replaced_and_not_lost(lab: ModuleType) -> None:
    """A new connection works as late as the old one does."""

    async def test(down: Any, up: Any) -> None:
        async def late() -> None:
            while True:
                message = await up.receive()
                assert isinstance(message, Ping)
                await trio.sleep(0.7)
                await up.send(Pong(message.nonce))

        async def greeted_late() -> None:
            await trio.sleep(0.7)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(late)
            with trio.move_on_after(120) as scope:
                await watch(down, busy=True, probe=greeted_late).run()
            assert scope.cancelled_caught
            tasks.cancel_scope.cancel()

    pair(lab, test)


def test_a_node_that_cannot_accept_rows_says_that_it_lives(lab: ModuleType) -> None:
    """Pings wait behind rows that the stage does not accept yet, for much longer than silence is bounded."""

    async def test(down: Any, up: Any) -> None:
        full = True
        async with trio.open_nursery() as tasks:
            tasks.start_soon(attend, up, Timing(), lambda: full)
            with trio.move_on_after(60) as scope:
                await watch(down, busy=True, probe=trio.lowlevel.checkpoint).run()
            assert scope.cancelled_caught
            full = False
            with pytest.raises(ConnectionStalledError):
                await watch(down, busy=True, probe=trio.lowlevel.checkpoint).run()
            tasks.cancel_scope.cancel()

    pair(lab, test)


@pytest.mark.parametrize("busy", [True, False])
def test_only_a_busy_stage_answers_more_than_the_pings(lab: ModuleType, busy: bool) -> None:
    async def test(down: Any, up: Any) -> None:
        heard = list[int]()

        async def receive() -> None:
            while True:
                heard.append((await down.receive()).nonce)

        async def answer() -> None:
            while True:
                await up.send(Pong((await up.receive()).nonce))

        async with trio.open_nursery() as tasks:
            for task in (receive, answer):
                tasks.start_soon(task)
            tasks.start_soon(attend, up, Timing(), lambda: False, lambda: busy)
            for nonce in range(1, 6):
                await trio.sleep(1)
                await down.send(Ping(nonce))
            await trio.sleep(1)
            tasks.cancel_scope.cancel()
        assert [nonce for nonce in heard if nonce] == [1, 2, 3, 4, 5]
        assert (0 in heard) == busy

    pair(lab, test)


def test_an_idle_stage_that_rows_arrive_at_says_that_it_lives(lab: ModuleType) -> None:
    """Pings wait behind a chunk of rows that takes seconds on a slow link, and the stage has nothing to do
    until it has arrived."""

    async def test(down: Any, up: Any) -> None:
        async def chunk() -> None:
            while True:
                up.received += 300_000
                await trio.sleep(0.25)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(attend, up, Timing(), lambda: False, lambda: False)
            tasks.start_soon(chunk)
            with trio.move_on_after(60) as scope:
                await watch(down, busy=True, probe=trio.lowlevel.checkpoint).run()
            assert scope.cancelled_caught
            tasks.cancel_scope.cancel()

    pair(lab, test)


def test_looks_that_come_a_little_early_do_not_skip_pings(lab: ModuleType) -> None:
    async def test(down: Any, up: Any) -> None:
        sent = list[float]()
        down.post = lambda message: sent.append(now)
        watched = watch(down, busy=True, probe=unreachable)
        async with trio.open_nursery() as tasks:
            for tick in range(9):
                now = 0.25 * tick + (0.003 if tick % 4 else 0.005)
                watched._look(now, tasks)
                watched._heartbeat = watched._heartbeat.heard()
        assert [round(4 * at) for at in sent] == [0, 2, 4, 6, 8]

    pair(lab, test)


def test_the_other_end_gives_up_a_connection_without_pings(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            async with net.coordinator(plan=spread):
                me, peer = lab.identity("a guest", 5), net.peer(7001)
                async with dial(net.open_stream, "host", 7001, me, "step", seconds=5, peer=peer) as (
                    connection,
                    _,
                ):
                    start = trio.current_time()
                    with pytest.raises(NodeLostError):
                        await connection.receive()
                    assert 10 <= trio.current_time() - start < 11

    lab.run(main)
