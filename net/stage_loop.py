"""The loop of a stage: takes batches from the inbox, runs them, and sends the results on.

`ThreadLoop` is the usual one: a thread of its own, which reads the socket of the previous stage while it
waits, runs the batch, and writes to the socket of the next stage, so that no message passes a queue or
another thread. While a call takes long, a task reads the socket instead, so that pings are answered, and a
call whose sessions have all been closed is cancelled.
`TaskLoop` does the same in a task, for streams that are no sockets, with calls in a worker thread.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

import numpy as np
import trio

from ..engine.batch import Result as StageResult
from ..engine.batch import Run, Want
from ..engine.errors import ShoalError
from ..engine.wait import Spin, Wait, waiter
from ..planner.groups import Grouping
from .connection import Connection, Hop
from .errors import NodeLostError
from .inbox import Batch, Inbox
from .liveness import next_tick
from .messages import Close, Failed, Hello, Message, Open, Ping, Pong, Purpose, Result, Rows, Step
from .pace import NodePace, Onward
from .sampling_updates import Notice
from .wire import WireProtocol
from .work import Answer, Session, StageLike, StageWork

REHEARSE_SECONDS = 0.0005
"""How often a thread that looks for rows plays through what it does with them (see Rehearsal)."""
_REHEARSED_POSITIONS = 1 << 20
PUMP_SECONDS = 0.1
"""How often a task reads for a thread whose call takes long."""
IDLE_PUMP_SECONDS = 1.0
"""How often it looks whether it has to, while nothing arrives."""
_TO_COORDINATOR = Failed, Result, Rows
_MOST_RINGS = 1 << 16  # no pipe holds more bytes


@dataclass(frozen=True, slots=True)
class StageParts:
    """A stage at work in one epoch: its inbox, its calls, its measurements, and its connections. `following`
    is the connection to the next stage; None on the last one, whose results go to the coordinator. `share()`
    is the share of the time in which the stage may compute: it rests after each call."""

    inbox: Inbox
    work: StageWork
    pace: NodePace
    onward: Onward
    following: Connection | None
    coordinator: Connection
    share: Callable[[], float] = lambda: 1.0

    def arrived(self, message: Open | Close | Step, now: float) -> None:
        """Takes a message of the previous stage, between two looks of the loop at the inbox. A Close may
        cancel the call that runs: it is queued before, and so passed on after it."""
        self.inbox.put(message, now)
        if isinstance(message, Close):
            self.work.closed(message)

    def routed(self, answers: Sequence[Answer], now: float) -> tuple[list[Message], list[Message]]:
        """The messages for the next stage, with a ping if one is due, and those for the coordinator."""
        back, onward = list[Message](), list[Message]()
        for answer in answers:
            (back if isinstance(answer, _TO_COORDINATOR) else onward).append(answer)
        nonce = self.onward.due(onward, now)
        return onward if nonce is None else [*onward, Ping(nonce)], back

    def ran(self, batch: Batch, start: float, end: float) -> float:
        """Learns from a batch whose call began and ended at these times, unless it was cancelled; returns
        until when the stage rests now."""
        rest = (end - start) * (1 / self.share() - 1) if batch.steps else 0.0
        if not self.work.cancelled:
            self.pace.count(batch, start, end)
            self.inbox.ran(batch, start, end, rest)
        self.pace.rests(rest)
        return end + rest


class StageLoop(Protocol):
    """What an assignment needs of a loop."""

    clock: Callable[[], float]

    async def run(self) -> None:
        """Serves until cancelled."""

    async def feed(self, connection: Connection, first: Message) -> None:
        """Takes a message of the previous stage and reads its connection, until the loop has ended. Errors
        as for Connection.receive."""

    def put(self, steps: Sequence[Step]) -> None:
        """Takes Steps of this node itself."""

    def tell(self, notice: Notice) -> None:
        """Takes what the coordinator tells of a session. Errors as for Inbox.tell."""


class TaskLoop:
    """The loop in a task, whose calls run by `hop`."""

    clock: Callable[[], float] = staticmethod(trio.current_time)

    def __init__(self, parts: StageParts, hop: Hop) -> None:
        self._parts, self._hop = parts, hop
        self._arrived, self._taken = trio.Event(), trio.Event()
        self._ended = False
        self._feeders: set[trio.CancelScope] = set()

    async def run(self) -> None:
        try:
            while True:
                batch = self._parts.inbox.take(trio.current_time())
                if isinstance(batch, Batch):
                    self._wake_feeders()
                    await self._run(batch)
                else:
                    self._arrived = trio.Event()
                    with trio.CancelScope(deadline=math.inf if batch is None else batch):
                        await self._arrived.wait()
        finally:
            self._ended = True
            self._wake_feeders()
            for scope in self._feeders:
                scope.cancel()

    async def feed(self, connection: Connection, first: Message) -> None:
        message = first
        with trio.CancelScope() as scope:  # at the end, the next message is left to others
            self._feeders.add(scope)
            try:
                while not self._ended:
                    await self._take(connection, message)
                    message = await connection.receive()
            finally:
                self._feeders.discard(scope)

    def put(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._parts.inbox.put(step, trio.current_time())
        self._arrived.set()

    def tell(self, notice: Notice) -> None:
        self._parts.inbox.tell(notice, trio.current_time())
        self._arrived.set()

    async def _take(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Ping):
            await connection.send(Pong(message.nonce))
            return
        while self._parts.inbox.full and not self._ended:
            await self._taken.wait()
        assert isinstance(message, Open | Close | Step)
        self._parts.arrived(message, trio.current_time())
        self._arrived.set()

    async def _run(self, batch: Batch) -> None:
        parts, start = self._parts, trio.current_time()
        parts.pace.began(batch)
        answers = await self._hop(partial(parts.work.do, batch))
        parts.pace.returned()
        end = trio.current_time()
        parts.work.count(batch, end - start)  # before the results arrive, since statistics follow them
        onward, back = parts.routed(answers, end)
        try:
            for message in back:
                await parts.coordinator.send(message)
            for message in onward:
                assert parts.following is not None
                await parts.following.send(message)
        except NodeLostError:  # the task that reads that connection reports its end and cancels this
            await trio.sleep_forever()
        parts.work.settle()
        await trio.sleep_until(parts.ran(batch, start, end))
        parts.pace.rests(0.0)

    def _wake_feeders(self) -> None:
        self._taken.set()
        self._taken = trio.Event()


@dataclass(eq=False, slots=True)
class _Source:
    """A connection from which the thread reads; `error` is the reason why it no longer does."""

    connection: Connection
    handle: int
    error: ShoalError | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    pump: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Until when its task waits before it looks whether it has to read."""


