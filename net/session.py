"""Sessions: sequences in a chain, whose answers are read token by token, and which survive a change of the
chain.

`Generation` decides what to send and which results are due; this file only sends and waits. A result is taken
where it arrives: the next Step is on its way before anybody reads the token. When an epoch ends, its sessions
wait: a transition carries them to the next chain, where they go on at the same position; in a chain that was
loaded anew, each sends all known tokens as a prompt, and the answer goes on with the same token. So does a
session that was set aside for lack of room (net/admission).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import trio

from ..engine.errors import ContextError, ShoalError
from .admission import Admission
from .chain import Chain
from .errors import RemoteProtocolError, from_wire
from .generation import Fill, Generation
from .messages import Failed, Open, Refill, Result, Step


class Chains(Protocol):
    """The source of the current chain, for sessions; a Coordinator is one."""

    async def chain(self) -> Chain:
        """The current chain; waits while there is none to which rows may be sent."""


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
        return self._generation.in_flight > 0 and self._failed is None

    @property
    def held(self) -> int:
        """The positions that the whole chain certainly holds, for a transition to carry."""
        return self._generation.held if self._failed is None else 0

    @property
    def filling(self) -> bool:
        """Whether lost keys and values of this session are being filled."""
        return self._generation.filling

    @property
    def generation(self) -> Generation:
        """What is known of the sequence."""
        return self._generation

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

    def carry(self, new: Chain, fill: Fill | None) -> Open | None:
        """Goes on in the chain of the next epoch, which holds the session's state, but for what `fill` says.
        Returns the Open message to send first, if any."""
        self._chain = new
        new.join(self._generation.session, self)
        return self._generation.carry(new.flow, fill)

    def dropped(self) -> None:
        """Notes that the state of the session went with its chain."""
        self._chain = None
        self.leave()
        self._admission.lost(self)

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
            self._chain.send(self.due_steps())

    def end(self, *, keep: bool) -> None:
        """Ends an answer, complete or not."""
        self._generation.stop()
        if not keep:
            self.leave()
        self._admission.end(self, keep=keep and self._chain is not None)
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
            else:
                await self._news.wait()
        return self._tokens.popleft()

    def take(self, message: Result | Failed, *, fill: bool = False) -> list[Step | Refill]:
        """Takes a message of the chain; returns the messages that are due after it. `fill`: it is a Result of
        rows that fill lost positions."""
        self.wake()
        if isinstance(message, Failed):
            self._failed = message
            return []
        try:
            token = self._generation.take(message, fill=fill)
        except RemoteProtocolError as error:
            self._failed = error
            return []
        if token is not None:
            self._tokens.append(token)
            if self._chain is not None:
                self._chain.tokens += 1
        if self._generation.finished and not self._keep:  # others need not wait until the tokens are read
            self.leave()
            self._admission.end(self, keep=False)
        return self.due_steps()

    def wake(self) -> None:
        """Lets `next_token` look again."""
        self._news.set()
        self._news = trio.Event()

    def due_steps(self) -> list[Step | Refill]:
        """The messages to send now; none while the chain is held. A session whose next position has no room
        is set aside instead."""
        if self._generation.finished or self._failed is not None:
            return []
        if self._chain is None or not self._chain.sends(self._generation):
            return []
        if not self._admission.grow(self, len(self._generation.known)):
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
        steps = self.due_steps()
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
