"""A node and peers that misbehave: it says why it hangs up, frees what they held, and serves the others."""

import random
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from shoal.engine.batch import Want
from shoal.engine.errors import NoPlanError
from shoal.net import node
from shoal.net.connection import Connection
from shoal.net.dial import dial
from shoal.net.errors import NetError, NodeLostError, RemoteProtocolError, from_wire
from shoal.net.messages import (
    Assign,
    Broken,
    Close,
    Data,
    Epoch,
    Failed,
    GetStats,
    Loaded,
    Measure,
    Measured,
    Open,
    Peer,
    Ping,
    Pong,
    Release,
    Result,
    Stats,
    Step,
)
from shoal.net.placement import plan_at
from shoal.net.wire import WireProtocol

HEADER = struct.Struct("<4sHHI")
EPOCH = Epoch(5, 1)


@asynccontextmanager
async def connected(
    lab: ModuleType, net: Any, port: int, purpose: str, number: int = 99
) -> AsyncIterator[Connection]:
    """A connection of the process `number`, with the ticket of the node's coordinator, if it has one."""
    me, peer = lab.identity("laptop", number), net.peer(port)
    async with dial(net.open_stream, "host", port, me, purpose, seconds=5, peer=peer) as (connection, _):  # type: ignore[arg-type]
        yield connection


def alone(
    lab: ModuleType, test: Callable[[Any, Connection, Connection], Awaitable[None]], **changes: Any
) -> None:
    """A node with the whole model under EPOCH, and a coordinator's two connections to it."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a", **changes)
            async with (
                connected(lab, net, 7001, "control") as control,
                connected(lab, net, 7001, "step") as steps,
            ):
                await control.send(whole(EPOCH))
                assert (await control.expect(Loaded)).epoch == EPOCH
                await test(net, control, steps)

    lab.run(main)


def whole(epoch: Epoch) -> Assign:
    """The whole model to one node, whose rows are the coordinator's."""
    return Assign(epoch, 0, 6, None, 4, 99)


def opened(session: int, epoch: Epoch = EPOCH) -> Open:
    return Open(session, epoch, 30)


def rows(session: int, first: int, *tokens: int, epoch: Epoch = EPOCH) -> Step:
    return Step(session, epoch, first, tokens, Want.TOKEN)


def test_rows_of_another_epoch_are_dropped(lab: ModuleType) -> None:
    async def test(net: Any, control: Connection, steps: Connection) -> None:
        old = Epoch(4, 9)
        for message in (opened(1, old), opened(1), rows(1, 0, 3, epoch=old), rows(1, 0, 5), Close(1, old)):
            await steps.send(message)
        assert await control.receive() == Result(1, EPOCH, 0, 1, lab.oracle([5], 1)[0])
        await trio.testing.wait_all_tasks_blocked()
        assert list(net.nodes[7001].stages[0].sequences) == [1]

    alone(lab, test)


def test_a_new_assignment_drops_the_old_one_and_its_sessions(lab: ModuleType) -> None:
    async def test(net: Any, control: Connection, steps: Connection) -> None:
        await steps.send(opened(1))
        newer = Epoch(5, 2)
        await control.send(whole(newer))
        assert (await control.expect(Loaded)).epoch == newer
        await steps.send(rows(1, 0, 5))
        await steps.send(opened(1, newer))
        await steps.send(rows(1, 0, 7, epoch=newer))
        assert await control.receive() == Result(1, newer, 0, 1, lab.oracle([7], 1)[0])
        assert [stage.closed for stage in net.nodes[7001].stages] == [True, False]
        await control.send(Release(Epoch(5, 3)))
        await control.send(GetStats())
        assert (await control.expect(Stats)).epoch is None
        await trio.testing.wait_all_tasks_blocked()
        assert net.nodes[7001].stages[1].closed

    alone(lab, test)


def test_assignments_in_a_hurry_end_with_the_last_one(lab: ModuleType) -> None:
    async def test(net: Any, control: Connection, steps: Connection) -> None:
        for counter in range(2, 6):
            await control.send(whole(Epoch(5, counter)))
        last = await control.expect(Loaded)
        while last.epoch.counter < 5:
            last = await control.expect(Loaded)
        stages = net.nodes[7001].stages
        assert [stage.closed for stage in stages] == [True] * (len(stages) - 1) + [False]

    alone(lab, test, hop=lab.slow_hop(0.5))


