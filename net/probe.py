"""Measures a link: the latencies of some pings, and the rate of a growing pile of bytes.

The way there and back is taken as symmetric in latency; the rate is that of the direction from here.
"""

from __future__ import annotations

import trio

from ..planner import LinkSpeed
from .connection import Connection, OpenStream, dial
from .errors import NodeLostError
from .identity import Identity
from .messages import BULK_LIMIT, Data, Peer, Ping, Pong

PINGS, FEWEST, PING_SECONDS = 20, 8, 0.2  # so many, or as many as go into that time, and never too few
PAUSE_SECONDS = 0.004  # between them, as between a chain's tokens: who has rested answers later
ENOUGH_SECONDS = 0.05
MOST_BYTES = 4 * 1024 * 1024


async def measure_peer(open_stream: OpenStream, me: Identity, peer: Peer, seconds: float) -> LinkSpeed:
    """The link from here to a node, over a connection of its own, made and measured within `seconds` each.

    Errors as for `dial`."""
    async with dial(open_stream, peer.host, peer.port, me, "probe", seconds=seconds, peer=peer) as (
        connection,
        _,
    ):
        with trio.move_on_after(seconds):
            return await measure(connection)
    raise NodeLostError(
        f"the link to {peer.name} ({peer.host}:{peer.port}) was not measured in {seconds:g} s"
    )


async def measure(connection: Connection) -> LinkSpeed:
    """The link from here to the peer, which answers pings (a connection for `probe`).

    Takes some round trips, and about 0.1 s of the line's time, or one frame's on a line slower than that.
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
    """Seconds until the answer to a ping behind `size` bytes is there."""
    start = trio.current_time()
    for at in range(0, size, BULK_LIMIT):
        await connection.send(Data(min(BULK_LIMIT, size - at)))
    await connection.send(Ping(nonce))
    pong = await connection.expect(Pong)
    while pong.nonce != nonce:
        pong = await connection.expect(Pong)
    return trio.current_time() - start
