"""`shoal serve` as a process, and its files."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import shoal
from shoal import house
from shoal.engine import strict
from shoal.engine.errors import ShoalError
from shoal.nodes import Nodes
from shoal.processes import NodeSpec, nodes
from shoal.server.opening import hosts_of, read_keys, tls_context, warnings
from shoal.status import Status

from .conftest import SECONDS, serving, until

KEY = "sesame-sesame-sesame"
CLIENTS = 16


@contextmanager
def command(*options: str, directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `shoal serve`, and its base URL. It uses no head of this machine."""
    words = [sys.executable, "-m", "shoal", "serve", *options, "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory), "XDG_RUNTIME_DIR": str(directory)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            yield process, next(found[1] for line in lines if (found := re.search("listening on (.*)", line)))
        finally:
            process.kill()


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(tiny: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# of this house\nali {KEY}\n")
    keys.chmod(0o600)
    with command(str(tiny), "--api-key-file", str(keys), directory=tmp_path) as (process, url):
        with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
            assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 401
            client.headers["Authorization"] = f"Bearer {KEY}"
            made = client.post("/v1/completions", json={"prompt": "A", "max_tokens": 2})
            assert made.status_code == 200
            assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        assert "ali POST /v1/completions 200, " in process.stderr.read()


def test_a_file_of_keys_is_its_owners_alone(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for text, mode, why in (
        (f"{KEY}\n", 0o644, "chmod 600"),
        ("short\n", 0o600, "line 1 of .* is not a key"),
        ("a b c\n", 0o600, "line 1 of .* is not a key"),
        ("# nothing\n", 0o600, "has no key"),
    ):
        keys.write_text(text)
        keys.chmod(mode)
        with pytest.raises(ShoalError, match=why):
            read_keys(keys)
    keys.unlink()
    with pytest.raises(ShoalError, match="cannot be read"):
        read_keys(keys)


def test_a_certificate_makes_it_https(llm: shoal.LLM, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(house._made())
    with serving(llm, tls=tls_context(both, None)) as served:
        url = f"https://127.0.0.1:{served.port}"
        trust = ssl.create_default_context(cafile=both)
        trust.check_hostname = False
        with httpx.Client(base_url=url, verify=trust, timeout=SECONDS, trust_env=False) as client:
            body = {"prompt": "A", "max_tokens": 3, "temperature": 0, "stream": True}
            for _ in range(2):  # on one connection
                assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.HTTPError):
            served.post("/v1/completions", prompt="A")  # without TLS
    both.write_text("no certificate")
    with pytest.raises(ShoalError, match="cannot be used for TLS"):
        tls_context(both, None)


def test_addresses_that_others_reach_are_warned_of() -> None:
    assert warnings("127.0.0.1", keys=False, tls=False) == []
    assert len(warnings("0.0.0.0", keys=False, tls=False)) == 2
    assert warnings("0.0.0.0", keys=True, tls=True) == []


OWN = socket.gethostname()
ALWAYS = ("localhost", "LocalHost:8080", "localhost.", "127.0.0.1:1", "[::1]", "[::1]:8080")
NEVER = (
    "",
    "evil.example",
    "localhost.evil.example",
    "::1",
    "[::1",
    "localhost:80:80",
    "a@localhost",
    "[]",
    ":80",
)
FAR = ("192.168.1.20", "192.168.1.20:8080", "[FE80::1]:80", OWN, f"{OWN.upper()}:80", "10.0.0.1.")


@pytest.mark.parametrize(
    ("host", "more", "admitted", "refused"),
    [
        ("127.0.0.1", (), ALWAYS, (*NEVER, *FAR, "proxy.example")),
        ("127.0.0.2", ("Proxy.Example",), (*ALWAYS, "127.0.0.2:80", "proxy.example:443"), (*NEVER, *FAR)),
        ("0.0.0.0", (), (*ALWAYS, *FAR, "0.0.0.0"), (*NEVER, "proxy.example", "1.2.3.4.nip.io")),
        ("::", ("proxy.example",), (*ALWAYS, *FAR, "PROXY.example."), NEVER),
    ],
)
def test_a_page_whose_name_leads_to_the_server_is_refused(
    host: str, more: tuple[str, ...], admitted: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    hosts = hosts_of(host, more)
    assert hosts is not None
    assert [one for one in admitted if one not in hosts] == []
    assert [one for one in refused if one in hosts] == []


def test_keys_are_enough_where_others_reach_the_server() -> None:
    assert hosts_of("0.0.0.0", keys=True) is None
    assert hosts_of("127.0.0.1", keys=True) is not None


@pytest.mark.slow
def test_no_stream_breaks_when_layers_move_and_a_node_dies(
    tiny: Path, llm: shoal.LLM, tmp_path: Path
) -> None:
    options = ("--measure-seconds", "0.01")
    specs = [NodeSpec(f"n{i}", ram_mb=300, slow=12.0, options=options) for i in range(3)]
    with nodes(tiny, specs, tmp_path) as running:
        processes = {node.spec.name: node.process for node in running}
        addresses = ["{}:{}".format(*node.address) for node in running]
        with ExitStack() as stack:
            far = stack.enter_context(shoal.LLM(tiny, nodes=addresses, context=300))
            engine = far._engine
            assert isinstance(engine, Nodes)
            served = stack.enter_context(serving(far, status=engine.status))
            (first,) = {stage.device for stage in engine.plan.stages}
            body: Any = {"stream": True, "max_tokens": 280, "logit_bias": {"2": -100, "3": -100}}
            arrived = threading.Barrier(CLIENTS + 1)

            def ask(i: int) -> str:
                lines = list[str]()
                asked = {**body, "prompt": f"Client {i} asks", "seed": i}
                with served.client as client, client.stream("POST", "/v1/completions", json=asked) as reply:
                    for line in reply.iter_lines():
                        lines.append(line)
                        if len(lines) == 1:
                            arrived.wait(SECONDS)
                *parts, end = [line.removeprefix("data: ") for line in lines if line]
                assert end == "[DONE]"
                return "".join(json.loads(part)["choices"][0]["text"] for part in parts)

            with ThreadPoolExecutor(CLIENTS) as clients:
                texts = [clients.submit(ask, i) for i in range(CLIENTS)]
                arrived.wait(SECONDS)
                processes[first].terminate()  # it leaves, and its layers move
                until(engine.moves)
                (second,) = {stage.device for stage in engine.plan.stages}
                processes[second].kill()
                assert not any(text.done() for text in texts)
                found = [text.result(SECONDS) for text in texts]
            (move,) = engine.moves()
            assert not move.aborted
            with served.client as client:
                told = strict.decode(Status, client.get("/house").content)
            assert {device.name: device.state for device in told.devices}[second] == "lost"
            assert told.recoveries == 1
    wanted: Any = {"max_tokens": 280, "temperature": 1.0, "logit_bias": {2: -100.0, 3: -100.0}}

    def alone(i: int) -> str:
        return llm.generate(f"Client {i} asks", seed=i, **wanted).text

    with ThreadPoolExecutor(CLIENTS) as callers:
        assert found == list(callers.map(alone, range(CLIENTS)))
