"""The rows that a stage has sent on, kept to fill a stage behind it that has lost its keys and values."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .arrays import F32
from .kv import PagePool
from .layout import CHUNK, round_up

MOST_SHARE = 0.25
"""The most that rows take of the room of keys and values."""


@dataclass(slots=True)
class _Kept:
    """Rows of positions [0, positions) of a sequence, in blocks of CHUNK rows."""

    blocks: list[F32] = field(default_factory=list)
    positions: int = 0


class KeptRows:
    """Rows f32 `[cols]` by sequence, position, and the unit into which they go: the end of the stage's range
    when they were run. Their memory counts towards the limit of the pool of keys and values, which has them
    dropped first when it has no other room: those of the sequence that was run least recently, then the next.
    A sequence keeps its first positions without a gap, as far as there is room. Thread-safe."""

    def __init__(self, pool: PagePool, cols: int) -> None:
        self._pool, self._cols = pool, cols
        self._lock = threading.RLock()
        self._sequences: dict[int, dict[int, _Kept]] = {}
        """By sequence, in the order of their last run, and by unit."""
        self._noted: deque[tuple[int, int, int, F32, bool]] = deque()
        """What `settle` copies: the arguments of `note_later`."""
        self._noting: int | None = None
        self._block = round_up(CHUNK * cols * 4, mmap.PAGESIZE)
        self.bytes = 0
        """Bytes of memory that rows take."""

    def unlock(self) -> None:
        """Replaces the lock. Called in a forked process, where the thread that held it does not exist."""
        self._lock = threading.RLock()

    def note(self, sequence: int, unit: int, first: int, rows: F32, *, part: bool) -> None:
        """Keeps rows of positions from `first` on. What was kept from there on is replaced; a run of a
        `part` of the range computes the same rows again, so only those that are not there are added. The
        rows of other units are dropped, unless it was such a run."""
        self.settle()
        self._copy(sequence, unit, first, rows, part)

    def note_later(self, sequence: int, unit: int, first: int, rows: F32, *, part: bool) -> None:
        """Notes rows that nobody changes any more: they are copied by `settle`, or when kept rows are used
        next."""
        with self._lock:
            self._noted.append((sequence, unit, first, rows, part))

    def settle(self) -> None:
        """Copies the rows of `note_later`."""
        if not self._noted:
            return
        with self._lock:
            while self._noted:
                self._copy(*self._noted.popleft())

    def _copy(self, sequence: int, unit: int, first: int, rows: F32, part: bool) -> None:
        with self._lock:
            units = self._sequences.pop(sequence, {})
            self._sequences[sequence] = units  # the last one in order
            if not part:
                for other in units.keys() - {unit}:
                    self._cut(units.pop(other), 0)
            kept = units.setdefault(unit, _Kept())
            if not part:
                self._cut(kept, first)
            if first <= kept.positions < first + len(rows):
                self._noting = sequence
                try:
                    self._append(kept, rows[kept.positions - first :])
                finally:
                    self._noting = None

    def _append(self, kept: _Kept, rows: F32) -> None:
        while len(rows):
            block, at = divmod(kept.positions, CHUNK)
            if block == len(kept.blocks):
                new = self._new_block()
                if new is None:
                    return
                kept.blocks.append(new)
            n = min(CHUNK - at, len(rows))
            kept.blocks[block][at : at + n] = rows[:n]
            kept.positions, rows = kept.positions + n, rows[n:]

    @property
    def _allowed(self) -> bool:
        """Whether rows may take another block: they leave most of the room to copies of weights."""
        limit = self._pool.limit
        return limit is None or self.bytes + self._block <= limit * MOST_SHARE

    def _new_block(self) -> F32 | None:
        """Memory of its own, which returns to the system when it is dropped. None: there is no room."""
        while not (self._allowed and self._pool.claim(self._block)):
            if not self.drop_one():
                return None
        try:
            memory = mmap.mmap(-1, self._block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            self._pool.give_back(self._block)
            return None
        self.bytes += self._block
        return np.frombuffer(memory, np.float32, CHUNK * self._cols).reshape(CHUNK, self._cols)

    def positions(self, sequence: int, unit: int) -> int:
        """Number of positions, from the first, whose rows into this unit are kept."""
        self.settle()
        with self._lock:
            kept = self._sequences.get(sequence, {}).get(unit)
            return 0 if kept is None else kept.positions

    def rows(self, sequence: int, unit: int, first: int, last: int) -> F32:
        """A copy of the rows of positions [first, last), `[rows, cols]`. ValueError: they are not kept."""
        with self._lock:
            held = self.positions(sequence, unit)
            if not 0 <= first < last <= held:
                raise ValueError(
                    f"rows of positions [{first}, {last}) of sequence {sequence} are not kept: {held} are"
                )
            begin, end = first // CHUNK, -(-last // CHUNK)
            joined = np.concatenate(self._sequences[sequence][unit].blocks[begin:end])
            return joined[first - begin * CHUNK : last - begin * CHUNK]

    def truncate(self, sequence: int, positions: int) -> None:
        """Drops rows of positions from `positions` on."""
        self.settle()
        with self._lock:
            for kept in self._sequences.get(sequence, {}).values():
                self._cut(kept, positions)

    def forget(self, sequence: int) -> None:
        """Drops all rows of a sequence."""
        self.settle()
        self._forget(sequence)

    def _forget(self, sequence: int) -> None:
        with self._lock:
            for kept in self._sequences.pop(sequence, {}).values():
                self._cut(kept, 0)

    def keep(self, positions: Mapping[int, int]) -> None:
        """Truncates sequences to these positions, and forgets others."""
        self.settle()
        with self._lock:
            for sequence in list(self._sequences):
                if sequence in positions:
                    self.truncate(sequence, positions[sequence])
                else:
                    self.forget(sequence)

    def drop_one(self) -> bool:
        """Drops the rows of one sequence, to make room. False: there are none, or only of the one that is
        being kept."""
        with self._lock:
            for sequence, units in self._sequences.items():
                if sequence != self._noting and any(kept.blocks for kept in units.values()):
                    self._forget(sequence)
                    return True
            return False

    def _cut(self, kept: _Kept, positions: int) -> None:
        kept.positions = min(kept.positions, positions)
        while len(kept.blocks) > -(-kept.positions // CHUNK):
            kept.blocks.pop()
            self.bytes -= self._block
            self._pool.give_back(self._block)
