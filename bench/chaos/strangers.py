"""Strangers that try to use up a node's connections, as tests and bench.chaos send them.

python -m bench.chaos.strangers MODEL HOST:PORT ...    until standard input ends
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from shoal.net.identity import Identity
from shoal.net.messages import Ping, Purpose
from shoal.net.wire import Signal, WireProtocol

IDLE, PROBES, SQUATTERS = 200, 64, 16
PAUSE_SECONDS = 0.25
"""Between the end of a connection and the next attempt."""

Open = Callable[[], Awaitable[trio.abc.Stream]]


async def crowd(
    open_stream: Open, me: Identity, *, idle: int = IDLE, probes: int = PROBES, squatters: int = SQUATTERS
) -> None:
    """So many of each kind, which connect again whenever the node ends their connection, until cancelled."""
    async with trio.open_nursery() as tasks:
        for _ in range(idle):
            tasks.start_soon(_again, open_stream, _silent)
        for _ in range(probes):
            tasks.start_soon(_again, open_stream, partial(_pinging, me, "probe"))
        for _ in range(squatters):
            tasks.start_soon(_again, open_stream, partial(_pinging, me, "step"))


async def _again(open_stream: Open, behave: Callable[[trio.abc.Stream], Awaitable[None]]) -> None:
    while True:
        try:
            async with await open_stream() as stream:
                await behave(stream)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await trio.sleep(PAUSE_SECONDS)


async def _silent(stream: trio.abc.Stream) -> None:
    """Says nothing until the node ends the connection."""
    while await stream.receive_some(4096):
        pass


async def _pinging(me: Identity, purpose: Purpose, stream: trio.abc.Stream) -> None:
    """Says Hello with a ticket that it has guessed; if it is let in, pings every second."""
    wire = WireProtocol(True)
    await stream.send_all(b"".join(wire.send(me.hello(purpose, ticket=secrets.randbits(64)))))
    while True:
        with trio.move_on_after(1):
            data = await stream.receive_some(65536)
            wire.receive_data(data)
            while not isinstance(wire.next_message(), Signal):
                pass
            if not data:
                return
            continue
        await stream.send_all(b"".join(wire.send(Ping(1))))


async def _main(model: str, numerics: str, addresses: Sequence[str]) -> None:
    me = Identity("stranger", secrets.randbits(64), "0", int(numerics), model)
    async with trio.open_nursery() as tasks:
        for address in addresses:
            host, _, port = address.rpartition(":")
            tasks.start_soon(partial(crowd, partial(trio.open_tcp_stream, host, int(port)), me))
        await trio.sleep(1)
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, sys.argv[1], sys.argv[2], sys.argv[3:])
