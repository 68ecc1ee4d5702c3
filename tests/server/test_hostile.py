"""Two hundred hostile requests over real sockets: each is told by a 4xx, or left before, and nothing else
happens. Those of test_http.py are among them."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from shoal.server.app import Options
from shoal.server.http import Limits
from shoal.server.opening import LOCAL_HOSTS

from .conftest import SECONDS, Serving, serving, until
from .test_http import BODIES, ENDLESS, HEAD, HELLO, HOSTILE, SMUGGLED, exchange, status

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LAST = b"Connection: close\r\n"
LARGE = b"X: " + b"a" * 4096 + b"\r\n\r\n"
"""The end of a head that is larger than `strict` takes."""


def sent(path: str, body: bytes, *headers: str) -> bytes:
    """A request with a body as it is."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def asked(path: str, **fields: Any) -> bytes:
    return sent(path, json.dumps(fields).encode())


def schema(one: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": one}}
    return asked(CHAT, messages=HELLO, max_tokens=4, response_format=form)


def tool(**function: Any) -> bytes:
    tools = [{"type": "function", "function": {"name": "a", **function}}]
    return asked(CHAT, messages=HELLO, tools=tools, tool_choice="required", max_tokens=4)


SMUGGLING = [
    CHUNKED.replace(b"chunked", value) + b"0\r\n\r\n" + SMUGGLED
    for value in (
        b"chunked, chunked", b"identity", b"chunked, identity", b"x", b"\x0bchunked", b"chunked\x00",
        b"gzip, chunked", b"CHUNKED;q=1", b" ", b"chunked,",
    )
] + [
    HEAD + b"Content-Length: " + value + b"\r\n\r\n{}" + SMUGGLED
    for value in (b"+2", b"0x2", b"2 2", b"2,3", b"", b"two", b"2\x00", b"1e0", b"-0", b"9" * 400, b"\xb2")
] + [
    HEAD + two + b"\r\n{}" + SMUGGLED
    for two in (
        b"Content-Length: 2\r\nContent-Length: 0\r\n", b"Content-Length: 2\r\nContent-Length: 02\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", b"Content-Length : 2\r\n",
        b"Content-Length\r\n", b"Content-Length: 2\r\n folded\x00\r\n", b"Content_Length\x7f: 2\r\n",
    )
] + [
    CHUNKED + chunk + SMUGGLED
    for chunk in (
        b"-2\r\n{}\r\n0\r\n\r\n", b"+2\r\n{}\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"g\r\n",
        b"\r\n\r\n",
        b"2;" + b"a" * 5000 + b"\r\n{}", b"F" * 30 + b"\r\n{}", b"2\r\n{}X0\r\n\r\n",
        b" 2\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}\r\n0\r\nX : y\r\n\r\n", b"2\r\n{}\r\n0\r\n" + b"T: " + b"a" * 5000,
    )
]  # fmt: skip
HEADS = [
    line + b"\r\nHost: localhost\r\n" + LAST + b"\r\n"
    for line in (
        b"GET  /health HTTP/1.1", b"GET /health", b"GET /health HTTP/9.9", b"GET /health HTTP/1.1 x",
        b"GET /he\x00alth HTTP/1.1", b"GET /he\xffalth HTTP/1.1", b" GET /health HTTP/1.1",
        b"G\x01T /health HTTP/1.1", b"PRI * HTTP/2.0", b"CONNECT evil.example:443 HTTP/1.1",
        b"OPTIONS * HTTP/1.1", b"TRACE / HTTP/1.1", b"DELETE /v1/models HTTP/1.1", b"PUT /v1/chat HTTP/1.1",
        b"GET /v1/models/%2e%2e%2f HTTP/1.1", b"GET /v1/models/../../etc/passwd HTTP/1.1",
        b"GET /%00 HTTP/1.1", b"GET //evil.example/ HTTP/1.1", b"GET /metrics/x HTTP/1.1",
        b"GET /health/ HTTP/1.1", b"GET /HEALTH HTTP/1.1", b"get /health HTTP/1.1",
        b"GET /health?" + b"a" * 5000 + b" HTTP/1.1",
    )
] + [
    b"GET /health HTTP/1.1\r\n" + lines + LAST + b"\r\n"
    for lines in (
        b"Host: localhost\r\nHost: localhost\r\n", b"Host: \r\n", b"Host: localhost:80:80\r\n",
        b"Host: user@localhost\r\n",
        b"Host: ::1\r\n", b"Host: localhost:80a\r\n", b"Host: [localhost]\r\n",
        b"Host: localhost.evil.example\r\n", b"Host: 127.0.0.1.nip.io\r\n",
        b"Host: localhost\r\nno colon\r\n", b"Host: localhost\r\n: empty\r\n",
        b"Host: localhost\r\nX: a\x00b\r\n", b"Host: localhost\r\nX y: z\r\n",
        b"Host: localhost\r\nOrigin: null\r\n", b"Host: localhost\r\nOrigin: https://localhost.evil\r\n",
        b"Host: localhost\r\nOrigin: http://localhost:1\r\n",
        b"Host: localhost\r\n" + b"X: y\r\n" * 3000,
    )
]  # fmt: skip
ENCODED = [
    sent(COMPLETE, '{"prompt": "a"}'.encode("utf-16")),
    sent(COMPLETE, '{"prompt": "a"}'.encode("utf-32")),
    sent(COMPLETE, b"\xef\xbb\xbf" + b'{"prompt": "a"}'),
    sent(COMPLETE, '{"prompt": "é"}'.encode("latin-1")),
    sent(COMPLETE, b'{"prompt": "\xc0\x80"}'),  # an overlong zero
    sent(COMPLETE, b'{"prompt": "\xed\xa0\x80"}'),  # a surrogate
    sent(COMPLETE, b'{"prompt": "\xf4\x90\x80\x80"}'),  # beyond Unicode
    sent(COMPLETE, b'{"prompt": "\\ud800\\u0041"}'),
    sent(COMPLETE, b'{"\\udc00": 1, "prompt": "a"}'),
    sent(COMPLETE, b"{'prompt': 'a'}"),
    sent(COMPLETE, b'{"prompt": "a",}'),
    sent(COMPLETE, b'{"prompt": "a"} {}'),
    sent(COMPLETE, b'{"prompt": "a\x01"}'),
    sent(COMPLETE, b'{"prompt": 0x10}'),
    sent(COMPLETE, b'{"prompt": "a", "seed": -Infinity}'),
    sent(COMPLETE, b"\x1f\x8b\x08\x00", "Content-Encoding: gzip"),
    sent(COMPLETE, b"{}", "Content-Encoding: br"),
    sent(COMPLETE, b"prompt=a", "Content-Type: application/x-www-form-urlencoded"),
    sent(COMPLETE, b'{"prompt": "a"}', "Content-Type: text/plain; charset=application/json"),
    sent(COMPLETE, b'{"prompt": "a"}', "Content-Type: "),
    *(sent(COMPLETE, body) for body in BODIES.values() if len(body) < 9000),
]
TWICE = [
    sent(COMPLETE, b'{"prompt": "a", "prompt": "a"}'),
    sent(COMPLETE, b'{"prompt": "a", "\\u0070rompt": "b"}'),
    sent(COMPLETE, b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}'),
    sent(CHAT, b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}'),
    sent(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "x": {"y": {"z": 1, "z": 2}}}'),
    sent(CHAT, b'{"messages": [], "messages": [{"role": "user", "content": "a"}]}'),
    sent(COMPLETE, b'{"prompt": "a", "stream_options": {"a": 1, "a": 1}}'),
]
SIZES = [
    sent(COMPLETE, b'{"prompt": "' + b"a" * 10_001 + b'"}'),
    asked(COMPLETE, prompt="sea " * 2000),  # more tokens than the context has
    asked(COMPLETE, prompt=[1] * 600),
    asked(COMPLETE, prompt=["a"] * 300),
    asked(COMPLETE, prompt="a", n=10**9),
    asked(COMPLETE, prompt=["a"] * 200, n=32),
    asked(COMPLETE, prompt="a", stop=["x"] * 1000),
    asked(COMPLETE, prompt="a", logprobs=10**6),
    asked(COMPLETE, prompt="a", max_tokens=10**30),
    asked(COMPLETE, prompt="a", max_tokens=-1),
    asked(COMPLETE, prompt="a", best_of=7),
    asked(COMPLETE, prompt=[10**9]),
    asked(COMPLETE, prompt=[-1]),
    asked(COMPLETE, prompt=[1.5]),
    asked(COMPLETE, prompt=""),
    asked(COMPLETE, prompt=[]),
    asked(COMPLETE, prompt=[[]]),
    asked(COMPLETE, prompt="a", logit_bias={str(i): 1 for i in range(900)}),
    asked(COMPLETE, prompt="a", logit_bias={"-1": 1}),
    asked(COMPLETE, prompt="a", logit_bias={"1": 1e9}),
    asked(COMPLETE, prompt="a", temperature=1e300),
    asked(COMPLETE, prompt="a", top_p=1.5),
    asked(COMPLETE, prompt="a", seed="now"),
    asked(COMPLETE, prompt="a", model="../../etc/passwd"),
    asked(COMPLETE, prompt="a", suffix="b"),
    asked(CHAT, messages=[HELLO[0]] * 900),
    asked(CHAT, messages="Hello"),
    asked(CHAT, messages=[{"role": "user"}]),
    asked(CHAT, messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
    asked(CHAT, messages=HELLO, top_logprobs=5),
    asked(CHAT, messages=HELLO, chat_template_kwargs={"__class__": 1, "messages": []}),
    asked("/v1/embeddings", input=[]),
    asked("/v1/embeddings", input="a", dimensions=3),
    asked("/v1/embeddings", input="a", encoding_format="pickle"),
    asked("/v1/embeddings", input=["a"] * 3000),
    asked("/v1/responses", input="a", previous_response_id="resp_1"),
    asked("/v1/responses", input=[{"type": "computer_call"}]),
    asked("/v1/responses", input=[{"role": "user", "content": 5}]),
    asked("/v1/responses"),
    asked("/detokenize", tokens=[10**9]),
    asked("/detokenize", tokens="1"),
    asked("/tokenize", content=5),
    asked("/tokenize"),
]
SCHEMAS = [
    *map(schema, (
        3, "string", [], None, True, {"type": "fish"}, {"type": ["string", "fish"]}, {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/nowhere"}, {"$ref": "https://evil.example/schema"}, {"$ref": "file:///etc/passwd"},
        {"$schema": "https://evil.example/schema"}, {"enum": []}, {"not": {"type": "string"}},
        {"type": "string", "pattern": "("}, {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": r"(a)\1"}, {"type": "string", "pattern": "(a{1000}){1000}"},
        {"type": "string", "pattern": "b((x{100}|[a-z]{2,90}){99}){9}"},
        {"type": "array", "items": [{"type": "string", "pattern": "a{10001}"}]},
        {"type": "object", "patternProperties": {"(a{999}){999}": {"type": "string"}}},
        {"type": "string", "minLength": 5, "maxLength": 1}, {"type": "string", "maxLength": -1},
        {"type": "string", "format": "fish"}, {"type": "array", "minItems": 5, "maxItems": 1},
        {"type": "array", "items": "a"}, {"type": "array", "uniqueItems": True},
        {"type": "integer", "minimum": 5, "maximum": 1}, {"type": "number", "multipleOf": 0},
        {"type": "integer", "multipleOf": 1_000_000_007},
        {"type": "integer", "minimum": 10**300}, {"type": "object", "properties": []},
        {"type": "object", "required": "a"}, {"if": {"type": "string"}, "then": {"minLength": 1}},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"oneOf": [{"type": "string", "pattern": f"{i}a*"} for i in range(100)]},
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(8)]},
    )),
    asked(CHAT, messages=HELLO, response_format="json"),
    asked(CHAT, messages=HELLO, response_format={"type": "xml"}),
    asked(CHAT, messages=HELLO, response_format={"type": "json_schema"}),
    asked(CHAT, messages=HELLO, response_format={"type": "json_schema", "json_schema": {"schema": 1}}),
]  # fmt: skip
TOOLS = [
    tool(parameters={"type": "fish"}),
    tool(parameters=[]),
    tool(parameters={"type": "object", "properties": {"a": {"type": "string", "pattern": "(a{999}){999}"}}}),
    tool(parameters={"type": "object", "properties": {"a": {"type": "number", "multipleOf": 99999.7}}}),
    tool(parameters={"$ref": "#/nowhere"}),
    tool(parameters={"$ref": "https://evil.example/schema"}),
    tool(name=""),
    tool(name=None),
    asked(CHAT, messages=HELLO, tools=[{}] * 3),
    asked(CHAT, messages=HELLO, tools=[{"type": "function"}]),
    asked(CHAT, messages=HELLO, tools={"type": "function"}),
    asked(CHAT, messages=HELLO, tool_choice="required"),
    asked(CHAT, messages=HELLO, tool_choice={"type": "function", "function": {"name": "b"}}),
]
TOLD = [*HOSTILE, *SMUGGLING, *HEADS, *ENCODED, *TWICE, *SIZES, *SCHEMAS, *TOOLS]


@pytest.fixture(scope="module")
def strict(tooled: Serving) -> Iterator[Serving]:
    limits = Limits(head=0.5, body=0.5, idle=0.5, grace=5.0, head_bytes=4096)
    with serving(tooled.llm, Options(body_bytes=10_000, hosts=LOCAL_HOSTS, queue=1000), limits) as made:
        yield made


def refused(reply: bytes) -> bool:
    """Whether this is one response, a 4xx with an error in JSON."""
    head, _, body = reply.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    if length is None or len(body) != int(length[1]) or not 400 <= status(reply) < 500:
        return False
    return "error" in json.loads(body)


@pytest.mark.parametrize(
    "line",
    [
        b"HEAD /health HTTP/1.5",
        b"HEAD /health HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked",
    ],
)
def test_a_head_request_is_refused_without_a_body(strict: Serving, line: bytes) -> None:
    reply = exchange(strict.port, line + b"\r\nHost: localhost\r\n" + LAST + b"\r\n")
    assert status(reply) == 400 and reply.endswith(b"\r\n\r\n")


def test_a_head_request_with_too_large_a_head_is_refused_without_a_body(strict: Serving) -> None:
    reply = exchange(strict.port, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n" + LARGE)
    assert status(reply) == 431 and reply.endswith(b"\r\n\r\n")


def test_a_refusal_after_a_head_request_has_its_body(strict: Serving) -> None:
    """Of another method, and of what is no request."""
    for second, code in ((b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + LARGE, 431), (b"x\r\n\r\n", 400)):
        reply = exchange(strict.port, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + second)
        first, _, refusal = reply.partition(b"\r\n\r\n")
        assert status(first) == 200 and status(refusal) == code and refused(refusal)


def test_each_is_told_what_is_wrong_with_it(strict: Serving) -> None:
    with ThreadPoolExecutor(16) as clients:
        replies = list(clients.map(lambda data: exchange(strict.port, data), TOLD))
    wrong = {data[:300]: reply for data, reply in zip(TOLD, replies, strict=True) if not refused(reply)}
    assert wrong == {}


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_closed(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


STREAM = asked(CHAT, **ENDLESS, stream=True)
LEAVING: list[tuple[bytes, Callable[[socket.socket], None] | None, bool]] = [
    (data, leave, waits)
    for data, waits in (
        (b"", False), (b"G", False), (HEAD, False), (HEAD + b"Content-Length: 50\r\n\r\n{", False),
        (CHUNKED + b"5\r\n{", False), (asked(CHAT, **ENDLESS), False), (STREAM, False), (STREAM, True),
        (HEAD + b"Content-Length: 50\r\nExpect: 100-continue\r\n\r\n", True),
    )
    for leave in (None, reset, half_closed)
]  # fmt: skip


def test_those_that_leave_end_their_work_and_no_other(strict: Serving) -> None:
    def come_and_leave(case: tuple[bytes, Callable[[socket.socket], None] | None, bool]) -> None:
        data, leave, waits = case
        with closing(socket.create_connection(("127.0.0.1", strict.port), SECONDS)) as connection:
            connection.settimeout(SECONDS)
            connection.sendall(data)
            if waits:
                assert connection.recv(100)
            if leave is not None:
                leave(connection)

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(come_and_leave, LEAVING))
    assert strict.made(COMPLETE, prompt="A", max_tokens=2)["choices"]  # they were accepted before this one
    until(lambda: not strict.app.served.limiter.queue.running and strict.server._open == 0)


def test_the_server_is_as_before(strict: Serving) -> None:
    """After all of them: no mistake of the server was logged, nothing is held, and it answers."""
    assert len(TOLD) + len(LEAVING) >= 200
    with strict.client as client:
        counted = client.get("/metrics").text
    assert strict.made(COMPLETE, prompt="A", max_tokens=2)["choices"]
    assert not [line for line in strict.log if "Traceback" in line or " at\n" in line]
    assert 'status="5' not in counted
    until(lambda: strict.app.served.limiter.queue.used == 0)
