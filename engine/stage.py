"""A stage: a contiguous range of a model's units, with its weights, and the state of the sequences that
pass through.

`Stage(model, 0, n)` is the engine that other programs embed; the network is stages in a chain. A stage
puts together three things with lives of their own: weights by unit (`weights`), keys and values by
sequence and unit (`kv`), and an executor for its range, with threads that outlive it (`backends`)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .backends import choose, open_backend
from .backends.base import CANCELLED, BoundProgram, Outcome, SequenceRows
from .batch import Result, Run, Sampling, Want
from .calls import Calls, Flag
from .errors import CancelledRunError, ContextError, MissingDependencyError
from .kv import PagePool, SequenceKv
from .memory import trim_heap
from .model_directory import Model
from .threads import chosen
from .weights import WeightStore


@dataclass(frozen=True, slots=True)
class StageOptions:
    """How a stage runs. `kv_bytes` caps keys and values. One batch has at most `max_rows` rows, and
    logits of at most `max_wanted` of them: both size the workspace."""

    backend: str = "auto"
    isa: str = "auto"
    threads: int | None = None
    """None: as many as `shoal profile` found fastest here, else one a big core within the CPU quota, four
    at most (`Stage.threads` says how many). The results are the same bits for any number."""
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


class Stage:
    """Units [first, last) of a model, ready to run batches.

    Any number of threads may use one stage: it does one thing at a time, and calls wait for their turn in
    the order in which they came. A forked process goes on with a copy of its own, but for sequences that
    another thread was running at the fork: in the child they are closed."""

    def __init__(self, model: Model, first: int, last: int, options: StageOptions = StageOptions()) -> None:
        _check_range(model, first, last)
        threads, _ = chosen(options.threads, choose(options.backend)[0], options.isa)
        options = replace(options, threads=threads)
        self.model, self.first, self.last, self.options, self.threads = model, first, last, options, threads
        self._sequences: dict[int, _Sequence] = {}
        self._ended: deque[int] = deque()  # sequences to be closed
        self._calls = Calls(self._close_ended, self._restart)
        self._range_lock = threading.Lock()  # for loading weights, which waits for no run
        self._states = [unit.states for unit in model.program.units]
        self._pool = PagePool(model.kv_dtype, options.kv_bytes)
        self._weights = WeightStore(model, options.resident)
        self._weights.load(first, last)
        self._bound = bind(self._weights, first, last, options)
        self._backend = open_backend(options.backend, options.isa, threads)
        self._executor = self._backend.executor(self._bound)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """What computes, as a person would say it: "native (avx512)"."""
        return self._backend.name

    @property
    def exact(self) -> bool:
        """True when the results are the same bits on every device (docs/numerics.md)."""
        return self._backend.exact

    @property
    def bound(self) -> BoundProgram:
        """The units' ops and the weights that they read, where they are in memory."""
        return self._bound

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages of keys and values that sequences have now."""
        return self._pool.used

    def clock_ops(self) -> NDArray[np.uint64]:
        """From now on, until the range changes, nanoseconds that each of `bound.ops` took in the latest
        run, `[ops]`. MissingDependencyError: the backend has no such clock; the native one has."""
        from .backends.native import NativeExecutor

        with self._calls.alone():
            if not isinstance(self._executor, NativeExecutor):
                raise MissingDependencyError(
                    f"{self.backend} does not time its operations: use --backend native"
                )
            return self._executor.clock_ops()

    def open_sequence(
        self,
        sequence: int | None,
        sampling: Sampling = Sampling(),
        context: int | None = None,
        history: Sequence[int] = (),
    ) -> int:
        """Starts a sequence of at most `context` positions and returns its number; None takes a free one.
        `history` holds the tokens of positions that were run elsewhere: each unit needs them imported
        before the first run. ValueError: the number is taken, or a token is not of the vocabulary.
        ContextError: the model's context is shorter, or the history longer."""
        with self._calls.alone():
            longest = self.model.config.context
            context = longest if context is None else context
            if not 0 < context <= longest:
                raise ContextError(
                    f"a context of {context} tokens was asked for; the model's is {longest}"
                    f"{self.model.config.limit}"
                )
            if len(history) > context:
                raise ContextError(f"a history of {len(history)} tokens exceeds the context of {context}")
            self._check_tokens(history)
            number = self._free_number(sequence)
            tokens = np.zeros(context, np.int32)
            tokens[: len(history)] = history
            kv = SequenceKv(self._pool, self._states, context)
            kv.arrange(self.first, self.last)
            self._sequences[number] = _Sequence(kv, tokens, len(history), sampling)
            return number

    def fork_sequence(
        self,
        source: int,
        sequence: int | None = None,
        positions: int | None = None,
        sampling: Sampling | None = None,
    ) -> int:
        """Starts a sequence that holds the first `positions` (None: all) of another, and returns its
        number. Full pages are shared as long as neither writes there. KeyError: no such source.
        ValueError: the number is taken, or the source holds fewer positions. ContextError: no room for
        the page that is copied."""
        with self._calls.alone():
            state = self._sequences[source]
            n = state.length if positions is None else positions
            if not 0 <= n <= state.length:
                raise ValueError(f"sequence {source} holds {state.length} positions: {n} cannot be forked")
            number = self._free_number(sequence)
            kv = state.kv.fork(n)
            kv.arrange(self.first, self.last)
            self._sequences[number] = _Sequence(kv, state.tokens.copy(), n, sampling or state.sampling)
            return number

    def close_sequence(self, sequence: int) -> None:
        """Ends a sequence and frees its pages; harmless when it is not open, and when the stage is
        closed."""
        self._ended.append(sequence)
        self._calls.tidy()

    def positions(self, sequence: int, unit: int) -> int:
        """How many positions of a sequence a unit holds. KeyError: no such sequence."""
        with self._calls.alone():
            return self._sequences[sequence].kv.positions(unit)

    def export_positions(self, sequence: int, unit: int, first: int, last: int) -> bytes:
        """Keys and values of positions [first, last) of a unit, in the same layout on every device.
        KeyError: no such sequence. ValueError: the unit does not hold them."""
        with self._calls.alone():
            return self._sequences[sequence].kv.export(unit, first, last)

    def import_positions(
        self, sequence: int, unit: int, first: int, last: int, data: bytes | memoryview
    ) -> None:
        """Takes what a stage of the same model has exported of this unit, which need not be in the range
        yet; it then holds positions [0, last). KeyError: no such sequence. ValueError: this is not that,
        positions before are missing, or the sequence has no tokens there. ContextError: no room for
        pages."""
        with self._calls.alone():
            state = self._sequences[sequence]
            if last > state.length:
                raise ValueError(
                    f"sequence {sequence} has the tokens of {state.length} positions, not of {last}: "
                    "open it with its history"
                )
            state.kv.accept(unit, first, last, data)

    def load(self, first: int, last: int) -> None:
        """Loads the weights of further units, for a `set_range` that is to be quick; others may run
        meanwhile. What no later range has is unloaded by it. ModelFileError, MemoryError: nothing has
        changed."""
        _check_range(self.model, first, last)
        with self._range_lock:
            self._calls.check()
            self._weights.load(first, last)

    def set_range(self, first: int, last: int, kv_bytes: int | None = None) -> None:
        """Makes [first, last) the units that run: loads what is missing while others run, changes over
        between two runs, and unloads what is left out. Sequences keep the pages of units that stay; a
        unit that comes holds the positions that were imported, and a run that needs more is a ValueError.
        `kv_bytes` is the new cap of keys and values, None leaves it. After an error nothing has
        changed."""
        _check_range(self.model, first, last)
        with self._range_lock:
            self._calls.check()
            before = self._weights.units
            try:
                self._weights.load(first, last)
                bound = bind(self._weights, first, last, self.options)
                old, new = self._executor, self._backend.executor(bound)
                with self._calls.alone():
                    for state in self._sequences.values():
                        state.kv.keep(first, last)
                        state.kv.arrange(first, last)
                    self.first, self.last, self._bound, self._executor = first, last, bound, new
                    if kv_bytes is not None:
                        self.options = replace(self.options, kv_bytes=kv_bytes)
                        self._pool.limit = kv_bytes
            except BaseException:
                self._weights.keep(before)
                raise
            old.close()
            self._weights.keep(range(first, last))

    def close(self) -> None:
        """Waits for the calls that came before, ends all sequences, and gives up threads and memory."""
        with self._range_lock:
            self._calls.close(self._end)

    def _end(self) -> None:
        for state in self._sequences.values():
            state.kv.truncate(0)
        self._sequences.clear()
        self._executor.close()
        self._backend.close()
        # Weights and pages go now, not once nobody holds this object: the next stage needs the room.
        self._weights.keep(())
        self._pool = PagePool(self._pool.kv_type)
        del self._executor, self._bound
        trim_heap()

    def cancel(self, sequence: int | None = None) -> None:
        """Ends runs early, from another thread: those with this sequence, or all; those that wait for
        their turn too. `run` and `generate` raise CancelledRunError then. What a sequence held before the
        run, it still holds. Does not wait, and does nothing where nothing runs."""
        self._calls.cancel(sequence, list(self._sequences))

    def cancelled(self, sequence: int) -> bool:
        """Whether `cancel` has named the sequence since it was opened or this was asked: for loops of
        runs, which may have been between two of them then."""
        return self._calls.cancelled(sequence)

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """Runs a batch of rows of distinct sequences, when it is its turn; the results are in the batch's
        order.

        ValueError: a run that does not fit the sequences or this stage, or a sequence that another thread
        is running. ContextError: a sequence outgrows its context, or the pages are used up.
        FloatingPointError: NaN or infinity. CancelledRunError: see `cancel`. After an error the sequences
        hold what they held before the batch's positions, and nothing from there on."""
        with self._calls.run([run.sequence for run in batch]) as cancel:
            try:
                return self._run(batch, cancel)
            except BaseException:
                for run in batch:
                    if state := self._sequences.get(run.sequence):
                        state.kv.truncate(state.length)
                raise

    def _run(self, batch: Sequence[Run], cancel: Flag) -> list[Result]:
        if sum(len(run.tokens) for run in batch) > self.options.max_rows:
            raise ValueError(f"a batch may have at most {self.options.max_rows} rows")
        if cancel[0]:
            raise CancelledRunError(CANCELLED)
        rows = [self._rows(run) for run in batch]
        if sum(item.wanted for item in rows) > self._bound.max_wanted:
            raise ValueError(f"a batch may want logits of at most {self._bound.max_wanted} rows")
        hidden = None if self._bound.reads_tokens else _joined([run.hidden for run in batch])
        outcome = self._executor.run(rows, hidden, any(run.want is Want.LOGITS for run in batch), cancel)
        for run in batch:
            state = self._sequences[run.sequence]
            state.length = run.first + len(run.tokens)
            state.kv.ran(state.length)
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
        self._check_tokens(run.tokens)
        if not self._bound.reads_tokens:
            width = self.model.program.cut_cols
            if run.hidden is None or run.hidden.shape != (n, width):
                raise ValueError(
                    f"stage [{self.first}, {self.last}) needs hidden rows of shape ({n}, {width})"
                )
        state.kv.check(run.first)
        state.length = min(state.length, run.first)  # until all has gone well
        state.kv.prepare(run.first, end)
        state.tokens[run.first : end] = run.tokens
        want = run.want if self._bound.last else Want.NOTHING
        wanted = {Want.NOTHING: 0, Want.TOKEN: 1, Want.LOGITS: n}[want]
        return SequenceRows(state.kv, state.tokens, state.sampling, n, run.first, wanted, want is Want.TOKEN)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if len(tokens) and (min(tokens) < 0 or max(tokens) >= self.model.program.vocab):
            raise ValueError(f"a token id is not in [0, {self.model.program.vocab})")

    def _free_number(self, sequence: int | None) -> int:
        """The number, or one that is free."""
        if sequence is None:
            sequence = min([0, *self._sequences]) - 1  # below those that callers choose
        if sequence in self._sequences:
            raise ValueError(
                f"sequence {sequence} is open already: answers at the same time need numbers of their own"
            )
        self._calls.forget([sequence])
        return sequence

    def _restart(self, lost: Sequence[int]) -> None:
        """Threads and a workspace for a forked process, and locks that no lost thread holds."""
        self._ended.extend(lost)
        self._range_lock = threading.Lock()
        self._weights.unlock()
        self._backend = open_backend(self.options.backend, self.options.isa, self.threads)
        self._executor = self._backend.executor(self._bound)

    def _close_ended(self) -> None:
        while self._ended:
            state = self._sequences.pop(self._ended.popleft(), None)
            if state is not None:
                state.kv.truncate(0)

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


def _check_range(model: Model, first: int, last: int) -> None:
    if not 0 <= first < last <= model.n_units:
        raise ValueError(f"units [{first}, {last}) are not a range of this model's {model.n_units} units")


def bind(weights: WeightStore, first: int, last: int, options: StageOptions) -> BoundProgram:
    """The ops, weights and states of units [first, last), which are loaded."""
    model = weights.model
    ops = tuple(model.program.ops(first, last))
    held = weights.of(first, last)
    if any(unit == -1 for unit, _ in ops):
        held |= weights.constants()
    return BoundProgram(
        program=model.program,
        ops=ops,
        weights=held,
        states=tuple((u, state) for u in range(first, last) for state in model.program.units[u].states),
        kv_type=model.kv_dtype,
        reads_tokens=first == 0,
        last=last == model.n_units,
        max_rows=options.max_rows,
        max_wanted=min(options.max_rows, options.max_wanted),
    )
