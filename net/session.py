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
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import trio

from ..engine.batch import Logprobs, Want, common_prefix
from ..engine.batch import Result as Read
from ..engine.errors import ContextError, OperatingSystemError
from ..engine.sharing import Source, source_for
from .admission import Admission
from .chain import Answer as Taken
from .chain import Chain
from .errors import RemoteProtocolError, from_wire
from .generation import Drawn, Due, Fill, Generation
from .messages import Close, Failed, Open


class Chains(Protocol):
    """The source of the current chain, for sessions; a Coordinator is one."""

    @property
    def current(self) -> Chain | None:
        """The current chain; None while there is none."""

    async def chain(self) -> Chain:
        """The current chain; waits while there is none to which rows may be sent."""


_CROWDED = (ContextError.exit_code, OperatingSystemError.exit_code)
"""Codes of failures for lack of room, or of memory."""


class Question(NamedTuple):
    """What is asked of a session: `positions` of a prompt or a text, of something that can come to need
    `most`. All but the last of `tokens`, which it begins with, need not be run if the chain holds them. `ask`
    tells the generation."""

    tokens: Sequence[int]
    positions: int
    most: int
    ask: Callable[[], None]


class Session:
    """A sequence in the chain that stays open from answer to answer.

        async with coordinator.session(sampling) as session:
            async with session.answer(prompt, max_tokens=64, end=eos) as tokens:
                async for token in tokens:
                    ...

    Each answer computes only the part of its prompt after the common prefix with the previous prompt and
    answer. An answer may be left before its end. Leaving the session frees its state on all nodes.

    With `shares`, a session without state begins with what another one of the chain holds of its prompt
    (engine/sharing.py). One that `lingers` keeps the state of a complete answer for others, until the room is
    needed."""

    def __init__(
        self,
        chains: Chains,
        generation: Generation,
        admission: Admission,
        numbers: Iterator[int],
        *,
        shares: bool = True,
        lingers: bool = False,
    ) -> None:
        self._chains, self._generation, self._numbers = chains, generation, numbers
        self._admission, self._shares, self._lingers = admission, shares, lingers
        self._alone = False
        """Whether this answer is computed without the state of other sessions, since it has failed with
        it."""
        self._prompt: Sequence[int] = ()
        """The prompt of an answer that waits for admission."""
        self._chain: Chain | None = None
        self._found: deque[Drawn | Read] = deque()
        """Tokens, or results of a text that is read, that nobody has taken yet. Their number is limited by
        the length of the answer alone, so that a slow reader never holds up the chain."""
        self._failed: Failed | Exception | None = None
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
        generation = self._generation
        generation.check(prompt)
        ask = partial(generation.ask, prompt, max_tokens, end)
        most = generation.most(prompt, max_tokens)
        return Answer(self, Question(list(prompt), len(prompt), most, ask), keep=keep)

    def read(self, tokens: Sequence[int], first: int, want: Want) -> Reading:
        """Reads a text: `want` of the rows from position `first` on, as in engine.batch.ReadRequest. The
        session's state is freed after it. Errors as for `answer`."""
        generation = self._generation
        generation.check_read(tokens, want)
        ask = partial(generation.read, tokens, first, want)
        question = Question(list(tokens[: first + 1]), len(tokens), len(tokens), ask)
        return Reading(self, question, keep=False)

    @property
    def due(self) -> bool:
        """Whether results are due."""
        return self._generation.in_flight > 0 and self._failed is None

    @property
    def held(self) -> int:
        """The positions that the whole chain certainly holds, for a transition to carry."""
        return self._generation.held if self._failed is None else 0

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens of the sequence, as far as they are known."""
        return self._generation.known

    @property
    def will_hold(self) -> int:
        """The positions that it will hold if its answer goes on; 0 if it does not go on."""
        if self._chain is None or self._failed is not None or self._generation.finished:
            return 0
        return len(self._generation.known) - 1

    @property
    def busy(self) -> bool:
        """Whether somebody uses the session; else it only keeps state for others."""
        return self._answering or not self._lingers

    async def holds(self, positions: int) -> None:
        """Waits until the whole chain holds so many positions of this session, or will not soon."""
        while self.held < positions <= self.will_hold:
            await self._news.wait()

    def lender(self) -> tuple[Session, int] | None:
        """The session from which this one, which waits, would be opened now, and the positions that they
        would share."""
        chain = self._chains.current
        source = None if chain is None or chain.ended else self._source(chain, self._prompt)
        return None if source is None else (source.session, source.positions)

    def _source(self, chain: Chain, tokens: Sequence[int]) -> Source[Session] | None:
        if not self._shares or self._alone:
            return None
        return source_for(tokens, (s for s in chain.sessions.values() if isinstance(s, Session)))

    def trim(self, positions: int) -> None:
        """Uses only a multiple of so many positions of what the chain holds from now on."""
        self._generation.trim(positions)

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

    def carry(self, new: Chain, fill: Fill | None) -> Open | Close | None:
        """Goes on in the chain of the next epoch, which holds the session's state, but for what `fill` says.
        Returns the message to send first, if any. State that is kept for others is not filled, but freed."""
        if fill is not None and not self.busy:
            close = Close(self._generation.session, new.flow.epoch)
            self.dropped()
            return close
        if fill is not None:
            self._admission.parts(self)  # what is filled again is not shared
        self._chain = new
        new.join(self._generation.session, self)
        return self._generation.carry(new.flow, fill)

    def dropped(self) -> None:
        """Notes that the state of the session went with its chain."""
        self._chain = None
        self.leave()
        self._admission.lost(self)

    async def begin(self, question: Question, *, keep: bool) -> None:
        """Waits for admission and begins an answer, or a text that is read. ContextError: the chain cannot
        hold it. ValueError: an answer of this session has not ended."""
        if self._answering:
            raise ValueError(
                "a session gives one answer at a time: leave the previous answer, or open another session"
            )
        self._answering = True
        try:
            self._prompt, self._alone = question.tokens, False
            own = self._generation.reuses(question.tokens)
            await self._admission.begin(self, min(question.positions, question.most), question.most, own)
        except BaseException:
            self._answering = False
            raise
        self._keep = keep
        self._found.clear()
        if not isinstance(self._failed, Failed):  # which concerns the state that the nodes kept
            self._failed = None
        question.ask()
        if self._chain is not None:
            self._chain.send(self.due_steps())

    def end(self, *, keep: bool, rest: bool = False) -> None:
        """Ends an answer, complete or not; with `rest` it counts as complete."""
        complete = (rest or self._generation.finished) and self._failed is None
        self._generation.stop()
        keep = keep or (self._lingers and complete)
        if not keep:
            self.leave()
        elif rest and self._lingers and self._chain is not None:
            self._replace()
        self._answering = False
        self._admission.end(self, keep=keep and self._chain is not None)
        self.wake()

    async def next_found(self) -> Drawn | Read | None:
        """The next token of an answer, or result of a text that is read; None when it is complete.
        ContextError or another ShoalError: the nodes cannot continue it."""
        while not self._found:
            if self._failed is not None:
                self._retry(self._failed)
            elif self._generation.finished:
                return None
            elif self._chain is None:
                await self._join()
            else:
                await self._news.wait()
        return self._found.popleft()

    def take(self, message: Taken, *, fill: bool = False) -> list[Due]:
        """Takes a message of the chain; returns the messages that are due after it. `fill`: it is a Result of
        rows that fill lost positions."""
        self.wake()
        if isinstance(message, Failed):
            self._failed = message
            if not self.busy:  # of rows that were on their way when the answer was ended
                self.close()
            return []
        try:
            found = self._generation.take(message, fill=fill)
        except RemoteProtocolError as error:
            self._failed = error
            return []
        if found is not None:
            self._found.append(found)
            if self._chain is not None and isinstance(found, Drawn):
                self._chain.tokens += 1
        if self._generation.finished and not self._keep:  # others need not wait until the tokens are read
            if self._lingers:
                self._replace()
            else:
                self.leave()
            self._admission.end(self, keep=self._lingers)
        return self.due_steps()

    def _replace(self) -> None:
        """Closes sessions that keep state for others, and hold nothing that this one does not."""
        assert self._chain is not None
        others = [s for s in self._chain.sessions.values() if isinstance(s, Session) and s is not self]
        for other in others:
            if not other.busy and min(common_prefix(self.tokens, other.tokens), self.held) >= other.held:
                other.close()

    def wake(self) -> None:
        """Lets `next_found` look again."""
        self._news.set()
        self._news = trio.Event()

    def due_steps(self) -> list[Due]:
        """The messages to send now; none while the chain is held. A session whose next position has no room
        is set aside instead."""
        if self._generation.finished or self._failed is not None:
            return []
        if self._chain is None or not self._chain.sends(self._generation):
            return []
        if not self._admission.grow(self, len(self._generation.known)) or self._chain is None:
            return []  # with room again at once, it begins anew in `next_found`
        steps = self._generation.due()
        if self._generation.failure is not None:
            self._failed = self._generation.failure
            self.wake()
        return steps

    def _retry(self, failed: Failed | Exception) -> None:
        """Begins again without the state of earlier answers, which may be the cause of the failure. For lack
        of room, begins again without the state of idle sessions; if other answers hold the room, once one has
        ended. Else raises the failure."""
        self._failed = None
        carried = self._alone = self._generation.carried
        self.leave()
        if isinstance(failed, Failed):
            if carried:
                return
            crowded = failed.code in _CROWDED
            if crowded and (self._admission.make_room() or self._admission.refused(self)):
                return
        self._generation.close()
        raise from_wire(failed.code, failed.text, "the nodes") if isinstance(failed, Failed) else failed

    async def _join(self) -> None:
        chain, source = await self._place()
        self._chain = chain
        shared = (None, 0) if source is None else (source.session.generation.session, source.positions)
        self._generation.session = next(self._numbers)  # results for an earlier number may still arrive
        opening = self._generation.start(chain.flow, *shared)
        chain.join(opening.session, self)
        steps = self.due_steps()
        if self._chain is chain:  # not set aside
            chain.send([opening, *steps])

    async def _place(self) -> tuple[Chain, Source[Session] | None]:
        """Waits for admission, a chain, and for another session that is computing the same tokens."""
        while True:
            await self._admission.admitted(self)
            chain = await self._chains.chain()
            if not self._admission.runs(self):  # the room of a new chain may be less
                continue
            source = self._source(chain, self._generation.skippable)
            if source is not None and source.later:
                await source.session.holds(source.positions)
            elif self._admission.share(
                self, *((None, 0) if source is None else (source.session, source.positions))
            ):
                return chain, source


class _Asked:
    """What was asked of a session, until its block is left. A failure of it alone, such as no room for its
    state, is raised where its items are read. Other sessions go on."""

    def __init__(self, session: Session, question: Question, *, keep: bool) -> None:
        self._session, self._question, self._keep = session, question, keep
        self._rest = False

    async def __aenter__(self) -> Self:
        await self._session.begin(self._question, keep=self._keep)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._session.end(keep=self._keep, rest=self._rest)

    def __aiter__(self) -> Self:
        return self


class Answer(_Asked):
    """An async iterator over the token ids of one answer.

    async with session.answer(prompt, max_tokens=64) as tokens:
        async for token in tokens:
            ..."""

    logprobs: tuple[Logprobs, ...] = ()
    """Log-probabilities of the token that was read last, if the session reports them."""

    async def __anext__(self) -> int:
        """The next token id. ContextError or another ShoalError: the nodes cannot continue this answer."""
        found = await self._session.next_found()
        if found is None:
            raise StopAsyncIteration
        assert isinstance(found, Drawn), "an answer has tokens"
        self.logprobs = found.logprobs
        return found.token

    def rest(self) -> None:
        """Lets the answer's state stay for others where it is left, as that of a complete one."""
        self._rest = True

    @property
    def cached(self) -> int:
        """The positions of the prompt that were not computed for this answer, once there is a token."""
        return self._session.generation.cached or 0


class Reading(_Asked):
    """An async iterator over the results of a text that is read: rows in order, several at a time."""

    async def __anext__(self) -> Read:
        """The next result. Errors as for Answer."""
        found = await self._session.next_found()
        if found is None:
            raise StopAsyncIteration
        assert isinstance(found, Read), "a text that is read has results"
        return found
