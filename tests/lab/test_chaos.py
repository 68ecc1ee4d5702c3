"""The trials of bench.chaos: their links fail as they should, and a trial finds what is wrong."""

from __future__ import annotations

import math
import os
import random
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from bench.chaos import __main__ as chaos
from bench.chaos.fleet import Fleet, Node
from bench.chaos.head import Ask, Job, anywhere
from bench.chaos.proxy import FIRST_SYN_RETRY, Gate, Link, Network
from bench.chaos.trial import Heard, Outcome, moves_about
from tests.models import tiny_chat_checkpoint

from shoal.engine.convert import convert
from shoal.net.identity import Identity
from shoal.net.wire import WireProtocol
from shoal.processes import NodeSpec, RunningNode, nodes

pytestmark = pytest.mark.lab

HELLO = b"".join(WireProtocol(True).send(Identity("n1", 5, "0", 1, "aa").hello("step")))


@pytest.mark.parametrize(
    ("cut", "sent", "retry", "arrives"),
    [
        (0.0, 1.0, 0.2, 1.0),
        (0.3, 0.0, 0.2, 0.6),
        (3.0, 0.0, 0.2, 3.0),
        (7.0, 0.0, 0.2, 12.6),
        (7.0, 5.0, 0.2, 8.0),
        (2.0, 0.0, FIRST_SYN_RETRY, 3.0),
    ],
)
def test_what_a_cut_link_loses_arrives_with_a_retransmission(
    cut: float, sent: float, retry: float, arrives: float
) -> None:
    async def main() -> float:
        start = trio.current_time()
        network, link = Network(cut={"n1": start + cut}), Link("step", "n0", "n1")
        await trio.sleep(sent)
        await network.passable(link, trio.current_time(), retry)
        return trio.current_time() - start

    took = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert math.isclose(took, arrives, abs_tol=1e-6)


def test_a_gate_passes_on_until_a_link_is_black() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def main() -> None:
        async with trio.open_nursery() as tasks:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            tasks.start_soon(partial(trio.serve_listeners, echo, [listener]))
            network = Network([gate := Gate("n2", listener.socket.getsockname()[:2])])
            await tasks.start(gate.serve, network)
            one, two = [await trio.open_tcp_stream(*gate.address) for _ in range(2)]
            for stream in (one, two):
                await stream.send_all(HELLO)
                assert await stream.receive_some(4096) == HELLO
            assert [(link.source, link.target) for link in network.links("n2", "step")] == [("n1", "n2")] * 2
            assert (len([*network.links("n1")]), [*network.links("n1", "step")]) == (2, [])
            first = next(iter(network.links("n2", "step")))
            first.black = True
            heard = []
            for stream in (one, two):
                await stream.send_all(b"x")
                with trio.move_on_after(0.05):
                    heard.append(await stream.receive_some(1))
            assert heard == [b"x"]
            await one.aclose()
            await two.aclose()
            tasks.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "truncate"])
def test_a_trial_passes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--seed", "5", "--trials", "1", "--kinds", kind]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"| {kind} | 1 | 1 | 4 of 4 |")


@pytest.mark.slow
def test_a_trial_whose_answers_differ_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = chaos.answers
    monkeypatch.setattr(chaos, "answers", lambda *args: [[0], *right(*args)[1:]])
    assert chaos.main(["--seed", "5", "--trials", "1", "--kinds", "kill"]) == 1
    out, err = capsys.readouterr()
    assert "5/0 kill" in err and "1 answers differ" in err
    assert out.splitlines()[-1].startswith("| kill | 1 | 0 | 3 of 4 |")


@pytest.mark.slow
def test_idle_connections_do_not_use_up_a_nodes_file_descriptors(tmp_path: Path) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    convert(tiny_chat_checkpoint(tmp_path / "checkpoint"), tmp_path / "tiny")
    spec = NodeSpec("n0", 2000, options=("--measure-seconds", "0.05"), enter=few)
    with nodes(tmp_path / "tiny", [spec], tmp_path) as (node,), ExitStack() as idle:
        most = 0
        for _ in range(500):
            idle.enter_context(socket.create_connection(node.address))
            most = max(most, len(os.listdir(f"/proc/{node.process.pid}/fd")))
        job = Job(str(tmp_path / "tiny"), [node.address], [Ask([1, 2, 3], 9, None)])
        done = subprocess.run(
            [sys.executable, "-m", "bench.chaos.head", job.to_json()], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout.count('"token"')) == (0, 9), done.stderr
        assert most < 120


def test_moves_are_legal_and_as_many_near_the_fault_as_not() -> None:
    rng, names = random.Random(3), ["n0", "n1", "n2", "n3"]
    seen = set()
    for _ in range(200):
        stages = anywhere(rng, 6, names)
        edges = [0, *(stage.last for stage in stages)]
        assert [stage.first for stage in stages] == edges[:-1] and edges[-1] == 6
        assert edges == sorted(set(edges))
        assert len({stage.device for stage in stages}) == len(stages) <= 3
        seen.add(stages)
    assert {len(stages) for stages in seen} == {1, 2, 3} and len(seen) > 100
    assert anywhere(rng, 1, names)[0].last == 1
    assert [stage.device for stage in anywhere(rng, 6, ["n3"])] == ["n3"]
    for strike in (4, 100, 239):
        asked = moves_about(rng, 40, strike)
        assert all(4 <= at < 240 for at in asked)
        assert all(strike - 8 <= at <= strike + 2 for at in asked[::2] if 12 < strike < 230)


def test_a_run_without_a_move_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome(kind: str, moved: int) -> Outcome:
        return Outcome(kind, 4, 0.0, 1.0, 0, (), 1.0, (), moved)

    found: list[Outcome] = []
    monkeypatch.setattr(chaos.trio, "run", lambda jobs, *args: args[-1].extend(found))
    command = ["--seed", "1", "--trials", "2", "--moves", "2"]
    for moved, code in ((0, 1), (1, 1), (2, 0)):
        found[:] = [outcome("kill", moved), outcome("blocked-output", 0), outcome("kill", 0)]
        assert chaos.main(command) == code
        assert f"{moved} moves were carried out of 4 that were asked for" in capsys.readouterr().out


def test_what_a_node_leaves_is_found(tmp_path: Path) -> None:
    node = Node("n0", tmp_path, tmp_path, 1.0)
    with subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"]) as process:
        node.running = RunningNode(NodeSpec("n0", 1), process, ("", 1))
        try:
            while len(node.children()) < 2:
                assert process.poll() is None
        finally:
            for child in node.children():
                os.kill(child, 9)
            process.kill()
    (tmp_path / "model").touch()
    fleet = Fleet({}, tmp_path, None)  # type: ignore[arg-type]
    trio.run(fleet.mend)
    (tmp_path / "head.log").touch()
    assert fleet.new_files() == []
    (tmp_path / "left").touch()
    trio.run(fleet.mend)
    assert fleet.new_files() == [tmp_path / "left"]


def test_an_unknown_kind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chaos.main(["--seed", "1", "--trials", "1", "--kinds", "kill,earthquake"])
    assert "no such kinds: earthquake" in capsys.readouterr().err


def test_each_part_of_a_fault_causes_a_silence_of_its_own() -> None:
    heard = Heard()
    heard.times = [[1.0, 5.0, 12.0], [4.5, 11.0]]
    assert heard.still(4.0) == 7.0  # a gap that began before the fault counts from it
    assert heard.still(4.0, 8.0) == 4.0
