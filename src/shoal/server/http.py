"""HTTP/1.1 on trio streams, for an ASGI application; h11 reads and writes the messages.

Every wait has an end: a client has a time to send its request, and to read each part of the response. That it
has gone is told to the application at once (`http.disconnect`)."""

from __future__ import annotations

import json
import os
import re
import ssl
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote_to_bytes

import trio

from ..engine.errors import ignore
from .opening import missing

try:
    import h11
except ImportError:
    raise missing() from None

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection may take. Times are in seconds."""

    connections: int = 512
    head_bytes: int = 16 << 10
    head: float = 20.0
    """For the first byte of a connection, and then to the end of a request's headers."""
    idle: float = 75.0
    """Between a response and the next request."""
    body: float = 60.0
    """For a whole request body."""
    write: float = 60.0
    """For the client to take a part of a response."""
    grace: float = 30.0
    """How long running answers may go on when the server is told to end."""


class BodyError(Exception):
    """A request body that breaks the rules of HTTP."""


_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#]*)(?P<path>.*)", re.IGNORECASE | re.DOTALL)
_RECEIVE = 64 << 10
_AHEAD = 64 << 10
"""The most bytes of a following request that are read while a response is under way."""
_FULL_SECONDS = 5
"""When to come again, for who is a connection too many."""
_LINGER = 2.0
_LINGER_BYTES = 8 << 20


class Server:
    """Serves connections until it is told to drain."""

    def __init__(self, app: App, limits: Limits = Limits(), log: Callable[[str], object] = ignore) -> None:
        self._app, self._limits, self._log = app, limits, log
        self._draining = trio.Event()
        self.ended = trio.Event()
        """Set when `serve` has ended."""
        self._open = 0

    @property
    def draining(self) -> bool:
        """Whether no more requests are accepted."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Accepts no more requests. Those under way are finished within `Limits.grace`."""
        self._draining.set()

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        tls: ssl.SSLContext | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Returns after `drain`, when the last response has ended or the grace is over."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:

                async def handle(stream: trio.SocketStream) -> None:
                    await self._connection(stream, tls)

                async def accept() -> None:
                    await trio.serve_listeners(handle, listeners, handler_nursery=connections)

                accepting.start_soon(accept)
                task_status.started()
                await self._draining.wait()
                accepting.cancel_scope.cancel()
            connections.cancel_scope.deadline = trio.current_time() + self._limits.grace
        self.ended.set()

    async def _connection(self, socket: trio.SocketStream, tls: ssl.SSLContext | None) -> None:
        self._open += 1
        full = self._open > self._limits.connections
        stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] = socket
        try:
            if tls is not None and not full:
                stream = trio.SSLStream(socket, tls, server_side=True, https_compatible=True)
                with trio.fail_after(self._limits.head):
                    await stream.do_handshake()
            client = socket.socket.getpeername()[0]
            served = _Connection(self._app, stream, client, tls is not None, self._limits, self._draining)
            if not full:
                await served.run()
            elif tls is None:  # with TLS, a refusal would cost a handshake
                wait = ("Retry-After", str(_FULL_SECONDS))
                await served.refuse(503, "the server has too many connections: try again later", wait)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError):
            pass  # the client has gone, or takes too long
        except Exception as error:  # a mistake of ours ends one connection, not all
            self._log(f"{type(error).__name__} at\n{''.join(traceback.format_tb(error.__traceback__))}")
        finally:
            self._open -= 1
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _LINGER):
                await trio.aclose_forcefully(stream)


