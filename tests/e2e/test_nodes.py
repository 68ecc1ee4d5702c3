"""Real nodes, real sockets, real weights: the nodes say what one process says, token by token."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from tests.patience import LIMIT

from shoal.cluster_view import coordinator_identity
from shoal.engine.batch import Sampling
from shoal.engine.chat import Chat, Message
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.net.coordinator import Coordinator
from shoal.net.identity import shape_of
from shoal.net.placement import plan_at
from shoal.processes import NodeSpec, RunningNode, nodes

pytestmark = pytest.mark.slow

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):",
    "Übersetze ins Englische: Guten Morgen, wie geht es dir?",
)
GREEDY, SEEDED = Sampling(), Sampling(temperature=0.8, seed=20231)
TOKENS = 64


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model.open(smollm2)


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    chat = Chat.open(model.path)
    return [chat.encode([Message("user", text)]) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(model: Model, prompts: list[list[int]]) -> Callable[[Sampling], list[list[int]]]:
    """What one process with one thread says."""
    known: dict[Sampling, list[list[int]]] = {}

    def answers(sampling: Sampling) -> list[list[int]]:
        if sampling not in known:
            with Stage(model, 0, model.n_units) as stage:
                known[sampling] = [
                    list(generate(stage, p, sampling, max_tokens=TOKENS, end=())) for p in prompts
                ]
        return known[sampling]

    return answers


@pytest.fixture(scope="module")
def four(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningNode]]:
    specs = [NodeSpec(f"node{i}", ram_mb=800, threads=1 + i % 2) for i in range(4)]
    with nodes(model.path, specs, tmp_path_factory.mktemp("nodes")) as running:
        yield running


async def ask(
    model: Model,
    running: Sequence[RunningNode],
    edges: Sequence[int],
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    during: Callable[[int], None] = lambda token: None,
) -> tuple[list[list[int]], int]:
    """Answers to all prompts with all samplings, at once, and how often the head had to recover."""
    asked = [(prompt, sampling) for sampling in samplings for prompt in prompts]
    answers: list[list[int]] = [[] for _ in asked]
    addresses = [node.address for node in running]
    plan = plan_at(edges, chunk_rows=16)
    async with Coordinator.open(addresses, coordinator_identity(model), shape_of(model), plan) as coordinator:

        async def one(i: int) -> None:
            prompt, sampling = asked[i]
            async with coordinator.generate(prompt, sampling, max_tokens=TOKENS) as tokens:
                async for token in tokens:
                    answers[i].append(token)
                    during(len(answers[i]))

        async with trio.open_nursery() as nursery:
            for i in range(len(asked)):
                nursery.start_soon(one, i)
        return answers, coordinator.recoveries


@pytest.mark.parametrize(
    "edges",
    [(0, 16, 32), (0, 1, 32), (0, 9, 20, 32), (0, 25, 31, 32), (0, 7, 15, 24, 32)],
    ids=lambda edges: "-".join(map(str, edges)),
)
def test_nodes_say_what_one_process_says(
    model: Model,
    prompts: list[list[int]],
    expected: Callable[[Sampling], list[list[int]]],
    four: list[RunningNode],
    edges: tuple[int, ...],
) -> None:
    """All five prompts are in flight at once, greedily and sampled."""
    running = four[: len(edges) - 1]
    answers, recoveries = trio.run(ask, model, running, edges, prompts, (GREEDY, SEEDED))
    assert answers == expected(GREEDY) + expected(SEEDED)
    assert recoveries == 0


def test_threads_do_not_change_an_answer(
    model: Model, prompts: list[list[int]], expected: Callable[[Sampling], list[list[int]]]
) -> None:
    with Stage(model, 0, model.n_units, StageOptions(threads=2)) as stage:
        for sampling in (GREEDY, SEEDED):
            assert [
                list(generate(stage, p, sampling, max_tokens=TOKENS, end=())) for p in prompts
            ] == expected(sampling)


def test_an_answer_survives_the_death_of_a_node(
    model: Model,
    prompts: list[list[int]],
    expected: Callable[[Sampling], list[list[int]]],
    tmp_path: Path,
) -> None:
    specs = [NodeSpec(f"mortal{i}", ram_mb=800) for i in range(3)]
    with nodes(model.path, specs, tmp_path) as running:

        def kill(tokens: int) -> None:
            if tokens == 20 and running[1].process.poll() is None:
                running[1].process.send_signal(signal.SIGKILL)
                running[1].process.wait()

        answers, recoveries = trio.run(ask, model, running, (0, 12, 32), prompts[:3], (SEEDED,), kill)
        assert running[1].process.poll() is not None
        assert answers == expected(SEEDED)[:3]
        assert recoveries == 1
        assert running[0].process.poll() is None and running[2].process.poll() is None


def test_a_node_outlives_garbage_and_serves_on(
    model: Model,
    prompts: list[list[int]],
    expected: Callable[[Sampling], list[list[int]]],
    four: list[RunningNode],
) -> None:
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\x00" * 3, b""):
        with socket.create_connection(four[0].address, timeout=LIMIT) as peer:
            peer.sendall(garbage)
    answers, _ = trio.run(ask, model, four[:2], (0, 16, 32), prompts[:1], (GREEDY,))
    assert answers == expected(GREEDY)[:1]


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_a_port_in_use_is_said_with_its_own_exit_code(model: Model, four: list[RunningNode]) -> None:
    port = four[0].address[1]
    done = shoal("node", str(model.path), "--listen", f"127.0.0.1:{port}")
    assert done.returncode == 8
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr


def test_a_node_listens_for_others_only_when_told_that_it_is_insecure(model: Model) -> None:
    done = shoal("node", str(model.path), "--listen", "0.0.0.0:0")
    assert done.returncode == 13
    assert "--insecure" in done.stderr


def test_caps_that_no_plan_meets_say_how_much_is_missing(
    model: Model, tmp_path: Path, prompts: list[list[int]]
) -> None:
    with nodes(model.path, [NodeSpec("tiny", ram_mb=100)], tmp_path) as running:
        host, port = running[0].address
        done = shoal("run", str(model.path), "hello", "--nodes", f"{host}:{port}", "-n", "4")
        assert done.returncode == 6, done.stderr
        assert "MB" in done.stderr
        assert "short in total" in done.stderr
        assert running[0].process.poll() is None


def test_shoal_run_on_nodes_prints_the_answer_of_one_process(model: Model, four: list[RunningNode]) -> None:
    addresses = ",".join(f"{host}:{port}" for host, port in (node.address for node in four[:3]))
    arguments = ("run", str(model.path), PROMPTS[1], "-n", "24", "--context", "256")
    alone, together = shoal(*arguments), shoal(*arguments, "--nodes", addresses)
    assert alone.returncode == together.returncode == 0, together.stderr
    assert alone.stdout == together.stdout
    assert len(alone.stdout) > 20


def test_a_prompt_longer_than_the_context_is_refused_and_the_nodes_go_on(
    model: Model,
    four: list[RunningNode],
    prompts: list[list[int]],
    expected: Callable[[Sampling], list[list[int]]],
) -> None:
    addresses = ",".join(f"{host}:{port}" for host, port in (node.address for node in four[:2]))
    for more in ((), ("--nodes", addresses)):
        done = shoal("run", str(model.path), "long " * 100, "--context", "64", *more)
        assert done.returncode == 5, done.stderr
        assert "the context holds 64" in done.stderr
    answers, _ = trio.run(ask, model, four[:2], (0, 16, 32), prompts[:1], (GREEDY,))
    assert answers == expected(GREEDY)[:1]


def test_ctrl_c_ends_a_node_cleanly(model: Model, tmp_path: Path) -> None:
    with nodes(model.path, [NodeSpec("ended", ram_mb=800)], tmp_path) as running:
        process = running[0].process
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
    assert "Traceback" not in (tmp_path / "ended.log").read_text()


def running_under(path: Path) -> list[int]:
    """The processes that run now with this TMPDIR, which children inherit."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"TMPDIR={path}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


def demo(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`shoal demo` without proxies or indexes that lead anywhere, since the model is here; it leaves no
    process."""
    nowhere = "http://127.0.0.1:9"
    offline = {**os.environ, "PIP_INDEX_URL": nowhere, "HTTPS_PROXY": nowhere, "TMPDIR": str(path)}
    command = [sys.executable, "-m", "shoal", "demo", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=offline
    ) as process:
        assert running_under(path) != []
        out, err = process.communicate(timeout=LIMIT)
    assert running_under(path) == []
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.alone
def test_the_demo_answers_paris_leaves_no_process_and_needs_no_network(model: Model, tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "gets hot in the middle of an answer" in done.stdout
    assert "The nodes' answers equal those of one process" in done.stdout
    for device in ("laptop", "phone", "old-phone"):
        assert "needed: without it the model does not fit" in done.stdout
        assert device in done.stdout


def test_a_demo_that_takes_too_long_says_so_and_ends_its_nodes(model: Model, tmp_path: Path) -> None:
    done = demo(tmp_path, "--timeout", "2")
    assert done.returncode == 1
    assert "--timeout" in done.stderr
