"""What waits at a stage, and what of it makes the next batch: a pure queue, one line per session.

Each session's messages keep their order. A batch takes at most one Step of each session, sessions in turn, so
that a long prompt delays other answers by one call and no more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .messages import Close, Epoch, Open, Step

Item = Open | Close | Step
MAX_STEPS = 32
"""Steps of a batch: each may want a row of logits, for which a stage has room 32 times by default."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What to do next: sessions that open or close, in order, then one call of the stage."""

    notices: tuple[Open | Close, ...]
    steps: tuple[Step, ...]


@dataclass(slots=True)
class Inbox:
    """Items of one epoch. `max_rows`: rows of a call; `chunk_rows`: prompt rows of a call; `limit`: items
    that may wait."""

    epoch: Epoch
    max_rows: int
    chunk_rows: int
    limit: int = 256
    _lines: dict[int, deque[Item]] = field(default_factory=dict)
    _items: int = 0

    @property
    def full(self) -> bool:
        """Take a batch before another item is put."""
        return self._items >= self.limit

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, item: Item) -> None:
        """Appends an item; one of another epoch is dropped. A Close drops the session's Steps that wait, and
        itself together with an Open that waits: nobody further down has heard of that session."""
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
        """Removes and returns the next batch; an empty one if nothing waits."""
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
        for session in served:  # to the end: their turn comes after the others'
            if session in self._lines:
                self._lines[session] = self._lines.pop(session)
        self._items -= len(steps) + len(notices)
        return Batch(tuple(notices), tuple(steps))

    def _fits(self, item: Item, steps: int, rows: int, prompt_rows: int) -> bool:
        """Whether a Step goes into a batch of `rows` rows. The first always goes: one that is too long for
        any batch must fail rather than wait for ever."""
        assert isinstance(item, Step)
        prompt = _prompt_rows(item)
        room = steps < MAX_STEPS and rows + len(item.tokens) <= self.max_rows
        return steps == 0 or (room and (prompt == 0 or prompt_rows + prompt <= self.chunk_rows))


def _notice(item: Item) -> Open | Close:
    assert not isinstance(item, Step)
    return item


def _prompt_rows(item: Item) -> int:
    return len(item.tokens) if isinstance(item, Step) and len(item.tokens) > 1 else 0
