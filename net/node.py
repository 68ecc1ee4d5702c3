"""The node: a server that offers its device, runs the stage it is assigned, and passes activations on.

Each connection states its purpose (net/messages.py). A node serves one coordinator at a time: that connection
carries orders down and tokens up; when it ends, the node drops the stage and waits for the next coordinator.
A peer that breaks the protocol gets an Error and loses its connection; no other connection is affected.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import trio

from ..engine.errors import ShoalError
from ..planner import LinkSpeed
from .connection import (
    Connection,
    Hop,
    OpenStream,
    dial,
    greet,
    in_thread,
    is_peers_fault,
    open_connection,
    open_tasks,
    open_tcp,
)
from .errors import MismatchError, NetError, NodeLostError, RemoteProtocolError, to_wire
from .events import DEFAULT_TIMING, Timing
from .identity import Identity
from .inbox import Inbox
from .listen import host_port
from .messages import (
    Assign,
    Broken,
    Close,
    Data,
    Failed,
    GetStats,
    Hello,
    Loaded,
    Measure,
    Measured,
    Message,
    Offer,
    Open,
    Pace,
    Peer,
    Ping,
    Pong,
    Release,
    Result,
    Stats,
    Step,
    Work,
)
from .pace import Expect, NodePace, Onward
from .probe import measure_peer
from .work import StageLike, StageWork

MAX_CONNECTIONS = 64
MAX_STEP_CONNECTIONS = 16
MAX_TASKS = 16
PATIENCE_SECONDS = 2.0
_NO_WORK = Work(0, 0, 0.0)


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


class Node:
    """A node, which serves connections until it is cancelled."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._coordinator: Connection | None = None
        self._slot = trio.Semaphore(1)
        self._assignment: _Assignment | None = None
        self._last: _Assignment | None = None
        """The newest assignment, which may be ending."""
        self._pace = NodePace()
        self._links: dict[int, LinkSpeed] = {}
        """Links to other nodes by incarnation, as measured for this coordinator."""
        self._connections = trio.CapacityLimiter(MAX_CONNECTIONS)
        self._steps: set[trio.CancelScope] = set()
        """Cancel scopes of the connections that bring rows. They end when their coordinator leaves."""

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts connections on the listeners until cancelled, and closes the listeners."""
        await trio.serve_listeners(self.connected, listeners, task_status=task_status)

    async def connected(self, stream: trio.abc.Stream) -> None:
        """Serves one connection until it ends. Errors are logged and end only this connection."""
        async with self._connections, open_connection(stream, _address(stream), dialled=False) as connection:
            try:
                await self._serve(connection)
            except ShoalError as error:
                self._parts.log(str(error))
                if is_peers_fault(error):
                    await connection.refuse(error)
            except Exception as error:  # a bug here must not end the node
                self._parts.log("".join(traceback.format_exception(error)).rstrip())
                await connection.refuse(
                    NetError(f"{self._parts.identity.name} failed ({error!r}): its log has the traceback")
                )
            finally:
                if self._coordinator is connection:
                    self._coordinator = None
                    for scope in self._steps:
                        scope.cancel()
                    self._slot.release()

    async def _serve(self, connection: Connection) -> None:
        parts = self._parts
        hello = await greet(
            connection,
            parts.identity,
            parts.offer,
            seconds=parts.timing.handshake,
            admit=partial(self._admit, connection),
        )
        try:
            match hello.purpose:
                case "control":
                    await self._serve_coordinator(connection)
                case "step":
                    await self._serve_steps(connection)
                case "probe":
                    await self._serve_probe(connection)
        except NodeLostError as error:  # the usual end; a coordinator notices by its own connections
            if hello.purpose == "control":
                parts.log(f"{error}; waiting for the next coordinator")

    async def _admit(self, connection: Connection, hello: Hello) -> None:
        """Admits one coordinator at a time. A second one waits a moment, since the first may be about to
        leave."""
        if hello.purpose != "control":
            return
        with trio.move_on_after(PATIENCE_SECONDS):
            await self._slot.acquire()
            self._coordinator = connection
            return
        served = "another coordinator" if self._coordinator is None else self._coordinator.peer
        raise NetError(f"{self._parts.identity.name} is busy with {served}: stop that one or try again later")

    async def _serve_coordinator(self, connection: Connection) -> None:
        """Follows a coordinator's orders until it disconnects, then drops all state kept for it."""
        self._parts.log(f"{connection.peer} is the coordinator now")
        try:
            async with open_tasks() as tasks:
                while True:
                    self._follow(connection, await _heard(connection, self._parts.timing.overdue), tasks)
        finally:
            self._assignment = self._last = None
            self._pace, self._links = NodePace(), {}

    def _follow(self, connection: Connection, message: Message, tasks: trio.Nursery) -> None:
        if isinstance(message, Assign | Measure) and len(tasks.child_tasks) >= MAX_TASKS:
            raise RemoteProtocolError(
                f"{connection.peer} has sent more than {MAX_TASKS} orders that are still being carried out"
            )
        match message:
            case Ping(nonce):
                _post(connection, Pong(nonce, None if self._assignment is None else self._assignment.pace()))
            case Assign() | Release():
                if self._assignment is not None:
                    self._assignment.stop()
                self._assignment = None
                if isinstance(message, Assign):
                    _check_assign(message, self._parts.units)
                    self._assignment = _Assignment(self._parts, connection, message, self._pace, self._links)
                    tasks.start_soon(self._assignment.run, self._last)
                    self._last = self._assignment
            case Measure(peer):
                tasks.start_soon(self._measure, connection, peer)
            case GetStats():
                assignment = self._assignment
                _post(
                    connection, Stats(None, _NO_WORK, _NO_WORK) if assignment is None else assignment.stats()
                )
            case _:
                raise AssertionError(f"the wire lets no {type(message).__name__} through")

    async def _serve_steps(self, connection: Connection) -> None:
        """Puts the messages of the previous stage into the inbox of their epoch; drops those without an
        inbox.

        Accepted only while there is a coordinator, and from a few peers: idle connections must not use up the
        node's connections."""
        name = self._parts.identity.name
        if self._coordinator is None:
            raise NetError(f"{name} has no coordinator, so it accepts no rows")
        if len(self._steps) >= MAX_STEP_CONNECTIONS:
            raise NetError(
                f"{name} has {MAX_STEP_CONNECTIONS} connections that bring rows, the most it accepts: end one"
            )
        with trio.CancelScope() as scope:
            self._steps.add(scope)
            try:
                while True:
                    message = await connection.receive()
                    if isinstance(message, Ping):
                        _post(connection, Pong(message.nonce))
                        continue
                    assert isinstance(message, Open | Close | Step)
                    if self._assignment is not None:
                        await self._assignment.put(message)
            finally:
                self._steps.discard(scope)

    async def _serve_probe(self, connection: Connection) -> None:
        while True:
            match await _heard(connection, self._parts.timing.overdue):
                case Ping(nonce):
                    await connection.send(Pong(nonce))
                case message:
                    assert isinstance(message, Data)

    async def _measure(self, coordinator: Connection, peer: Peer) -> None:
        parts = self._parts
        try:
            found = await measure_peer(parts.open_stream, parts.identity, peer, parts.timing.handshake)
            self._links[peer.incarnation] = found
            answer = Measured(peer.incarnation, found, "")
        except (NodeLostError, MismatchError, RemoteProtocolError) as error:
            answer = Measured(peer.incarnation, None, to_wire(error)[1])
        await coordinator.send(answer)


