"""The interface of backends: a backend makes executors for bound ranges of units, and executors run
batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..batch import Logprobs, Sampling
from ..kv import KvRows
from ..program import KvState, Op, Program

CANCELLED = "the run was cancelled: its positions are empty, earlier ones are kept"


class WeightData(Protocol):
    """A weight in memory: row-major f32 or f64, or packed int8 or int4 (uint8) values with f16 scales and,
    for int4, minima or None (see `packing`)."""

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
    """Units [first, last) of a program with their weights: everything that a backend needs of a model."""

    program: Program
    ops: tuple[tuple[int, Op], ...]
    """Ops (unit, op) in order; ops of the prologue have unit -1."""
    weights: dict[tuple[int, str], WeightData]
    states: tuple[tuple[int, KvState], ...]
    """States (unit, state) in order. The index of a state is its row in every page table."""
    kv_type: str
    reads_tokens: bool
    """Whether the range starts with the embedding; else its input is the cut."""
    last: bool
    """Whether the range ends with the head; its output is logits instead of the cut."""
    max_rows: int
    max_wanted: int


@dataclass(slots=True)
class SequenceRows:
    """Rows of one sequence within a batch."""

    kv: KvRows
    history: NDArray[np.int32]
    """Token ids by position, including those of this batch's rows."""
    sampling: Sampling
    rows: int
    first: int
    wanted: int
    """Number of logit rows, the last ones: 0, 1 or `rows`."""
    sample: int
    """From how many of the last rows a token is drawn: 0, 1 or `wanted`."""
    report: int | None = None
    """Log-probabilities of each drawn or given token are reported, and of so many of the likeliest; None:
    none are."""
    allowed: NDArray[np.uint8] | None = None
    """See batch.Run."""
    given: NDArray[np.int32] | None = None
    """The token `[wanted]` of each wanted row, where none are drawn."""
    output: bool = False
    """Whether the rows of the program's `output` are wanted. If one sequence wants its, those of all are
    given."""


@dataclass(slots=True)
class Outcome:
    """The output of a batch: the cut `[rows, hidden]`, or logits `[wanted, vocab]`; the drawn or given token
    `[wanted]` of each wanted row, or -1; the log-probabilities that are reported, by wanted row; and the
    program's `output` `[rows, hidden]`."""

    hidden: F32 | None
    logits: F32 | None
    drawn: NDArray[np.int32]
    reports: dict[int, Logprobs] = field(default_factory=dict)
    output: F32 | None = None


class Executor(Protocol):
    """Runs batches through a bound range of units. Not thread-safe: one batch at a time."""

    def run(
        self,
        sequences: Sequence[SequenceRows],
        hidden: F32 | None,
        want_logits: bool,
        cancel: NDArray[np.int32],
    ) -> Outcome:
        """Runs a batch. `hidden` is the cut `[rows, hidden]`, None if the range starts with the embedding.
        Setting `cancel[0]` to 1 from another thread ends the run after the current op.

        FloatingPointError: NaN or infinity in the inputs or logits. CancelledRunError: the run was
        cancelled."""

    def close(self) -> None:
        """Frees the workspace. May be called repeatedly."""


class Backend(Protocol):
    """Kernels and threads, which outlive the executors that use them."""

    @property
    def name(self) -> str:
        """Backend and kernel set for display, such as "native (avx512)"."""

    @property
    def exact(self) -> bool:
        """Whether results have the same bits on every device (docs/numerics.md)."""

    def executor(self, bound: BoundProgram) -> Executor:
        """Makes an executor; close it before the backend. ShoalError: the program is invalid, or out of
        memory."""

    def close(self) -> None:
        """Ends the threads. May be called repeatedly."""
