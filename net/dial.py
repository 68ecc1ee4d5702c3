"""How a connection begins: the TCP connection, TLS in a house, and Hello from both sides.

`dial` is for the side that connects, `greet` for the side that was dialled."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import trio

from .connection import QUEUE, STEP_QUEUE, Connection, open_connection
from .errors import NodeLostError, UntrustedError
from .identity import Identity, check_hello, check_peer, hello_of
from .listen import host_port
from .messages import Hello, Offer, Peer, Purpose
from .requests import inward
from .tls import TlsStream, Trust, der_of, key_of, prefix_of

AGAIN_SECONDS = (0.1, 0.3)
"""The pauses before a dial that has failed is tried again."""
ATTEMPT_SECONDS, LONGEST_ATTEMPT = 0.3, 5.0
"""The time between two attempts to connect, and the longest time of each but the first."""

OpenStream = Callable[[str, int], Awaitable[trio.abc.Stream]]


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
