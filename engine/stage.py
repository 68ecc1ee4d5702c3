"""A stage: a contiguous range of a model's units with their weights, and the sequences that run through it.

`Stage(model, 0, n)` is the engine that other programs embed; over a network, stages form a chain. A stage
combines three parts with separate lifetimes: weights by unit (`weights`), keys and values by sequence and
unit (`kv`), and an executor for the range, whose threads outlive it (`backends`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .backends import choose
from .backends.base import CANCELLED, BoundProgram, Executor, SequenceRows
from .batch import Result, Run, Sampling, Want
from .calls import Calls, Flag
from .checked_runs import check_inputs, check_tokens, joined_hidden, results_of, rows_of
from .errors import CancelledRunError, ContextError, MissingDependencyError, ShoalError
from .incoming import Arriving, Incoming
from .kept_rows import KeptRows
from .kv import KvRows, PagePool, SequenceKv
from .kv_page import page_bytes
from .layout import PAGE
from .memory import trim_heap
from .model_directory import Model
from .prepared import PreparedRange
from .ranges import Ranges
from .threads import chosen
from .transition import OpenSequence, Transition

_STOPPED = np.ones(1, np.int32)
"""The cancel flag of a run that is cancelled before it begins."""


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
    keep_rows: bool = False
    """Keep the rows that runs return, as far as keys and values leave room (`Stage.kept_rows`)."""
    resident: bool | None = None
    """Where weights are. True: read into memory (faster), and locked there as far as the system allows.
    False: in mappings of the files, which the system can drop when memory runs short. None: read into
    memory if that takes at most half of the available RAM, else mapped."""


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
        self._sequences: dict[int, OpenSequence] = {}
        self._ended: deque[int] = deque()  # sequences to be closed
        self._calls = Calls(self._close_ended, self._restart)
        self._states = [unit.states for unit in model.program.units]
        self._pool = PagePool(model.kv_dtype, options.kv_bytes)
        self._kept = KeptRows(self._pool, model.program.cut_cols)
        self._pool.spare = self._spare
        self._incoming: list[Incoming] = []
        self._ranges = Ranges(model, first, last, options, threads, self._pool, self._calls.check)
        self._weights = self._ranges.weights

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """Backend and kernel set for display, such as "native (avx512)"."""
        return self._ranges.backend.name

    @property
    def exact(self) -> bool:
        """Whether results have the same bits on every device (docs/numerics.md)."""
        return self._ranges.backend.exact

    @property
    def bound(self) -> BoundProgram:
        """The ops of the units, bound to their weights in memory."""
        return self._running.bound

    @property
    def _running(self) -> PreparedRange:
        return self._ranges.running

    @property
    def _executor(self) -> Executor:
        return self._running.executor

    @property
    def held(self) -> frozenset[int]:
        """The units of which `hold` keeps copies now."""
        return self._weights.units.intersection(self._ranges.copies.units)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages of keys and values in use by sequences, incoming ones included."""
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
            context = self._check_parameters(context, [*history, *(token for token, _ in sampling.bias)])
            if len(history) > context:
                raise ContextError(f"a history of {len(history)} tokens exceeds the context of {context}")
            number = self._free_number(sequence)
            kv = SequenceKv(self._pool, self._states, context)
            kv.arrange(self.first, self.last)
            self._sequences[number] = OpenSequence.begun(kv, context, sampling, history)
            return number

    def fork_sequence(
        self,
        source: int,
        sequence: int | None = None,
        positions: int | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
    ) -> int:
        """Opens a sequence with the first `positions` (None: all) of the sequence `source`, and returns its
        number. Full pages are shared until one of the two writes to them; the last partial page is copied.
        `sampling` and `context`: its own, None for those of the source. KeyError: `source` is not open.
        ValueError: the number is taken, the source has fewer positions, or the sampling biases a token that
        is not in the vocabulary. ContextError: no memory for the copied page, or the context is longer than
        the model's, or shorter than what it begins with."""
        with self._calls.alone():
            state = self._sequences[source]
            n = state.length if positions is None else positions
            if not 0 <= n <= state.length:
                raise ValueError(f"sequence {source} holds {state.length} positions, so {n} cannot be forked")
            sampling = sampling or state.sampling
            context = self._check_parameters(
                len(state.tokens) if context is None else context, [token for token, _ in sampling.bias]
            )
            if n > context:
                raise ContextError(f"{n} positions of sequence {source} exceed the context of {context}")
            number = self._free_number(sequence)
            kv = state.kv.fork(n, context)
            kv.arrange(self.first, self.last)
            self._sequences[number] = OpenSequence.begun(kv, context, sampling, state.tokens[:n])
            return number

    def close_sequence(self, sequence: int) -> None:
        """Closes a sequence and frees its pages. Does nothing if it is not open or the stage is closed. What
        is incoming of it stays until `adopt`, since its giver may not know of the end yet."""
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

    def rows_kept(self, sequence: int, unit: int) -> int:
        """Number of positions, from the first, whose rows into this unit are kept: see `kept_rows`."""
        return self._kept.positions(sequence, unit)

    def kept_rows(self, sequence: int, unit: int, first: int, last: int) -> F32:
        """The rows of positions [first, last) that earlier runs have returned when `unit` was the end of the
        range, so that they can be sent once more. They are kept with `StageOptions.keep_rows`, and dropped
        when keys and values need the room. After the end has changed, a sequence loses them with its next
        run of the whole range. ValueError: they are not kept."""
        return self._kept.rows(sequence, unit, first, last)

    def rehearse(self, sequence: int) -> None:
        """Begins a run of the sequence's next row, and ends it before it computes much, for a thread that
        waits for this row. It brings what `run` needs into the caches of the core: a run reads so many
        weights that nothing else is left there. Nothing changes, and nothing fails. Does nothing if the
        sequence is not open, its next row is the first of a page, or the range is being filled by parts."""
        with self._calls.alone():
            state, running = self._sequences.get(sequence), self._running
            if state is None or not state.length % PAGE or state.length >= len(state.tokens):
                return
            if running.closed or running.has_parts:
                return
            first = running.bound.reads_tokens
            hidden = None if first else np.zeros((1, self.model.program.cut_cols), np.float32)
            want = Want.NOTHING if self.model.program.labels else Want.TOKEN
            with suppress(ShoalError, ValueError, MemoryError):  # the run itself says what is wrong
                self._run([Run(sequence, state.length, (0,), want, hidden)], _STOPPED)

    def settle(self) -> None:
        """Does what the last run has left for later: the rows to keep are copied. The next run, or whoever
        needs them, does so otherwise."""
        self._kept.settle()

    def export_cuts(
        self, sequence: int, units: Sequence[int], cuts: Sequence[tuple[int, int]]
    ) -> list[list[bytes]]:
        """What `export_positions` returns for each of the cuts [first, last) and each of the units, all of it
        between the same two runs. Errors: see `export_positions`."""
        with self._calls.alone():
            kv = self._sequences[sequence].kv
            return [[kv.export(unit, first, last) for unit in units] for first, last in cuts]

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
        """Loads the weights of units [first, last) in advance, so that a later change of the range is quick;
        runs continue meanwhile. The change unloads units that its range does not have; `hold` is for copies
        that stay. ModelFileError: a file is missing or damaged. MemoryError: out of memory. After an error
        nothing has changed."""
        _check_range(self.model, first, last)
        self._ranges.load(first, last)

    def hold(self, units: Sequence[int]) -> None:
        """Loads copies of the weights of these units, in order of preference, and keeps them, whatever the
        range is; runs continue meanwhile. Other copies go. There are only as many as the cap on keys and
        values has room for, and they go, the last ones first, when keys and values need it: `held` tells
        which there are. ValueError: there is no such unit. Other errors: see `load`."""
        for u in units:
            if not 0 <= u < self.model.n_units:
                raise ValueError(f"there is no unit {u}: the model has {self.model.n_units}")
        self._ranges.hold(units)

    def prepare(self, first: int, last: int, kv_bytes: int | None = None) -> PreparedRange:
        """Makes units [first, last) ready to run beside the current range: loads their weights and makes an
        executor; runs continue meanwhile. Ends with `adopt` or `discard`. `kv_bytes` caps keys and values
        from now on, as `limit_kv` does. Errors: see `load`."""
        _check_range(self.model, first, last)
        return self._ranges.prepare(first, last, kv_bytes)

    def leave(self, first: int, last: int) -> None:
        """Unloads the current range, but for units [first, last), where there is no room for another range
        beside it. Nothing can be run until another one has been adopted. Sequences keep their pages."""
        with self._calls.alone():
            self._ranges.leave(first, last)
        self._ranges.unload()

    def discard(self, prepared: PreparedRange) -> None:
        """Undoes `prepare`. Does nothing if the range has been adopted or discarded."""
        if self._calls.closed:
            return
        with self._calls.alone():
            if prepared not in self._ranges.prepared:
                return
            self._ranges.prepared.remove(prepared)
            prepared.close()
        self._ranges.unload()

    def incoming(self) -> Incoming:
        """Opens a staging area for keys and values that arrive from other stages while this one runs. Ends
        with `adopt` or `Incoming.close`."""
        with self._calls.alone():
            self._incoming = [incoming for incoming in self._incoming if not incoming.closed]
            context = self.model.config.context
            self._incoming.append(
                Incoming(self._pool, self._states, context, self._calls.check, self._check_parameters)
            )
            return self._incoming[-1]

    def adopt(
        self,
        prepared: PreparedRange | None,
        sequences: Mapping[int, int],
        incoming: Incoming | None = None,
        lost: range = range(0),
        kv_bytes: int | None = None,
    ) -> None:
        """Changes to a prepared range between two runs; None: the range stays. Sequences that are not among
        `sequences` are closed, the others truncated to the number of positions given there. Units that stay
        keep their pages; those of new units are taken over from `incoming`, and so are sequences that the
        stage does not have. Units in `lost` may lack positions, which parts of runs then fill (`Run.part`); a
        sequence may be unknown here if all units with keys and values are lost. `kv_bytes` is the new cap on
        keys and values; None keeps the old one.

        ValueError: a unit, which the message names, lacks positions; or the range was not prepared here, or
        has been adopted or discarded. ContextError: see `Incoming`. After an error nothing has changed. Pages
        and weights that are not needed any more are freed."""
        with self._calls.alone():
            if prepared is not None and prepared not in self._ranges.prepared:
                raise ValueError("the range is not prepared: it has been adopted or discarded")
            if incoming is not None and incoming not in self._incoming:
                raise ValueError("the staging area is not of this stage, or has been closed")
            if incoming is None:
                self._take_over(prepared or self._running, sequences, {}, lost)
            else:
                with incoming.locked() as arriving:
                    self._take_over(prepared or self._running, sequences, arriving, lost)
                incoming.close()
            old = self._switch(prepared, kv_bytes)
        self._free_range(old)

    def limit_kv(self, kv_bytes: int) -> None:
        """Caps the keys and values of all sequences for a while, as long as another range is prepared for
        instance: `adopt` and `set_range` set another cap. Pages in use stay, and so does `kv_pages`."""
        self._pool.limit = kv_bytes

    def set_range(self, first: int, last: int, kv_bytes: int | None = None) -> None:
        """Changes the stage's range to units [first, last): loads missing units while runs continue, switches
        between two runs, and unloads the others. Sequences keep the pages of units that stay. An added unit
        holds only the positions that were imported; a run that needs more is a ValueError. `kv_bytes` is the
        new cap on keys and values; None keeps the old one. Errors: see `load`. After an error nothing has
        changed."""
        prepared = self.prepare(first, last)
        with self._calls.alone():
            lengths = {number: state.length for number, state in self._sequences.items()}
            self._take_over(prepared, lengths, {}, range(first, last))
            old = self._switch(prepared, kv_bytes)
        self._free_range(old)

    def _take_over(
        self, new: PreparedRange, kept: Mapping[int, int], arriving: Mapping[int, Arriving], lost: range
    ) -> None:
        """The part of `adopt` about sequences. Raises ValueError before it changes anything."""
        old, units = range(self.first, self.last), range(new.first, new.last)
        transition = Transition(old, units, kept, arriving, lost)
        transition.check(self._sequences, self._states)
        self._calls.forget(number for number in kept if number not in self._sequences)
        transition.apply(self._sequences, self._pool, self._states)
        self._kept.keep(kept)

    def _switch(self, prepared: PreparedRange | None, kv_bytes: int | None) -> PreparedRange | None:
        """Makes a prepared range the current one; returns the one before."""
        if kv_bytes is not None:
            self.options = replace(self.options, kv_bytes=kv_bytes)
            self._pool.limit = kv_bytes
        if prepared is None:
            return None
        self.first, self.last = prepared.first, prepared.last
        return self._ranges.switch(prepared)

    def _free_range(self, old: PreparedRange | None) -> None:
        """Frees a range that is no longer the current one, and the weights that only it needed."""
        if old is not None:
            old.close()
            self._ranges.unload()

    def _spare(self) -> bool:
        """Drops an executor of a part, kept rows, or else a copy, for keys and values. False: there are
        none."""
        if self._running.drop_part() or self._kept.drop_one():
            return True
        dropped = self._ranges.copies.drop_one()
        if dropped:
            self._ranges.unload()
        return dropped

    def close(self) -> None:
        """Waits for earlier calls, closes all sequences, and frees threads and memory."""
        if not self._calls.closed:
            self._calls.check()  # a forked process gets a new lock
        self._ranges.close(lambda: self._calls.close(self._end))

    def _end(self) -> None:
        for incoming in self._incoming:
            incoming.close()
        for state in self._sequences.values():
            state.kv.truncate(0)
        self._sequences.clear()
        # Frees weights and pages now, not when this object is collected: the next stage needs the memory.
        self._ranges.free()
        self._pool.clear()
        self._pool = PagePool(self._pool.kv_type)
        self._kept = KeptRows(self._pool, self.model.program.cut_cols)
        self._incoming = []
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
        ContextError: a sequence exceeds its context, or no memory for pages. UnsupportedModelError: a token
        is wanted of a model without an LM head. FloatingPointError: NaN or infinity in inputs or logits.
        CancelledRunError: see `cancel`. ModelFileError: a mapped file of the model was truncated. After an
        error the sequences hold the positions before the batch's, and none from there on."""
        with self._calls.run([run.sequence for run in batch]) as cancel:
            try:
                if cancel[0]:
                    raise CancelledRunError(CANCELLED)
                return self._run(batch, cancel)
            except BaseException:
                for run in batch:
                    if state := self._sequences.get(run.sequence):
                        state.kv.truncate(state.length)
                        self._kept.truncate(run.sequence, state.length)
                raise

    def _run(self, batch: Sequence[Run], cancel: Flag) -> list[Result]:
        if sum(len(run.tokens) for run in batch) > self.options.max_rows:
            raise ValueError(f"the batch has more than {self.options.max_rows} rows, this stage's max_rows")
        self._kept.settle()
        parts = {run.part for run in batch}
        if len(parts) > 1:
            raise ValueError("the runs of a batch are of different parts of the range")
        part = next(iter(parts), None)
        units = self._units(part)
        if not units:
            raise ValueError(f"units {part} are not of this stage, which has [{self.first}, {self.last})")
        if self._running.closed:
            raise ValueError("the range was left, so its weights are not loaded")
        bound, executor = self._running.part(units.start, units.stop)
        rows = [self._rows(run, bound, units) for run in batch]
        if sum(item.wanted for item in rows) > bound.max_wanted:
            raise ValueError(
                f"the batch wants logits of more than {bound.max_wanted} rows, this stage's max_wanted"
            )
        hidden = None if bound.reads_tokens else joined_hidden(batch)
        try:
            outcome = executor.run(rows, hidden, any(run.want is Want.LOGITS for run in batch), cancel)
        finally:
            self._weights.check()  # another error may be a consequence of a truncated file
        for run in batch:
            state, end = self._sequences[run.sequence], run.first + len(run.tokens)
            if part is None:
                state.length = end
                state.kv.ran(end)
            else:
                state.length = max(state.length, end)
                state.kv.ran_part(end, units)
        results = results_of(batch, rows, outcome)
        if self.options.keep_rows and units.stop == self.last:
            for result in results:
                if result.hidden is not None:
                    where = result.sequence, self.last, result.first
                    self._kept.note_later(*where, result.hidden, part=part is not None)
        return results

    def _units(self, part: tuple[int, int] | None) -> range:
        """The units of the range that are in a part; None: all of them."""
        if part is None:
            return range(self.first, self.last)
        return range(max(part[0], self.first), min(part[1], self.last))

    def _rows(self, run: Run, bound: BoundProgram, units: range) -> SequenceRows:
        """Checks one run, and allocates its pages. Truncates its sequence to the run's first position, unless
        only a part of the units runs."""
        state = self._sequences.get(run.sequence)
        if state is None:
            raise ValueError(f"sequence {run.sequence} is not open")
        check_inputs(run, state, self.model, bound, units)
        state.kv.check(run.first, units)
        if run.part is None:
            state.length = min(state.length, run.first)  # set to the new length once the run succeeds
        kv = self._allocated(state.kv, run, units)
        end = run.first + len(run.tokens)
        state.tokens[run.first : end] = run.tokens
        if run.history is not None:
            state.tokens[:end] = run.history
        return rows_of(run, state, kv, self.model, bound)

    def _allocated(self, kv: SequenceKv, run: Run, units: range) -> KvRows:
        """Allocates the pages of a run. What is incoming makes room for it. ContextError: no memory."""
        end = run.first + len(run.tokens)
        while True:
            try:
                if run.part is not None:
                    return kv.prepare_part(run.first, end, units)
                kv.prepare(run.first, end)
                return kv
            except ContextError:
                made = [incoming.make_room() for incoming in self._incoming]
                if not any(made):
                    raise

    def _check_parameters(self, context: int | None, tokens: Sequence[int]) -> int:
        """The context of a new sequence with these tokens; None: the model's. ContextError: it is longer than
        the model's. ValueError: a token is not in the vocabulary."""
        longest = self.model.config.context
        context = longest if context is None else context
        if not 0 < context <= longest:
            raise ContextError(
                f"a context of {context} tokens is not between 1 and the model's {longest}"
                f"{self.model.config.limit}"
            )
        check_tokens(tokens, self.model)
        return context

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
        self._pool.unlock()
        self._kept.unlock()
        for incoming in self._incoming:
            incoming.unlock()
        self._ranges.restart()

    def _close_ended(self) -> None:
        while self._ended:
            number = self._ended.popleft()
            self._kept.forget(number)
            self._calls.forget([number])
            if state := self._sequences.pop(number, None):
                state.kv.truncate(0)


def _check_range(model: Model, first: int, last: int) -> None:
    if not 0 <= first < last <= model.n_units:
        raise ValueError(f"units [{first}, {last}) are not a range of this model's {model.n_units} units")
