"""An assignment: what a node does in one epoch.

It connects to the next node and to the takers of keys and values, and runs the loop of the stage
(net/stage_loop.py). The stage itself may outlive the epoch: it belongs to the StageManager
(net/stage_manager.py), which starts and ends these tasks as net/stage_state.py decides.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from traceback import clear_frames
from typing import Any, Protocol

import trio

from ..engine.batch import Want
from ..engine.errors import ModelFileError, ShoalError
from ..engine.power import on_mains
from ..planner import LinkSpeed
from .carry import KvReceiver, KvSender
from .connection import Connection, Hop, in_thread, open_tasks
from .dial import OpenStream, enter_dial, open_tcp
from .errors import RemoteProtocolError, to_wire
from .files import Files
from .identity import Identity
from .inbox import ENOUGH_BYTES, Inbox
from .liveness import DEFAULT_TIMING, Timing
from .messages import (
    Assign,
    Broken,
    Close,
    Commit,
    Condition,
    Epoch,
    Gift,
    Kept,
    Offer,
    Open,
    Pace,
    Peer,
    Pong,
    Progress,
    Refill,
    Stats,
    Step,
    Work,
)
from .pace import NodePace, Onward
from .probe import probe
from .sampling_updates import Notice
from .scheduler import Expect
from .stage_loop import StageLoop, StageParts, TaskLoop, ThreadLoop
from .stage_state import Copied, Event, Reached, Sent, Stopped
from .tags import spanned
from .watch import ConnectionStalledError, Watch
from .work import StageLike, StageWork, blank

NO_WORK = Work(0, 0, 0.0)


class KvBytes(Protocol):
    """See NodeParts. NoPlanError: nothing is left."""

    def __call__(self, first: int, last: int, beside: range = ..., /) -> int | None: ...


def _no_limit(first: int, last: int, beside: range = range(0)) -> int | None:
    return None


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What a Node needs from its process. `open_stage(first, last)` loads a stage and blocks meanwhile;
    `resident()` is the process's resident memory in bytes; `log` prints a line for the user. `expect(first,
    last)` predicts the times of a stage's calls from the offer. `kv_bytes(first, last, beside)` is what the
    promised RAM leaves for keys and values of a stage, while the units `beside` are held as well (None: no
    limit). Tests replace `hop` (runs a blocking call) and `open_stream`."""

    identity: Identity
    offer: Offer
    units: int
    open_stage: Callable[[int, int], StageLike]
    resident: Callable[[], int]
    log: Callable[[str], None]
    timing: Timing = DEFAULT_TIMING
    hop: Hop = in_thread
    open_stream: OpenStream = open_tcp
    expect: Callable[[int, int], Expect] | None = None
    kv_bytes: KvBytes = _no_limit
    stateless: frozenset[int] = frozenset()
    """Units that have no keys and values."""
    enough: int = ENOUGH_BYTES
    """Bytes of messages that may wait for a stage when another is read."""
    tells: bool = True
    """Whether `log` is told which coordinator comes and goes. A node of a house says that of the head."""
    own_thread: bool = True
    """Run the loop of a stage in a thread of its own, which needs sockets."""
    spin: bool = field(default_factory=on_mains)
    """Keep a core awake between rows that follow each other closely."""
    condition: Callable[[], Condition | None] = lambda: None
    """How much of this node may be used; None without a policy. It is called in any thread."""
    files: Files | None = None
    """The files of the model on disk, which this node gives to others and gets from them. Without them it has
    all units and gives none."""

    @property
    def share(self) -> float:
        """The share of the time in which a stage may compute."""
        condition = self.condition()
        return 1.0 if condition is None else condition.share


