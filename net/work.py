"""The work of a stage on batches: blocking calls for a worker thread, without any network.

Its input is the batches of the inbox, and its output is the messages to send: sessions and hidden rows for
the next node, tokens and failures for the coordinator. The failure of one session never affects others in its
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..engine.batch import Result as StageResult
from ..engine.batch import Run, Sampling
from ..engine.errors import ContextError, ModelFileError, ShoalError
from .errors import to_wire
from .inbox import Batch, decodes
from .messages import MOST_SESSIONS, Close, Epoch, Failed, Open, Result, Stats, Step, Work

STAGE_ERRORS = (ShoalError, ValueError, FloatingPointError, MemoryError)
"""Exceptions of a stage for invalid rows, or rows without room. They end a session, not the node."""

Answer = Open | Close | Step | Result | Failed


class StageLike(Protocol):
    """The members of engine.stage.Stage that a node uses."""

    @property
    def kv_pages(self) -> int | None:
        """Pages of keys and values in each layer that all sequences may hold; None: no limit."""

    @property
    def page_positions(self) -> int:
        """Positions of a page."""

    def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> object:
        """Begins a sequence."""

    def run(self, batch: Sequence[Run]) -> list[StageResult]:
        """Runs rows of distinct sequences."""

    def close_sequence(self, sequence: int) -> None:
        """Ends a sequence; does nothing if it is not open."""

    def close(self) -> None:
        """Ends the stage."""


@dataclass(slots=True)
class _Tally:
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0

    def work(self) -> Work:
        return Work(self.steps, self.rows, self.seconds)


class StageWork:
    """A stage in one epoch with its open sessions and statistics. Not thread-safe: one call at a time."""

    def __init__(self, stage: StageLike, epoch: Epoch, *, last: bool) -> None:
        self._stage, self._epoch, self._last = stage, epoch, last
        self._sessions: set[int] = set()
        self._decode, self._prefill = _Tally(), _Tally()

    @property
    def busy(self) -> bool:
        """Whether sessions are open."""
        return bool(self._sessions)

    def do(self, batch: Batch) -> list[Answer]:
        """Carries out a batch; returns the messages to send, in order. ModelFileError: a file of the stage is
        damaged."""
        answers: list[Answer] = []
        for notice in batch.notices:
            answers += self._open(notice) if isinstance(notice, Open) else self._close(notice)
        # A session that is not open here has failed, and its Close is on the way: its rows are dropped.
        steps = [step for step in batch.steps if step.session in self._sessions]
        return answers + _together(self._run(steps) if steps else [])

    def count(self, batch: Batch, seconds: float) -> None:
        """Adds a batch that took `seconds` to the statistics."""
        rows = [len(step.tokens) for step in batch.steps]
        if rows:
            tally = self._decode if max(rows) == 1 else self._prefill
            tally.steps, tally.rows = tally.steps + 1, tally.rows + sum(rows)
            tally.seconds += seconds

    def stats(self) -> Stats:
        """The work so far."""
        return Stats(self._epoch, self._decode.work(), self._prefill.work())

    def close(self) -> None:
        """Ends the stage."""
        self._stage.close()

    def _open(self, notice: Open) -> list[Answer]:
        try:
            if notice.session in self._sessions:
                raise ValueError(f"session {notice.session} is open already")
            if len(self._sessions) >= MOST_SESSIONS:
                raise ContextError(f"{MOST_SESSIONS} sessions are open, the most that a node serves: end one")
            self._stage.open_sequence(notice.session, notice.sampling, notice.context)
        except STAGE_ERRORS as error:
            return [self._failed(notice.session, error)]
        self._sessions.add(notice.session)
        return [] if self._last else [notice]

    def _close(self, notice: Close) -> list[Answer]:
        self._forget(notice.session)
        return [] if self._last else [notice]

    def _run(self, steps: Sequence[Step]) -> list[Answer]:
        runs = [Run(step.session, step.first, step.tokens, step.want, step.hidden) for step in steps]
        try:
            results = self._stage.run(runs)
        except ModelFileError:  # no session is at fault: the stage cannot go on
            raise
        except STAGE_ERRORS as error:
            if len(steps) > 1:  # runs them one by one to find the session at fault
                return [answer for step in steps for answer in self._run([step])]
            self._forget(steps[0].session)
            return [self._failed(steps[0].session, error)]
        return [self._passed_on(step, result) for step, result in zip(steps, results, strict=True)]

    def _passed_on(self, step: Step, result: StageResult) -> Answer:
        if self._last:
            return Result(step.session, step.epoch, step.first, len(step.tokens), result.token)
        assert result.hidden is not None, "every stage but the last returns hidden rows"
        return Step(step.session, step.epoch, step.first, step.tokens, step.want, result.hidden)

    def _forget(self, session: int) -> None:
        self._sessions.discard(session)
        self._stage.close_sequence(session)

    def _failed(self, session: int, error: Exception) -> Failed:
        if isinstance(error, MemoryError):
            error = ContextError(
                "the system had no memory for these rows: end other requests, or other programs on that node"
            )
        return Failed(session, self._epoch, *to_wire(error))


def _together(answers: list[Answer]) -> list[Answer]:
    """The answers of one call: rows of sequences that decode first, of which each but the last says that more
    of them follow. Rows of prompts need not stay with them."""
    decoding = [answer for answer in answers if isinstance(answer, Step) and decodes(answer)]
    others = [answer for answer in answers if not (isinstance(answer, Step) and decodes(answer))]
    return [*(replace(step, more=step is not decoding[-1]) for step in decoding), *others]
