"""Both ends of a model at home, over real processes whose traffic passes proxies: the nodes of other devices
never get a sequence of token ids, the tokens are those of one process, and a lost end is waited for."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from tests.net.test_ends import SAMPLING, TINY, Recorder, found_in, memory
from tests.patience import LIMIT

from shoal.cli import main
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import identity_of, shape_of
from shoal.net.liveness import Timing
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.network_planner import NetworkPlanner
from shoal.planner import Workload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read in /proc"),
]
Process = subprocess.Popen[bytes]


class Devices:
    """Node processes by name."""

    def __init__(self, model: Path, place: Path, stack: ExitStack) -> None:
        self._model, self._place, self._stack = model, place, stack
        self._environ = {**os.environ, "XDG_CONFIG_HOME": str(place / "config")}
        self.processes: dict[str, Process] = {}
        self.snaps: list[str] = []

    def start(self, name: str, *options: str) -> None:
        self.path(name).unlink(missing_ok=True)
        words = ("--name", name, "--ram", "300", "--threads", "1", "--measure-seconds", "0.1")
        where = ("--port-file", str(self.path(name)))
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "node", str(self._model), *words, *where, *options],
            env=self._environ,
            stdout=subprocess.DEVNULL,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        self.processes[name] = process

    def path(self, name: str) -> Path:
        return self._place / f"{name}.port"

    async def ports(self, name: str) -> list[int]:
        with trio.fail_after(LIMIT):
            while not self.path(name).exists():  # noqa: ASYNC110
                await trio.sleep(0.02)
        return [int(line.rpartition(":")[2]) for line in self.path(name).read_text().split()]

    async def snap(self, name: str, when: str) -> None:
        """Copies the memory of a process into a file: to search it takes too long while an answer runs."""

        def write() -> None:
            with (self._place / f"{when}.memory").open("wb") as file:
                for part in memory(self.processes[name].pid):
                    file.write(part)

        await trio.to_thread.run_sync(write)
        self.snaps.append(when)

    def remembered(self, when: str, ids: Sequence[int]) -> bool:
        """Whether such a copy holds token ids."""
        with (self._place / f"{when}.memory").open("rb") as file:
            return any(found_in(part, ids) for part in iter(partial(file.read, 1 << 25), b""))

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()


def planner(model: Model) -> tuple[list[list[str]], object]:
    """The chains that a planner makes, and that planner: its ends are on the laptop, with layers on all."""
    chains: list[list[str]] = []

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        # All addresses here are loopback, so only the name tells which device is the coordinator's.
        here = [replace(node, home="laptop" in node.label) for node in nodes]
        firsts = [node for node in here if not node.offer.device.beside]
        layers = {3: (1, 1, 1), 2: (1, 2) if "laptop" in firsts[0].label else (2, 1), 1: (3,)}[len(firsts)]
        plans = NetworkPlanner(model, Workload(512), layers=layers, private="always")
        placement = plans(here, links)
        assert placement.private
        chains.append([stage.device for stage in placement.stages])
        return placement

    return chains, plan


def test_no_other_device_gets_a_token_and_a_lost_end_is_waited_for(tmp_path: Path) -> None:
    path, rng = tmp_path / "tiny", random.Random(12)
    assert main(["convert", str(TINY), str(path), "--dtype", "f32"]) == 0
    model = Model.open(path)
    prompt = [rng.randrange(20, 250) for _ in range(150)]
    with Stage(model, 0, model.n_units) as stage:
        expected = list(generate(stage, prompt, SAMPLING, max_tokens=30, end=()))
        for _ in range(2):
            expected.append(77)
            expected += generate(stage, [*prompt, *expected], SAMPLING, max_tokens=30, end=())
    chains, plan = planner(model)

    async def run(devices: Devices) -> tuple[list[int], dict[str, bool]]:
        recorders, addresses, got = list[Recorder](), list[tuple[str, int]](), list[int]()
        async with trio.open_nursery() as tasks:
            for name in ("laptop", "tablet", "phone"):
                for port in await devices.ports(name):
                    recorders.append(Recorder(port))
                    listeners: list[trio.SocketListener] = await tasks.start(
                        partial(trio.serve_tcp, recorders[-1].serve, 0, host="127.0.0.1")
                    )
                    addresses.append(listeners[0].socket.getsockname()[:2])
            # A plan without the second range is none, and a busy machine may need long to answer Hello.
            timing = Timing(handshake=LIMIT, gather=LIMIT)
            options = CoordinatorOptions(timing, measure_links=True)
            me = identity_of(model, "laptop", "0")
            places = (addresses, me, shape_of(model), plan, options)
            async with Coordinator.open(*places) as coordinator, coordinator.session(SAMPLING) as session:  # type: ignore[arg-type]
                for lost in ("", "phone", "laptop"):
                    if lost:
                        devices.kill(lost)
                        got.append(77)
                    if lost == "laptop":
                        devices.start("laptop", "--both-ends", "always")
                        recorders[0].port, recorders[1].port = await devices.ports("laptop")
                    async with session.answer([*prompt, *got], max_tokens=30) as tokens:
                        async for token in tokens:
                            got.append(token)
                    for name in {"": ("laptop", "tablet", "phone"), "laptop": ("tablet",)}.get(lost, ()):
                        await devices.snap(name, f"{name} {len(got)}")
                assert coordinator.recoveries == 2
            tasks.cancel_scope.cancel()
        known = [*prompt, *got]
        seen = {look: devices.remembered(look, known[: 150 + int(look.split()[1])]) for look in devices.snaps}
        for name, recorder in zip(("first", "second", "tablet's", "phone's"), recorders, strict=True):
            seen[f"{name} traffic"] = any(found_in(record, known) for record in recorder.recorded)
            assert sum(map(len, recorder.recorded)) > 10_000
        return got, seen

    with ExitStack() as stack:
        devices = Devices(path, tmp_path, stack)
        devices.start("laptop", "--both-ends", "always")
        devices.start("tablet")
        devices.start("phone")
        got, seen = trio.run(run, devices)
    assert got == expected
    assert {look for look, found in seen.items() if found} - {"second traffic"} == {
        "laptop 30", "first traffic",
    }  # fmt: skip
    assert seen.keys() >= {
        "phone 30",
        "tablet 30",
        "tablet 92",
        "tablet's traffic",
        "phone's traffic",
    }
    assert chains[0] == ["laptop", "tablet", "phone", "end of laptop"]
    assert all((chain[0], chain[-1]) == ("laptop", "end of laptop") for chain in chains)
    assert ["laptop", "tablet", "end of laptop"] in chains
