"""A chat over real nodes, from plain code: what one process says, with only what is new computed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.models import tiny_chat_model
from tests.patience import LIMIT

from shoal import planner
from shoal.answering import Settings
from shoal.engine.batch import Sampling
from shoal.engine.errors import ContextError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.errors import NodeLostError
from shoal.nodes import Nodes, open_nodes
from shoal.processes import NodeSpec, RunningNode, nodes

pytestmark = pytest.mark.slow

LIVELY = Sampling(temperature=1.2, repetition_penalty=1.2, seed=9)
SETTINGS = Settings(context=200, sampling=LIVELY)
WORKLOAD = planner.Workload(context=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_chat_model(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def stage(model: Model) -> Iterator[Stage]:
    with Stage(model, 0, model.n_units) as opened:
        yield opened


@pytest.fixture
def running(model: Model, tmp_path: Path) -> Iterator[list[RunningNode]]:
    options = ("--measure-seconds", "0.01")
    specs = [NodeSpec(f"n{i}", ram_mb=300, options=options) for i in range(2)]
    with nodes(model.path, specs, tmp_path) as started:
        yield started


def fresh(stage: Stage, prompt: list[int], count: int) -> list[int]:
    return list(generate(stage, prompt, LIVELY, max_tokens=count, end=(), context=200))


def rows(engine: Nodes) -> int:
    reports, _ = engine.stats()
    return sum(report.stats.decode.rows + report.stats.prefill.rows for report in reports)


def test_turns_over_nodes_from_plain_code(model: Model, stage: Stage, running: list[RunningNode]) -> None:
    with open_nodes(model, [node.address for node in running], WORKLOAD) as engine:
        stages = len(engine.plan.stages)
        with closing(engine.session(SETTINGS)) as session:
            known: list[int] = []
            for turn in range(5):
                prompt, before = [*known, *range(20 + turn, 30 + turn)], rows(engine)
                answer = list(session.answer(prompt, max_tokens=5, end=()))
                assert answer == fresh(stage, prompt, 5)
                assert rows(engine) - before == stages * (10 + 4 + (1 if turn else 0))
                known = prompt + answer
            with pytest.raises(ContextError, match="the context holds 200"):
                list(session.answer([5] * 200, max_tokens=1, end=()))
            tokens = session.answer(known, max_tokens=100, end=())
            left = [next(tokens), next(tokens)]
            tokens.close()
            assert left == fresh(stage, known, 2)
            known += [7]
            assert list(session.answer(known, max_tokens=5, end=())) == fresh(stage, known, 5)


def test_a_node_that_dies_costs_no_token_and_the_last_ones_death_is_said(
    model: Model, stage: Stage, running: list[RunningNode]
) -> None:
    def kill(node: RunningNode) -> None:
        node.process.send_signal(signal.SIGKILL)
        node.process.wait()

    def all_die() -> None:
        with open_nodes(model, [node.address for node in running], WORKLOAD, wait=1.0) as engine:
            (holder,) = [node for node in running if node.spec.name == engine.plan.stages[0].device]
            (other,) = [node for node in running if node is not holder]
            with closing(engine.session(SETTINGS)) as session:
                known = list(range(20, 30))
                known += session.answer(known, max_tokens=5, end=())
                kill(holder)
                answer = list(session.answer(known, max_tokens=5, end=()))
                assert answer == fresh(stage, known, 5)
                kill(other)
                list(session.answer([*known, 7], max_tokens=5, end=()))

    with pytest.raises(NodeLostError):
        all_die()


def test_the_command_line_says_the_same_with_nodes(model: Model, running: list[RunningNode]) -> None:
    line = [sys.executable, "-m", "shoal", "run", str(model.path), "hello", "-n", "12", "--context", "200"]
    line += ["--temperature", "1.2", "--seed", "4", "--stats"]
    addresses = ",".join(f"{host}:{port}" for host, port in (node.address for node in running))
    alone, together = (
        subprocess.run([*line, *more], capture_output=True, text=True, timeout=LIMIT)
        for more in ((), ("--nodes", addresses))
    )
    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    assert alone.stdout == together.stdout != ""
    assert "one sequence" in together.stderr and "12 tokens" in together.stderr


def test_an_answer_of_this_process_loads_no_network_no_planner_and_no_converter(model: Model) -> None:
    heavy = {"trio", "shoal.planner", "pulp", "huggingface_hub", "shoal.sources", "shoal.engine.convert"}
    program = f"import sys; from shoal.cli import main; main(sys.argv[1:]); print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program, "run", str(model.path), "hello", "-n", "2"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
