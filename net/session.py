"""Sessions: sequences in a chain, whose answers are read token by token, and which survive a change of the
chain.

`Generation` decides what to send and which results are due; this file only sends and waits. A result is taken
where it arrives: the next Step is on its way before anybody reads the token. When an epoch ends, a session
joins the next chain and sends all known tokens as a prompt, and the answer goes on with the same token. So
does a session that was set aside for lack of room (net/admission).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import trio

from ..engine.errors import ContextError, ShoalError
from .admission import Admission
from .connection import Connection
from .errors import NodeLostError, RemoteProtocolError, from_wire
from .generation import Flow, Generation
from .messages import Close, Failed, Message, Result, Step


class Chain:
    """The chain of one epoch as sessions use it: the connection to its first node, and the sessions that wait
    for results. Messages that the connection does not accept at once wait here."""

    def __init__(self, flow: Flow, connection: Connection) -> None:
        self.flow = flow
        self.sessions: dict[int, Session] = {}
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        self._connection = connection
        self._unsent: deque[Message] = deque()
        self._stuck = trio.Event()

    @property
    def due(self) -> bool:
        """Whether results are due."""
        return any(session.due for session in self.sessions.values())

    def join(self, session: int, waiting: Session) -> None:
        """Passes the results of a session to `waiting`."""
        self.sessions[session] = waiting

    def leave(self, close: Close) -> None:
        """Ends a session and sends its Close."""
        if self.sessions.pop(close.session, None) is not None and not self.ended.is_set():
            self.send([close])

    def deliver(self, messages: Iterable[Result | Failed]) -> None:
        """Passes results to their sessions, and sends the Steps that are due after them in one write, before
        anybody looks at the tokens. Results of old epochs and of sessions that have ended are dropped."""
        due: list[Message] = []
        for message in messages:
            session = self.sessions.get(message.session)
            if session is not None and message.epoch == self.flow.epoch:
                due += session.take(message)
        self.send(due)

    def send(self, messages: Sequence[Message]) -> None:
        """Sends messages, now or as soon as the connection accepts them."""
        try:
            if messages and (self._unsent or not self._connection.post(*messages)):
                self._unsent.extend(messages)
                self._stuck.set()
        except NodeLostError:
            return  # the epoch is over: sessions send everything again in the next one

    async def write(self) -> None:
        """Sends messages that the connection has not accepted at once, until cancelled. NodeLostError: the
        connection has ended."""
        while True:
            await self._stuck.wait()
            while self._unsent:
                await self._connection.send(self._unsent[0])
                self._unsent.popleft()
            self._stuck = trio.Event()

    def end(self) -> None:
        """Ends the epoch and wakes the sessions that wait for results."""
        self.ended.set()
        self.scope.cancel()
        for session in self.sessions.values():
            session.wake()


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
        self._tokens: deque[int] = deque()
        """Tokens that were not read yet. Their number is limited by the length of the answer alone, so that a
        slow reader never holds up the chain."""
        self._failed: Failed | ShoalError | None = None
        self._news = trio.Event()
        self._answering = self._keep = False

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

    @property
    def due(self) -> bool:
        """Whether results are due."""
        return self._generation.in_flight > 0

    def close(self) -> None:
        """Ends the session and frees its state on all nodes."""
        self.leave()
        self._admission.forget(self)

    def leave(self) -> None:
        """Frees the session's state on all nodes. The next answer computes its whole prompt."""
        close = self._generation.leave()
        if self._chain is not None and close is not None:
            self._chain.leave(close)
        self._chain = None
        if isinstance(self._failed, Failed):  # it concerned the state that is freed
            self._failed = None
        self.wake()

    async def begin(
        self, prompt: Sequence[int], max_tokens: int, end: Collection[int], *, keep: bool
    ) -> None:
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
        self._keep = keep
        self._tokens.clear()
        if not isinstance(self._failed, Failed):  # which concerns the state that the nodes kept
            self._failed = None
        self._generation.ask(prompt, max_tokens, end)
        if self._chain is not None:
            self._chain.send(self._due())

    def end(self, *, keep: bool) -> None:
        """Ends an answer, complete or not."""
        self._generation.stop()
        if not keep:
            self.leave()
        held = self._chain is not None and not self._chain.ended.is_set()
        self._admission.end(self, keep=keep and held)
        self._answering = False

    async def next_token(self) -> int | None:
        """The next token id, or None when the answer is complete. ContextError or another ShoalError: the
        nodes cannot continue this answer."""
        while not self._tokens:
            if self._failed is not None:
                self._retry(self._failed)
            elif self._generation.finished:
                return None
            elif self._chain is None:
                await self._join()
            elif self._chain.ended.is_set():
                self._chain = None
            else:
                await self._news.wait()
        return self._tokens.popleft()

    def take(self, message: Result | Failed) -> list[Step]:
        """Takes a message of the last stage; returns the Steps that are due after it."""
        self.wake()
        if isinstance(message, Failed):
            self._failed = message
            return []
        try:
            token = self._generation.take(message)
        except RemoteProtocolError as error:
            self._failed = error
            return []
        if token is not None:
            self._tokens.append(token)
        if self._generation.finished and not self._keep:  # others need not wait until the tokens are read
            self.leave()
            self._admission.end(self, keep=False)
        return self._due()

    def wake(self) -> None:
        """Lets `next_token` look again."""
        self._news.set()
        self._news = trio.Event()

    def _due(self) -> list[Step]:
        """The Steps to send now. A session whose next position has no room is set aside instead."""
        if self._generation.finished or not self._admission.grow(self, len(self._generation.known)):
            return []
        return self._generation.due()

    def _retry(self, failed: Failed | ShoalError) -> None:
        """Begins again without the state of earlier answers, of this or idle sessions, which may be the cause
        of the failure; if other answers hold the room, once one has ended. Else raises the failure."""
        self._failed = None
        carried = self._generation.carried
        self.leave()
        if isinstance(failed, Failed):
            if carried or self._admission.make_room():
                return
            if failed.code == ContextError.exit_code and self._admission.refused(self):
                return
        self._generation.close()
        raise from_wire(failed.code, failed.text, "the nodes") if isinstance(failed, Failed) else failed

    async def _join(self) -> None:
        await self._admission.admitted(self)
        chain = await self._chains.chain()
        while not self._admission.runs(self):  # the room of a new chain may be less
            await self._admission.admitted(self)
            chain = await self._chains.chain()
        self._chain = chain
        self._generation.session = next(self._numbers)  # results for an earlier number may still arrive
        opening = self._generation.start(chain.flow)
        chain.join(opening.session, self)
        steps = self._due()
        if self._chain is chain:  # not set aside
            chain.send([opening, *steps])


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
        await self._session.begin(*self._question, keep=self._keep)
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
