"""Nodes that end while answers run, as processes: their layers move to the others first, with their keys and
values, so that no answer changes and nothing is computed again."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from tests.patience import LIMIT

from shoal.cli import main as shoal
from shoal.cluster_view import coordinator_identity
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner import Assignment
from shoal.processes import NodeSpec, RunningNode, nodes

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
PROMPTS = (list(range(5, 45)), [7, 8, 9])
TOKENS, MIDST = 60, 15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("drain") / "tiny"
    assert shoal(["convert", str(TINY), str(path), "--dtype", "f32"]) == 0
    return Model.open(path)


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    with Stage(model, 0, model.n_units) as stage:
        return [list(generate(stage, prompt, max_tokens=TOKENS, end=())) for prompt in PROMPTS]


def evenly(units: int) -> Callable[[Sequence[NodeInfo], Links], Placement]:
    """Plans that use all nodes that they are asked for."""

    def plan(infos: Sequence[NodeInfo], links: Links) -> Placement:
        edges = [units * i // len(infos) for i in range(len(infos) + 1)]
        stages = zip(infos, edges, edges[1:], strict=False)
        return Placement(tuple(Assignment(node.label, first, last) for node, first, last in stages), 16)

    return plan


class Chain:
    """A chain of node processes, and what its coordinator says."""

    def __init__(self, running: Sequence[RunningNode], coordinator: Coordinator, said: list[str]) -> None:
        self.running, self.coordinator, self.said = running, coordinator, said

    async def answers(self, midst: Callable[[], Awaitable[None]]) -> list[list[int]]:
        """Answers to all prompts at once; `midst` is called in the midst of them."""
        found: list[list[int]] = [[] for _ in PROMPTS]

        async def answer(i: int) -> None:
            async with self.coordinator.generate(PROMPTS[i], max_tokens=TOKENS) as tokens:
                async for token in tokens:
                    found[i].append(token)
                    if i == 0 and len(found[i]) == MIDST:
                        await midst()

        async with trio.open_nursery() as tasks:
            for i in range(len(PROMPTS)):
                tasks.start_soon(answer, i)
        return found

    async def code(self, which: int) -> int:
        """The code with which a node ends."""
        with trio.fail_after(LIMIT):
            while self.running[which].process.poll() is None:  # noqa: ASYNC110 (it is another process)
                await trio.sleep(0.02)
        return self.running[which].process.wait()

    @property
    def holders(self) -> list[str]:
        return [stage.device for stage in self.coordinator.placement.stages]


def chained(
    model: Model,
    tmp_path: Path,
    test: Callable[[Chain], Awaitable[None]],
    *,
    options: Sequence[tuple[str, ...]] = ((), (), ()),
) -> None:
    specs = [
        NodeSpec(name, 300, slow=15, options=("--measure-seconds", "0.05", *more))
        for name, more in zip("abc", options, strict=False)
    ]

    async def main(running: Sequence[RunningNode]) -> None:
        said: list[str] = []
        settings = CoordinatorOptions(log=said.append, moves="move")
        who, addresses = coordinator_identity(model), [node.address for node in running]
        opening = Coordinator.open(addresses, who, shape_of(model), evenly(model.n_units), settings)
        with trio.fail_after(LIMIT):
            async with opening as coordinator:
                await test(Chain(running, coordinator, said))

    with nodes(model.path, specs, tmp_path) as running:
        trio.run(main, running)


def moved_only(chain: Chain, who: str) -> None:
    """Nothing was lost, and so nothing was computed again."""
    assert not any("is lost" in line for line in chain.said), chain.said
    assert any(f"{who} (127.0.0.1:" in line and "has left" in line for line in chain.said)
    moves = [move for move in chain.coordinator.moves if not move.aborted]
    assert moves and not any(move.moved.recovery or move.moved.lost[0] < move.moved.lost[1] for move in moves)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_node_that_is_told_to_end_in_mid_answer(
    model: Model, expected: list[list[int]], tmp_path: Path, which: int, number: signal.Signals
) -> None:
    async def test(chain: Chain) -> None:
        async def midst() -> None:
            chain.running[which].process.send_signal(number)

        assert await chain.answers(midst) == expected
        assert await chain.code(which) == 0
        assert chain.holders == [name for i, name in enumerate("abc") if i != which]
        with trio.fail_after(LIMIT):
            while not any("has left" in line for line in chain.said):  # noqa: ASYNC110
                await trio.sleep(0.02)
        moved_only(chain, "abc"[which])

    chained(model, tmp_path, test)
    log = (tmp_path / f"{'abc'[which]}.log").read_text()
    assert "have not moved" not in log and "Traceback" not in log


@pytest.mark.slow
def test_two_nodes_that_end_one_after_the_other_leave_all_to_the_third(
    model: Model, expected: list[list[int]], tmp_path: Path
) -> None:
    async def test(chain: Chain) -> None:
        async def midst() -> None:
            chain.running[0].process.send_signal(signal.SIGTERM)
            await trio.sleep(0.1)
            chain.running[2].process.send_signal(signal.SIGTERM)

        assert await chain.answers(midst) == expected
        assert await chain.code(0) == await chain.code(2) == 0
        assert chain.holders == ["b"]
        assert not any("is lost" in line for line in chain.said), chain.said

    chained(model, tmp_path, test)


@pytest.mark.slow
def test_a_node_of_an_idle_chain_leaves_as_well(
    model: Model, expected: list[list[int]], tmp_path: Path
) -> None:
    async def test(chain: Chain) -> None:
        chain.running[1].process.send_signal(signal.SIGTERM)
        assert await chain.code(1) == 0
        assert chain.holders == ["a", "c"]

        async def nothing() -> None:
            return

        assert await chain.answers(nothing) == expected
        moved_only(chain, "b")

    chained(model, tmp_path, test)


@pytest.mark.slow
def test_a_phone_whose_ram_runs_out_leaves_in_mid_answer_while_another_rests(
    model: Model, expected: list[list[int]], tmp_path: Path
) -> None:
    root = tmp_path / "phone"
    (root / "proc").mkdir(parents=True)
    meminfo = root / "proc" / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 3000000 kB\n")

    async def test(chain: Chain) -> None:
        slower = {node.label: node.slower for node in chain.coordinator.nodes}
        assert slower["c"] >= 4 * 0.5 * slower["a"]
        assert any("computes for at most 25% of the time" in line for line in chain.said)

        async def midst() -> None:
            meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 60000 kB\n")
            with trio.fail_after(LIMIT):
                while chain.holders != ["a", "c"]:  # noqa: ASYNC110
                    await trio.sleep(0.05)

        assert await chain.answers(midst) == expected
        assert await chain.code(1) == 0
        why = "programs can get 61.44 MB of RAM, less than 100 MB"
        assert any(line.startswith("b (") and line.endswith(f"is leaving: {why}") for line in chain.said)

    options = ((), ("--policy", "ram=100MB", "--power-files", str(root)), ("--policy", "time=25%"))
    chained(model, tmp_path, test, options=options)


@pytest.fixture(autouse=True)
def _no_process_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        assert str(tmp_path).encode() not in words
