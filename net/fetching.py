"""The side of `files` connections that gets files: it follows a coordinator's orders to have the files of
some units on disk, and reports what it has.

What to ask whom for is decided by net/fetch_plan.py, and how much to ask ahead by net/fetch_window.py.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from ..engine.errors import ShoalError
from .assignment import NodeParts
from .connection import Connection, open_tasks
from .dial import dial
from .errors import TEXT_LIMIT, NodeLostError, RemoteProtocolError, printable
from .fetch_plan import FetchPlan, GetAllSums, GetPiece
from .fetch_window import Window
from .files import Files, Part, Room
from .messages import Fetch, FileBytes, GetBytes, GetSums, Held, Peer, Source, Sums

OPEN_FILES, MOST_FILES = 4, 12
"""Files that are fetched at a time; and with them those that are hashed and written to the disk for good,
which may take longer than fetching the next ones."""
SOURCES = 8
"""Sources that are asked at a time."""
REPORT_SECONDS = 0.5
AGAIN_SECONDS = (0.5, 1.0, 2.0, 5.0)
"""Pauses before a source that failed is asked again; the last one is repeated."""
SUMS_SECONDS = 60.0
"""How long a source may take to compute the sums of a file."""
LOOK_SECONDS = 5.0
"""How often files that could not be begun are looked at again."""
WRITE_BYTES, WAITING = 512 * 1024, 2
"""What is hashed and written at a time, and how many such parts of a source may wait for that."""
RATE_SECONDS = 0.25
"""How often the rate of a source is measured."""
IDLE_SECONDS = 30.0
"""How long a connection that nothing is asked on is kept."""


@dataclass(eq=False, slots=True)
class _Opened:
    """A part, used by one task at a time; None once it is closed."""

    part: Part | None
    using: trio.Lock = field(default_factory=trio.Lock)


@dataclass(eq=False, slots=True)
class _Incoming:
    """A piece on its way: what has arrived and is not yet written."""

    job: GetPiece
    asked: int
    """The byte up to which it was asked for."""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    buffer: bytearray = field(default_factory=bytearray)


class Fetcher:
    """Follows the orders of one coordinator. `in_use` are the units of the node's stage, and `busy` tells
    whether it computes for answers."""

    def __init__(
        self,
        parts: NodeParts,
        files: Files,
        coordinator: Connection,
        in_use: Callable[[], Collection[int]],
        busy: Callable[[], bool],
    ) -> None:
        self._parts, self.files, self._coordinator = parts, files, coordinator
        self._in_use, self.busy = in_use, busy
        self.plan = FetchPlan()
        self._order: Fetch | None = None
        self._ordered, self._news = trio.Event(), trio.Event()
        self._told: Held | None = None
        self._report_due = trio.Event()
        self._open: dict[str, _Opened] = {}
        self._asking: dict[Peer, trio.CancelScope] = {}
        self._slots = trio.CapacityLimiter(SOURCES)
        self._problem, self._more = "", False
        self._finishing: set[str] = set()
        self._trouble: dict[int, str] = {}

    def order(self, fetch: Fetch) -> None:
        """Follows this order instead of earlier ones."""
        self._order, self._told = fetch, None
        self._ordered.set()

    async def run(self) -> None:
        """Works until cancelled."""
        try:
            async with open_tasks() as tasks:
                tasks.start_soon(self._report)
                while True:
                    # A file that another process fetches, or a full disk, may be looked at again.
                    with trio.move_on_after(LOOK_SECONDS):
                        await self._ordered.wait()
                    self._ordered = trio.Event()
                    if self._order is not None:
                        await self._follow(self._order, tasks)
        finally:
            for opened in self._open.values():
                await self._close(opened)

    async def _follow(self, order: Fetch, tasks: trio.Nursery) -> None:
        try:
            room = await self._parts.hop(partial(self.files.make_room, order.units, self._in_use()))
        except OSError as error:
            room = Room((), f"files cannot be kept: {error.strerror}")
        self._problem = room.problem
        dropped = self._open.keys() - set(room.names)
        for name in dropped:
            self.plan.end(name)
        for opened in [self._open.pop(name) for name in dropped]:
            await self._close(opened)
        for name in room.names:
            if len(self._open) - len(self._finishing) >= OPEN_FILES or len(self._open) >= MOST_FILES:
                break
            if name not in self._open:
                await self._begin(name)
        self._more = len(room.names) > len(self._open)
        self.plan.sort(room.names)
        self.plan.look(trio.current_time())
        self._offer(order.sources, tasks)
        self._changed()

    async def _begin(self, name: str) -> None:
        try:
            part = await self._parts.hop(partial(self.files.part, name))
        except OSError as error:
            self._problem = f"{name} cannot be written: {error.strerror}"
            return
        if part is not None:
            self._open[name] = _Opened(part)
            self.plan.begin(name, part.size, part.have)

    def _offer(self, sources: Collection[Source], tasks: trio.Nursery) -> None:
        """Lets the tasks of these sources run, and those of others end."""
        mine = self._parts.identity.incarnation
        asked = {source.peer: source for source in sources if source.peer.incarnation != mine}
        for peer in self._asking.keys() - asked.keys():
            self._asking.pop(peer).cancel()
        self.plan.offered(
            {peer.incarnation: self.files.names(source.units) for peer, source in asked.items()}
        )
        for peer in asked.keys() - self._asking.keys() if not self.idle else ():
            self._asking[peer] = scope = trio.CancelScope()
            tasks.start_soon(self._ask, peer, scope, tasks)

    # --- one source

    async def _ask(self, peer: Peer, scope: trio.CancelScope, tasks: trio.Nursery) -> None:
        """Gets files from a source until there is nothing left to fetch."""
        parts, failures = self._parts, 0
        with scope:
            while not self.idle:
                if not self.plan.has_work(peer.incarnation):
                    await self._news.wait()
                    continue
                try:
                    async with (
                        self._slots,
                        dial(
                            parts.open_stream, peer.host, peer.port, parts.identity, "files",
                            seconds=parts.timing.handshake, peer=peer,
                        ) as (connection, _),
                    ):  # fmt: skip
                        if connection.device is not None and connection.device.role == "head":
                            self.plan.is_head(peer.incarnation)
                        await _Asking(self, connection, peer, tasks).run()
                        failures = 0
                except ShoalError as error:
                    failures += 1
                    if self._trouble.get(peer.incarnation) != str(error):
                        parts.log(f"fetching: {error}")
                    self._trouble[peer.incarnation] = str(error)
                finally:
                    self.plan.lost(peer.incarnation)
                    self._changed()
                await trio.sleep(AGAIN_SECONDS[min(failures, len(AGAIN_SECONDS) - 1)])
        if self._asking.get(peer) is scope:
            del self._asking[peer]

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to fetch."""
        return not self._open and not self._more

    @property
    def overdue(self) -> float:
        """How long a source may take to answer."""
        return self._parts.timing.overdue

    async def news(self) -> None:
        """Waits until there may be something else to ask for."""
        await self._news.wait()

    async def write(self, name: str, at: int, data: bytearray, digest: hashlib._Hash) -> None:
        """Writes bytes of a piece, and adds them to its digest."""
        await self._use(name, partial(_written, at=at, data=data, digest=digest))
        self._report_due.set()

    async def arrived(self, peer: Peer, job: GetPiece, digest: bytes, tasks: trio.Nursery) -> None:
        """Takes a piece that was written whole."""
        source, name, liars = peer.incarnation, job.name, set(self.plan.liars)
        if self.plan.arrived(source, name, job, digest, peer.name):
            self._trouble.pop(source, None)
            await self._use(name, lambda part: part.keep(job.piece, digest, peer.name))
            self._complete(name, tasks)
        else:
            self._parts.log(
                f"fetching: piece {job.piece} of {name} from {peer.name} is wrong, and is fetched again"
            )
            self._name_liars(liars)
        self._changed()

    async def told(self, peer: Peer, sums: Sums, tasks: trio.Nursery) -> None:
        """Takes the sums of a file. ValueError: they cannot be those of the file."""
        wrong = self.plan.told(peer.incarnation, sums.name, sums.sums)
        if wrong:
            await self._use(sums.name, lambda part: part.forget(wrong))
        self._complete(sums.name, tasks)
        self._changed()

    def _complete(self, name: str, tasks: trio.Nursery) -> None:
        if self.plan.complete(name) and name not in self._finishing:
            self._finishing.add(name)
            self._ordered.set()  # the next file
            tasks.start_soon(self._finish, name)

    async def _finish(self, name: str) -> None:
        liars = set(self.plan.liars)
        opened = self._open.get(name)
        try:
            right = await self._use(name, lambda part: part.finish(self.busy))
        finally:
            self._finishing.discard(name)
        if right is None or opened is None or self._open.get(name) is not opened:
            return  # it is not fetched any more
        self.plan.finished(name, right=right)
        self._name_liars(liars)
        if right:
            del self._open[name]
            await self._close(opened)
            self._ordered.set()
        self._changed()

    async def _use(self, name: str, call: Callable[[Part], bool | None]) -> bool | None:
        """Does something with a part in a thread. None: it is closed, or the disk refused; then all that is
        fetched is given up until it is looked at again."""
        opened = self._open.get(name)
        if opened is None:
            return None
        async with opened.using:
            if opened.part is None:
                return None
            try:
                return await self._parts.hop(partial(call, opened.part))
            except OSError as error:
                problem = f"{name} cannot be written: {error.strerror}"
        self.plan.end(name)
        self._open.pop(name, None)
        await self._close(opened)
        self._problem = problem
        self._changed()
        return None

    async def _close(self, opened: _Opened) -> None:
        with trio.CancelScope(shield=True):
            async with opened.using:
                part, opened.part = opened.part, None
                if part is not None:
                    with suppress(OSError):  # what could not be kept is fetched again
                        await self._parts.hop(part.close)

    def _name_liars(self, before: Collection[int]) -> None:
        """Logs which sources have been found out since."""
        order = self._order
        named = {} if order is None else {s.peer.incarnation: s.peer.name for s in order.sources}
        for liar in self.plan.liars.keys() - before:
            who, what = named.get(liar, "a node"), self.plan.liars[liar]
            self._parts.log(f"fetching: {who} has sent wrong bytes of {what}, and is not asked again")

    # --- reports

    def _changed(self) -> None:
        self._news.set()
        self._news = trio.Event()
        self._report_due.set()

    def _held(self) -> Held:
        units = () if self._order is None else self._order.units
        return Held(
            tuple(sorted(self.files.held())),
            *self.files.progress(units),
            printable(self._what_is_wrong(), TEXT_LIMIT),
        )

    def _what_is_wrong(self) -> str:
        if self._problem:
            return self._problem
        hopeless = self.plan.hopeless()
        if hopeless:
            return f"all nodes that have {hopeless[0]} have sent wrong bytes of it"
        if self._open and self._asking and all(p.incarnation in self._trouble for p in self._asking):
            return next(self._trouble[peer.incarnation] for peer in self._asking)
        return ""

    async def _report(self) -> None:
        """Tells the coordinator at once which units are whole, and else from time to time how many bytes."""
        sent = -REPORT_SECONDS
        while True:
            await self._report_due.wait()
            self._report_due = trio.Event()
            held = self._held()
            with trio.move_on_at(sent + REPORT_SECONDS):
                while self._told is not None and _alike(self._told, held):
                    await self._news.wait()
                    held = self._held()
            held = self._held()
            if held != self._told and self._order is not None:
                self._told, sent = held, trio.current_time()
                await self._coordinator.send(held)


