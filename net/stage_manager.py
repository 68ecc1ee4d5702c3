"""The manager of a node's stage for one coordinator: carries out what net/stage_state.py decides.

The stage outlives epochs: a transition changes its range and its sessions, and only the loop, the inbox and
the connections are made anew (net/assignment.py). What changes the stage itself is done by one task, in the
order of the commands.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import trio

from ..engine.errors import NoPlanError, ShoalError
from ..planner import LinkSpeed
from .assignment import Assignment, NodeParts
from .carry import KvReceiver
from .connection import Connection, open_tasks
from .copies import Copies
from .errors import NetError, RemoteProtocolError, to_wire
from .liveness import CALL_FACTOR, LOAD_BYTES_PER_S, next_tick
from .messages import (
    Assign,
    Broken,
    Carried,
    Commit,
    Complete,
    Epoch,
    Kept,
    Loaded,
    Message,
    Pages,
    Prepared,
    Refill,
    Room,
    Shared,
    Spares,
)
from .pace import NodePace
from .sampling_updates import Notice
from .stage_state import (
    Adopt,
    Adopted,
    Command,
    Completed,
    CopyAhead,
    Dial,
    Drop,
    Event,
    NodeState,
    OpenStage,
    Order,
    Prepare,
    Ready,
    SendTail,
    StartLoop,
    StopLoop,
    Tell,
    decide,
)
from .work import NO_SESSIONS, Session, StageLike, StageWork

_CROWDED = "running answers need the room for keys and values"
LOAD_PATIENCE = 2.0
"""How long a run that has no room for keys and values waits for weights that are being loaded, to drop
them."""
MOST_ORDERS = 16
"""The most orders about the stage that may wait to be carried out."""
COPY_SECONDS, COPY_PAUSE = 0.5, 4
"""How often a node looks for the time to load a copy of weights. After one it waits for so many times as long
as that took."""


class StageManager:
    """Holds a node's stage for one coordinator. `tasks` outlives `run`."""

    def __init__(
        self,
        parts: NodeParts,
        coordinator: Connection,
        pace: NodePace,
        links: Mapping[int, LinkSpeed],
        tasks: trio.Nursery,
    ) -> None:
        self._parts, self._coordinator, self._pace, self._links = parts, coordinator, pace, links
        self._tasks = tasks
        self._state, self._news = NodeState(), trio.Event()
        self._assignments: dict[Epoch, Assignment] = {}
        self._over: list[Assignment] = []
        """Assignments that were dropped, and may be ending."""
        self._stage: StageLike | None = None
        self._owner: Epoch | None = None
        """The epoch whose units the stage has."""
        self._range = range(0)
        self._left = False
        """Whether the stage has left its range, to make room for the next one."""
        self._carried: Mapping[int, Session] = NO_SESSIONS
        """The sessions that the stage holds for the next loop."""
        self._reading: float | None = None
        """For a stage that goes on, how long its next call may take longer, to read units that have come."""
        self._copies = Copies()
        self._crowd: Assignment | None = None
        """The assignment whose prepared range takes room from keys and values. Guarded by the lock."""
        self._crowd_lock = threading.Lock()
        self._token = trio.lowlevel.current_trio_token()
        self._bulks: dict[trio.CancelScope, Epoch] = {}
        """The connections of givers, with the epoch of which they are."""
        self._events = deque[Event]()
        self._work, self._to_do = trio.open_memory_channel[Callable[[], Awaitable[None]]](math.inf)
        self._reports, self._to_send = trio.open_memory_channel[Message](math.inf)

    async def run(self) -> None:
        """Works until cancelled, and then closes the stage."""
        try:
            async with open_tasks() as tasks:
                tasks.start_soon(self._send_reports)
                tasks.start_soon(self._hold_copies)
                async for work in self._to_do:
                    await work()
        finally:
            with trio.CancelScope(shield=True):
                for assignment in (*self._assignments.values(), *self._over):
                    assignment.drop()
                    await assignment.ended()
            self._close_stage()

    @property
    def current(self) -> Assignment | None:
        """The assignment in force, which may be loading; None if there is none."""
        return None if self._state.epoch is None else self._assignments[self._state.epoch]

    @property
    def units(self) -> frozenset[int]:
        """The units of the stage, and of those that are prepared."""
        ranges = [range(one.assign.first, one.assign.last) for one in self._assignments.values()]
        return frozenset(unit for units in (self._range, *ranges) for unit in units)

    @property
    def busy(self) -> bool:
        """Whether many orders wait to be carried out."""
        return self._work.statistics().current_buffer_used > MOST_ORDERS

    def order(self, message: Order) -> None:
        """Follows an order; the coordinator is told of its outcome. RemoteProtocolError: it cannot be
        followed."""
        if isinstance(message, Assign):
            check_assign(message, self._parts.units)
            if message.epoch in self._assignments:
                raise RemoteProtocolError(f"the coordinator assigned units twice in epoch {message.epoch}")
            self._assignments[message.epoch] = Assignment(
                self._parts, self._coordinator, message, self._pace, self._links, self._tasks, self._tell
            )
        elif isinstance(message, Commit) and message.epoch in self._assignments:
            self._assignments[message.epoch].began = trio.current_time()
        self._tell(message)

    def refill(self, order: Refill) -> None:
        """Follows an order to send kept rows. RemoteProtocolError: it cannot be followed."""
        current = self.current
        if current is not None and current.epoch == order.epoch:
            current.refill(order)

    def told(self, notice: Notice) -> None:
        """Takes what the coordinator tells of a session. RemoteProtocolError: this is not the last stage, or
        as for Inbox.tell."""
        current = self.current
        if current is not None and current.epoch == notice.epoch:
            current.told(notice)

    def spare(self, units: Sequence[int]) -> None:
        """Takes an order to hold copies of the weights of these units. RemoteProtocolError: there are none
        such."""
        if any(unit >= self._parts.units for unit in units):
            raise RemoteProtocolError(
                f"the coordinator wants copies of units that the model of {self._parts.units} has not"
            )
        self._copies.order(units)

    async def receive_bulk(self, connection: Connection, giver: int) -> None:
        """Takes keys and values from a giver until it disconnects, or the epoch is over. Errors as for
        Connection.receive, and what is wrong with them."""
        with trio.CancelScope() as scope:
            try:
                while True:
                    message = await connection.receive()
                    assert isinstance(message, Carried | Pages | Shared | Complete), (
                        "the wire lets nothing else through"
                    )
                    self._bulks[scope] = message.epoch
                    await self._take(message, giver)
            finally:
                self._bulks.pop(scope, None)

    async def _take(self, message: Carried | Pages | Shared | Complete, giver: int) -> None:
        assignment = await self._taking(message.epoch, giver)
        units = self._state.taken(message.epoch, giver)
        if assignment is None or assignment.taker is None or units is None:
            return
        if isinstance(message, Complete):
            self._tell(Completed(message.epoch, giver))
            return
        try:
            await assignment.taker.take(message, units)
        except (ShoalError, MemoryError) as error:
            if assignment.dropped:
                return
            self._tell(Broken(message.epoch, *to_wire(error), None))
            raise error if isinstance(error, ShoalError) else NetError("out of memory") from error

    async def _taking(self, epoch: Epoch, giver: int) -> Assignment | None:
        """The assignment of a transition in which a giver sends something; None if there is none. Waits for
        an order that may be on its way, and for the stage."""
        while self._state.awaits(epoch):
            await self._news.wait()
        while self._state.taken(epoch, giver) is not None:
            assignment = self._assignments[epoch]
            if assignment.taker is not None:
                return assignment
            await self._news.wait()
        return None

    def _tell(self, event: Event) -> None:
        """Carries out what follows from an event, and from those that this leads to."""
        self._events.append(event)
        if len(self._events) > 1:
            return  # the caller is called by the loop below
        while self._events:
            self._state, commands = decide(self._state, self._events[0])
            for command in commands:
                self._carry_out(command)
            self._events.popleft()
        self._notify()

    def _notify(self) -> None:
        self._news.set()
        self._news = trio.Event()
        for scope, epoch in self._bulks.items():  # a giver that has vanished never disconnects
            if epoch not in self._assignments and not self._state.awaits(epoch):
                scope.cancel()

    def _carry_out(self, command: Command) -> None:
        match command:
            case OpenStage(assign):
                self._do(self._open, self._assignments[assign.epoch])
            case Prepare(assign):
                self._do(self._prepare, self._assignments[assign.epoch])
            case Dial(epoch, peer):
                self._assignments[epoch].dial(peer)
            case CopyAhead(epoch, taker, gifts):
                base = self.current
                if base is None or base.work is None or self._stage is None:
                    self._tell(Broken(epoch, *to_wire(NetError("there is nothing to give away here")), None))
                else:
                    self._assignments[epoch].give(taker, gifts, self._stage, base.work)
            case StopLoop(epoch):
                self._assignments[epoch].stop()
            case SendTail(commit, giver):
                self._assignments[commit.epoch].send_tail(commit, giver)
            case Adopt(assign, commit):
                self._do(
                    partial(self._adopt, commit=commit, base=self.current), self._assignments[assign.epoch]
                )
            case StartLoop(epoch):
                self._start(self._assignments[epoch])
            case Tell(what, epoch):
                self._reports.send_nowait(self._report(what, epoch))
            case Drop(epoch):
                self._drop(self._assignments[epoch])

    def _do(self, work: Callable[[Assignment], Awaitable[None]], assignment: Assignment) -> None:
        """Has the task of the stage do something, after all that it has been given before."""
        self._work.send_nowait(partial(work, assignment))

    def _drop(self, assignment: Assignment) -> None:
        del self._assignments[assignment.epoch]
        assignment.drop()
        self._over.append(assignment)
        self._do(self._undo, assignment)

    def _start(self, assignment: Assignment) -> None:
        for other in [other for epoch, other in self._assignments.items() if epoch < assignment.epoch]:
            self._drop(other)  # its stage is the one that starts now
        assert self._stage is not None
        assign = assignment.assign
        last = None if assign.next is None else assign.last
        work = StageWork(self._stage, assign.epoch, last, self._carried, self._make_room)
        assignment.begin(work, self._reading)
        self._carried, self._reading = NO_SESSIONS, None

    def _report(self, what: Literal["prepared", "loaded"] | Broken, epoch: Epoch) -> Message:
        if isinstance(what, Broken):
            return what
        assignment = self._assignments[epoch]
        seconds = trio.current_time() - assignment.began
        if what == "prepared":
            return Prepared(epoch, seconds, assignment.given)
        pages = None
        if self._stage is not None and assignment.assign.first < assignment.assign.last:
            pages = self._stage.kv_pages
        room = None if pages is None or self._stage is None else Room(pages, self._stage.page_positions)
        return Loaded(epoch, seconds, self._parts.resident(), room, assignment.rows)

    async def _send_reports(self) -> None:
        async for report in self._to_send:
            await self._coordinator.send(report)

    async def _hold_copies(self) -> None:
        """Loads copies while the stage has nothing else to do, one after another, and reports them."""
        while True:
            await trio.sleep_until(next_tick(trio.current_time(), COPY_SECONDS))
            if self._stage is None:
                continue
            news = self._copies.news(self._stage.held)
            if news is not None:
                self._reports.send_nowait(Spares(news))
            if self.idle and self._copies.next(self._stage.held, self._range) is not None:
                began, done = trio.current_time(), trio.Event()
                self._work.send_nowait(partial(self._hold_next, done))
                await done.wait()
                await trio.sleep(COPY_PAUSE * (trio.current_time() - began))

    @property
    def idle(self) -> bool:
        """Whether the stage computes nothing at the moment, and is not about to change."""
        force = self._state.force
        if force is None or force.phase != "serving" or self._state.change is not None:
            return False
        return (
            not self._work.statistics().current_buffer_used
            and self._pace.progress(force.assign.epoch, 0).running is None
        )

    # --- the task of the stage

    async def _hold_next(self, done: trio.Event) -> None:
        stage, own = self._stage, self._range
        units = None if stage is None else self._copies.next(stage.held, own)
        if stage is not None and units is not None:
            try:
                await self._parts.hop(partial(stage.hold, units))
            except (ShoalError, MemoryError) as error:
                self._parts.log(f"no copies of weights are held: {error}")
                self._copies.order(())
            else:
                self._copies.held(units, stage.held)
        done.set()

    async def _open(self, assignment: Assignment) -> None:
        if assignment.dropped:
            return
        assign = assignment.assign
        try:
            self._stage = await self._parts.hop(partial(self._parts.open_stage, assign.first, assign.last))
        except (ShoalError, MemoryError) as error:
            self._tell(Broken(assign.epoch, *to_wire(error), None))
            return
        self._owner, self._range, self._left = assign.epoch, range(assign.first, assign.last), False
        self._copies.renew()
        left = self._parts.kv_bytes(assign.first, assign.last)
        assignment.reading = self._reading_of(range(0), left)
        await self._take_over(assignment, self._stage, history=True)
        self._tell(Ready(assign.epoch))

    async def _prepare(self, assignment: Assignment) -> None:
        stage, assign = self._stage, assignment.assign
        if assignment.dropped or stage is None:
            return
        await self._take_over(assignment, stage, history=False)
        beside = range(assign.first, assign.last)
        try:
            if beside != self._range or self._left:
                await self._parts.hop(partial(self._load_beside, assignment, stage, beside))
        except (ShoalError, MemoryError) as error:
            self._tell(Broken(assign.epoch, *to_wire(error), None))
        else:
            self._tell(Ready(assign.epoch))

    def _load_beside(self, assignment: Assignment, stage: StageLike, beside: range) -> None:
        """Prepares a range beside the running one. Keys and values have less room meanwhile. If the base has
        ended, and there is no room for both, it makes place first."""
        try:
            limit = self._beside(stage, self._range, beside)
        except NoPlanError:
            if not assignment.assign.ended:
                raise
            limit = self._beside(stage, beside, range(0))
            self._left = True
            stage.leave(beside.start, beside.stop)
        assignment.reading = self._reading_of(range(0) if self._left else self._range, limit)
        with self._crowd_lock:
            self._crowd = assignment
            assignment.prepared = stage.prepare(beside.start, beside.stop, limit)

    def _reading_of(self, held: range, left: int | None) -> float:
        """How long the first call may take longer, to read what was loaded beside the units that are held:
        `left` is what both leave for keys and values."""
        whole = self._parts.kv_bytes(held.start, held.stop)
        return 0.0 if whole is None or left is None else (whole - left) / LOAD_BYTES_PER_S / CALL_FACTOR

    def _beside(self, stage: StageLike, units: range, beside: range) -> int | None:
        """What a range leaves for keys and values beside another one. NoPlanError: less than they need."""
        limit = self._parts.kv_bytes(units.start, units.stop, beside)
        if limit is not None and stage.kv_bytes > limit:
            what = beside or units
            raise NoPlanError(f"{_CROWDED}: units [{what.start}, {what.stop}) do not fit beside them")
        return limit

    def _discard(self, assignment: Assignment) -> bool:
        """Undoes `_load_beside`, in any thread. False: that was done before."""
        with self._crowd_lock:
            return self._discard_now(assignment)

    def _discard_now(self, assignment: Assignment) -> bool:
        prepared, assignment.prepared, self._crowd = assignment.prepared, None, None
        if prepared is None or self._stage is None:
            return False
        self._whole_room()  # before copies of the units are weighed against it
        self._stage.discard(prepared)
        return True

    def _make_room(self) -> bool:
        """Gives up the transition whose weights take the room that a run needs. It is called between two
        runs, in their thread. False: there is none."""
        locked = self._crowd_lock.acquire(timeout=LOAD_PATIENCE)
        try:
            assignment = self._crowd
            if assignment is None:
                return False
            if locked:
                self._discard_now(assignment)
            else:  # weights are being loaded, and are dropped as soon as they are
                self._crowd = None
                self._whole_room()
        finally:
            if locked:
                self._crowd_lock.release()
        fault = Broken(assignment.epoch, *to_wire(NoPlanError(_CROWDED)), None)
        self._token.run_sync_soon(self._tell, fault)
        return True

    def _whole_room(self) -> None:
        """Lets keys and values have the room again that was promised."""
        limit = self._parts.kv_bytes(self._range.start, self._range.stop)
        if limit is not None and self._stage is not None:
            self._stage.limit_kv(limit)

    async def _take_over(self, assignment: Assignment, stage: StageLike, *, history: bool) -> None:
        """Lets the givers of the assignment send."""
        if assignment.assign.takes:
            incoming = await self._parts.hop(stage.incoming)
            stateless = self._parts.stateless
            assignment.taker = KvReceiver(incoming, self._parts.hop, history=history, stateless=stateless)
            self._notify()

    async def _adopt(self, assignment: Assignment, commit: Commit, base: Assignment | None) -> None:
        stage, assign, taker = self._stage, assignment.assign, assignment.taker
        if assignment.dropped or stage is None:
            return
        known: dict[int, Session] = {} if taker is None else dict(taker.sessions)
        if base is not None and base.work is not None:
            known |= base.work.sessions
        try:
            stays = self._range == range(assign.first, assign.last) and not self._left
            if assignment.prepared is None and not stays:
                raise NoPlanError(_CROWDED)  # since it was reported as prepared
            kept = self._kept(assign, commit, known)
            await self._parts.hop(partial(self._change, stage, assignment, commit, known, kept))
        except (ShoalError, ValueError, MemoryError) as error:
            self._tell(Broken(assign.epoch, *to_wire(error), None))
            return
        assignment.prepared = self._crowd = None
        if taker is not None:
            taker.incoming.close()
        if commit.lost_first < commit.lost_last:
            end = self._range.stop
            positions = {session: stage.rows_kept(session, end) for session in kept}
            assignment.rows = tuple(Kept(session, n) for session, n in positions.items() if n)
        self._owner, self._range = assign.epoch, range(assign.first, assign.last)
        self._reading = assignment.reading
        self._left = False
        self._carried = {session: known[session].truncated(positions) for session, positions in kept.items()}
        self._tell(Adopted(assign.epoch))

    def _change(
        self,
        stage: StageLike,
        assignment: Assignment,
        commit: Commit,
        known: Mapping[int, Session],
        kept: Mapping[int, int],
    ) -> None:
        """Changes the stage, in a thread. ValueError: what it was given does not fit."""
        assign, taker = assignment.assign, assignment.taker
        if taker is not None:
            taker.check_alike(known, kept)
        stage.adopt(
            assignment.prepared,
            kept,
            None if taker is None else taker.incoming,
            range(commit.lost_first, commit.lost_last),
            self._parts.kv_bytes(assign.first, assign.last),
        )

    def _kept(self, assign: Assign, commit: Commit, known: Mapping[int, Session]) -> dict[int, int]:
        """The positions of the commit's sessions that the stage keeps. It need not know a session without
        positions, or one whose keys and values it would have lost: their Open is sent again. NetError: it
        does not know another one."""
        lost = {*range(commit.lost_first, commit.lost_last), *self._parts.stateless}
        for kept in commit.sessions:
            if (
                kept.positions
                and kept.session not in known
                and not lost.issuperset(range(assign.first, assign.last))
            ):
                raise NetError(f"session {kept.session} of the commit has not been sent here")
        return {kept.session: kept.positions for kept in commit.sessions if kept.session in known}

    async def _undo(self, assignment: Assignment) -> None:
        await assignment.ended()
        self._over.remove(assignment)
        if assignment.epoch == self._owner:
            self._close_stage()
        elif assignment.prepared is not None:
            await self._parts.hop(partial(self._discard, assignment))

    def _close_stage(self) -> None:
        if self._stage is not None:
            self._stage.close()
        self._stage, self._owner, self._left = None, None, False
        self._carried = NO_SESSIONS


def check_assign(assign: Assign, units: int) -> None:
    """RemoteProtocolError: a stage of these units cannot be in a chain."""
    first, last = assign.first, assign.last
    empty = first == last == 0 and assign.base is not None and not assign.takes
    if (
        not (0 <= first < last <= units or empty)
        or (assign.next is None) != (empty or last == units)
        or not all(first <= take.first < take.last <= last for take in assign.takes)
        or not all(0 <= gift.first < gift.last <= units for gift in assign.gives)
        or (assign.base is None and (assign.gives or assign.takes))
    ):
        raise RemoteProtocolError(
            f"the coordinator assigned units [{first}, {last}) of {units} with "
            f"{'no' if assign.next is None else 'a'} next node: such a stage cannot be in a chain"
        )
