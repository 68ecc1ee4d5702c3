"""The work of a stage on batches: blocking calls for a worker thread, without any network.

Its input is the batches of the inbox, and its output is the messages to send: sessions and hidden rows for
the next node, tokens and failures for the coordinator. The failure of one session never affects others in its
batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

from ..engine.arrays import F32
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

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages in use."""

    def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> object:
        """Begins a sequence."""

    def run(self, batch: Sequence[Run]) -> list[StageResult]:
        """Runs rows of distinct sequences."""

    def close_sequence(self, sequence: int) -> None:
        """Ends a sequence; does nothing if it is not open."""

    def export_cuts(
        self, sequence: int, units: Sequence[int], cuts: Sequence[tuple[int, int]]
    ) -> list[list[bytes]]:
        """Keys and values of the positions [first, last) of each cut, of each of the units."""

    def rows_kept(self, sequence: int, unit: int) -> int:
        """Number of positions, from the first, whose rows into a unit the stage has kept."""

    def kept_rows(self, sequence: int, unit: int, first: int, last: int) -> F32:
        """Rows of positions [first, last) into a unit. ValueError: they are not kept."""

    def prepare(self, first: int, last: int, kv_bytes: int | None = None) -> Any:
        """Loads another range beside the running one, for `adopt`. Blocks; runs go on meanwhile. `kv_bytes`
        is the most bytes of keys and values from now on."""

    def discard(self, prepared: Any) -> None:
        """Undoes `prepare`."""

    def incoming(self) -> IncomingLike:
        """A place for sequences that arrive from other stages, for `adopt`."""

    def adopt(
        self,
        prepared: Any,
        sequences: Mapping[int, int],
        incoming: Any = None,
        lost: range = range(0),
        kv_bytes: int | None = None,
    ) -> None:
        """Changes to a prepared range (None: the same) between two runs: the sequences keep so many
        positions, all others end. ValueError: a unit that is not lost lacks positions."""

    @property
    def held(self) -> frozenset[int]:
        """The units of whose weights there are copies."""

    def hold(self, units: Sequence[int]) -> None:
        """Loads copies of the weights of these units, in order of preference, as far as there is room; others
        go. Blocks; runs go on meanwhile."""

    def limit_kv(self, kv_bytes: int) -> None:
        """Sets the most bytes of keys and values."""

    def close(self) -> None:
        """Ends the stage."""


class IncomingLike(Protocol):
    """The members of engine.incoming.Incoming that a node uses."""

    def carried(
        self, sequence: int, sampling: Sampling, context: int, first: int, tokens: Sequence[int]
    ) -> None:
        """Takes the parameters and tokens of a sequence that the stage does not have."""

    def accept(self, sequence: int, unit: int, first: int, last: int, data: bytes | memoryview) -> None:
        """Takes what `export_cuts` returned on another stage."""

    def close(self) -> None:
        """Forgets all that has arrived."""


@dataclass(slots=True)
class Session:
    """An open session: its parameters, and the token ids of its positions. `carried`: it was open in an
    earlier epoch, and its Open may be sent again."""

    sampling: Sampling
    context: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    carried: bool = False

    def truncated(self, positions: int) -> Session:
        """The session with its first positions, for the next epoch."""
        return Session(self.sampling, self.context, self.tokens[:positions], carried=True)


NO_SESSIONS: Mapping[int, Session] = {}


@dataclass(slots=True)
class _Tally:
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0

    def work(self) -> Work:
        return Work(self.steps, self.rows, self.seconds)


