"""A server over the socket of a head: what waits for the head makes nobody else wait."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tests.local.test_status import STATUS

import shoal
from shoal.local import unix_socket
from shoal.local.client import connect
from shoal.local.reconnecting import ReconnectingEngine
from shoal.local.server import Head, serve

from .conftest import SECONDS, serving


def test_a_head_that_says_nothing_holds_up_who_asked_it_and_no_other(
    llm: shoal.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with unix_socket.claimed() as path:
        with serve(path, Head(llm.model, llm._engine, lambda: llm.context, lambda: STATUS)):
            first = connect()
            assert first is not None
        with closing(ReconnectingEngine(first)) as engine, socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(path))
            silent.listen()
            far = shoal.LLM.over(llm.model, engine, llm.context)
            with serving(far) as served, ThreadPoolExecutor(1) as other:
                asked = other.submit(served.post, "/v1/completions", prompt="A")
                connection, _ = silent.accept()
                with connection, served.client as browser:
                    assert browser.get("/v1/models").status_code == 200
                    assert not asked.done()
                reply = asked.result(SECONDS)
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
