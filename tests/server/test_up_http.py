"""The HTTP server of `shoal up`, over an engine of this process in place of a house's."""

from __future__ import annotations

import argparse
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, cast

import httpx
import pytest
from tests.local.test_status import STATUS

import shoal
from shoal import up_http
from shoal.arguments import build_parser
from shoal.net.errors import AddressInUseError
from shoal.nodes import Nodes
from shoal.status import Status
from shoal.up_http import serve_http

from .conftest import SECONDS

ENDLESS = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"2": -100, "3": -100}}
"""An answer that only the context ends."""


class Devices:
    """In place of Nodes: an engine that tells a context and a status."""

    def __init__(self, llm: shoal.LLM) -> None:
        self._llm = llm
        self.context = llm.context
        self.running = threading.Semaphore(0)

    def status(self) -> Status:
        return STATUS

    def begin(self, *given: Any) -> Any:
        stop = self._llm._engine.begin(*given)
        self.running.release()
        return stop


@pytest.fixture
def devices(llm: shoal.LLM) -> Devices:
    return Devices(llm)


def options(*words: str) -> argparse.Namespace:
    return build_parser(["up"]).parse_args(["up", *words])


def url_of(said: list[str]) -> str:
    (found,) = (line.removeprefix("serves HTTP on ") for line in said if line.startswith("serves HTTP"))
    return found


def post(url: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=SECONDS, trust_env=False)


def test_an_answer_under_way_ends_whole_and_then_nobody_is_answered(llm: shoal.LLM, devices: Devices) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(1) as client:
        nodes = cast("Nodes", devices)
        with serve_http(options("--http", "127.0.0.1:0"), llm.model, nodes, said.append):
            url = url_of(said)
            under_way = client.submit(post, url, ENDLESS)
            assert devices.running.acquire(timeout=SECONDS)
        assert under_way.result().json()["usage"]["total_tokens"] == llm.context
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


def test_ctrl_c_at_the_end_ends_answers_under_way(
    llm: shoal.LLM, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[Any] = []
    said: list[str] = []
    made = up_http._Server

    class Noted(made):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            servers.append(self)

    monkeypatch.setattr(up_http, "_Server", Noted)
    devices._llm = Silent()  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as client:
        nodes = cast("Nodes", devices)
        with serve_http(options("--http", "127.0.0.1:0"), llm.model, nodes, said.append):
            under_way = client.submit(post, url_of(said), ENDLESS)
            assert devices.running.acquire(timeout=SECONDS)
            thread = servers[0]._thread
            join, interrupts = thread.join, iter([KeyboardInterrupt])

            def interrupted(timeout: float | None = None) -> None:
                if timeout is None and (interrupt := next(interrupts, None)):
                    raise interrupt
                join(timeout)

            monkeypatch.setattr(thread, "join", interrupted)
        assert not thread.is_alive()
        with pytest.raises(httpx.HTTPError):
            under_way.result()
    assert any("Ctrl-C ends them" in line for line in said)


class Silent:
    """An LLM whose engine never answers."""

    def __init__(self) -> None:
        self._engine = self

    def begin(self, *given: Any) -> Any:
        return lambda **how: None


def test_a_port_that_is_taken_is_said_and_only_an_error_if_it_was_asked_for(
    llm: shoal.LLM, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, said = cast("Nodes", devices), list[str]()
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(up_http, "PORT", port)
        with serve_http(options(), llm.model, nodes, said.append):
            pass
        assert said == [f"no HTTP server: port {port} is in use; --http 127.0.0.1:0 takes a free one"]
        with (
            pytest.raises(AddressInUseError),
            serve_http(options("--http", f"127.0.0.1:{port}"), llm.model, nodes, said.append),
        ):
            pass
    without = serve_http(options("--no-http"), llm.model, nodes, said.append)
    with without, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with serve_http(options(), llm.model, nodes, said.append):  # the port is free now
        assert httpx.get(f"http://127.0.0.1:{port}/house", trust_env=False).status_code == 200


def test_an_address_that_others_reach_is_warned_of(llm: shoal.LLM, devices: Devices) -> None:
    said: list[str] = []
    with serve_http(options("--http", "0.0.0.0:0"), llm.model, cast("Nodes", devices), said.append):
        assert sum(line.startswith("warning: ") for line in said) == 2
