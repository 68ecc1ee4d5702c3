"""Nodes that are lost and come back, or are not there at first: answers wait or go on, and never change."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import trio

from shoal.engine.errors import ModelFileError, NoPlanError
from shoal.net.errors import NetError, NodeLostError
from shoal.net.liveness import Timing
from shoal.net.placement import Links, NodeInfo, Placement, Planner, plan_at
from shoal.planner import Assignment


def needing(least: int) -> Planner:
    """A planner that uses all nodes, and needs some number of them. More are faster."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        n = len(nodes)
        if n < least:
            raise NoPlanError(f"{least} nodes are needed and there are {n}")
        edges = [6 * i // n for i in range(n + 1)]
        ranges = zip(nodes, edges, edges[1:], strict=False)
        stages = tuple(Assignment(node.label, a, b) for node, a, b in ranges)
        return Placement(stages, 4, tokens_per_s=float(n))

    return plan


async def slowly(tokens: Any, seconds: float = 0.5) -> list[int]:
    """The rest of an answer, read slowly."""
    got = []
    async for token in tokens:
        got.append(token)
        await trio.sleep(seconds)
    return got


@pytest.mark.parametrize("restarted", [True, False], ids=["restarted", "woken"])
def test_an_answer_waits_for_a_node_that_the_model_needs(lab: ModuleType, restarted: bool) -> None:
    async def main() -> None:
        async with lab.network() as net:
            said: list[str] = []
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=needing(3), log=said.append) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=12) as tokens:
                    got = [await anext(tokens)]
                    if restarted:
                        await net.kill(7002)
                    else:
                        net.mute(7002)

                    async def back() -> None:
                        await trio.sleep(20)
                        net.unreachable.clear()
                        if restarted:
                            net.restart(7002)

                    async with trio.open_nursery() as tasks:
                        tasks.start_soon(back)
                        start = trio.current_time()
                        got += [token async for token in tokens]
                assert 20 <= trio.current_time() - start < 21
                assert got == lab.oracle([1, 2], 12)
            assert "b (host:7002)" in said[0]
            assert said[1:3] == ["waiting for nodes, 60 s at most", "b (host:7002) is back"]
            assert len(said) == 4 and said[3].startswith("filled layers 2-3 again (")

    lab.run(main)


def test_waiting_ends_with_the_reason(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "ab":
                net.add(name)

            async def lose() -> None:
                timing = Timing(patience=7.0)
                async with (
                    net.coordinator(plan=needing(2), timing=timing) as coordinator,
                    coordinator.generate([1], max_tokens=9) as tokens,
                ):
                    await anext(tokens)
                    await net.kill(7002)
                    async for _ in tokens:
                        pass

            with pytest.raises(
                NodeLostError, match=r"b \(host:7002\) is lost.*2 nodes are needed and there are 1"
            ):
                await lose()
            assert 7 <= trio.current_time() < 8

    lab.run(main)


def test_a_chain_that_lost_most_of_its_nodes_gets_them_back(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abcd":
                net.add(name)
            async with net.coordinator(plan=needing(1)) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=40) as tokens:
                    got = [await anext(tokens)]
                    for port in (7001, 7002, 7004):
                        await net.kill(port)
                    got += [await anext(tokens)]
                    assert [stage.device for stage in coordinator.placement.stages] == ["c"]
                    for port in (7001, 7002, 7004):
                        net.restart(port)
                    got += await slowly(tokens)
                assert got == lab.oracle([1, 2], 40)
                assert [stage.device for stage in coordinator.placement.stages] == ["a", "b", "c", "d"]

    lab.run(main)


def test_a_better_plan_interrupts_no_answer_for_a_small_gain(lab: ModuleType) -> None:
    def nearly(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        return replace(needing(1)(nodes, links), tokens_per_s=100.0 + len(nodes))

    async def main() -> None:
        async with lab.network() as net:
            for name in "ab":
                net.add(name)
            async with net.coordinator(plan=nearly) as coordinator:
                await net.kill(7002)
                await trio.sleep(1)
                net.restart(7002)
                await trio.sleep(60)
                assert [node.label for node in coordinator.nodes] == ["a", "b"]
                assert coordinator.recoveries == 1
                await net.kill(7001)  # now it is needed
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)

    lab.run(main)


def test_a_node_that_cannot_be_reached_at_first_joins_later(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            said: list[str] = []
            for name in "ab":
                net.add(name)
            net.unreachable.add(7002)
            async with net.coordinator(plan=needing(1), log=said.append) as coordinator:
                assert [node.label for node in coordinator.nodes] == ["a"]
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)
                net.unreachable.clear()
                await trio.sleep(8)
                assert [stage.device for stage in coordinator.placement.stages] == ["a", "b"]
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)
            assert "b (host:7002)" not in said[0] and "host:7002 cannot be reached" in said[0]
            assert said[0].endswith(": going on without it")
            assert said[1:3] == [
                "b (host:7002) has joined",
                "a plan with more nodes is better: changing to it",
            ]
            assert len(said) == 4 and said[3].startswith("moved layers 3-4 + LM head from a to b")

    lab.run(main)


def test_a_node_that_dies_while_it_is_measured_is_left_out(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)

            async def kill() -> None:
                await trio.sleep(0.1)
                await net.kill(7003)

            async with trio.open_nursery() as tasks:
                tasks.start_soon(kill)
                async with net.coordinator(plan=needing(1), measure_links=True) as coordinator:
                    assert [stage.device for stage in coordinator.placement.stages] == ["a", "b"]
                    assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)

    lab.run(main)


def test_a_node_that_cannot_load_its_stage_is_left_out(lab: ModuleType) -> None:
    def broken(first: int, last: int) -> object:
        raise ModelFileError("unit-03.safetensors is missing")

    async def main() -> None:
        async with lab.network() as net:
            said: list[str] = []
            net.add("a")
            net.add("b", open_stage=broken)
            net.add("c")
            async with net.coordinator(plan=needing(2), log=said.append) as coordinator:
                assert [stage.device for stage in coordinator.placement.stages] == ["a", "c"]
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)
                await trio.sleep(10)  # it is the same process, with the same fault
                assert coordinator._state.epoch.counter == 2 and coordinator.recoveries == 0
            assert said == ["b: unit-03.safetensors is missing"]

    lab.run(main)


def test_a_node_that_is_busy_is_left_out_and_used_when_it_is_free(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with net.coordinator(7002, plan=needing(1)):
                async with net.coordinator(7001, 7002, plan=needing(1), number=98) as second:
                    assert [node.label for node in second.nodes] == ["a"]
                start = trio.current_time()
                with pytest.raises(NetError, match="b is busy with laptop") as caught:
                    async with net.coordinator(7002, plan=needing(1), number=97):
                        pass
                assert caught.value.exit_code == 13 and 4.9 < trio.current_time() - start < 5.1

    lab.run(main)


@pytest.mark.slow
def test_links_that_share_no_end_are_measured_at_once(lab: ModuleType) -> None:
    async def measured(count: int) -> float:
        async with lab.network() as net:
            for i in range(count):
                net.add(f"n{i}")
            start = trio.current_time()
            async with net.coordinator(plan=plan_at((0, 6)), measure_links=True) as coordinator:
                assert len(coordinator.links) == count * (count + 1)
            return trio.current_time() - start

    one = lab.run(lambda: measured(1))
    # A node measures its links one after another, two with each other node. In turn it would be 9 and 25.
    assert lab.run(lambda: measured(3)) < 6.1 * one
    assert lab.run(lambda: measured(5)) < 15 * one
