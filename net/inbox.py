"""The queue of messages at a stage, and the choice of the next batch. Nothing here does I/O.

Messages of one session stay in order. A batch has at most one Step of each session, taken round-robin, so
that a long prompt delays other answers by no more than one call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .messages import Close, Epoch, Open, Step

Item = Open | Close | Step
MAX_STEPS = 32
"""The most Steps in a batch. Each may want a logit row, and a stage has room for 32 by default."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The next work of a stage: sessions to open and close, in order, then the Steps of one call."""

    notices: tuple[Open | Close, ...]
    steps: tuple[Step, ...]


@dataclass(slots=True)
class Inbox:
    """A queue for one epoch. `max_rows` and `chunk_rows` limit all rows and the prompt rows of a call,
    `limit` the number of queued items."""

    epoch: Epoch
    max_rows: int
    chunk_rows: int
    limit: int = 256
    _lines: dict[int, deque[Item]] = field(default_factory=dict)
    _items: int = 0

    @property
    def full(self) -> bool:
        """Whether a batch must be taken before the next item is put."""
        return self._items >= self.limit

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, item: Item) -> None:
        """Appends an item; drops it if it is of another epoch. A Close drops the queued Steps of its session.
        If the session's Open is still queued, both are dropped, since the rest of the chain does not know the
        session."""
        if item.epoch != self.epoch:
            return
        line = self._lines.setdefault(item.session, deque())
        if isinstance(item, Close):
            unheard = any(isinstance(waiting, Open) for waiting in line)
            self._items -= len(line)
            line.clear()
            if unheard:
                del self._lines[item.session]
                return
        self._items += 1
        line.append(item)

    def take(self) -> Batch:
        """Removes and returns the next batch, which is empty if nothing is queued."""
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
        self._items -= len(steps) + len(notices)
        return Batch(tuple(notices), tuple(steps))

    def _fits(self, item: Item, steps: int, rows: int, prompt_rows: int) -> bool:
        """Whether a Step fits into a batch that has `steps` Steps with `rows` rows. The first Step always
        does: one that is too long for any batch must fail in the stage instead of waiting for ever."""
        assert isinstance(item, Step)
        prompt = _prompt_rows(item)
        room = steps < MAX_STEPS and rows + len(item.tokens) <= self.max_rows
        return steps == 0 or (room and (prompt == 0 or prompt_rows + prompt <= self.chunk_rows))


def _notice(item: Item) -> Open | Close:
    assert not isinstance(item, Step)
    return item


def _prompt_rows(item: Item) -> int:
    return len(item.tokens) if isinstance(item, Step) and len(item.tokens) > 1 else 0
