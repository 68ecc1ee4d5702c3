"""A stage: a contiguous range of a model's units, with its weights, and the state of the sequences that pass
through.

`Stage(model, 0, n)` is the engine that other programs embed; the network is stages in a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .backends import choose, make_executor
from .backends.base import BoundProgram, Outcome, SequenceRows, WeightData
from .batch import F32, Result, Run, Sampling, Want
from .errors import ContextError, MissingDependencyError
from .kv import PagePool, SequenceKv
from .memory import Arena, affordable, give_back, room
from .shards import Model, Resident
from .threads import chosen


@dataclass(frozen=True, slots=True)
class StageOptions:
    """How a stage runs. `kv_bytes` caps keys and values. One batch has at most `max_rows` rows, and logits of
    at most `max_wanted` of them: both size the workspace."""

    backend: str = "auto"
    isa: str = "auto"
    threads: int | None = None
    """None: as many as `shoal profile` found fastest here, else one a big core within the CPU quota, four at
    most (`Stage.threads` says how many). The results are the same bits for any number."""
    max_rows: int = 256
    max_wanted: int = 32
    kv_bytes: int | None = None
    resident: bool | None = None
    """Weights read into memory (quicker) and, if True, locked there as far as the system lets us; or in maps
    of the files (can be dropped when memory runs short). None: read into memory if that takes no more than
    half of the RAM that is available."""


@dataclass(slots=True)
class _Sequence:
    kv: SequenceKv
    tokens: NDArray[np.int32]
    """Ids by position; only [0, length) are there."""
    length: int
    sampling: Sampling


class Stage:
    """Units [first, last) of a model, ready to run batches. Not thread-safe: one call at a time."""

    def __init__(self, model: Model, first: int, last: int, options: StageOptions = StageOptions()) -> None:
        units = model.program.units
        if not 0 <= first < last <= len(units):
            raise ValueError(f"units [{first}, {last}) are not a range of this model's {len(units)} units")
        threads, _ = chosen(options.threads, choose(options.backend)[0], options.isa)
        options = replace(options, threads=threads)
        self.model, self.first, self.last, self.options, self.threads = model, first, last, options, threads
        self._sequences: dict[int, _Sequence] = {}
        self._closed = False
        self._bound = bind(model, first, last, options)
        self._executor = make_executor(self._bound, options.backend, options.isa, threads)
        self._pool = PagePool(model.kv_dtype, options.kv_bytes, [state for _, state in self._bound.states])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """What computes, as a person would say it: "native (avx512)"."""
        return self._executor.name

    @property
    def bound(self) -> BoundProgram:
        """The units' ops and the weights that they read, where they stand in memory."""
        return self._bound

    def clock_ops(self) -> NDArray[np.uint64]:
        """From now on, nanoseconds that each of `bound.ops` took in the latest run, `[ops]`.
        MissingDependencyError: the backend has no such clock; the native one has."""
        from .backends.native import NativeExecutor

        if not isinstance(self._executor, NativeExecutor):
            raise MissingDependencyError(f"{self.backend} does not time its operations: use --backend native")
        return self._executor.clock_ops()

    @property
    def exact(self) -> bool:
        """True when the results are the same bits on every device (docs/numerics.md)."""
        return self._executor.exact

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now."""
        return 0 if self._closed else self._pool.used

    def open_sequence(
        self, sequence: int, sampling: Sampling = Sampling(), context: int | None = None
    ) -> None:
        """Starts a sequence of at most `context` positions. ValueError: the number is taken. ContextError:
        context is too long."""
        if self._closed:
            raise ValueError("the stage has been closed")
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence} is open already")
        context = self.model.config.context if context is None else context
        if not 0 < context <= self.model.config.context:
            raise ContextError(
                f"a context of {context} tokens was asked for; the model's is {self.model.config.context}"
            )
        kv = SequenceKv(self._pool, [state for _, state in self._bound.states], context)
        self._sequences[sequence] = _Sequence(kv, np.zeros(context, np.int32), 0, sampling)

    def truncate(self, sequence: int, position: int) -> None:
        """Forgets what the sequence holds from `position` on. KeyError: no such sequence."""
        state = self._sequences[sequence]
        state.length = min(state.length, position)
        state.kv.truncate(state.length)

    def close_sequence(self, sequence: int) -> None:
        """Ends a sequence and frees its pages; harmless when it is not open."""
        state = self._sequences.pop(sequence, None)
        if state is not None:
            state.kv.truncate(0)

    def close(self) -> None:
        """Ends all sequences and gives up threads and memory."""
        if not self._closed:
            self._closed = True
            for sequence in list(self._sequences):
                self.close_sequence(sequence)
            self._executor.close()
            # Weights and pages go now, not once nobody holds this object: the next stage needs the room.
            del self._executor, self._bound, self._pool
            give_back()

    def cancel(self) -> None:
        """Ends the run that is under way, if any, within one op: `run` raises CancelledRunError. To be called
        from another thread."""
        self._executor.cancel()

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """Runs a batch of rows of distinct sequences; the results stand in the batch's order.

        ValueError: a run that does not fit the sequences or this stage. ContextError: a sequence outgrows its
        context, or the pages are used up. FloatingPointError: NaN or infinity. CancelledRunError: `cancel`
        was called meanwhile. After an error the positions of the batch hold nothing; everything before them
        is kept."""
        if len({run.sequence for run in batch}) != len(batch):
            raise ValueError("a sequence stands twice in one batch")
        if sum(len(run.tokens) for run in batch) > self.options.max_rows:
            raise ValueError(f"a batch may have at most {self.options.max_rows} rows")
        rows = [self._rows(run) for run in batch]
        if sum(item.wanted for item in rows) > self._bound.max_wanted:
            raise ValueError(f"a batch may want logits of at most {self._bound.max_wanted} rows")
        hidden = None if self._bound.reads_tokens else _joined([run.hidden for run in batch])
        outcome = self._executor.run(rows, hidden, any(run.want is Want.LOGITS for run in batch))
        for run in batch:
            self._sequences[run.sequence].length = run.first + len(run.tokens)
        return self._results(batch, rows, outcome)

    def _rows(self, run: Run) -> SequenceRows:
        """Checks one run, makes room for it, and forgets what lies behind its first position."""
        state = self._sequences.get(run.sequence)
        n, end = len(run.tokens), run.first + len(run.tokens)
        if state is None:
            raise ValueError(f"sequence {run.sequence} is not open")
        if n == 0 or not 0 <= run.first <= state.length:
            raise ValueError(
                f"{n} rows from position {run.first}: the sequence holds {state.length} positions"
            )
        if end > len(state.tokens):
            raise ContextError(f"position {end} is beyond the context of {len(state.tokens)} tokens")
        if min(run.tokens) < 0 or max(run.tokens) >= self.model.program.vocab:
            raise ValueError(f"a token id is not in [0, {self.model.program.vocab})")
        if not self._bound.reads_tokens:
            width = self.model.program.buffer(self.model.program.cut[0]).cols
            if run.hidden is None or run.hidden.shape != (n, width):
                raise ValueError(
                    f"stage [{self.first}, {self.last}) needs hidden rows of shape ({n}, {width})"
                )
        state.length = min(state.length, run.first)  # until all has gone well
        state.kv.truncate(run.first)
        state.kv.reserve(end)
        state.tokens[run.first : end] = run.tokens
        want = run.want if self._bound.last else Want.NOTHING
        wanted = {Want.NOTHING: 0, Want.TOKEN: 1, Want.LOGITS: n}[want]
        return SequenceRows(state.kv, state.tokens, state.sampling, n, run.first, wanted, want is Want.TOKEN)

    def _results(self, batch: Sequence[Run], rows: Sequence[SequenceRows], outcome: Outcome) -> list[Result]:
        results, row, wanted = [], 0, 0
        for i, (run, item) in enumerate(zip(batch, rows, strict=True)):
            hidden = None if outcome.hidden is None else outcome.hidden[row : row + item.rows]
            logits = None
            if run.want is Want.LOGITS and outcome.logits is not None:
                logits = outcome.logits[wanted : wanted + item.wanted]
            token = int(outcome.drawn[i]) if item.sample else None
            results.append(Result(run.sequence, run.first, item.rows, hidden, token, logits))
            row, wanted = row + item.rows, wanted + item.wanted
        return results


def _joined(parts: Sequence[F32 | None]) -> F32:
    arrays = [part for part in parts if part is not None]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def bind(model: Model, first: int, last: int, options: StageOptions) -> BoundProgram:
    """The ops, weights and states of units [first, last), resolved."""
    program = model.program
    ops = tuple(program.ops(first, last))
    resident = _resident(model, first, last, options.resident)
    weights: dict[tuple[int, str], WeightData] = {}
    if resident is None:
        model.fetch_ahead(first, last)  # each layer is read from the disk while those before it run
    for unit in range(first, last):
        if resident is not None:
            model.fetch_ahead(unit + 1, min(unit + 2, last))  # while this one is copied
        for name, tensor in model.unit_weights(unit, resident).items():
            weights[unit, name] = tensor
    for name, values in model.constants().items():
        if any(unit == -1 for unit, _ in ops):
            weights[-1, name] = _Constant(values)
    return BoundProgram(
        program=program,
        ops=ops,
        weights=weights,
        states=tuple((u, state) for u in range(first, last) for state in program.units[u].states),
        kv_type=model.kv_dtype,
        reads_tokens=first == 0,
        last=last == len(program.units),
        max_rows=options.max_rows,
        max_wanted=min(options.max_rows, options.max_wanted),
    )


def _resident(model: Model, first: int, last: int, wanted: bool | None) -> Resident | None:
    """Room for the files of the units, if they are to be read into memory."""
    names = {name for unit in model.index.units[first:last] for name in unit.files}
    sizes = [model.index.files[name].size for name in names]
    if wanted is False or (wanted is None and room(sizes) > affordable()):
        return None
    return Resident(Arena(room(sizes), pinned=wanted is True))


@dataclass(frozen=True, slots=True)
class _Constant:
    """An f64 vector of the program, seen as a weight."""

    data: NDArray[np.float64]

    scales: None = None
    mins: None = None

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return int(self.data.size)
