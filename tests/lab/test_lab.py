"""Whole labs: the tokens of one process, whatever happens to the devices; caps that hold; nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from bench.lab import ground
from bench.lab.compare import compare
from bench.lab.lab import Lab
from bench.lab.spec import DeviceSpec, LabSpec, LinkSpec, read_spec

from shoal import planner
from shoal.cluster_view import coordinator_identity
from shoal.engine.errors import ShoalError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.coordinator import Coordinator
from shoal.net.identity import shape_of
from shoal.net.placement import Planner, StageReport, plan_at
from shoal.network_planner import NetworkPlanner

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PROMPT = list(range(100, 112))
TOKENS = 24
WIFI = LinkSpec(0.002, 0.0005, 10e6)
THREE = LabSpec(tuple(DeviceSpec(name, 0.5, WIFI) for name in ("a", "b", "c")))


@pytest.fixture(scope="module")
def expected(smollm2: Model) -> list[int]:
    """What one process says."""
    with Stage(smollm2, 0, smollm2.n_units) as stage:
        return list(generate(stage, PROMPT, max_tokens=TOKENS, end=()))


async def ask(
    model: Model, lab: Lab, plan: Planner, during: Callable[[int], None] = lambda token: None
) -> tuple[list[int], int, Sequence[StageReport]]:
    """An answer, how often the coordinator had to recover, and what each stage did."""
    answer: list[int] = []
    async with Coordinator.open(
        lab.addresses, coordinator_identity(model), shape_of(model), plan
    ) as coordinator:
        with trio.fail_after(120):
            async with coordinator.generate(PROMPT, max_tokens=TOKENS, context=128) as tokens:
                async for token in tokens:
                    answer.append(token)
                    during(len(answer))
            return answer, coordinator.recoveries, await coordinator.stats()


@pytest.mark.whole_lab
@pytest.mark.parametrize("name", ["phones", "laptop+phones"])
def test_devices_that_differ_say_what_one_process_says_within_their_caps(
    smollm2: Model, labs: Path, expected: list[int], name: str
) -> None:
    with Lab.open(read_spec(labs / f"{name}.toml"), smollm2.path) as lab:
        plans = NetworkPlanner(smollm2, planner.Workload(context=128, prompt_tokens=len(PROMPT)))
        answer, recoveries, reports = trio.run(ask, smollm2, lab, plans)
        assert (answer, recoveries) == (expected, 0)
        assert len(reports) >= 2
        for report in reports:
            node = lab.node(report.node)
            weights = sum(smollm2.unit_bytes(u) for u in range(report.first, report.last))
            assert node.cap_mb is not None
            assert weights < node.peak_bytes() <= node.cap_mb * 1e6
        assert [node.failcnt() for node in lab.nodes] == [0] * len(lab.nodes)


@pytest.mark.whole_lab
@pytest.mark.parametrize("fault", ["kill", "freeze", "cut"])
def test_an_answer_survives_what_happens_to_a_device(smollm2: Model, expected: list[int], fault: str) -> None:
    with Lab.open(THREE, smollm2.path) as lab:

        def strike(tokens: int) -> None:
            if tokens == 8:
                getattr(lab.node("b"), fault)()

        answer, recoveries, _ = trio.run(ask, smollm2, lab, plan_at((0, 16, 32)), strike)
        assert (answer, recoveries) == (expected, 1)


@pytest.mark.whole_lab
def test_a_hot_device_and_a_worse_link_change_no_token(smollm2: Model, expected: list[int]) -> None:
    with Lab.open(THREE, smollm2.path) as lab:

        def change(tokens: int) -> None:
            if tokens == 6:
                lab.node("a").slow(4.0)
            if tokens == 12:
                lab.node("b").link(LinkSpec(0.03, 0.02, 1e6))

        answer, recoveries, _ = trio.run(ask, smollm2, lab, plan_at((0, 10, 20, 32)), change)
        assert (answer, recoveries) == (expected, 0)
        rows = 2 * (len(PROMPT) + TOKENS - 1) * smollm2.program.cut_cols * 4  # from a to b, and from b to c
        assert rows <= lab.sent()["step"] <= 1.2 * rows
        assert (lab.sent()["control"] > 0, lab.sent()["bulk"]) == (True, 0)
        with pytest.raises(ValueError, match="beyond"):
            lab.node("b").slow(0.1)


@pytest.mark.whole_lab
def test_predicted_stands_beside_measured_for_both_plans(smollm2: Model) -> None:
    with Lab.open(THREE, smollm2.path) as lab:
        rows = list(compare(lab, smollm2, [2], 1, 128))
    assert [(row.name, row.streams, len(row.runs)) for row in rows] == [("ours", 2, 1), ("equal", 2, 1)]
    assert all(row.predicted > 0 and row.measured > 0 for row in rows)
    assert sorted(stage.last - stage.first for stage in rows[1].plan.stages) == [10, 11, 11]


def alive(number: str) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for has no command line."""
    path = Path(f"/proc/{number}/cmdline")
    return path.exists() and path.read_bytes() != b""


@pytest.mark.whole_lab
def test_a_lab_that_is_killed_leaves_nothing(smollm2: Model) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom bench.lab.lab import Lab\n"
        "from bench.lab.spec import read_spec\n"
        "with Lab.open(read_spec(Path('bench/lab/laptop+phones.toml')), Path(sys.argv[1])) as lab:\n"
        "    print(lab.directory, lab.ground.cgroup, *[n.process.pid for n in lab.nodes], flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(smollm2.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        directory, cgroup, *numbers = process.stdout.readline().split()
        assert Path(directory).is_dir() and Path(cgroup).is_dir() and len(numbers) == 3
        with pytest.raises(ShoalError, match="another lab is open"):
            os.close(ground.locked())
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while Path(directory).exists() or ground.LOCK.read_text():
        assert time.monotonic() < until, "the lab's air does not clean up"
        time.sleep(0.1)
    assert not Path(cgroup).exists()
    assert not any(alive(number) for number in numbers)
    assert not Path(f"/sys/class/net/{ground.BRIDGE}").exists()
    assert not [path for path in Path("/run/netns").iterdir() if path.name.startswith(ground.BRIDGE)]


def test_without_namespaces_and_caps_the_delays_and_the_nodes_are_still_there(
    smollm2: Model, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ground, "lacks_namespaces", lambda: "network namespaces: Operation not permitted")
    monkeypatch.setattr(ground, "lacks_cgroups", lambda: "memory caps: no memory controller")
    words = r"as root on Linux, and this machine lacks network namespaces: .*caps"
    with pytest.raises(ShoalError, match=words), Lab.open(THREE, smollm2.path):
        pass
    with Lab.open(THREE, smollm2.path, strict=False) as lab:
        assert len(lab.lacks) == 2

        def strike(tokens: int) -> None:
            if tokens == 8:
                lab.node("b").kill()

        answer, recoveries, _ = trio.run(ask, smollm2, lab, plan_at((0, 16, 32)), strike)
        assert (answer, recoveries) == (expected, 1)
        for impossible in (lab.node("a").cut, lab.node("a").failcnt):
            with pytest.raises(ShoalError, match="only where the lab has"):
                impossible()
