"""Clients that break the rules, hurry, dawdle, or leave: real sockets, one server with short limits."""

from __future__ import annotations

import gc
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import partial
from hashlib import sha256
from itertools import product
from typing import Any

import pytest

import shoal
from shoal.answer_text import AnswerText, Item
from shoal.answering import LocalEngine
from shoal.engine.request_scheduler import Job
from shoal.server.app import Options
from shoal.server.bodies import ApiError, chat_body, completion_body, embedding_body, parse
from shoal.server.http import Limits, _Connection
from shoal.server.opening import LOCAL_HOSTS

from .conftest import SECONDS, Serving, serving, until

HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS: dict[str, Any] = {"messages": HELLO, "max_tokens": None, "logit_bias": {"3": -100, "2": -100}}
"""An answer that only the context ends."""


@pytest.fixture(scope="module")
def strict(llm: shoal.LLM) -> Iterator[Serving]:
    limits = Limits(head=0.5, body=0.5, idle=0.5, grace=5.0, head_bytes=4096)
    with serving(llm, Options(body_bytes=10_000, hosts=LOCAL_HOSTS), limits) as made:
        yield made


def exchange(port: int, data: bytes) -> bytes:
    """What comes back until the server closes."""
    with closing(socket.create_connection(("127.0.0.1", port), SECONDS)) as connection:
        connection.settimeout(SECONDS)
        connection.sendall(data)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SMUGGLED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOSTILE = {
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n": 400,
    b"GET /health\r\n\r\n": 400,
    b"GET /health HTTP/3.0\r\nHost: localhost\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\n\r\n": 400,  # no Host
    b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n folded: 1\r\nX\x00: 1\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n": 421,
    b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n": 421,
    b"GET http:///health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n": 421,
    b"GET /health HTTP/1.0\r\n\r\n": 421,  # no Host, as HTTP/1.0 may
    b"GET /../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n": 404,
    b"GET /" + b"a" * 5000: 431,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"a" * 5000: 431,
    b"BREW /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n": 405,
    b"POST /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n": 405,
    HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED: 400,
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello" + SMUGGLED: 400,
    HEAD + b"Content-Length: -5\r\n\r\n" + SMUGGLED: 400,
    HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + SMUGGLED: 400,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nfish\r\n" + SMUGGLED: 400,
    HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{": 413,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n2AF8\r\n" + b" " * 11_000 + b"\r\n0\r\n\r\n": 413,
    HEAD + b"Content-Length: 100\r\n\r\n{": 408,  # and no more
    HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n": 400,
    HEAD + b"Content-Length: 2\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n{}": 415,
    HEAD.replace(b"application/json", b"text/plain")
    + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}": 415,
    HEAD + b"Origin: https://evil.example\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}": 403,
    b"GET /hea": 408,  # and no more
}


@pytest.mark.parametrize("request_", HOSTILE, ids=lambda data: repr(data[:60]))
def test_a_hostile_request_gets_its_status_and_no_other_answer(strict: Serving, request_: bytes) -> None:
    reply = exchange(strict.port, request_)
    assert status(reply) == HOSTILE[request_]
    assert reply.count(b"HTTP/1.1 ") == 1
    assert "error" in json.loads(reply.partition(b"\r\n\r\n")[2])


def test_a_target_may_name_the_server(strict: Serving) -> None:
    """Then the Host header does not count, by RFC 9112."""
    asked = b"GET HTTP://LocalHost:80/v1/models?x HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert exchange(strict.port, asked).startswith(b"HTTP/1.1 200 ")


def test_a_name_may_be_quoted_and_a_response_has_its_date(llm: shoal.LLM) -> None:
    with serving(llm, Options(names=("org/my modél",))) as made, made.client as client:
        for path in ("org%2Fmy%20mod%C3%A9l", "org/my%20mod%c3%a9l"):
            reply = client.get(f"/v1/models/{path}")
            assert (reply.status_code, reply.json().get("id")) == (200, "org/my modél")
        assert abs(parsedate_to_datetime(reply.headers["date"]).timestamp() - time.time()) < SECONDS
        assert client.get("/v1/models/%ff%00").status_code == 404


def test_a_silent_connection_is_closed_without_a_word(strict: Serving) -> None:
    assert exchange(strict.port, b"") == b""
    assert exchange(strict.port, SMUGGLED).startswith(b"HTTP/1.1 200 ")  # closed when it has been idle


def test_requests_that_arrive_together_are_answered_in_turn(strict: Serving) -> None:
    body = json.dumps({"prompt": "A", "max_tokens": 2, "temperature": 0}).encode()
    one = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    reply = exchange(strict.port, one + SMUGGLED + SMUGGLED)
    assert reply.count(b"HTTP/1.1 200 ") == 3


