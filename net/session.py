"""Sessions: sequences in a chain, whose answers are read token by token, and which survive a change of the
chain.

`Generation` decides what to send and which results are due; this file only sends and waits. The end of an
epoch closes a session's channel of results. The session then joins the next chain and sends all known tokens
as a prompt, and the answer goes on with the same token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import trio

from ..engine.errors import ContextError
from .admission import Admission
from .connection import Connection
from .errors import NodeLostError, from_wire
from .generation import Flow, Generation
from .messages import Close, Failed, Open, Result, Step

Answers = trio.MemorySendChannel[Result | Failed]


@dataclass(slots=True)
class Chain:
    """The chain of one epoch as sessions use it: the connection to its first node, and a channel for each
    session's results."""

    flow: Flow
    connection: Connection
    sessions: dict[int, Answers] = field(default_factory=dict)
    closing: deque[Close] = field(default_factory=deque)
    ended: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def join(self, session: int) -> trio.MemoryReceiveChannel[Result | Failed]:
        """Opens a channel for the results of a session, with room for all that can be in flight: a stage may
        divide a Step, down to single rows."""
        most = self.flow.window * self.flow.chunk_rows + 1
        self.sessions[session], answers = trio.open_memory_channel[Result | Failed](most)
        return answers

    def leave(self, close: Close) -> None:
        """Ends a session and sends its Close, now or as soon as the connection accepts it."""
        answers = self.sessions.pop(close.session, None)
        if answers is not None and not self.ended.is_set():
            answers.close()
            self.closing.append(close)
            self.flush()

    def flush(self) -> None:
        """Sends waiting Close messages, as many as the connection accepts."""
        try:
            while self.closing and self.connection.post(self.closing[0]):
                self.closing.popleft()
        except NodeLostError:
            self.closing.clear()  # the epoch is over, so the nodes free all sessions

    def post(self, message: Open | Step) -> bool:
        """Sends a message if the connection accepts it and all Close messages before it, whose room it may
        need; returns whether it did. NodeLostError: the connection has ended."""
        self.flush()
        return not self.closing and self.connection.post(message)

    async def send(self, message: Open | Step) -> None:
        """Sends a message after the waiting Close messages. NodeLostError: the connection has ended."""
        while self.closing:
            close = self.closing.popleft()
            try:
                await self.connection.send(close)
            except BaseException:
                self.closing.appendleft(close)
                raise
        await self.connection.send(message)

    def end(self) -> None:
        """Ends the epoch and wakes the sessions that wait for results."""
        self.ended.set()
        self.scope.cancel()
        for answers in self.sessions.values():
            answers.close()


class Chains(Protocol):
    """The source of the current chain, for sessions; a Coordinator is one."""

    async def chain(self) -> Chain:
        """The current chain; waits while there is none."""


