"""The devices over HTTP: what `shoal top` shows, once and as it changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, cast

import httpx
import pytest
from tests.local.test_status import STATUS

import shoal
from shoal.answer_text import Item
from shoal.engine import strict
from shoal.engine.errors import ContextError, OperatingSystemError
from shoal.net.errors import NodeLostError
from shoal.server import house, served
from shoal.server.app import Options
from shoal.server.opening import LOCAL_HOSTS
from shoal.status import Status

from .conftest import SECONDS, Serving, serving, until

KEY = "sesame-sesame-sesame"


class Head:
    """Tells a status, which a test changes."""

    def __init__(self) -> None:
        self.status, self.asked = STATUS, 0
        self.lost = False
        self.free = threading.Event()
        self.free.set()

    def __call__(self) -> Status:
        self.asked += 1
        self.free.wait(SECONDS)
        if self.lost:
            raise NodeLostError("the head has ended")
        return self.status


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
def watched(llm: shoal.LLM, head: Head) -> Iterator[Serving]:
    with serving(llm, status=head) as made:
        yield made


def events(reply: httpx.Response) -> Iterator[tuple[str, str]]:
    """Names and data of a stream."""
    name = ""
    for line in reply.iter_lines():
        kind, _, value = line.partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            yield name, value
            name = ""


def test_the_status_is_that_of_the_head(watched: Serving, head: Head) -> None:
    with watched.client as client:
        reply = client.get("/house")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
        assert strict.decode(Status, reply.content) == head.status
        head.lost = True
        until(lambda: client.get("/house").status_code == 503)
        reply = client.get("/house")
    assert reply.headers["retry-after"] == "5"
    assert reply.json()["error"]["message"] == "the head has ended"


def test_a_server_of_one_process_has_no_house(llm: shoal.LLM) -> None:
    with serving(llm) as made, made.client as client:
        for path in ("/house", "/house/events"):
            reply = client.get(path)
            assert reply.status_code == 404
            assert "computes in one process" in reply.json()["error"]["message"]


def test_a_stream_tells_each_change_and_ends_with_the_server(watched: Serving, head: Head) -> None:
    with watched.client as client, client.stream("GET", "/house/events") as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        told = events(reply)
        for tokens in (STATUS.tokens, 5, 6):
            head.status = replace(head.status, tokens=tokens)
            name, data = next(told)
            assert (name, strict.decode(Status, data.encode())) == ("status", head.status)
        head.lost = True
        name, data = next(told)
        assert (name, json.loads(data)["error"]["code"]) == ("error", "unavailable")
        head.lost = False
        assert next(told)[0] == "status"
        watched.tell(watched.server.drain)
        assert list(told) == [("", "[DONE]")]


def test_without_a_change_there_is_a_pulse(watched: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "PULSE_SECONDS", 0.3)
    with watched.client as client, client.stream("GET", "/house/events") as reply:
        told = events(reply)
        assert len({next(told) for _ in range(3)}) == 1
        assert client.head("/house/events").status_code == 200  # and it ends


def test_those_who_watch_at_the_same_time_ask_the_devices_together(watched: Serving, head: Head) -> None:
    head.free.clear()
    found: list[str] = []

    def watch() -> None:
        with watched.client as client, client.stream("GET", "/house/events") as reply:
            found.append(next(events(reply))[0])

    threads = [threading.Thread(target=watch) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: watched.server._open == 8)
    head.free.set()
    for thread in threads:
        thread.join(SECONDS)
    assert found == ["status"] * 8
    assert head.asked < 8


def test_who_may_not_ask_does_not_see_the_house(llm: shoal.LLM, head: Head) -> None:
    options = Options(keys={sha256(KEY.encode()).digest(): "ali"}, hosts=LOCAL_HOSTS)
    with serving(llm, options, status=head) as made, made.client as client:
        head.status = replace(STATUS, phase="waiting", reason="the phone is lost")
        reply = client.get("/health")
        assert (reply.status_code, reply.json()["status"], reply.json()["reason"]) == (
            503,
            "waiting",
            "waiting",
        )
        for path in ("/house", "/house/events"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 421
            assert client.get(path, headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.get("/house", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_requests_wait_for_the_first_plan_and_are_told_if_there_is_none(
    llm: shoal.LLM, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "PATIENCE_SECONDS", 0.2)
    head.status = replace(STATUS, phase="waiting", reason="12 MB are missing", context=0)
    context, looks = 0, list[None]()

    def now() -> int:
        looks.append(None)
        return context

    asked: dict[str, Any] = {"prompt": "A", "max_tokens": 2, "temperature": 0}
    with serving(llm, status=head, context=now) as made, made.client as client:
        bodies = {"/v1/completions": asked, "/v1/embeddings": {"input": "A"}}
        for reply in (
            client.get("/health"),
            *(client.post(path, json=body) for path, body in bodies.items()),
        ):
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert reply.json()["error"]["message"] == "the devices are not ready: 12 MB are missing"
        assert client.get("/v1/models").json()["data"][0]["context_length"] is None
        monkeypatch.setattr(served, "PATIENCE_SECONDS", SECONDS)
        with ThreadPoolExecutor(1) as other:
            waits = other.submit(client.post, "/v1/completions", json=asked)
            seen = len(looks)
            until(lambda: len(looks) > seen + 3)  # it looks again and again
            assert not waits.done()
            context, head.status = llm.context, STATUS
            assert waits.result(SECONDS).status_code == 200
        until(lambda: client.get("/health").status_code == 200)
        assert client.get("/health").status_code == 200


class Away:
    """An engine over devices that go away after so many results, until they are `back`."""

    def __init__(self, llm: shoal.LLM, results: int) -> None:
        self._engine, self._left = llm._engine, iter(range(results))
        self.back = threading.Event()

    def _late(self, put: Any, item: Any) -> None:
        if next(self._left, None) is None:
            self.back.wait(SECONDS)
        put(item)

    def begin(self, prompt: Any, settings: Any, put: Any, report: Any = None) -> Any:
        return self._engine.begin(prompt, settings, partial(self._late, put), report)

    def read(self, request: Any, put: Any) -> Any:
        return self._engine.read(request, partial(self._late, put))


class Failing:
    """An engine whose answers have these items, one answer after another."""

    def __init__(self, *answers: list[Item]) -> None:
        self._answers = iter(answers)

    def begin(self, prompt: Any, settings: Any, put: Any, report: Any = None) -> Any:
        for item in next(self._answers):
            put(item)
        return lambda **how: None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/completions", {"prompt": "A boat"}),
    ],
)
def test_an_answer_that_fails_before_its_first_token_has_a_status_of_its_own(
    llm: shoal.LLM, path: str, body: dict[str, Any], stream: bool
) -> None:
    errors = OperatingSystemError("the disk is full"), ContextError("301 tokens")
    devices = Failing(*([error] for error in errors))
    with serving(shoal.LLM.over(llm.model, cast("Any", devices), llm.context)) as made:
        full, long = (made.post(path, **body, stream=stream) for _ in errors)
    assert (full.status_code, full.headers.get("retry-after")) == (503, "5")
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_of_several_answers_the_first_that_fails_counts_unless_it_has_begun(llm: shoal.LLM) -> None:
    lost = OperatingSystemError("the disk is full")
    devices = Failing([5, 6], [lost], [5, lost], [5, 6])
    chat = {"messages": [{"role": "user", "content": "Hello"}], "n": 2, "stream": True}
    with serving(shoal.LLM.over(llm.model, cast("Any", devices), llm.context)) as made:
        at_once, later = (made.post("/v1/chat/completions", **chat) for _ in range(2))
    assert at_once.status_code == 503
    assert later.status_code == 200
    assert "the disk is full" in [line for line in later.text.splitlines() if line][-1]


@pytest.mark.parametrize("slots", [1, 32])
def test_who_waits_for_devices_that_were_lost_is_told_and_a_stream_that_has_begun_goes_on(
    llm: shoal.LLM, head: Head, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr(served, "PATIENCE_SECONDS", 0.3)
    devices = Away(llm, 2)
    far = shoal.LLM.over(llm.model, cast("Any", devices), llm.context)
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"2": -100}}
    streamed = {**chat, "max_tokens": 9, "stream": True}
    with (
        serving(far, Options(slots=slots), status=head) as made,
        made.client as client,
        client.stream("POST", "/v1/chat/completions", json=streamed) as begun,
    ):
        lines = begun.iter_lines()
        first = next(lines)
        head.status = replace(STATUS, phase="waiting", reason="12 MB are missing")
        asked = [
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", streamed),
            ("/v1/responses", {"input": "Hello", "stream": True}),
            ("/v1/completions", {"prompt": "A boat", "echo": True, "logprobs": 1, "max_tokens": 0}),
            ("/v1/embeddings", {"input": "A"}),
        ]
        replies = [made.post(path, **body) for path, body in asked]
        with made.client as other:
            health = other.get("/health")
        devices.back.set()
        for reply in (*replies, health):
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5"), reply.text
            assert reply.json()["error"]["message"] == "the devices are not ready: 12 MB are missing"
        assert (health.json()["status"], health.json()["reason"]) == ("waiting", "12 MB are missing")
        *parts, last = [line.removeprefix("data: ") for line in (first, *lines) if line]
        assert last == "[DONE]"
        assert json.loads(parts[-1])["choices"][0]["finish_reason"]
