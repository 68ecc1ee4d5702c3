"""A stage: a contiguous range of a model's units with their weights, and the sequences that run through it.

`Stage(model, 0, n)` is the engine that other programs embed; over a network, stages form a chain. A stage
combines three parts with separate lifetimes: weights by unit (`weights`), keys and values by sequence and
unit (`kv`), and an executor for the range, whose threads outlive it (`backends`)."""

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
from .kv_page import page_bytes
from .layout import PAGE
from .memory import trim_heap
from .model_directory import Model
from .threads import chosen
from .weights import WeightStore


@dataclass(frozen=True, slots=True)
class StageOptions:
    """Options of a stage. `kv_bytes` caps the keys and values of all sequences. A batch has at most
    `max_rows` rows and returns logits of at most `max_wanted` of them; both determine the workspace's
    size."""

    backend: str = "auto"
    isa: str = "auto"
    threads: int | None = None
    """None: the number that `shoal profile` found fastest on this device, else one per big core within the
    CPU quota, at most four. `Stage.threads` is the number in use. Results have the same bits for any
    number."""
    max_rows: int = 256
    max_wanted: int = 32
    kv_bytes: int | None = None
    resident: bool | None = None
    """Where weights are. True: read into memory (faster), and locked there as far as the system allows.
    False: in mappings of the files, which the system can drop when memory runs short. None: read into
    memory if that takes at most half of the available RAM, else mapped."""


@dataclass(slots=True)
class _Sequence:
    kv: SequenceKv
    tokens: NDArray[np.int32]
    """Token ids by position; only [0, length) are valid."""
    length: int
    sampling: Sampling


