"""The state of one session at the coordinator: which tokens were sent to the chain, and which results are
due.

A session gives one answer after another. The coordinator keeps the token ids, so it knows which positions the
chain holds, and sends a prompt from the first position that differs. Recovery uses the same code: in an epoch
whose chain holds nothing, all known tokens are sent again as a prompt, and the answer goes on with the same
token, since sampling depends only on the history, the parameters and the position. A transition between
epochs carries a session: the chain of the next epoch holds the same positions, and nothing is sent again. If
some units have lost their keys and values, these are filled first (`Fill`). Nothing here does I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..engine.batch import Sampling, Want, common_prefix
from ..engine.errors import ContextError
from ..planner.chunks import Chunking, Chunkings, of_length
from .errors import RemoteProtocolError
from .messages import Close, Epoch, Open, Refill, Result, Step


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


@dataclass(frozen=True, slots=True)
class Fill:
    """How the lost keys and values of a session are filled. Its tokens are sent as Steps through units [0,
    until), of which the stage of the last one answers with Results. A stage that ends at unit `enter` has
    kept the rows of the first `kept` positions: those are only sent on, through units [enter, until)."""

    until: int
    enter: int = 0
    kept: int = 0


class Part(NamedTuple):
    """A stage of a chain: units [first, last) on a member."""

    member: int
    first: int
    last: int


class Loss(NamedTuple):
    """How a chain fills units that have lost the keys and values of all sessions: its stages run units [0,
    until) again, and `filler` answers. `keeper` is the member that may have kept the rows that go into unit
    `enter`. With `until` 0 there is nothing to fill."""

    until: int = 0
    filler: int | None = None
    keeper: int | None = None
    enter: int = 0


def loss_of(lost: tuple[int, int], before: Sequence[Part], after: Sequence[Part]) -> Loss:
    """How to fill units [lost[0], lost[1]) after a transition between chains of these stages.

    The first unit and the last one, embedding and LM head, have no keys and values. But a member that had no
    stage, and has lost units alone, needs the tokens of all sessions, so it must be on the way of the
    Steps."""
    if lost[0] >= lost[1]:
        return Loss()
    head = after[-1].last - 1
    first, until = max(lost[0], 1), min(lost[1], head)
    until = until if first < until else 0

    def gone(part: Part) -> bool:
        """Whether all that the stage has, or had, is lost. It may be another process by now."""
        return lost[0] <= part.first and min(part.last, head) <= lost[1]

    knowing = {part.member for part in before if not gone(part)}
    blank = [part for part in after if part.member not in knowing and gone(part)]
    until = max([until, *(part.first + 1 for part in blank)])
    if not until:
        return Loss()
    (filler,) = (part.member for part in after if part.first < until <= part.last)
    ended = {part.member for part in before if part.last == first}
    keepers = [part.member for part in after if part.member in ended and part.first <= first <= part.last]
    if not keepers or blank:  # kept rows might arrive at a blank stage before the Open does
        return Loss(until, filler)
    return Loss(until, filler, keepers[0], first)


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
    _asked: int = field(init=False, default=0)
    """The length of the prompt."""
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
    _fill: Fill | None = field(init=False, default=None)
    """How positions [0, _lost) of lost units are filled before any other rows are sent."""
    _lost: int = field(init=False, default=0)
    _filled: int = field(init=False, default=0)
    """The positions that are filled, or will be when `_fills` are done."""
    _fills: deque[Step] = field(init=False, default_factory=deque)
    """The Steps in flight that fill positions."""

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
        self._lost = min(self._lost, self._sent)
        self._carried = self._flow is not None
        self.known, self._asked, self._end = list(prompt), len(prompt), end
        self._last = min(len(prompt) + max_tokens, self.context + 1)
        self.finished = max_tokens <= 0
        self._plan_cut()

    def start(self, flow: Flow) -> Open:
        """Begins the session in an epoch, in which nothing was sent yet; returns the Open message."""
        self._forget()
        self._flow = flow
        self._plan_cut()
        return Open(self.session, flow.epoch, self.sampling, self.context)

    def carry(self, flow: Flow, fill: Fill | None = None) -> Open | None:
        """Goes on in the next epoch, whose chain holds `held` positions. With `fill`, some of its units have
        lost them: returns the Open message to send first."""
        assert self._flow is not None and not self.filling
        self._sent, self._flow, self._old, self._carried = self.held, flow, 0, True
        self._in_flight.clear()
        self._fill, self._filled, self._lost = fill, 0, self._sent
        self._plan_cut()
        return None if fill is None else Open(self.session, flow.epoch, self.sampling, self.context)

    @property
    def held(self) -> int:
        """The positions, from the first, that every stage of the chain certainly holds; 0 while lost ones are
        filled. A stage may hold more."""
        return 0 if self.filling else min([self._sent, *(step.first for step in self._in_flight)])

    @property
    def filling(self) -> bool:
        """Whether positions of lost units remain to be filled."""
        return self._fill is not None and (self._filled < self._lost or bool(self._fills))

    @property
    def decodes(self) -> bool:
        """Whether the next Step is the row of the newest token."""
        return not self.filling and self._sent + 1 == len(self.known)

    @property
    def reads(self) -> bool:
        """Whether rows of a prompt, or of positions that are filled, are on their way."""
        return bool(self._fills) or any(len(step.tokens) > 1 for step in self._in_flight)

    @property
    def made(self) -> int:
        """The tokens of the answer so far."""
        return len(self.known) - self._asked

    @property
    def most_made(self) -> int:
        """The tokens that the answer has at most."""
        return self._last - self._asked

    @property
    def carried(self) -> bool:
        """Whether the answer uses state that earlier answers, or an earlier epoch, left in the chain."""
        return self._carried

    @property
    def in_flight(self) -> int:
        """The number of Steps whose results have not been taken."""
        return len(self._in_flight) + len(self._fills)

    def due(self) -> list[Step | Refill]:
        """The messages to send now, as far as the window allows. The Step with the last known token wants a
        token. Lost positions are filled before."""
        steps: list[Step | Refill] = []
        if self.finished:
            return steps
        assert self._flow is not None
        if self._fill is not None:
            self._add_fills(steps, self._fill)
            if self._filled < self._lost or self._refilling:
                return steps
            self._fill = self._fill if self._fills else None
        while self._sent < len(self.known) and self.in_flight < self._flow.window:
            step = self._step(self._sent, len(self.known), self._cut)
            self._in_flight.append(step)
            self._sent += len(step.tokens)
            steps.append(step)
        return steps

    def _add_fills(self, steps: list[Step | Refill], fill: Fill) -> None:
        """Adds the messages that fill lost positions: a Refill of the rows that a stage has kept, and after
        their Results, Steps. Other Steps may follow these at once, since they go the same way."""
        assert self._flow is not None
        kept, part = min(fill.kept, self._lost), (fill.enter, fill.until)
        if self._filled < kept:
            tokens, self._filled = tuple(self.known[:kept]), kept
            self._fills.append(Step(self.session, self._flow.epoch, 0, tokens, Want.NOTHING, part=part))
            steps.append(Refill(self.session, self._flow.epoch, 0, kept, *part))
        while self._filled < self._lost and self.in_flight < self._flow.window and not self._refilling:
            step = self._step(self._filled, self._lost, self._flow.cut(self._lost), (0, fill.until))
            self._fills.append(step)
            self._filled += len(step.tokens)
            steps.append(step)

    @property
    def _refilling(self) -> bool:
        """Whether rows that a stage has kept are on their way. They are sent by that stage, so Steps of the
        coordinator might overtake them."""
        part = self._fills[0].part if self._fills else None
        return part is not None and part[0] > 0

    def _step(self, first: int, end: int, cut: Chunking, part: tuple[int, int] | None = None) -> Step:
        """A Step of known tokens from position `first`, and before `end`."""
        assert self._flow is not None
        last = min(end, first + min(self._flow.chunk_rows, cut.at(first)))
        want = Want.TOKEN if last == len(self.known) and part is None else Want.NOTHING
        tokens = tuple(self.known[first:last])
        return Step(self.session, self._flow.epoch, first, tokens, want, part=part)

    def take(self, result: Result, *, fill: bool = False) -> int | None:
        """Accepts a result of the first rows in flight, which need not be those of one Step: a stage may
        divide Steps, and join rows that follow each other. `fill`: of those that fill lost positions. Returns
        the token that it adds to the answer, if any. RemoteProtocolError: the result does not match what is
        in flight."""
        in_flight = self._fills if fill else self._in_flight
        done, first, rest, wanted = 0, result.first, result.rows, False
        for step in in_flight:
            if step.first != first or rest < len(step.tokens) or wanted:
                break
            first, rest = first + len(step.tokens), rest - len(step.tokens)
            done, wanted = done + 1, step.want is Want.TOKEN
        part = in_flight[done] if rest and done < len(in_flight) and not wanted else None
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
        if not fill:
            self._old = max(0, self._old - done)
        for _ in range(done):
            in_flight.popleft()
        if part is not None:
            in_flight[0] = replace(part, first=first + rest, tokens=part.tokens[rest:])
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
        self._fill, self._filled = None, 0
        self._fills.clear()
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