def test_a_client_that_leaves_ends_its_answer(strict: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = strict.llm._engine
    assert isinstance(engine, LocalEngine)
    run, calls, gate = engine.stage.run, list[int](), threading.Event()

    def held(runs: Any) -> Any:
        calls.append(len(calls))
        assert len(calls) <= 5 or gate.wait(SECONDS)
        return run(runs)

    monkeypatch.setattr(engine.stage, "run", held)
    for stream in (True, False):
        calls.clear()
        gate.clear()
        strict.log.clear()
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        request = HEAD.replace(b"completions", b"chat/completions")
        with closing(socket.create_connection(("127.0.0.1", strict.port), SECONDS)) as connection:
            connection.sendall(request + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            until(lambda: len(calls) == 6)
        until(lambda: [line for line in strict.log if line.endswith(", ended early")])
        assert not strict.app.served.limiter.queue.running
        gate.set()
        until(lambda: not engine._batcher._scheduler.running)
        assert len(calls) <= 7
    monkeypatch.undo()


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_what_a_request_held_is_freed_when_it_ends(
    strict: Serving, without_collections: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python looks for cycles rarely in a process of many objects: sockets and texts would pile up."""

    def held() -> list[object]:
        return [one for one in gc.get_objects() if isinstance(one, _Connection | Job | ApiError)]

    until(lambda: not held())
    chat = {"messages": HELLO, "max_tokens": 4}
    for body in (
        chat,
        {**chat, "stream": True, "n": 2},
        {**chat, "messages": []},
        {**chat, "model": "other"},
    ):
        strict.post("/v1/chat/completions", **body)
        until(lambda: not held())
    exchange(strict.port, b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    until(lambda: not held())
    monkeypatch.setattr(AnswerText, "take", failing)
    assert strict.post("/v1/chat/completions", **chat).status_code == 500
    until(lambda: not held())
    monkeypatch.undo()
    leaving(strict, {**ENDLESS, "stream": True})
    until(lambda: not held())


def failing(answer: AnswerText, item: Item) -> str:
    raise RuntimeError


def leaving(made: Serving, asked: Any) -> None:
    """A client that goes after the first bytes of its response."""
    body = json.dumps(asked).encode()
    with closing(socket.create_connection(("127.0.0.1", made.port), SECONDS)) as connection:
        connection.sendall(
            HEAD.replace(b"completions", b"chat/completions")
            + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert connection.recv(1 << 10)


def test_a_client_that_breaks_an_idle_connection_is_no_mistake_of_the_server(llm: shoal.LLM) -> None:
    with serving(llm) as made:
        for said in (b"", SMUGGLED):
            with closing(socket.create_connection(("127.0.0.1", made.port), SECONDS)) as connection:
                connection.sendall(said)
                assert not said or connection.recv(1 << 16)
                until(lambda: made.server._open == 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            until(lambda: not made.server._open)
        assert len(made.log) == 1 and "GET /health 200" in made.log[0]


def test_a_connection_too_many_is_closed_although_it_says_nothing(llm: shoal.LLM) -> None:
    with serving(llm, limits=Limits(connections=1, head=SECONDS * 2)) as made:
        with closing(socket.create_connection(("127.0.0.1", made.port), SECONDS)):
            until(lambda: made.server._open == 1)
            reply = exchange(made.port, b"")
            assert status(reply) == 503 and b"\r\nRetry-After: 5\r\n" in reply
        until(lambda: not made.server._open)


def test_too_many_requests_are_told_when_to_come_again(llm: shoal.LLM) -> None:
    with serving(llm, Options(slots=1, queue=2)) as busy:
        queue, held = busy.app.served.limiter.queue, list[Any]()
        for _ in range(2):  # one that is answered, one that waits
            busy.tell(lambda: held.append(queue.join("other", 1)))
        with ThreadPoolExecutor(1) as threads:
            waits = threads.submit(busy.post, "/v1/completions", prompt="A", max_tokens=1)
            until(lambda: len(queue.waiting) == 2)
            reply = busy.post("/v1/completions", prompt="A", max_tokens=1)
            assert reply.status_code == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "rate_limit_error"
            for ticket in held:
                busy.tell(partial(queue.leave, ticket))
            assert waits.result(SECONDS).status_code == 200
        until(lambda: not queue.running)


def test_a_text_becomes_tokens_when_it_is_its_clients_turn(llm: shoal.LLM) -> None:
    """Who sends many long texts has its share of that work, too."""
    with serving(llm, Options(slots=1)) as busy, ThreadPoolExecutor(3) as threads:
        served, held = busy.app.served, list[Any]()
        queue, encoded, encode = served.limiter.queue, list[str](), served.tokenizer.encode
        served.tokenizer.encode = lambda text, **how: encoded.append(text) or encode(text, **how)
        busy.tell(lambda: held.append(queue.join("other", 1)))
        bodies = {
            "/v1/completions": {"prompt": "A", "max_tokens": 1},
            "/v1/chat/completions": {"messages": HELLO, "max_tokens": 1},
            "/v1/embeddings": {"input": "A"},
        }
        waiting = [threads.submit(partial(busy.post, path, **body)) for path, body in bodies.items()]
        until(lambda: len(queue.waiting) == 3)
        assert encoded == []
        assert busy.post("/tokenize", content="now").json()["count"] == len(llm.tokenize("now"))
        assert encoded == ["now"]
        busy.tell(lambda: queue.leave(held[0]))
        assert [reply.result(SECONDS).status_code for reply in waiting] == [200] * 3


def test_keys_and_origins(llm: shoal.LLM) -> None:
    keys = {sha256(b"sesame-sesame-sesame").digest(): "ali"}
    with (
        serving(llm, Options(keys=keys, origins=("https://chat.example",))) as guarded,
        guarded.client as client,
    ):
        assert client.get("/health").status_code == 200
        for wrong in (
            {},
            {"Authorization": "Bearer sesame"},
            {"Authorization": "Basic sesame-sesame-sesame"},
        ):
            reply = client.get("/v1/models", headers=wrong)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        page = {"Origin": "https://chat.example", "Authorization": "Bearer sesame-sesame-sesame"}
        reply = client.get("/v1/models", headers=page)
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        until(lambda: guarded.log[-1].startswith("ali GET /v1/models 200, "))
        wanted = "authorization,content-type,x-stainless-os"  # as OpenAI's library for browsers sends
        asked = {"Origin": "https://chat.example", "Access-Control-Request-Headers": wanted}
        reply = client.options("/v1/chat/completions", headers=asked)
        assert (reply.status_code, reply.headers["access-control-allow-headers"]) == (204, wanted)
        assert client.get("/v1/models", headers={**page, "Origin": "https://evil.example"}).status_code == 403


def test_a_server_that_ends_finishes_what_it_answers(llm: shoal.LLM) -> None:
    with serving(llm) as ending, ending.client as client:
        body = {**ENDLESS, "max_tokens": 250, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            ending.tell(ending.server.drain)
            until(lambda: ending.server.draining)
            assert reply.read().endswith(b"data: [DONE]\n\n")


BODIES: dict[str, Any] = {
    "not JSON": b"{",
    "not an object": b"[1]",
    "not UTF-8": b'{"prompt": "\xff"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a name twice": b'{"prompt": "a", "prompt": "b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "a number without end": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nested": b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}",
}
BASE: dict[str, Any] = {"messages": HELLO, "prompt": "a", "input": "a"}
VALUES: list[Any] = [
    True,
    -1,
    1.5,
    10**30,
    "",
    "x" * 2000,
    [],
    [None],
    [[]],
    {},
    {"a": 1},
    [-1],
    ["", 1],
    [1 << 40],
]
FIELDS = [
    "messages", "prompt", "input", "model", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop",
    "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "logit_bias", "stream",
    "stream_options", "response_format", "tools", "tool_choice", "echo", "best_of", "encoding_format",
    "presence_penalty", "frequency_penalty", "chat_template_kwargs", "dimensions", "suffix",
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        completion_body(parse(body))
    assert refused.value.status == 400


def test_any_value_in_any_field_is_taken_or_refused_by_name() -> None:
    refused = dict.fromkeys(FIELDS, 0)
    for name, value, read in product(FIELDS, VALUES, (chat_body, completion_body, embedding_body)):
        fields = parse(json.dumps({**BASE, name: value}).encode())
        try:
            read(fields)
        except ApiError as error:
            told = (error.status, (error.param or name).startswith(name))
            if told != (400, True):
                raise
            refused[name] += 1
    assert min(refused.values()) >= 3  # of every field, values are refused


def test_values_out_of_range_are_refused_over_the_wire(strict: Serving) -> None:
    for body in (
        {"messages": [{"role": "wizard", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": HELLO, "logit_bias": {"100000": 1}},
        {"messages": HELLO, "n": 1000},
        {"messages": []},
        {"messages": HELLO, "chat_template_kwargs": {"self": 1}},
    ):
        reply = strict.post("/v1/chat/completions", **body)
        assert reply.status_code == 400, body
        assert reply.json()["error"]["type"] == "invalid_request_error"
