"""A node dies in the middle of answers: they go on with the same tokens on the others."""

import random
from collections.abc import Sequence
from types import ModuleType

import pytest
import trio

from shoal.engine.batch import Sampling
from shoal.engine.errors import NoPlanError
from shoal.net.errors import NodeLostError
from shoal.net.liveness import Timing
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner import Assignment


def spread(nodes: Sequence[NodeInfo], links: Links) -> Placement:
    """As equal as can be over whoever is there."""
    n = len(nodes)
    edges = [6 * i // n for i in range(n + 1)]
    return Placement(
        tuple(Assignment(node.label, a, b) for node, a, b in zip(nodes, edges, edges[1:], strict=False)), 4
    )


@pytest.mark.parametrize("port", [7001, 7002, 7003])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_answer_survives_the_death_of_any_node(lab: ModuleType, port: int, after: int) -> None:
    sampling = Sampling(temperature=0.7, seed=11)

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=spread) as coordinator:
                async with coordinator.generate([3, 1, 4, 1, 5], sampling, max_tokens=20) as tokens:
                    got = [await anext(tokens) for _ in range(after)]
                    await net.kill(port)
                    got += [token async for token in tokens]
                assert got == lab.oracle([3, 1, 4, 1, 5], 20, sampling)
                assert coordinator.recoveries == 1
                assert [node.port for node in coordinator.nodes] == [
                    p for p in (7001, 7002, 7003) if p != port
                ]
                assert len(await coordinator.stats()) == 2

    lab.run(main)


def test_a_prompt_on_its_way_survives(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(1.0))
            async with net.coordinator(plan=spread) as coordinator, trio.open_nursery() as tasks:

                async def kill() -> None:
                    await trio.sleep(3.5)
                    await net.kill(7002)

                tasks.start_soon(kill)
                assert await lab.collect(coordinator, [9] * 40, 5) == lab.oracle([9] * 40, 5)
                assert coordinator.recoveries == 1

    lab.run(main)


@pytest.mark.slow
def test_deaths_at_random_times_never_change_an_answer(lab: ModuleType) -> None:
    rng = random.Random(5)

    async def once(deaths: list[tuple[float, int]]) -> int:
        async with lab.network() as net:
            for name in "abcd":
                net.add(name, hop=lab.slow_hop(0.01))
            async with net.coordinator(plan=spread) as coordinator, trio.open_nursery() as tasks:

                async def die(seconds: float, port: int) -> None:
                    await trio.sleep(seconds)
                    await net.kill(port)

                async def one(seed: int) -> None:
                    prompt, sampling = [seed] * (1 + 5 * seed), Sampling(seed=seed)
                    assert await lab.collect(coordinator, prompt, 15, sampling=sampling) == lab.oracle(
                        prompt, 15, sampling
                    )

                for death in deaths:
                    tasks.start_soon(die, *death)
                for seed in range(4):
                    tasks.start_soon(one, seed)
            return int(coordinator.recoveries)

    recoveries = 0
    for _ in range(8):
        ports = rng.sample([7001, 7002, 7003, 7004], rng.randint(1, 3))
        recoveries += lab.run(lambda ports=ports: once([(rng.random() * 0.4, port) for port in ports]))
    assert recoveries >= 8


def test_a_node_that_falls_silent_is_lost_soon_after_its_round_trip_is_known(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(0.04))
            async with net.coordinator(plan=spread) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=40) as tokens:
                    got = [await anext(tokens) for _ in range(20)]  # two and a half seconds
                    net.mute(7002)
                    got += await lab.with_gap(tokens, 2, 3)
                assert got == lab.oracle([1, 2], 40)
                assert [node.label for node in coordinator.nodes] == ["a", "c"]

    lab.run(main)


def test_a_broken_link_between_two_nodes_blames_the_next(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=spread) as coordinator:
                async with coordinator.generate([1, 2], max_tokens=12) as tokens:
                    got = [await anext(tokens)]
                    await trio.aclose_forcefully(net.nodes[7002].streams[-1])  # a's way to b, the newest
                    got += [token async for token in tokens]
                assert got == lab.oracle([1, 2], 12)
                assert [node.label for node in coordinator.nodes] == ["a", "c"]

    lab.run(main)


def test_without_recovery_a_loss_ends_the_coordinator_and_names_the_node(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)

            async def lose() -> None:
                async with net.coordinator(plan=spread, recover=False) as coordinator:
                    await net.kill(7002)
                    await lab.collect(coordinator, [1], 5)

            with pytest.raises(NodeLostError, match=r"b \(host:7002\) is lost"):
                await lose()
            async with net.coordinator(7001, 7003, plan=spread) as coordinator:
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)

    lab.run(main)


def test_when_the_others_cannot_hold_the_model_the_error_says_both(lab: ModuleType) -> None:
    def three(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        if len(nodes) < 3:
            raise NoPlanError("50 MB are missing")
        return spread(nodes, links)

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)

            async def lose() -> None:
                async with (
                    net.coordinator(plan=three) as coordinator,
                    coordinator.generate([1], max_tokens=9) as tokens,
                ):
                    await anext(tokens)
                    await net.kill(7003)
                    async for _ in tokens:
                        pass

            words = r"c \(host:7003\) is lost: .*; the other nodes cannot go on: 50 MB are missing"
            with pytest.raises(NodeLostError, match=words):
                await lose()

    lab.run(main)


def test_an_idle_chain_recovers_too(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "ab":
                net.add(name)
            timing = Timing(heartbeat=0.5, overdue=5, handshake=5)
            async with net.coordinator(plan=spread, timing=timing) as coordinator:
                await net.kill(7001)
                await trio.sleep(1)
                assert coordinator.recoveries == 1
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)

    lab.run(main)
