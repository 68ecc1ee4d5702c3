"""A server on a socket of this device, for a tiny model that speaks noise."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from tests.models import tiny_chat_checkpoint, tiny_chat_model

import shoal
from shoal.engine.convert import convert
from shoal.server.app import Options, serve_app
from shoal.server.house import GetStatus
from shoal.server.http import Limits, Server
from shoal.server.opening import open_listeners

SECONDS = 60.0
"""More than anything takes here."""


@dataclass
class Serving:
    """A running server. `log`: its lines."""

    llm: shoal.LLM
    app: Any
    server: Server
    port: int
    log: list[str] = field(default_factory=list)
    tell: Callable[[Callable[[], object]], object] = lambda call: None

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=SECONDS, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client as client:
            return client.post(path, json=body)

    def made(self, path: str, **body: Any) -> Any:
        reply = self.post(path, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()


LIMITS = Limits(grace=5.0)
OPTIONS = Options()


def until(condition: Callable[[], object]) -> None:
    """Waits for something that happens in another thread."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def serving(
    llm: shoal.LLM,
    options: Options = OPTIONS,
    limits: Limits = LIMITS,
    tls: ssl.SSLContext | None = None,
    status: GetStatus | None = None,
    context: Callable[[], int] | None = None,
) -> Iterator[Serving]:
    """Serves a model in a thread."""
    (listener,) = listeners = open_listeners("127.0.0.1", 0)
    log: list[str] = []
    app = serve_app(llm._engine, llm.model, context or llm.context, options, log.append, status=status)
    made = Serving(llm, app, None, listener.socket.getsockname()[1], log)  # type: ignore[arg-type]
    ready = threading.Event()

    async def main() -> None:
        made.server = Server(app, limits, log.append)
        made.tell = trio.lowlevel.current_trio_token().run_sync_soon
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(made.server.serve, listeners, tls))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert ready.wait(SECONDS)
    try:
        yield made
    finally:
        with suppress(trio.RunFinishedError):  # a test may have told it
            made.tell(made.server.drain)
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def llm(tiny: Path) -> Iterator[shoal.LLM]:
    with shoal.LLM(tiny, context=300) as opened:
        yield opened


@pytest.fixture(scope="session")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Of the same model with a template that takes tools."""
    directory = tmp_path_factory.mktemp("tooled")
    checkpoint = tiny_chat_checkpoint(directory / "checkpoint")
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["chat_template"] = TOOLS + settings["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(checkpoint, directory / "tooled")
    with shoal.LLM(directory / "tooled", context=512) as llm, serving(llm) as made:
        yield made


TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.arguments.where + '</tool_call>' }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="session")
def served(llm: shoal.LLM) -> Iterator[Serving]:
    with serving(llm) as made:
        yield made
