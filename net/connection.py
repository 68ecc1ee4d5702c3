"""Connections to a peer over any trio stream, which send and receive messages and raise the errors of
net/errors.

The caller of `receive` reads. A message is written at once by the thread that sends it. Only this file
handles stream exceptions of trio and the operating system; it translates each into an error that names the
peer.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

import trio

from ..engine.errors import ShoalError
from .errors import (
    LocalProtocolError,
    MismatchError,
    NetError,
    NodeLostError,
    RemoteProtocolError,
    UntrustedError,
    from_wire,
    leading,
    to_wire,
)
from .identity import Identity, check_hello, check_peer, hello_of
from .listen import host_port
from .messages import Error, Hello, Message, Offer, PairedDevice, Peer, Purpose
from .requests import inward
from .tls import WAKE_BYTES, TlsChannel, TlsStream, Trust, der_of, key_of, prefix_of
from .wire import Signal, WireProtocol

READ_BYTES = 256 * 1024
FIRST_BYTES = 16 * 1024
"""What is read at a time before a large frame has begun. Room for READ_BYTES is a mapping of its own that the
system makes and takes away each time, which costs more than a small message."""
FLUSH_SECONDS = 1.0
AGAIN_SECONDS = (0.1, 0.3)
"""The pauses before a dial that has failed is tried again."""
ATTEMPT_SECONDS, LONGEST_ATTEMPT = 0.3, 5.0
"""The time between two attempts to connect, and the longest time of each but the first."""
LOOK_SECONDS = 0.1
"""How often a thread that waits for room in a queue looks whether it should stop."""
QUEUE = 64
STEP_QUEUE = 4
"""Length of the queue of a `step` or `bulk` connection, whose frames have up to 4 MiB. It is short so that a
slow network throttles the stage that sends."""

OpenStream = Callable[[str, int], Awaitable[trio.abc.Stream]]
Kind = TypeVar("Kind")
T = TypeVar("T")


class Hop(Protocol):
    """Runs a blocking call without blocking other tasks."""

    async def __call__(self, call: Callable[[], T], /) -> T: ...


async def in_thread(call: Callable[[], T], /) -> T:
    """Runs a blocking call in a worker thread; a cancelled caller still waits until it returns."""
    return await trio.to_thread.run_sync(call)


class Connection:
    """One end of a connection, made by `open_connection`. `peer` is the name of the other end in errors.

    Messages are written to the socket at once, by the thread that sends them, as far as the socket accepts
    them. The rest waits in a bounded queue for a task that writes it, so that a slow network delays this
    connection's messages and not the computation. `post`, `write` and `arrived` may be called from any
    thread. A stream that is no socket is written by the task alone. `device` is the one at the other end of
    a TLS stream."""

    def __init__(self, stream: trio.abc.Stream, peer: str, *, dialled: bool, queue: int = QUEUE) -> None:
        self.peer = peer
        self.trip: float | None = None
        """The seconds between sending Hello and the answer, on the side that dialled."""
        self.received = 0
        """Bytes that have arrived."""
        self._stream = stream
        self._wire = WireProtocol(dialled)
        self._most = queue
        self._socket = _raw(stream)
        self.device: PairedDevice | None = stream.device if isinstance(stream, TlsStream) else None
        self._lock = threading.Condition()
        """Guards what is below, and writes to the socket."""
        self._unsent: deque[bytes | memoryview] = deque()
        self._lost: NodeLostError | None = None
        self._ending = self._broken = False
        self._busy = False
        """Whether a stream that is no socket is being written to."""
        self._reading = threading.Lock()
        self._wakes_at = 1
        """The bytes that have to wait in the socket before the system calls it readable."""
        self._held: ShoalError | None = None
        """An error to raise once the messages before it were returned."""
        self._home = trio.lowlevel.current_trio_token(), threading.get_ident()
        self._news, self._written = trio.Event(), trio.Event()
        self._writing = trio.CancelScope()

    @property
    def handle(self) -> int | None:
        """The descriptor of the socket, for a thread that waits until it can be read; None if there is
        none."""
        return None if self._socket is None else self._socket.fileno()

    @property
    def unused(self) -> bool:
        """Whether the peer has ended it without a word, as those do that try several connections at a time
        and keep the first."""
        return self._lost is not None and not self.received

    async def send(self, message: Message) -> None:
        """Sends or queues a message, waiting while the queue is full. NodeLostError: the connection has
        ended."""
        await trio.lowlevel.checkpoint()
        while not self.post(message):
            await self._news.wait()

    def post(self, *messages: Message) -> bool:
        """Sends messages in one write, or queues them, unless the queue is full; returns whether it was not.
        NodeLostError: the connection has ended."""
        with self._lock:
            if self._ending:
                raise self._loss("the connection has ended")
            if len(self._unsent) >= self._most:
                return False
            data = b"".join(buffer for message in messages for buffer in self._wire.send(message))
            self._unsent.append(data)
            if len(self._unsent) == 1:
                self._flush()
            if self._unsent:
                self._tell()
            return True

    async def flush(self) -> None:
        """Waits until the queue is written. NodeLostError: the connection has ended before."""
        await trio.lowlevel.checkpoint()
        while (self._unsent or self._busy) and not self._ending:
            await self._news.wait()
        if self._unsent or self._busy:
            raise self._loss("the connection has ended")

    def write(self, messages: Sequence[Message], stopped: Callable[[], bool]) -> None:
        """Sends messages as `post` does, from a thread of its own; it blocks while the queue is full, until
        `stopped` says so. NodeLostError: the connection has ended."""
        while not self.post(*messages):
            with self._lock:
                self._lock.wait(LOOK_SECONDS)
            if stopped():
                return

    async def receive(self) -> Message:
        """Returns the next message. An Error message is raised as the exception that it describes.

        NodeLostError: the connection has ended. MismatchError, RemoteProtocolError: the peer is at fault."""
        while True:
            message = self._next_message()
            if message is not None:
                return message
            self._wire.receive_data(await self._read())

    async def receive_some(self) -> list[Message]:
        """Returns all messages that have arrived, at least one. Errors as for `receive`; they are raised
        after the messages before them were returned."""
        return [await self.receive(), *self._decoded(first=False)]

    def arrived(self) -> list[Message]:
        """Returns the messages that have arrived, of READ_BYTES or a little more, without waiting. Only while
        no task is in `receive`. Errors as for `receive`."""
        with self._reading:
            messages = self._decoded()
            if messages or self._socket is None:
                return messages
            before = self.received
            while self.received - before < READ_BYTES:
                most = self._next_bytes
                try:
                    data = self._socket.recv(most)
                except BlockingIOError:
                    break
                except OSError as error:
                    loss = self._loss(f"the connection broke ({_cause(error)})")
                    if self.received == before:
                        raise loss from error
                    break  # the next call finds the end, for this reason
                self.received += len(data)
                self._wire.receive_data(data)
                # TLS gives less than it has read. A socket has no more then.
                if not data or (len(data) < most and isinstance(self._socket, socket.socket)):
                    break
            return self._decoded()

    @property
    def _next_bytes(self) -> int:
        """The most bytes to read at a time."""
        return READ_BYTES if self._wire.missing > FIRST_BYTES else FIRST_BYTES

    def _decoded(self, first: bool = True) -> list[Message]:
        """The messages that have arrived completely. Unless it is `first`, an error waits for the next
        call."""
        messages: list[Message] = []
        try:
            while (message := self._next_message()) is not None:
                messages.append(message)
        except ShoalError as error:
            if first and not messages:
                raise
            self._held = error
        return messages

    def _next_message(self) -> Message | None:
        """The next message, or None if it has not arrived completely."""
        if self._held is not None:
            held, self._held = self._held, None
            raise held
        try:
            message = self._wire.next_message()
        except (MismatchError, RemoteProtocolError) as error:
            raise type(error)(f"{self.peer}: {error}") from error
        if message is Signal.CLOSED:
            raise self._loss("it closed the connection")
        if message is Signal.NEED_DATA:
            return None
        if isinstance(message, Error):
            raise from_wire(message.code, message.text, self.peer)
        return message

    async def expect(self, kind: type[Kind]) -> Kind:
        """Returns the next message. RemoteProtocolError: it is of another kind."""
        message = await self.receive()
        if not isinstance(message, kind):
            raise RemoteProtocolError(
                f"{self.peer} sent {type(message).__name__} where {kind.__name__} was expected"
            )
        return message

    async def refuse(self, error: Exception) -> None:
        """Sends the reason for ending the connection, and gives the peer time to read it.

        Closing a socket that has unread bytes resets the connection, which can discard what was sent last. So
        incoming bytes are read first, for at most a second."""
        try:
            await self.send(Error(*to_wire(error)))
            await self._drained()
            if isinstance(self._stream, trio.abc.HalfCloseableStream):
                await self._stream.send_eof()
            with trio.move_on_after(FLUSH_SECONDS):
                while await self._stream.receive_some(READ_BYTES):
                    pass
        except (NodeLostError, trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the peer has gone already
        except trio.BusyResourceError:
            return  # a write is stuck because the peer reads nothing, so the reason cannot be sent either

    async def _read(self) -> bytes | bytearray:
        self._set_wake()
        try:
            data: bytes | bytearray
            if isinstance(self._socket, socket.socket):
                data = await _read_some(self._socket, self._next_bytes)
            else:
                data = await self._stream.receive_some(self._next_bytes)
            self.received += len(data)
            return data
        except (trio.BrokenResourceError, OSError) as error:
            raise self._loss(f"the connection broke ({_cause(error)})") from error
        except trio.ClosedResourceError as error:
            raise self._loss("the connection has ended") from error

    def _set_wake(self) -> None:
        """Lets the system wake this task once the rest of a message is there, or WAKE_BYTES of it. On a link
        that is slower than this device every packet of a file would wake it otherwise."""
        if self._socket is None or self._wire.purpose != "files":  # others are also waited for by threads
            return
        if isinstance(self._socket, TlsChannel):
            assert isinstance(self._stream, TlsStream)
            self._stream.wanted = self._wire.missing
            return
        wanted = max(1, min(WAKE_BYTES, self._wire.missing))
        if wanted != self._wakes_at:
            self._wakes_at = wanted
            with suppress(OSError):  # it has ended, or the system cannot do that
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _loss(self, why: str) -> NodeLostError:
        """The error to raise. It keeps the first reason, since later ones are its consequences."""
        if self._lost is None:
            self._lost = NodeLostError(f"{self.peer} is lost: {why}")
        return NodeLostError(str(self._lost))

    async def _write_unsent(self) -> None:
        """The writing task. When a write fails, every later `send` and `receive` raises NodeLostError."""
        try:
            with self._writing:
                while not self._broken and (self._unsent or not self._ending):
                    if not self._unsent:
                        await self._news.wait()
                    elif self._socket is not None:
                        await trio.lowlevel.wait_writable(self._socket)
                        with self._lock:
                            self._flush()
                        self._heard()
                    else:
                        self._busy = True
                        await self._stream.send_all(self._unsent.popleft())
                        self._busy = False
                        self._heard()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._broken = True
            self._loss(f"the connection broke ({_cause(error)})")
        finally:
            self._end()
            self._written.set()
            if self._broken:
                self._release()
                await trio.aclose_forcefully(self._stream)

    def _flush(self) -> None:
        """Writes what the socket accepts. The caller holds the lock."""
        if self._socket is None:
            return
        try:
            while self._unsent:
                data = self._unsent[0]
                sent = self._socket.send(data)
                if sent < len(data):
                    self._unsent[0] = memoryview(data)[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self._ending = self._broken = True
            self._loss(f"the connection broke ({_cause(error)})")
            self._tell()

    def _tell(self) -> None:
        """Wakes the writing task, from any thread."""
        token, thread = self._home
        if threading.get_ident() == thread:
            self._heard()
        else:
            token.run_sync_soon(self._heard, idempotent=True)

    def _heard(self) -> None:
        """Wakes those who wait for messages to write or for room in the queue."""
        self._news.set()
        self._news = trio.Event()
        with self._lock:
            self._lock.notify_all()

    def _end(self) -> None:
        """Ends sending."""
        with self._lock:
            self._ending = True
        self._heard()

    async def _drained(self) -> None:
        """Ends sending and waits until the queue is written, for at most a second."""
        self._end()
        with trio.move_on_after(FLUSH_SECONDS, shield=True):
            await self._written.wait()

    def _release(self) -> None:
        """Forgets the socket, which the stream closes."""
        with self._reading, self._lock:
            if self._socket is not None:
                self._socket.detach()
            self._socket, self._ending = None, True


def address_of(stream: trio.abc.Stream) -> tuple[str, str]:
    """The remote host of a connection, and its address for messages."""
    try:
        if isinstance(stream, TlsStream):
            return stream.addresses[1][0], stream.device.name
        if not isinstance(stream, trio.SocketStream):
            return "", "a peer"
        host, port = stream.socket.getpeername()[:2]
    except OSError:  # the peer has disconnected already
        return "", "a peer"
    return host, host_port(host, port)


def _raw(stream: trio.abc.Stream) -> socket.socket | TlsChannel | None:
    """A non-blocking socket of the standard library for the descriptor of a trio stream, or the channel of a
    TLS stream; None if it has none. It must be detached before the stream closes the descriptor."""
    if isinstance(stream, TlsStream):
        return stream.channel
    return socket.socket(fileno=stream.socket.fileno()) if isinstance(stream, trio.SocketStream) else None


async def _read_some(raw: socket.socket, most: int) -> bytes:
    """What arrives next. It takes fewer turns than trio's SocketStream, which tries before it waits."""
    while True:
        await trio.lowlevel.wait_readable(raw)
        with suppress(BlockingIOError):
            return raw.recv(most)


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error).__name__