def _alike(one: Held, other: Held) -> bool:
    return (one.units, one.problem) == (other.units, other.problem)


def _written(part: Part, *, at: int, data: bytearray, digest: hashlib._Hash) -> None:
    digest.update(data)
    part.write(at, data)


@dataclass(frozen=True, slots=True)
class _Request:
    incoming: _Incoming
    first: int
    last: int
    sent: float


class _Asking:
    """One connection to a source."""

    def __init__(self, fetcher: Fetcher, connection: Connection, peer: Peer, tasks: trio.Nursery) -> None:
        self._fetcher, self._connection, self._peer, self._tasks = fetcher, connection, peer, tasks
        self._window, self._rate = Window(), _Rate()
        self._next: _Incoming | None = None
        """The piece that is being asked for."""
        self._requests = deque[_Request]()
        self._outstanding = self._sums = 0
        self._sums_due = math.inf
        """The number of files whose sums have not come, and by when the next ones have to."""
        # Bytes are written by another task, since the time until this one reads counts as time on the way.
        self._arrived, self._to_take = trio.open_memory_channel[tuple[_Request, bytearray]](WAITING)

    async def run(self) -> None:
        """Asks until there has been nothing to ask for a while. Errors as for Connection.receive."""
        async with open_tasks() as tasks, self._arrived:
            tasks.start_soon(self._take_all)
            while not self._fetcher.idle:
                self._request()
                if not self._requests and not self._sums:
                    self._rate.rest()
                    with trio.move_on_after(IDLE_SECONDS):
                        await self._fetcher.news()
                        continue
                    return
                message = await self._receive()
                if isinstance(message, Sums):
                    await self._take_sums(message)
                elif (request := self._collect(message)) is not None:
                    data, request.incoming.buffer = request.incoming.buffer, bytearray()
                    await self._arrived.send((request, data))

    async def _receive(self) -> Sums | FileBytes:
        seconds = self._sums_due - trio.current_time() if self._sums else self._fetcher.overdue
        with trio.move_on_after(max(0.0, seconds)):
            message = await self._connection.receive()
            assert isinstance(message, Sums | FileBytes), "the wire lets nothing else through"
            return message
        raise NodeLostError(
            f"{self._connection.peer} has sent no {'sums' if self._sums else 'bytes'} for too long"
        )

    def _request(self) -> None:
        """Asks for as much as the window allows."""
        source = self._peer.incarnation
        while True:
            now = trio.current_time()
            if self._next is None or not self._fetcher.plan.owns(source, self._next.job):
                job = self._fetcher.plan.next(source, now)
                if job is None:
                    return
                if isinstance(job, GetAllSums):
                    self._sums += 1
                    self._sums_due = min(self._sums_due, now + SUMS_SECONDS)
                    self._connection.post(GetSums(job.name))
                    continue
                self._next = _Incoming(job, job.first)
            size = self._window.request(self._outstanding, now)
            if not size:
                return
            incoming, job = self._next, self._next.job
            first, last = incoming.asked, min(incoming.asked + size, job.last)
            if not self._connection.post(GetBytes(job.name, first, last)):
                return
            incoming.asked = last
            self._requests.append(_Request(incoming, first, last, now))
            self._outstanding += last - first
            if last == job.last:
                self._next = None

    def _match(self, message: FileBytes) -> _Request:
        """The request that was answered. RemoteProtocolError: none was."""
        request = self._requests.popleft() if self._requests else None
        if request is None or (message.first, len(message.data)) != (
            request.first,
            request.last - request.first,
        ):
            raise RemoteProtocolError(f"{self._connection.peer} sent bytes of a file that were not asked for")
        self._outstanding -= len(message.data)
        now = trio.current_time()
        gentle = message.busy or self._fetcher.busy()
        self._window.answered(now - request.sent, now, gentle=gentle)
        if self._rate.add(len(message.data), now):
            self._fetcher.plan.measured(self._peer.incarnation, self._rate.bytes_per_s)
        return request

    def _collect(self, message: FileBytes) -> _Request | None:
        """Takes an answer; the request, if enough of its piece is there to be written."""
        request = self._match(message)
        incoming, job = request.incoming, request.incoming.job
        if not self._fetcher.plan.owns(self._peer.incarnation, job):
            return None
        incoming.buffer += message.data
        enough = request.last == job.last or len(incoming.buffer) >= WRITE_BYTES
        return request if enough else None

    async def _take_all(self) -> None:
        async for request, data in self._to_take:
            await self._take(request, data)

    async def _take(self, request: _Request, data: bytearray) -> None:
        incoming, job = request.incoming, request.incoming.job
        plan, source = self._fetcher.plan, self._peer.incarnation
        if not plan.owns(source, job):
            return
        await self._fetcher.write(job.name, request.last - len(data), data, incoming.digest)
        if request.last == job.last and plan.owns(source, job):
            await self._fetcher.arrived(self._peer, job, incoming.digest.digest(), self._tasks)

    async def _take_sums(self, sums: Sums) -> None:
        if not self._sums:
            raise RemoteProtocolError(f"{self._connection.peer} sent sums that were not asked for")
        self._sums -= 1
        self._sums_due = trio.current_time() + SUMS_SECONDS if self._sums else math.inf
        try:
            await self._fetcher.told(self._peer, sums, self._tasks)
        except ValueError as error:
            raise RemoteProtocolError(f"{self._connection.peer} sent {error}") from error


class _Rate:
    """The rate at which bytes arrive while some are asked for."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._bytes = 0
        self._since: float | None = None

    def rest(self) -> None:
        """Nothing is asked for."""
        self._since = None

    def add(self, count: int, now: float) -> bool:
        """Counts bytes; whether that has changed the rate."""
        if self._since is None:
            self._bytes, self._since = 0, now
            return False
        self._bytes += count
        if now - self._since < RATE_SECONDS:
            return False
        found = self._bytes / (now - self._since)
        self.bytes_per_s += (found - self.bytes_per_s) * (0.3 if self.bytes_per_s else 1.0)
        self._bytes, self._since = 0, now
        return True
