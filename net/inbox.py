"""The queue of messages at a stage, and the choice of the next batch. Nothing here does I/O or reads a clock.

Messages of one session stay in order. A batch has at most one Step of each session:

- Rows that were computed together on the previous stage stay together (`Step.more`). On the first stage, rows
  of sequences of one group go together (net/scheduler.py).
- Rows of sequences that decode go before rows of prompts. Prompts take turns. Rows of prompts are added to a
  call, or make a call of their own, only as far as no sequence that decodes is delayed for longer than
  STRETCH allows; a Step is divided where only a part of it fits.

Times are in seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..engine.batch import Want
from ..planner.groups import Grouping
from .messages import STEP_LIMIT, Close, Epoch, Open, Step
from .scheduler import Costs, Expect, Load, Streams

Item = Open | Close | Step
MAX_STEPS = 32
"""The most Steps in a batch. Each may want a logit row, and a stage has room for 32 by default."""
MAX_BYTES = 2 * STEP_LIMIT
"""The most bytes of queued messages, by `held_bytes`: two Steps of the largest size."""
STRETCH = 2.0
"""How many times as long as alone the rows of sequences that decode may take on the first stage, from their
arrival to the end of their call, while there are rows of prompts."""
LATER_STRETCH = 2.6
"""STRETCH on the later stages. They receive rows of prompts as the first stage has divided them, and divide
them again only where their own costs are out of proportion to those of the first."""
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
    `groupings` and `expect` are those of the stage; without `expect` rows of prompts have no other limit.

    `put`, `take` and `ran` are told the time. What is queued is limited to MAX_BYTES, so that it has a fixed
    place in the memory that a node promises: while the inbox is `full`, its owner reads no connection."""

    epoch: Epoch
    max_rows: int
    chunk_rows: int
    groupings: Sequence[Grouping] = ()
    expect: Expect | None = None
    _lines: dict[int, deque[Item]] = field(default_factory=dict)
    _bytes: int = 0
    _streams: Streams = field(init=False)
    _costs: Costs | None = field(init=False)
    _decoding: set[int] = field(default_factory=set)
    """Sessions whose first queued item is the row of a sequence that decodes."""
    _calls: deque[_Call] = field(default_factory=deque)
    """Calls of the previous stage that wait. The last one may not be whole."""
    _last: list[Load] = field(default_factory=list)
    """The rows of sequences that decode of the last call that had any."""
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
        return self._bytes > MAX_BYTES - STEP_LIMIT

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
        self._bytes += held_bytes(item)
        line.append(item)

    def take(self, now: float) -> Batch | float | None:
        """Removes and returns the next batch; or the time at which to ask again, if waiting for more rows
        pays until then and none arrive before; or None, if nothing is queued."""
        if not self._lines:
            return None
        notices = self._notices()
        self._streams.drop(now)
        prompts = [session for session in self._lines if session not in self._decoding]
        chosen = self._chosen(now)
        steps: list[Step] = []
        if isinstance(chosen, _Call):
            sessions = chosen.decoding[: min(MAX_STEPS, self.max_rows)]
            budget = self._budget(sessions, now) if prompts else 0.0
            self._streams.taken(sessions)
            steps = [self._pop(session) for session in sessions]
            self._last = [load(step) for step in steps]
            if prompts:
                own = set(chosen.prompts)
                self._add_prompts(steps, sorted(prompts, key=lambda session: session not in own), budget)
            self._leave_calls(sessions)
        elif prompts and chosen is None:
            chosen = self._prompts_alone(steps, prompts, now)
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
            end = call.since + max(WHOLE_SECONDS, self._seconds(self._last))
            if not call.whole and now < end:
                return end
            call.whole = True
            return call
        found = self._streams.choose(now)
        return _Call(now, found) if isinstance(found, list) else found

    def _leave_calls(self, sessions: Iterable[int]) -> None:
        """Removes sessions from the calls of the previous stage, and calls without any."""
        gone = set(sessions)
        for call in self._calls:
            call.decoding = [session for session in call.decoding if session not in gone]
        self._calls = deque(call for call in self._calls if call.decoding or not call.whole)

    # Rows of prompts.

    def _budget(self, sessions: Sequence[int], now: float) -> float:
        """The seconds that a call with rows of these sessions, which decode, may take with rows of prompts.
        What they have waited for a call of prompts alone counts."""
        since, (start, end) = self._streams.since(sessions), self._pressed
        waited = max(0.0, min(end, now) - max(start, since))
        decode = self._seconds([load(self._front(session)) for session in sessions])
        return self._stretch * decode - waited

    def _prompts_alone(self, steps: list[Step], prompts: Sequence[int], now: float) -> float | None:
        """Adds rows of prompts to a call without others; or adds none, and returns the time until which to
        wait for rows of a sequence that decodes, since both in one call take less time."""
        if self._costs is None or not self._streams:
            self._add_whole(steps, prompts)
            return None
        expected = self._streams.due(now)
        due, late = expected or (now, now)
        decode = self._seconds(self._last)
        room = max(0.0, due - now) + (self._stretch - 1) * decode
        rows = self._most(self._front(prompts[0]), [], room, self.chunk_rows)
        if expected is not None:
            step = self._front(prompts[0])
            part = (max(1, rows), step.first, False)
            together = self._seconds([part]) + decode - self._seconds([*self._last, part])
            if rows == 0 or due - now < together:
                return late
        self._add_prompts(steps, prompts, room)
        return None

    def _add_prompts(self, steps: list[Step], prompts: Sequence[int], budget: float) -> None:
        """Adds rows of prompts to a call, as many as keep it within `budget` seconds; at least one row where
        the budget is not used up, so that every prompt goes on."""
        if self._costs is None:
            self._add_whole(steps, prompts)
            return
        loads, taken = [load(step) for step in steps], 0
        for session in prompts:
            if len(steps) >= MAX_STEPS:
                return
            limit = min(self.chunk_rows - taken, self.max_rows - taken - len(loads))
            rows = self._most(self._front(session), loads, budget, limit)
            if not rows and not taken and budget > self._seconds(loads):
                rows = min(1, limit)
            if rows <= 0:
                return
            steps.append(self._pop(session, rows))
            loads.append(load(steps[-1]))
            taken += rows

    def _add_whole(self, steps: list[Step], prompts: Sequence[int]) -> None:
        """Adds Steps of prompts to a call without dividing them. The first Step of a call always goes: one
        that is too long for any batch must fail in the stage instead of waiting for ever."""
        rows = len(steps)
        taken = 0
        for session in prompts:
            count = len(self._front(session).tokens)
            fits = taken + count <= self.chunk_rows and rows + taken + count <= self.max_rows
            if not steps or (fits and len(steps) < MAX_STEPS):
                steps.append(self._pop(session))
                taken += count

    def _most(self, step: Step, loads: Sequence[Load], budget: float, limit: int) -> int:
        """The most rows of a Step, up to `limit`, with which a call of `loads` stays within the budget."""

        def fits(rows: int) -> bool:
            wants = step.want is Want.TOKEN and rows == len(step.tokens)
            return self._seconds([*loads, (rows, step.first, wants)]) <= budget

        low, high = 0, min(limit, len(step.tokens))
        if high > 0 and fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _seconds(self, loads: Sequence[Load]) -> float:
        return self._costs.seconds(loads) if self._costs is not None and loads else 0.0

    @property
    def _stretch(self) -> float:
        return LATER_STRETCH if self._later else STRETCH

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


def held_bytes(item: Item) -> int:
    """About what a queued message takes in memory: objects of Python, and the hidden rows."""
    if not isinstance(item, Step):
        return 512
    return 512 + 40 * len(item.tokens) + (0 if item.hidden is None else item.hidden.nbytes)


def _notice(item: Item) -> Open | Close:
    assert not isinstance(item, Step)
    return item
