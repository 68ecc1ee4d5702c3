"""What a backend is: it makes executors for bound ranges of units, which run batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..batch import Sampling
from ..kv import SequenceKv
from ..program import KvState, Op, Program

CANCELLED = "the run was cancelled: its positions hold nothing, those before them are kept"


class WeightData(Protocol):
    """A weight in memory, as `shards` opens it: f32 (or f64) row-major, or packed int8 or int4
    (uint8) with f16 scales and, int4 only, mins that may be None."""

    @property
    def data(self) -> NDArray[Any]: ...
    @property
    def scales(self) -> NDArray[np.float16] | None: ...
    @property
    def mins(self) -> NDArray[np.float16] | None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...


@dataclass(frozen=True, slots=True)
class BoundProgram:
    """Units [first, last) of a program with their weights: all that a backend needs to know of a
    model."""

    program: Program
    ops: tuple[tuple[int, Op], ...]
    """(unit, op) in order; the prologue's unit is -1."""
    weights: dict[tuple[int, str], WeightData]
    states: tuple[tuple[int, KvState], ...]
    """(unit, state) in order: the index is the state's row in every page table."""
    kv_type: str
    reads_tokens: bool
    """The range starts with the embedding; else it starts from the cut."""
    last: bool
    """The range ends with the head: it has logits instead of a cut."""
    max_rows: int
    max_wanted: int


@dataclass(slots=True)
class SequenceRows:
    """Rows of one sequence within a batch."""

    kv: SequenceKv
    history: NDArray[np.int32]
    """Token ids by position, those of this batch's rows included."""
    sampling: Sampling
    rows: int
    first: int
    wanted: int
    """How many of the last rows want logits: 0, 1 or rows."""
    sample: bool


@dataclass(slots=True)
class Outcome:
    """What a batch gave: the cut `[rows, hidden]`, or the logits `[wanted, vocab]` and one token (or -1)
    a sequence."""

    hidden: F32 | None
    logits: F32 | None
    drawn: NDArray[np.int32]


class Executor(Protocol):
    """A bound range of units, ready to run. Not thread-safe: one batch at a time."""

    def run(
        self,
        sequences: Sequence[SequenceRows],
        hidden: F32 | None,
        want_logits: bool,
        cancel: NDArray[np.int32],
    ) -> Outcome:
        """Runs a batch. `hidden` is the cut `[rows, hidden]`, None when the range starts with the
        embedding. Another thread may set `cancel[0]` to 1, which ends the run after the operation under
        way.

        FloatingPointError: NaN or infinity among the inputs or in the logits. CancelledRunError:
        cancelled."""

    def close(self) -> None:
        """Frees the workspace; harmless when repeated."""


class Backend(Protocol):
    """What computes: kernels and threads, which outlive the executors that they run."""

    @property
    def name(self) -> str:
        """Backend and instruction set, as a person would say it: "native (avx512)"."""

    @property
    def exact(self) -> bool:
        """True when results are the same bits everywhere (docs/numerics.md)."""

    def executor(self, bound: BoundProgram) -> Executor:
        """An executor, which is to be closed before the backend. ShoalError: the program is not sound, or
        there is no memory for it."""

    def close(self) -> None:
        """Ends the threads; harmless when repeated."""
