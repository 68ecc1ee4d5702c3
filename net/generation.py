"""The state of one session at the coordinator: which tokens were sent to the chain, and which results are
due.

A session gives one answer after another. The coordinator keeps the token ids, so it knows which positions the
chain holds, and sends a prompt from the first position that differs. Recovery uses the same code: in a new
epoch the chain holds nothing, all known tokens are sent again as a prompt, and the answer goes on with the
same token, since sampling depends only on the history, the parameters and the position. Nothing here does
I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from ..engine.batch import Sampling, Want, common_prefix
from ..engine.errors import ContextError
from ..planner.chunks import Chunking, Chunkings, of_length
from .errors import RemoteProtocolError
from .messages import Close, Epoch, Open, Result, Step


@dataclass(frozen=True, slots=True)
class Flow:
    """The flow control of sessions in one epoch: the most rows in a Step of a prompt, the Steps in flight at
    once, and how prompts are cut by their length; without `chunks`, into Steps of `chunk_rows`."""

    epoch: Epoch
    chunk_rows: int
    window: int
    chunks: Chunkings = ()

    def cut(self, tokens: int) -> Chunking:
        """How a prompt of so many tokens is cut."""
        return of_length(self.chunks, tokens) if self.chunks else Chunking(self.chunk_rows)


@dataclass(slots=True)
class Generation:
    """The state of one session. `ask` begins an answer. As with engine.generate in one process, it ends after
    `max_tokens`, at the end of the context, or before a token in `end`."""

    session: int
    sampling: Sampling
    context: int
    vocab: int
    known: list[int] = field(init=False, default_factory=list)
    """Token ids by position: the prompt, then the answer so far."""
    finished: bool = field(init=False, default=True)
    _last: int = field(init=False, default=0)
    """The length of `known` at which the answer is complete."""
    _end: Collection[int] = field(init=False, default=())
    _flow: Flow | None = field(init=False, default=None)
    _cut: Chunking = field(init=False, default=Chunking(1))
    """How what is known is sent as a prompt."""
    _carried: bool = field(init=False, default=False)
    _sent: int = field(init=False, default=0)
    """The chain holds known[:_sent], or will when all Steps in flight are done."""
    _in_flight: deque[Step] = field(init=False, default_factory=deque)
    _old: int = field(init=False, default=0)
    """How many of the Steps in flight, from the first, belong to an abandoned answer."""

    def check(self, prompt: Sequence[int]) -> None:
        """Checks a prompt. ContextError: it is empty, or leaves no position for an answer. ValueError: a
        token id is not in the vocabulary."""
        if not 0 < len(prompt) < self.context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.context}, the answer "
                "included: it needs at least one token and room for one more; shorten it, or raise --context"
            )
        for token in prompt:
            if not 0 <= token < self.vocab:
                raise ValueError(f"the prompt holds the token id {token}, which is not in [0, {self.vocab})")

    def most(self, prompt: Sequence[int], max_tokens: int) -> int:
        """The most positions that an answer runs. Its last token is sampled and not run."""
        return min(len(prompt) + max_tokens - 1, self.context) if max_tokens > 0 else 0

    def ask(self, prompt: Sequence[int], max_tokens: int, end: Collection[int] = ()) -> None:
        """Begins an answer. The common prefix of `prompt` and the tokens that the chain holds is not sent
        again. The prompt's last token always is, since the answer's first token is sampled from its logits.
        Errors as for `check`."""
        self.check(prompt)
        self._old = len(self._in_flight)
        self._sent = min(common_prefix(self.known[: self._sent], prompt), len(prompt) - 1)
        self._carried = self._flow is not None
        self.known, self._end = list(prompt), end
        self._last = min(len(prompt) + max_tokens, self.context + 1)
        self.finished = max_tokens <= 0
        self._plan_cut()

    def start(self, flow: Flow) -> Open:
        """Begins the session in an epoch, in which nothing was sent yet; returns the Open message."""
        self._forget()
        self._flow = flow
        self._plan_cut()
        return Open(self.session, flow.epoch, self.sampling, self.context)

    @property
    def carried(self) -> bool:
        """Whether the answer uses state that earlier answers left in the chain."""
        return self._carried

    @property
    def in_flight(self) -> int:
        """The number of Steps whose results have not been taken."""
        return len(self._in_flight)

    def due(self) -> list[Step]:
        """The Steps to send now, as far as the window allows. The Step with the last known token wants a
        token."""
        steps: list[Step] = []
        if self.finished:
            return steps
        assert self._flow is not None
        while self._sent < len(self.known) and len(self._in_flight) < self._flow.window:
            rows = min(self._flow.chunk_rows, self._cut.at(self._sent))
            tokens = tuple(self.known[self._sent : self._sent + rows])
            last = self._sent + len(tokens) == len(self.known)
            step = Step(
                self.session, self._flow.epoch, self._sent, tokens, Want.TOKEN if last else Want.NOTHING
            )
            self._sent += len(tokens)
            self._in_flight.append(step)
            steps.append(step)
        return steps

    def take(self, result: Result) -> int | None:
        """Accepts a result of the first rows in flight, which need not be those of one Step: a stage may
        divide Steps, and join rows that follow each other. Returns the token that it adds to the answer, if
        any. RemoteProtocolError: the result does not match what is in flight."""
        done, first, rest, wanted = 0, result.first, result.rows, False
        for step in self._in_flight:
            if step.first != first or rest < len(step.tokens) or wanted:
                break
            first, rest = first + len(step.tokens), rest - len(step.tokens)
            done, wanted = done + 1, step.want is Want.TOKEN
        part = self._in_flight[done] if rest and done < len(self._in_flight) and not wanted else None
        matches = not rest or (part is not None and part.first == first and rest < len(part.tokens))
        if not matches or (result.token is not None) != wanted:
            raise RemoteProtocolError(
                f"the last node sent a Result of {result.rows} rows at {result.first}, which was not due"
            )
        if result.token is not None and result.token >= self.vocab:
            raise RemoteProtocolError(
                f"the last node sent token {result.token}, which is not in [0, {self.vocab})"
            )
        old = done <= self._old
        self._old = max(0, self._old - done)
        for _ in range(done):
            self._in_flight.popleft()
        if part is not None:
            self._in_flight[0] = replace(part, first=first + rest, tokens=part.tokens[rest:])
        return None if result.token is None or old else self._append(result.token)

    def stop(self) -> None:
        """Ends the answer, complete or not. What is in flight is computed, and its tokens are dropped."""
        self.finished, self._old = True, len(self._in_flight)

    def leave(self) -> Close | None:
        """Forgets what the chain holds; returns the Close message that frees it there, or None if the session
        was not open."""
        flow = self._flow
        self._forget()
        return None if flow is None else Close(self.session, flow.epoch)

    def close(self) -> Close | None:
        """Ends the answer and leaves the chain; see `leave`."""
        self.finished = True
        return self.leave()

    def _forget(self) -> None:
        self._flow, self._sent, self._old, self._carried = None, 0, 0, False
        self._in_flight.clear()

    def _plan_cut(self) -> None:
        if self._flow is not None:
            self._cut = self._flow.cut(len(self.known) - self._sent)

    def _append(self, token: int) -> int | None:
        if token in self._end:
            self.finished = True
            return None
        self.known.append(token)
        self.finished = len(self.known) >= self._last
        return token
