"""Answers of many callers on one stage, and texts that are only read, computed together.

Reading the weights takes most of the time of a token, and one reading serves a row of every sequence. So a
`Batcher` runs the stage in a thread of its own: each call has the next row of every answer that decodes, and
a part of a prompt. An answer has the same tokens as alone, since no row depends on the others in its call."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from .batch import Logprobs, ReadRequest, Result, Run, Sampling, Want
from .bursts import burst
from .errors import CancelledRunError, ContextError
from .generate import check_prompt, check_text, check_whole
from .host import ram
from .os_errors import translated
from .request_scheduler import BatchSequence, Job, Reading, Report, RequestScheduler, Start
from .sampler import Allow, mask_of
from .stage import Stage

_AGAIN_S = 0.01
"""A cancel is repeated so often, in seconds, since one just before a call does not reach it."""

Put = Callable[[int | Exception | None], None]
PutResult = Callable[[Result | Exception | None], None]

_IDLE_SHARE = 8
"""Without a cap on keys and values, idle sequences stay while all of them take at most 1/_IDLE_SHARE of the
RAM that was available at first."""
_UNKNOWN = 256 << 20  # the same in bytes, if the system does not report its RAM


class Batcher:
    """Runs answers on a stage with all units of a model, at most `slots` of them together (None: as many as
    may draw a token in one call); others wait in order. Thread-safe. After a fork, the child process begins
    without the answers and sessions of its parent.

    Answers that begin with the same tokens compute them once, unless `share_prefixes` is False. If keys and
    values outgrow the cap of the stage, the state of idle sequences is dropped, the longest idle first, then
    the youngest answer is set aside; it is computed again when another one has ended."""

    def __init__(self, stage: Stage, slots: int | None = None, *, share_prefixes: bool = True) -> None:
        check_whole(stage)
        self.stage = stage
        most = min(stage.options.max_wanted, stage.options.max_rows)
        self._slots, self._share = most if slots is None else min(slots, most), share_prefixes
        self._most_bytes: int | None = None
        """The most bytes of keys and values with which answers that have ended stay idle; None: as many as
        the stage holds."""
        if stage.options.kv_bytes is None:
            estimate = ram().estimate
            self._most_bytes = _UNKNOWN if estimate is None else estimate // _IDLE_SHARE
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._news = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._closed: list[tuple[BatchSequence, threading.Event]] = []
        """Sequences to be closed, and what says that they are."""
        self._scheduler = RequestScheduler(self._slots, share=self._share)
        """Belongs to the thread, as what follows."""
        self._calling: Sequence[Job] = ()
        """The jobs of the current call."""
        self._thread: threading.Thread | None = None
        self._ending = False

    def _begin_again(self) -> None:
        """Begins in a forked process, without what the parent has."""
        lost = self._scheduler.numbers
        self._begin()
        for number in lost:
            self.stage.close_sequence(number)

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
            self._cancel(self._calling)
            self._thread.join()

    def session(
        self, sampling: Sampling = Sampling(), *, context: int | None = None, allow: Allow | None = None
    ) -> BatchSession:
        """A sequence that stays open from answer to answer, as generate.Session. `allow`: see sampler.Allow;
        it is called in the batcher's thread."""
        most = self.stage.model.config.context if context is None else context
        return BatchSession(self, sampling, most, allow)

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
        allow: Allow | None = None,
    ) -> partial[None]:
        """Begins an answer in a sequence of its own, without waiting; the returned function is `stop` for
        it. `allow` as for `session`. ContextError: the prompt does not fit. ValueError: the batcher has been
        closed."""
        sequence = BatchSequence(sampling, context, owned=False)
        job = self.begin(sequence, prompt, put, max_tokens=max_tokens, end=end, report=report, allow=allow)
        return partial(self.stop, job)

    def begin(
        self,
        sequence: BatchSequence,
        prompt: Sequence[int],
        put: Put,
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
        allow: Allow | None = None,
    ) -> Job:
        """Begins an answer without waiting. ContextError: the prompt does not fit. ValueError: the batcher
        has been closed."""
        check_prompt(prompt, sequence.context)
        self.stage.model.check_generates()
        last = min(len(prompt) + max_tokens, sequence.context + 1)
        job = Job(sequence, list(prompt), last, end, put, report, None, allow, len(prompt))
        if max_tokens <= 0:
            _end(job)
            return job
        self._enter(job)
        return job

    def read(self, request: ReadRequest, put: PutResult) -> partial[None]:
        """Begins to read a text, without waiting. `put` receives results of the wanted rows, in order, each
        for some of them, then None, or the exception that has ended the reading. The returned function ends
        it early, as `stop` does. ContextError: the tokens do not fit. ValueError: the batcher has been
        closed."""
        check_text(request.tokens, request.context)
        if request.want in (Want.TOKENS, Want.SCORES):
            self.stage.model.check_generates()
        known = list(request.tokens)
        following = known.pop() if request.want is Want.SCORES else None
        reading = Reading(request.want, request.first, following)
        told = None if request.report is None else Report(request.report)
        sequence = BatchSequence(Sampling(), request.context, owned=False)
        job = Job(sequence, known, len(known), (), put, told, reading)
        if request.first >= len(known):
            _end(job)
        else:
            self._enter(job)
        return partial(self.stop, job)

    def _enter(self, job: Job) -> None:
        """Hands a job to the thread. ValueError: the batcher has been closed."""
        sequence = job.sequence
        if self._process != os.getpid():
            self._begin_again()
        if sequence.process != os.getpid():
            sequence.process, sequence.number, sequence.tokens = os.getpid(), None, []
        with self._news:
            if self._ending:
                raise ValueError("the engine has been closed")
            self._arrived.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="shoal batches", daemon=True)
                self._thread.start()
            self._news.notify()

    def stop(self, job: Job, *, wait: bool = True, keep: bool = False) -> None:
        """Ends an answer, and waits until its state has been freed, unless told not to. With `keep` the state
        stays idle, as that of a complete answer. A call that computes nothing but answers that were stopped
        ends after its current op, any other within its usual time."""
        if job.process != os.getpid() or job.ended.is_set():
            return
        with self._news:
            job.stopped, job.rests = True, job.rests or (keep and not job.stopped)
            self._news.notify()
        self._cancel_stopped()
        while wait and threading.current_thread() is not self._thread and not job.ended.wait(_AGAIN_S):
            self._cancel_stopped()

    def forget(self, sequence: BatchSequence) -> None:
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

    def _cancel_stopped(self) -> None:
        """Cancels the current call, if all its answers were stopped. One that is about to begin is missed."""
        calling = self._calling
        if all(job.stopped for job in calling):
            self._cancel(calling)

    def _cancel(self, calling: Sequence[Job]) -> None:
        for job in calling:
            if job.sequence.number is not None:
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
            left = [*self._scheduler.running, *self._scheduler.waiting, *self._arrived]
            self._arrived.clear()
        for job in left:
            self._scheduler.ended(job)
            self._free(job.sequence)
            _end(job, error or ValueError("the engine has been closed"))
        for sequence in list(self._scheduler.idle):
            self._free(sequence)
        with self._news:
            self._close_sequences()

    def _next(self) -> bool:
        """Waits for work, ends the answers that were stopped, and admits others; False: the batcher is being
        closed."""
        scheduler = self._scheduler
        with self._news:
            while not (
                self._ending or self._arrived or self._closed or scheduler.running or scheduler.waiting
            ):
                self._news.wait()
            if self._ending:
                return False
            scheduler.waiting.extend(self._arrived)
            self._arrived.clear()
            self._close_sequences()
        for job in scheduler.stopped():
            self._finish(job)
        scheduler.admit()
        for job, start in scheduler.starts():
            try:
                self._open(job.sequence, start)
            except (ContextError, ValueError, MemoryError) as error:
                self._finish(job, _for_user(error))
                continue
            job.begun, job.sent = True, min(len(job.sequence.tokens), start.positions)
            if job.report is not None and job.report.cached is None:  # it was not set aside
                job.report.cached = job.sent
        return True

    def _open(self, sequence: BatchSequence, start: Start) -> None:
        """Lets a sequence hold at most the positions with which its answer starts. ContextError, ValueError:
        its context or its sampling is not possible."""
        source = start.source
        if source is sequence:
            return
        self._free(sequence)
        own = sequence.sampling, sequence.context
        if source is None:
            sequence.number = self.stage.open_sequence(None, *own)
            return
        assert source.number is not None, "it holds positions"
        positions = start.positions
        try:
            sequence.number = self.stage.fork_sequence(source.number, None, positions, *own)
        except ContextError:  # there is no room for a copy of the last page, which is not full
            positions -= positions % self.stage.page_positions
            sequence.number = self.stage.fork_sequence(source.number, None, positions, *own)
        sequence.tokens = source.tokens[:positions]
        self._scheduler.used(source)

    def _step(self) -> None:
        """One call of the stage."""
        jobs, runs = self._chosen()
        if runs:
            self._calling = jobs
            try:
                if not all(job.stopped for job in jobs):  # `stop` may have come before _calling was set
                    self._run(jobs, runs)
            finally:
                self._calling = ()

    def _chosen(self) -> tuple[list[Job], list[Run]]:
        options = self.stage.options
        jobs: list[Job] = []
        runs: list[Run] = []
        for job, rows in self._scheduler.chosen(options.max_rows, options.max_wanted):
            self._choose(job, rows, jobs, runs)
        return jobs, runs

    def _choose(self, job: Job, rows: int, jobs: list[Job], runs: list[Run]) -> None:
        """Adds the next rows of a job to a call. What `allow` raises ends the job."""
        run = _run_of(job, rows)
        if job.allow is not None and run.want is Want.TOKEN:
            try:
                allowed = job.allow(job.known[job.asked :])
                if allowed is not None:
                    run = replace(run, allowed=mask_of(allowed, self.stage.model.program.vocab))
            except BaseException as error:  # of code that is not ours: sys.exit must not end this thread
                self._finish(job, _told(error))
                return
        jobs.append(job)
        runs.append(run)

    def _run(self, jobs: Sequence[Job], runs: Sequence[Run]) -> None:
        for job in jobs:
            del job.sequence.tokens[job.sent :]  # after an error these positions are not there
        try:
            results = self.stage.run(runs)
        except CancelledRunError:
            return  # `_next` ends the answer that was stopped
        except (ContextError, MemoryError) as error:
            if not self._make_room():
                self._finish(jobs[0], _for_user(error))
            return
        except (ValueError, FloatingPointError) as error:
            if len(jobs) == 1:
                self._finish(jobs[0], error)
                return
            for job, run in zip(jobs, runs, strict=True):  # finds the one at fault
                if job.begun:  # else it was set aside for one before it
                    self._run([job], [run])
            return
        with burst():
            for job, run, result in zip(jobs, runs, results, strict=True):
                job.sequence.tokens += run.tokens
                job.sent += len(run.tokens)
                if job.reading is not None:
                    self._read(job, job.reading, run, result)
                elif result.token is not None:
                    self._append(job, result.token, result.logprobs)

    def _read(self, job: Job, reading: Reading, run: Run, result: Result) -> None:
        if run.want is not Want.NOTHING:
            reading.first = job.sent
            job.put(result)
        if job.sent == len(job.known):
            self._finish(job)

    def _append(self, job: Job, token: int, logprobs: Sequence[Logprobs]) -> None:
        if token in job.end:
            self._finish(job)
            return
        if job.report is not None:
            job.report.found.extend(logprobs)
        job.known.append(token)
        job.put(token)
        if len(job.known) >= job.last:
            self._finish(job)

    def _make_room(self) -> bool:
        """Drops the state of the longest idle sequence, or sets the youngest answer aside, unless it is the
        only one. Returns whether it has."""
        if self._scheduler.idle:
            self._free(self._scheduler.idle[0])
            return True
        job = self._scheduler.set_aside()
        if job is not None:
            self._free(job.sequence)
        return job is not None

    def _finish(self, job: Job, error: Exception | None = None) -> None:
        self._scheduler.ended(job)
        sequence = job.sequence
        stays = sequence.owned or (self._share and (job.rests or not job.stopped))
        if stays and error is None and sequence.number is not None:
            self._scheduler.rest(sequence)
            for other in self._scheduler.covered(sequence) if self._share else ():
                self._free(other)
            self._free_surplus()
        else:
            self._free(sequence)
        _end(job, error)

    def _free_surplus(self) -> None:
        """Drops the state of answers that ended long ago, as far as there is too much of it."""
        while True:
            crowded = self._most_bytes is not None and self.stage.kv_bytes > self._most_bytes
            sequence = self._scheduler.surplus(crowded=crowded)
            if sequence is None:
                return
            self._free(sequence)

    def _free(self, sequence: BatchSequence) -> None:
        self._scheduler.remove(sequence)
        if sequence.number is not None:
            self.stage.close_sequence(sequence.number)
            sequence.number, sequence.tokens = None, []

    def _close_sequences(self) -> None:
        for sequence, closed in self._closed:
            self._free(sequence)
            closed.set()
        self._closed.clear()


