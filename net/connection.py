"""Connections to a peer over any trio stream, which send and receive messages and raise the errors of
net/errors.

The caller of `receive` reads. A task of each connection writes what is in its bounded queue, so that a slow
network delays that connection's messages and not the computation. Only this file handles stream exceptions of
trio and the operating system; it translates each into an error that names the peer.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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
from .identity import Identity, check_hello, check_peer
from .listen import host_port
from .messages import Error, Hello, Message, Offer, Peer, Purpose
from .wire import Signal, WireProtocol

READ_BYTES = 256 * 1024
FLUSH_SECONDS = 1.0
QUEUE = 64
STEP_QUEUE = 4
"""Length of the queue of a `step` connection, whose frames have up to 4 MiB. It is short so that a slow
network throttles the stage that sends."""

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
    """One end of a connection, made by `open_connection`. `peer` is the name of the other end in errors."""

    def __init__(self, stream: trio.abc.Stream, peer: str, *, dialled: bool, queue: int = QUEUE) -> None:
        self.peer = peer
        self.received = 0
        """Bytes that have arrived."""
        self._stream = stream
        self._wire = WireProtocol(dialled)
        self._lost: NodeLostError | None = None
        self._outgoing, self._queue = trio.open_memory_channel[list[bytes]](queue)
        self._written = trio.Event()

    async def send(self, message: Message) -> None:
        """Queues a message, waiting while the queue is full. NodeLostError: the connection has ended."""
        try:
            await self._outgoing.send(self._wire.send(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._loss("the connection has ended") from None

    def post(self, message: Message) -> bool:
        """Queues a message if the queue has room; returns whether it had. NodeLostError: the connection has
        ended."""
        try:
            self._outgoing.send_nowait(self._wire.send(message))
        except trio.WouldBlock:
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._loss("the connection has ended") from None
        return True

    async def receive(self) -> Message:
        """Returns the next message. An Error message is raised as the exception that it describes.

        NodeLostError: the connection has ended. MismatchError, RemoteProtocolError: the peer is at fault."""
        while True:
            try:
                message = self._wire.next_message()
            except (MismatchError, RemoteProtocolError) as error:
                raise type(error)(f"{self.peer}: {error}") from error
            if message is Signal.CLOSED:
                raise self._loss("it closed the connection")
            if message is Signal.NEED_DATA:
                self._wire.receive_data(await self._read())
            elif isinstance(message, Error):
                raise from_wire(message.code, message.text, self.peer)
            else:
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
        try:
            data = await self._stream.receive_some(READ_BYTES)
            self.received += len(data)
            return data
        except trio.BrokenResourceError as error:
            raise self._loss(f"the connection broke ({_cause(error)})") from error
        except trio.ClosedResourceError as error:
            raise self._loss("the connection has ended") from error

    def _loss(self, why: str) -> NodeLostError:
        """The error to raise. It keeps the first reason, since later ones are its consequences."""
        if self._lost is None:
            self._lost = NodeLostError(f"{self.peer} is lost: {why}")
        return NodeLostError(str(self._lost))

    async def _write_queued(self) -> None:
        """The writing task. When a write fails, every later `send` and `receive` raises NodeLostError."""
        try:
            async for buffers in self._queue:
                await self._stream.send_all(b"".join(buffers))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._loss(f"the connection broke ({_cause(error)})")
            self._queue.close()  # before closing the stream, so that no further `send` appears to succeed
            await trio.aclose_forcefully(self._stream)
        finally:
            self._queue.close()
            self._written.set()

    async def _drained(self) -> None:
        """Closes the queue and waits until it is written, for at most a second."""
        self._outgoing.close()
        with trio.move_on_after(FLUSH_SECONDS, shield=True):
            await self._written.wait()


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
        tasks.start_soon(connection._write_queued)
        try:
            yield connection
            await connection._drained()
        finally:
            connection._outgoing.close()
            await trio.aclose_forcefully(stream)
            tasks.cancel_scope.cancel()


async def open_tcp(host: str, port: int) -> trio.abc.Stream:
    """A TCP connection. Small messages are sent at once, since trio sets TCP_NODELAY."""
    return await trio.open_tcp_stream(host, port)


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
    MismatchError: the two cannot compute together."""
    where = host_port(host, port)
    who = f"{peer.name} ({where})" if peer else where
    hint = "check that `shoal node` is running there and that the address is right"
    deadline = trio.current_time() + seconds
    stream = None
    try:
        with trio.move_on_at(deadline):
            stream = await open_stream(host, port)
    except (OSError, UnicodeError) as error:  # UnicodeError: no valid host name
        raise NodeLostError(f"{who} cannot be reached ({_reason(error)}): {hint}") from error
    if stream is None:
        raise NodeLostError(f"{who} did not answer within {seconds:g} s: {hint}")
    async with open_connection(
        stream, who, dialled=True, queue=STEP_QUEUE if purpose == "step" else QUEUE
    ) as connection:
        hello = None
        with trio.move_on_at(deadline):
            await connection.send(me.hello(purpose))
            hello = await connection.expect(Hello)
        if hello is None:
            raise NodeLostError(
                f"{who} did not say Hello within {seconds:g} s: check that it is a shoal node"
            )
        connection.peer = f"{hello.name} ({where})"
        check_hello(me, hello, connection.peer)
        if peer is not None:
            check_peer(peer, hello)
        yield connection, hello


async def greet(
    connection: Connection,
    me: Identity,
    offer: Offer,
    *,
    seconds: float,
    admit: Callable[[Hello], Awaitable[None]],
) -> Hello:
    """The counterpart of `dial` on the side that was dialled: receives a Hello, checks it, asks `admit`,
    answers.

    NodeLostError: no Hello within `seconds`. MismatchError: the two cannot compute together. Errors of
    `admit`."""
    with trio.move_on_after(seconds):
        hello = await connection.expect(Hello)
        connection.peer = f"{hello.name} ({connection.peer})"
        check_hello(me, hello, connection.peer)
        await admit(hello)
        await connection.send(me.hello(hello.purpose, offer))
        return hello
    raise NodeLostError(f"{connection.peer} connected and did not say Hello within {seconds:g} s")


def is_peers_fault(error: ShoalError) -> bool:
    """Whether the peer should receive the error: it is still connected, and the fault is not ours."""
    return not isinstance(error, NodeLostError | LocalProtocolError) and isinstance(error, NetError)


def _reason(error: OSError | UnicodeError) -> str:
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