class _Assignment:
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
        self._inbox = Inbox(assign.epoch, parts.offer.max_rows, assign.chunk_rows)
        self._arrived, self._taken = trio.Event(), trio.Event()
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        self._work: StageWork | None = None

    def stop(self) -> None:
        """Cancels the assignment; `run` returns when the stage is closed."""
        self._scope.cancel()

    def stats(self) -> Stats:
        """The stage's work so far."""
        return Stats(self._assign.epoch, _NO_WORK, _NO_WORK) if self._work is None else self._work.stats()

    def pace(self) -> Pace:
        """The measured speeds of the stage and of the link to the next node."""
        return Pace(self._assign.epoch, self._pace.slower, self._onward.measured)

    async def put(self, item: Open | Close | Step) -> None:
        """Queues an item, waiting while the inbox is full; drops it if the assignment has ended."""
        while self._inbox.full and not self._ended.is_set():
            await self._taken.wait()
        if not self._ended.is_set():
            self._inbox.put(item)
            self._arrived.set()

    async def run(self, before: _Assignment | None) -> None:
        """Waits until the previous assignment has closed its stage, loads this one, and serves until
        stopped."""
        try:
            if before is not None:
                await before._ended.wait()
            with self._scope:
                await self._serve()
        finally:
            self._ended.set()
            self._taken.set()

    async def _serve(self) -> None:
        assign, start = self._assign, trio.current_time()
        try:
            stage = await self._parts.hop(lambda: self._parts.open_stage(assign.first, assign.last))
        except (ShoalError, MemoryError) as error:
            await self._coordinator.send(Broken(assign.epoch, *to_wire(error), None))
            return
        try:
            async with AsyncExitStack() as stack:
                onward = None if assign.next is None else await self._reach(stack, assign.next)
                self._work = StageWork(stage, assign.epoch, last=onward is None)
                expect = self._parts.expect
                self._pace.assigned(None if expect is None else expect(assign.first, assign.last))
                seconds = trio.current_time() - start
                await self._coordinator.send(Loaded(assign.epoch, seconds, self._parts.resident()))
                await self._steps(self._work, onward or self._coordinator)
        except _NextLost as lost:
            assert assign.next is not None
            await self._coordinator.send(Broken(assign.epoch, *to_wire(lost.error), assign.next.incarnation))
        finally:
            stage.close()

    async def _reach(self, stack: AsyncExitStack, peer: Peer) -> Connection:
        """Connects to the next node, and starts a task that receives on that connection."""
        parts = self._parts
        try:
            connection, _ = await stack.enter_async_context(
                dial(
                    parts.open_stream, peer.host, peer.port, parts.identity, "step",
                    seconds=parts.timing.handshake, peer=peer,
                )
            )  # fmt: skip
        except (NodeLostError, MismatchError, RemoteProtocolError) as error:
            raise _NextLost(error) from error
        tasks = await stack.enter_async_context(open_tasks())
        stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(_watch, connection, self._onward)
        return connection

    async def _steps(self, work: StageWork, onward: Connection) -> None:
        """The loop of a stage: takes a batch, runs it in a worker thread, and sends the answers on."""
        while True:
            await self._arrived.wait()
            batch = self._inbox.take()
            if not self._inbox:
                self._arrived = trio.Event()
            self._taken.set()
            self._taken = trio.Event()
            start = trio.current_time()
            answers = await self._parts.hop(partial(work.do, batch))
            end = trio.current_time()
            work.count(batch, end - start)
            self._pace.count(batch, start, end)
            for answer in answers:
                connection = self._coordinator if isinstance(answer, Failed | Result) else onward
                try:
                    await connection.send(answer)
                except NodeLostError:  # the task that reads that connection reports its end and cancels this
                    await trio.sleep_forever()
            nonce = self._onward.due(answers, end)
            if nonce is not None:
                onward.post(Ping(nonce))


