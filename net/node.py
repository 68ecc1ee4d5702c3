"""The node: a server that offers its device, runs the stage it is assigned, and passes activations on.

Each connection states its purpose (net/messages.py). A node serves one coordinator at a time: that connection
carries orders down and tokens up; when it ends, the node drops the stage and waits for the next coordinator.
A peer that breaks the protocol gets an Error and loses its connection; no other connection is affected.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import trio

from ..engine.errors import ShoalError
from ..planner import LinkSpeed
from .assignment import NO_WORK, Assignment, NodeParts
from .connection import Connection, address_of, is_peers_fault, open_connection, open_tasks
from .connection_limits import ConnectionLimits, Slot
from .dial import greet
from .errors import (
    NetError,
    NodeLostError,
    RemoteProtocolError,
    StageStuckError,
    UntrustedError,
    to_wire,
)
from .fetching import Fetcher
from .file_server import serve_files
from .liveness import IDLE_TICK_SECONDS, TICK_SECONDS, AwakeClock, load_bound, next_tick
from .messages import (
    Abort,
    Assign,
    Close,
    Commit,
    Data,
    Fetch,
    GetStats,
    Held,
    Hello,
    House,
    Mask,
    Measure,
    Measured,
    Message,
    Offer,
    Open,
    Peer,
    Ping,
    Pong,
    Refill,
    Release,
    SetSampling,
    Spare,
    Stats,
    Step,
    Tokens,
)
from .pace import NodePace
from .probe import measure_peer
from .relay import vouched
from .stacks import thread_lines
from .stage_manager import MOST_ORDERS, StageManager
from .tls import TlsStream
from .watch import attend

PROBE_HANDSHAKES = 3
"""The most time for a `probe` connection, in times for a handshake."""

_PORT = re.compile(r":\d+")


class Node:
    """A node, which serves connections until it is cancelled."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._limits = ConnectionLimits(parts.identity.name, parts.timing.handshake, parts.log)
        self._manager: StageManager | None = None
        """The manager of the stage for the coordinator that is served."""
        self._noted = ""
        """Why the last connection has ended that was not served."""
        self._pace = self._new_pace()
        self._answers = False
        """Whether the coordinator's last ping said that answers are computed."""
        self._measuring = 0
        self._links: dict[int, LinkSpeed] = {}
        """Links to other nodes by incarnation, as measured for this coordinator."""

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[Sequence[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts connections on the listeners until cancelled, and closes the listeners."""
        await self._limits.serve(listeners, self._attend, task_status=task_status)

    async def connected(self, stream: trio.abc.Stream) -> None:
        """Serves one connection until it ends. Errors are logged and end only this connection. One that has
        waited at the head (net/reverse.py) is a TlsStream already."""
        host, who = address_of(stream)
        await self._attend(stream, who, self._limits.arrive(host))

    async def _attend(self, stream: trio.abc.Stream, who: str, slot: Slot) -> None:
        deadline = trio.current_time() + slot.seconds
        with self._limits.occupy(slot):
            sealed = await self._sealed(stream, who, slot)
            if sealed is None:
                return
            slot.seconds = max(0.0, deadline - trio.current_time())  # other tasks ran since TLS has ended
            async with open_connection(sealed, who, dialled=False) as connection:
                try:
                    await self._serve(slot, connection)
                except ShoalError as error:
                    if not connection.unused:
                        self._note(slot, connection, str(error))
                    if is_peers_fault(error):
                        self._limits.refused(slot)
                        await connection.refuse(error)
                except Exception as error:  # a bug here must not end the node
                    self._parts.log("".join(traceback.format_exception(error)).rstrip())
                    self._limits.refused(slot)
                    await connection.refuse(
                        NetError(f"{self._parts.identity.name} failed ({error!r}): its log has the traceback")
                    )

    def _note(self, slot: Slot, connection: Connection, line: str) -> None:
        """Logs why a connection has ended; for a device of the house not again and again, since it dials
        anew, from another port."""
        what = _PORT.sub("", line)
        if connection.device is None or what != self._noted:
            self._limits.note(slot, line)
        self._noted = what

    async def _sealed(self, stream: trio.abc.Stream, who: str, slot: Slot) -> trio.abc.Stream | None:
        """The stream with TLS, if this node has a house. None: it has ended, since it may not be used. The
        head may have made it for another device."""
        trust = self._parts.identity.trust
        if trust is None or isinstance(stream, TlsStream):
            return stream
        sealed = await self._limits.sealed(slot, stream, who, trust)
        if sealed is None or sealed.device.role != "head":
            return sealed
        try:
            with trio.move_on_after(slot.seconds):
                await vouched(sealed, who, trust)
                return sealed
            why = f"{who} connected and did not say Hello within {slot.seconds:g} s"
        except ShoalError as error:
            why = str(error)
        self._limits.note(slot, why)
        await trio.aclose_forcefully(sealed)
        return None

    async def _serve(self, slot: Slot, connection: Connection) -> None:
        parts = self._parts
        hello = await greet(
            connection,
            parts.identity,
            self._offer(),
            seconds=slot.seconds,
            admit=partial(self._admit, slot, connection),
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
                case "files":
                    await self._serve_files(connection)
        except NodeLostError as error:  # the usual end; a coordinator notices by its own connections
            if hello.purpose == "control" and parts.tells:
                parts.log(f"{error}; waiting for the next coordinator")

    async def _admit(self, slot: Slot, connection: Connection, hello: Hello) -> int:
        """Gives a connection the place of its purpose. A stuck stage cannot be replaced by another. In a
        house, only its head gives orders."""
        stuck, trust, device = self.stuck(), self._parts.identity.trust, connection.device
        orders = hello.purpose == "control"
        if orders and trust is not None and (device is None or not trust.may_coordinate(device)):
            raise UntrustedError(
                f"{connection.peer} is a device of the house and not its head, which alone may use other "
                "devices: run this on the head"
            )
        if orders and stuck is not None:
            raise StageStuckError(f"{self._parts.identity.name} cannot be used: {stuck}")
        return await self._limits.admit(slot, hello, connection.peer)

    async def _serve_coordinator(self, connection: Connection) -> None:
        """Follows a coordinator's orders until it disconnects, then drops all state kept for it."""
        if self._parts.tells:
            self._parts.log(f"{connection.peer} is the coordinator now")
        try:
            async with open_tasks() as tasks:
                manager = StageManager(self._parts, connection, self._pace, self._links, tasks)
                self._manager = manager
                fetcher = self._fetcher(connection, manager)
                tasks.start_soon(manager.run)
                if fetcher is not None:
                    tasks.start_soon(fetcher.run)
                tasks.start_soon(self._look_at_calls)
                while True:
                    message = await _heard(connection, self._parts.timing.overdue)
                    if isinstance(message, Fetch):
                        self._fetch(connection, message, fetcher)
                    else:
                        self._follow(connection, message, manager, tasks)
        finally:
            self._manager, self._answers = None, False
            self._pace, self._links = self._new_pace(), {}

    async def _look_at_calls(self) -> None:
        """Measures how long the stage's calls run, and reports one that does not return."""
        awake, reported = AwakeClock(trio.current_time(), 2 * IDLE_TICK_SECONDS), False
        while True:
            pause = TICK_SECONDS if self._pace.busy else IDLE_TICK_SECONDS
            await trio.sleep_until(next_tick(trio.current_time(), pause))
            self._pace.tick(awake.tick(trio.current_time()))
            stuck = self.stuck()
            assignment = self._assignment
            if stuck is not None and not reported and assignment is not None:
                for line in (stuck, *thread_lines()):
                    self._parts.log(line)
                await assignment.report(StageStuckError(stuck))
            reported = stuck is not None

    @property
    def coordinated(self) -> bool:
        """Whether a coordinator is connected."""
        return self._manager is not None

    @property
    def holds_layers(self) -> bool:
        """Whether a coordinator is connected that has assigned layers to this node."""
        return self._assignment is not None

    @property
    def idle(self) -> bool:
        """Whether the layers of this node have not been used for a second, are not about to move, and are not
        needed by an answer that other nodes compute."""
        manager = self._manager
        return manager is not None and manager.idle and not self._pace.busy and not self._answers

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
        return None if self._manager is None else self._manager.current

    def _follow(
        self, connection: Connection, message: Message, manager: StageManager, tasks: trio.Nursery
    ) -> None:
        if isinstance(message, Assign | Measure) and (manager.busy or self._measuring > MOST_ORDERS):
            raise RemoteProtocolError(
                f"{connection.peer} has sent more than {MOST_ORDERS} orders that are still being carried out"
            )
        now = manager.current
        match message:
            case Ping(nonce, answers):
                self._answers = answers
                pace, progress = (None, None) if now is None else (now.pace(), now.progress())
                _post(connection, Pong(nonce, pace, progress, condition=self._parts.condition()))
            case House():
                self._learn(connection, message)
            case Assign() | Release() | Commit() | Abort():
                manager.order(message)
            case Refill():
                manager.refill(message)
            case SetSampling() | Tokens() | Mask() | Close():
                manager.told(message)
            case Spare(units):
                manager.spare(units)
            case Measure(peer):
                tasks.start_soon(self._measure, connection, peer)
            case GetStats():
                _post(connection, Stats(None, NO_WORK, NO_WORK) if now is None else now.stats())
            case _:
                raise AssertionError(f"the wire lets no {type(message).__name__} through")

    def _offer(self) -> Offer:
        files = self._parts.files
        return replace(self._parts.offer, held=None if files is None else tuple(sorted(files.held())))

    def _fetcher(self, connection: Connection, manager: StageManager) -> Fetcher | None:
        parts = self._parts
        if parts.files is None:
            return None
        return Fetcher(parts, parts.files, connection, lambda: manager.units, lambda: self._pace.busy)

    def _fetch(self, connection: Connection, order: Fetch, fetcher: Fetcher | None) -> None:
        """Takes an order to have files. RemoteProtocolError: it names units that the model has not."""
        named = (order.units, *(source.units for source in order.sources))
        if any(unit >= self._parts.units for units in named for unit in units):
            raise RemoteProtocolError(
                f"{connection.peer} wants files of units that the model of {self._parts.units} has not"
            )
        if fetcher is None:
            _post(connection, Held(tuple(range(self._parts.units)), 0, 0, ""))
        else:
            fetcher.order(order)

    def _learn(self, connection: Connection, told: House) -> None:
        """Takes the head's list of the devices of the house. Where this device is the head, it is in a file
        here."""
        trust, device = self._parts.identity.trust, connection.device
        if trust is None or device is None:
            raise RemoteProtocolError(
                f"{connection.peer} sent the devices of a house, and this node has none"
            )
        try:
            if trust.is_own(device):
                trust.refresh()
            elif device.role == "head":
                trust.hear(told.devices, told.addresses)
        except ValueError as error:
            raise RemoteProtocolError(f"{connection.peer} sent a list of its house: {error}") from error
        except OSError as error:
            self._parts.log(f"the list of the house cannot be written, so it is known until the end: {error}")

    async def _serve_steps(self, connection: Connection, sender: int) -> None:
        """Passes the messages of the peer with the incarnation `sender` to the assignment of their epoch, if
        that peer is the previous stage; drops messages of other epochs."""
        async with open_tasks() as tasks:
            timing = self._parts.timing
            tasks.start_soon(attend, connection, timing, self._held_back, lambda: self._pace.busy)
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
        if self._manager is not None:
            await self._manager.receive_bulk(connection, giver)

    async def _serve_files(self, connection: Connection) -> None:
        """Gives a peer files of the model."""
        parts = self._parts
        if parts.files is None:
            raise NetError(f"{parts.identity.name} has no files to give")
        await serve_files(connection, parts.files, lambda: self._pace.busy, parts.hop)

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
        except ShoalError as error:  # a peer may send any
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
