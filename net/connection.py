"""A connection to one peer over any trio stream: messages in and out, and every failure as one of our errors.

One task reads (whoever calls `receive`), one task of the link's own writes what waits in a bounded queue, so
that a slow line delays its own messages and never a computation that could go on. This file is the only one
that sees trio's and the system's exceptions of streams; it names the peer in each.
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
from .messages import Error, Hello, Message, Offer, Peer, Purpose
from .wire import Signal, WireProtocol

READ_BYTES = 256 * 1024
FLUSH_SECONDS = 1.0
QUEUE = 64
STEP_QUEUE = 4
"""Frames of up to 4 MiB: few of them, so that a slow line holds back the stage before it."""

OpenStream = Callable[[str, int], Awaitable[trio.abc.Stream]]
Kind = TypeVar("Kind")
T = TypeVar("T")


class Hop(Protocol):
    """Runs a blocking call without blocking other tasks."""

    async def __call__(self, call: Callable[[], T], /) -> T: ...


async def in_thread(call: Callable[[], T], /) -> T:
    """Runs a blocking call in a worker thread; a cancelled caller still waits for its end."""
    return await trio.to_thread.run_sync(call)


class Connection:
    """One end of a connection. Made by `open_link`; `peer` names the other end in every error."""

    def __init__(self, stream: trio.abc.Stream, peer: str, *, dialled: bool, queue: int = QUEUE) -> None:
        self.peer = peer
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
        """Queues a message if there is room, and says whether there was. NodeLostError: the connection has
        ended."""
        try:
            self._outgoing.send_nowait(self._wire.send(message))
        except trio.WouldBlock:
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._loss("the connection has ended") from None
        return True

    async def receive(self) -> Message:
        """The next message; an Error from the peer is raised as what it says.

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
        """The next message, which has to be of that kind."""
        message = await self.receive()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"{self.peer}: {type(message).__name__} came, {kind.__name__} was due")
        return message

    async def refuse(self, error: Exception) -> None:
        """Says why the connection ends here, and lets the peer read it.

        A socket that is closed while it holds unread bytes takes back what it sent last; so these are read,
        for a second at most."""
        try:
            await self.send(Error(*to_wire(error)))
            await self._drained()
            if isinstance(self._stream, trio.abc.HalfCloseableStream):
                await self._stream.send_eof()
            with trio.move_on_after(FLUSH_SECONDS):
                while await self._stream.receive_some(READ_BYTES):
                    pass
        except (NodeLostError, trio.BrokenResourceError, trio.ClosedResourceError):
            return  # it has gone already: nobody is left to be told
        except trio.BusyResourceError:
            return  # it reads nothing, so what waits to be written is stuck, and this would be too

    async def _read(self) -> bytes | bytearray:
        try:
            return await self._stream.receive_some(READ_BYTES)
        except trio.BrokenResourceError as error:
            raise self._loss(f"the connection broke ({_cause(error)})") from error
        except trio.ClosedResourceError as error:
            raise self._loss("the connection has ended") from error

    def _loss(self, why: str) -> NodeLostError:
        """The first reason stays: what comes after it are consequences."""
        if self._lost is None:
            self._lost = NodeLostError(f"{self.peer} is lost: {why}")
        return NodeLostError(str(self._lost))

    async def _write_queued(self) -> None:
        """The writing task. When the peer cannot be written to, whoever reads or sends hears of it."""
        try:
            async for buffers in self._queue:
                await self._stream.send_all(b"".join(buffers))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._loss(f"the connection broke ({_cause(error)})")
            self._queue.close()  # first: from here on no message may seem to be sent
            await trio.aclose_forcefully(self._stream)
        finally:
            self._queue.close()
            self._written.set()

    async def _drained(self) -> None:
        """Waits until all that was queued is written, or a second has passed. No send may follow."""
        self._outgoing.close()
        with trio.move_on_after(FLUSH_SECONDS, shield=True):
            await self._written.wait()


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error).__name__


@asynccontextmanager
async def open_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery of which a single failure comes out as itself, not as a group of one."""
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
    """A link over a stream, which is closed with it, after what was queued is written."""
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
    """A TCP connection; small messages leave at once (trio sets TCP_NODELAY)."""
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
    """Connects to a node and greets it: the link, and what the node said.

    NodeLostError: nobody there, or no greeting within `seconds`, or not the `peer` that was meant.
    MismatchError: the two cannot work together."""
    where = f"{host}:{port}"
    who = f"{peer.name} ({where})" if peer else where
    hint = "is `shoal node` running there, and the address right?"
    deadline = trio.current_time() + seconds
    stream = None
    try:
        with trio.move_on_at(deadline):
            stream = await open_stream(host, port)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that no name server could be asked for
        raise NodeLostError(f"{who} cannot be reached: {_reason(error)}: {hint}") from error
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
            raise NodeLostError(f"{who} did not greet within {seconds:g} s: is it a shoal node?")
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
    """The side that was dialled: hears who is there, checks, and answers, if `admit` does not object.

    Errors as for `dial`."""
    with trio.move_on_after(seconds):
        hello = await connection.expect(Hello)
        connection.peer = f"{hello.name} ({connection.peer})"
        check_hello(me, hello, connection.peer)
        await admit(hello)
        await connection.send(me.hello(hello.purpose, offer))
        return hello
    raise NodeLostError(f"{connection.peer} connected and did not greet within {seconds:g} s")


def is_peers_fault(error: ShoalError) -> bool:
    """The peer is still there and ought to hear what was wrong."""
    return not isinstance(error, NodeLostError | LocalProtocolError) and isinstance(error, NetError)


def _reason(error: OSError | UnicodeError) -> str:
    """The system's words; trio puts one error per address tried into the cause."""
    cause = error.__cause__
    while isinstance(cause, ExceptionGroup):
        cause = cause.exceptions[0]
    inner = cause if isinstance(cause, OSError) else error
    if isinstance(inner, UnicodeError):
        return "the host's name is not one"
    if inner.errno is not None and inner.errno > 0:
        return os.strerror(inner.errno)  # trio puts the address before it, and we do so, too
    return inner.strerror or str(inner) or type(inner).__name__
