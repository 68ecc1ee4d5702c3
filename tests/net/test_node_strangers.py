"""A node and strangers: whatever comes first, it says why it hangs up, and serves the others."""

import random
import struct
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from shoal.engine.strict import encode
from shoal.net.errors import MismatchError, NetError, RemoteProtocolError
from shoal.net.messages import (
    PROTOCOL,
    Assign,
    Epoch,
    Hello,
)
from shoal.net.placement import plan_at
from shoal.net.wire import WireProtocol

HEADER = struct.Struct("<4sHHI")


def header(kind: int, size: int) -> bytes:
    """Of a frame of this version of the protocol."""
    return HEADER.pack(b"SHOL", PROTOCOL, kind, size)


EPOCH = Epoch(5, 1)


def greeting(lab: ModuleType, purpose: str, ticket: int = 0) -> bytes:
    return b"".join(WireProtocol(True).send(lab.identity("stranger", 66).hello(purpose, ticket=ticket)))


def hostile(lab: ModuleType, ticket: int = 0) -> dict[str, tuple[bytes, bytes | None, type[NetError], str]]:
    """What a stranger sends first, what it sends when greeted (None: nothing), and what it is told."""
    hello, step = greeting(lab, "control"), header(32, 0xFFFFFFFF)
    small, remote = header(32, 40), RemoteProtocolError
    body = encode(Assign(Epoch(1, 1), 0, 99, None, 9, 1))
    return {
        "garbage": (b"GET / HTTP/1.1\r\n\r\n", None, remote, "does not speak shoal's protocol"),
        "random": (random.Random(1).randbytes(5000), None, remote, "does not speak shoal's protocol"),
        "a ping for a greeting": (header(3, 2) + b"{}", None, remote, "Ping out of turn"),
        "another version": (
            HEADER.pack(b"SHOL", 99, 1, 2), None, MismatchError,
            f"version 99 of shoal's protocol and this device {PROTOCOL}: upgrade shoal on this one",
        ),
        "another model": (
            b"".join(WireProtocol(True).send(lab.identity("stranger", 6, "cc" * 32).hello("step"))),
            None, MismatchError, "has the model cccccccccccccccc, a has aaaaaaaaaaaaaaaa",
        ),
        "4 GB for a greeting": (header(1, 0xFFFFFFFF), None, remote, "the limit is 65536"),
        "4 GB of rows": (greeting(lab, "step", ticket), step, remote, "announced a Step of 4294967295 bytes"),
        "rows on control": (hello, small, remote, "sent Step on a control connection"),
        "garbage once greeted": (hello, b"\x00" * 100_000, remote, "does not speak shoal's protocol"),
        "a step connection": (greeting(lab, "step"), None, NetError, "only from its coordinator"),
        "a probe with a wrong ticket": (
            greeting(lab, "probe", ticket ^ 1), None, NetError, "only from its coordinator"
        ),
        "a false assignment": (
            hello,
            header(5, len(body)) + body,
            remote, "assigned units [0, 99) of 6",
        ),
    }  # fmt: skip


CASES = (
    "garbage", "random", "a ping for a greeting", "another version", "another model", "4 GB for a greeting",
    "4 GB of rows", "rows on control", "garbage once greeted", "a step connection",
    "a probe with a wrong ticket", "a false assignment",
)  # fmt: skip


async def told(stream: trio.abc.Stream, connection: WireProtocol) -> Any:
    """The next message, or what next_message says at the end."""
    while True:
        message = connection.next_message()
        if isinstance(message, Hello):
            return message
        if message.__class__.__name__ != "Signal":
            return message
        data = await stream.receive_some(65536)
        connection.receive_data(data)
        if not data:
            return connection.next_message()


@pytest.mark.parametrize("case", CASES)
def test_a_stranger_is_told_why_and_the_node_goes_on(lab: ModuleType, case: str) -> None:
    early = case in ("rows on control", "garbage once greeted", "a false assignment")

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")

            async def intrude() -> None:
                first, second, kind, words = hostile(lab, net.peer(7001).ticket)[case]
                stream = await net.open_stream("host", 7001)
                connection = WireProtocol(True)
                purpose = next((p for p in ("step", "probe") if f'"{p}"'.encode() in first), "control")
                connection.send(lab.identity("stranger", 66).hello(purpose))
                await stream.send_all(first)
                answer = await told(stream, connection)
                if second is not None:
                    assert isinstance(answer, Hello)
                    await stream.send_all(second)
                    answer = await told(stream, connection)
                assert (answer.code, words in answer.text) == (kind.exit_code, True), answer
                await stream.aclose()
                await trio.testing.wait_all_tasks_blocked()
                assert any(words in line for line in net.nodes[7001].log)

            if early:
                await intrude()
            async with net.coordinator(plan=plan_at((0, 3, 6))) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=10) as tokens:
                    got = [await anext(tokens)]
                    if not early:
                        await intrude()
                    got += [token async for token in tokens]
                assert got == lab.oracle([1, 2], 10)
                assert coordinator.recoveries == 0

    lab.run(main)


def test_the_cases_are_all_there(lab: ModuleType) -> None:
    assert set(hostile(lab)) == set(CASES)


@pytest.mark.parametrize("cut", [1, 11, 12, 40])
def test_a_stranger_that_stops_in_the_middle_is_named_in_the_log(lab: ModuleType, cut: int) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            stream = await net.open_stream("host", 7001)
            await stream.send_all(greeting(lab, "control")[:cut])
            await stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert f"a peer: the connection ended after {cut} bytes" in net.nodes[7001].log[-1]

    lab.run(main)


def test_a_stranger_that_says_nothing_is_dropped_in_time(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            stream = await net.open_stream("host", 7001)
            assert await stream.receive_some(100) == b""
            assert trio.current_time() == 10
            await trio.testing.wait_all_tasks_blocked()
            assert "did not say Hello within 10 s" in net.nodes[7001].log[-1]

    lab.run(main)
