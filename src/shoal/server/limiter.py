"""Who is answered now, who waits, and who is sent away.

`FairQueue` decides: the client with the fewest answers goes first, so one that sends many requests does not
keep the others waiting. `RequestLimiter` lets tasks wait for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

Waiting = Callable[[Callable[[], Awaitable[object]]], Awaitable[object]]
"""Awaits what a function returns, and may do so again."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits, or is answered in so many `slots`."""

    client: str
    slots: int
    called: trio.Event = field(default_factory=trio.Event)


class FairQueue:
    """The requests that are answered in `slots` slots, and those that wait, at most `most`."""

    def __init__(self, slots: int, most: int) -> None:
        self.slots, self.most = slots, most
        self.running: list[Ticket] = []
        self.waiting: deque[Ticket] = deque()

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return sum(ticket.slots for ticket in self.running)

    def join(self, client: str, slots: int) -> Ticket | None:
        """A ticket, which may be called at once; None: too many wait."""
        ticket = Ticket(client, min(slots, self.slots))
        self.waiting.append(ticket)
        self._call()
        if ticket in self.waiting and len(self.waiting) > self.most:
            self.waiting.remove(ticket)
            return None
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Frees the slots of a ticket, or its turn."""
        (self.running if ticket in self.running else self.waiting).remove(ticket)
        self._call()

    def _call(self) -> None:
        """Calls whose turn it is. A request that needs several slots is not passed by smaller ones."""
        while self.waiting:
            of = {ticket.client: 0 for ticket in self.waiting}
            for ticket in self.running:
                if ticket.client in of:
                    of[ticket.client] += ticket.slots
            first = min(
                self.waiting, key=lambda ticket: of[ticket.client]
            )  # of equals, the one that came first
            if self.used + first.slots > self.slots:
                return
            self.waiting.remove(first)
            self.running.append(first)
            first.called.set()


class Busy(Exception):
    """Too many requests wait. `seconds`: when to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests are waiting: try again in {seconds} s")
        self.seconds = seconds


class RequestLimiter:
    """A FairQueue for tasks."""

    def __init__(self, slots: int, most: int) -> None:
        self.queue = FairQueue(slots, most)
        self._mean = 1.0
        """Seconds that a request takes, of late."""

    @asynccontextmanager
    async def taken(self, client: str, slots: int, waiting: Waiting) -> AsyncIterator[None]:
        """Waits for a turn, by `waiting`, and holds it within the block. Busy: too many wait."""
        ticket = self.queue.join(client, slots)
        if ticket is None:
            raise Busy(self.seconds)
        try:
            await waiting(ticket.called.wait)
            begun = trio.current_time()
            yield
            self._mean += 0.1 * (trio.current_time() - begun - self._mean)
        finally:
            self.queue.leave(ticket)

    @property
    def seconds(self) -> int:
        """When there may be room in the queue again: when as many have been answered as wait now."""
        rounds = (len(self.queue.waiting) + 1) / self.queue.slots
        return max(1, min(600, math.ceil(self._mean * rounds)))