@asynccontextmanager
async def open_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises a single failure as itself instead of as an exception group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = leading(group)
        if error is group:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def open_connection(
    stream: trio.abc.Stream, peer: str, *, dialled: bool, queue: int = QUEUE
) -> AsyncIterator[Connection]:
    """A connection over a stream. On leaving the block the queue is written, then the stream is closed."""
    connection = Connection(stream, peer, dialled=dialled, queue=queue)
    async with open_tasks() as tasks:
        tasks.start_soon(connection._write_unsent)
        try:
            yield connection
            await connection._drained()
        finally:
            connection._release()
            connection._writing.cancel()
            await trio.aclose_forcefully(stream)


async def open_tcp(host: str, port: int) -> trio.abc.Stream:
    """A TCP connection. Small messages are sent at once, since trio sets TCP_NODELAY."""
    return await earliest(partial(trio.open_tcp_stream, host, port))


async def earliest(attempt: Callable[[], Awaitable[trio.abc.Stream]]) -> trio.abc.Stream:
    """The stream of the first of several attempts that ends; OSError or UnicodeError: it failed. Another
    attempt begins every ATTEMPT_SECONDS while none has ended: a system repeats a lost request to connect only
    after 1, 3 and 7 s, and a link that was cut shall be found as soon as it is back."""
    ended: deque[trio.abc.Stream | OSError | UnicodeError] = deque()
    news = trio.Event()

    async def one(most: float) -> None:
        with trio.move_on_after(most):
            try:
                ended.append(await attempt())
            except (OSError, UnicodeError) as error:
                ended.append(error)
            news.set()

    try:
        async with trio.open_nursery() as attempts:
            most = math.inf  # the first one takes as long as the caller allows
            while not ended:
                attempts.start_soon(one, most)
                most = LONGEST_ATTEMPT
                with trio.move_on_after(ATTEMPT_SECONDS):
                    await news.wait()
            attempts.cancel_scope.cancel()
        first = ended.popleft()
    finally:
        for other in ended:
            if not isinstance(other, Exception):
                await trio.aclose_forcefully(other)
    if isinstance(first, Exception):
        raise first
    return first


