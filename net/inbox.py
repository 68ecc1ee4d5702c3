"""The queue of messages at a stage, and the choice of the next batch. Nothing here does I/O or reads a clock.

Messages of one session stay in order. A batch has at most one Step of each session:

- Rows of sequences that decode and were computed together on the previous stage stay together (`Step.more`),
  with others that wait as well, up to the rows of a group. On the first stage, rows of sequences of one group
  go together (net/scheduler.py).
- Rows of sequences that decode go before rows of prompts. Prompts take turns. While they wait, all sequences
  that decode are one group: each group would read all weights once more in every lap.
- While sequences decode, Steps of prompts are divided into slices. A slice goes with rows of sequences that
  decode, or fills the time until the next of them is due: as many rows as let no sequence take STRETCH times
  as long from token to token as without prompts, and no fewer than a call is worth. Stages do so one by one.

Times are in seconds of any clock that never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from ..engine.batch import Want
from ..planner.groups import Grouping
from ..planner.rows import MOST_ROWS
from .errors import RemoteProtocolError
from .messages import MOST_SESSIONS, MOST_WANTED, STEP_LIMIT, Close, Epoch, Open, Step
from .sampling_updates import Notice, UpdateReceiver
from .scheduler import Costs, Expect, Load, Streams
from .tags import counted

Item = Open | Close | Step
MAX_STEPS = MOST_WANTED
"""The most Steps in a batch. Each may want a logit row."""
MOST_TOLD = 2 * MOST_SESSIONS
"""The most sessions of which the coordinator tells the last stage something."""
MAX_BYTES = 2 * STEP_LIMIT
"""The most bytes of queued messages, by `held_bytes`: two Steps of the largest size."""
ENOUGH_BYTES = MAX_BYTES - STEP_LIMIT
"""The most bytes of queued messages to which another may be added."""
ENOUGH_STEPS = 3
"""How many Steps of the most rows are enough where they have fewer bytes: work for three calls."""
STRETCH = 1.8
"""How many times as long as without prompts a sequence may take from token to token beside them."""
LEAST_STRETCH, BUSY_STRETCH = 1.3, 0.7
"""How many times as long as alone a call of sequences that decode may always take with rows of prompts: more
by the share of the time in which such calls keep the stage busy, since what is left are slices without them.
It does not depend on how late the sequences are: a stage that gave way to the delays of another one would
make calls of few rows, which cost nearly as much as those of many, and all would be later still."""
WORTH = 1.3
"""How many times as long as a row alone a slice without sequences that decode must take at least, if one of
them is due: a smaller one reads all weights for little."""
MOST_JOINED = 64
"""The most rows to which parts of a prompt that wait are joined."""
WHOLE_SECONDS = 1.0
"""How long rows wait for the next row of their call on the previous stage, which is on its way. A slow link
brings one after another."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The next work of a stage: sessions to open and close, in order, then the Steps of one call."""

    notices: tuple[Open | Close, ...]
    steps: tuple[Step, ...]


