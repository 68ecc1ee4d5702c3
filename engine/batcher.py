"""Answers of many callers on one stage, computed together.

Reading the weights takes most of the time of a token, and one reading serves a row of every sequence. So a
`Batcher` runs the stage in a thread of its own: each call has the next row of every answer that decodes, and
a part of a prompt. An answer has the same tokens as alone, since no row depends on the others in its call."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from .batch import Logprobs, Run, Sampling, Want, common_prefix
from .errors import CancelledRunError, ContextError
from .generate import check_prompt, check_whole
from .stage import Stage

BESIDE_ROWS = 64
"""The most rows of prompts in a call that has rows of answers, which wait for them."""

Put = Callable[[int | Exception | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Log-probabilities of an answer's tokens, and of the `count` likeliest tokens at each. They are in
    `found` before the token is put."""

    count: int
    found: list[Logprobs] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence of the stage. `held`: the tokens whose keys and values it has."""

    sampling: Sampling
    context: int
    number: int | None = None
    held: list[int] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)


@dataclass(slots=True, eq=False)
class Job:
    """An answer under way. `put` receives its tokens, then None, or the exception that has ended it. It is
    called in the batcher's thread and must not block."""

    sequence: _Sequence
    known: list[int]
    last: int
    """The length of `known` at which the answer is complete."""
    end: Collection[int]
    put: Put
    keep: bool
    """Whether the sequence stays open after the answer."""
    report: Report | None = None
    sent: int = 0
    stopped: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    process: int = field(default_factory=os.getpid)

    @property
    def decodes(self) -> bool:
        """Whether only its newest token has not been run."""
        return self.sent == len(self.known) - 1


