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

from ..engine.batch import Logprobs, Sampling, Want, common_prefix
from ..engine.batch import Result as Read
from ..engine.errors import ContextError
from ..engine.sampler import Allow, mask_of
from ..planner.chunks import Chunking, Chunkings, of_length
from . import tags
from .errors import RemoteProtocolError
from .messages import MOST_WANTED, Close, Epoch, Open, Refill, Result, Rows, Step
from .sampling_updates import Told, UpdateSender

Due = Step | Refill | Told
"""What a session sends: Steps on their way through the chain, the others to the node that they concern."""


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
    stage, and has lost units alone, knows no session, so it must be on the way of the Steps."""
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


class Drawn(NamedTuple):
    """A token of an answer, with its log-probabilities where they are reported."""

    token: int
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(slots=True)
class Reading:
    """A text that is read, and the results that are wanted: `want` for each row from position `first` on,
    which grows as results arrive. `following` as in engine.batch.Run."""

    want: Want
    first: int
    following: int | None


@dataclass(slots=True)
class Generation:
    """The state of one session. `ask` begins an answer. As with engine.generate in one process, it ends after
    `max_tokens`, at the end of the context, or before a token in `end`. `read` begins a text that is read, as
    in engine.batcher. `report` as in engine.batch.Run. `allow` is called with the tokens of the answer
    before each is drawn, and again with the same ones when the chain has changed."""

    session: int
    sampling: Sampling
    context: int
    vocab: int
    report: int | None = None
    allow: Allow | None = None
    failure: Exception | None = field(init=False, default=None)
    """What `allow` has raised: the answer cannot go on."""
    known: list[int] = field(init=False, default_factory=list)
    """Token ids by position: the prompt, then the answer so far."""
    finished: bool = field(init=False, default=True)
    _last: int = field(init=False, default=0)
    """The length of `known` at which the answer is complete."""
    _asked: int = field(init=False, default=0)
    """The length of the prompt."""
    _end: Collection[int] = field(init=False, default=())
    _reading: Reading | None = field(init=False, default=None)
    _tags: list[int] = field(init=False, default_factory=list)
    """The tags of the first chunks of `known`, as far as they were needed (net/tags.py)."""
    _updates: UpdateSender = field(init=False, default_factory=UpdateSender)
    _flow: Flow | None = field(init=False, default=None)
    _cut: Chunking = field(init=False, default=Chunking(1))
    """How what is known is sent as a prompt."""
    _carried: bool = field(init=False, default=False)
    _answered: bool = field(init=False, default=False)
    """Whether a Result of this session in this chain has arrived, so that all stages have opened it."""
    _sent: int = field(init=False, default=0)
    """The chain holds known[:_sent], or will when all Steps in flight are done."""
    cached: int | None = field(init=False, default=None)
    """The positions with which an answer began, since the chain held them; None: it has sent nothing yet."""
    _in_flight: deque[Step] = field(init=False, default_factory=deque)
    _stale: int = field(init=False, default=0)
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
        self._check_tokens(prompt, "prompt")

    def _check_tokens(self, tokens: Sequence[int], what: str) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab:
                raise ValueError(f"the {what} holds the token id {token}, which is not in [0, {self.vocab})")

    def most(self, prompt: Sequence[int], max_tokens: int) -> int:
        """The most positions that an answer runs. Its last token is sampled and not run."""
        return min(len(prompt) + max_tokens - 1, self.context) if max_tokens > 0 else 0

    def reuses(self, prompt: Sequence[int]) -> int:
        """The positions of an answer to this prompt that the chain holds or will hold. The prompt's last
        token is always run, since the answer's first token is sampled from its logits."""
        return min(common_prefix(self.known[: self._sent], prompt), len(prompt) - 1)

    @property
    def skippable(self) -> Sequence[int]:
        """The known tokens of which all but the last need not be run if the chain holds them."""
        return self.known if self._reading is None else self.known[: self._reading.first + 1]

    def ask(self, prompt: Sequence[int], max_tokens: int, end: Collection[int] = ()) -> None:
        """Begins an answer. What it `reuses` is not sent again. Errors as for `check`."""
        self.check(prompt)
        self._begin(prompt, len(prompt) - 1)
        self._end = end
        self._last = min(len(prompt) + max_tokens, self.context + 1)
        self.finished = max_tokens <= 0

    def check_read(self, tokens: Sequence[int], want: Want) -> None:
        """Checks a text that is to be read. ContextError: it is empty, or longer than the context.
        ValueError: a token id is not in the vocabulary, or nodes do not send what is wanted."""
        if want not in (Want.TOKENS, Want.SCORES, Want.ROWS):
            raise ValueError(f"{want.name} of a text are not over a network: ask for tokens, scores or rows")
        if not 0 < len(tokens) <= self.context:
            raise ContextError(
                f"the text has {len(tokens)} tokens and the context holds {self.context}: it needs at least "
                "one; shorten it, or raise --context"
            )
        self._check_tokens(tokens, "text")

    def read(self, tokens: Sequence[int], first: int, want: Want) -> None:
        """Begins to read a text: `want` of the rows from position `first` on. With Want.SCORES its last token
        is not run: it follows the last row. Errors as for `check_read`."""
        self.check_read(tokens, want)
        known, following = list(tokens), None
        if want is Want.SCORES:
            following = known.pop()
        self._begin(known, min(first, len(known)))
        self._reading = Reading(want, first, following)
        self._end, self._last = (), len(known)
        self.finished = first >= len(known)

    def _begin(self, tokens: Sequence[int], most: int) -> None:
        """Begins anything. At most the first `most` positions are not run again if the chain holds them."""
        self._stale = len(self._in_flight)
        same = common_prefix(self.known, tokens)
        self._sent = min(self._sent, same, most)
        self._updates.changed(same)
        del self._tags[tags.spanned(0, same).stop :]
        self._lost = min(self._lost, self._sent)
        self._carried = self._flow is not None
        self.known, self._asked = list(tokens), len(tokens)
        self._reading = self.failure = self.cached = None
        self._plan_cut()

    def start(self, flow: Flow, source: int | None = None, positions: int = 0) -> Open:
        """Begins the session in an epoch, in which nothing was sent yet; returns the Open message. The chain
        holds the first `positions` for the session `source`."""
        self._forget()
        self._flow, self._sent, self._carried = flow, positions, source is not None
        self._plan_cut()
        return Open(self.session, flow.epoch, self.context, source, positions)

    def carry(self, flow: Flow, fill: Fill | None = None) -> Open | None:
        """Goes on in the next epoch, whose chain holds `held` positions. With `fill`, some of its units have
        lost them: returns the Open message to send first."""
        assert self._flow is not None and not self.filling
        self._sent, self._flow, self._stale, self._carried = self.held, flow, 0, True
        self._in_flight.clear()
        self._updates = UpdateSender()
        self._fill, self._filled, self._lost = fill, 0, self._sent
        self._plan_cut()
        return None if fill is None else Open(self.session, flow.epoch, self.context)

    @property
    def held(self) -> int:
        """The positions, from the first, that every stage of the chain certainly holds; 0 while lost ones are
        filled, and before the first Result: the session may not have been opened everywhere. A stage may
        hold more."""
        if self.filling or not self._answered:
            return 0
        return min([self._sent, *(step.first for step in self._in_flight)])

    @property
    def filling(self) -> bool:
        """Whether positions of lost units remain to be filled."""
        return self._fill is not None and (self._filled < self._lost or bool(self._fills))

    @property
    def decodes(self) -> bool:
        """Whether the next Step is the row of the newest token."""
        return self._reading is None and not self.filling and self._sent + 1 == len(self.known)

    @property
    def reads(self) -> bool:
        """Whether rows of a prompt, or of positions that are filled, are on their way."""
        return bool(self._fills) or any(step.rows > 1 for step in self._in_flight)

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
        """Whether the answer uses state that earlier answers, other sessions or an earlier epoch have left in
        the chain."""
        return self._carried

    @property
    def _text(self) -> Sequence[int]:
        """The known tokens, and the one that follows a text that is scored."""
        reading = self._reading
        if reading is None or reading.following is None:
            return self.known
        return [*self.known, reading.following]

    @property
    def in_flight(self) -> int:
        """The number of Steps whose results have not been taken."""
        return len(self._in_flight) + len(self._fills)

    def due(self) -> list[Due]:
        """The messages to send now, as far as the window allows. The Step with the last known token wants a
        token. What the last node must be told for a Step goes before it. Lost positions are filled before."""
        steps: list[Due] = []
        if self.finished or self.failure is not None:
            return steps
        assert self._flow is not None
        if self._fill is not None:
            self._add_fills(steps, self._fill)
            if self._filled < self._lost or self._refilling:
                return steps
            self._fill = self._fill if self._fills else None
        self.cached = self._sent if self.cached is None else self.cached
        while self._sent < len(self.known) and self.in_flight < self._flow.window:
            step = self._wanted(self._step(self._sent, len(self.known), self._cut))
            bits = None
            if self.allow is not None and step.want is Want.TOKEN:
                bits = self._allowed(self.allow)
                if self.failure is not None:
                    break
            step, told = self._updates.tell(step, self._text, self.sampling, bits)
            self._in_flight.append(step)
            self._sent += step.rows
            steps += [*told, step]
        return steps

    def _wanted(self, step: Step) -> Step:
        """A Step of the text or the answer, with what is wanted of its rows. It may become shorter."""
        reading = self._reading
        if reading is None:
            reports = self.report is not None and step.want is not Want.NOTHING
            return replace(step, report=self.report) if reports else step
        if step.first < reading.first:
            return replace(self._shortened(step, reading.first - step.first), want=Want.NOTHING)
        report = None if reading.want is Want.ROWS else self.report
        return replace(self._shortened(step, MOST_WANTED), want=reading.want, report=report)

    def _shortened(self, step: Step, rows: int) -> Step:
        """The first rows of a Step."""
        count = tags.counted(step.first, step.first + rows)
        return replace(step, tokens=step.tokens[:rows], tags=step.tags[:count])

    def _allowed(self, allow: Allow) -> bytes | None:
        """The bits of the mask of the next token; None if all are allowed, or `failure` is set."""
        try:
            allowed = allow(self.known[self._asked :])
            return None if allowed is None else mask_of(allowed, self.vocab).tobytes()
        except Exception as error:  # of code that is not ours
            self.failure = error
            return None

    def _add_fills(self, steps: list[Due], fill: Fill) -> None:
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
            self._filled += step.rows
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
        tags.extend(self._tags, self.known, last)
        own = tuple(self._tags[tags.spanned(first, last)])
        tokens = tuple(self.known[first:last])
        return Step(self.session, self._flow.epoch, first, tokens, want, part=part, tags=own)

    def take(self, result: Result | Rows, *, fill: bool = False) -> Drawn | Read | None:
        """Accepts a result of the first rows in flight, which need not be those of one Step: a stage may
        divide Steps, and join rows that follow each other. `fill`: of those that fill lost positions. Returns
        the token that it adds to the answer, or what was wanted of rows that were read, if any.
        RemoteProtocolError: the result does not match what is in flight."""
        in_flight = self._fills if fill else self._in_flight
        if in_flight and in_flight[0].want.every_row:
            return self._take_read(in_flight[0], result)
        done, first, rest, wanted = 0, result.first, result.rows, False
        for step in in_flight:
            if step.first != first or rest < step.rows or wanted or step.want.every_row:
                break
            first, rest = first + step.rows, rest - step.rows
            done, wanted = done + 1, step.want is Want.TOKEN
        part = in_flight[done] if rest and done < len(in_flight) and not wanted else None
        matches = not rest or (part is not None and part.first == first and rest < part.rows)
        matches = matches and (part is None or not part.want.every_row)
        if not matches or isinstance(result, Rows) or (result.token is not None) != wanted:
            raise _not_due(result)
        if result.tokens or result.scores:
            raise _not_due(result)
        self._check_result(result, in_flight[done - 1].report if wanted else None, int(wanted))
        self._answered = True
        old = done <= self._stale
        if not fill:
            self._stale = max(0, self._stale - done)
        for _ in range(done):
            in_flight.popleft()
        if part is not None:
            in_flight[0] = replace(part, first=first + rest, tokens=part.tokens[rest:])
        return None if result.token is None or old else self._append(result.token, result.logprobs)

    def _take_read(self, step: Step, result: Result | Rows) -> Read | None:
        """Accepts a result of rows that want something each: of all rows of the first Step in flight, or of
        the first ones. None: the Step belongs to an abandoned answer. RemoteProtocolError: it is not due."""
        rows, whole = result.rows, result.rows == step.rows
        if result.first != step.first or rows > step.rows:
            raise _not_due(result)
        if isinstance(result, Rows):
            if step.want is not Want.ROWS:
                raise _not_due(result)
            read = Read(self.session, result.first, rows, output=result.output)
        else:
            counts = len(result.tokens), len(result.scores), result.token
            wanted = {Want.TOKENS: (rows, 0, None), Want.SCORES: (0, rows, None)}
            if counts != wanted.get(step.want):
                raise _not_due(result)
            self._check_result(result, step.report, rows)
            read = Read(
                self.session, result.first, rows,
                logprobs=result.logprobs, tokens=result.tokens, scores=result.scores,
            )  # fmt: skip
        self._answered = True
        if whole:
            self._in_flight.popleft()
        else:
            end = step.first + rows
            self._in_flight[0] = replace(step, first=end, tokens=step.tokens[rows:])
        if self._stale:
            self._stale -= 1 if whole else 0
            return None
        assert self._reading is not None
        self._reading.first = result.first + rows
        self.finished = self._reading.first == len(self.known)
        return read

    def _check_result(self, result: Result, report: int | None, rows: int) -> None:
        """RemoteProtocolError: a result has other log-probabilities than `report` of so many rows, other
        outputs than those rows, or tokens beyond the vocabulary."""
        told = [] if report is None else [report] * rows
        if [len(one.likeliest) for one in result.logprobs] != told:
            raise _not_due(result)
        tokens = [*result.tokens, *(token for one in result.logprobs for token, _ in one.likeliest)]
        if result.token is not None:
            tokens.append(result.token)
        if any(token >= self.vocab for token in tokens):
            raise RemoteProtocolError(
                f"the last node sent token {max(tokens)}, which is not in [0, {self.vocab})"
            )

    def trim(self, positions: int) -> None:
        """Uses only a multiple of so many positions of what the chain holds from now on. Nothing is in
        flight."""
        self._sent = self._sent // positions * positions

    def stop(self) -> None:
        """Ends the answer, complete or not. What is in flight is computed, and its tokens are dropped."""
        self.finished, self._stale = True, len(self._in_flight)

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
        self._flow, self._sent, self._stale, self._carried, self._answered = None, 0, 0, False, False
        self._fill, self._filled = None, 0
        self._fills.clear()
        self._in_flight.clear()
        self._updates = UpdateSender()

    def _plan_cut(self) -> None:
        if self._flow is not None:
            self._cut = self._flow.cut(len(self.known) - self._sent)

    def _append(self, token: int, logprobs: tuple[Logprobs, ...]) -> Drawn | None:
        if token in self._end:
            self.finished = True
            return None
        self.known.append(token)
        self.finished = len(self.known) >= self._last
        return Drawn(token, logprobs)


def _not_due(result: Result | Rows) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the last node sent a Result of {result.rows} rows at {result.first}, which was not due"
    )
