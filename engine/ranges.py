"""The units that a stage has in memory: those that run, those that are prepared beside them, and others that
are loaded ahead or held as copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .backends import open_backend
from .copies import Copies
from .kv import PagePool
from .model_directory import Model
from .prepared import PreparedRange
from .weights import WeightStore

if TYPE_CHECKING:
    from .stage import StageOptions


class Ranges:
    """The running range of a stage, and what can become it. Loading does not wait for runs, and a change of
    the running range does not wait for another thread that loads. `check` is called before units are
    loaded, and may refuse that."""

    def __init__(
        self,
        model: Model,
        first: int,
        last: int,
        options: StageOptions,
        threads: int,
        pool: PagePool,
        check: Callable[[], None],
    ) -> None:
        """Errors as for Stage."""
        self._options, self._threads, self._pool, self._check = options, threads, pool, check
        self.weights = WeightStore(model, options.resident)
        self.weights.load(first, last)
        self.copies = Copies(model, pool)
        self.backend = open_backend(options.backend, options.isa, threads)
        self.running = PreparedRange(self.weights, first, last, options, self.backend, pool)
        self.prepared: list[PreparedRange] = []
        self._ahead: frozenset[int] = frozenset()
        """Units that were loaded ahead since the last change."""
        self._lock = threading.Lock()
        """Held while units are loaded or unloaded."""
        self._crowded = False
        """Whether units are loaded that may not be needed."""

    def load(self, first: int, last: int) -> None:
        """See Stage.load."""
        with self._loading():
            self.weights.load(first, last)
            self._ahead |= frozenset(range(first, last))

    def hold(self, units: Sequence[int]) -> None:
        """See Stage.hold."""
        with self._loading():
            before = self.copies.units
            self.copies.cover(self._needed())
            self.copies.choose(units)
            try:
                for missing in _contiguous(set(self.copies.units) - self.weights.units):
                    self.weights.load(missing.start, missing.stop)
            except BaseException:
                self.copies.choose(before)
                raise

    def prepare(self, first: int, last: int, kv_bytes: int | None) -> PreparedRange:
        """See Stage.prepare."""
        with self._loading():
            before = self._pool.limit
            try:
                self.copies.cover({*self._needed(), *range(first, last)})
                if kv_bytes is not None:
                    self._pool.limit = kv_bytes
                self.weights.load(first, last)
                new = PreparedRange(self.weights, first, last, self._options, self.backend, self._pool)
            except BaseException:
                self._pool.limit = before
                raise
            self.prepared.append(new)
            return new

    def leave(self, first: int, last: int) -> None:
        """See Stage.leave. Nothing runs."""
        self._ahead = self.weights.units.intersection(range(first, last))
        self.running.close()

    def switch(self, new: PreparedRange) -> PreparedRange:
        """Makes a prepared range the running one; returns the one before, to be closed. `unload` follows."""
        old, self.running = self.running, new
        self.prepared.remove(new)
        self._ahead = frozenset()
        return old

    def unload(self) -> None:
        """Unloads units that nothing needs: at once, or, while another thread loads, when that ends."""
        self._crowded = True
        while self._crowded and self._lock.acquire(blocking=False):
            try:
                self._crowded = False
                needed = self._needed()
                self.copies.cover(needed)
                self.weights.keep(needed.union(self.copies.units))
            finally:
                self._lock.release()

    def restart(self) -> None:
        """Goes on in a forked process, with new locks, threads and executors."""
        self._lock = threading.Lock()
        self.weights.unlock()
        self.copies.unlock()
        self.backend = open_backend(self._options.backend, self._options.isa, self._threads)
        for used in (self.running, *self.prepared):
            used.restart(self.backend)

    def close(self, end: Callable[[], None]) -> None:
        """Waits until nothing is loaded, and calls `end`."""
        with self._lock:
            end()

    def free(self) -> None:
        """Frees all executors, threads and weights. Called by `end`."""
        for used in (self.running, *self.prepared):
            used.close()
        self.backend.close()
        self.prepared = []
        self.copies.choose(())
        self.weights.keep(())

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """One thread at a time loads. After an error those units are unloaded that are not needed."""
        self._check()  # a forked process gets a new lock
        try:
            with self._lock:
                self._check()
                yield
        finally:
            self.unload()

    def _needed(self) -> set[int]:
        """The units that can run, are prepared, or are loaded ahead."""
        needed = set(self._ahead)
        for used in (*self.prepared, self.running):  # in this order: `switch` moves one to the end
            if not used.closed:
                needed.update(range(used.first, used.last))
        return needed


def _contiguous(units: set[int]) -> list[range]:
    """The units as ranges, in order."""
    found: list[range] = []
    for u in sorted(units):
        if found and found[-1].stop == u:
            found[-1] = range(found[-1].start, u + 1)
        else:
            found.append(range(u, u + 1))
    return found