class Group:
    """Tasks in a nursery that are cancelled together, before the nursery is."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: set[trio.CancelScope] = set()
        self._news = trio.Event()
        self.cancelled = False

    def start(self, task: Callable[[], Awaitable[None]]) -> trio.CancelScope:
        """Starts a task; returns the scope that cancels it alone."""
        scope = trio.CancelScope()
        if self.cancelled:
            scope.cancel()
        self._scopes.add(scope)
        self._nursery.start_soon(self._run, scope, task)
        return scope

    def cancel(self) -> None:
        """Cancels all tasks, and those that are started later."""
        self.cancelled = True
        for scope in self._scopes:
            scope.cancel()

    async def ended(self) -> None:
        """Waits until no task runs."""
        while self._scopes:
            await self._news.wait()

    async def _run(self, scope: trio.CancelScope, task: Callable[[], Awaitable[None]]) -> None:
        try:
            with scope:
                await task()
        finally:
            self._scopes.discard(scope)
            self._news.set()
            self._news = trio.Event()


class Assignment:
    """What a node does in one epoch. Its methods return at once; `tell` is told what has become of them."""

    def __init__(
        self,
        parts: NodeParts,
        coordinator: Connection,
        assign: Assign,
        pace: NodePace,
        links: Mapping[int, LinkSpeed],
        tasks: trio.Nursery,
        tell: Callable[[Event], None],
    ) -> None:
        self._parts, self._coordinator, self._pace, self._links = parts, coordinator, pace, links
        self.assign, self._tell = assign, tell
        self.began = trio.current_time()
        self._onward = Onward(None if assign.next is None else links.get(assign.next.incarnation))
        self._inbox = Inbox(
            assign.epoch,
            parts.offer.max_rows,
            assign.chunk_rows,
            assign.groupings,
            None if parts.expect is None else parts.expect(assign.first, assign.last),
            parts.enough,
            last=assign.next is None,
        )
        self._group = Group(tasks)
        self._ready, self._looped = trio.Event(), trio.Event()
        self._following: Connection | None = None
        self._reaching: trio.CancelScope | None = None
        self._loop: StageLoop | None = None
        self._looping: trio.CancelScope | None = None
        self._givers: dict[int, KvSender] = {}
        self.work: StageWork | None = None
        """The stage at work, once `begin` was called."""
        self.prepared: Any = None
        """What the stage has prepared for this epoch."""
        self.reading = 0.0
        """How long the first call may take longer, to read the units that `prepared` adds, as a part of the
        bound of a call (liveness.call_bound)."""
        self.taker: KvReceiver | None = None
        self.rows: tuple[Kept, ...] = ()
        """The positions whose rows the stage has kept, to fill units that are lost in this epoch."""

    @property
    def epoch(self) -> Epoch:
        """The epoch of the assignment."""
        return self.assign.epoch

    @property
    def previous(self) -> int:
        """The incarnation of the only peer that may send rows."""
        return self.assign.previous

    @property
    def full(self) -> bool:
        """Whether the inbox accepts nothing until a batch is taken."""
        return self._inbox.full

    @property
    def dropped(self) -> bool:
        """Whether `drop` was called."""
        return self._group.cancelled

    @property
    def given(self) -> int:
        """Bytes of keys and values that were sent to takers."""
        return sum(giver.bytes for giver in self._givers.values())

    def stats(self) -> Stats:
        """The stage's work so far."""
        return Stats(self.epoch, NO_WORK, NO_WORK) if self.work is None else self.work.stats()

    def pace(self) -> Pace:
        """The measured speeds of the stage and of the link to the next node."""
        return Pace(self.epoch, self._pace.slower, self._onward.measured)

    def progress(self) -> Progress:
        """How far the stage is with its calls."""
        return self._pace.progress(self.epoch, self._inbox.bytes)

    async def report(self, error: ShoalError) -> None:
        """Tells the coordinator that the stage cannot run."""
        await self._coordinator.send(Broken(self.epoch, *to_wire(error), None))

    def dial(self, peer: Peer) -> None:
        """Connects to the next node and watches the connection. Reached, and Broken when it ends."""
        self._reaching = self._group.start(partial(self._reach, peer))

    def give(self, taker: Peer, gifts: Sequence[Gift], stage: StageLike, work: StageWork) -> None:
        """Sends a taker the keys and values of its units, as far as `work` has finished them. Copied, and
        Broken when the connection ends before `send_tail` is done."""
        link = self._links.get(taker.incarnation)
        units = [u for gift in gifts for u in range(gift.first, gift.last) if u not in self._parts.stateless]
        giver = self._givers[taker.incarnation] = KvSender(
            stage,
            work,
            self.epoch,
            units,
            history=any(gift.history for gift in gifts),
            hop=self._parts.hop,
            bytes_per_s=None if link is None else link.bytes_per_s,
            takers=len({gift.taker.incarnation for gift in self.assign.gives}),
        )
        self._group.start(partial(self._give, taker, giver))

    def send_tail(self, commit: Commit, taker: int) -> None:
        """Sends a taker the rest of the commit's sessions. Sent."""
        self._givers[taker].finish(commit)

    def begin(self, work: StageWork, reading: float | None) -> None:
        """Starts the loop of the stage. Broken when the stage itself cannot go on. `reading` is as for
        NodePace.assigned."""
        expect, assign = self._parts.expect, self.assign
        self._pace.assigned(None if expect is None else expect(assign.first, assign.last), reading)
        self.work = work
        parts = StageParts(
            self._inbox,
            work,
            self._pace,
            self._onward,
            self._following,
            self._coordinator,
            lambda: self._parts.share,
        )
        if self._parts.own_thread and os.name == "posix":
            self._loop = ThreadLoop(parts, spin=self._parts.spin)
        else:
            self._loop = TaskLoop(parts, self._parts.hop)
        self._looping = self._group.start(partial(self._run, self._loop))
        self._ready.set()

    def stop(self) -> None:
        """Ends the loop, and closes the connection to the next node. Stopped."""
        self._group.start(self._stop)

    def drop(self) -> None:
        """Cancels everything; `ended` waits for it."""
        self._group.cancel()
        self._ready.set()

    async def ended(self) -> None:
        """Waits until no task of the assignment runs, and forgets what it has of the stage, whose memory is
        to be free once the stage is closed."""
        await self._group.ended()
        if self.taker is not None:
            self.taker.incoming.close()
        self.taker = self.work = self._loop = None
        self._givers.clear()

    async def feed(self, connection: Connection, first: Open | Close | Step) -> None:
        """Takes a message of the previous stage and reads its connection, until the loop has ended. Errors as
        for Connection.receive."""
        await self._ready.wait()
        if self._loop is not None and not self._looped.is_set():
            await self._loop.feed(connection, first)

    def refill(self, order: Refill) -> None:
        """Has the loop send rows that the stage has kept. RemoteProtocolError: the session has no such
        positions, or the model no such units."""
        if not order.enter < order.until <= self._parts.units:
            raise RemoteProtocolError(
                f"the coordinator asked for rows through units [{order.enter}, {order.until}) of "
                f"{self._parts.units}"
            )
        session = None if self.work is None else self.work.sessions.get(order.session)
        if self._loop is None or session is None:
            return  # it has failed, and the coordinator has been told
        if not 0 <= order.first < order.last <= session.positions:
            raise RemoteProtocolError(
                f"the coordinator asked for positions [{order.first}, {order.last}) of session "
                f"{order.session}, which has {session.positions}"
            )
        step = Step(order.session, self.epoch, 0, (), Want.NOTHING, part=(order.enter, order.until))
        rows = self.assign.chunk_rows
        cuts = [(first, min(first + rows, order.last)) for first in range(order.first, order.last, rows)]
        self._loop.put(
            [
                replace(step, first=a, tokens=tuple(blank(b - a)), tags=tuple(session.tags[spanned(a, b)]))
                for a, b in cuts
            ]
        )

    def told(self, notice: Notice) -> None:
        """Takes what the coordinator tells of a session. RemoteProtocolError: this is not the last stage, or
        as for Inbox.tell."""
        if self.assign.next is not None:
            what = type(notice).__name__
            raise RemoteProtocolError(f"the coordinator sent a {what} to a node that is not the last one")
        if self._loop is not None:
            self._loop.tell(notice)

    async def _run(self, loop: StageLoop) -> None:
        try:
            await loop.run()
        except ModelFileError as error:
            clear_frames(error.__traceback__)  # they keep the weights
            self._tell(Broken(self.epoch, *to_wire(error), None))
        finally:
            self._looped.set()

    async def _stop(self) -> None:
        if self._looping is not None:
            self._looping.cancel()
            await self._looped.wait()
        if self._reaching is not None:
            self._reaching.cancel()
        self._tell(Stopped(self.epoch))

    async def _reach(self, peer: Peer) -> None:
        parts = self._parts
        try:
            async with AsyncExitStack() as stack:
                seconds = parts.timing.handshake
                self._following = await enter_dial(
                    stack, parts.open_stream, parts.identity, peer, "step", seconds
                )
                self._tell(Reached(self.epoch))
                watch = Watch(
                    self._following,
                    parts.timing,
                    busy=lambda: self.work is not None and self.work.busy,
                    probe=partial(probe, parts.open_stream, parts.identity, peer, seconds),
                    ponged=self._ponged,
                )
                await watch.run()
        except ShoalError as error:
            again = isinstance(error, ConnectionStalledError)
            self._tell(Broken(self.epoch, *to_wire(error), peer.incarnation, again))

    def _ponged(self, pong: Pong) -> None:
        if pong.at_once and self._loop is not None:
            self._onward.answered(pong.nonce, self._loop.clock())

    async def _give(self, taker: Peer, giver: KvSender) -> None:
        parts = self._parts
        try:
            async with AsyncExitStack() as stack:
                connection = await enter_dial(
                    stack, parts.open_stream, parts.identity, taker, "bulk", parts.timing.handshake
                )
                async with open_tasks() as tasks:
                    tasks.start_soon(connection.receive)  # raises when the connection ends
                    await giver.run(connection, lambda: self._tell(Copied(self.epoch, taker.incarnation)))
                    tasks.cancel_scope.cancel()
            self._tell(Sent(self.epoch, taker.incarnation))
        except ShoalError as error:
            self._tell(Broken(self.epoch, *to_wire(error), taker.incarnation))
