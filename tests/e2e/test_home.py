"""A house as its owner types it: `shoal up`, `shoal invite`, `shoal join`, from empty caches, with real
processes and real weights. No device can hold the model alone, and the head runs no layers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.models import tiny_chat_model

from shoal.processes import bare_node_bytes, end

pytestmark = pytest.mark.slow
PROMPT = "Write a long story about the sea."
YES = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
SECONDS = 180.0
"""For whatever is waited for: the machine may be busy."""


class Program:
    """A command that runs, and what it has printed."""

    def __init__(self, device: Device, *words: str) -> None:
        self.words, self._log = words, device.place / f"{time.monotonic_ns()}-{words[0]}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*device.shoal, *words],
                env=device.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def says(self, *parts: str, after: str = "") -> str:
        """Waits for a line that has all of these parts, after what was said before."""

        def found() -> str | None:
            lines = self.said.removeprefix(after).splitlines()
            return next((line for line in lines if all(part in line for part in parts)), None)

        wait(lambda: found() or self.process.poll() is not None, lambda: f"{parts}: {self.said}")
        line = found()
        assert line is not None, f"{self.words} has ended: {self.said}"
        return line

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


class Device:
    """A device: keys, cache and socket of its own. `shoal` is the command that it has."""

    def __init__(
        self, place: Path, name: str, shoal: Sequence[str] = (sys.executable, "-m", "shoal")
    ) -> None:
        self.name, self.place, self.shoal = name, place / name, shoal
        self.place.mkdir()
        kinds = ("config", "cache", "runtime")
        places = {f"XDG_{kind.upper()}_{'DIR' if kind == 'runtime' else 'HOME'}": kind for kind in kinds}
        self.environ = {**os.environ, **{key: str(self.place / kind) for key, kind in places.items()}}

    def starts(self, *words: str) -> Program:
        return Program(self, *words)

    def does(self, *words: str) -> tuple[int, str, str]:
        """A command's exit code, output and messages."""
        done = subprocess.run(
            [*self.shoal, *words],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def weights(self) -> dict[str, tuple[int, int]]:
        """Files of units on its disk, with inode and time."""
        found = (self.place / "cache/shoal/fetched").rglob("unit-*.safetensors")
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def wait(true: Callable[[], object], what: Callable[[], str]) -> None:
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until, f"waited in vain for {what()}"
        time.sleep(0.05)


class House:
    """A laptop with the model, and a phone and a tablet without. Two of the three can hold it together."""

    def __init__(self, place: Path, model: Path, positions: int = 512) -> None:
        self.model = model
        self.laptop, self.phone, self.tablet = (Device(place, name) for name in ("laptop", "phone", "tablet"))
        self.ram = ("--ram", str(ram_mb(model, positions)))
        self.running: dict[str, Program] = {}
        self.port, self.url = "0", ""

    def up(self, *model: str) -> Program:
        """Starts the head."""
        listen = ("--listen", f"127.0.0.1:{self.port}", "--http", "127.0.0.1:0", "--name", "laptop")
        program = self.running["laptop"] = self.laptop.starts("up", *model, *listen, *self.ram)
        self.port = program.says("devices connect to 127.0.0.1:").split()[-1].rpartition(":")[2]
        self.url = program.says("serves HTTP on ").split()[-1]
        return program

    def joins(self, device: Device) -> Program:
        """Pairs a device with the laptop; it stays as a node."""
        invite = self.laptop.starts("invite", "--no-qr")
        try:
            token = invite.says("shoal join SHOAL1-").split()[-1]
            invite.says("It joins `shoal up")
            return self._serves(device, "join", token, "--name", device.name)
        finally:
            end([invite.process])

    def node(self, device: Device) -> Program:
        """Starts a device that has joined before."""
        return self._serves(device, "node")

    def _serves(self, device: Device, *words: str) -> Program:
        program = device.starts(*words, *self.ram, "--listen", "127.0.0.1:0", "--measure-seconds", "0.1")
        self.running[device.name] = program
        program.says("listening on", f"as {device.name}", "for the house of laptop")
        return program

    def ask(self, *words: str) -> str:
        code, out, err = self.laptop.does("run", str(self.model), PROMPT, *words)
        assert code == 0, err
        return out

    def asked_over_http(self, **more: Any) -> str:
        """What `ask` gives, from the HTTP server of the head."""
        body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, **more}
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=SECONDS, trust_env=False)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])


