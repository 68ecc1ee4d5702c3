"""Admission of sessions to the chain: which sessions hold state on the nodes, and which wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from .session import Session


class SessionSlots:
    """Limits how many sessions hold state in the chain. A session that answers has a slot until its answer
    ends. A session that is idle between answers keeps its state until another session needs the slot or the
    memory."""

    def __init__(self, most: int) -> None:
        self._limiter = trio.CapacityLimiter(most)
        self._idle: dict[Session, None] = {}
        """Idle sessions with state in the chain, longest idle first."""

    async def take(self, session: Session) -> None:
        """Waits for a slot. If all are in use, drops the state of the longest idle session."""
        await self._limiter.acquire_on_behalf_of(session)
        self._idle.pop(session, None)
        while self._limiter.borrowed_tokens + len(self._idle) > self._limiter.total_tokens:
            self._drop(next(iter(self._idle)))

    def give(self, session: Session, *, keep: bool) -> None:
        """Returns the slot of a session whose answer has ended. With `keep` its state stays in the chain."""
        self._limiter.release_on_behalf_of(session)
        if keep:
            self._idle[session] = None

    def forget(self, session: Session) -> None:
        """Removes a session that has ended."""
        self._idle.pop(session, None)

    def make_room(self) -> bool:
        """Drops the state of all idle sessions; returns whether there were any."""
        idle = list(self._idle)
        for session in idle:
            self._drop(session)
        return bool(idle)

    def _drop(self, session: Session) -> None:
        del self._idle[session]
        session.leave()