class Rehearsal:
    """What a stage does with rows that arrive, done with a message of its own that goes nowhere: all but the
    call and the writing.

    A call of a stage reads so many weights that the code and the data of the interpreter leave the caches of
    the core, and the next message takes several times as long as it should. A thread that only waits brings
    them back."""

    def __init__(self, like: Step, groupings: Sequence[Grouping], *, last: bool) -> None:
        self._wire, sender = _greeted("step")
        _, self._answers = _greeted("control" if last else "step", up=last)
        self._inbox = Inbox(like.epoch, 1, 1, groupings, last=last)
        self._work = StageWork(
            cast("StageLike", _NoStage(like, last)),
            like.epoch,
            None if last else 1,
            {0: Session(_REHEARSED_POSITIONS)},
        )
        self._pace, self._time = NodePace(), 0.0
        hidden = None if like.hidden is None else np.zeros((1, like.hidden.shape[1]), np.float32)
        tokens = (0,) if hidden is None else ()
        self._frame = b"".join(sender.send(Step(0, like.epoch, 0, tokens, Want.TOKEN, hidden)))

    def play(self) -> None:
        """Decodes a message, takes it through an inbox, and encodes its answer."""
        self._time += 0.01
        self._wire.receive_data(self._frame)
        step = self._wire.next_message()
        assert isinstance(step, Step)
        self._inbox.put(step, self._time)
        batch = self._inbox.take(self._time)
        if isinstance(batch, Batch):
            self._pace.began(batch)
            for answer in self._work.do(batch):
                self._answers.send(answer)
            self._pace.returned()
            self._work.count(batch, 0.0)
            self._pace.count(batch, self._time, self._time)
            self._inbox.ran(batch, self._time, self._time)


