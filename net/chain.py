"""The chain of one epoch as sessions use it, and how they go from one chain to the next.

A transition holds a chain, waits until it is quiet, and carries its sessions to the next one with the
positions that all stages hold. Sessions of a chain that has ended can be carried, too. In a chain that was
loaded anew, they begin anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from ..engine.layout import CHUNK
from .connection import Connection
from .errors import NodeLostError
from .generation import Due, Fill, Flow, Generation, Part
from .messages import (
    Close,
    Failed,
    Kept,
    Mask,
    Message,
    Open,
    Refill,
    Result,
    Rows,
    SetSampling,
    Step,
    Tokens,
)
from .sampling_updates import Notice

Answer = Result | Rows | Failed
WHOLE = CHUNK
"""Keys and values that are kept for others move in whole chunks, which are sent before the commit."""
FillOf = Callable[[int], Fill | None]
"""How the lost keys and values of a session are filled, by its number; None if no units have lost any."""


class Seated(Protocol):
    """What a chain uses of a session (net/session.py)."""

    @property
    def due(self) -> bool:
        """Whether results are due."""

    @property
    def held(self) -> int:
        """The positions that the whole chain certainly holds, for a transition to carry."""

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens of the sequence, as far as they are known."""

    @property
    def will_hold(self) -> int:
        """The positions that it will hold if its answer goes on; 0 if it does not go on."""

    @property
    def busy(self) -> bool:
        """Whether somebody uses the session; else it only keeps state for others."""

    def trim(self, positions: int) -> None:
        """Uses only a multiple of so many positions of what the chain holds from now on."""

    @property
    def filling(self) -> bool:
        """Whether lost keys and values of this session are being filled."""

    @property
    def generation(self) -> Generation:
        """What is known of the sequence."""

    def take(self, message: Answer, *, fill: bool) -> Sequence[Due]:
        """Takes a message of the chain; returns the messages that are due after it. `fill`: it is a Result of
        rows that fill lost positions."""

    def due_steps(self) -> Sequence[Due]:
        """The messages to send now; none while the chain is held."""

    def carry(self, new: Chain, fill: Fill | None) -> Open | Close | None:
        """Goes on in the chain of the next epoch, which holds the session's state, but for what `fill` says.
        Returns the message to send first, if any."""

    def dropped(self) -> None:
        """Notes that the state of the session went with its chain."""