def test_pings_are_answered_while_a_stage_loads_and_computes(lab: ModuleType) -> None:
    async def test(net: Any, control: Connection, steps: Connection) -> None:
        await control.send(whole(Epoch(5, 2)))
        start = trio.current_time()
        await control.send(Ping(7))
        assert (await control.expect(Pong)).nonce == 7
        assert trio.current_time() == start
        await control.expect(Loaded)
        assert trio.current_time() == start + 8

    alone(lab, test, hop=lab.slow_hop(8.0))


def test_wrong_rows_end_their_session_only(lab: ModuleType) -> None:
    async def test(net: Any, control: Connection, steps: Connection) -> None:
        for message in (opened(1), opened(2), rows(1, 4, 5), rows(2, 0, 5)):
            await steps.send(message)
        answers = [await control.receive(), await control.receive()]
        assert Result(2, EPOCH, 0, 1, lab.oracle([5], 1)[0]) in answers
        (failed,) = [answer for answer in answers if isinstance(answer, Failed)]
        assert (failed.session, failed.text) == (1, "rows from 4: the sequence holds 0 positions")

    alone(lab, test)


def test_a_long_queue_holds_back_its_connection_and_loses_nothing(lab: ModuleType) -> None:
    async def test(net: Any, control: Connection, steps: Connection) -> None:
        history = [5]
        await steps.send(opened(1))
        async with trio.open_nursery() as tasks:

            async def feed() -> None:
                for _ in range(1000):
                    await steps.send(rows(1, 0, 5))

            tasks.start_soon(feed)
            for _ in range(1000):
                assert await control.receive() == Result(1, EPOCH, 0, 1, lab.oracle(history, 1)[0])

    alone(lab, test)


@pytest.mark.parametrize(
    ("served", "code", "words"),
    [
        (
            True,
            NodeLostError.exit_code,
            "b (0000000000001b5a) answers at host:7002, not b (00000000000004d2)",
        ),
        (
            False,
            NetError.exit_code,
            "b has no coordinator, so it accepts no step connections; connect",
        ),
    ],
    ids=["that is served", "that is not"],
)
def test_a_next_node_that_is_another_process_is_not_used(
    lab: ModuleType, served: bool, code: int, words: str
) -> None:
    async def main() -> None:
        async with lab.network() as net, AsyncExitStack() as stack:
            net.add("a")
            net.add("b")
            if served:
                await stack.enter_async_context(connected(lab, net, 7002, "control"))
            peer = replace(net.peer(7002), incarnation=1234)
            async with connected(lab, net, 7001, "control") as control:
                await control.send(Assign(EPOCH, 0, 3, peer, 4, 99))
                broken = await control.expect(Broken)
                assert (broken.code, broken.peer) == (code, 1234)
                assert words in broken.text
                (stage,) = net.nodes[7001].stages
                assert not stage.closed  # a transition may begin with it
                await control.send(Release(EPOCH))
                await trio.testing.wait_all_tasks_blocked()
                assert stage.closed

    lab.run(main)


