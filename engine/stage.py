"""A stage: a contiguous range of a model's units, with its weights, and the state of the sequences that
pass through.

`Stage(model, 0, n)` is the engine that other programs embed; the network is stages in a chain."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .backends import choose, make_executor
from .backends.base import BoundProgram, Outcome, SequenceRows, WeightData
from .batch import F32, Result, Run, Sampling, Want
from .errors import CancelledRunError, ContextError, MissingDependencyError, ShoalError
from .fair_lock import FairLock
from .kv import PagePool, SequenceKv
from .memory import Arena, affordable, give_back, room
from .shards import Model, Resident
from .threads import chosen


@dataclass(frozen=True, slots=True)
class StageOptions:
    """How a stage runs. `kv_bytes` caps keys and values. One batch has at most `max_rows` rows, and
    logits of at most `max_wanted` of them: both size the workspace."""

    backend: str = "auto"
    isa: str = "auto"
    threads: int | None = None
    """None: as many as `shoal profile` found fastest here, else one a big core within the CPU quota, four at
    most (`Stage.threads` says how many). The results are the same bits for any number."""
    max_rows: int = 256
    max_wanted: int = 32
    kv_bytes: int | None = None
    resident: bool | None = None
    """Weights read into memory (quicker) and, if True, locked there as far as the system lets us; or in
    maps of the files (can be dropped when memory runs short). None: read into memory if that takes no
    more than half of the RAM that is available."""


@dataclass(slots=True)
class _Sequence:
    kv: SequenceKv
    tokens: NDArray[np.int32]
    """Ids by position; only [0, length) are there."""
    length: int
    sampling: Sampling


@dataclass(slots=True, eq=False)
class _Call:
    """A call of `run`, from before it waits for its turn until it returns."""

    sequences: frozenset[int]
    cancel: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, np.int32))
    """1 once the call is cancelled; the backend reads it between two operations."""


class Stage:
    """Units [first, last) of a model, ready to run batches.

    Any number of threads may use one stage: it does one thing at a time, and calls wait for their turn in
    the order in which they came. A stage belongs to the process that opened it: after a fork, the child's
    calls are refused."""

    def __init__(self, model: Model, first: int, last: int, options: StageOptions = StageOptions()) -> None:
        units = model.program.units
        if not 0 <= first < last <= len(units):
            raise ValueError(f"units [{first}, {last}) are not a range of this model's {len(units)} units")
        threads, _ = chosen(options.threads, choose(options.backend)[0], options.isa)
        options = replace(options, threads=threads)
        self.model, self.first, self.last, self.options, self.threads = model, first, last, options, threads
        self._process = os.getpid()
        self._lock = FairLock()
        self._busy = False  # a call is between its begin and its end; read and written by the lock's holder
        self._calls_lock = threading.RLock()  # of the next two; held for moments, never while a batch runs
        self._calls: list[_Call] = []
        self._cancelled: set[int] = set()
        self._sequences: dict[int, _Sequence] = {}
        self._ended: deque[int] = deque()  # sequences to be closed
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

        with self._alone():
            if not isinstance(self._executor, NativeExecutor):
                raise MissingDependencyError(
                    f"{self.backend} does not time its operations: use --backend native"
                )
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
        self, sequence: int | None, sampling: Sampling = Sampling(), context: int | None = None
    ) -> int:
        """Starts a sequence of at most `context` positions and returns its number; None takes a number
        that is free. ValueError: the number is taken. ContextError: the model's context is shorter."""
        with self._alone():
            if sequence is None:
                sequence = min(0, *self._sequences, 0) - 1  # below those that callers choose
            if sequence in self._sequences:
                raise ValueError(
                    f"sequence {sequence} is open already: answers at the same time need numbers of their own"
                )
            longest = self.model.config.context
            context = longest if context is None else context
            if not 0 < context <= longest:
                raise ContextError(f"a context of {context} tokens was asked for; the model's is {longest}")
            kv = SequenceKv(self._pool, [state for _, state in self._bound.states], context)
            self._forget_cancel([sequence])
            self._sequences[sequence] = _Sequence(kv, np.zeros(context, np.int32), 0, sampling)
            return sequence

    def truncate(self, sequence: int, position: int) -> None:
        """Forgets what the sequence holds from `position` on. KeyError: no such sequence."""
        with self._alone():
            state = self._sequences[sequence]
            state.length = min(state.length, position)
            state.kv.truncate(state.length)

    def close_sequence(self, sequence: int) -> None:
        """Ends a sequence and frees its pages; harmless when it is not open, and when the stage is
        closed."""
        self._ended.append(sequence)
        if self._process != os.getpid():
            return
        with self._lock:
            # Busy: the garbage collector has ended a generator of answers in the middle of this thread's
            # own call.
            if not self._busy:
                self._close_ended()

    def close(self) -> None:
        """Waits for the calls that came before, ends all sequences, and gives up threads and memory."""
        if self._closed or self._process != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ended.extend(self._sequences)
            self._close_ended()
            self._executor.close()
            # Weights and pages go now, not once nobody holds this object: the next stage needs the room.
            del self._executor, self._bound, self._pool
            give_back()

    def cancel(self, sequence: int | None = None) -> None:
        """Ends runs early, from another thread: those with this sequence, or all; those that wait for
        their turn too. `run` and `generate` raise CancelledRunError then. What a sequence held before the
        run, it still holds. Does not wait, and does nothing where nothing runs."""
        with self._calls_lock:
            self._cancelled.update(list(self._sequences) if sequence is None else [sequence])
            for call in self._calls:
                if sequence is None or sequence in call.sequences:
                    call.cancel[0] = 1

    def cancelled(self, sequence: int) -> bool:
        """Whether `cancel` has named the sequence since it was opened or this was asked: for loops of
        runs, which may have been between two of them then."""
        with self._calls_lock:
            named = sequence in self._cancelled
            self._cancelled.discard(sequence)
            return named

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """Runs a batch of rows of distinct sequences, when it is its turn; the results are in the batch's
        order.

        ValueError: a run that does not fit the sequences or this stage, or a sequence that another thread
        is running. ContextError: a sequence outgrows its context, or the pages are used up.
        FloatingPointError: NaN or infinity. CancelledRunError: see `cancel`. After an error the sequences
        hold what they held before the batch's positions, and nothing from there on."""
        call = self._announce(batch)
        try:
            with self._alone():
                return self._run(batch, call.cancel)
        except CancelledRunError:
            self._forget_cancel(call.sequences)
            raise
        finally:
            with self._calls_lock:
                self._calls.remove(call)

    def _announce(self, batch: Sequence[Run]) -> _Call:
        """Notes that a call will run these sequences. ValueError: one of them is in two runs."""
        call = _Call(frozenset(run.sequence for run in batch))
        if len(call.sequences) != len(batch):
            raise ValueError("a sequence is in one batch twice")
        with self._calls_lock:
            for other in self._calls:
                for sequence in call.sequences & other.sequences:
                    raise ValueError(
                        f"sequence {sequence} is being run by another thread: use a number of your own"
                    )
            self._calls.append(call)
        return call

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for this thread's turn to use the stage. ValueError: the stage has been closed.
        ShoalError: it belongs to another process."""
        if self._process != os.getpid():
            raise ShoalError(
                f"this stage and its threads belong to process {self._process}, which was forked: "
                "open a stage in each process"
            )
        with self._lock:
            if self._busy:
                raise RuntimeError("a stage was called in the middle of a call by the same thread")
            if self._closed:
                raise ValueError("the stage has been closed")
            self._busy = True
            try:
                self._close_ended()
                yield
            finally:
                self._close_ended()
                self._busy = False

    def _close_ended(self) -> None:
        while self._ended:
            sequence = self._ended.popleft()
            state = self._sequences.pop(sequence, None)
            if state is not None:
                state.kv.truncate(0)

    def _forget_cancel(self, sequences: Iterable[int]) -> None:
        with self._calls_lock:
            self._cancelled.difference_update(sequences)

    def _run(self, batch: Sequence[Run], cancel: NDArray[np.int32]) -> list[Result]:
        if sum(len(run.tokens) for run in batch) > self.options.max_rows:
            raise ValueError(f"a batch may have at most {self.options.max_rows} rows")
        try:
            rows = [self._rows(run) for run in batch]
            if sum(item.wanted for item in rows) > self._bound.max_wanted:
                raise ValueError(f"a batch may want logits of at most {self._bound.max_wanted} rows")
            hidden = None if self._bound.reads_tokens else _joined([run.hidden for run in batch])
            logits = any(run.want is Want.LOGITS for run in batch)
            outcome = self._executor.run(rows, hidden, logits, cancel)
        except BaseException:
            for run in batch:
                if state := self._sequences.get(run.sequence):
                    state.kv.truncate(state.length)
            raise
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
