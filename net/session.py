"""A session's answers, token by token: feeds a chain and reads what it draws; when it changes, goes on.

`Generation` (pure) knows what to send and what is due back; this file only waits. An epoch that ends under
the session closes its channel of answers; the session then joins the next chain and sends all it knows as a
prompt, and the answer goes on with the same token as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import trio

from .connection import Connection
from .errors import NodeLostError, from_wire
from .generation import Flow, Generation
from .messages import Close, Failed, Open, Result, Step

Answers = trio.MemorySendChannel[Result | Failed]


@dataclass(slots=True)
class Chain:
    """The nodes under one epoch, as sessions see them: where rows go in, and who waits for answers."""

    flow: Flow
    connection: Connection
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
            while self.closing and self.connection.post(self.closing[0]):
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
    """Where sessions find the chain of the day (the coordinator)."""

    async def chain(self) -> Chain:
        """The chain that serves now, waiting for one if need be."""


class Places:
    """Room for sessions in the chain. Those that answer have a place until their answer ends; those that
    wait for their next prompt keep their state until somebody else needs the place, or the memory."""

    def __init__(self, most: int) -> None:
        self._limiter = trio.CapacityLimiter(most)
        self._idle: dict[Session, None] = {}
        """In the order in which they became idle."""

    async def take(self, session: Session) -> None:
        """Waits for a place, and takes the state of the longest idle session if all are in use."""
        await self._limiter.acquire_on_behalf_of(session)
        self._idle.pop(session, None)
        while self._limiter.borrowed_tokens + len(self._idle) > self._limiter.total_tokens:
            self._drop(next(iter(self._idle)))

    def give(self, session: Session, *, keep: bool) -> None:
        """The session's answer has ended; `keep`: it may go on from what the chain holds."""
        self._limiter.release_on_behalf_of(session)
        if keep:
            self._idle[session] = None

    def forget(self, session: Session) -> None:
        """The session asks for nothing any more."""
        self._idle.pop(session, None)

    def make_room(self) -> bool:
        """Frees the state of all idle sessions; False if there were none."""
        idle = list(self._idle)
        for session in idle:
            self._drop(session)
        return bool(idle)

    def _drop(self, session: Session) -> None:
        del self._idle[session]
        session.leave()


class Session:
    """A sequence in the chain that stays open from answer to answer.

        async with coordinator.session(sampling) as session:
            async with session.answer(prompt, max_tokens=64, end=eos) as tokens:
                async for token in tokens:
                    ...

    Each answer computes what its prompt does not share with the prompt and answer before. An answer may be
    left in the middle. Leaving the session frees its state on all nodes."""

    def __init__(
        self, chains: Chains, generation: Generation, places: Places, numbers: Iterator[int]
    ) -> None:
        self._chains, self._generation, self._places, self._numbers = chains, generation, places, numbers
        self._chain: Chain | None = None
        self._answers: trio.MemoryReceiveChannel[Result | Failed] | None = None
        self._unsent: deque[Open | Step] = deque()
        self._answering = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, end: Collection[int] = (), keep: bool = True
    ) -> Answer:
        """The answer to a prompt of token ids; with `keep` false the session's state is freed after it.

        ContextError: the prompt does not fit. ValueError: a token id that the vocabulary does not have."""
        self._generation.check(prompt)
        return Answer(self, prompt, max_tokens, end, keep=keep)

    def close(self) -> None:
        """Frees the session's state on all nodes."""
        self._places.forget(self)
        self.leave()

    def leave(self) -> None:
        """Frees the session's state on all nodes; the next answer begins with nothing there."""
        close = self._generation.leave()
        if self._chain is not None and close is not None:
            self._chain.leave(close)
        self._chain = self._answers = None
        self._unsent.clear()

    async def begin(self, prompt: Sequence[int], max_tokens: int, end: Collection[int]) -> None:
        """Waits for a place and begins an answer. ValueError: the session is in the middle of one."""
        if self._answering:
            raise ValueError("a session gives one answer at a time: leave the one before, or open another")
        self._answering = True
        try:
            await self._places.take(self)
        except BaseException:
            self._answering = False
            raise
        self._generation.ask(prompt, max_tokens, end)

    def end(self, *, keep: bool) -> None:
        """Ends an answer, whether it is complete or not."""
        if not keep:
            self.leave()
        self._places.give(self, keep=keep)
        self._answering = False

    async def next_token(self) -> int | None:
        """The next token id; None: the answer is complete. ContextError and the like: the nodes cannot go on
        with it."""
        while not self._generation.finished:
            answer = await self._answer()
            if isinstance(answer, Failed):
                # What earlier answers left, here or in other sessions, may be to blame: once more without it.
                carried = self._generation.carried
                self.leave()
                if carried or self._places.make_room():
                    continue
                self._generation.close()
                raise from_wire(answer.code, answer.text, "the nodes")
            token = None if answer is None else self._generation.take(answer)
            if token is not None:
                # The chain works on while the caller looks at this token. Nothing waits from here on: a
                # cancelled caller must not lose it.
                self._post_due()
                return token
        return None

    async def _answer(self) -> Result | Failed | None:
        """Sends what is due and waits for an answer; None when the epoch ended instead."""
        try:
            if self._answers is None:
                await self._join()
            assert self._chain is not None and self._answers is not None
            self._unsent.extend(self._generation.due())
            while self._unsent:
                await self._chain.connection.send(self._unsent[0])
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
        self._generation.session = next(self._numbers)  # answers to an earlier number may still arrive
        opening = self._generation.start(self._chain.flow)
        # Not sent here: a caller that is cancelled in the middle must not lose it.
        self._unsent.append(opening)
        self._answers = self._chain.join(opening.session)

    def _post_due(self) -> None:
        assert self._chain is not None
        self._unsent.extend(self._generation.due())
        try:
            while self._unsent and self._chain.connection.post(self._unsent[0]):
                self._unsent.popleft()
        except NodeLostError:
            return  # the next call finds the epoch ended, and sends everything again


class Answer:
    """Token ids of one answer: `async with session.answer(...) as tokens: async for token in tokens: ...`

    A failure of this answer alone (no room for its state, say) is raised where the tokens are read, and
    other sessions go on."""

    def __init__(
        self, session: Session, prompt: Sequence[int], max_tokens: int, end: Collection[int], *, keep: bool
    ) -> None:
        self._session, self._keep = session, keep
        self._question = prompt, max_tokens, end

    async def __aenter__(self) -> Self:
        await self._session.begin(*self._question)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._session.end(keep=self._keep)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        """The next token id. ContextError and the like: the nodes cannot go on with this answer."""
        token = await self._session.next_token()
        if token is None:
            raise StopAsyncIteration
        return token
