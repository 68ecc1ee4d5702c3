"""A range of units that is ready to run: bound to its weights, with executors for all of it and for parts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .backends.base import Backend, BoundProgram, Executor, WeightData
from .errors import ContextError
from .kv import PagePool
from .model_directory import Model
from .weights import WeightStore

if TYPE_CHECKING:
    from .stage import StageOptions

_PART_RUNS = 64
"""After how many runs of the whole range executors of parts are freed: the units have been filled."""
_MOST_PARTS = 2
"""Executors of parts that a range keeps: those of one refill. Each has a workspace."""


class PreparedRange:
    """Units [first, last) of a stage with an executor. Made by `Stage.prepare`, used by `Stage.adopt`."""

    def __init__(
        self,
        weights: WeightStore,
        first: int,
        last: int,
        options: StageOptions,
        backend: Backend,
        pool: PagePool,
    ) -> None:
        """`pool` counts the memory of executors of parts. KeyError: a unit is not loaded. ShoalError: out of
        memory."""
        self.first, self.last = first, last
        self.bound = bind(weights, first, last, options)
        self.executor = backend.executor(self.bound)
        self._model, self._options, self._backend, self._pool = weights.model, options, backend, pool
        self._parts: dict[tuple[int, int], tuple[BoundProgram, Executor, int]] = {}
        self._current: tuple[int, int] | None = None
        """The part that `part` was asked for last, which may run now; None: the whole range."""
        self._lock = threading.RLock()
        """Held while parts are made and dropped: another thread may need their room."""
        self._whole = 0
        """Runs of the whole range since the last one of a part."""

    def part(self, enter: int, until: int) -> tuple[BoundProgram, Executor]:
        """The bound program and the executor to run units [enter, until) of the range with. ContextError: no
        room for its workspace. ShoalError: out of memory."""
        with self._lock:
            if (enter, until) == (self.first, self.last):
                self._whole, self._current = self._whole + 1, None
                if self._parts and self._whole > _PART_RUNS:
                    self._close_parts(0)
                return self.bound, self.executor
            self._whole, self._current = 0, (enter, until)
            found = self._parts.pop((enter, until), None) or self._new_part(enter, until)
            self._parts[enter, until] = found  # the last one in order is the one that was used last
            return found[:2]

    @property
    def has_parts(self) -> bool:
        """Whether there are executors of parts, which count the runs of the whole range."""
        return bool(self._parts)

    def drop_part(self) -> bool:
        """Frees the executor of a part that does not run. In any thread. False: there is none."""
        with self._lock:
            part = next((part for part in self._parts if part != self._current), None)
            if part is not None:
                self._close_part(part)
            return part is not None

    def _new_part(self, enter: int, until: int) -> tuple[BoundProgram, Executor, int]:
        self._close_parts(_MOST_PARTS - 1)
        held = self.bound.weights.items()
        weights = {key: w for key, w in held if key[0] == -1 or enter <= key[0] < until}
        bound = _bound(self._model, enter, until, self._options, weights)
        executor = self._backend.executor(bound)
        size = getattr(executor, "workspace_bytes", 0)
        while not self._pool.claim(size, free=True):
            if self._pool.spare is None or not self._pool.spare():
                executor.close()
                raise ContextError("no room to compute a part of the layers: end another request")
        return bound, executor, size

    def _close_parts(self, most: int) -> None:
        """Frees executors of parts, the one first that was used least recently, but for so many."""
        while len(self._parts) > most:
            self._close_part(next(iter(self._parts)))

    def _close_part(self, part: tuple[int, int]) -> None:
        _, executor, size = self._parts.pop(part)
        executor.close()
        self._pool.give_back(size)

    def restart(self, backend: Backend) -> None:
        """Makes a new executor, with this backend. Called in a forked process, which has no threads of the
        old one."""
        if self.closed:
            return
        for _, _, size in self._parts.values():
            self._pool.give_back(size)
        self._backend, self._parts, self._lock = backend, {}, threading.RLock()
        self.executor = backend.executor(self.bound)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not hasattr(self, "executor")

    def close(self) -> None:
        """Frees the workspaces, and drops the references to weights."""
        if self.closed:
            return
        with self._lock:
            self._close_parts(0)
        self.executor.close()
        del self.executor, self.bound


def bind(weights: WeightStore, first: int, last: int, options: StageOptions) -> BoundProgram:
    """Binds the ops of units [first, last) to their weights. KeyError: a unit is not loaded."""
    held = weights.of(first, last) | weights.constants()
    return _bound(weights.model, first, last, options, held)


def _bound(
    model: Model, first: int, last: int, options: StageOptions, weights: dict[tuple[int, str], WeightData]
) -> BoundProgram:
    """The program of units [first, last) with their weights. The constants of unit -1, which the ops before
    the first unit read, are left out where there are no such ops."""
    ops = tuple(model.program.ops(first, last))
    prologue = any(unit == -1 for unit, _ in ops)
    return BoundProgram(
        program=model.program,
        ops=ops,
        weights={key: w for key, w in weights.items() if prologue or key[0] != -1},
        states=tuple((u, state) for u in range(first, last) for state in model.program.units[u].states),
        kv_type=model.kv_dtype,
        reads_tokens=first == 0,
        last=last == model.n_units,
        max_rows=options.max_rows,
        max_wanted=min(options.max_rows, options.max_wanted),
    )