class Batcher:
    """Runs answers on a stage with all units of a model, at most `slots` of them together (None: as many as
    may draw a token in one call); others wait in order. Thread-safe. After a fork, the child process begins
    without the answers and sessions of its parent.

    If keys and values outgrow the cap of the stage, the state of idle sessions is dropped, the longest idle
    first, then the youngest answer is set aside; it is computed again when another one has ended."""

    def __init__(self, stage: Stage, slots: int | None = None) -> None:
        check_whole(stage)
        self.stage = stage
        most = min(stage.options.max_wanted, stage.options.max_rows)
        self._slots = most if slots is None else min(slots, most)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._news = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._closed: list[tuple[_Sequence, threading.Event]] = []
        """Sequences to be closed, and what says that they are."""
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        """In the order of arrival. This and what follows belongs to the thread."""
        self._most = self._slots
        """How many answers may run now: fewer than `slots` from when one was set aside until one ends."""
        self._idle: list[_Sequence] = []
        self._alone: Job | None = None
        """The only job of the current call."""
        self._thread: threading.Thread | None = None
        self._ending = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all answers and the thread. The stage stays open."""
        if self._process != os.getpid():
            return
        with self._news:
            self._ending = True
            self._news.notify()
        if self._thread is not None:
            self._cancel(self._alone)
            self._thread.join()

    def session(self, sampling: Sampling = Sampling(), *, context: int | None = None) -> BatchSession:
        """A sequence that stays open from answer to answer, as generate.Session."""
        return BatchSession(self, sampling, self.stage.model.config.context if context is None else context)

    def begin_alone(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        put: Put,
        *,
        context: int,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Callable[[], None]:
        """Begins an answer in a sequence of its own, without waiting; the returned function is `stop` for
        it. ContextError: the prompt does not fit. ValueError: the batcher has been closed."""
        sequence = _Sequence(sampling, context)
        job = self.begin(sequence, prompt, put, max_tokens=max_tokens, end=end, keep=False, report=report)
        return partial(self.stop, job)

    def begin(
        self,
        sequence: _Sequence,
        prompt: Sequence[int],
        put: Put,
        *,
        max_tokens: int,
        end: Collection[int],
        keep: bool,
        report: Report | None = None,
    ) -> Job:
        """Begins an answer without waiting. ContextError: the prompt does not fit. ValueError: the batcher
        has been closed."""
        check_prompt(prompt, sequence.context)
        last = min(len(prompt) + max_tokens, sequence.context + 1)
        job = Job(sequence, list(prompt), last, end, put, keep, report)
        if max_tokens <= 0:
            _end(job)
            return job
        if self._process != os.getpid():
            self._begin()
        if sequence.process != os.getpid():
            sequence.process, sequence.number, sequence.held = os.getpid(), None, []
        with self._news:
            if self._ending:
                raise ValueError("the engine has been closed")
            self._arrived.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="shoal batches", daemon=True)
                self._thread.start()
            self._news.notify()
        return job

    def stop(self, job: Job) -> None:
        """Ends an answer, and waits until its state has been freed. A call that computes nothing else ends
        at once, any other within its usual time."""
        if job.process != os.getpid() or job.ended.is_set():
            return
        with self._news:
            job.stopped = True
            self._news.notify()
        if self._alone is job:
            self._cancel(job)
        if threading.current_thread() is not self._thread:
            job.ended.wait()

    def forget(self, sequence: _Sequence) -> None:
        """Closes a sequence that no answer uses."""
        if sequence.process != os.getpid():
            return
        closed = threading.Event()
        with self._news:
            self._closed.append((sequence, closed))
            self._news.notify()
            if self._thread is None or self._ending:
                self._close_sequences()
        if threading.current_thread() is not self._thread:
            closed.wait()

    def _cancel(self, job: Job | None) -> None:
        if job is not None and job.sequence.number is not None:
            self.stage.cancel(job.sequence.number)

    # --- the thread

    def _main(self) -> None:
        error: Exception | None = None
        try:
            while self._next():
                self._step()
        except Exception as failure:  # of the stage as a whole: each caller is told
            error = failure
        with self._news:
            self._ending = True
            left = [*self._running, *self._waiting, *self._arrived]
            self._waiting.clear()
            self._arrived.clear()
        for job in left:
            self._free(job.sequence)
            _end(job, error or ValueError("the engine has been closed"))
        self._running.clear()
        for sequence in self._idle:
            self._free(sequence)
        with self._news:
            self._close_sequences()

    def _next(self) -> bool:
        """Waits for work, ends the answers that were stopped, and admits others; False: the batcher is being
        closed."""
        with self._news:
            while not (self._ending or self._arrived or self._closed or self._running or self._waiting):
                self._news.wait()
            if self._ending:
                return False
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            self._close_sequences()
        for job in [job for job in (*self._running, *self._waiting) if job.stopped]:
            self._finish(job)
        while self._waiting and len(self._running) < self._most:
            self._admit(self._waiting.popleft())
        return True

    def _admit(self, job: Job) -> None:
        sequence = job.sequence
        if sequence in self._idle:
            self._idle.remove(sequence)
        if sequence.number is None:
            try:
                sequence.number = self.stage.open_sequence(None, sequence.sampling, sequence.context)
            except ContextError as error:
                _end(job, error)
                return
            sequence.held = []
        job.sent = min(common_prefix(sequence.held, job.known), len(job.known) - 1)
        self._running.append(job)

    def _step(self) -> None:
        """One call of the stage."""
        jobs, runs = self._chosen()
        if runs:
            self._alone = jobs[0] if len(jobs) == 1 else None
            try:
                if not (self._alone and self._alone.stopped):  # `stop` may have come before _alone was set
                    self._run(jobs, runs)
            finally:
                self._alone = None

    def _chosen(self) -> tuple[list[Job], list[Run]]:
        jobs = [job for job in self._running if job.decodes]
        runs = [_run_of(job, 1) for job in jobs]
        most = self.stage.options.max_rows
        room = min(most - len(runs), BESIDE_ROWS if runs else most)
        for job in self._running:
            if room > 0 and not job.decodes:
                rows = min(room, len(job.known) - job.sent)
                jobs.append(job)
                runs.append(_run_of(job, rows))
                room -= rows
        return jobs, runs

    def _run(self, jobs: Sequence[Job], runs: Sequence[Run]) -> None:
        for job in jobs:
            del job.sequence.held[job.sent :]  # after an error these positions are not there
        try:
            results = self.stage.run(runs)
        except CancelledRunError:
            return  # `_next` ends the answer that was stopped
        except ContextError as error:
            if not self._make_room():
                self._finish(jobs[0], error)
            return
        except (ValueError, FloatingPointError) as error:
            if len(jobs) == 1:
                self._finish(jobs[0], error)
                return
            for job, run in zip(jobs, runs, strict=True):  # finds the one at fault
                self._run([job], [run])
            return
        for job, run, result in zip(jobs, runs, results, strict=True):
            job.sequence.held += run.tokens
            job.sent += len(run.tokens)
            if result.token is not None:
                self._append(job, result.token, result.logprobs)

    def _append(self, job: Job, token: int, logprobs: Logprobs | None) -> None:
        if token in job.end:
            self._finish(job)
            return
        if job.report is not None and logprobs is not None:
            job.report.found.append(logprobs)
        job.known.append(token)
        job.put(token)
        if len(job.known) >= job.last:
            self._finish(job)

    def _make_room(self) -> bool:
        """Drops the state of the longest idle session, or sets the youngest answer aside, unless it is the
        only one. Returns whether it has."""
        if self._idle:
            self._free(self._idle.pop(0))
            return True
        if len(self._running) < 2:
            return False
        job = self._running.pop()
        self._free(job.sequence)
        self._waiting.appendleft(job)
        self._most = len(self._running)
        return True

    def _finish(self, job: Job, error: Exception | None = None) -> None:
        if job in self._running:
            self._running.remove(job)
            self._most = self._slots
        if job in self._waiting:
            self._waiting.remove(job)
        if job.keep and error is None and job.sequence.number is not None:
            self._idle.append(job.sequence)
        else:
            self._free(job.sequence)
        _end(job, error)

    def _free(self, sequence: _Sequence) -> None:
        if sequence.number is not None:
            self.stage.close_sequence(sequence.number)
            sequence.number, sequence.held = None, []

    def _close_sequences(self) -> None:
        for sequence, closed in self._closed:
            if sequence in self._idle:
                self._idle.remove(sequence)
            self._free(sequence)
            closed.set()
        self._closed.clear()


class BatchSession:
    """A sequence that stays open from answer to answer, in a batcher. Each answer computes only the part of
    its prompt after the longest common prefix with the previous prompt and answer."""

    def __init__(self, batcher: Batcher, sampling: Sampling, context: int) -> None:
        self._batcher, self._sequence = batcher, _Sequence(sampling, context)
        self._job: Job | None = None

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, end: Collection[int]
    ) -> Generator[int, None, None]:
        """Yields the token ids that follow `prompt`, as generate.Session. Closing the generator ends the
        answer. ContextError: the prompt does not fit. ValueError: the previous answer has not ended."""
        if self._job is not None and not self._job.ended.is_set():
            raise ValueError("a session gives one answer at a time: end the previous one first")
        tokens: SimpleQueue[int | Exception | None] = SimpleQueue()
        self._job = job = self._batcher.begin(
            self._sequence, prompt, tokens.put, max_tokens=max_tokens, end=end, keep=True
        )
        return self._tokens(job, tokens)

    def _tokens(self, job: Job, tokens: SimpleQueue[int | Exception | None]) -> Generator[int, None, None]:
        try:
            while True:
                if job.process != os.getpid():
                    raise RuntimeError("this answer belongs to the parent process: ask again in this one")
                item = tokens.get()
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._batcher.stop(job)

    def close(self) -> None:
        """Frees the sequence's keys and values."""
        if self._job is not None:
            self._batcher.stop(self._job)
        self._batcher.forget(self._sequence)


def _run_of(job: Job, rows: int) -> Run:
    end = job.sent + rows
    want = Want.TOKEN if end == len(job.known) else Want.NOTHING
    report = None if job.report is None else job.report.count
    return Run(_number(job), job.sent, job.known[job.sent : end], want, report=report)


def _number(job: Job) -> int:
    assert job.sequence.number is not None, "an admitted answer has a sequence"
    return job.sequence.number


def _end(job: Job, error: Exception | None = None) -> None:
    job.ended.set()
    job.put(error)
