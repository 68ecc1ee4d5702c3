"""Nodes that lie to a coordinator: a lie ends their answer or connection and never confuses the
coordinator."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from shoal.net.connection import Connection, open_connection, open_tasks
from shoal.net.coordinator import Coordinator
from shoal.net.dial import greet
from shoal.net.errors import MismatchError, NodeLostError, RemoteProtocolError, to_wire
from shoal.net.messages import (
    Assign,
    Broken,
    Epoch,
    Error,
    GetStats,
    Hello,
    Kept,
    Loaded,
    Open,
    Ping,
    Pong,
    Prepared,
    Result,
    Stats,
    Step,
    Work,
)
from shoal.net.placement import plan_at

Answer = Callable[[Connection, Step], Awaitable[None]]


class FalseNode:
    """Greets and loads like a node, and answers each Step as it is told to."""

    def __init__(self, lab: ModuleType, answer: Answer, number: int) -> None:
        self._lab, self._answer, self._number = lab, answer, number
        self._control: Connection | None = None

    async def connected(self, stream: trio.abc.Stream) -> None:
        async def anyone(hello: Hello) -> int:
            return 0

        try:
            async with open_connection(stream, "coordinator", dialled=False) as connection:
                me = self._lab.identity(f"liar{self._number}", self._number)
                hello = await greet(connection, me, self._lab.OFFER, seconds=5, admit=anyone)
                if hello.purpose == "control":
                    self._control = connection
                while True:
                    await self._hear(connection, await connection.receive())
        except NodeLostError:
            pass

    async def _hear(self, connection: Connection, message: Any) -> None:
        match message:
            case Ping(nonce):
                await connection.send(Pong(nonce))
            case Assign(epoch):
                await connection.send(Loaded(epoch, 0.0, 1))
            case GetStats():
                await connection.send(Stats(None, Work(0, 0, 0.0), Work(0, 0, 0.0)))
            case Step():
                assert self._control is not None
                await self._answer(self._control, message)
            case Open():
                pass


def ask(lab: ModuleType, answer: Answer, edges: tuple[int, ...] = (0, 6)) -> list[int]:
    """What a coordinator gets from a chain of false nodes."""

    async def main() -> list[int]:
        async with open_tasks() as nursery:
            falses = {7000 + i: FalseNode(lab, answer, i) for i in range(1, len(edges))}

            async def open_stream(host: str, port: int) -> trio.abc.Stream:
                here, there = trio.testing.memory_stream_pair()
                nursery.start_soon(falses[port].connected, there)
                return here

            net = lab.FakeNetwork(nursery)
            net.open_stream = open_stream
            try:
                async with net.coordinator(*falses, plan=plan_at(edges)) as coordinator:
                    tokens: list[int] = await lab.collect(coordinator, [1, 2], 3)
                    assert len(await coordinator.stats()) == len(falses)
            finally:
                nursery.cancel_scope.cancel()
        return tokens

    result: list[int] = lab.run(main)
    return result


def result(step: Step, **changes: Any) -> Result:
    return replace(Result(step.session, step.epoch, step.first, step.rows, 5), **changes)


def test_a_false_node_that_behaves_is_believed(lab: ModuleType) -> None:
    async def answer(control: Connection, step: Step) -> None:
        await control.send(result(step))

    assert ask(lab, answer) == [5, 5, 5]


@pytest.mark.parametrize("changes", [{"first": 9}, {"rows": 7}, {"token": None}, {"token": 97}], ids=str)
def test_a_result_that_was_not_due_ends_the_answer(lab: ModuleType, changes: dict[str, Any]) -> None:
    async def answer(control: Connection, step: Step) -> None:
        await control.send(result(step, **changes))

    with pytest.raises(RemoteProtocolError, match="the last node"):
        ask(lab, answer)


def test_results_of_other_sessions_and_epochs_are_dropped(lab: ModuleType) -> None:
    async def answer(control: Connection, step: Step) -> None:
        await control.send(result(step, session=77, token=1))
        await control.send(result(step, epoch=Epoch(99, 0), token=2))
        await control.send(result(step, epoch=Epoch(98, 1), token=3))
        await control.send(result(step, token=4))

    assert ask(lab, answer) == [4, 4, 4]


def test_reports_of_other_epochs_are_dropped(lab: ModuleType) -> None:
    async def answer(control: Connection, step: Step) -> None:
        await control.send(Loaded(Epoch(98, 1), 0.0, 1, rows=(Kept(step.session, 99),)))
        await control.send(Prepared(step.epoch, 0.0, 1))
        await control.send(Broken(Epoch(98, 1), 1, "a lie", None))
        await control.send(result(step))

    assert ask(lab, answer) == [5, 5, 5]


def test_between_reports_that_arrive_at_once_others_have_their_turn(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, heard, hear = 0, list[int](), Coordinator._hear

    def counted(coordinator: Coordinator, member: int, message: Any) -> None:
        if isinstance(message, Loaded) and message.epoch == Epoch(98, 1):
            heard.append(turns)
        hear(coordinator, member, message)

    monkeypatch.setattr(Coordinator, "_hear", counted)

    async def answer(control: Connection, step: Step) -> None:
        nonlocal turns
        if not heard:
            reports = [control._wire.send(Loaded(Epoch(98, 1), 0.0, 1)) for _ in range(50)]
            await control._stream.send_all(b"".join(frame for frames in reports for frame in frames))
        while len(heard) < 50:
            turns += 1
            await trio.lowlevel.checkpoint()
        await control.send(result(step))

    assert ask(lab, answer) == [5, 5, 5]
    assert max(map(heard.count, heard)) <= 2  # tasks that can run do so in any order


def test_a_flood_of_results_loses_the_node(lab: ModuleType) -> None:
    async def answer(control: Connection, step: Step) -> None:
        frames = [frame for _ in range(50) for frame in control._wire.send(result(step))]
        await control._stream.send_all(b"".join(frames))  # all at once, before the session can look

    with pytest.raises(RemoteProtocolError, match=r"sent more answers than were requested|was not due"):
        ask(lab, answer)


def test_a_result_from_the_middle_of_the_chain_loses_the_node(lab: ModuleType) -> None:
    async def answer(control: Connection, step: Step) -> None:
        await control.send(result(step))

    words = "liar1 sent a Result and is not the last node of the chain; the other nodes .* need 2 nodes"
    with pytest.raises(NodeLostError, match=words):
        ask(lab, answer, (0, 3, 6))


def test_a_peer_that_offers_no_device_is_no_node(lab: ModuleType) -> None:
    async def main() -> None:
        async with open_tasks() as tasks:
            net = lab.FakeNetwork(tasks)

            async def another_coordinator(stream: trio.abc.Stream) -> None:
                async with open_connection(stream, "coordinator", dialled=False) as connection:
                    hello = await connection.expect(Hello)
                    await connection.send(lab.identity("laptop2", 8).hello(hello.purpose))
                    with pytest.raises(NodeLostError):
                        await connection.receive()

            async def open_stream(host: str, port: int) -> trio.abc.Stream:
                here, there = trio.testing.memory_stream_pair()
                tasks.start_soon(another_coordinator, there)
                return here

            net.open_stream = open_stream
            with pytest.raises(RemoteProtocolError, match=r"laptop2 .* is not a node: it offers no device"):
                async with net.coordinator(7001, plan=plan_at((0, 6))):
                    pass

    lab.run(main)


def test_an_error_from_a_node_is_raised_as_what_it_says(lab: ModuleType) -> None:
    async def answer(control: Connection, step: Step) -> None:
        await control.send(Error(*to_wire(MismatchError("something changed"))))

    with pytest.raises(MismatchError, match="something changed"):
        ask(lab, answer)
