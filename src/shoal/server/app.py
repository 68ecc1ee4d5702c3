"""The server as an ASGI application for trio: who is let in, and what is said of each request.

One line a request is logged, without a word of its text."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import trio

from ..answering import Engine
from ..engine.errors import ignore
from ..engine.model_directory import Model
from ..net.errors import printable
from .asking import Piece
from .bodies import Fields, parse
from .errors import ApiError, api_error
from .house import GetStatus, House
from .http import Message, Receive, Scope, Send
from .limiter import RequestLimiter
from .opening import Hosts
from .routes import PAGE, routes
from .served import Call, Chunk, Event, Flow, Handler, Part, Reply, Served

Log = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Options:
    """How a server treats those who ask. `keys`: API keys by their SHA-256, with a name each; without any,
    everybody is let in. `origins`: those of other pages whose scripts may ask. `hosts`: what the Host header
    may name; None: anything. `slots`: answers that are computed together. `queue`: requests
    that may wait."""

    names: Sequence[str] = ()
    keys: Mapping[bytes, str] | None = None
    origins: Collection[str] = ()
    hosts: Hosts | None = None
    slots: int = 32
    queue: int = 128
    body_bytes: int = 8 << 20


def serve_app(
    engine: Engine,
    model: Model,
    context: int | Callable[[], int],
    options: Options = Options(),
    log: Log = ignore,
    *,
    status: GetStatus | None = None,
) -> ServerApp:
    """The API of a model on an engine, which stays open. `context`: the context length, or a function that
    gives that of the plan in force (0: there is none yet). `status` tells of the devices of the engine; None:
    it has none. Errors as for Served."""
    house, limiter = House(status), RequestLimiter(options.slots, options.queue)
    now = context if callable(context) else lambda: context
    served = Served(engine, model, now, options.names, limiter, house.obstacle)
    return ServerApp(served, options, log, house)


class ServerApp:
    """See serve_app."""

    def __init__(self, served: Served, options: Options, log: Log, house: House) -> None:
        self.served, self._options, self._log = served, options, log
        self._routes = routes(served, house)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, send)
        call: Call | None = None
        error: Exception | None = None
        begun = time.perf_counter()
        try:
            try:
                exchange.headers = self._cors(exchange)
                if exchange.method == "OPTIONS" and exchange.headers:
                    await exchange.reply(204, b"", "text/plain")
                    return
                client, trusted = self._admit(exchange)
                handler = self._handler(exchange)
                call = Call(client, await self._body(exchange, receive), scope["shoal.ending"], trusted)
                await _until_gone(receive, exchange, handler(call))
            except (trio.Cancelled, OSError) as gone:
                if not isinstance(gone, TimeoutError):
                    raise
                error = gone
            except Exception as failure:
                error = failure
            if error is not None:
                await exchange.fail(api_error(error))
        except OSError:  # the client has gone
            exchange.status = exchange.status or 499
        finally:
            seconds = time.perf_counter() - begun
            self.served.metrics.request(self._path(exchange), exchange.status or 499, seconds)
            self._say(exchange, call, error, seconds)
            del error  # its traceback refers to this frame

    def _path(self, exchange: _Exchange) -> str:
        known = any(path == exchange.path for _, path in self._routes)
        return exchange.path if known else "other"

    def _say(self, exchange: _Exchange, call: Call | None, error: Exception | None, seconds: float) -> None:
        tokens = ""
        if call is not None and call.tokens:
            tokens = f", {sum(p for p, _ in call.tokens)}+{sum(a for _, a in call.tokens)} tokens"
        who = exchange.address if call is None else call.client
        path = printable(exchange.path, 80)
        ended = "" if exchange.complete else ", ended early"
        self._log(f"{who} {exchange.method} {path} {exchange.status or 499}, {seconds:.2f} s{tokens}{ended}")
        if error is not None and api_error(error).status == 500:  # without its words: they may quote a prompt
            where = "".join(traceback.format_tb(error.__traceback__))
            self._log(f"{type(error).__name__} at\n{where}")

    # --- who is let in

    def _cors(self, exchange: _Exchange) -> list[tuple[str, str]]:
        """Headers for a page of another origin. ApiError: that origin is not allowed, and the request has no
        effect. Without Origin the request is not from a browser, or a GET whose response the page cannot
        read; `_admit` checks Host."""
        origin = exchange.header("origin")
        if origin is None or origin in (
            f"http://{exchange.header('host')}",
            f"https://{exchange.header('host')}",
        ):
            return []
        if origin not in self._options.origins and "*" not in self._options.origins:
            raise ApiError(403, "pages of this origin may not ask: see --allow-origin", code="origin")
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
            ("Access-Control-Allow-Headers", exchange.header("access-control-request-headers") or "*"),
            ("Access-Control-Expose-Headers", "retry-after"),
            ("Access-Control-Max-Age", "600"),
            ("Vary", "Origin"),
        ]

    def _admit(self, exchange: _Exchange) -> tuple[str, bool]:
        """Whose request it is, and whether it may know of the devices. ApiError: it is not let in."""
        hosts = self._options.hosts
        if hosts is not None and (exchange.header("host") or "") not in hosts:
            raise ApiError(421, "the Host header names another server: see --allow-host", code="host")
        if not self._options.keys or exchange.path in (PAGE, "/health"):
            return exchange.address, not self._options.keys
        scheme, _, key = (exchange.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(
                401,
                "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=(("WWW-Authenticate", "Bearer"),),
            )
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        for known, name in self._options.keys.items():
            if hmac.compare_digest(known, digest):
                return name, True
        raise ApiError(401, "this API key is not known", code="invalid_api_key")

    def _handler(self, exchange: _Exchange) -> Handler:
        method = "GET" if exchange.method == "HEAD" else exchange.method
        handler = self._routes.get((method, exchange.path))
        if handler is not None:
            return handler
        others = [known for known, path in self._routes if path == exchange.path]
        if others:
            allow = (("Allow", ", ".join(others)),)
            raise ApiError(405, f"{exchange.path} takes {' and '.join(others)}", headers=allow)
        if exchange.path.startswith("/v1/models/"):
            raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
        raise ApiError(404, "there is nothing at this path", code="not_found")

    async def _body(self, exchange: _Exchange, receive: Receive) -> Fields:
        """The body of a request. ApiError: it is too large, or no JSON."""
        most = self._options.body_bytes
        length = exchange.header("content-length")
        if length is not None and int(length) > most:
            raise ApiError(413, f"the body is larger than {most} bytes", code="too_large")
        data = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise OSError("the client has gone")
            data += message.get("body", b"")
            if len(data) > most:
                raise ApiError(413, f"the body is larger than {most} bytes", code="too_large")
            if not message.get("more_body", False):
                break
        if exchange.method != "POST":
            return Fields({})
        kind = (exchange.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be JSON: set Content-Type: application/json")
        if exchange.header("content-encoding") not in (None, "identity"):
            raise ApiError(415, "the body must not be compressed")
        if len(data) < 1 << 16:
            return parse(bytes(data))
        return await trio.to_thread.run_sync(parse, bytes(data))


class _Exchange:
    """A request's head, and its response."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send: Send = send
        self._offer: Callable[[bytes], bool] = scope["shoal.offer"]
        self.method, self.path = scope["method"], scope["path"]
        self.address = (scope.get("client") or ("?",))[0]
        self._given: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self.headers: list[tuple[str, str]] = []
        self.status: int | None = None
        """What was sent; None: nothing yet."""
        self.complete = False

    def header(self, name: str) -> str | None:
        """The value of a header."""
        found = [value for given, value in self._given if given == name.encode()]
        return found[0].decode("latin-1") if found else None

    async def reply(self, status: int, body: bytes, kind: str, more: Sequence[tuple[str, str]] = ()) -> None:
        """Sends a whole response."""
        length = () if status in (204, 304) else (("Content-Length", str(len(body))),)
        await self._start(status, kind, (*more, *length))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.complete = True

    async def fail(self, error: ApiError) -> None:
        """Sends an error: as the response, or as the last event of a stream that has begun."""
        body = json.dumps(error.body()).encode()
        if self.status is None:
            await self.reply(error.status, body, "application/json", error.headers)
        elif not self.complete:
            await self._body(_event(Event(None, body)), last=True)

    async def answer(self, parts: AsyncGenerator[Part, None]) -> None:
        """Sends what a handler yields."""
        async with aclosing(parts) as made:
            async for part in made:
                if isinstance(part, Reply):
                    if self._has(part):
                        await self.reply(304, b"", part.content_type, part.headers)
                        return
                    value = part.value
                    data = value if isinstance(value, bytes) else json.dumps(value).encode()
                    await self.reply(part.status, data, part.content_type, part.headers)
                    return
                if self.status is None:
                    await self._start(200, "text/event-stream", (("Cache-Control", "no-store"),))
                    if self.method == "HEAD":
                        break
                if isinstance(part, Flow):
                    await self._flow(part)
                else:
                    await self._body(_event(part))
            await self._body(_DONE, last=True)

    async def _flow(self, flow: Flow) -> None:
        """Sends the parts of a stream as they come: in the turn of the loop in which they do, unless the
        client takes no more at the moment."""
        full = False

        def is_full() -> bool:
            return full

        def offer(piece: Piece) -> None:
            nonlocal full
            if parts := b"".join(map(_event, flow.parts(piece))):
                full = not self._offer(parts)

        while not await flow.each(offer, is_full):
            await self._body(b"")
            full = False

    def _has(self, reply: Reply) -> bool:
        """Whether the client has this reply already, by its ETag."""
        known = [one.strip().removeprefix("W/") for one in (self.header("if-none-match") or "").split(",")]
        return any(name == "ETag" and value in known for name, value in reply.headers)

    async def _body(self, data: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self.complete = last

    async def _start(self, status: int, kind: str, more: Sequence[tuple[str, str]]) -> None:
        headers = [("Content-Type", kind), *self.headers, *more, ("X-Content-Type-Options", "nosniff")]
        self.status = status
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        }
        await self._send(message)


def _event(part: Chunk | Event) -> bytes:
    """A part of a stream as a server-sent event."""
    if isinstance(part, Event):
        named, data = part.name, part.data
    else:  # those of a response have names
        named, data = part.get("type"), json.dumps(part).encode()
    return b"data: %b\n\n" % data if named is None else b"event: %b\ndata: %b\n\n" % (named.encode(), data)


_DONE = _event(Event(None, b"[DONE]"))


async def _until_gone(receive: Receive, exchange: _Exchange, parts: AsyncGenerator[Part, None]) -> None:
    """Sends the parts of a response. If the client goes first, all ends: OSError."""
    gone = False
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            await exchange.answer(parts)
        except Exception as error:  # outside, without an exception group around it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame
    if gone and not exchange.complete:
        raise OSError("the client has gone")