class _NoStage:
    """A stage that computes nothing."""

    def __init__(self, like: Step, last: bool) -> None:
        cols = 1 if like.hidden is None else like.hidden.shape[1]
        self._result = StageResult(0, 0, 1, token=0)
        if not last:
            self._result = StageResult(0, 0, 1, hidden=np.zeros((1, cols), np.float32))

    def run(self, batch: Sequence[Run]) -> list[StageResult]:
        return [self._result]


def _greeted(purpose: Purpose, *, up: bool = False) -> tuple[WireProtocol, WireProtocol]:
    """The two ends of a connection after Hello: one that receives and one that sends."""
    hello = Hello(purpose, "rehearsal", 0, "0", 0, "0", None)
    ends = WireProtocol(dialled=False), WireProtocol(dialled=True)
    for one, other in (ends[::-1], ends):
        other.receive_data(b"".join(one.send(hello)))
        other.next_message()
    return ends[::-1] if up else ends


class ThreadLoop:
    """The loop in a thread of its own. With `spin` it keeps its core awake between rows that follow each
    other closely. `feed` and `run` belong to the event loop, the methods after them to the
    thread, unless they say otherwise."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, parts: StageParts, *, spin: bool) -> None:
        self._parts = parts
        self._wait: Wait = waiter()
        self._spin = Spin(self._wait) if spin else None
        self._lock = threading.Lock()
        """Guards the inbox, the sources, and reading from them."""
        self._sources: list[_Source] = []
        self._bell, self._ringer = os.pipe()
        os.set_blocking(self._ringer, False)
        os.set_blocking(self._bell, False)
        self._rung = False
        """Whether a byte may wait at the bell."""
        self._stopping = self._away = False
        """`_away`: the thread computes, or waits until the next stage accepts rows, and reads nothing."""
        self._calls = 0
        self._rested = -math.inf
        """Until when the thread takes no batch."""
        self._rehearsal: Rehearsal | None = None
        self._latest = 0
        """A session of the last call."""
        self._failure: BaseException | None = None
        self._token, self._done = trio.lowlevel.current_trio_token(), trio.Event()

    async def run(self) -> None:
        threading.Thread(target=self._main, name="stage", daemon=True).start()
        try:
            await self._done.wait()
        finally:
            self._stopping = True
            self._ring()
            with trio.CancelScope(shield=True):
                await self._done.wait()
            with self._lock:
                for source in self._sources:
                    source.ended.set()
                os.close(self._bell)
                os.close(self._ringer)
        if self._failure is not None:
            raise self._failure

    async def feed(self, connection: Connection, first: Message) -> None:
        handle = connection.handle
        if handle is None:
            raise AssertionError(f"{connection.peer} is not connected by a socket")
        source = _Source(connection, handle)
        with self._lock:
            if self._stopping:
                return
            self._take(source, first)
            self._sources.append(source)
            self._ring()
        try:
            seen = calls = 0
            while not source.ended.is_set():
                soon = self._away or calls > seen
                until = next_tick(trio.current_time(), PUMP_SECONDS if soon else IDLE_PUMP_SECONDS)
                with trio.move_on_at(until) as source.pump:
                    await source.ended.wait()
                seen, calls = calls, self._calls
                if self._away:
                    self._read(source, at_once=False)
                    with self._lock:
                        # It may have come back and looked at the inbox before, to wait for this socket now.
                        if not (self._away or self._stopping):
                            self._ring()
        finally:
            with self._lock:
                if source in self._sources:
                    self._sources.remove(source)
                if not self._stopping:
                    self._ring()
        if source.error is not None:
            raise source.error

    def put(self, steps: Sequence[Step]) -> None:
        with self._lock:
            for step in steps:
                self._parts.inbox.put(step, self.clock())
            if not self._stopping:
                self._ring()

    def tell(self, notice: Notice) -> None:
        with self._lock:
            self._parts.inbox.tell(notice, self.clock())
            if not self._stopping:
                self._ring()

    def _hurry(self) -> None:
        """Has the tasks look soon: a call has begun that may take long."""
        for source in self._sources.copy():
            source.pump.deadline = min(source.pump.deadline, trio.current_time() + PUMP_SECONDS)

    # --- the thread

    def _main(self) -> None:
        try:
            waited = True
            while not self._stopping:
                for source in self._sources.copy():
                    self._read(source, at_once=waited)
                with self._lock:
                    batch = self._next(self.clock())
                waited = not isinstance(batch, Batch)
                if isinstance(batch, Batch):
                    self._run(batch)
                else:
                    self._sleep(batch)
        except BaseException as error:
            self._failure = error
        finally:
            self._call(self._done.set)

    def _next(self, now: float) -> Batch | float | None:
        """The next batch, or the time at which to ask again, as Inbox.take; the end of the rest while the
        stage rests. The caller holds the lock."""
        if now < self._rested:
            return self._rested
        self._parts.pace.rests(0.0)
        return self._parts.inbox.take(now)

    def _sleep(self, until: float | None) -> None:
        """Waits until a source can be read, the bell rings, or the time has come."""
        start = self.clock()
        resting = start < self._rested
        sources = [] if self._parts.inbox.full else self._sources.copy()
        handles = [self._bell, *(source.handle for source in sources)]
        if self._spin is not None and not resting:
            for _ in self._spin.looks(handles, REHEARSE_SECONDS, math.inf if until is None else until):
                if self._rehearsal is not None:
                    self._rehearsal.play()
                    self._parts.work.rehearse(self._latest)
        self._wait(handles, 0.0, None if until is None else until - self.clock())
        if self._spin is not None and not resting:
            self._spin.waited(self.clock() - start)
        if self._rung:
            self._rung = False  # before the read: who rings in between has the thread look once in vain
            with suppress(BlockingIOError):
                os.read(self._bell, _MOST_RINGS)

    def _run(self, batch: Batch) -> None:
        parts, start = self._parts, self.clock()
        self._away, self._calls = True, self._calls + 1
        if any(step.rows > 1 for step in batch.steps):
            expected = parts.pace.expected(batch)
            if expected is None or expected > PUMP_SECONDS:
                self._call(self._hurry)
        parts.pace.began(batch)
        if batch.steps:
            self._latest = batch.steps[-1].session
        answers = parts.work.do(batch)
        parts.pace.returned()
        end = self.clock()
        parts.work.count(batch, end - start)  # before the results arrive, since statistics follow them
        onward, back = parts.routed(answers, end)
        try:
            if back:
                parts.coordinator.write(back, self._stopped)
            if onward:
                assert parts.following is not None
                parts.following.write(onward, self._stopped)
        except NodeLostError:  # the task that reads that connection reports its end and cancels `run`
            while not self._stopping:
                self._wait([self._bell], 0.0, None)
            return
        self._away = False
        os.sched_yield()  # the receiver may be a process of this device, which was woken on this core
        parts.work.settle()
        with self._lock:
            self._rested = parts.ran(batch, start, end)

    def _read(self, source: _Source, *, at_once: bool) -> None:
        """Takes what has arrived from a source, in either thread, unless the inbox is full."""
        with self._lock:
            if self._parts.inbox.full or source not in self._sources:
                return
            try:
                for message in source.connection.arrived():
                    self._take(source, message, at_once)
            except ShoalError as error:
                source.error = error
                self._sources.remove(source)
                self._call(source.ended.set)

    def _take(self, source: _Source, message: Message, at_once: bool = True) -> None:
        """Takes one message, in either thread. The caller holds the lock."""
        if isinstance(message, Ping):
            source.connection.post(Pong(message.nonce, at_once=at_once))
        else:
            assert isinstance(message, Open | Close | Step)
            self._parts.arrived(message, self.clock())
            if self._rehearsal is None and self._spin is not None and isinstance(message, Step):
                inbox = self._parts.inbox
                self._rehearsal = Rehearsal(message, inbox.groupings, last=inbox.last)

    def _stopped(self) -> bool:
        return self._stopping

    def _ring(self) -> None:
        """Wakes the thread, from any other."""
        with suppress(BlockingIOError):  # it has not heard the last ones yet
            os.write(self._ringer, b"!")
        self._rung = True

    def _call(self, function: Callable[[], None]) -> None:
        """Calls a function in the event loop, from either thread."""
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return