class _Connection:
    def __init__(
        self,
        app: App,
        stream: trio.SocketStream | trio.SSLStream[trio.SocketStream],
        client: str,
        secure: bool,
        limits: Limits,
        draining: trio.Event,
    ) -> None:
        self._app, self._stream, self._client, self._secure = app, stream, client, secure
        self._limits, self._draining = limits, draining
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self._ended = False
        """Whether the client sends no more bytes."""
        self._left = b""
        """What is to be sent, and did not fit into the socket."""
        self._bare = False
        """Whether a response to the current request has no body."""

    async def run(self) -> None:
        """Answers the requests of the connection, one after another."""
        first = True
        while True:
            try:
                request = await self._head(first)
                if request is None:
                    return
                await self._answer(request)
            except h11.RemoteProtocolError as error:
                status = error.error_status_hint
                await self.refuse(status if 400 <= status < 500 else 400, f"this is not HTTP: {error}")
                return
            if self._h11.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE} or self._draining.is_set():
                await self._linger()
                return
            self._h11.start_next_cycle()
            first = False

    async def _head(self, first: bool) -> h11.Request | None:
        """The next request. None: there is none, since the client has gone or this server ends."""
        self._bare = False
        if not self._h11.trailing_data[0]:
            with trio.move_on_after(self._limits.head if first else self._limits.idle):
                if not await self._more_or_draining():
                    return None
            if not self._h11.trailing_data[0]:
                return None  # silent for too long
        try:
            with trio.fail_after(self._limits.head):
                event = await self._event()
        except trio.TooSlowError:
            if self._h11.trailing_data[0]:
                await self.refuse(408, "the request took too long to arrive")
            return None
        if not isinstance(event, h11.Request):
            return None
        self._bare = event.method == b"HEAD"
        size = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
        if size > self._limits.head_bytes:  # h11 looks only at what is not whole yet
            raise h11.RemoteProtocolError("the head of the request is too large", error_status_hint=431)
        return event

    async def _more_or_draining(self) -> bool:
        """Waits for bytes of a next request. False: the server ends, or the client has."""
        async with trio.open_nursery() as nursery:

            async def drained() -> None:
                await self._draining.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(drained)
            try:
                await self._read()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._ended = True
            nursery.cancel_scope.cancel()
        return not self._draining.is_set() and not self._ended

    async def _read(self) -> None:
        data = await self._stream.receive_some(_RECEIVE)
        self._ended = not data
        self._h11.receive_data(bytes(data))

    async def _event(self) -> Any:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            await self._read()

    async def _answer(self, request: h11.Request) -> None:
        names = [name for name, _ in request.headers]
        if b"transfer-encoding" in names and b"content-length" in names:  # two lengths: a way to smuggle
            raise h11.RemoteProtocolError("a request has Content-Length and Transfer-Encoding")
        if request.http_version not in (b"1.0", b"1.1"):
            raise h11.RemoteProtocolError(f"HTTP/{request.http_version.decode()} is not spoken here")
        exchange = _Exchange(self, request)
        scope = {**self.scope(request), "shoal.offer": exchange.offer}
        await self._app(scope, exchange.receive, exchange.send)
        if not exchange.complete:
            raise trio.BrokenResourceError  # the response cannot be ended as it was begun

    async def write(self, *events: Any) -> None:
        """Sends parts of a response. OSError: the client has gone, or does not read."""
        if self.offer(self.written(*events)):
            return
        data, self._left = self._left, b""
        try:
            with trio.CancelScope(deadline=trio.current_time() + self._limits.write) as scope:
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise OSError("the client has gone") from error
        if scope.cancelled_caught:
            raise OSError("the client does not read")

    def written(self, *events: Any) -> bytes:
        """Parts of a response as bytes."""
        return b"".join(self._h11.send(event) or b"" for event in events)

    def offer(self, data: bytes) -> bool:
        """Sends bytes as far as the socket takes them now. False: not all, or the client has gone; `write`
        waits, or says so."""
        if self._left:
            self._left += data
        else:
            self._left = data[self._at_once(data) :]
        return not self._left

    def _at_once(self, data: bytes) -> int:
        """Sends what the socket takes now; returns how many bytes that were. A token's event nearly always
        fits, and a turn of the event loop for each would cost as much as all else that is done for it."""
        if not isinstance(self._stream, trio.SocketStream):
            return 0
        try:
            return os.write(self._stream.socket.fileno(), data)
        except OSError:  # full, or broken
            return 0

    async def refuse(self, status: int, message: str, *more: tuple[str, str]) -> None:
        """An error response of the connection itself, after which it ends."""
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = json.dumps(
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        ).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            ("Date", formatdate(usegmt=True)),
            *more,
        ]
        content = () if self._bare else (h11.Data(data=body),)
        await self.write(h11.Response(status_code=status, headers=headers), *content)
        await self._linger()

    async def _linger(self) -> None:
        """Says that nothing follows, and reads what the client still sends: closing at once would reset the
        connection, and the client might lose the response."""
        if self._ended:
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(_LINGER):
            if isinstance(self._stream, trio.SocketStream):
                await self._stream.send_eof()
            else:
                return
            read = 0
            while read < _LINGER_BYTES and (data := await self._stream.receive_some(_RECEIVE)):
                read += len(data)

    async def body(self) -> Message:
        """The next part of the request body. TooSlowError: it does not come."""
        if self._h11.they_are_waiting_for_100_continue:
            await self.write(h11.InformationalResponse(status_code=100, headers=[]))
        event = await self._event()
        if isinstance(event, h11.Data):
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        return {"type": "http.request", "body": b"", "more_body": False}

    @property
    def last(self) -> bool:
        """Whether the connection must end after this response: the server does, or the rest of a request that
        was refused early has not arrived."""
        try:
            while self._h11.their_state is h11.SEND_BODY and self._h11.next_event() is not h11.NEED_DATA:
                pass
        except h11.RemoteProtocolError:
            return True
        return self._h11.their_state is not h11.DONE or self._draining.is_set()

    async def gone(self) -> None:
        """Waits until the client has gone. What it sends before that belongs to its next request."""
        while not self._ended:
            if len(self._h11.trailing_data[0]) >= _AHEAD:
                await trio.sleep_forever()
            try:
                await self._read()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._ended = True

    def scope(self, request: h11.Request) -> Scope:
        """The ASGI scope of a request. `shoal.ending` is set when the server ends; `shoal.offer` is
        _Exchange.offer."""
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        target = request.target
        if absolute := _ABSOLUTE.fullmatch(target):  # then what it says of the host counts, by RFC 9112
            headers = [pair for pair in headers if pair[0] != b"host"] + [(b"host", absolute["host"])]
            target = absolute["path"] or b"/"
        path, _, query = target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": "https" if self._secure else "http",
            "path": unquote_to_bytes(path).decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": (self._client, 0),
            "server": None,
            "shoal.ending": self._draining,
        }

    @property
    def body_seconds(self) -> float:
        return self._limits.body


