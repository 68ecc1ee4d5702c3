"""The work of a stage on batches: blocking calls for a worker thread, without any network.

Its input is the batches of the inbox, and its output is the messages to send: sessions and hidden rows for
the next node, tokens and failures for the coordinator. The failure of one session never affects others in its
batch.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

from ..engine.arrays import F32
from ..engine.batch import Result as StageResult
from ..engine.batch import Run, Sampling, Want
from ..engine.errors import (
    CancelledRunError,
    ContextError,
    ModelFileError,
    OperatingSystemError,
    ShoalError,
)
from .errors import to_wire
from .inbox import Batch, decodes
from .messages import MOST_SESSIONS, Close, Draw, Epoch, Failed, Open, Result, Rows, Stats, Step, Work
from .tags import counted, spanned

STAGE_ERRORS = (ShoalError, ValueError, FloatingPointError, MemoryError)
"""Exceptions of a stage for invalid rows, or rows without room. They end a session, not the node."""

PORTION_BYTES = 1 << 20
"""About the most bytes of keys and values that a stage reads at once for others, and that are in memory."""

Answer = Open | Close | Step | Result | Rows | Failed


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

    def fork_sequence(
        self, source: int, sequence: int, positions: int, sampling: Sampling, context: int
    ) -> object:
        """Begins a sequence with the first positions of another one, which it shares with it."""

    def run(self, batch: Sequence[Run]) -> list[StageResult]:
        """Runs rows of distinct sequences. CancelledRunError: see `cancel`."""

    def rehearse(self, sequence: int) -> None:
        """Begins a run of a sequence's next row and changes nothing, so that the run itself begins sooner."""

    def settle(self) -> None:
        """Does what the last run has left for later."""

    def cancel(self, sequence: int) -> None:
        """Ends the run that includes the sequence, from another thread; does nothing if there is none."""

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

    def leave(self, first: int, last: int) -> None:
        """Unloads the running range but for units [first, last); no run follows before `adopt`."""

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

    def alike(self, sequence: int) -> Mapping[int, int]:
        """By other sequence: how many positions are said to have the same tokens."""

    def carried(
        self, sequence: int, sampling: Sampling, context: int, first: int, tokens: Sequence[int]
    ) -> None:
        """Takes the parameters and tokens of a sequence that the stage does not have."""

    def accept(self, sequence: int, unit: int, first: int, last: int, data: bytes | memoryview) -> None:
        """Takes what `export_cuts` returned on another stage."""

    def share(self, sequence: int, source: int, units: Collection[int], positions: int) -> None:
        """Gives a sequence positions of these units that have arrived for another one."""

    def close(self) -> None:
        """Forgets all that has arrived."""


@dataclass(slots=True)
class Session:
    """An open session: its context, the positions that it has, and the tags of their chunks (net/tags.py).
    `carried`: it was open in an earlier epoch, and its Open may be sent again."""

    context: int
    positions: int = 0
    tags: array[int] = field(default_factory=lambda: array("Q"))
    carried: bool = False

    def truncated(self, positions: int) -> Session:
        """The session with its first positions, for the next epoch."""
        return Session(self.context, positions, self.tags[spanned(0, positions)], carried=True)

    def write(self, first: int, last: int, tags: Sequence[int]) -> None:
        """Has the positions [first, last), with these tags, and none after them."""
        if first < self.positions:
            self.cut(first)
        self.tags.extend(tags)  # first, since another thread must not find too few
        self.positions = last

    def cut(self, positions: int) -> None:
        """Has no more than so many positions."""
        self.positions = positions
        del self.tags[spanned(0, positions).stop :]


NO_SESSIONS: Mapping[int, Session] = {}


def blank(rows: int) -> array[int]:
    """What takes the place of token ids where the engine reads none."""
    return array("i", bytes(4 * rows))


@dataclass(slots=True)
class _Tally:
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0

    def work(self) -> Work:
        return Work(self.steps, self.rows, self.seconds)


