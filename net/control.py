"""The control connection to one node: orders, questions and their answers, and the latest reports.

The coordinator (net/coordinator.py) keeps one for each address, and dials again when it has ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from ..engine.errors import ShoalError, ignore
from .connection import Connection, Kind
from .errors import NodeLostError, RemoteProtocolError
from .messages import Fetch, Loaded, Message, Ping, Pong, Progress
from .pace import WEIGHT
from .rate_limited_log import RateLimitedLog
from .watch import SETTLE_SECONDS

MOST_REPORTS, REPORTS_PER_S = 100, 30.0
"""How many reports a node may send at once, and for long. It has about ten a second to tell at most."""


class Control:
    """The control connection to one node, while there is one, and what was received on it. `log` prints a
    line for the user."""

    def __init__(self, log: Callable[[str], None] = ignore) -> None:
        self.say = RateLimitedLog(log, "more lines about one node were left out", trio.current_time)
        self.scope = trio.CancelScope()
        """Cancelled to end the connection."""
        self.connection: Connection | None = None
        self.greeted: float | None = None
        """When the connection was greeted."""
        self.at_once = False
        """Dial again without a pause when the connection has ended."""
        self.kept = False
        """Whether a task keeps the connection."""
        self.wake = trio.Event()
        """Set to end a pause between two attempts to connect."""
        self.loaded: Loaded | None = None
        self.progress: Progress | None = None
        self.copies: frozenset[int] = frozenset()
        """The units whose weights the node holds beside those of its stage."""
        self.ordered: tuple[int, ...] = ()
        """The units whose copies it has been ordered to hold."""
        self.fetch: Fetch | None = None
        """The files that it has been ordered to hold on disk."""
        self.waiting: float | None = None
        """The share of the last seconds in which its stage did not compute; None before it has said so."""
        self._reports, self._counted = 0.0, 0.0
        self._trying = False
        self._asking = trio.Lock()
        self._answers: trio.MemorySendChannel[Message] | None = None

    def redial(self) -> None:
        """Ends the connection, or the pause after it, and dials again at once."""
        self.at_once = True
        self.scope.cancel()
        self.wake.set()

    def ended(self) -> None:
        """Forgets what was true of the connection, which has ended."""
        self.connection = self.progress = self.waiting = None
        self.copies, self.ordered, self.fetch = frozenset(), (), None
        if self._answers is not None:
            self._answers.close()

    def reported(self, now: float, who: str) -> None:
        """Counts a message that is no result. RemoteProtocolError: there are more than a node needs."""
        passed, self._counted = now - self._counted, now
        self._reports = max(0.0, self._reports - passed * REPORTS_PER_S) + 1
        if self._reports > MOST_REPORTS:
            raise RemoteProtocolError(f"{who} sent more reports than a node has, {REPORTS_PER_S:g} a second")

    def ponged(self, pong: Pong) -> None:
        """Notes what the stage was doing when it answered a ping."""
        self.progress = pong.progress
        if pong.progress is not None:
            waits = float(pong.progress.running is None)
            self.waiting = waits if self.waiting is None else self.waiting + WEIGHT * (waits - self.waiting)

    def post(self, message: Message) -> bool:
        """Sends without waiting; returns False if the node accepts no orders, which makes it a lost one. A
        ping may be dropped, since silence is noticed, and so is a connection that has ended."""
        if self.connection is None:
            return True
        try:
            return self.connection.post(message) or isinstance(message, Ping)
        except NodeLostError:
            return True

    async def ask(self, message: Message, kind: type[Kind], label: str) -> Kind:
        """Sends a question and waits for the answer of that kind. NodeLostError: the node is lost."""
        async with self._asking:
            self._answers, inbound = trio.open_memory_channel[Message](1)
            if self.connection is not None:
                await self.connection.send(message)
                async for answer in inbound:
                    if isinstance(answer, kind):
                        return answer
            raise NodeLostError(f"{label} is lost")

    def answer(self, message: Message) -> None:
        """Passes an answer to the task in `ask`; dropped if no task waits or one answer is there already."""
        try:
            if self._answers is not None:
                self._answers.send_nowait(message)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return

    async def try_anew(self, connect: Callable[[], Awaitable[object]]) -> bool:
        """Whether the connection stays silent while a new one to the same node is answered; `connect` makes
        one. False at once if that is being tried."""
        connection = self.connection
        if connection is None or self._trying:
            return False
        self._trying = True
        try:
            received = connection.received
            await connect()
            await trio.sleep(SETTLE_SECONDS)
            return self.connection is connection and connection.received == received
        except ShoalError:
            return False  # the node cannot be reached at all: its silence decides
        finally:
            self._trying = False