class BatchSession:
    """A sequence that stays open from answer to answer, in a batcher. Each answer computes only the part of
    its prompt after the longest common prefix with the previous prompt and answer."""

    def __init__(self, batcher: Batcher, sampling: Sampling, context: int, allow: Allow | None) -> None:
        self._batcher, self._sequence = batcher, BatchSequence(sampling, context, owned=True)
        self._allow = allow
        self._job: Job | None = None

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Generator[int, None, None]:
        """Yields the token ids that follow `prompt`, as generate.Session. Closing the generator ends the
        answer. ContextError: the prompt does not fit. ValueError: the previous answer has not ended."""
        if self._job is not None and not self._job.ended.is_set():
            raise ValueError("a session gives one answer at a time: end the previous one first")
        tokens: SimpleQueue[int | Exception | None] = SimpleQueue()
        self._job = job = self._batcher.begin(
            self._sequence,
            prompt,
            tokens.put,
            max_tokens=max_tokens,
            end=end,
            report=report,
            allow=self._allow,
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

    def stop(self) -> None:
        """Ends the answer under way, if there is one; in any thread."""
        if self._job is not None:
            self._batcher.stop(self._job)

    def close(self) -> None:
        """Frees the sequence's keys and values."""
        self.stop()
        self._batcher.forget(self._sequence)


def _run_of(job: Job, rows: int) -> Run:
    end, following = job.sent + rows, None
    if job.reading is None:
        want = Want.TOKEN if end == len(job.known) else Want.NOTHING
    elif job.sent < job.reading.first:
        want = Want.NOTHING
    else:
        want = job.reading.want
        following = job.reading.following if end == len(job.known) else job.known[end]
    report = None if job.report is None else job.report.count
    tokens = job.known[job.sent : end]
    return Run(_number(job), job.sent, tokens, want, report=report, following=following)


def _number(job: Job) -> int:
    assert job.sequence.number is not None, "an admitted answer has a sequence"
    return job.sequence.number


def _for_user(error: Exception) -> Exception:
    """The error of an answer, whose caller is told of a lack of memory as a user is."""
    return (translated(error) or error) if isinstance(error, MemoryError) else error


def _told(error: BaseException) -> Exception:
    """What the caller is told of an exception of `allow`, which may be meant for the thread as a whole."""
    if isinstance(error, Exception):
        return error
    told = RuntimeError(f"allow raised {error!r} in the engine's thread: raise an Exception instead")
    told.__cause__ = error
    return told


def _end(job: Job, error: Exception | None = None) -> None:
    job.ended.set()
    job.put(error)
