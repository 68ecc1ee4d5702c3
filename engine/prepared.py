"""A range of units that is ready to run: bound to its weights, with executors for all of it and for parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .backends.base import Backend, BoundProgram, Executor, WeightData
from .model_directory import Model
from .weights import WeightStore

if TYPE_CHECKING:
    from .stage import StageOptions

_MOST_PARTS = 2
"""Executors of parts that a range keeps: those of one refill. Each has a workspace."""


class PreparedRange:
    """Units [first, last) of a stage with an executor. Made by `Stage.prepare`, used by `Stage.adopt`."""

    def __init__(
        self, weights: WeightStore, first: int, last: int, options: StageOptions, backend: Backend
    ) -> None:
        """KeyError: a unit is not loaded. ShoalError: out of memory."""
        self.first, self.last = first, last
        self.bound = bind(weights, first, last, options)
        self.executor = backend.executor(self.bound)
        self._model, self._options, self._backend = weights.model, options, backend
        self._parts: dict[tuple[int, int], tuple[BoundProgram, Executor]] = {}

    def part(self, enter: int, until: int) -> tuple[BoundProgram, Executor]:
        """The bound program and the executor of units [enter, until) of the range. ShoalError: out of
        memory."""
        if (enter, until) == (self.first, self.last):
            return self.bound, self.executor
        found = self._parts.pop((enter, until), None)
        if found is None:
            while len(self._parts) >= _MOST_PARTS:
                self._parts.pop(next(iter(self._parts)))[1].close()
            held = self.bound.weights.items()
            weights = {key: w for key, w in held if key[0] == -1 or enter <= key[0] < until}
            bound = _bound(self._model, enter, until, self._options, weights)
            found = bound, self._backend.executor(bound)
        self._parts[enter, until] = found  # the last one in order is the one that was used last
        return found

    def restart(self, backend: Backend) -> None:
        """Makes a new executor, with this backend. Called in a forked process, which has no threads of the
        old one."""
        self._backend, self._parts = backend, {}
        self.executor = backend.executor(self.bound)

    def close(self) -> None:
        """Frees the workspaces, and drops the references to weights."""
        for _, executor in self._parts.values():
            executor.close()
        self._parts = {}
        self.executor.close()
        del self.executor, self.bound


def bind(weights: WeightStore, first: int, last: int, options: StageOptions) -> BoundProgram:
    """Binds the ops of units [first, last) to their weights. KeyError: a unit is not loaded."""
    held = weights.of(first, last) | weights.constants()
    return _bound(weights.model, first, last, options, held)


def _bound(
    model: Model, first: int, last: int, options: StageOptions, weights: dict[tuple[int, str], WeightData]
) -> BoundProgram:
    """`weights` has those of the units, and the constants with unit -1, which are left out unless they are
    used."""
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


def contiguous(units: Iterable[int]) -> list[range]:
    """The units as ranges, in order."""
    found: list[range] = []
    for u in sorted(set(units)):
        if found and found[-1].stop == u:
            found[-1] = range(found[-1].start, u + 1)
        else:
            found.append(range(u, u + 1))
    return found
