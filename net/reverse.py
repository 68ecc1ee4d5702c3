"""The port of a head on which the devices of its house connect (net/requests.py).

Nodes keep connections here that wait (net/reachable.py), and the coordinator's connections to them are made
of those, as if it had dialled. The head also passes bytes between nodes that cannot reach each other.
"""

from __future__ import annotations

import errno
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trio

from ..engine.errors import ShoalError
from .connection_limits import ConnectionLimits, Slot
from .dial import open_tcp, sealed
from .errors import MismatchError, NetError, NodeLostError, UntrustedError
from .identity import Identity, host_port
from .listen import plain
from .relay import RequestStream, pass_bytes
from .requests import (
    INWARD,
    SILENT_SECONDS,
    Alive,
    Announce,
    Frame,
    GetModel,
    Ready,
    Relay,
    Take,
    inward,
)
from .tls import TlsStream, prefix_of

ALIVE_SECONDS = 1.0
"""The time between two frames on a connection that waits."""
FIRST_SECONDS = 10.0
"""The time for TLS and the first frame."""
REACH_SECONDS = 3.0
"""How long a node that has no waiting connection is waited for."""
MOST_NODES, MOST_WAITING, MOST_SERVED = 4, 4, 32
"""The most nodes of a device, waiting connections of a node, and other connections of a device."""


@dataclass(frozen=True, slots=True)
class Device:
    """A node that has connected to the head: the name of its device in the house, the address under which its
    connections are found, and its process. `anew`: its older connections may be dead."""

    name: str
    host: str
    port: int
    incarnation: int
    anew: bool = False


@dataclass(eq=False, slots=True)
class _Waiting:
    """A connection that waits. `taker` is the key of the device that uses it, once one wants to; `stream` is
    there when it may."""

    line: RequestStream
    wanted: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    taker: str = ""
    left: bool = False
    """Whether the one who wanted it has left."""
    stream: TlsStream | None = None


@dataclass(eq=False, slots=True)
class _Node:
    """A node as the listener knows it."""

    key: str
    device: Device
    port: int
    """Where it listens, by its own word."""
    waiting: deque[_Waiting] = field(default_factory=deque)
    news: trio.Event = field(default_factory=trio.Event)
    """Set when a connection begins to wait."""
    emptied: float = 0.0
    """When the last one was used or lost."""

    @property
    def where(self) -> tuple[str, int]:
        return self.device.host, self.device.port

    def add(self, waiting: _Waiting) -> None:
        self.waiting.append(waiting)
        if len(self.waiting) > MOST_WAITING:
            self.waiting.popleft().scope.cancel()
        self.news.set()
        self.news = trio.Event()

    def end(self) -> None:
        """Ends all that wait: another process is there now."""
        for waiting in self.waiting:
            waiting.scope.cancel()


