"""The queue of messages at a stage, and the choice of the next batch. Nothing here does I/O or reads a clock.

Messages of one session stay in order. A batch has at most one Step of each session:

- Rows that were computed together on the previous stage stay together (`Step.more`), with others that wait as
  well, up to the rows of a group. On the first stage, rows of sequences of one group go together
  (net/scheduler.py).
- Rows of sequences that decode go before rows of prompts. Prompts take turns.
- While sequences decode, the first stage divides Steps of prompts into slices, so small that no stage needs
  much longer for a call with one (Grouping.slice). A slice goes with rows of sequences that decode, or alone
  if its call ends before the next of them is due.

Times are in seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..engine.batch import Want
from ..planner.groups import Grouping
from ..planner.rows import MOST_ROWS
from .messages import STEP_LIMIT, Close, Epoch, Open, Step
from .scheduler import Costs, Expect, Load, Streams

Item = Open | Close | Step
MAX_STEPS = 32
"""The most Steps in a batch. Each may want a logit row, and a stage has room for 32 by default."""
MAX_BYTES = 2 * STEP_LIMIT
"""The most bytes of queued messages, by `held_bytes`: two Steps of the largest size."""
ENOUGH_BYTES = MAX_BYTES - STEP_LIMIT
"""The most bytes of queued messages to which another may be added."""
ENOUGH_STEPS = 3
"""How many Steps of the most rows are enough where they have fewer bytes: work for three calls."""
WHOLE_SECONDS = 0.005
"""How long rows wait for the others of their call on the previous stage, which are on their way; or for as
long as a call takes, if that is longer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The next work of a stage: sessions to open and close, in order, then the Steps of one call."""

    notices: tuple[Open | Close, ...]
    steps: tuple[Step, ...]


@dataclass(slots=True)
class _Call:
    """Rows that the previous stage has computed together, and when the first arrived. `whole`: the last of
    them has arrived."""

    since: float
    decoding: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    whole: bool = False


@dataclass(slots=True)
class Inbox:
    """A queue for one epoch. `max_rows` and `chunk_rows` limit all rows and the prompt rows of a call.
    `groupings` and `expect` are those of the stage.

    `put`, `take` and `ran` are told the time. What is queued is limited in bytes, so that it has a fixed
    place in the memory that a node promises: the inbox is `full` with more than `enough` bytes, and its owner
    then reads no connection."""

    epoch: Epoch
    max_rows: int
    chunk_rows: int
    groupings: Sequence[Grouping] = ()
    expect: Expect | None = None
    enough: int = ENOUGH_BYTES
    _lines: dict[int, deque[Item]] = field(default_factory=dict)
    _bytes: int = 0
    _heard: int = 0
    """Opens and Closes that are queued."""
    _streams: Streams = field(init=False)
    _costs: Costs | None = field(init=False)
    _decoding: set[int] = field(default_factory=set)
    """Sessions whose first queued item is the row of a sequence that decodes."""
    _calls: deque[_Call] = field(default_factory=deque)
    """Calls of the previous stage that wait. The last one may not be whole."""
    _usual: float = 0.0
    """The expected seconds of the rows of sequences that decode of the last call that had any."""
    _later: bool = False
    """Whether this is a later stage than the first, since Steps arrive with hidden rows."""
    _pressed: tuple[float, float] = (0.0, 0.0)
    """When the last call of prompts alone began and ended."""

    def __post_init__(self) -> None:
        self._streams = Streams(self.groupings)
        self._costs = None if self.expect is None else Costs(self.expect)

    @property
    def full(self) -> bool:
        """Whether a batch must be taken before the next item is put, since the largest might not fit."""
        return self._bytes > self.enough

    @property
    def bytes(self) -> int:
        """The size of what is queued, by `held_bytes`."""
        return self._bytes

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, item: Item, now: float) -> None:
        """Appends an item; drops it if it is of another epoch. A Close drops the queued Steps of its session.
        If the session's Open is still queued, both are dropped, since the rest of the chain does not know the
        session."""
        if item.epoch != self.epoch:
            return
        line = self._lines.setdefault(item.session, deque())
        if isinstance(item, Close):
            unheard = any(isinstance(waiting, Open) for waiting in line)
            self._bytes -= sum(map(held_bytes, line))
            self._heard -= sum(not isinstance(waiting, Step) for waiting in line)
            line.clear()
            self._forget(item.session)
            if unheard:
                del self._lines[item.session]
                return
        elif isinstance(item, Step):
            decodes = not line and _decodes(item)
            if decodes:
                self._decoding.add(item.session)
                self._streams.arrived(item.session, now)
            if item.hidden is not None:
                self._later = True
                self._join_call(item, decodes, now)
        self._heard += not isinstance(item, Step)
        self._bytes += held_bytes(item)
        line.append(item)

    def take(self, now: float) -> Batch | float | None:
        """Removes and returns the next batch; or the time at which to ask again, if waiting for more rows
        pays until then and none arrive before; or None, if nothing is queued."""
        if not self._lines:
            return None
        notices = self._notices() if self._heard else []
        self._streams.drop(now)
        prompts = []
        if len(self._lines) > len(self._decoding):
            prompts = [session for session in self._lines if session not in self._decoding]
        chosen = self._chosen(now)
        steps: list[Step] = []
        if isinstance(chosen, _Call):
            sessions = chosen.decoding[: min(MAX_STEPS, self.max_rows)]
            delayed = self._delayed(sessions, now)
            self._streams.taken(sessions)
            steps = [self._pop(session) for session in sessions]
            self._usual = self._seconds(steps)
            if prompts and not delayed:
                self._add_beside(steps, prompts, chosen.prompts)
            self._leave_calls(sessions)
        elif prompts and chosen is None:
            chosen = self._alone(steps, prompts, now)
        if steps or notices:
            return Batch(tuple(notices), tuple(steps))
        assert not isinstance(chosen, _Call), "a call has rows"
        return chosen

    def ran(self, batch: Batch, start: float, end: float) -> None:
        """Learns from a batch that was taken, whose call began and ended at these times."""
        if not batch.steps:
            return
        if self._costs is not None:
            self._costs.ran([load(step) for step in batch.steps], end - start)
        decoding = [step.session for step in batch.steps if _decodes(step)]
        self._streams.ran(decoding, end)
        if not decoding:
            self._pressed = start, end

    # Rows of sequences that decode.

    def _join_call(self, step: Step, decodes: bool, now: float) -> None:
        """Adds a Step to the call of the previous stage that it was a part of."""
        if not self._calls or self._calls[-1].whole:
            self._calls.append(_Call(since=now))
        call = self._calls[-1]
        (call.decoding if decodes else call.prompts).append(step.session)
        call.whole = not step.more
        if call.whole and not call.decoding:
            self._calls.pop()

    def _chosen(self, now: float) -> _Call | float | None:
        """The next call of sequences that decode; or the time until which to wait for more of them; or None
        if none of their rows waits."""
        if not self._decoding:
            return None
        if self._calls and self._calls[0].decoding:
            call = self._calls[0]
            end = call.since + max(WHOLE_SECONDS, self._usual)
            if not call.whole and now < end:
                return end
            call.whole = True
            self._merge()
            return call
        found = self._streams.choose(now)
        return _Call(now, found) if isinstance(found, list) else found

    def _merge(self) -> None:
        """Joins calls that wait, as long as they are not more than a group: sequences whose laps end at
        different times meet where they wait for each other, at the busiest stage."""
        grouping = self._streams.grouping
        if grouping is None:
            return
        call, most = self._calls.popleft(), -(-len(self._streams) // grouping.groups)
        while self._calls and len(call.decoding) + len(self._calls[0].decoding) <= most:
            if not self._calls[0].whole:
                break
            other = self._calls.popleft()
            call.decoding += other.decoding
            call.prompts += other.prompts
        self._calls.appendleft(call)

    def _leave_calls(self, sessions: Iterable[int]) -> None:
        """Removes sessions from the calls of the previous stage, and calls without any."""
        gone = set(sessions)
        for call in self._calls:
            call.decoding = [session for session in call.decoding if session not in gone]
        self._calls = deque(call for call in self._calls if call.decoding or not call.whole)

    # Rows of prompts.

    def _delayed(self, sessions: Sequence[int], now: float) -> bool:
        """Whether the rows of these sessions have waited for a call of prompts alone for so long that none
        goes with them as well."""
        since, (start, end) = self._streams.since(sessions), self._pressed
        return min(end, now) - max(start, since) > self._usual / 2

    def _add_beside(self, steps: list[Step], prompts: Sequence[int], own: Sequence[int]) -> None:
        """Adds rows of prompts to a call of sequences that decode: on a later stage those that were in the
        call of the previous stage, or else one Step that waits."""
        if not self._later:
            self._add(steps, prompts)
            return
        there = set(prompts)
        for session in [session for session in own if session in there] or prompts[:1]:
            if self._fits(steps, self._front(session)):
                steps.append(self._pop(session))

    def _alone(self, steps: list[Step], prompts: Sequence[int], now: float) -> float | None:
        """Adds rows of prompts to a call without others; or adds none, and returns the time until which to
        wait for rows of a sequence that decodes, because that call would end too late for them."""
        due = self._streams.due(now) if self._streams else None
        if due is not None:
            first = self._front(prompts[0])
            rows = first.tokens[: self._slice(first.first)]
            seconds = self._seconds([replace(first, tokens=rows)])
            if seconds > due[0] - now + self._usual / 4:
                return due[1]
        self._add(steps, prompts)
        return None

    def _add(self, steps: list[Step], prompts: Sequence[int]) -> None:
        """Adds rows of prompts to a call, up to a slice while sequences decode. The first Step of a call
        always goes: one that is too long for any batch must fail in the stage instead of waiting for ever."""
        taken = 0
        for session in prompts:
            step = self._front(session)
            rows = min(len(step.tokens), self._slice(step.first) - taken)
            if rows > 0 and (not steps or self._fits(steps, step, rows)):
                steps.append(self._pop(session, rows))
                taken += rows

    def _slice(self, position: int) -> int:
        """The most rows of prompts from that position on in a call."""
        grouping = self._streams.grouping
        return MOST_ROWS if grouping is None else grouping.slice(position)

    def _fits(self, steps: Sequence[Step], step: Step, rows: int | None = None) -> bool:
        """Whether a call has room for so many rows of a prompt's Step, or all."""
        count = len(step.tokens) if rows is None else rows
        prompt = sum(len(other.tokens) for other in steps if not _decodes(other))
        decoding = sum(map(_decodes, steps))
        return (
            len(steps) < MAX_STEPS
            and prompt + count <= self.chunk_rows
            and decoding + prompt + count <= self.max_rows
        )

    def _seconds(self, steps: Sequence[Step]) -> float:
        """The expected seconds of a call; 0 if no costs are known."""
        return self._costs.seconds([load(step) for step in steps]) if self._costs is not None else 0.0

    # The lines of the sessions.

    def _notices(self) -> list[Open | Close]:
        """Removes the Opens and Closes that are first in their lines."""
        notices: list[Open | Close] = []
        for session in list(self._lines):
            line = self._lines[session]
            while line and not isinstance(line[0], Step):
                notices.append(_notice(line.popleft()))
            if not line:
                del self._lines[session]
        self._bytes -= sum(map(held_bytes, notices))
        self._heard -= len(notices)
        return notices

    def _front(self, session: int) -> Step:
        step = self._lines[session][0]
        assert isinstance(step, Step)
        return step

    def _pop(self, session: int, rows: int | None = None) -> Step:
        """Removes the first Step of a session, or the first rows of it, and moves the session behind the
        others."""
        step = self._front(session)
        line = self._lines.pop(session)
        line.popleft()
        self._bytes -= held_bytes(step)
        if rows is not None and rows < len(step.tokens):
            step, rest = _divided(step, rows)
            line.appendleft(rest)
            self._bytes += held_bytes(rest)
        if line:
            self._lines[session] = line
        self._decoding.discard(session)
        return step

    def _forget(self, session: int) -> None:
        self._decoding.discard(session)
        self._streams.forget(session)
        self._leave_calls([session])