@dataclass(slots=True)
class _Call:
    """Sessions that decode whose rows the previous stage has computed together, and when the latest arrived.
    `whole`: the last of them has arrived."""

    decoding: list[int] = field(default_factory=list)
    latest: float = 0.0
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
    last: bool = True
    """Whether the stage draws tokens, and so waits for what the coordinator tells it."""
    _told: dict[int, UpdateReceiver] = field(default_factory=dict)
    """By session."""
    _waiting: dict[int, deque[Item]] = field(default_factory=dict)
    """By session, a Step for which the stage has not been told enough, and what follows it."""
    _lines: dict[int, deque[Item]] = field(default_factory=dict)
    _bytes: int = 0
    _heard: deque[Open | Close] = field(default_factory=deque)
    """Opens and Closes that are queued, in the order of their arrival: an Open may name a session as its
    source that is closed right after it."""
    _streams: Streams = field(init=False)
    _costs: Costs | None = field(init=False)
    _decoding: set[int] = field(default_factory=set)
    """Sessions whose first queued item is the row of a sequence that decodes."""
    _calls: deque[_Call] = field(default_factory=deque)
    """Calls of the previous stage that wait. The last one may not be whole."""
    _last: list[Load] = field(default_factory=list)
    """The rows of sequences that decode of the last call that had any."""
    _pressed: float = -math.inf
    """When rows of prompts were last computed, or waited."""

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
        """Appends an item; drops it if it is of another epoch. A Close drops what is queued of
        its session. It is passed on itself, since the stages may know the session from an earlier epoch. A
        Step of whose draws the last stage has not been told enough, and what follows it, is appended when it
        has (`tell`)."""
        if item.epoch != self.epoch:
            return
        if isinstance(item, Close):
            self._bytes -= sum(map(held_bytes, self._waiting.pop(item.session, ())))
            self._append(item, now)
        elif item.session in self._waiting:
            self._waiting[item.session].append(item)
            self._bytes += held_bytes(item)
        elif isinstance(item, Step) and item.told and self.last:
            self._put_told(item, now)
        else:
            self._append(item, now)

    def tell(self, notice: Notice, now: float) -> None:
        """Takes what the coordinator tells of a session. RemoteProtocolError: it does not follow what it has
        told before, or is of too many sessions."""
        if notice.epoch != self.epoch:
            return
        if isinstance(notice, Close):
            self._told.pop(notice.session, None)
            return
        if notice.session not in self._told and len(self._told) >= MOST_TOLD:
            raise RemoteProtocolError(f"the coordinator told of more than {MOST_TOLD} sessions")
        self._told.setdefault(notice.session, UpdateReceiver()).hear(notice)
        waiting = self._waiting.pop(notice.session, deque())
        self._bytes -= sum(map(held_bytes, waiting))
        for item in waiting:
            self.put(item, now)

    def _put_told(self, step: Step, now: float) -> None:
        """Appends a Step once the stage has been told enough."""
        told = self._told.get(step.session)
        if told is not None and told.number >= step.told:
            self._append(replace(step, draw=told.draw(step)), now)
            return
        if decodes(step) and step.hidden is not None:
            self._join_call(step, False, now)  # the others of its call do not wait for it
        self._waiting[step.session] = deque([replace(step, more=False)])
        self._bytes += held_bytes(step)

    def _append(self, item: Item, now: float) -> None:
        line = self._lines.setdefault(item.session, deque())
        if isinstance(item, Close):
            self._bytes -= sum(map(held_bytes, line))
            line.clear()
            self._heard = deque(other for other in self._heard if other.session != item.session)
            self._forget(item.session)
        elif isinstance(item, Step):
            row = decodes(item) and not any(isinstance(waiting, Step) for waiting in line)
            if row:
                self._decoding.add(item.session)
                self._streams.arrived(item.session, now)
            if decodes(item) and item.hidden is not None:
                self._join_call(item, row, now)
        if not isinstance(item, Step):
            self._heard.append(item)
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
        chosen = self._chosen(now, pressed=bool(prompts) and self._divides)
        steps: list[Step] = []
        if isinstance(chosen, _Call):
            sessions = chosen.decoding[: min(MAX_STEPS, self.max_rows)]
            self._streams.taken(sessions)
            steps = [self._pop(session) for session in sessions]
            self._last = [load(step) for step in steps]
            self._leave_calls(sessions)
            if prompts:
                usual = self._seconds(self._last)
                end = self._streams.deadline(STRETCH, now, sessions)
                least = self._least(usual)
                room = least if end is None else max(end - now, least)
                self._add(steps, prompts, room)
        elif prompts and (chosen is None or self._divides):
            times = [time for time in (chosen, self._alone(steps, prompts, now)) if time is not None]
            chosen = min(times, default=None)
        if steps or notices:
            return Batch(tuple(notices), tuple(steps))
        assert not isinstance(chosen, _Call), "a call has rows"
        return chosen

    def ran(self, batch: Batch, start: float, end: float, rest: float = 0.0) -> None:
        """Learns from a batch that was taken, whose call began and ended at these times, and after which the
        stage takes no other for `rest` seconds."""
        if not batch.steps:
            return
        if self._costs is not None:
            self._costs.ran([load(step) for step in batch.steps], end - start + rest)
        decoding = [step.session for step in batch.steps if decodes(step)]
        if len(decoding) < len(batch.steps) or len(self._lines) > len(self._decoding):
            self._pressed = end
        self._streams.ran(decoding, end, self._pressed)

    # Rows of sequences that decode.

    def _join_call(self, step: Step, row: bool, now: float) -> None:
        """Adds a row to the call of the previous stage that it was a part of. Without `row`, it is not the
        next one of its session, and only says whether more of the call follow."""
        if not self._calls or self._calls[-1].whole:
            self._calls.append(_Call())
        call = self._calls[-1]
        if row:
            call.decoding.append(step.session)
        call.latest, call.whole = now, not step.more
        if call.whole and not call.decoding:
            self._calls.pop()

    def _chosen(self, now: float, *, pressed: bool) -> _Call | float | None:
        """The next call of sequences that decode; or the time until which to wait for more of them; or None
        if none of their rows waits. `pressed`: rows of prompts wait, so that all sequences are one group."""
        if not self._decoding:
            return None
        if self._calls and self._calls[0].decoding:
            call = self._calls[0]
            end = call.latest + WHOLE_SECONDS
            if not call.whole and now < end:
                return end
            call.whole = True
            self._merge(pressed)
            return call
        if pressed:
            found = self._streams.together(now, STRETCH, self._seconds(self._last))
        else:
            found = self._streams.choose(now)
        return _Call(found) if isinstance(found, list) else found

    def _merge(self, pressed: bool) -> None:
        """Joins calls that wait, as long as they are not more than a group: sequences whose laps end at
        different times meet where they wait for each other, at the busiest stage. `pressed` as in
        `_chosen`."""
        grouping = self._streams.grouping
        if grouping is None:
            return
        groups = 1 if pressed else grouping.groups
        call, most = self._calls.popleft(), -(-len(self._streams) // groups)
        while self._calls and len(call.decoding) + len(self._calls[0].decoding) <= most:
            if not self._calls[0].whole:
                break
            other = self._calls.popleft()
            call.decoding += other.decoding
        self._calls.appendleft(call)

    def _leave_calls(self, sessions: Iterable[int]) -> None:
        """Removes sessions from the calls of the previous stage, and calls without any."""
        gone = set(sessions)
        for call in self._calls:
            call.decoding = [session for session in call.decoding if session not in gone]
        self._calls = deque(call for call in self._calls if call.decoding or not call.whole)

    # Rows of prompts.

    def _alone(self, steps: list[Step], prompts: Sequence[int], now: float) -> float | None:
        """Adds rows of prompts to a call without others; or adds none, and returns the time until which to
        wait for rows of a sequence that decodes, because more rows of prompts can go with them."""
        if not self._divides:
            self._add(steps, prompts, math.inf)
            return None
        self._join_parts(prompts[0])
        usual, front = self._seconds(self._last), self._front(prompts[0])
        end = self._streams.deadline(STRETCH, now)
        room = STRETCH * usual if end is None else end - now - usual
        due = self._streams.due(now)
        if due is not None:
            with_them = room + usual - max(0.0, due[0] - now)
            rows = self._most(front, [], room)
            if rows < self._most(front, self._last, with_them):
                return due[1]
            one, some = (self._seconds([(count, front.first, False)]) for count in (1, rows))
            # Where none can go with them either, waiting for them would have no end.
            waits = self._most(front, self._last, max(with_them, self._least(usual))) > 0
            if waits and rows < front.rows and some < WORTH * one:
                return due[1]
        self._add(steps, prompts, room)
        return None

    def _add(self, steps: list[Step], prompts: Sequence[int], room: float) -> None:
        """Adds rows of prompts to a call, whose Steps then take at most `room` seconds while sequences
        decode. The first Step of a call always goes: one that is too long for any batch must fail in the
        stage instead of waiting for ever."""
        loads = [load(step) for step in steps]
        taken, before = 0, len(steps)
        wanted = sum(map(_wanted, steps))
        for session in prompts:
            if self._divides:
                self._join_parts(session)
            front = self._front(session)
            rows = count = front.rows
            if self._divides:
                limit = min(self._slice(front.first), self.chunk_rows, self.max_rows - before)
                rows = self._most(front, loads, room, limit - taken)
                if not rows and not steps:
                    rows = 1
            if front.want.every_row:
                rows = min(rows, MOST_WANTED - wanted)
            more = rows if front.want.every_row else int(front.want is Want.TOKEN and rows == count)
            fits = taken + rows <= self.chunk_rows and before + taken + rows <= self.max_rows
            fits = fits and wanted + more <= MOST_WANTED
            if rows and (not steps or (fits and len(steps) < MAX_STEPS)):
                steps.append(self._pop(session, rows))
                loads.append(load(steps[-1]))
                taken += rows
                wanted += _wanted(steps[-1])
            if rows < count:
                return  # there is no room for more

    @property
    def _divides(self) -> bool:
        """Whether Steps of prompts are divided: sequences decode, and the costs of calls are known."""
        return self._costs is not None and len(self._streams) > 0

    def _least(self, usual: float) -> float:
        """The seconds that a call of sequences that decode, `usual` alone, may always take with prompts."""
        return (LEAST_STRETCH + BUSY_STRETCH * self._streams.share(usual)) * usual

    def _slice(self, position: int) -> int:
        """The most rows of prompts from that position on in a call."""
        grouping = self._streams.grouping
        return MOST_ROWS if grouping is None else grouping.slice(position)

    def _most(self, step: Step, loads: Sequence[Load], room: float, limit: int = MOST_ROWS) -> int:
        """The most rows of a Step, up to `limit`, with which a call of `loads` takes at most `room` s."""

        def fits(rows: int) -> bool:
            wants = step.want.every_row or (step.want is Want.TOKEN and rows == step.rows)
            return self._seconds([*loads, (rows, step.first, wants)]) <= room

        low, high = 0, min(limit, step.rows)
        if high > 0 and fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _seconds(self, loads: Sequence[Load]) -> float:
        """The expected seconds of a call; 0 if no costs are known."""
        return self._costs.seconds(loads) if self._costs is not None and loads else 0.0

    # The lines of the sessions.

    def _notices(self) -> list[Open | Close]:
        """Removes the Opens and Closes that are first in their lines, in the order of their arrival."""
        notices, later = list[Open | Close](), deque[Open | Close]()
        for notice in self._heard:
            line = self._lines[notice.session]
            if line[0] is not notice:  # behind rows of a session that goes on from an earlier epoch
                later.append(notice)
                continue
            line.popleft()
            notices.append(notice)
            if not line:
                del self._lines[notice.session]
        self._bytes -= sum(map(held_bytes, notices))
        self._heard = later
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
        if rows is not None and rows < step.rows:
            step, rest = _divided(step, rows)
            line.appendleft(rest)
            self._bytes += held_bytes(rest)
        if line:
            self._lines[session] = line
        self._decoding.discard(session)
        return step

    def _join_parts(self, session: int) -> None:
        """Joins the first Steps of a prompt that follow each other, since they may be parts of divided ones,
        up to MOST_JOINED rows."""
        line = self._lines[session]
        joined = [self._front(session)]
        rows = joined[0].rows
        for item in islice(line, 1, None):
            last = joined[-1]
            if not isinstance(item, Step) or item.first != last.first + last.rows:
                break
            if item.part != last.part or item.want.every_row:
                break
            rows += item.rows
            if rows > MOST_JOINED or last.want is not Want.NOTHING:
                break
            joined.append(item)
        if len(joined) == 1:
            return
        for _ in joined:
            line.popleft()
        hidden = [step.hidden for step in joined if step.hidden is not None]
        whole = replace(
            joined[-1],
            first=joined[0].first,
            tokens=tuple(chain.from_iterable(step.tokens for step in joined)),
            hidden=np.concatenate(hidden) if hidden else None,
            tags=tuple(chain.from_iterable(step.tags for step in joined)),
        )
        line.appendleft(whole)
        self._bytes += held_bytes(whole) - sum(map(held_bytes, joined))

    def _forget(self, session: int) -> None:
        self._decoding.discard(session)
        self._streams.forget(session)
        self._leave_calls([session])


def load(step: Step) -> Load:
    """A Step as costs see it."""
    return step.rows, step.first, step.want is not Want.NOTHING


def _wanted(step: Step) -> int:
    """The rows of whose logits, or of which themselves, something is wanted."""
    return step.rows if step.want.every_row else int(step.want is Want.TOKEN)


def decodes(step: Step) -> bool:
    """Whether a Step is the row of a sequence that decodes."""
    return step.rows == 1 and step.want is Want.TOKEN


def _divided(step: Step, rows: int) -> tuple[Step, Step]:
    """The first rows of a Step, which want nothing unless each row does, and the rest."""
    hidden, tags = step.hidden, counted(step.first, step.first + rows)
    front = replace(
        step,
        tokens=step.tokens[:rows],
        hidden=None if hidden is None else hidden[:rows],
        tags=step.tags[:tags],
    )
    if not step.want.every_row:
        front = replace(front, want=Want.NOTHING, report=None, told=0, masked=False, draw=None)
    rest = replace(
        step,
        first=step.first + rows,
        tokens=step.tokens[rows:],
        hidden=None if hidden is None else hidden[rows:],
        tags=step.tags[tags:],
    )
    return front, rest


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
    draw = 0 if item.draw is None else item.draw.nbytes
    return draw + step_bytes(item.rows, 0 if item.hidden is None else item.hidden.shape[1])
