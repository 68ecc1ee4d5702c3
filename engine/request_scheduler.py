"""Which answers of a batcher run and which wait, what each begins with, which rows a call has, and whose keys
and values stay: the decisions, without the thread and without the stage.

Requests that begin with the same tokens compute them once. An answer begins with the longest prefix that
another sequence holds; if an older answer is about to compute a longer one, it waits for these rows. So that
there is something to share, the sequence of an answer that has ended stays *idle* until its room is needed,
as that of a session does between two answers."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from .batch import Logprobs, Sampling, Want, common_prefix
from .sampler import Allow
from .sharing import LEAST, source_for

BESIDE_ROWS = 64
"""The most rows of prompts in a call that has rows of answers, which wait for them."""


@dataclass(slots=True, eq=False)
class Report:
    """What is reported of an answer beside its tokens. `count`: log-probabilities of each token and of so
    many of the likeliest; None: none. They are in `found` before the token is put. `cached`: positions of the
    prompt that were not computed, since their keys and values were there; None: it has not begun."""

    count: int | None = None
    found: list[Logprobs] = field(default_factory=list)
    cached: int | None = None


@dataclass(slots=True, eq=False)
class BatchSequence:
    """A sequence of the stage. `tokens`: those whose keys and values it has. A sharing.Holder if idle."""

    sampling: Sampling
    context: int
    owned: bool
    """Whether a session has it: it closes it."""
    number: int | None = None
    tokens: list[int] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)

    @property
    def held(self) -> int:
        """See sharing.Holder."""
        return len(self.tokens)

    @property
    def will_hold(self) -> int:
        """See sharing.Holder."""
        return 0


@dataclass(slots=True, eq=False)
class Reading:
    """What is wanted of a text that is read: `want` for each row from position `first` on. `first` grows as
    results are put. `following` as in batch.Run."""

    want: Want
    first: int
    following: int | None = None


@dataclass(slots=True, eq=False)
class Job:
    """An answer under way, or a text that is read. `put` receives its tokens, or the results of a reading,
    then None, or the exception that has ended it. It is called in the batcher's thread and must not block.
    A sharing.Holder while it runs."""

    sequence: BatchSequence
    known: list[int]
    last: int
    """The length of `known` at which the answer is complete."""
    end: Collection[int]
    put: Callable[[Any], None]
    report: Report | None = None
    reading: Reading | None = None
    allow: Allow | None = None
    asked: int = 0
    """The length of the prompt."""
    begun: bool = False
    """Whether the stage has a sequence for it, which holds the first `sent` tokens."""
    sent: int = 0
    ahead: tuple[Job, int] | None = None
    """An older job, and for how many of its rows this one waits."""
    stopped: bool = False
    rests: bool = False
    """Whether its state stays idle although it was stopped."""
    ended: threading.Event = field(default_factory=threading.Event)
    process: int = field(default_factory=os.getpid)

    @property
    def decodes(self) -> bool:
        """Whether only its newest token has not been run."""
        return self.reading is None and self.sent == len(self.known) - 1

    @property
    def skippable(self) -> int:
        """How many of its first positions need no rows of its own if their keys and values are there."""
        return len(self.known) - 1 if self.reading is None else self.reading.first

    @property
    def tokens(self) -> list[int]:
        """See sharing.Holder."""
        return self.known

    @property
    def held(self) -> int:
        """See sharing.Holder."""
        return self.sent if self.begun else 0

    @property
    def will_hold(self) -> int:
        """See sharing.Holder."""
        return len(self.known)


@dataclass(frozen=True, slots=True)
class Start:
    """How an answer begins: with so many positions of a sequence, which may be its own; None: with none."""

    source: BatchSequence | None
    positions: int


class RequestScheduler:
    """The answers and sequences of one batcher."""

    def __init__(self, slots: int, *, share: bool) -> None:
        """`slots`: the most answers that run together. `share`: whether sequences share prefixes."""
        self.running: list[Job] = []
        """In the order of arrival."""
        self.waiting: deque[Job] = deque()
        self.idle: list[BatchSequence] = []
        """Longest idle first."""
        self.share = share
        self._slots = self._most = slots
        """How many answers may run now: fewer than `slots` from when one was set aside until one ends."""

    @property
    def numbers(self) -> list[int]:
        """The stage's sequences."""
        sequences = [*self.idle, *(job.sequence for job in self.running)]
        return [sequence.number for sequence in sequences if sequence.number is not None]

    def stopped(self) -> list[Job]:
        """The answers that are to end early."""
        return [job for job in (*self.running, *self.waiting) if job.stopped]

    def admit(self) -> None:
        """Lets those run that wait, in order, as far as there are places."""
        while self.waiting and len(self.running) < self._most:
            job = self.waiting.popleft()
            self.remove(job.sequence)
            self.running.append(job)

    def starts(self) -> Iterator[tuple[Job, Start]]:
        """The admitted answers that begin now, and with what. An answer must have begun, or ended, before the
        next one is asked for, which may wait for its rows."""
        for job in [job for job in self.running if not job.begun]:
            start = self._start(job)
            if start is not None:
                yield job, start

    def _start(self, job: Job) -> Start | None:
        """How an answer begins; None: it waits for rows of an older one."""
        if job.ahead is not None and job.ahead[0] in self.running and job.ahead[0].sent < job.ahead[1]:
            return None
        own = None if job.sequence.number is None else job.sequence
        positions = 0 if own is None else min(common_prefix(own.tokens, job.known), job.skippable)
        start, job.ahead = Start(own, positions), None
        if not self.share:
            return start
        holders: list[BatchSequence | Job] = [*self.idle, *self.running[: self.running.index(job)]]
        source = source_for(job.known[: job.skippable + 1], holders)
        if source is None or source.positions < positions + LEAST:
            return start
        if isinstance(source.session, BatchSequence):
            return Start(source.session, source.positions)
        if not source.later:
            return Start(source.session.sequence, source.positions)
        job.ahead = source.session, source.positions
        return None

    def chosen(self, most: int, most_wanted: int) -> list[tuple[Job, int]]:
        """The jobs that have rows in the next call, and how many: the next row of each answer that decodes,
        and parts of prompts and readings. At most `most` rows, of which logits are needed of
        `most_wanted`."""
        calls = [(job, 1) for job in self.running if job.begun and job.decodes]
        room = min(most - len(calls), BESIDE_ROWS if calls else most)
        spare = most_wanted - len(self.running)  # each may want one row
        for job in self.running:
            if room > 0 and job.begun and not job.decodes:
                rows = min(room, len(job.known) - job.sent)
                if job.reading is not None:
                    before = job.reading.first - job.sent
                    if before > 0:
                        rows = min(rows, before)
                    elif job.reading.want is not Want.ROWS:  # which need no logits
                        rows = min(rows, 1 + spare)
                        spare -= rows - 1
                calls.append((job, rows))
                room -= rows
        return calls

    def used(self, sequence: BatchSequence) -> None:
        """Another sequence was forked from this one: if it is idle, it is the least idle now."""
        if sequence in self.idle:
            self.idle.remove(sequence)
            self.idle.append(sequence)

    def set_aside(self) -> Job | None:
        """Sets the youngest answer aside and returns it: it waits, and begins again when another one has
        ended. None: it is the only one."""
        if len(self.running) < 2:
            return None
        job = self.running.pop()
        job.begun, job.ahead = False, None
        self.waiting.appendleft(job)
        self._most = len(self.running)
        return job

    def ended(self, job: Job) -> None:
        """Removes an answer."""
        if job in self.running:
            self.running.remove(job)
            self._most = self._slots
        if job in self.waiting:
            self.waiting.remove(job)

    def rest(self, sequence: BatchSequence) -> None:
        """Notes that a sequence is idle."""
        if sequence not in self.idle:
            self.idle.append(sequence)

    def remove(self, sequence: BatchSequence) -> None:
        """Notes that a sequence is not idle any more."""
        if sequence in self.idle:
            self.idle.remove(sequence)

    def covered(self, sequence: BatchSequence) -> list[BatchSequence]:
        """Idle sequences that no session has, and that hold nothing that this one does not."""
        tokens, idle = sequence.tokens, [one for one in self.idle if not one.owned and one is not sequence]
        return [one for one in idle if one.tokens == tokens[: len(one.tokens)]]

    def surplus(self, *, crowded: bool) -> BatchSequence | None:
        """The longest idle sequence that no session has, if there are more than slots, or if keys and values
        are `crowded`."""
        sequences = [sequence for sequence in self.idle if not sequence.owned]
        return sequences[0] if sequences and (crowded or len(sequences) > self._slots) else None