class StageWork:
    """A stage in one epoch with its open sessions and statistics. Not thread-safe: one call at a time. Other
    threads may read `sessions`, and use `rewinds`, meanwhile.

    `last`: the end of the stage's units; None if it is the end of the model. `sessions` are carried over from
    an earlier epoch, and are open in the stage. `make_room` is called when keys and values have no room, and
    tells whether it has made some."""

    def __init__(
        self,
        stage: StageLike,
        epoch: Epoch,
        last: int | None,
        sessions: Mapping[int, Session] = NO_SESSIONS,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stage, self._epoch, self._last, self._make_room = stage, epoch, last, make_room
        self.sessions = dict(sessions)
        self._rewinds: tuple[dict[int, int], ...] = ()
        self._decode, self._prefill = _Tally(), _Tally()

    @property
    def busy(self) -> bool:
        """Whether sessions are open."""
        return bool(self.sessions)

    @contextmanager
    def rewinds(self) -> Iterator[dict[int, int]]:
        """A dict in which, within the block, the lowest position that each session has run is noted after the
        run. The caller removes what it has seen."""
        noted: dict[int, int] = {}
        self._rewinds = (*self._rewinds, noted)  # a new tuple, since the stage's thread may go through it
        try:
            yield noted
        finally:
            self._rewinds = tuple(other for other in self._rewinds if other is not noted)

    def do(self, batch: Batch) -> list[Answer]:
        """Carries out a batch; returns the messages to send, in order. ModelFileError: a file of the stage is
        damaged."""
        answers: list[Answer] = []
        for notice in batch.notices:
            answers += self._open(notice) if isinstance(notice, Open) else self._close(notice)
        # A session that is not open here has failed, and its Close is on the way: its rows are dropped.
        steps = [step for step in batch.steps if step.session in self.sessions]
        done = [answer for _, alike in groupby(steps, _part) for answer in self._run(list(alike))]
        return answers + _together(done)

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

    def _open(self, notice: Open) -> list[Answer]:
        known = self.sessions.get(notice.session)
        try:
            if known is None:
                if len(self.sessions) >= MOST_SESSIONS:
                    raise ContextError(
                        f"{MOST_SESSIONS} sessions are open, the most that a node serves: end one"
                    )
                self._stage.open_sequence(notice.session, notice.sampling, notice.context)
                self.sessions[notice.session] = Session(notice.sampling, notice.context)
                self._note(notice.session, 0)
            elif not known.carried or (known.sampling, known.context) != (notice.sampling, notice.context):
                raise ValueError(f"session {notice.session} is open already")
            else:
                known.carried = False
        except STAGE_ERRORS as error:
            return [self._failed(notice.session, error)]
        return [notice] if self._last is not None else []

    def _close(self, notice: Close) -> list[Answer]:
        self._forget(notice.session)
        return [notice] if self._last is not None else []

    def _run(self, steps: Sequence[Step]) -> list[Answer]:
        try:
            steps = [self._with_rows(step) for step in steps]
            if self._behind(steps[0].part):
                return list(steps)
            results = self._stage.run([self._as_run(step) for step in steps])
        except ModelFileError:  # no session is at fault: the stage cannot go on
            raise
        except STAGE_ERRORS as error:
            if len(steps) > 1:  # runs them one by one to find the session at fault
                return [answer for step in steps for answer in self._run([step])]
            if isinstance(error, ContextError) and self._make_room():
                return self._run(steps)
            self._forget(steps[0].session)
            return [self._failed(steps[0].session, error)]
        for step in steps:
            self._ran(step)
        return [self._passed_on(step, result) for step, result in zip(steps, results, strict=True)]

    def _with_rows(self, step: Step) -> Step:
        """A Step of a refill with the rows that the stage has kept. ValueError: it has dropped them."""
        if step.part is None or step.part[0] == 0 or step.hidden is not None:
            return step
        end = step.first + len(step.tokens)
        return replace(step, hidden=self._stage.kept_rows(step.session, step.part[0], step.first, end))

    def _behind(self, part: tuple[int, int] | None) -> bool:
        """Whether a part of the model begins behind this stage, so that its rows are only passed on."""
        return part is not None and self._last is not None and part[0] >= self._last

    def _as_run(self, step: Step) -> Run:
        return Run(step.session, step.first, step.tokens, step.want, step.hidden, step.part)

    def _ran(self, step: Step) -> None:
        """Notes the tokens of rows that have run. Rows of a part are positions that the session has already,
        or their continuation."""
        tokens, end = self.sessions[step.session].tokens, step.first + len(step.tokens)
        tokens[step.first : max(end, len(tokens)) if step.part is None else end] = array("i", step.tokens)
        self._note(step.session, step.first)

    def _note(self, session: int, first: int) -> None:
        for noted in self._rewinds:
            noted[session] = min(noted.get(session, first), first)

    def _passed_on(self, step: Step, result: StageResult) -> Answer:
        ends = self._last is None or (step.part is not None and step.part[1] <= self._last)
        if ends:
            return Result(step.session, step.epoch, step.first, len(step.tokens), result.token)
        assert result.hidden is not None, "every stage but the last returns hidden rows"
        return replace(step, hidden=result.hidden, more=False)

    def _forget(self, session: int) -> None:
        self.sessions.pop(session, None)
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


def _part(step: Step) -> tuple[int, int] | None:
    return step.part
