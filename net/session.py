"""One answer, token by token: feeds a chain and reads what it draws; when the chain changes, goes on.

`Generation` (pure) knows what to send and what is due back; this file only waits. An epoch that ends under
the session closes its channel of answers; the session then joins the next chain and sends all it knows as a
prompt, and the answer goes on with the same token as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import trio

from .errors import NodeLostError, from_wire
from .generation import Flow, Generation
from .link import Link
from .messages import Close, Failed, Open, Result, Step

Answers = trio.MemorySendChannel[Result | Failed]


@dataclass(slots=True)
class Chain:
    """The nodes under one epoch, as sessions see them: where rows go in, and who waits for answers."""

    flow: Flow
    link: Link
    sessions: dict[int, Answers] = field(default_factory=dict)
    closing: deque[Close] = field(default_factory=deque)
    ended: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def join(self, session: int) -> trio.MemoryReceiveChannel[Result | Failed]:
        """A channel for the answers of a session, with room for all that can be in flight."""
        self.sessions[session], answers = trio.open_memory_channel[Result | Failed](self.flow.window + 1)
        return answers

    def leave(self, close: Close) -> None:
        """Ends a session: its state is freed everywhere, at once or as soon as the line takes the message."""
        answers = self.sessions.pop(close.session, None)
        if answers is not None and not self.ended.is_set():
            answers.close()
            self.closing.append(close)
            self.flush()

    def flush(self) -> None:
        """Sends the Closes that wait, as far as the line takes them."""
        try:
            while self.closing and self.link.post(self.closing[0]):
                self.closing.popleft()
        except NodeLostError:
            self.closing.clear()  # the epoch is over, and with it every session's state

    def end(self) -> None:
        """The epoch is over: whoever waits for an answer of it wakes."""
        self.ended.set()
        self.scope.cancel()
        for answers in self.sessions.values():
            answers.close()


class Chains(Protocol):
    """Where sessions find the chain of the day (the head)."""

    async def chain(self) -> Chain:
        """The chain that serves now, waiting for one if need be."""


class Session:
    """Token ids of one answer: `async with head.generate(...) as tokens: async for token in tokens: ...`

    Leaving the block ends the session on all nodes, whether the answer is complete or not. A failure of this
    answer alone (no room for its state, say) is raised where the tokens are read, and others go on."""

    def __init__(self, chains: Chains, generation: Generation, places: trio.CapacityLimiter) -> None:
        self._chains, self._generation, self._places = chains, generation, places
        self._chain: Chain | None = None
        self._answers: trio.MemoryReceiveChannel[Result | Failed] | None = None
        self._unsent: deque[Open | Step] = deque()

    async def __aenter__(self) -> Self:
        await self._places.acquire_on_behalf_of(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._leave()
        self._places.release_on_behalf_of(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        """The next token id. ContextError and the like: the nodes cannot go on with this answer."""
        while not self._generation.finished:
            answer = await self._answer()
            if isinstance(answer, Failed):
                self._leave()
                raise from_wire(answer.code, answer.text, "the nodes")
            token = None if answer is None else self._generation.take(answer)
            if token is not None:
                # The chain works on while the caller looks at this token. Nothing waits from here on: a
                # cancelled caller must not lose it.
                self._post_due()
                return token
        self._leave()
        raise StopAsyncIteration

    async def _answer(self) -> Result | Failed | None:
        """Sends what is due and waits for an answer; None when the epoch ended instead."""
        try:
            if self._answers is None:
                await self._join()
            assert self._chain is not None and self._answers is not None
            self._unsent.extend(self._generation.due())
            while self._unsent:
                await self._chain.link.send(self._unsent[0])
                self._unsent.popleft()
            return await self._answers.receive()
        except (trio.EndOfChannel, NodeLostError):
            assert self._chain is not None
            await self._chain.ended.wait()
            self._answers = None
            return None

    async def _join(self) -> None:
        self._unsent.clear()
        self._chain = await self._chains.chain()
        opening = self._generation.start(self._chain.flow)
        self._unsent.append(
            opening
        )  # not sent here: a caller that is cancelled in the middle must not lose it
        self._answers = self._chain.join(opening.session)

    def _post_due(self) -> None:
        assert self._chain is not None
        self._unsent.extend(self._generation.due())
        try:
            while self._unsent and self._chain.link.post(self._unsent[0]):
                self._unsent.popleft()
        except NodeLostError:
            return  # the next call finds the epoch ended, and sends everything again

    def _leave(self) -> None:
        close = self._generation.close()
        if self._chain is not None and close is not None:
            self._chain.leave(close)
        self._chain = None