class Session:
    """A sequence in the chain that stays open from answer to answer.

        async with coordinator.session(sampling) as session:
            async with session.answer(prompt, max_tokens=64, end=eos) as tokens:
                async for token in tokens:
                    ...

    Each answer computes only the part of its prompt after the common prefix with the previous prompt and
    answer. An answer may be left before its end. Leaving the session frees its state on all nodes."""

    def __init__(
        self, chains: Chains, generation: Generation, admission: Admission, numbers: Iterator[int]
    ) -> None:
        self._chains, self._generation, self._numbers = chains, generation, numbers
        self._admission = admission
        self._chain: Chain | None = None
        self._answers: trio.MemoryReceiveChannel[Result | Failed] | None = None
        self._unsent: deque[Open | Step] = deque()
        self._sending: trio.CancelScope | None = None
        """Cancelled when the session is left while a message waits to be sent."""
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
        """The answer to a prompt of token ids. Unless `keep`, the session's state is freed after it.

        ContextError: the prompt does not fit; raised on entering the answer: the chain has no room for it.
        ValueError: a token id is not in the vocabulary."""
        self._generation.check(prompt)
        return Answer(self, prompt, max_tokens, end, keep=keep)

    def close(self) -> None:
        """Ends the session and frees its state on all nodes."""
        self.leave()
        self._admission.forget(self)

    def leave(self) -> None:
        """Frees the session's state on all nodes. The next answer computes its whole prompt."""
        close = self._generation.leave()
        if self._chain is not None and close is not None:
            self._chain.leave(close)
        self._chain = self._answers = None
        self._unsent.clear()
        if self._sending is not None:
            self._sending.cancel()

    async def begin(self, prompt: Sequence[int], max_tokens: int, end: Collection[int]) -> None:
        """Waits for admission and begins an answer. ContextError: the chain cannot hold it. ValueError: an
        answer of this session has not ended."""
        if self._answering:
            raise ValueError(
                "a session gives one answer at a time: leave the previous answer, or open another session"
            )
        self._answering = True
        try:
            most = self._generation.most(prompt, max_tokens)
            await self._admission.begin(self, min(len(prompt), most), most)
        except BaseException:
            self._answering = False
            raise
        self._generation.ask(prompt, max_tokens, end)

    def end(self, *, keep: bool) -> None:
        """Ends an answer, complete or not."""
        if not keep:
            self.leave()
        self._admission.end(self, keep=keep and self._chain is not None)
        self._answering = False

    async def next_token(self) -> int | None:
        """The next token id, or None when the answer is complete. ContextError or another ShoalError: the
        nodes cannot continue this answer."""
        while not self._generation.finished:
            answer = await self._answer()
            if isinstance(answer, Failed):
                # State of earlier answers, of this or idle sessions, may be the cause: retry without it. If
                # other answers hold the room, retry when one has ended.
                carried = self._generation.carried
                self.leave()
                if carried or self._admission.make_room():
                    continue
                if answer.code == ContextError.exit_code and self._admission.refused(self):
                    continue
                self._generation.close()
                raise from_wire(answer.code, answer.text, "the nodes")
            token = None if answer is None else self._generation.take(answer)
            if token is not None:
                # The next Step is sent now, so that the chain works while the caller handles this token. It
                # must not wait, since a cancelled caller would lose the token.
                self._post_due()
                return token
        return None

    async def _answer(self) -> Result | Failed | None:
        """Sends the due messages and waits for a result; None if the epoch ended instead, or the session was
        set aside. ContextError: it was, since the chain has no room for it alone."""
        if self._answers is None:
            await self._join()
        chain, answers = self._chain, self._answers
        assert chain is not None and answers is not None
        try:
            if not self._post_due():
                await self._send_unsent(chain)
            answer = await answers.receive()
            return answer if self._answers is answers else None
        except (trio.EndOfChannel, NodeLostError):
            if self._chain is chain:
                await chain.ended.wait()
                self._answers = None
            return None

    async def _join(self) -> None:
        await self._admission.admitted(self)
        chain = await self._chains.chain()
        while not self._admission.runs(self):  # the room of a new chain may be less
            await self._admission.admitted(self)
            chain = await self._chains.chain()
        self._unsent.clear()
        self._chain = chain
        self._generation.session = next(self._numbers)  # results for an earlier number may still arrive
        opening = self._generation.start(self._chain.flow)
        # Not sent here, so that a caller cancelled while sending does not lose it.
        self._unsent.append(opening)
        self._answers = self._chain.join(opening.session)

    def _post_due(self) -> bool:
        """Sends the due messages, as many as the connection accepts now; returns whether those are all. A
        session whose next position has no room is set aside instead."""
        if self._generation.finished or not self._admission.grow(self, len(self._generation.known)):
            return True
        assert self._chain is not None
        self._unsent.extend(self._generation.due())
        try:
            while self._unsent and self._chain.post(self._unsent[0]):
                self._unsent.popleft()
        except NodeLostError:
            return True  # the next call finds that the epoch has ended, and sends everything again
        return not self._unsent

    async def _send_unsent(self, chain: Chain) -> None:
        """Sends the rest, unless the session is set aside meanwhile."""
        with trio.CancelScope() as self._sending:
            while self._unsent:
                await chain.send(self._unsent[0])
                if self._chain is chain:
                    self._unsent.popleft()
        self._sending = None


class Answer:
    """An async iterator over the token ids of one answer.

        async with session.answer(prompt, max_tokens=64) as tokens:
            async for token in tokens:
                ...

    A failure of this answer alone, such as no room for its state, is raised where the tokens are read. Other
    sessions go on."""

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
        """The next token id. ContextError or another ShoalError: the nodes cannot continue this answer."""
        token = await self._session.next_token()
        if token is None:
            raise StopAsyncIteration
        return token