class Chain:
    """The chain of one epoch as sessions use it: the connection to its first node, and the sessions whose
    keys and values it holds. Messages that the connection does not accept at once wait here. `scope` is that
    of the connection, and is cancelled when the epoch ends.

    The last stage answers. In a chain in which units have lost keys and values, `filler` is the member that
    answers the Steps that fill them, and `refill` sends an order to the member that has kept rows. `tell`
    sends what the last member is told of a session."""

    def __init__(
        self, flow: Flow, connection: Connection, stages: Sequence[Part], scope: trio.CancelScope
    ) -> None:
        self.flow, self.stages = flow, stages
        self.filler = self.last = stages[-1].member
        self.refill: Callable[[Refill], None] | None = None
        self.tell: Callable[[Notice], None] | None = None
        self.sessions: dict[int, Seated] = {}
        self.ended = False
        """Nothing is sent any more."""
        self.stopped: float | None = None
        """Since when no Steps are sent, because a transition begins or the epoch has ended."""
        self.tokens = 0
        """Tokens of answers that have arrived."""
        self._connection, self._scope = connection, scope
        self._unsent: deque[Message] = deque()
        self._told: set[int] = set()
        """Sessions of which the last member has been told something."""
        self._stuck = trio.Event()
        self._quiet: Callable[[tuple[Kept, ...]], None] | None = None
        """Who waits until the chain is quiet."""
        self._kept: Mapping[int, int] = {}
        """The positions of the sessions that a transition carries; see `hold`."""
        self._closes: list[Close] | None = None
        """Closes that wait for the transition that the chain is quiet for; None: they are sent at once."""

    @property
    def open(self) -> bool:
        """Whether the rows of all sessions may be sent, and sessions may join."""
        return self.stopped is None and self._quiet is None

    def sends(self, generation: Generation) -> bool:
        """Whether the next rows of a session may be sent."""
        if self._quiet is not None:
            self._stop()
        return self.open or (self.stopped is None and generation.decodes)

    @property
    def busy(self) -> bool:
        """Whether somebody uses a session."""
        return any(session.busy for session in self.sessions.values())

    @property
    def due(self) -> bool:
        """Whether results are due."""
        return not self.ended and any(session.due for session in self.sessions.values())

    def expects(self, member: int, result: Result | Rows) -> bool:
        """Whether a result may be from that member. Those of other epochs are dropped anyway."""
        if result.epoch != self.flow.epoch:
            return True
        session = self.sessions.get(result.session)
        filling = session is None or session.filling  # None: it has been closed
        return member == self.last or (member == self.filler and filling)

    def join(self, session: int, waiting: Seated) -> None:
        """Passes the results of a session to `waiting`."""
        self.sessions[session] = waiting

    def leave(self, close: Close) -> None:
        """Ends a session and sends its Close. A transition that has been committed names the session, so then
        the Close waits until the next epoch."""
        if self.sessions.pop(close.session, None) is None:
            return
        if self._closes is not None:
            self._closes.append(close)
        elif not self.ended:
            self.send([close])
        self._look()

    def deliver(self, member: int, messages: Iterable[Answer]) -> None:
        """Passes results of a member to their sessions, and sends the Steps that are due after them in one
        write, before anybody looks at the tokens. Results of old epochs and of sessions that have ended are
        dropped; and those that come after `quiet` was called, since the nodes forget what is beyond its
        positions."""
        if self._closes is not None:
            return
        due: list[Message] = []
        for message in messages:
            session = self.sessions.get(message.session)
            if session is not None and message.epoch == self.flow.epoch:
                due += session.take(message, fill=session.filling and member == self.filler)
        self.send(due)
        self._look()

    def send(self, messages: Sequence[Message]) -> None:
        """Sends messages, now or as soon as the connection accepts them."""
        messages = self._for_first(messages)
        try:
            if messages and (self._unsent or not self._connection.post(*messages)):
                self._unsent.extend(messages)
                self._stuck.set()
        except NodeLostError:
            return  # the epoch is over: what is lost is sent again in the next one

    def _for_first(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages for the first node. Refills, and what the last node is told, are sent to others."""
        if all(type(message) is Step for message in messages):
            return messages  # nearly always
        for message in messages:
            if isinstance(message, Refill):
                assert self.refill is not None, "no units are lost"
                self.refill(message)
            elif isinstance(message, SetSampling | Tokens | Mask):
                self._tell(message)
                self._told.add(message.session)
            elif isinstance(message, Close) and message.session in self._told:
                self._tell(message)
                self._told.remove(message.session)
        return [m for m in messages if not isinstance(m, Refill | SetSampling | Tokens | Mask)]

    def _tell(self, notice: Notice) -> None:
        assert self.tell is not None, "an epoch says how the last node is told"
        self.tell(notice)

    async def write(self) -> None:
        """Sends messages that the connection has not accepted at once, until cancelled. NodeLostError: the
        connection has ended."""
        while True:
            await self._stuck.wait()
            while self._unsent:
                await self._connection.send(self._unsent[0])
                self._unsent.popleft()
            self._stuck = trio.Event()

    # --- the end of an epoch

    def hold(self, quiet: Callable[[tuple[Kept, ...]], None]) -> None:
        """Lets the chain become quiet: no rows of prompts are sent from now on, and once those on their way
        have been computed, no others either, so that sequences that decode stand still for one lap. When no
        results are due, or at once if the epoch has ended, calls `quiet` with the sessions whose state a
        transition can carry, and the positions of each."""
        self._quiet = quiet
        self._look()

    def _look(self) -> None:
        """Tells that the chain is quiet, if that is waited for."""
        if self._quiet is None:
            return
        self._stop()
        if self.stopped is None or self.due:
            return
        for session in self.sessions.values():
            if not session.busy:  # nothing of it is left to be sent while the answers stand still
                session.trim(WHOLE)
        quiet, self._quiet, self._closes = self._quiet, None, []
        held = {number: session.held for number, session in self.sessions.items()}
        self._kept = {number: positions for number, positions in held.items() if positions}
        quiet(tuple(Kept(number, positions) for number, positions in self._kept.items()))

    def _stop(self) -> None:
        """Sends no more Steps, if no rows of prompts are on their way."""
        if self.stopped is None and not any(s.generation.reads for s in self.sessions.values() if s.due):
            self.stopped = trio.current_time()

    def resume(self) -> None:
        """Goes on in the same epoch, since the transition was aborted."""
        closes, self._closes, self._quiet, self.stopped = self._closes or [], None, None, None
        self.send([*closes, *self.due_steps()])

    def due_steps(self) -> list[Message]:
        """The messages of all sessions to send now."""
        return [step for session in list(self.sessions.values()) for step in session.due_steps()]

    def end(self) -> None:
        """Ends the epoch. Its sessions wait for `carry` or `drop`."""
        self.ended, self._quiet = True, None
        self.stopped = trio.current_time() if self.stopped is None else self.stopped
        self._scope.cancel()

    def carry(self, new: Chain, fill: FillOf) -> list[Message]:
        """Passes the sessions that `quiet` was told of to the chain of the next epoch, and drops the others.
        Returns the messages to send there first."""
        first: list[Message] = [replace(close, epoch=new.flow.epoch) for close in self._closes or ()]
        for number, session in list(self.sessions.items()):
            if number in self._kept:
                notice = session.carry(new, fill(number))
                first += [] if notice is None else [notice]
            else:
                session.dropped()
        self.sessions.clear()
        return first

    def drop(self) -> None:
        """Lets all sessions begin anew in the next chain, which holds nothing."""
        for session in list(self.sessions.values()):
            session.dropped()
        self.sessions.clear()
