"""The watch over the two ends of a `step` connection.

The side that dialled pings and judges the silence (`watch`). The side that was dialled answers, and says that
it lives when it cannot answer in time, since pings wait behind rows (`attend`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from ..engine.errors import ShoalError
from .connection import Connection, open_tasks
from .errors import NodeLostError
from .liveness import (
    IDLE_TICK_SECONDS,
    TICK_SECONDS,
    AwakeClock,
    Heartbeat,
    RoundTrip,
    Stillness,
    Timing,
    next_tick,
)
from .messages import Ping, Pong

SETTLE_SECONDS = 0.2
"""How long the old connection may stay silent after a new one has been answered."""
PINGS_BYTES = 1024
"""More than pings bring between two looks of `attend`. What brings as much is rows."""
FIRST_NONCE = 1 << 32
"""Nonces of this watch begin here. Smaller ones belong to pings behind rows (net/pace.py)."""


class ConnectionStalledError(NodeLostError):
    """A connection carries nothing, while a new one to the same node works."""


class Watch:
    """The watch of the side that dialled. `busy` tells whether rows or tokens are due: then pings are sent
    more often, and the bound of silence follows the round trips. `probe` connects to the same peer anew and
    returns when it has greeted. `ponged` is told each Pong."""

    def __init__(
        self,
        connection: Connection,
        timing: Timing,
        *,
        busy: Callable[[], bool],
        probe: Callable[[], Awaitable[object]],
        ponged: Callable[[Pong], object] = lambda pong: None,
    ) -> None:
        self._connection, self._timing = connection, timing
        self._busy, self._probe, self._ponged = busy, probe, ponged
        self._awake = AwakeClock(trio.current_time(), 2 * IDLE_TICK_SECONDS)
        # A stage that computes without a pause answers no ping at once, so this trip may be the only one.
        trip = RoundTrip() if connection.trip is None else RoundTrip().measured(connection.trip)
        self._heartbeat, self._nonce, self._probing = Heartbeat(trip), FIRST_NONCE, False

    async def run(self) -> None:
        """Watches until cancelled. NodeLostError: the connection has ended, or the peer is silent for too
        long. ConnectionStalledError: the peer answers on a new connection, and not on this one."""
        async with open_tasks() as tasks:
            tasks.start_soon(self._receive)
            while True:
                pause = TICK_SECONDS if self._busy() else IDLE_TICK_SECONDS
                await trio.sleep_until(next_tick(trio.current_time(), pause))
                self._look(self._awake.tick(trio.current_time()), tasks)

    async def _receive(self) -> None:
        while True:
            message = await self._connection.receive()
            assert isinstance(message, Pong), "the wire lets nothing else through"
            now = self._awake.at(trio.current_time())
            answered = message.nonce == self._nonce and message.at_once
            self._heartbeat = self._heartbeat.heard(now - self._heartbeat.pinged if answered else None)
            self._ponged(message)

    def _look(self, now: float, tasks: trio.Nursery) -> None:
        busy, timing, silence = self._busy(), self._timing, self._heartbeat.silence(now)
        if silence > self._heartbeat.bound(timing.overdue, busy=busy):
            raise NodeLostError(
                f"{self._connection.peer} is lost: it has answered nothing for {silence:.1f} s"
            )
        if busy and silence > self._heartbeat.trip.suspect() and not self._probing:
            self._probing = True
            tasks.start_soon(self._try_anew)
        if self._heartbeat.due(now, timing.busy if busy else timing.heartbeat):
            self._nonce += 1
            # If the queue is full, rows are on their way, and the peer says that it receives them.
            self._connection.post(Ping(self._nonce))
            self._heartbeat = self._heartbeat.ping(now)

    async def _try_anew(self) -> None:
        silent_since = self._heartbeat.waiting
        try:
            await self._probe()
            await trio.sleep(SETTLE_SECONDS)
            if self._heartbeat.waiting == silent_since is not None:
                raise ConnectionStalledError(
                    f"{self._connection.peer} answers on a new connection, and not on the one for rows"
                )
        except ConnectionStalledError:
            raise
        except ShoalError:
            return  # the peer cannot be reached at all: its silence decides
        finally:
            self._probing = False


async def attend(
    connection: Connection,
    timing: Timing,
    held_back: Callable[[], bool],
    busy: Callable[[], bool] = lambda: True,
) -> None:
    """The part of the side that was dialled. While rows arrive, behind which pings may wait, or anything
    arrives at a `busy` stage, or the stage accepts no more (`held_back`), it sends a Pong at every tick.
    NodeLostError: nothing has arrived for `timing.overdue`."""
    awake = AwakeClock(trio.current_time(), 2 * IDLE_TICK_SECONDS)
    still, before = Stillness(), connection.received
    still.seconds(awake.tick(trio.current_time()), before, due=True)

    def rows() -> bool:
        """Whether rows arrive. At an idle stage pings alone are answered at once; a chunk of rows may take
        seconds on a slow link before the stage has it."""
        return connection.received - before > (0 if busy() else PINGS_BYTES)

    while True:
        pause = TICK_SECONDS if held_back() or rows() else IDLE_TICK_SECONDS
        await trio.sleep_until(next_tick(trio.current_time(), pause))
        held, received = held_back(), connection.received
        silence = still.seconds(awake.tick(trio.current_time()), received, due=not held)
        if silence > timing.overdue:
            raise NodeLostError(f"{connection.peer} is lost: it has sent nothing for {silence:.0f} s")
        if held or rows():
            connection.post(Pong(0))
        before = received
