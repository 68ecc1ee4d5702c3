"""One connection over memory streams: what every kind of end becomes, and that nothing waits for ever."""

import socket
from contextlib import AsyncExitStack
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from shoal.engine.batch import Want
from shoal.net.connection import Connection, open_connection
from shoal.net.dial import dial, earliest, enter_dial, greet
from shoal.net.errors import LocalProtocolError, NodeLostError, RemoteProtocolError
from shoal.net.messages import Close, Data, Epoch, Hello, Open, Peer, Ping, Pong, Step
from shoal.net.probe import measure


async def anyone(hello: Hello) -> int:
    """Admits whoever greets."""
    return 0


async def pair(lab: ModuleType, test: Any, purpose: str = "control", queue: int = 64) -> None:
    """Two links that have greeted each other."""
    here, there = trio.testing.memory_stream_pair()
    async with (
        open_connection(here, "pi", dialled=True, queue=queue) as a,
        open_connection(there, "laptop", dialled=False) as b,
    ):
        await a.send(lab.identity("laptop", 1).hello(purpose))
        await greet(b, lab.identity("pi", 2), lab.OFFER, seconds=1, admit=anyone)
        await a.expect(Hello)
        await test(a, b, here, there)


def test_an_end_between_frames_loses_the_peer(lab: ModuleType) -> None:
    async def test(a: Connection, b: Connection, here: Any, there: Any) -> None:
        await there.aclose()
        with pytest.raises(NodeLostError, match="pi is lost: it closed the connection"):
            await a.receive()
        with pytest.raises(NodeLostError, match="it closed the connection"):
            await a.receive()

    lab.run(lambda: pair(lab, test))


def test_a_write_that_fails_wakes_the_reader_and_ends_sending(lab: ModuleType) -> None:
    async def test(a: Connection, b: Connection, here: Any, there: Any) -> None:
        async def broken(data: object) -> None:
            raise trio.BrokenResourceError from OSError(32, "Broken pipe")

        here.send_stream.send_all = broken
        await a.send(Ping(1))
        with pytest.raises(NodeLostError, match=r"pi is lost: the connection broke \(.*Broken pipe\)"):
            await a.receive()
        for _ in range(2):
            with pytest.raises(NodeLostError, match="Broken pipe"):
                await a.send(Ping(2))
            with pytest.raises(NodeLostError, match="Broken pipe"):
                a.post(Ping(2))

    lab.run(lambda: pair(lab, test))


def test_a_read_that_fails_names_the_cause(lab: ModuleType) -> None:
    async def test(a: Connection, b: Connection, here: Any, there: Any) -> None:
        async def broken(most: object = None) -> bytes:
            raise trio.BrokenResourceError from OSError(104, "Connection reset by peer")

        here.receive_stream.receive_some = broken
        with pytest.raises(NodeLostError, match="Connection reset by peer"):
            await a.receive()

    lab.run(lambda: pair(lab, test))


def test_the_wrong_message_is_the_peers_fault(lab: ModuleType) -> None:
    async def test(a: Connection, b: Connection, here: Any, there: Any) -> None:
        await a.send(Ping(1))
        with pytest.raises(RemoteProtocolError, match="sent Ping where Open was expected"):
            await b.expect(Open)
        with pytest.raises(LocalProtocolError):
            await b.send(Ping(1))

    lab.run(lambda: pair(lab, test))


def test_a_full_queue_is_said_and_drains(lab: ModuleType) -> None:
    async def main() -> None:
        here, there = trio.testing.lockstep_stream_pair()
        async with open_connection(here, "pi", dialled=True, queue=2) as a:
            await a.send(lab.identity("laptop", 1).hello("control"))
            await trio.testing.wait_all_tasks_blocked()
            assert [a.post(Ping(i)) for i in range(4)] == [True, True, False, False]
            with trio.move_on_after(1) as scope:
                await a.send(Ping(9))
            assert scope.cancelled_caught
            async with open_connection(there, "laptop", dialled=False) as b:
                await b.expect(Hello)
                assert [(await b.expect(Ping)).nonce for _ in range(2)] == [0, 1]
                await trio.testing.wait_all_tasks_blocked()
                assert a.post(Ping(2))

    lab.run(main)


def test_all_rows_that_have_arrived_are_returned_together_with_what_follows_them(lab: ModuleType) -> None:
    """A stage joins calls that wait, and drops the rows of a session that ends."""

    async def main() -> None:
        ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()]
        async with (
            open_connection(ends[0], "b", dialled=True) as down,
            open_connection(ends[1], "a", dialled=False) as up,
        ):
            for one, other, name in ((down, up, "a"), (up, down, "b")):
                await one.send(lab.identity(name, 1).hello("step"))
                await other.expect(Hello)
            step = Step(1, Epoch(1, 1), 0, (), Want.TOKEN, np.ones((1, 1000), np.float32))
            sent = [*(replace(step, first=at) for at in range(12)), Close(1, Epoch(1, 1))]
            assert down.post(*sent) and not down._unsent, "the socket has taken all"
            got = up.arrived()
            assert [type(message) for message in got] == [type(message) for message in sent]
            assert up.arrived() == []
            down._socket.shutdown(socket.SHUT_WR)
            with pytest.raises(NodeLostError, match="closed the connection"):
                up.arrived()

    trio.run(main)


