"""A node whose model files are damaged while it serves: it says so, and the others go on without it."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import trio

from shoal.engine.batch import Result, Run
from shoal.engine.errors import ModelFileError
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner import Assignment

TRUNCATED = "unit-002.safetensors was truncated while it was in use"


def spread(nodes: Sequence[NodeInfo], links: Links) -> Placement:
    n = len(nodes)
    edges = [6 * i // n for i in range(n + 1)]
    ranges = zip(nodes, edges, edges[1:], strict=False)
    return Placement(tuple(Assignment(node.label, a, b) for node, a, b in ranges), 4)


@pytest.mark.parametrize("port", [7001, 7002, 7003])
def test_a_truncated_file_ends_a_stage_and_not_an_answer(lab: ModuleType, port: int) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=spread) as coordinator:
                async with coordinator.generate([3, 1, 4], max_tokens=20) as tokens:
                    got = [await anext(tokens) for _ in range(5)]
                    damage(net.nodes[port])
                    got += [token async for token in tokens]
                assert (got, coordinator.recoveries) == (lab.oracle([3, 1, 4], 20), 1)
                assert net.nodes[port].stages[0].closed
                await trio.testing.wait_all_tasks_blocked()

    lab.run(main)


def damage(node: Any) -> None:
    """From now on no stage of the node runs or is loaded."""

    def run(batch: Sequence[Run]) -> list[Result]:
        raise ModelFileError(TRUNCATED)

    for stage in node.stages:
        stage.run = run