def ram_mb(model: Path, positions: int = 512) -> int:
    """What a device promises so that it can hold a good half of the model and not all of it, with keys and
    values of this many positions."""
    from shoal.engine.model_directory import Model
    from shoal.engine.stage import StageOptions
    from shoal.planning import MB, planner_model

    rows = planner_model(Model.open(model), StageOptions())
    layer, table = rows.units[1], max(rows.units[0].bytes, rows.units[-1].bytes)
    held = layer.bytes + layer.kv_bytes_per_token * positions
    fixed = bare_node_bytes(model) + layer.workspace_bytes + table
    return -(-int(fixed + 0.6 * (len(rows.units) - 2) * held) // MB)


def status_of(home: House) -> Any:
    """What the HTTP server says of the devices."""
    return httpx.get(f"{home.url}/house", timeout=SECONDS, trust_env=False).json()


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(found).split()]


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("home"), smollm2)
    try:
        house.up(str(smollm2))
        early = httpx.get(f"{house.url}/health", timeout=SECONDS, trust_env=False)
        assert (early.status_code, early.headers["retry-after"]) == (503, "5"), "nobody holds the model yet"
        for device in (house.phone, house.tablet):
            house.joins(device)
        yield house
    finally:
        end([program.process for program in house.running.values()])


@pytest.fixture(scope="module")
def alone(home: House) -> str:
    """What one process says."""
    return home.ask("-n", "100", "--alone")


def test_devices_that_join_with_empty_caches_answer_together(home: House, alone: str) -> None:
    """Two of the three devices have layers. What they lacked they have from the others, and it stays."""
    laptop = home.running["laptop"]
    wait(lambda: home.phone.weights() or home.tablet.weights(), lambda: f"weights: {laptop.said}")
    ready = laptop.says("ready:", "embedding", "LM head")
    assert sum(name in ready for name in ("laptop", "phone", "tablet")) >= 2
    assert home.ask("-n", "100") == alone
    assert home.asked_over_http(max_tokens=100) == alone.removesuffix("\n")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": YES}}
    assert isinstance(json.loads(home.asked_over_http(max_tokens=40, response_format=form))["yes"], bool)
    code, out, _ = home.laptop.does("devices")
    assert code == 0 and all(name in out for name in ("laptop", "phone", "tablet"))
    code, _, err = home.laptop.does("up", str(home.model))
    assert code == 8 and f"process {laptop.process.pid}" in err


def test_a_device_that_is_killed_in_mid_answer_is_replaced(home: House, alone: str) -> None:
    """The third device takes its layers, and fetches what it lacks of them."""
    with ThreadPoolExecutor(1) as client:
        asking = home.laptop.starts("run", str(home.model), PROMPT, "-n", "100")
        wait(lambda: asking.said, lambda: "the answer to begin")
        over_http = client.submit(home.asked_over_http, max_tokens=100)
        home.running["phone"].stop(signal.SIGKILL)
        assert asking.process.wait(SECONDS) == 0
        answer = re.sub("shoal: .*\n", "", asking.said)  # without what it said about the head meanwhile
        assert answer == alone
        assert over_http.result() == alone.removesuffix("\n")
    home.node(home.phone)


def test_a_second_start_fetches_nothing_that_is_there(home: House, alone: str) -> None:
    """`shoal up` without MODEL takes that of last time; devices that were there before it wait for it."""
    laptop, tablet = home.running["laptop"], home.running["tablet"]
    with ThreadPoolExecutor(1) as client:
        before_the_end = laptop.said
        under_way = client.submit(home.asked_over_http, max_tokens=40)
        wait(lambda: status_of(home)["running"], lambda: "the answer to begin")
        assert laptop.stop() == 0
        assert alone.startswith(under_way.result()), "an answer under way ends whole"
    assert "POST /v1/chat/completions 200" in laptop.said.removeprefix(before_the_end)
    told = tablet.said
    assert home.running["phone"].stop(signal.SIGTERM) == 0
    before = home.phone.weights(), home.tablet.weights()
    home.up()
    tablet.says("head of the house is there again", after=told)
    home.node(home.phone)
    home.running["laptop"].says("ready:")
    assert home.ask("-n", "100") == alone
    for device, files in zip((home.phone, home.tablet), before, strict=True):
        assert files.items() <= device.weights().items(), "nothing is fetched twice"


def test_devices_begin_again_with_another_model_and_the_heads_own_node_is_kept_running(
    home: House, tmp_path: Path
) -> None:
    tiny_chat_model(tmp_path)
    assert home.running["laptop"].stop() == 0
    told = {name: home.running[name].said for name in ("phone", "tablet")}
    laptop = home.up(str(tmp_path / "tiny"))
    for name, before in told.items():
        home.running[name].says("the head of the house", "has the model", after=before)
        home.running[name].says("listening on", after=before)
        laptop.says(name, "has joined")
    laptop.says("ready:")
    home.model = tmp_path / "tiny"
    alone = home.ask("-n", "40", "--alone")
    (own,) = children(laptop.process.pid)
    os.kill(own, signal.SIGKILL)
    laptop.says("the node of this device has ended with code -9")
    assert home.ask("-n", "40") == alone
    over_http = home.asked_over_http(max_tokens=40)
    as_read = over_http.replace("\r\n", "\n").replace("\r", "\n")  # it is noise, which `ask` reads as text
    assert as_read == alone.removesuffix("\n")
    wait(lambda: children(laptop.process.pid), lambda: "another node of the head")
    (own,) = children(laptop.process.pid)
    for program in home.running.values():
        assert program.stop() == 0, program.said
    with pytest.raises(ProcessLookupError):
        os.kill(own, 0)