def test_rows_of_which_the_socket_takes_a_part_may_change_once_they_are_posted(lab: ModuleType) -> None:
    async def main() -> None:
        ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()]
        ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        async with (
            open_connection(ends[0], "b", dialled=True) as down,
            open_connection(ends[1], "a", dialled=False) as up,
        ):
            for one, other, name in ((down, up, "a"), (up, down, "b")):
                await one.send(lab.identity(name, 1).hello("step"))
                await other.expect(Hello)
            rows = np.arange(64_000, dtype=np.float32).reshape(64, 1000)
            step = Step(1, Epoch(1, 1), 0, (), Want.TOKEN, rows.copy(), tags=(7,))
            later = Step(1, Epoch(1, 1), 64, (), Want.TOKEN, rows[:1])
            assert down.post(step) and down._unsent, "the socket has taken a part"
            assert step.hidden is not None
            step.hidden[:] = 0
            assert down.post(later)
            for expected in (rows, rows[:1]):
                got = await up.expect(Step)
                assert got.hidden is not None and np.array_equal(got.hidden, expected)

    trio.run(main)


def test_what_was_queued_is_written_before_the_end(lab: ModuleType) -> None:
    async def main() -> None:
        here, there = trio.testing.memory_stream_pair()
        async with open_connection(there, "laptop", dialled=False) as b:
            async with open_connection(here, "pi", dialled=True) as a:
                await a.send(lab.identity("laptop", 1).hello("control"))
                for i in range(50):
                    await a.send(Ping(i))
            await b.expect(Hello)
            assert [(await b.expect(Ping)).nonce for _ in range(50)] == list(range(50))
            with pytest.raises(NodeLostError):
                await b.receive()

    lab.run(main)


def test_an_end_waits_a_second_for_a_peer_that_does_not_read(lab: ModuleType) -> None:
    async def main() -> None:
        here, there = trio.testing.lockstep_stream_pair()
        async with open_connection(here, "pi", dialled=True) as a:
            await a.send(lab.identity("laptop", 1).hello("control"))
        assert trio.current_time() == 1
        await there.aclose()

    lab.run(main)


def test_a_refusal_ends_within_two_seconds_whatever_the_peer_does(lab: ModuleType) -> None:
    async def main() -> None:
        for do in ("nothing", "flood", "leave"):
            here, there = trio.testing.memory_stream_pair()
            start = trio.current_time()
            async with trio.open_nursery() as tasks:
                if do == "flood":

                    async def flood(stream: Any = there) -> None:
                        while True:
                            await stream.send_all(bytes(1000))
                            await trio.sleep(0.01)

                    tasks.start_soon(flood)
                elif do == "leave":
                    await there.aclose()
                async with open_connection(here, "pi", dialled=False) as a:
                    await a.refuse(RemoteProtocolError("garbage"))
                assert trio.current_time() - start <= 2
                tasks.cancel_scope.cancel()
            await there.aclose()

    lab.run(main)