class _Exchange:
    """A request and its response, as ASGI has them."""

    def __init__(self, connection: _Connection, request: h11.Request) -> None:
        self._connection, self._head = connection, request.method == b"HEAD"
        self._deadline = trio.current_time() + connection.body_seconds
        self._read = self.complete = False
        self._start: h11.Response | None = None
        self._version, self._chunked = request.http_version, False

    async def receive(self) -> Message:
        """A part of the body; after the last one, `http.disconnect` when the client has gone. TimeoutError:
        the body does not come in time. BodyError: it breaks the rules of HTTP."""
        if self._read:
            await self._connection.gone()
            return {"type": "http.disconnect"}
        try:
            with trio.fail_at(self._deadline):
                message = await self._connection.body()
        except trio.TooSlowError:
            raise TimeoutError("the request body does not arrive") from None
        except h11.RemoteProtocolError as error:
            raise BodyError(f"this is not HTTP: {error}") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return {"type": "http.disconnect"}
        self._read = not message["more_body"]
        return message

    async def send(self, message: Message) -> None:
        """A part of the response. OSError: the client has gone."""
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"Date", formatdate(usegmt=True).encode())]
            if self._connection.last:
                headers.append((b"Connection", b"close"))
            self._start = h11.Response(status_code=message["status"], headers=headers)
            whole = any(name.lower() == b"content-length" for name, _ in headers)
            self._chunked = self._version == b"1.1" and not whole and not self._head
            return
        body, last = message.get("body", b""), not message.get("more_body", False)
        await self._connection.write(*self._events(body, last=last))
        self.complete = self.complete or last

    def offer(self, body: bytes) -> bool:
        """Sends a part of the body that is not the last one, as far as the socket takes it now; returns
        whether that was all. The rest goes with the next part that is sent, or an empty one."""
        if self._start is None and self._chunked:
            # As h11 writes a chunk; its way there costs more than all else here, for each token of a stream.
            return self._connection.offer(b"%x\r\n%b\r\n" % (len(body), body))
        return self._connection.offer(self._connection.written(*self._events(body, last=False)))

    def _events(self, body: bytes, *, last: bool) -> list[Any]:
        events: list[Any] = [] if self._start is None else [self._start]
        self._start = None
        if body and not self._head:
            events.append(h11.Data(data=body))
        if last:
            events.append(h11.EndOfMessage())
        return events
