"""A node whose stage does not return, as a process: it says so, is left out, and ends when it is told to."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from tests.patience import LIMIT

from shoal.cli import main
from shoal.cluster_view import coordinator_identity
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.errors import StageStuckError
from shoal.net.identity import shape_of
from shoal.net.placement import plan_at
from shoal.processes import NodeSpec, nodes

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """No other process gets the lock of a file meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_a_stuck_stage_leaves_the_chain_and_sigterm_ends_its_node(tmp_path: Path) -> None:
    """An option of the lab, by which nodes compute in turns, makes a stage wait for a lock."""
    path, turns = tmp_path / "tiny", tmp_path / "turns"
    assert main(["convert", str(TINY), str(path), "--dtype", "f32"]) == 0
    model, prompt, said = Model.open(path), [5, 6, 7], list[str]()
    with Stage(model, 0, model.n_units) as stage:
        expected = list(generate(stage, prompt, max_tokens=20, end=()))
    options = ("--measure-seconds", "0.05", "--slow-turns", str(turns))
    specs = [NodeSpec(name, 300, options=options[: 4 if name == "b" else 2]) for name in "abc"]

    async def ask(addresses: list[tuple[str, int]]) -> None:
        who, plan = coordinator_identity(model), plan_at((0, 2, model.n_units))
        options = CoordinatorOptions(log=said.append)
        async with Coordinator.open(addresses, who, shape_of(model), plan, options) as coordinator:

            async def answer() -> list[int]:
                async with coordinator.generate(prompt, max_tokens=20) as tokens:
                    return [token async for token in tokens]

            assert await answer() == expected  # first calls have a longer bound
            with held(turns):
                start = time.monotonic()
                assert await answer() == expected
                assert time.monotonic() - start > 3
                assert [node.label for node in coordinator.nodes] == ["a", "c"]
                running[1].process.send_signal(signal.SIGTERM)
                assert (
                    await trio.to_thread.run_sync(running[1].process.wait, LIMIT) == StageStuckError.exit_code
                )

    with nodes(path, specs, tmp_path) as running:
        trio.run(ask, [node.address for node in running])
        running[0].process.send_signal(signal.SIGTERM)
        assert running[0].process.wait(LIMIT) == 0
    assert any("a call of" in line and "stage" in line for line in said)
    words = "a call of the stage has not returned for"
    log = (tmp_path / "b.log").read_text().splitlines()
    assert any(words in line for line in log[:-1])
    assert any(line.startswith("thread stage is in _locked (slow.py:") for line in log)
    assert words in log[-1] and log[-1].startswith("shoal: error: ")