class DeviceListener:
    """The port of a head on which the devices of its house connect. `identity` is the coordinator's, with the
    house. `answer_model` serves a connection that asks for the model, until it returns."""

    def __init__(
        self,
        identity: Identity,
        log: Callable[[str], None],
        *,
        answer_model: Callable[[TlsStream], Awaitable[None]] | None = None,
    ) -> None:
        if identity.trust is None:
            raise ValueError("devices can only connect to the head of a house")
        self._trust, self._identity, self._log, self._answer_model = (
            identity.trust,
            identity,
            log,
            answer_model,
        )
        self._limits = ConnectionLimits(identity.name, FIRST_SECONDS, log)
        self._nodes: dict[tuple[str, int], _Node] = {}
        self._served = Counter[str]()
        self._callbacks: list[Callable[[Device], None]] = []

    def on_device(self, callback: Callable[[Device], None]) -> None:
        """Has a function called when a node has connected, for the first time, anew, or under another
        address."""
        self._callbacks.append(callback)

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[Sequence[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts connections on the listeners until cancelled, and closes the listeners."""
        await self._limits.serve(listeners, self._attend, task_status=task_status)

    async def open_stream(self, host: str, port: int) -> trio.abc.Stream:
        """A connection to the node at this address, for the coordinator (connection.OpenStream): one that
        waits here, or a new one. OSError, NetError: it cannot be reached."""
        node = self._nodes.get((host, port))
        if node is not None:
            return await self._reach(node, self._trust.key)
        if host.endswith(INWARD):
            raise OSError(errno.EHOSTUNREACH, "it has not connected to this head")
        return await open_tcp(host, port)

    # --- connections of devices

    async def _attend(self, raw: trio.abc.Stream, who: str, slot: Slot) -> None:
        deadline = trio.current_time() + slot.seconds
        with self._limits.occupy(slot):
            stream = await self._limits.sealed(slot, raw, who, self._trust)
            if stream is None:
                return
            line, given = RequestStream(stream, f"{stream.device.name} ({who})"), False
            try:
                given = await self._serve(slot, line, deadline)
            except NodeLostError:
                pass  # what that means, the coordinator says
            except ShoalError as error:
                self._limits.note(slot, str(error))
                self._limits.refused(slot)
                await line.refuse(error)
            except Exception as error:  # a bug here must not end the head
                self._log("".join(traceback.format_exception(error)).rstrip())
            finally:
                if not given:
                    await trio.aclose_forcefully(stream)

    async def _serve(self, slot: Slot, line: RequestStream, deadline: float) -> bool:
        """Does what a device wants; returns whether its connection has been given to somebody."""
        wish: Frame | None = None
        with trio.move_on_at(deadline):
            wish = await line.receive(Announce, Relay, GetModel)
        if wish is None:
            raise NetError(f"{line.who} connected and did not say what it wants")
        self._limits.settle(slot)
        match wish:
            case Announce():
                return await self._keep(line, wish)
            case Relay(address):
                with self._counted(line):
                    await self._relay(line, (address.host, address.port))
            case GetModel():
                if self._answer_model is None:
                    raise NetError("this head has no model to give")
                with self._counted(line):
                    await self._answer_model(line.release())
            case _:
                raise AssertionError("RequestStream.receive lets nothing else through")
        return False

    @contextmanager
    def _counted(self, line: RequestStream) -> Iterator[None]:
        """Counts what is done for a device at the same time. NetError: it is too much."""
        key = line.stream.key
        if self._served[key] >= MOST_SERVED:
            raise NetError(f"{line.who} has {MOST_SERVED} connections through the head, the most")
        self._served[key] += 1
        try:
            yield
        finally:
            self._served[key] -= 1

    # --- those that wait

    async def _keep(self, line: RequestStream, announce: Announce) -> bool:
        """Keeps a connection until somebody uses it; returns whether somebody does."""
        self._trust.check_incarnation(line.stream.device, announce.incarnation, line.who)
        if announce.model != self._identity.model:
            raise MismatchError(
                f"{line.stream.device.name} has the model {announce.model[:16]}, and the head of the house "
                f"{self._identity.model[:16]} now"
            )
        waiting = _Waiting(line)
        node = self._arrived(line.stream, announce, waiting)
        try:
            with waiting.scope:
                await self._wait(waiting)
        finally:
            with suppress(ValueError):
                node.waiting.remove(waiting)
            node.emptied = trio.current_time()
            waiting.done.set()
        return waiting.stream is not None

    async def _wait(self, waiting: _Waiting) -> None:
        line = waiting.line
        while not waiting.wanted.is_set():
            await line.send(Alive())
            await _in_time(line, Alive)
            with trio.move_on_after(ALIVE_SECONDS):
                await waiting.wanted.wait()
        await line.send(Take(waiting.taker))
        await _in_time(line, Ready)
        if not waiting.left:
            waiting.stream = line.release()

    def _arrived(self, stream: TlsStream, announce: Announce, waiting: _Waiting) -> _Node:
        """Notes where a node is, and tells others. NetError: the device has too many."""
        now = trio.current_time()
        old = next((n for n in self._nodes.values() if n.device.incarnation == announce.incarnation), None)
        host, port = self._address(stream, announce)
        device = Device(stream.device.name, host, port, announce.incarnation, announce.anew)
        back = old is None or (not old.waiting and now - old.emptied > ALIVE_SECONDS)
        if old is not None:
            del self._nodes[old.where]
            back = back or (host, port) != old.where
        before = self._nodes.get((host, port))
        if before is not None:
            before.end()
        node = old or _Node(stream.key, device, announce.port)
        node.device, node.port = device, announce.port
        self._nodes[host, port] = node
        node.add(waiting)
        if back or announce.anew:
            for callback in self._callbacks:
                callback(device)
        return node

    def _address(self, stream: TlsStream, announce: Announce) -> tuple[str, int]:
        """The address of a node: the one on which it listens, unless another device has it already, as two of
        one network may have, seen from here. Else one by which it is only found here."""
        own = [node for node in self._nodes.values() if node.key == stream.key]
        others = [node for node in own if node.device.incarnation != announce.incarnation]
        for node in others:
            if not node.waiting and len(others) >= MOST_NODES:
                del self._nodes[node.where]
        if sum(bool(node.waiting) for node in others) >= MOST_NODES:
            raise NetError(f"{stream.device.name} has {MOST_NODES} nodes here, the most that are accepted")
        mine = next((node for node in own if node not in others), None)
        if mine is not None and mine.waiting and mine.port == announce.port and not announce.anew:
            return mine.where  # a device has several addresses, and its connections need not use the same
        if announce.port:
            try:
                where = plain(stream.addresses[1][0]), announce.port
            except OSError as error:
                raise NodeLostError(f"{stream.device.name} is lost: the connection broke") from error
            there = self._nodes.get(where)
            if there is None or there.key == stream.key or not there.waiting:
                return where
        if mine is not None and mine.device.host.endswith(INWARD):
            return mine.where
        host = inward(prefix_of(stream.key))
        taken = {node.where for node in others if node.waiting}
        return next((host, number) for number in range(1, MOST_NODES + 2) if (host, number) not in taken)

    # --- their use

    def _found(self, host: str, port: int) -> _Node | None:
        """The node at an address. The inward name of a device also goes with the port on which it listens."""
        here = (n for n in self._nodes.values() if (inward(prefix_of(n.key)), n.port) == (host, port))
        return self._nodes.get((host, port)) or next(here, None)

    async def _reach(self, node: _Node, taker: str) -> TlsStream:
        """A connection to a node, for the device with the key `taker`. OSError, NetError: there is none."""
        while True:
            while node.waiting:
                stream = await self._take(node.waiting.pop(), taker)  # the newest
                if stream is not None:
                    return stream
            stream = await self._call_or_wait(node, taker)
            if stream is not None:
                return stream

    async def _take(self, waiting: _Waiting, taker: str) -> TlsStream | None:
        """The stream of a connection that waits; None: it is lost."""
        waiting.taker = taker
        waiting.wanted.set()
        try:
            await waiting.done.wait()
        except trio.Cancelled:
            waiting.left = True
            if waiting.stream is not None:
                await trio.aclose_forcefully(waiting.stream)
            raise
        return waiting.stream

    async def _call_or_wait(self, node: _Node, taker: str) -> TlsStream | None:
        """A new connection to a node that listens; None: another one waits here. OSError, NetError: neither,
        within REACH_SECONDS."""
        news, found = node.news, list[TlsStream]()
        error: OSError | NetError = OSError(errno.EHOSTUNREACH, "it has not connected again")

        async def call() -> None:
            nonlocal error
            try:
                found.append(await self._call(node, taker))
                tasks.cancel_scope.cancel()
            except (OSError, NetError) as why:
                error = why
            except ShoalError as why:  # the node has refused with some other error
                error = NetError(str(why))

        try:
            with trio.move_on_after(REACH_SECONDS) as patience:
                async with trio.open_nursery() as tasks:
                    if not node.device.host.endswith(INWARD):
                        tasks.start_soon(call)
                    await news.wait()
                    tasks.cancel_scope.cancel()
        except BaseException:
            for stream in found:
                await trio.aclose_forcefully(stream)
            raise
        if not found and patience.cancelled_caught:
            raise error
        return found[0] if found else None

    async def _call(self, node: _Node, taker: str) -> TlsStream:
        """A new connection to a node that listens. UntrustedError: another device is there."""
        host, port = node.where
        who = f"{node.device.name} ({host_port(host, port)})"
        stream = await sealed(await open_tcp(host, port), self._trust, who)
        try:
            if stream.key != node.key:
                raise UntrustedError(f"{who} is {stream.device.name}")
            if taker == self._trust.key:
                return stream
            line = RequestStream(stream, who)
            await line.send(Take(taker))
            await _in_time(line, Ready)
            return line.release()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    async def _relay(self, line: RequestStream, where: tuple[str, int]) -> None:
        """Connects a device to a node, and passes bytes until one of them ends."""
        node = self._found(*where)
        if node is None or not self._trust.has(node.device.incarnation):
            raise UntrustedError(f"{line.who} asked for {host_port(*where)}, which is no node of this house")
        try:
            far = await self._reach(node, line.stream.key)
        except OSError as error:
            raise NetError(f"{node.device.name} cannot be reached ({error.strerror})") from error
        try:
            await line.send(Ready(far.key))
            await pass_bytes(line.release(), far)
        finally:
            await trio.aclose_forcefully(far)


async def _in_time(line: RequestStream, kind: type[Alive | Ready]) -> None:
    """Waits for a frame. NodeLostError: it does not come in time."""
    with trio.move_on_after(SILENT_SECONDS):
        await line.receive(kind)
        return
    raise NodeLostError(f"{line.who} is lost: it has said nothing for {SILENT_SECONDS:g} s")