@asynccontextmanager
async def dial(
    open_stream: OpenStream,
    host: str,
    port: int,
    me: Identity,
    purpose: Purpose,
    *,
    seconds: float,
    peer: Peer | None = None,
) -> AsyncIterator[tuple[Connection, Hello]]:
    """Connects to a node and exchanges Hello: yields the connection and the node's Hello.

    NodeLostError: nobody answers, or sends Hello within `seconds`, or another process than `peer` does.
    MismatchError: the two cannot compute together. UntrustedError: with a house, the other is not of it, or
    does not take this device for one of it."""
    where = host_port(host, port)
    who = f"{peer.name} ({where})" if peer else where
    hint = "check that `shoal node` is running there and that the address is right"
    deadline = trio.current_time() + seconds
    stream: trio.abc.Stream | None = None
    try:
        with trio.move_on_at(deadline):
            raw = await open_stream(host, port)
            if isinstance(raw, TlsStream) and peer is not None and not _is_of(raw, peer):
                # The network here has another device of the house at that address: the head knows the right.
                await trio.aclose_forcefully(raw)
                raw = await open_stream(inward(peer.incarnation >> 32), port)
            if me.trust is None or isinstance(raw, TlsStream):  # that of net/reverse.py has TLS already
                stream = raw
            else:
                stream = await sealed(raw, me.trust, who)
    except (OSError, UnicodeError) as error:  # UnicodeError: no valid host name
        raise NodeLostError(f"{who} cannot be reached ({reason(error)}): {hint}") from error
    if stream is None:
        raise NodeLostError(f"{who} did not answer within {seconds:g} s: {hint}")
    if peer is None and isinstance(stream, TlsStream):
        who = f"{stream.device.name} ({where})"
    async with open_connection(
        stream, who, dialled=True, queue=STEP_QUEUE if purpose in ("step", "bulk") else QUEUE
    ) as connection:
        hello, start = None, trio.current_time()
        with trio.move_on_at(deadline):
            hello = await _exchanged(connection, stream, me.hello(purpose, ticket=peer.ticket if peer else 0))
        if hello is None:
            raise NodeLostError(
                f"{who} did not say Hello within {seconds:g} s: check that it is a shoal node"
            )
        connection.trip = trio.current_time() - start
        hello = hello_of(me, connection.device, hello, where)
        connection.peer = f"{hello.name} ({where})"
        check_hello(me, hello, connection.peer)
        if peer is not None:
            check_peer(peer, hello)
        yield connection, hello


