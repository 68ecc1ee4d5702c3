"""`shoal up` before its coordinator is there: what is wrong with the command, and its own node."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.e2e.test_home import Device

from shoal import up_first
from shoal.arguments import build_parser
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.net.errors import AddressInUseError
from shoal.own_node import OwnNode
from shoal.processes import end


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for kind in ("CONFIG_HOME", "CACHE_HOME", "RUNTIME_DIR"):
        monkeypatch.setenv(f"XDG_{kind}", str(tmp_path / kind))
    (tmp_path / "RUNTIME_DIR").mkdir()
    return tmp_path


def begin(*words: str) -> Any:
    return up_first.begun(build_parser(["up"]).parse_args(["up", *words]))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model must not be looked for, since that may fetch and convert it."""

    def used(source: str) -> Path:
        raise AssertionError(f"{source} was looked for")

    monkeypatch.setattr(up_first, "model_directory", used)


@pytest.mark.usefixtures("no_model")
def test_more_ram_than_there_is_is_refused_at_once() -> None:
    with pytest.raises(ShoalError, match=r"--ram 999999999 is more than the .* give a smaller number"):
        begin("m", "--ram", "999999999").__enter__()


@pytest.mark.usefixtures("no_model")
def test_a_port_in_use_is_said_before_a_model_is_converted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where, free = f"127.0.0.1:{port}", "127.0.0.1:0"
        for words in (("--listen", where), ("--listen", free, "--http", where)):
            with pytest.raises(AddressInUseError, match=f"port {port} of 127.0.0.1 is in use"):
                begin("m", *words).__enter__()


@pytest.mark.usefixtures("no_model")
def test_a_free_port_for_http_is_free_again_when_the_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    words = ("m", "--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{port}")
    for _ in range(2):
        with pytest.raises(AssertionError, match="m was looked for"):
            begin(*words).__enter__()


@pytest.mark.usefixtures("no_model")
def test_keys_that_are_not_there_are_said_before_a_model_is_converted(tmp_path: Path) -> None:
    words = ("--http", "127.0.0.1:0", "--api-key-file", str(tmp_path / "none"))
    with pytest.raises(ShoalError, match="none"):
        begin("m", "--listen", "127.0.0.1:0", *words).__enter__()


def test_the_own_node_has_begun_and_ends_with_the_command_or_its_failure(tiny_llama: Model) -> None:
    begun = begin(str(tiny_llama.path), "--listen", "127.0.0.1:0")
    first = begun.__enter__()
    process = first.own._process
    assert process.poll() is None
    assert not begun.__exit__(KeyError, KeyError(), None)
    assert process.poll() is not None
    assert all(listener.socket.fileno() == -1 for listener in first.listeners)


@pytest.mark.slow
def test_what_the_own_node_prints_is_passed_on_and_it_is_started_again(tmp_path: Path) -> None:
    program = "import pathlib, sys; it = pathlib.Path(sys.argv[1]); print('run', it.exists()); it.touch()"
    said: list[str] = []

    async def main() -> None:
        node = OwnNode([sys.executable, "-c", program, str(tmp_path / "it")])
        node.begin()
        async with trio.open_nursery() as tasks:

            def say(line: str) -> None:
                said.append(line)
                if len(said) == 3:
                    tasks.cancel_scope.cancel()

            tasks.start_soon(node.keep, say)

    trio.run(main)
    assert said[0] == "own node: run False" and said[2] == "own node: run True"
    assert said[1] == "the node of this device has ended with code 0: it is started again in 1 s"


@pytest.mark.slow
def test_a_head_without_layers_on_one_address_says_so(tiny_llama: Model, tmp_path: Path) -> None:
    """Its node listens where the head does, promises nothing, and says of the head nothing that is known."""
    words = [str(tiny_llama.path), "--no-layers", "--listen", "127.0.0.1:0", "--no-http"]
    up = Device(tmp_path, "laptop").starts("up", *words)
    try:
        up.says("waiting for devices")
        listening = up.says("own node: listening on")
        assert up.stop() == 0
    finally:
        end([up.process])
    text = up.said
    assert listening.split(" on ")[1].split(" as ")[0].rpartition(":")[0] == "127.0.0.1"
    assert "no layers" in listening and " MB" not in listening
    assert "No plan: there is no device yet that runs layers." in text
    assert "is the coordinator now" not in text
