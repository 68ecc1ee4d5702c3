"""The devices that answer, as JSON and as a stream of events: what `shoal top` shows (docs/status.md)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable

import trio

from ..engine import strict
from ..engine.errors import ShoalError
from ..net.errors import NodeLostError
from ..status import Status
from .errors import ApiError, Obstacle, api_error
from .served import Call, Event, Reply

_ANSWERING = ("serving", "moving", "committing")
"""Phases of a head in which answers go on, or will within a moment."""
GetStatus = Callable[[], Status]
"""Blocks, and may be called in any thread. ShoalErrors: the head cannot tell."""
LOOK_SECONDS = 0.25
"""A status is this old at most, and a stream has no more than one in this time."""
PULSE_SECONDS = 5.0
"""A stream has an event at least this often, so that a client sees that the connection lives."""
_PATIENCE_SECONDS = 10.0
"""For a head to tell its status."""


class House:
    """The status of the devices for all clients that watch them, who ask the devices only once together.
    `status` None: there are no devices, since this process computes alone."""

    def __init__(self, status: GetStatus | None) -> None:
        self._status = status
        self._asking = trio.CapacityLimiter(1)
        """Lets one thread at a time ask. A thread for which no client waits any more keeps it until it
        ends."""
        self._told, self._at = b"", -LOOK_SECONDS

    async def obstacle(self) -> Obstacle | None:
        """Why nothing can be answered at the moment; None: it can."""
        if self._status is None:
            return None
        try:
            status = strict.decode(Status, await self._look())
        except ShoalError as error:
            return Obstacle("lost", str(error))
        if status.context and status.phase in _ANSWERING:
            return None
        count = len(status.devices)
        known = f"{status.phase}, {count} device{'' if count == 1 else 's'}"
        return Obstacle(status.phase, status.reason or known)

    async def show(self, call: Call) -> AsyncGenerator[Event | Reply, None]:
        """GET /house."""
        yield Reply(await self._look())

    async def watch(self, call: Call) -> AsyncGenerator[Event | Reply, None]:
        """GET /house/events. Events `status` have the JSON of /house, and `error` that of an error, after
        which the stream goes on: another head may follow one that has ended."""
        self._check()
        last, due = Event("", b""), trio.current_time()
        while True:
            event = await self._event()
            if event != last or trio.current_time() >= due:
                yield event
                last, due = event, trio.current_time() + PULSE_SECONDS
            with trio.move_on_after(LOOK_SECONDS):
                await call.ending.wait()
                return

    async def _event(self) -> Event:
        try:
            return Event("status", await self._look())
        except ShoalError as error:
            return Event("error", json.dumps(api_error(error).body()).encode())

    def _check(self) -> GetStatus:
        if self._status is None:
            raise ApiError(
                404,
                "this server computes in one process, so there are no devices to show: start `shoal up`, or "
                "give `shoal serve` --nodes",
                code="no_house",
            )
        return self._status

    async def _look(self) -> bytes:
        """The status as JSON. ShoalErrors: those of `status`. NodeLostError: the head does not answer."""
        status = self._check()

        def ask() -> None:
            if time.monotonic() - self._at >= LOOK_SECONDS:
                self._told, self._at = strict.encode(status()), time.monotonic()

        if time.monotonic() - self._at >= LOOK_SECONDS:
            with trio.move_on_after(_PATIENCE_SECONDS) as asking:
                await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._asking)
            if asking.cancelled_caught:
                raise NodeLostError(f"the head does not tell its status within {_PATIENCE_SECONDS:g} s")
        return self._told
