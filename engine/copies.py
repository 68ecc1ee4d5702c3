"""Copies of the weights of units that a stage does not run, so that they can move to it at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from .kv import PagePool
from .model_directory import Model


class Copies:
    """Which units a stage keeps copies of, in order of preference. Their bytes count towards the limit of the
    pool of keys and values, unless the units are `covered`: run, or prepared, so that somebody else counts
    them. Thread-safe."""

    def __init__(self, model: Model, pool: PagePool) -> None:
        self._model, self._pool = model, pool
        self._lock = threading.Lock()
        self._covered: frozenset[int] = frozenset()
        self._claimed = 0
        self.units: tuple[int, ...] = ()

    def unlock(self) -> None:
        """Replaces the lock. Called in a forked process, where the thread that held it does not exist."""
        self._lock = threading.Lock()

    def choose(self, wanted: Iterable[int]) -> None:
        """Keeps those of the wanted units for which the pool has room, and no others."""
        wanted = tuple(dict.fromkeys(wanted))
        with self._lock:
            self._set(u for u in wanted if u in self.units)
            for u in wanted:
                if u not in self.units:
                    self._set((*self.units, u))
            self.units = tuple(u for u in wanted if u in self.units)

    def cover(self, covered: Iterable[int]) -> None:
        """Changes the covered units. Copies that were covered, and for which there is no room now, go."""
        with self._lock:
            self._covered = frozenset(covered)
            while not self._set(self.units):
                self.units = self.units[:-1]

    def drop_one(self) -> bool:
        """Drops copies, the last in order first, until room is made. False: none takes any."""
        with self._lock:
            before = self._claimed
            while self._claimed == before and self.units:
                self._set(self.units[:-1])
            return self._claimed < before

    def _set(self, units: Iterable[int]) -> bool:
        """Keeps these units. False: there is no room for them, and nothing has changed."""
        units = tuple(units)
        files = self._files({*units} | self._covered) - self._files(self._covered)
        size = sum(self._model.index.files[name].size for name in files)
        if size > self._claimed and not self._pool.claim(size - self._claimed, free=True):
            return False
        self._pool.give_back(max(0, self._claimed - size))
        self.units, self._claimed = units, size
        return True

    def _files(self, units: Iterable[int]) -> set[str]:
        return {name for u in units for name in self._model.index.units[u].files}
