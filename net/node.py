"""The node: a server that offers its device, runs the stage it is assigned, and passes activations on.

Each connection states its purpose (net/messages.py). A node serves one coordinator at a time: that connection
carries orders down and tokens up; when it ends, the node drops the stage and waits for the next coordinator.
A peer that breaks the protocol gets an Error and loses its connection; no other connection is affected.
"""

from __future__ import annotations

import traceback
from contextlib import AsyncExitStack
from functools import partial

import trio

from ..engine.errors import ShoalError
from ..planner import LinkSpeed
from .assignment import NO_WORK, Assignment, NodeParts
from .connection import (
    Connection,
    greet,
    is_peers_fault,
    open_connection,
    open_tasks,
)
from .door import Door, Visit
from .errors import NetError, NodeLostError, RemoteProtocolError, StageStuckError, to_wire
from .keeper import MOST_ORDERS, Keeper
from .listen import accept, host_port
from .liveness import TICK_SECONDS, Awake, load_bound
from .messages import (
    Abort,
    Assign,
    Close,
    Commit,
    Data,
    GetStats,
    Hello,
    Measure,
    Measured,
    Message,
    Open,
    Peer,
    Ping,
    Pong,
    Refill,
    Release,
    Spare,
    Stats,
    Step,
)
from .pace import NodePace
from .probe import measure_peer
from .watch import attend

PROBE_HANDSHAKES = 3
"""The most time for a `probe` connection, in times for a handshake."""


