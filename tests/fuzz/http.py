"""Targets of `shoal serve`: the bytes of a client, and the bodies of its requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch
from zlib import crc32

import trio

from shoal.server import app
from shoal.server.bodies import ChatBody, Fields, chat_body, completion_body, embedding_body, parse, token_ids
from shoal.server.errors import ApiError
from shoal.server.house import House
from shoal.server.http import Limits, _Connection
from shoal.server.metrics import Metrics
from shoal.server.opening import LOCAL_HOSTS
from shoal.server.responses import chat_fields
from shoal.server.served import Call, Handler, Reply

from .target import Target


def _passed_on(chat: ChatBody) -> None:
    """Checks that the template gets text and numbers only."""
    values = chat.messages, chat.tools, chat.variables
    json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8")


_SAMPLED = {
    "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 40, "seed": 7, "n": 2, "stop": ["\n"],
    "presence_penalty": 0.1, "frequency_penalty": -0.1, "repeat_penalty": 1.1, "logit_bias": {"3": -100},
    "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 9, "model": "tiny",
}  # fmt: skip
_FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
BODIES: dict[str, tuple[Callable[[Fields], object], dict[str, Any]]] = {
    "/v1/chat/completions": (
        lambda fields: _passed_on(chat_body(fields)),
        {
            **_SAMPLED, "logprobs": True, "top_logprobs": 3, "response_format": _SCHEMA,
            "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "auto",
            "chat_template_kwargs": {"enable_thinking": False},
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "blue"},
            ],
        },
    ),
    "/v1/completions": (
        completion_body,
        {**_SAMPLED, "prompt": ["Once", [1, 2, 3]], "echo": True, "logprobs": 2, "best_of": 2},
    ),
    "/v1/responses": (
        lambda fields: _passed_on(chat_body(Fields(chat_fields(fields)))),
        {
            "model": "tiny", "instructions": "Be brief.", "max_output_tokens": 9,
            "tool_choice": {"name": "look"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
            "tools": [{"type": "function", **_FUNCTION}],
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
                {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "blue"},
            ],
        },
    ),
    "/v1/embeddings": (embedding_body, {"input": ["a", [1, 2]], "encoding_format": "base64"}),
    "/detokenize": (lambda fields: token_ids(fields, "tokens", fields.get("tokens")), {"tokens": [1, 2]}),
}  # fmt: skip


_OPTIONS = app.Options(
    keys={hashlib.sha256(b"sk-x").digest(): "laptop"},
    origins=("https://app.example",),
    hosts=LOCAL_HOSTS,
    body_bytes=4096,
)


class RefusedError(Exception):
    """No request of a client was answered with success."""


def http_targets() -> dict[str, Target]:
    """All of them, by name."""
    return {
        "bodies of shoal serve": Target(_body, _bodies(), (ApiError,)),
        "HTTP of shoal serve": Target(_Server().hear, _requests(), (RefusedError,), slow=8, waits=True),
    }


def _body(data: bytes) -> None:
    """The body of one request, as each path reads it: one of them must."""
    fields, refused = parse(data), list[ApiError]()
    for read, _ in BODIES.values():
        try:
            read(fields)
        except ApiError as error:
            refused.append(error)
    if len(refused) == len(BODIES):
        raise refused[0]


def _bodies() -> tuple[bytes, ...]:
    return tuple(json.dumps(example).encode() for _, example in BODIES.values())


class _Server:
    """The server with handlers that read bodies, and answer nothing of weight."""

    def __init__(self) -> None:
        self._log: list[str] = []
        served = SimpleNamespace(metrics=Metrics(lambda: 0, lambda: 0), names=())
        with patch.object(app, "routes", _routes):
            self._app = app.ServerApp(cast("Any", served), _OPTIONS, self._log.append, House(None))

    async def hear(self, data: bytes) -> None:
        """What a client sends, until it ends or is silent. AssertionError: the server has made a mistake."""
        client = _Client(data)
        served = _Connection(
            self._app,
            cast("Any", client),
            "127.0.0.1",
            secure=False,
            limits=Limits(),
            draining=trio.Event(),
        )
        self._log.clear()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError):
            await served.run()  # as Server._connection does
        mistakes = [line for line in self._log if " at\n" in line]
        assert not mistakes, mistakes[0]
        assert b"HTTP/1.1 5" not in client.heard
        if b"HTTP/1.1 200" not in client.heard:
            raise RefusedError


class _Client:
    """A client's stream. It ends after its last byte, or is silent."""

    def __init__(self, data: bytes) -> None:
        check = crc32(data)
        self._data, self._step, self._ends = data, 1 + check % 8192, check % 5 > 0
        self.heard = bytearray()

    async def receive_some(self, most: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._data and not self._ends:
            await trio.sleep_forever()
        some, self._data = self._data[: self._step], self._data[self._step :]
        return some

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.heard += data


def _routes(served: object, house: object) -> dict[tuple[str, str], Handler]:
    def reading(read: Callable[[Fields], object]) -> Handler:
        async def handler(call: Call) -> AsyncGenerator[dict[str, Any] | Reply, None]:
            read(call.body)
            if call.body.flag("stream"):
                yield {"object": "chunk"}
            else:
                yield Reply({"object": "whole"})

        return handler

    paths = {("POST", path): reading(read) for path, (read, _) in BODIES.items()}
    return {**paths, ("GET", "/health"): reading(lambda fields: None)}


def _requests() -> tuple[bytes, ...]:
    page = b"Host: localhost\r\nOrigin: https://app.example\r\n\r\n"
    found = [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2,
        b"OPTIONS /v1/completions HTTP/1.1\r\n" + page + b"HEAD /health HTTP/1.1\r\n" + page,
    ]
    for path, (_, example) in BODIES.items():
        body = json.dumps(example).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost:8080\r\nContent-Type: application/json\r\n"
        head += "Authorization: Bearer sk-x\r\nOrigin: http://localhost:8080\r\n"
        sized, chunked = (f"{head}{more}\r\n\r\n".encode() for more in _framings(body))
        found += [sized + body, chunked + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (body, b""))]
    return tuple(found)


def _framings(body: bytes) -> tuple[str, str]:
    return f"Content-Length: {len(body)}\r\nExpect: 100-continue", "Transfer-Encoding: chunked"