def _is_of(stream: TlsStream, peer: Peer) -> bool:
    """Whether a stream leads to the device of a peer."""
    return prefix_of(key_of(der_of(stream.device))) == peer.incarnation >> 32


async def sealed(stream: trio.abc.Stream, trust: Trust, who: str) -> TlsStream:
    """TLS over a stream that was just opened, which is closed if that fails or is cancelled."""
    try:
        return await trust.dialled(stream, who)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _exchanged(connection: Connection, stream: trio.abc.Stream, mine: Hello) -> Hello:
    """The answer to this side's Hello. Errors as for `dial`."""
    try:
        await connection.send(mine)
        return await connection.expect(Hello)
    except NodeLostError as error:
        if isinstance(stream, TlsStream) and stream.refused:
            raise UntrustedError(
                f"{connection.peer} does not know this device: it is of another house, or was told to forget "
                "this one. Pair it again: `shoal invite` on the head, `shoal join` on the device"
            ) from error
        raise


async def enter_dial(
    stack: AsyncExitStack, open_stream: OpenStream, me: Identity, peer: Peer, purpose: Purpose, seconds: float
) -> Connection:
    """Enters `dial` and returns the connection. It is tried again after a moment, since a node that strangers
    crowd may close a connection before it has said Hello. Errors as for `dial`."""
    for pause in AGAIN_SECONDS:
        try:
            return await _enter(stack, open_stream, me, peer, purpose, seconds)
        except NodeLostError:
            await trio.sleep(pause)
    return await _enter(stack, open_stream, me, peer, purpose, seconds)