class StageWork:
    """A stage in one epoch with its open sessions and statistics. Not thread-safe: one call at a time. Other
    threads may read `sessions`, and use `rewinds` and `closed`, meanwhile.

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
        self.calling: Mapping[int, int] = {}
        """The first position of each session in the present call. Until the call has ended, its tokens may
        be older than its keys and values; then the call is among the `rewinds`."""
        self.cancelled = False
        """Whether rows of the last batch were dropped, so that its time says nothing about the stage."""
        self._living: set[int] = set()
        """The sessions in the present call that have not been closed."""
        self._guard = threading.Lock()
        """Held while a cancel looks at `_living`, so that the call cannot end before it is cancelled."""
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
        self.cancelled, self._living = False, {step.session for step in batch.steps}
        try:
            for notice in batch.notices:
                answers += self._open(notice) if isinstance(notice, Open) else self._close(notice)
            # A session that is not open here has failed, and its Close is on the way: its rows are dropped.
            steps = [step for step in batch.steps if step.session in self.sessions]
            with self._guard:
                self.calling = {step.session: step.first for step in steps}
                self._living &= self.calling.keys()
            done = [answer for _, alike in groupby(steps, _part) for answer in self._run(list(alike))]
        finally:
            with self._guard:
                self.calling, self._living = {}, set()
        return answers + _together(done)

    def closed(self, notice: Close) -> None:
        """Hears, in any thread, of a Close that has arrived and is in no batch yet. Once all sessions of the
        present call have been closed, the call is cancelled."""
        with self._guard:
            if notice.epoch == self._epoch and notice.session in self._living:
                self._living.remove(notice.session)
                if not self._living:
                    for session in self.calling:
                        self._stage.cancel(session)

    def count(self, batch: Batch, seconds: float) -> None:
        """Adds the last batch, which took `seconds`, to the statistics, unless it was cancelled."""
        rows = [step.rows for step in batch.steps]
        if rows and not self.cancelled:
            tally = self._decode if max(rows) == 1 else self._prefill
            tally.steps, tally.rows = tally.steps + 1, tally.rows + sum(rows)
            tally.seconds += seconds

    def rehearse(self, session: int) -> None:
        """Goes through the beginning of the next run of a session, if it is open."""
        if session in self.sessions:
            self._stage.rehearse(session)

    def settle(self) -> None:
        """Does what need not be done before the answers of a batch are sent."""
        self._stage.settle()

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
                self.sessions[notice.session] = self._begun(notice)
                self._note(notice.session, 0)
            elif not known.carried or known.context != notice.context:
                raise ValueError(f"session {notice.session} is open already")
            else:
                known.carried = False
        except STAGE_ERRORS as error:
            return [self._failed(notice.session, error)]
        return [notice] if self._last is not None else []

    def _begun(self, notice: Open) -> Session:
        """Begins a session in the stage, alone or with positions of another one. ValueError: that one does
        not hold them here."""
        if notice.source is None:
            if notice.positions:
                raise ValueError(f"session {notice.session} begins with positions of no other session")
            self._stage.open_sequence(notice.session, Sampling(), notice.context)
            return Session(notice.context)
        source, n = self.sessions.get(notice.source), notice.positions
        if source is None or not 0 < n <= source.positions:
            raise ValueError(
                f"session {notice.session} cannot begin with {n} positions of session {notice.source}, which "
                f"{'is not open' if source is None else f'holds {source.positions}'} here"
            )
        self._stage.fork_sequence(notice.source, notice.session, n, Sampling(), notice.context)
        return Session(notice.context, n, source.tags[spanned(0, n)])

    def _close(self, notice: Close) -> list[Answer]:
        self._forget(notice.session)
        return [notice] if self._last is not None else []

    def _run(self, steps: Sequence[Step]) -> list[Answer]:
        try:
            steps = [self._with_rows(step) for step in steps]
            if self._behind(steps[0].part):
                return list(steps)
            runs = [self._as_run(step) for step in steps]
            if not self._living:
                raise CancelledRunError("all sessions of the call were closed before it began")
            results = self._stage.run(runs)
        except CancelledRunError:  # the Closes follow, and until then others may begin with what is left
            self._drop(steps)
            return []
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
        end = step.first + step.rows
        kept = self._stage.kept_rows(step.session, step.part[0], step.first, end)
        return replace(step, tokens=(), hidden=kept)

    def _behind(self, part: tuple[int, int] | None) -> bool:
        """Whether a part of the model begins behind this stage, so that its rows are only passed on."""
        return part is not None and self._last is not None and part[0] >= self._last

    def _as_run(self, step: Step) -> Run:
        """A Step as the stage runs it. Where the stage needs no token ids, zeros take their place.
        ValueError: it was not told the tokens that it needs, or fills positions of other tokens."""
        draw, end = step.draw or Draw(), step.first + step.rows
        tokens: Sequence[int] = step.tokens or blank(step.rows)
        history, following = draw.history, None
        if step.part is not None:
            self._check_part(step)
        if history is not None:
            if len(history) < end + (step.want is Want.SCORES):
                raise ValueError(f"the coordinator has told {len(history)} tokens of session {step.session}")
            if step.want is Want.SCORES:
                tokens, following = history[step.first : end].tolist(), int(history[end])
            history = history[:end]
        where = step.session, step.first, tokens, step.want, step.hidden, step.part
        return Run(*where, step.report, draw.allowed, following, draw.sampling, history)

    def _check_part(self, step: Step) -> None:
        """ValueError: a session has other tokens than a Step that is to fill positions of it."""
        at = spanned(step.first, step.first + step.rows)
        known = self.sessions[step.session].tags[at]
        if list(step.tags[: len(known)]) != known.tolist():
            raise ValueError(f"session {step.session} has other tokens than those that are to fill it")

    def _ran(self, step: Step) -> None:
        """Notes the positions of rows that have run. Rows of a part are positions that the session has
        already, or their continuation."""
        session, end = self.sessions[step.session], step.first + step.rows
        if step.part is None:
            session.write(step.first, end, step.tags)
        elif end > session.positions:
            session.write(session.positions, end, step.tags[counted(step.first, session.positions) :])
        self._note(step.session, step.first)

    def _drop(self, steps: Sequence[Step]) -> None:
        """Notes that rows have not run, and that the stage holds no position from there on."""
        self.cancelled = True
        for step in steps:
            session = self.sessions[step.session]
            if step.part is None and step.first < session.positions:
                session.cut(step.first)
            self._note(step.session, step.first)

    def _note(self, session: int, first: int) -> None:
        for noted in self._rewinds:
            noted[session] = min(noted.get(session, first), first)

    def _passed_on(self, step: Step, result: StageResult) -> Answer:
        ends = self._last is None or (step.part is not None and step.part[1] <= self._last)
        if ends:
            where = step.session, step.epoch, step.first
            if step.want is Want.ROWS:
                assert result.output is not None, "the last stage returns the rows that are wanted"
                return Rows(*where, result.output)
            found = result.tokens, result.scores, result.logprobs
            return Result(*where, step.rows, result.token, *found)
        assert result.hidden is not None, "every stage but the last returns hidden rows"
        return replace(step, tokens=(), hidden=result.hidden, more=decodes(step))

    def _forget(self, session: int) -> None:
        self.sessions.pop(session, None)
        self._stage.close_sequence(session)

    def _failed(self, session: int, error: Exception) -> Failed:
        if isinstance(error, MemoryError):
            error = OperatingSystemError(
                "the system had no memory for these rows: end other requests, or other programs on that node"
            )
        return Failed(session, self._epoch, *to_wire(error))


def _together(answers: list[Answer]) -> list[Answer]:
    """The answers of one call: rows of sequences that decode first, of which each but the last says that more
    of them follow. Rows of prompts need not stay with them."""
    decoding = [answer for answer in answers if isinstance(answer, Step) and answer.more]
    others = [answer for answer in answers if not (isinstance(answer, Step) and answer.more)]
    return [*decoding[:-1], *(replace(step, more=False) for step in decoding[-1:]), *others]


def _part(step: Step) -> tuple[int, int] | None:
    return step.part