class Node:
    """A node, which serves connections until it is cancelled."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._door = Door(parts.identity.name, parts.timing.handshake, parts.log)
        self._keeper: Keeper | None = None
        """The keeper of the stage for the coordinator that is served."""
        self._pace = self._new_pace()
        self._measuring = 0
        self._links: dict[int, LinkSpeed] = {}
        """Links to other nodes by incarnation, as measured for this coordinator."""

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts connections on the listeners until cancelled, and closes the listeners."""
        async with AsyncExitStack() as stack:
            for listener in listeners:
                await stack.enter_async_context(listener)
            async with open_tasks() as tasks:
                for listener in listeners:
                    tasks.start_soon(self._accept, listener, tasks)
                task_status.started(listeners)

    async def _accept(self, listener: trio.SocketListener, tasks: trio.Nursery) -> None:
        while True:
            for stream in await accept(listener):
                host, who = _address(stream)
                tasks.start_soon(self._attend, stream, who, self._door.arrive(host))
            await self._door.settled()

    async def connected(self, stream: trio.abc.Stream) -> None:
        """Serves one connection until it ends. Errors are logged and end only this connection."""
        host, who = _address(stream)
        await self._attend(stream, who, self._door.arrive(host))

    async def _attend(self, stream: trio.abc.Stream, who: str, visit: Visit) -> None:
        with self._door.visit(visit):
            async with open_connection(stream, who, dialled=False) as connection:
                try:
                    await self._serve(visit, connection)
                except ShoalError as error:
                    self._door.note(visit, str(error))
                    if is_peers_fault(error):
                        self._door.refused(visit)
                        await connection.refuse(error)
                except Exception as error:  # a bug here must not end the node
                    self._parts.log("".join(traceback.format_exception(error)).rstrip())
                    self._door.refused(visit)
                    await connection.refuse(
                        NetError(f"{self._parts.identity.name} failed ({error!r}): its log has the traceback")
                    )

    async def _serve(self, visit: Visit, connection: Connection) -> None:
        parts = self._parts
        hello = await greet(
            connection,
            parts.identity,
            parts.offer,
            seconds=visit.seconds,
            admit=partial(self._admit, visit, connection),
        )
        try:
            match hello.purpose:
                case "control":
                    await self._serve_coordinator(connection)
                case "step":
                    await self._serve_steps(connection, hello.incarnation)
                case "probe":
                    await self._serve_probe(connection)
                case "bulk":
                    await self._serve_bulk(connection, hello.incarnation)
        except NodeLostError as error:  # the usual end; a coordinator notices by its own connections
            if hello.purpose == "control":
                parts.log(f"{error}; waiting for the next coordinator")

    async def _admit(self, visit: Visit, connection: Connection, hello: Hello) -> int:
        """Gives a connection the place of its purpose. A stuck stage cannot be replaced by another."""
        stuck = self.stuck()
        if hello.purpose == "control" and stuck is not None:
            raise StageStuckError(f"{self._parts.identity.name} cannot be used: {stuck}")
        return await self._door.admit(visit, hello, connection.peer)

    async def _serve_coordinator(self, connection: Connection) -> None:
        """Follows a coordinator's orders until it disconnects, then drops all state kept for it."""
        self._parts.log(f"{connection.peer} is the coordinator now")
        try:
            async with open_tasks() as tasks:
                keeper = Keeper(self._parts, connection, self._pace, self._links, tasks)
                self._keeper = keeper
                tasks.start_soon(keeper.run)
                tasks.start_soon(self._look_at_calls)
                while True:
                    message = await _heard(connection, self._parts.timing.overdue)
                    self._follow(connection, message, keeper, tasks)
        finally:
            self._keeper = None
            self._pace, self._links = self._new_pace(), {}

    async def _look_at_calls(self) -> None:
        """Measures how long the stage's calls run, and reports one that does not return."""
        awake, reported = Awake(trio.current_time()), False
        while True:
            await trio.sleep(TICK_SECONDS)
            self._pace.tick(awake.tick(trio.current_time()))
            stuck = self.stuck()
            assignment = self._assignment
            if stuck is not None and not reported and assignment is not None:
                self._parts.log(stuck)
                await assignment.report(StageStuckError(stuck))
            reported = stuck is not None

    @property
    def coordinated(self) -> bool:
        """Whether a coordinator is connected."""
        return self._keeper is not None

    @property
    def holds_layers(self) -> bool:
        """Whether a coordinator is connected that has assigned layers to this node."""
        return self._assignment is not None

    def stuck(self, unseen: float = 0.0) -> str | None:
        """A sentence about a call of the stage that does not return, as long as it does not; else None.
        `unseen` is as for NodePace.stuck."""
        seconds = self._pace.stuck(unseen)
        if seconds is None:
            return None
        return (
            f"a call of the stage has not returned for {seconds:.0f} s, much longer than it should take: "
            "stop this node and start it again"
        )

    def _new_pace(self) -> NodePace:
        # The weights that the first call may read from the disk are no more than what this node promises.
        return NodePace(load_bound(self._parts.offer.device.ram_bytes))

    @property
    def _assignment(self) -> Assignment | None:
        """The assignment in force."""
        return None if self._keeper is None else self._keeper.current

    def _follow(self, connection: Connection, message: Message, keeper: Keeper, tasks: trio.Nursery) -> None:
        if isinstance(message, Assign | Measure) and (keeper.busy or self._measuring > MOST_ORDERS):
            raise RemoteProtocolError(
                f"{connection.peer} has sent more than {MOST_ORDERS} orders that are still being carried out"
            )
        now = keeper.current
        match message:
            case Ping(nonce):
                pace, progress = (None, None) if now is None else (now.pace(), now.progress())
                _post(connection, Pong(nonce, pace, progress, condition=self._parts.condition()))
            case Assign() | Release() | Commit() | Abort():
                keeper.order(message)
            case Refill():
                keeper.refill(message)
            case Spare(units):
                keeper.spare(units)
            case Measure(peer):
                tasks.start_soon(self._measure, connection, peer)
            case GetStats():
                _post(connection, Stats(None, NO_WORK, NO_WORK) if now is None else now.stats())
            case _:
                raise AssertionError(f"the wire lets no {type(message).__name__} through")

    async def _serve_steps(self, connection: Connection, sender: int) -> None:
        """Passes the messages of the peer with the incarnation `sender` to the assignment of their epoch, if
        that peer is the previous stage; drops messages of other epochs."""
        async with open_tasks() as tasks:
            tasks.start_soon(attend, connection, self._parts.timing, self._held_back)
            while True:
                message = await connection.receive()
                if isinstance(message, Ping):
                    _post(connection, Pong(message.nonce))
                    continue
                assert isinstance(message, Open | Close | Step)
                assignment = self._assignment
                if assignment is None or message.epoch != assignment.epoch:
                    continue
                if sender != assignment.previous:
                    raise RemoteProtocolError(
                        f"{connection.peer} sent {type(message).__name__}, and it is not the node before "
                        f"{self._parts.identity.name} in the chain"
                    )
                await assignment.feed(connection, message)

    def _held_back(self) -> bool:
        return self._assignment is not None and self._assignment.full

    async def _serve_bulk(self, connection: Connection, giver: int) -> None:
        """Takes keys and values that move here from the node with the incarnation `giver`."""
        if self._keeper is not None:
            await self._keeper.receive_bulk(connection, giver)

    async def _serve_probe(self, connection: Connection) -> None:
        timing = self._parts.timing
        most = PROBE_HANDSHAKES * timing.handshake
        with trio.move_on_after(most):
            while True:
                match await _heard(connection, timing.overdue):
                    case Ping(nonce):
                        await connection.send(Pong(nonce))
                    case message:
                        assert isinstance(message, Data)
        raise NetError(f"{connection.peer} has measured the link for {most:g} s, the most that is allowed")

    async def _measure(self, coordinator: Connection, peer: Peer) -> None:
        parts = self._parts
        self._measuring += 1
        try:
            found = await measure_peer(parts.open_stream, parts.identity, peer, parts.timing.handshake)
            self._links[peer.incarnation] = found
            answer = Measured(peer.incarnation, found, "")
        except NetError as error:
            answer = Measured(peer.incarnation, None, to_wire(error)[1])
        finally:
            self._measuring -= 1
        await coordinator.send(answer)


async def _heard(connection: Connection, seconds: float) -> Message:
    """Returns the next message. NodeLostError: none arrived for `seconds`. They are counted one by one, so
    that a time in which this process was suspended counts as one of them."""
    waited = 0.0
    while waited < seconds:
        pause = min(1.0, seconds - waited)
        with trio.move_on_after(pause):
            return await connection.receive()
        waited += pause
    raise NodeLostError(f"{connection.peer} is lost: it has said nothing for {seconds:g} s")


def _post(connection: Connection, message: Message) -> None:
    if not connection.post(message):
        raise NodeLostError(f"{connection.peer} is lost: it does not read what is sent to it")


def _address(stream: trio.abc.Stream) -> tuple[str, str]:
    """The remote host of a connection, and its address for messages."""
    if not isinstance(stream, trio.SocketStream):
        return "", "a peer"
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:  # the peer has disconnected already
        return "", "a peer"
    return host, host_port(host, port)
