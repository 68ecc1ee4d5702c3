"""An assignment: the stage that a node runs in one epoch.

It loads the stage, connects to the next node, and then runs the stage's loop (net/stage_loop.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames

import trio

from ..engine.errors import ModelFileError, ShoalError
from ..engine.power import on_mains
from ..planner import LinkSpeed
from .connection import Connection, Hop, OpenStream, enter_dial, in_thread, open_tasks, open_tcp
from .errors import NetError, to_wire
from .events import DEFAULT_TIMING, Timing
from .identity import Identity
from .inbox import ENOUGH_BYTES, Inbox
from .messages import (
    Assign,
    Broken,
    Close,
    Condition,
    Epoch,
    Loaded,
    Offer,
    Open,
    Pace,
    Peer,
    Pong,
    Progress,
    Room,
    Stats,
    Step,
    Work,
)
from .pace import NodePace, Onward
from .probe import probe
from .scheduler import Expect
from .stage_loop import StageLoop, StageParts, TaskLoop, ThreadLoop
from .watch import ConnectionStalledError, Watch
from .work import StageLike, StageWork

NO_WORK = Work(0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What a Node needs from its process. `open_stage(first, last)` loads a stage and blocks meanwhile;
    `resident()` is the process's resident memory in bytes; `log` prints a line for the user. `expect(first,
    last)` predicts the times of a stage's calls from the offer. Tests replace `hop` (runs a blocking call)
    and `open_stream`."""

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
    enough: int = ENOUGH_BYTES
    """Bytes of messages that may wait for a stage when another is read."""
    own_thread: bool = True
    """Run the loop of a stage in a thread of its own, which needs sockets."""
    spin: bool = field(default_factory=on_mains)
    """Keep a core awake between rows that follow each other closely."""
    condition: Callable[[], Condition | None] = lambda: None
    """How much of this node may be used; None without a policy. It is called in any thread."""

    @property
    def share(self) -> float:
        """The share of the time in which a stage may compute."""
        condition = self.condition()
        return 1.0 if condition is None else condition.share