class _NextLost(Exception):
    """The next node of the chain cannot be reached or is lost; `error` is the reason."""

    def __init__(self, error: ShoalError) -> None:
        super().__init__(str(error))
        self.error = error


async def _watch(connection: Connection, onward: Onward) -> None:
    """Receives the next node's Pongs. _NextLost: the connection has ended."""
    try:
        while True:
            message = await connection.receive()
            assert isinstance(message, Pong)
            onward.answered(message.nonce, trio.current_time())
    except ShoalError as error:
        raise _NextLost(error) from error


async def _heard(connection: Connection, seconds: float) -> Message:
    """Returns the next message. NodeLostError: none arrived for `seconds`."""
    with trio.move_on_after(seconds):
        return await connection.receive()
    raise NodeLostError(f"{connection.peer} is lost: it has said nothing for {seconds:g} s")


def _post(connection: Connection, message: Message) -> None:
    if not connection.post(message):
        raise NodeLostError(f"{connection.peer} is lost: it does not read what is sent to it")


def _check_assign(assign: Assign, units: int) -> None:
    if not 0 <= assign.first < assign.last <= units or (assign.next is None) != (assign.last == units):
        raise RemoteProtocolError(
            f"the coordinator assigned units [{assign.first}, {assign.last}) of {units} with "
            f"{'no' if assign.next is None else 'a'} next node: such a stage cannot be in a chain"
        )


def _address(stream: trio.abc.Stream) -> str:
    """The remote address of a connection, for messages."""
    if not isinstance(stream, trio.SocketStream):
        return "a peer"
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:  # the peer has disconnected already
        return "a peer"
    return host_port(host, port)
