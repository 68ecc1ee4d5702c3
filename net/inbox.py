"""The queue of messages at a stage, and the choice of the next batch. Nothing here does I/O or reads a clock.

Messages of one session stay in order. A batch has at most one Step of each session, taken round-robin, so
that a long prompt delays other answers by no more than one call. Times are in seconds of any clock that never
goes back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .messages import STEP_LIMIT, Close, Epoch, Open, Step

Item = Open | Close | Step
MAX_STEPS = 32
"""The most Steps in a batch. Each may want a logit row, and a stage has room for 32 by default."""
MAX_BYTES = 2 * STEP_LIMIT
"""The most bytes of queued messages, by `held_bytes`: two Steps of the largest size."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The next work of a stage: sessions to open and close, in order, then the Steps of one call."""

    notices: tuple[Open | Close, ...]
    steps: tuple[Step, ...]


@dataclass(slots=True)
class Inbox:
    """A queue for one epoch. `max_rows` and `chunk_rows` limit all rows and the prompt rows of a call.

    `put`, `take` and `ran` are told the time. What is queued is limited to MAX_BYTES, so that it has a fixed
    place in the memory that a node promises: while the inbox is `full`, its owner reads no connection."""

    epoch: Epoch
    max_rows: int
    chunk_rows: int
    _lines: dict[int, deque[Item]] = field(default_factory=dict)
    _bytes: int = 0

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
            if unheard:
                del self._lines[item.session]
                return
        self._bytes += held_bytes(item)
        line.append(item)

    def take(self, now: float) -> Batch | float | None:
        """Removes and returns the next batch; or the time at which to ask again, if waiting for more rows
        pays until then and none arrive before; or None, if nothing is queued."""
        if not self._lines:
            return None
        notices: list[Open | Close] = []
        steps: list[Step] = []
        served: list[int] = []
        rows = prompt_rows = 0
        for session in list(self._lines):
            line = self._lines[session]
            while line and not isinstance(line[0], Step):
                notices.append(_notice(line.popleft()))
            if line and self._fits(line[0], len(steps), rows, prompt_rows):
                step = line.popleft()
                assert isinstance(step, Step)
                steps.append(step)
                rows += len(step.tokens)
                prompt_rows += _prompt_rows(step)
                served.append(session)
            if not line:
                del self._lines[session]
        for session in served:  # moved behind the others, for the round-robin
            if session in self._lines:
                self._lines[session] = self._lines.pop(session)
        self._bytes -= sum(map(held_bytes, (*notices, *steps)))
        return Batch(tuple(notices), tuple(steps))

    def ran(self, batch: Batch, start: float, end: float) -> None:
        """Learns from a batch that was taken, whose call began and ended at these times."""

    def _fits(self, item: Item, steps: int, rows: int, prompt_rows: int) -> bool:
        """Whether a Step fits into a batch that has `steps` Steps with `rows` rows. The first Step always
        does: one that is too long for any batch must fail in the stage instead of waiting for ever."""
        assert isinstance(item, Step)
        prompt = _prompt_rows(item)
        room = steps < MAX_STEPS and rows + len(item.tokens) <= self.max_rows
        return steps == 0 or (room and (prompt == 0 or prompt_rows + prompt <= self.chunk_rows))


def held_bytes(item: Item) -> int:
    """About what a queued message takes in memory: objects of Python, and the hidden rows."""
    if not isinstance(item, Step):
        return 512
    return 512 + 40 * len(item.tokens) + (0 if item.hidden is None else item.hidden.nbytes)


def _notice(item: Item) -> Open | Close:
    assert not isinstance(item, Step)
    return item


def _prompt_rows(item: Item) -> int:
    return len(item.tokens) if isinstance(item, Step) and len(item.tokens) > 1 else 0
