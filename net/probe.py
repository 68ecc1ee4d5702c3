"""Measurement of a link: latency from pings, and rate from messages of growing size.

Latency is half of the round trip, as if both directions were equal. The rate is that of the outgoing
direction.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ..planner import LinkSpeed
from .connection import Connection
from .dial import OpenStream, dial
from .errors import NodeLostError
from .identity import Identity
from .messages import BULK_LIMIT, Data, Peer, Ping, Pong

PINGS, FEWEST, PING_SECONDS = 20, 8, 0.2  # at most PINGS, within PING_SECONDS, but at least FEWEST
PAUSE_SECONDS = 0.004  # between pings, as between the tokens of a chain, since an idle device answers later
ENOUGH_SECONDS = 0.05
MOST_BYTES = 4 * 1024 * 1024


async def measure_peer(open_stream: OpenStream, me: Identity, peer: Peer, seconds: float) -> LinkSpeed:
    """Measures the link to a node over a new connection. Connecting and measuring may take `seconds` each.

    Errors as for `dial`. NodeLostError: the measurement took too long."""
    async with dial(open_stream, peer.host, peer.port, me, "probe", seconds=seconds, peer=peer) as (
        connection,
        _,
    ):
        with trio.move_on_after(seconds):
            return await measure(connection)
    raise NodeLostError(
        f"measuring the link to {peer.name} ({peer.host}:{peer.port}) took more than {seconds:g} s"
    )


async def probe(open_stream: OpenStream, me: Identity, peer: Peer, seconds: float) -> None:
    """Connects to a node and greets it, to find out whether it can be reached. Errors as for `dial`."""
    async with dial(open_stream, peer.host, peer.port, me, "probe", seconds=seconds, peer=peer):
        pass


class OneAtATime:
    """Has each device take part in one measurement at a time, so that they do not disturb each other."""

    def __init__(self) -> None:
        self._busy: set[int] = set()
        self._free = trio.Condition()

    @asynccontextmanager
    async def using(self, *devices: int) -> AsyncIterator[None]:
        """Waits until none of the devices is in use."""
        async with self._free:
            while not self._busy.isdisjoint(devices):
                await self._free.wait()
            self._busy.update(devices)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with self._free:
                    self._busy.difference_update(devices)
                    self._free.notify_all()


async def measure(connection: Connection) -> LinkSpeed:
    """Measures the link to the peer of a `probe` connection.

    It takes some round trips, and then about 0.1 s of traffic, or one frame on a slower link.
    """
    start, trips = trio.current_time(), list[float]()
    while len(trips) < FEWEST or (len(trips) < PINGS and trio.current_time() - start < PING_SECONDS):
        await trio.sleep(PAUSE_SECONDS)
        trips.append(await _round_trip(connection, len(trips), 0))
    trips.sort()
    trip, late, size = trips[len(trips) // 2], trips[-1 - len(trips) // 20], BULK_LIMIT
    while True:
        seconds = await _round_trip(connection, PINGS + size, size)
        if seconds - trip >= ENOUGH_SECONDS or size >= MOST_BYTES:
            rate = size / max(seconds - trip, 1e-6)
            return LinkSpeed(latency_s=trip / 2, bytes_per_s=rate, latency_p95_s=late / 2)
        size *= 2


async def _round_trip(connection: Connection, nonce: int, size: int) -> float:
    """The seconds until the Pong to a Ping sent after `size` bytes arrives."""
    start = trio.current_time()
    for at in range(0, size, BULK_LIMIT):
        await connection.send(Data(min(BULK_LIMIT, size - at)))
    await connection.send(Ping(nonce))
    pong = await connection.expect(Pong)
    while pong.nonce != nonce:
        pong = await connection.expect(Pong)
    return trio.current_time() - start
