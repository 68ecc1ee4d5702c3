"""Commands of a device ask the head that runs there: `shoal run`, `score` and `top` over two nodes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.models import tiny_chat_model

import shoal
from shoal.answering import LocalEngine
from shoal.engine import strict
from shoal.engine.convert import convert
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.local import unix_socket
from shoal.local.server import Head, serve
from shoal.nodes import open_nodes
from shoal.planning import default_workload
from shoal.processes import NodeSpec, nodes
from shoal.status import Status

pytestmark = pytest.mark.slow
ASK = ("Hello", "-n", "12", "--temperature", "1.2", "--seed", "9")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def place(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The value of XDG_RUNTIME_DIR with which commands find a head of two nodes."""
    directory, model = tmp_path_factory.mktemp("run"), Model.open(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        specs = [
            NodeSpec(name, ram_mb=500, options=("--measure-seconds", "0.05")) for name in ("laptop", "phone")
        ]
        workload = default_workload(model.config.context, given=False)
        with (
            unix_socket.claimed() as socket,
            nodes(path, specs, directory) as running,
            open_nodes(model, [node.address for node in running], workload, shrink=True) as engine,
            serve(socket, Head(model, engine, lambda: engine.context, engine.status)),
        ):
            yield directory


def shoal_says(place: Path, *words: str, given: str = "") -> tuple[int, str, str]:
    """A command's exit code, output and messages."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *words],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_run_asks_the_head_unless_told_otherwise(place: Path, path: Path, tmp_path: Path) -> None:
    code, out, err = shoal_says(place, "run", str(path), *ASK, "--stats")
    assert code == 0 and "[on the house's head, " in err and "device" in err
    alone = shoal_says(place, "run", str(path), *ASK, "--alone", "--stats")
    assert alone[:2] == (0, out) and "thread" in alone[2] and "head" not in alone[2]
    assert shoal_says(tmp_path, "run", str(path), *ASK) == (0, out, "")  # no head runs there
    too_long = shoal_says(place, "run", str(path), "x" * 5000)
    assert too_long[0] == 5 and "shorten the prompt" in too_long[2]


def test_lines_are_scored_by_the_head(place: Path, path: Path) -> None:
    lines = "Ships sail on the sea.\nButter and flour.\n"
    code, out, err = shoal_says(place, "score", str(path), given=lines)
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert shoal_says(place, "score", str(path), "--alone", given=lines) == (0, out, "")


def test_a_library_asks_the_head_when_told_to(
    place: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    model = Model.open(path)
    with Stage(model, 0, model.n_units) as stage:
        here = LocalEngine(stage)
        wanted = shoal.LLM.over(model, here, 200).generate("Once", max_tokens=9).tokens
        here.close()
    with shoal.LLM(path, house=True) as llm:
        assert llm.generate("Once", max_tokens=9).tokens == wanted
    other = tmp_path / "other"
    convert(path.parent / "checkpoint", other, dtype="f32")
    with pytest.raises(shoal.ShoalError, match=r"has the model .*tiny"):
        shoal.LLM(other, house=True)
    with pytest.raises(ValueError, match="takes no nodes"):
        shoal.LLM(path, house=True, nodes=["127.0.0.1:1"])
    with pytest.raises(ValueError, match="it is `shoal up` that takes --private"):
        shoal.LLM(path, house=True, private=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(shoal.ShoalError, match="no head runs on this device"):
        shoal.LLM(path, house=True)


def test_a_server_shows_the_devices_of_the_head_and_has_its_masks(place: Path, path: Path) -> None:
    words = [sys.executable, "-m", "shoal", "serve", str(path), "--port", "0"]
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(place)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stderr is not None
            said = iter(process.stderr.readline, "")
            url = next(line.split()[-1] for line in said if "listening on" in line)
            told = httpx.get(f"{url}/house", timeout=60, trust_env=False)
            status = strict.decode(Status, told.content)
            assert {device.name for device in status.devices} == {"laptop", "phone"}
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["sea", "ship"]}}}
            asked = {"prompt": "A", "max_tokens": 20, "response_format": form, "n": 3}
            made = httpx.post(f"{url}/v1/completions", json=asked, timeout=60, trust_env=False).json()
            assert all(json.loads(one["text"]) in ("sea", "ship") for one in made["choices"])
        finally:
            process.kill()


FORK = """
import os, sys, shoal
with shoal.LLM(sys.argv[1], house=True) as llm, llm.generate("Once", stream=True, max_tokens=None) as stream:
    next(stream)
    if not (child := os.fork()):
        try:
            llm.generate("Once", max_tokens=1)
        except shoal.ShoalError as error:
            print(error, flush=True)
        stream.close(), llm.close()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(llm.generate("Once", max_tokens=3).tokens))
"""


def test_a_forked_process_is_told_to_connect_for_itself(place: Path, path: Path) -> None:
    """And what it closes stays open in its parent."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(path)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told, numbers = done.stdout.splitlines()
    assert "belongs to the process that opened it" in told and numbers == "0 3"


def test_top_shows_the_devices(place: Path, tmp_path: Path) -> None:
    code, out, err = shoal_says(place, "top")
    assert (code, err) == (0, "") and out.startswith("tiny: serving\n")
    assert "laptop" in out and "phone" in out and "LM head" in out
    code, out, _ = shoal_says(place, "top", "--json")
    status = strict.decode(Status, out.encode())
    assert code == 0 and {device.name for device in status.devices} == {"laptop", "phone"}
    working = [device for device in status.devices if device.state == "working"]
    assert working and all(device.ram and device.predicted_s for device in working)
    assert status.plan is not None and status.context > 0
    code, _, err = shoal_says(tmp_path, "top")
    assert code == 1 and "start one with `shoal up`" in err


def test_top_is_drawn_on_a_terminal_until_q_is_typed(place: Path) -> None:
    terminal, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "top"],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
        stdin=there,
        stdout=there,
        stderr=there,
    )
    os.close(there)
    seen = b""
    try:
        while b"tiny: serving" not in seen:
            seen += os.read(terminal, 4096)
        os.write(terminal, b"q")
        assert process.wait(60) == 0
        while True:
            seen += os.read(terminal, 4096)
    except OSError:  # the command has closed its side
        pass
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert seen.startswith(b"\x1b[?1049h") and b"\x1b[?1049l" in seen


def test_objects_follow_a_line_each(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "top", "--json", "--follow"],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = [json.loads(process.stdout.readline()) for _ in range(2)]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [one["model"] for one in found] == ["tiny", "tiny"]