def test_hidden_rows_of_the_wrong_width_end_their_session(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            async with (
                connected(lab, net, 7001, "control") as control,
                connected(lab, net, 7001, "step") as steps,
            ):
                await control.send(Assign(EPOCH, 3, 6, None, 4, 99))
                await control.expect(Loaded)
                await steps.send(opened(1))
                wide = np.zeros((1, lab.COLS + 1), np.float32)
                await steps.send(Step(1, EPOCH, 0, (), Want.TOKEN, wide))
                assert isinstance(await control.receive(), Failed)

    lab.run(main)


def test_a_coordinator_that_goes_away_while_the_stage_loads_leaves_nothing(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(5.0))
            async with connected(lab, net, 7001, "control") as control:
                await control.send(whole(EPOCH))
                await trio.sleep(1)
            await trio.sleep(10)
            assert all(stage.closed for stage in net.nodes[7001].stages)
            async with connected(lab, net, 7001, "control"):
                pass

    lab.run(main)


@pytest.mark.parametrize("order", ["measure", "assign"])
def test_a_coordinator_that_asks_for_too_much_at_once_is_refused(lab: ModuleType, order: str) -> None:
    async def nowhere(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    async def main() -> None:
        async with lab.network() as net:
            net.add("a", open_stream=nowhere, hop=lab.slow_hop(100.0))
            async with connected(lab, net, 7001, "control") as control:
                for port in range(8000, 8100):
                    peer = Peer("x", "host", port, 1)
                    await control.send(
                        Measure(peer) if order == "measure" else Assign(Epoch(5, port), 0, 3, peer, 4, 99)
                    )

                async def told() -> None:
                    while True:
                        await control.expect(Measured)

                with pytest.raises(RemoteProtocolError, match="has sent more than 16 orders"):
                    await told()

    lab.run(main)


@pytest.mark.parametrize("purpose", ["control", "step", "probe"])
def test_fuzz_whatever_comes_after_a_greeting_the_node_lives(lab: ModuleType, purpose: str) -> None:
    rng = random.Random(purpose)
    down = {
        "control": [
            Ping(1), whole(EPOCH), Assign(EPOCH, 1, 3, Peer("b", "host", 7002, 2), 4, 99),
            Release(EPOCH), GetStats(), Measure(Peer("b", "host", 7002, 7002)),
        ],
        "step": [opened(1), opened(2), rows(1, 0, 5), rows(1, 1, 6, 7), rows(2, 3, 1), Close(1, EPOCH)],
        "probe": [Ping(3), Data(100)],
    }[purpose]  # fmt: skip

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            for _ in range(60):
                stream = await net.open_stream("host", 7001)
                sender = WireProtocol(True)
                await stream.send_all(b"".join(sender.send(lab.identity("stranger", 66).hello(purpose))))
                data = bytearray(b"".join(b"".join(sender.send(rng.choice(down))) for _ in range(8)))
                for _ in range(rng.randint(0, 3)):
                    at = rng.randrange(len(data))
                    data[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
                await stream.send_all(data)
                await trio.testing.wait_all_tasks_blocked()
                await stream.aclose()
                await trio.testing.wait_all_tasks_blocked()
            refusals = ("(a peer): ", "it sent", "has no coordinator")
            assert any(why in line for why in refusals for line in net.nodes[7001].log)
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
                assert await lab.collect(coordinator, [1], 3) == lab.oracle([1], 3)

    lab.run(main)


def test_the_stage_that_was_released_is_closed_when_the_next_one_opens(lab: ModuleType) -> None:
    opened_with: list[int] = []

    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.5))
            node = net.nodes[7001]
            parts = node.node._parts

            def open_stage(first: int, last: int) -> Any:
                opened_with.append(sum(not stage.closed for stage in node.stages))
                return parts.open_stage(first, last)

            node.node._parts = replace(parts, open_stage=open_stage)
            async with (
                connected(lab, net, 7001, "control") as control,
                connected(lab, net, 7001, "step") as steps,
            ):
                await control.send(whole(EPOCH))
                await control.expect(Loaded)
                await steps.send(opened(1))
                await steps.send(rows(1, 0, 5))
                await trio.sleep(0.1)
                await control.send(Release(Epoch(5, 2)))
                await control.send(whole(Epoch(5, 3)))
                while (await control.expect(Loaded)).epoch != Epoch(5, 3):
                    pass

    lab.run(main)
    assert opened_with == [0, 0]


@pytest.mark.parametrize("error", [RuntimeError("no such thing"), KeyError("x"), MemoryError("no 44 MB")])
def test_a_mistake_of_ours_ends_one_connection_and_not_the_node(lab: ModuleType, error: Exception) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            node = net.nodes[7001].node
            parts = node._parts

            def broken(first: int, last: int) -> Any:
                raise error

            node._parts = replace(parts, open_stage=broken)
            with pytest.raises(NetError, match=re.escape(str(error))):
                async with net.coordinator(plan=plan_at((0, 6))):
                    pass
            node._parts = parts
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
                assert await lab.collect(coordinator, [1], 3) == lab.oracle([1], 3)

    lab.run(main)


def test_a_peer_that_refuses_a_measurement_costs_no_node_its_coordinator(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object) -> None:
        raise from_wire(NoPlanError.exit_code, "it has no wish to", "b")

    monkeypatch.setattr(node, "measure_peer", refused)

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            me = lab.identity("laptop", 99)
            async with dial(net.open_stream, "host", 7001, me, "control", seconds=10) as (control, _):
                await control.send(Measure(Peer("b", "host", 7002, 7002, 1)))
                assert await control.expect(Measured) == Measured(7002, None, "b: it has no wish to")

    lab.run(main)