class Stage:
    """Units [first, last) of a model, ready to run batches.

    A stage is thread-safe: it executes one call at a time, in order of arrival. A forked process continues
    with its own copy, in which sequences that another thread was running at the fork are closed.

    ValueError: not a range of the model's units. ModelFileError: a file is missing or damaged.
    MissingDependencyError: the backend is not available. MemoryError: out of memory."""

    def __init__(self, model: Model, first: int, last: int, options: StageOptions = StageOptions()) -> None:
        _check_range(model, first, last)
        threads, _ = chosen(options.threads, choose(options.backend)[0], options.isa)
        options = replace(options, threads=threads)
        self.model, self.first, self.last, self.options, self.threads = model, first, last, options, threads
        self._sequences: dict[int, _Sequence] = {}
        self._ended: deque[int] = deque()  # sequences to be closed
        self._calls = Calls(self._close_ended, self._restart)
        self._range_lock = threading.Lock()  # held while loading weights, which does not wait for runs
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
        """Backend and kernel set for display, such as "native (avx512)"."""
        return self._backend.name

    @property
    def exact(self) -> bool:
        """Whether results have the same bits on every device (docs/numerics.md)."""
        return self._backend.exact

    @property
    def bound(self) -> BoundProgram:
        """The ops of the units, bound to their weights in memory."""
        return self._bound

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages of keys and values in use by sequences."""
        return self._pool.used

    @property
    def page_positions(self) -> int:
        """Positions of a page of keys and values."""
        return PAGE

    @property
    def kv_pages(self) -> int | None:
        """The number of pages that the sequences may hold together, counted in each layer: a sequence of n
        positions takes ceil(n / page_positions). None: no cap, or units without state."""
        limit, kv_type = self.options.kv_bytes, self.model.kv_dtype
        states = [state for unit in self._states[self.first : self.last] for state in unit]
        each = sum(page_bytes(state, kv_type) for state in states)
        return None if limit is None or not each else limit // each

    def clock_ops(self) -> NDArray[np.uint64]:
        """Starts timing ops. The returned array `[ops]` is updated by each run until the range changes: the
        nanoseconds that each of `bound.ops` took. MissingDependencyError: the backend cannot time ops; the
        native one can."""
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
        """Opens a sequence of at most `context` positions (None: the model's) and returns its number;
        `sequence` None chooses a free number. `history` is the tokens of positions that were run on another
        device: each unit needs them imported before the first run. ValueError: the number is taken, or a
        token is not in the vocabulary. ContextError: the context is longer than the model's, or the history
        longer than the context."""
        with self._calls.alone():
            longest = self.model.config.context
            context = longest if context is None else context
            if not 0 < context <= longest:
                raise ContextError(
                    f"a context of {context} tokens is not between 1 and the model's {longest}"
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
        """Opens a sequence with the first `positions` (None: all) of the sequence `source`, and returns its
        number. Full pages are shared until one of the two writes to them; the last partial page is copied.
        KeyError: `source` is not open. ValueError: the number is taken, or the source has fewer positions.
        ContextError: no memory for the copied page."""
        with self._calls.alone():
            state = self._sequences[source]
            n = state.length if positions is None else positions
            if not 0 <= n <= state.length:
                raise ValueError(f"sequence {source} holds {state.length} positions, so {n} cannot be forked")
            number = self._free_number(sequence)
            kv = state.kv.fork(n)
            kv.arrange(self.first, self.last)
            self._sequences[number] = _Sequence(kv, state.tokens.copy(), n, sampling or state.sampling)
            return number

    def close_sequence(self, sequence: int) -> None:
        """Closes a sequence and frees its pages. Does nothing if it is not open or the stage is closed."""
        self._ended.append(sequence)
        self._calls.tidy()

    def positions(self, sequence: int, unit: int) -> int:
        """Number of positions of a sequence that a unit holds. KeyError: the sequence is not open."""
        with self._calls.alone():
            return self._sequences[sequence].kv.positions(unit)

    def export_positions(self, sequence: int, unit: int, first: int, last: int) -> bytes:
        """Keys and values of positions [first, last) of a unit, in the same layout on every device.
        KeyError: the sequence is not open. ValueError: the unit does not hold these positions."""
        with self._calls.alone():
            return self._sequences[sequence].kv.export(unit, first, last)

    def import_positions(
        self, sequence: int, unit: int, first: int, last: int, data: bytes | memoryview
    ) -> None:
        """Imports what `export_positions` returned for this unit on a stage of the same model. The unit need
        not be in the range yet; it then holds positions [0, last). KeyError: the sequence is not open.
        ValueError: `data` does not fit, earlier positions are missing, or the sequence has no tokens there.
        ContextError: no memory for pages."""
        with self._calls.alone():
            state = self._sequences[sequence]
            if last > state.length:
                raise ValueError(
                    f"sequence {sequence} has the tokens of {state.length} positions, not of {last}: "
                    "open it with its history of tokens"
                )
            state.kv.accept(unit, first, last, data)

    def load(self, first: int, last: int) -> None:
        """Loads the weights of units [first, last) in advance, so that a later `set_range` is quick; runs
        continue meanwhile. `set_range` unloads units that its range does not have. ModelFileError: a file is
        missing or damaged. MemoryError: out of memory. After an error nothing has changed."""
        _check_range(self.model, first, last)
        with self._range_lock:
            self._calls.check()
            self._weights.load(first, last)

    def set_range(self, first: int, last: int, kv_bytes: int | None = None) -> None:
        """Changes the stage's range to units [first, last): loads missing units while runs continue, switches
        between two runs, and unloads the others. Sequences keep the pages of units that stay. An added unit
        holds only the positions that were imported; a run that needs more is a ValueError. `kv_bytes` is the
        new cap on keys and values; None keeps the old one. Errors: see `load`. After an error nothing has
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
        """Waits for earlier calls, closes all sequences, and frees threads and memory."""
        with self._range_lock:
            self._calls.close(self._end)

    def _end(self) -> None:
        for state in self._sequences.values():
            state.kv.truncate(0)
        self._sequences.clear()
        self._executor.close()
        self._backend.close()
        # Frees weights and pages now, not when this object is collected: the next stage needs the memory.
        self._weights.keep(())
        self._pool = PagePool(self._pool.kv_type)
        del self._executor, self._bound
        trim_heap()

    def cancel(self, sequence: int | None = None) -> None:
        """Cancels runs from another thread: those that include `sequence`, or all; waiting ones too. `run`
        and `generate` then raise CancelledRunError, and sequences keep what they held before the run. Does
        not wait, and does nothing if nothing runs."""
        self._calls.cancel(sequence, list(self._sequences))

    def cancelled(self, sequence: int) -> bool:
        """Whether `cancel` was called for the sequence since it was opened or since the last call of this
        method. For loops of runs, which may have been between two runs at that time."""
        return self._calls.cancelled(sequence)

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """Runs a batch of runs of distinct sequences; the results are in the order of the batch. Waits for
        earlier calls.

        ValueError: a run does not fit its sequence or this stage, or another thread is running the sequence.
        ContextError: a sequence exceeds its context, or no memory for pages. FloatingPointError: NaN or
        infinity in inputs or logits. CancelledRunError: see `cancel`. ModelFileError: a mapped file of the
        model was truncated. After an error the sequences hold the positions before the batch's, and none from
        there on."""
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
            raise ValueError(f"the batch has more than {self.options.max_rows} rows, this stage's max_rows")
        if cancel[0]:
            raise CancelledRunError(CANCELLED)
        rows = [self._rows(run) for run in batch]
        if sum(item.wanted for item in rows) > self._bound.max_wanted:
            raise ValueError(
                f"the batch wants logits of more than {self._bound.max_wanted} rows, this stage's max_wanted"
            )
        hidden = None if self._bound.reads_tokens else _joined([run.hidden for run in batch])
        try:
            outcome = self._executor.run(rows, hidden, any(run.want is Want.LOGITS for run in batch), cancel)
        finally:
            self._weights.check()  # another error may be a consequence of a truncated file
        for run in batch:
            state = self._sequences[run.sequence]
            state.length = run.first + len(run.tokens)
            state.kv.ran(state.length)
        return self._results(batch, rows, outcome)

    def _rows(self, run: Run) -> SequenceRows:
        """Checks one run, truncates its sequence to the run's first position, and allocates its pages."""
        state = self._sequences.get(run.sequence)
        n, end = len(run.tokens), run.first + len(run.tokens)
        if state is None:
            raise ValueError(f"sequence {run.sequence} is not open")
        if n == 0 or not 0 <= run.first <= state.length:
            raise ValueError(
                f"sequence {run.sequence} holds {state.length} positions and cannot run {n} rows from "
                f"position {run.first}"
            )
        if end > len(state.tokens):
            raise ContextError(
                f"sequence {run.sequence} would have {end} positions, more than its context of "
                f"{len(state.tokens)}"
            )
        self._check_tokens(run.tokens)
        if not self._bound.reads_tokens:
            width = self.model.program.cut_cols
            if run.hidden is None or run.hidden.shape != (n, width):
                raise ValueError(
                    f"the stage of units [{self.first}, {self.last}) needs hidden rows of shape "
                    f"({n}, {width})"
                )
        state.kv.check(run.first)
        state.length = min(state.length, run.first)  # set to the new length once the run succeeds
        state.kv.prepare(run.first, end)
        state.tokens[run.first : end] = run.tokens
        want = run.want if self._bound.last else Want.NOTHING
        wanted = {Want.NOTHING: 0, Want.TOKEN: 1, Want.LOGITS: n}[want]
        return SequenceRows(state.kv, state.tokens, state.sampling, n, run.first, wanted, want is Want.TOKEN)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if len(tokens) and (min(tokens) < 0 or max(tokens) >= self.model.program.vocab):
            raise ValueError(f"a token id is not in [0, {self.model.program.vocab})")

    def _free_number(self, sequence: int | None) -> int:
        """The given sequence number, or a free one for None. ValueError: it is taken."""
        if sequence is None:
            sequence = min([0, *self._sequences]) - 1  # negative: callers usually choose from 0 up
        if sequence in self._sequences:
            raise ValueError(
                f"sequence {sequence} is already open: concurrent answers need distinct sequence numbers"
            )
        self._calls.forget([sequence])
        return sequence

    def _restart(self, lost: Sequence[int]) -> None:
        """Prepares a forked process: new threads, workspace and locks; closes the sequences `lost`."""
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
    """Binds the ops of units [first, last) to their weights. KeyError: a unit is not loaded."""
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