async def _enter(
    stack: AsyncExitStack, open_stream: OpenStream, me: Identity, peer: Peer, purpose: Purpose, seconds: float
) -> Connection:
    dialled = dial(open_stream, peer.host, peer.port, me, purpose, seconds=seconds, peer=peer)
    connection, _ = await stack.enter_async_context(dialled)
    return connection


async def greet(
    connection: Connection,
    me: Identity,
    offer: Offer,
    *,
    seconds: float,
    admit: Callable[[Hello], Awaitable[int]],
) -> Hello:
    """The counterpart of `dial` on the side that was dialled: receives a Hello, checks it, asks `admit` for
    the ticket in the answer, answers.

    NodeLostError: no Hello within `seconds`. MismatchError: the two cannot compute together. UntrustedError:
    the peer claims to be another device of the house. Errors of `admit`."""
    hello = None
    with trio.move_on_after(seconds):
        hello = await connection.expect(Hello)
    if hello is None:
        raise NodeLostError(f"{connection.peer} connected and did not say Hello within {seconds:g} s")
    hello = hello_of(me, connection.device, hello, connection.peer)
    connection.peer = f"{hello.name} ({connection.peer})"
    check_hello(me, hello, connection.peer)
    ticket = await admit(hello)
    await connection.send(me.hello(hello.purpose, offer, ticket))
    return hello


def is_peers_fault(error: ShoalError) -> bool:
    """Whether the peer should receive the error: it is still connected, and the fault is not ours."""
    return not isinstance(error, NodeLostError | LocalProtocolError) and isinstance(error, NetError)


def reason(error: OSError | UnicodeError) -> str:
    """The operating system's reason. trio tries every address and puts one error for each into the cause."""
    cause = error.__cause__
    while isinstance(cause, ExceptionGroup):
        cause = cause.exceptions[0]
    inner = cause if isinstance(cause, OSError) else error
    if isinstance(inner, UnicodeError):
        return "the host name is not valid"
    if inner.errno is not None and inner.errno > 0:
        return os.strerror(inner.errno)  # trio's text repeats the address
    return inner.strerror or str(inner) or type(inner).__name__
