"""Connections to a peer over any trio stream, which send and receive messages and raise the errors of
net/errors.

The caller of `receive` reads. A message is written at once by the thread that sends it. Only this file, and
net/dial.py for new connections, handle stream exceptions of trio and the operating system; each becomes an
error that names the peer.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol, TypeVar

import trio

from ..engine.errors import ShoalError
from .errors import (
    LocalProtocolError,
    MismatchError,
    NetError,
    NodeLostError,
    RemoteProtocolError,
    from_wire,
    leading,
    to_wire,
)
from .listen import host_port
from .messages import Error, Message, PairedDevice
from .packed import Buffer
from .tls import WAKE_BYTES, TlsChannel, TlsStream
from .wire import Signal, WireProtocol

READ_BYTES = 256 * 1024
FIRST_BYTES = 16 * 1024
"""What is read at a time before a large frame has begun. Room for READ_BYTES is a mapping of its own that the
system makes and takes away each time, which costs more than a small message."""
FLUSH_SECONDS = 1.0
LOOK_SECONDS = 0.1
"""How often a thread that waits for room in a queue looks whether it should stop."""
MOST_BUFFERS = 64
"""The most buffers of one write: systems have a limit, usually of 1,024."""
QUEUE = 64
STEP_QUEUE = 4
"""Length of the queue of a `step` or `bulk` connection, whose frames have up to 4 MiB. It is short so that a
slow network throttles the stage that sends."""

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
        self._unsent: deque[memoryview] = deque()
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
            buffers = [buffer for message in messages for buffer in self._wire.send(message)]
            sent = 0 if self._unsent else self._accepted(buffers)
            if sent < sum(map(len, buffers)):
                self._unsent.append(memoryview(b"".join(buffers))[sent:])
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
        """Writes what the socket accepts of what waits. The caller holds the lock."""
        while self._unsent:
            sent = self._accepted([self._unsent[0]])
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
                return
            self._unsent.popleft()

    def _accepted(self, buffers: Sequence[Buffer]) -> int:
        """Writes the first bytes, as far as the socket accepts them; returns how many. The rows of a prompt
        are not copied. The caller holds the lock."""
        try:
            if isinstance(self._socket, socket.socket) and len(buffers) <= MOST_BUFFERS:
                return self._socket.sendmsg(buffers)
            return 0 if self._socket is None else self._socket.send(b"".join(buffers))
        except BlockingIOError:
            return 0
        except OSError as error:
            self._ending = self._broken = True
            self._loss(f"the connection broke ({_cause(error)})")
            self._tell()
            return 0

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


def is_peers_fault(error: ShoalError) -> bool:
    """Whether the peer should receive the error: it is still connected, and the fault is not ours."""
    return not isinstance(error, NodeLostError | LocalProtocolError) and isinstance(error, NetError)