class Assignment:
    """A stage in one epoch: loads it, takes batches from its inbox, and sends results on."""

    def __init__(
        self,
        parts: NodeParts,
        coordinator: Connection,
        assign: Assign,
        pace: NodePace,
        links: dict[int, LinkSpeed],
    ) -> None:
        self._parts, self._coordinator, self._assign, self._pace = parts, coordinator, assign, pace
        self._onward = Onward(None if assign.next is None else links.get(assign.next.incarnation))
        self._inbox = Inbox(
            assign.epoch,
            parts.offer.max_rows,
            assign.chunk_rows,
            assign.groupings,
            None if parts.expect is None else parts.expect(assign.first, assign.last),
            parts.enough,
        )
        self._scope, self._ended, self._ready = trio.CancelScope(), trio.Event(), trio.Event()
        self._work: StageWork | None = None
        self._loop: StageLoop | None = None

    def stop(self) -> None:
        """Cancels the assignment; `run` returns when the stage is closed."""
        self._scope.cancel()

    def stats(self) -> Stats:
        """The stage's work so far."""
        return Stats(self._assign.epoch, NO_WORK, NO_WORK) if self._work is None else self._work.stats()

    def pace(self) -> Pace:
        """The measured speeds of the stage and of the link to the next node."""
        return Pace(self._assign.epoch, self._pace.slower, self._onward.measured)

    def progress(self) -> Progress:
        """How far the stage is with its calls."""
        return self._pace.progress(self._assign.epoch, self._inbox.bytes)

    async def report(self, error: ShoalError) -> None:
        """Tells the coordinator that the stage cannot run."""
        await self._coordinator.send(Broken(self._assign.epoch, *to_wire(error), None))

    @property
    def full(self) -> bool:
        """Whether the inbox accepts nothing until a batch is taken."""
        return self._inbox.full

    @property
    def epoch(self) -> Epoch:
        """The epoch of the assignment."""
        return self._assign.epoch

    @property
    def previous(self) -> int:
        """The incarnation of the only peer that may send rows."""
        return self._assign.previous

    async def feed(self, connection: Connection, first: Open | Close | Step) -> None:
        """Takes a message of the previous stage and reads its connection, until the assignment has ended.
        Errors as for Connection.receive."""
        await self._ready.wait()
        if self._loop is not None and not self._ended.is_set():
            await self._loop.feed(connection, first)

    async def run(self, before: Assignment | None) -> None:
        """Waits until the previous assignment has closed its stage, loads this one, and serves until
        stopped."""
        try:
            if before is not None:
                await before._ended.wait()
            with self._scope:
                await self._serve()
        finally:
            self._ended.set()
            self._ready.set()

    async def _serve(self) -> None:
        assign, start = self._assign, trio.current_time()
        try:
            stage = await self._parts.hop(lambda: self._parts.open_stage(assign.first, assign.last))
        except (ShoalError, MemoryError) as error:
            await self._coordinator.send(Broken(assign.epoch, *to_wire(error), None))
            return
        try:
            async with AsyncExitStack() as stack:
                following = None if assign.next is None else await self._reach(stack, assign.next)
                self._work = StageWork(stage, assign.epoch, last=following is None)
                expect = self._parts.expect
                self._pace.assigned(None if expect is None else expect(assign.first, assign.last))
                self._loop = self._open_loop(
                    StageParts(
                        self._inbox,
                        self._work,
                        self._pace,
                        self._onward,
                        following,
                        self._coordinator,
                        lambda: self._parts.share,
                    )
                )
                self._ready.set()
                seconds = trio.current_time() - start
                pages = stage.kv_pages
                room = None if pages is None else Room(pages, stage.page_positions)
                await self._coordinator.send(Loaded(assign.epoch, seconds, self._parts.resident(), room))
                await self._loop.run()
        except ModelFileError as error:
            clear_frames(error.__traceback__)  # they keep the weights
            await self.report(error)
        except _NextLost as lost:
            assert assign.next is not None
            again = isinstance(lost.error, ConnectionStalledError)
            await self._coordinator.send(
                Broken(assign.epoch, *to_wire(lost.error), assign.next.incarnation, again)
            )
        finally:
            stage.close()

    async def _reach(self, stack: AsyncExitStack, peer: Peer) -> Connection:
        """Connects to the next node, and starts a task that receives on that connection."""
        parts = self._parts
        try:
            connection = await enter_dial(
                stack, parts.open_stream, parts.identity, peer, "step", parts.timing.handshake
            )
        except NetError as error:
            raise _NextLost(error) from error
        tasks = await stack.enter_async_context(open_tasks())
        stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(self._watch, connection, peer)
        return connection

    async def _watch(self, connection: Connection, peer: Peer) -> None:
        """Watches the connection to the next node. _NextLost: it has ended, or carries nothing."""
        parts = self._parts
        watch = Watch(
            connection,
            parts.timing,
            busy=lambda: self._work is not None and self._work.busy,
            probe=partial(probe, parts.open_stream, parts.identity, peer, parts.timing.handshake),
            ponged=self._ponged,
        )
        try:
            await watch.run()
        except ShoalError as error:
            raise _NextLost(error) from error

    def _ponged(self, pong: Pong) -> None:
        if pong.at_once and self._loop is not None:
            self._onward.answered(pong.nonce, self._loop.clock())

    def _open_loop(self, parts: StageParts) -> StageLoop:
        if self._parts.own_thread and os.name == "posix":
            return ThreadLoop(parts, spin=self._parts.spin)
        return TaskLoop(parts, self._parts.hop)


class _NextLost(Exception):
    """The next node of the chain cannot be reached or is lost; `error` is the reason."""

    def __init__(self, error: ShoalError) -> None:
        super().__init__(str(error))
        self.error = error