@pytest.mark.parametrize(("host", "named"), [("::1", r"\[::1\]:7"), ("127.0.0.1", r"127\.0\.0\.1:7")])
def test_a_node_that_cannot_be_reached_is_named_as_the_command_line_takes_it(
    lab: ModuleType, host: str, named: str
) -> None:
    async def refuse(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError(111, "Connection refused")

    async def main() -> None:
        with pytest.raises(NodeLostError, match=rf"^{named} cannot be reached \(Connection refused\)"):
            async with dial(refuse, host, 7, lab.identity("laptop", 1), "control", seconds=1):
                pass

    lab.run(main)


def test_dialling_measures_how_long_the_answer_takes(lab: ModuleType) -> None:
    async def main() -> None:
        here, there = trio.testing.memory_stream_pair()

        async def open_stream(host: str, port: int) -> trio.abc.Stream:
            await trio.sleep(3)
            return here

        async def slow(hello: Hello) -> int:
            await trio.sleep(0.25)
            return 0

        async def node() -> None:
            async with open_connection(there, "laptop", dialled=False) as connection:
                await greet(connection, lab.identity("pi", 2), lab.OFFER, seconds=5, admit=slow)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(node)
            async with dial(open_stream, "pi", 7, lab.identity("laptop", 1), "step", seconds=5) as (
                connection,
                _,
            ):
                assert connection.trip == 0.25

    lab.run(main)


def test_dialling_has_one_deadline_for_all_of_it(lab: ModuleType) -> None:
    async def slow(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep(seconds)
        return trio.testing.memory_stream_pair()[0]

    async def main() -> None:
        with pytest.raises(NodeLostError, match=words):
            async with dial(slow, "pi", 7, lab.identity("laptop", 1), "control", seconds=5):
                pass
        assert trio.current_time() == 5

    seconds, words = 4.0, "pi:7 did not say Hello within 5 s: check that it is a shoal node"
    lab.run(main)
    seconds, words = 60.0, "pi:7 did not answer within 5 s: check that `shoal node` is running there"
    lab.run(main)


def test_a_link_is_measured_as_it_is(lab: ModuleType) -> None:
    async def test(a: Connection, b: Connection, here: Any, there: Any) -> None:
        latency, rate, filled = 0.03, 1e6, 0.0

        async def line(data: bytes) -> None:
            nonlocal filled
            await trio.sleep(len(data) / rate)
            filled += len(data)

        send = here.send_stream.send_all

        async def slow(data: bytes) -> None:
            await line(data)
            await send(data)

        here.send_stream.send_all = slow

        async def answer() -> None:
            while True:
                message = await b.receive()
                if isinstance(message, Ping):
                    await trio.sleep(2 * latency)
                    await b.send(Pong(message.nonce))
                else:
                    assert isinstance(message, Data)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(answer)
            found = await measure(a)
            tasks.cancel_scope.cancel()
        assert found.latency_s == pytest.approx(latency, rel=1e-2)
        assert found.bytes_per_s == pytest.approx(rate, rel=1e-2)
        assert filled < 200_000  # a slow line is not kept busy for long

    lab.run(lambda: pair(lab, test, purpose="probe"))


class Attempts:
    """Attempts to connect, of which those before `link_is_back` get no answer."""

    def __init__(self, link_is_back: float) -> None:
        self.begun: list[float] = []
        self.streams: list[trio.abc.Stream] = []
        self._back = link_is_back

    async def __call__(self) -> trio.abc.Stream:
        self.begun.append(trio.current_time())
        if self.begun[-1] < self._back:
            await trio.sleep_forever()
        await trio.sleep(0.05)
        here, _ = trio.testing.memory_stream_pair()
        self.streams.append(here)
        return here


@pytest.mark.parametrize("cut", [0.0, 0.4, 7.0, 20.0])
def test_a_link_that_was_cut_is_found_soon_after_it_is_back(cut: float) -> None:
    async def main() -> None:
        attempts = Attempts(cut)
        stream = await earliest(attempts)
        assert attempts.streams == [stream]
        assert cut <= trio.current_time() <= cut + 0.3 + 0.05 + 1e-6
        assert len(attempts.begun) <= cut / 0.3 + 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_attempt_that_is_refused_ends_the_others() -> None:
    async def main() -> None:
        count = 0

        async def second_is_refused() -> trio.abc.Stream:
            nonlocal count
            count += 1
            if count < 2:
                await trio.sleep_forever()
            raise ConnectionRefusedError(111, "Connection refused")

        with pytest.raises(ConnectionRefusedError):
            await earliest(second_is_refused)
        assert trio.current_time() == pytest.approx(0.3)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_of_two_streams_at_the_same_moment_one_is_closed() -> None:
    async def main() -> None:
        streams: list[trio.StapledStream[Any, Any]] = []

        async def at_once() -> trio.abc.Stream:
            await trio.sleep_until(1.0)
            streams.append(trio.testing.memory_stream_pair()[0])
            return streams[-1]

        kept = await earliest(at_once)
        assert len(streams) > 1
        for stream in streams:
            if stream is not kept:
                with pytest.raises(trio.ClosedResourceError):
                    await stream.send_all(b"x")
        await kept.send_all(b"x")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("closed", "reached"), [(2, True), (3, False)])
def test_a_connection_that_a_crowded_node_closes_is_tried_again(
    lab: ModuleType, closed: int, reached: bool
) -> None:
    """A node closes connections that have not said Hello when it needs their place."""

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            count = 0

            async def crowded(host: str, port: int) -> trio.abc.Stream:
                nonlocal count
                count += 1
                if count > closed:
                    return await net.open_stream(host, port)
                here, there = trio.testing.memory_stream_pair()
                await there.aclose()
                return here

            me = lab.identity("laptop", 99)
            async with dial(net.open_stream, "host", 7001, me, "control", seconds=5) as (_, hello):
                peer = Peer("a", "host", 7001, 7001, hello.ticket)
                async with AsyncExitStack() as stack:
                    try:
                        await enter_dial(stack, crowded, me, peer, "step", 5.0)
                    except NodeLostError:
                        assert not reached
                    else:
                        assert reached
            assert trio.current_time() == pytest.approx(0.4)

    lab.run(main)
