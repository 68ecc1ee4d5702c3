"""The most connections that a port has at a time, by kind: which get a slot, and which must end.

Anybody who reaches the port can connect; in a house (net/tls.py) only its devices get as far as Hello. A node
must stay free for its coordinator and the nodes of its chain, and use a bounded number of file descriptors.
The kinds of slots:

    waiting      at most WAITING connections that have not said Hello, and no more than a quarter of the
                 process's file descriptors. A further one ends the oldest of the address that has the most
                 of them
    caller       at most CALLERS coordinators that wait a moment for the one that is served to leave
    coordinator  one, which no other kind of connection can use
    guest        `step`, `bulk`, `probe` and `files` connections of peers that show the coordinator's ticket,
                 at most GUESTS of each purpose. A peer has at most three `step` connections, for the epoch in
                 force, the next one, and one that was given up and is being closed, one `bulk` and two
                 `files` connections: a newer one replaces its oldest
    leaving      at most LEAVING connections that are being told why they are refused. A further one ends the
                 oldest

A ticket is a random number that a node draws for each coordinator and tells it in its Hello. The coordinator
passes it on to the nodes that are to connect to this one, and they show it in their Hello. Without a house,
tickets and incarnations travel in clear text: they keep out strangers, but not somebody who reads the
network's traffic.
"""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field

import trio

from .connection import address_of, open_connection, open_tasks
from .errors import NetError, NodeLostError
from .listen import accept
from .messages import Hello
from .rate_limited_log import RateLimitedLog
from .tls import PlainTextError, TlsStream, Trust

WAITING = 64
CROWD, CROWD_SECONDS = 16, 2.0  # while more than CROWD wait, a new connection has CROWD_SECONDS to say Hello
CALLERS = 4
PATIENCE_SECONDS = 5.0
GUESTS = 16
_OWN = {"step": 3, "bulk": 1, "files": 2}
"""The most guests of each purpose that a peer may have."""
LEAVING = 16
_HINT = "connect again if it has restarted, or give an address that is the same on all devices"