def load(step: Step) -> Load:
    """A Step as costs see it."""
    return len(step.tokens), step.first, step.want is Want.TOKEN


def _decodes(step: Step) -> bool:
    """Whether a Step is the row of a sequence that decodes."""
    return len(step.tokens) == 1 and step.want is Want.TOKEN


def _divided(step: Step, rows: int) -> tuple[Step, Step]:
    """The first rows of a Step, which want nothing, and the rest."""
    hidden = step.hidden
    return (
        replace(
            step,
            tokens=step.tokens[:rows],
            want=Want.NOTHING,
            hidden=None if hidden is None else hidden[:rows],
        ),
        replace(
            step,
            first=step.first + rows,
            tokens=step.tokens[rows:],
            hidden=None if hidden is None else hidden[rows:],
        ),
    )


def enough_bytes(rows: int, cols: int) -> int:
    """How many bytes of queued messages are enough for a stage whose Steps have at most so many rows and
    columns."""
    return min(ENOUGH_BYTES, ENOUGH_STEPS * step_bytes(rows, cols))


def most_bytes(rows: int, cols: int) -> int:
    """The most bytes of queued messages at such a stage: `enough_bytes`, and the Step that was put last."""
    return enough_bytes(rows, cols) + step_bytes(rows, cols)


def step_bytes(rows: int, cols: int) -> int:
    """About what a Step takes in memory: objects of Python, and the hidden rows."""
    return 512 + rows * (40 + 4 * cols)


def held_bytes(item: Item) -> int:
    """About what a queued message takes in memory."""
    if not isinstance(item, Step):
        return 512
    return step_bytes(len(item.tokens), 0 if item.hidden is None else item.hidden.shape[1])


def _notice(item: Item) -> Open | Close:
    assert not isinstance(item, Step)
    return item