@dataclass(slots=True, eq=False)
class Slot:
    """The slot of one connection, from its acceptance to its end. Cancelling `scope` closes it."""

    address: str
    seconds: float
    """The time to say Hello."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(slots=True)
class _Served:
    """The coordinator that is served: its name for messages, and the ticket of its guests."""

    slot: Slot
    name: str
    incarnation: int
    ticket: int


class ConnectionLimits:
    """The slots of the port of the node `name`. `handshake` is the time in seconds to say Hello."""

    def __init__(self, name: str, handshake: float, log: Callable[[str], None]) -> None:
        self._name, self._handshake, self._log = name, handshake, log
        self._most = most_waiting()
        self._waiting: dict[Slot, None] = {}
        self._leaving: dict[Slot, None] = {}
        self._evicted: set[Slot] = set()
        self._closed = trio.Event()
        self._callers = 0
        self._slot = trio.Semaphore(1)
        self._served: _Served | None = None
        self._guests: dict[Slot, Hello] = {}
        self._of_strangers = RateLimitedLog(log, "more connections were refused or closed", trio.current_time)

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        attend: Callable[[trio.abc.Stream, str, Slot], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Sequence[trio.SocketListener]],
    ) -> None:
        """Accepts connections on the listeners until cancelled, and closes the listeners. Each connection has
        a slot and a task that calls `attend` with the stream, the peer's address for messages, and the
        slot."""
        async with AsyncExitStack() as stack:
            for listener in listeners:
                await stack.enter_async_context(listener)
            async with open_tasks() as tasks:
                for listener in listeners:
                    tasks.start_soon(self._accept, listener, attend, tasks)
                task_status.started(listeners)

    async def _accept(
        self,
        listener: trio.SocketListener,
        attend: Callable[[trio.abc.Stream, str, Slot], Awaitable[None]],
        tasks: trio.Nursery,
    ) -> None:
        while True:
            for stream in await accept(listener):
                host, who = address_of(stream)
                tasks.start_soon(attend, stream, who, self.arrive(host))
            await self.settled()

    def arrive(self, address: str) -> Slot:
        """A slot for a new connection from a host, which may end another one: `settled` waits for that."""
        seconds = self._handshake if len(self._waiting) < CROWD else min(self._handshake, CROWD_SECONDS)
        slot = Slot(address, seconds)
        self._waiting[slot] = None
        if len(self._waiting) > self._most:
            self._evict()
        return slot

    @contextmanager
    def occupy(self, slot: Slot) -> Iterator[None]:
        """Keeps a connection's slot until the block ends, which closes the connection. The block is
        cancelled when the slot is needed for another connection."""
        try:
            with slot.scope:
                yield
        finally:
            self._waiting.pop(slot, None)
            self._leaving.pop(slot, None)
            self._guests.pop(slot, None)
            if slot in self._evicted:
                self._evicted.remove(slot)
                self._closed.set()
                self._closed = trio.Event()
            if self._serves(slot):
                self._farewell()

    async def sealed(self, slot: Slot, stream: trio.abc.Stream, who: str, trust: Trust) -> TlsStream | None:
        """The stream with TLS. None: it has ended, since the peer is a stranger or too slow. A handshake
        takes a part of the time for Hello."""
        deadline, why = trio.current_time() + slot.seconds, ""
        try:
            with trio.move_on_at(deadline):
                opened = await trust.accepted(stream, who)
                slot.seconds = max(0.0, deadline - trio.current_time())
                return opened
            why = f"{who} connected and did not finish TLS within {slot.seconds:g} s"
        except PlainTextError as error:
            why = f"{who} connected without TLS: {error}"
            self.refused(slot)
            async with open_connection(stream, who, dialled=False) as connection:
                await connection.refuse(error)
        except NodeLostError:
            return None  # it has left, as those do that try several connections at a time and keep the first
        except NetError as error:
            why = str(error)
        except Exception as error:  # a bug here must not end the process
            why = "".join(traceback.format_exception(error)).rstrip()
        self.note(slot, why)
        return None

    def settle(self, slot: Slot) -> None:
        """Gives up the slot of a connection that has said what it wants: the caller bounds the number of
        those."""
        self._waiting.pop(slot, None)

    async def settled(self) -> None:
        """Waits until every connection whose place was needed has closed its socket. A caller that accepts
        more connections only then has no more sockets than there are places, and those of one `accept`."""
        await trio.lowlevel.checkpoint()
        while self._evicted:
            await self._closed.wait()

    async def admit(self, slot: Slot, hello: Hello, name: str) -> int:
        """Gives a connection that has said Hello the place of its purpose, and returns the ticket for its
        answer. NetError: it may not have one."""
        if hello.purpose == "control":
            return await self._admit_coordinator(slot, hello, name)
        if self._served is None:
            raise NetError(
                f"{self._name} has no coordinator, so it accepts no {hello.purpose} connections; {_HINT}"
            )
        if hello.ticket != self._served.ticket:
            raise NetError(
                f"{self._name} accepts {hello.purpose} connections only from its coordinator and nodes "
                f"sent by it; {_HINT}"
            )
        alike = [guest for guest, other in self._guests.items() if other.purpose == hello.purpose]
        own = [guest for guest in alike if self._guests[guest].incarnation == hello.incarnation]
        if len(own) >= _OWN.get(hello.purpose, GUESTS):
            alike.remove(own[0])
            del self._guests[own[0]]
            own[0].scope.cancel()
        if len(alike) >= GUESTS:
            raise NetError(
                f"{self._name} has {GUESTS} {hello.purpose} connections, the most that it accepts: end one"
            )
        self._waiting.pop(slot, None)
        self._guests[slot] = hello
        return 0

    def refused(self, slot: Slot) -> None:
        """Moves a connection to the places of those that are told why."""
        self._waiting.pop(slot, None)
        self._leaving[slot] = None
        if len(self._leaving) > LEAVING:
            oldest = next(iter(self._leaving))
            del self._leaving[oldest]
            self._end(oldest)

    def note(self, slot: Slot, line: str) -> None:
        """Logs why a connection ended. Of a flood of strangers the first lines and the number are logged."""
        (self._log if self._serves(slot) else self._of_strangers)(line)

    def _serves(self, slot: Slot) -> bool:
        return self._served is not None and self._served.slot is slot

    async def _admit_coordinator(self, slot: Slot, hello: Hello, name: str) -> int:
        """Serves one coordinator at a time. Another one waits a moment, since the first may be about to
        leave. A newer connection of the same coordinator replaces the older one, which may be dead."""
        again = self._served is not None and self._served.incarnation == hello.incarnation
        if again and self._served is not None:
            self._served.slot.scope.cancel()
        if self._callers < CALLERS:
            self._waiting.pop(slot, None)
            self._callers += 1
            try:
                with trio.move_on_after(self._handshake if again else PATIENCE_SECONDS):
                    await self._slot.acquire()
                    self._served = _Served(slot, name, hello.incarnation, secrets.randbits(64) or 1)
                    return self._served.ticket
            finally:
                self._callers -= 1
        served = "another coordinator" if self._served is None else self._served.name
        raise NetError(f"{self._name} is busy with {served}: stop that one or try again later")

    def _farewell(self) -> None:
        """The coordinator has left: its guests must leave too."""
        self._served = None
        for guest in self._guests:
            guest.scope.cancel()
        self._guests.clear()
        self._slot.release()

    def _evict(self) -> None:
        """Closes the oldest connection that has not said Hello, of the address that has the most of them: so
        one device that opens many evicts its own."""
        count: dict[str, int] = {}
        for slot in self._waiting:
            count[slot.address] = count.get(slot.address, 0) + 1
        most = max(count.values())
        oldest = next(slot for slot in self._waiting if count[slot.address] == most)
        del self._waiting[oldest]
        self._end(oldest)
        who = oldest.address or "a peer"
        self.note(oldest, f"{who} did not say Hello, and its place was needed for another connection")

    def _end(self, slot: Slot) -> None:
        self._evicted.add(slot)
        slot.scope.cancel()


def most_waiting() -> int:
    """The number of places of connections that have not said Hello."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return WAITING
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WAITING if soft == resource.RLIM_INFINITY else max(1, min(WAITING, soft // 4))
