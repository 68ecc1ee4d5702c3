"""Coordinator and nodes over memory streams with a fake stage: the tokens of one process; every refusal."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import trio
import trio.testing

from shoal.engine.batch import Sampling
from shoal.engine.errors import ContextError, ModelFileError, NoPlanError
from shoal.net.coordinator import Coordinator
from shoal.net.errors import MismatchError, NetError, NodeLostError
from shoal.net.liveness import Timing
from shoal.net.messages import Work
from shoal.net.placement import COORDINATOR, Links, NodeInfo, Placement, plan_at
from shoal.net.survey import survey
from shoal.planner import Assignment, LinkSpeed
from shoal.policy_enforcer import IDLE_SECONDS

PROMPTS = [[5], [1, 2, 3], list(range(20)), [96] * 41, [7, 0, 7, 0, 9]]


@pytest.mark.parametrize(
    "edges", [(0, 6), (0, 1, 6), (0, 3, 6), (0, 5, 6), (0, 2, 4, 6), (0, 1, 5, 6), (0, 1, 2, 5, 6)], ids=str
)
def test_tokens_are_those_of_one_process_for_every_cut(lab: ModuleType, edges: Sequence[int]) -> None:
    sampling = Sampling(temperature=0.8, seed=3)

    async def main() -> None:
        async with lab.network() as net:
            for i in range(len(edges) - 1):
                net.add(f"n{i}")
            async with net.coordinator(plan=plan_at(edges, 4)) as coordinator:
                for prompt in PROMPTS:
                    assert await lab.collect(coordinator, prompt, 12) == lab.oracle(prompt, 12)
                    got = await lab.collect(coordinator, prompt, 12, sampling=sampling)
                    assert got == lab.oracle(prompt, 12, sampling)

    lab.run(main)


def test_many_answers_at_once_are_batched_and_none_disturbs_another(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(0.01))
            async with net.coordinator(plan=plan_at((0, 2, 4, 6), 4), max_sessions=6) as coordinator:

                async def one(seed: int) -> None:
                    prompt = [seed] * (3 * seed + 1)
                    assert await lab.collect(coordinator, prompt, 10) == lab.oracle(prompt, 10)

                async with trio.open_nursery() as tasks:
                    for seed in range(10):
                        tasks.start_soon(one, seed)
                for node in net.nodes.values():
                    (stage,) = node.stages
                    assert max(len(batch) for batch in stage.batches) > 1
                    assert max(len({s for s, _, _ in batch}) for batch in stage.batches) <= 6
                    assert max(sum(n for _, _, n in batch) for batch in stage.batches) <= lab.OFFER.max_rows
                    assert max(n for batch in stage.batches for _, _, n in batch) == 4

    lab.run(main)


def test_a_node_whose_chain_is_slow_elsewhere_is_not_idle(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b", hop=lab.slow_hop(2 * IDLE_SECONDS))
            node = net.nodes[7001].node
            async with net.coordinator(plan=plan_at((0, 3, 6))) as coordinator, trio.open_nursery() as tasks:
                used = trio.current_time()

                async def watch() -> None:
                    nonlocal used
                    while True:
                        used = used if node.idle else trio.current_time()
                        assert trio.current_time() - used < IDLE_SECONDS
                        await trio.sleep(0.1)

                tasks.start_soon(watch)
                assert await lab.collect(coordinator, [1, 2], 4) == lab.oracle([1, 2], 4)
                tasks.cancel_scope.cancel()
            with trio.fail_after(10):
                async with net.coordinator(plan=plan_at((0, 3, 6))):
                    while not node.idle:  # noqa: ASYNC110
                        await trio.sleep(0.1)

    lab.run(main)


def test_an_answer_ends_like_that_of_one_process(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with net.coordinator(plan=plan_at((0, 3, 6), 4)) as coordinator:
                free = lab.oracle([1, 2], 30)
                assert (
                    await lab.collect(coordinator, [1, 2], 30, end=(free[7],)) == free[: free.index(free[7])]
                )
                assert await lab.collect(coordinator, [1, 2], 30, context=10) == lab.oracle(
                    [1, 2], 30, context=10
                )
                assert await lab.collect(coordinator, [1, 2], 0) == []
                assert await lab.collect(coordinator, [1] * 60, 99) == lab.oracle([1] * 60, 99)
                with pytest.raises(ContextError, match="64 tokens and the context holds 64"):
                    coordinator.generate([1] * 64, max_tokens=1)

    lab.run(main)


def test_a_session_that_is_left_frees_its_state_on_all_nodes(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=plan_at((0, 2, 4, 6), 4)) as coordinator:
                stages = [node.stages[0] for node in net.nodes.values()]
                async with coordinator.generate([1] * 50, max_tokens=10) as tokens:
                    await anext(tokens)
                    assert [len(stage.sequences) for stage in stages] == [1, 1, 1]
                await trio.testing.wait_all_tasks_blocked()
                assert [len(stage.sequences) for stage in stages] == [0, 0, 0]
                with trio.move_on_after(0) as scope:
                    await lab.collect(coordinator, [2] * 50, 10)
                assert scope.cancelled_caught
                await trio.testing.wait_all_tasks_blocked()
                assert [len(stage.sequences) for stage in stages] == [0, 0, 0]
                assert await lab.collect(coordinator, [3], 5) == lab.oracle([3], 5)

    lab.run(main)


def test_a_cancelled_reader_loses_no_token(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(3.0))
            async with (
                net.coordinator(plan=plan_at((0, 6))) as coordinator,
                coordinator.generate([4], max_tokens=6) as tokens,
            ):
                got: list[int] = []
                while len(got) < 6:
                    with trio.move_on_after(0.7):
                        got.append(await anext(tokens))
                assert got == lab.oracle([4], 6)

    lab.run(main)


def test_a_reader_that_is_cancelled_at_once_may_go_on(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            async with (
                net.coordinator(plan=plan_at((0, 6))) as coordinator,
                coordinator.generate([4], max_tokens=6) as tokens,
            ):
                with trio.move_on_after(0) as scope:
                    await anext(tokens)
                assert scope.cancelled_caught
                with trio.fail_after(5):
                    assert [token async for token in tokens] == lab.oracle([4], 6)

    lab.run(main)


def test_a_session_without_room_fails_alone(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b", room=30)
            async with net.coordinator(plan=plan_at((0, 3, 6), 4)) as coordinator:

                async def small() -> None:
                    assert await lab.collect(coordinator, [1, 2], 20) == lab.oracle([1, 2], 20)

                async with trio.open_nursery() as tasks:
                    tasks.start_soon(small)
                    with pytest.raises(ContextError, match="have filled"):
                        await lab.collect(coordinator, [3] * 40, 5)
                await trio.testing.wait_all_tasks_blocked()
                assert [len(node.stages[0].sequences) for node in net.nodes.values()] == [0, 0]

    lab.run(main)


@pytest.mark.slow
def test_the_plan_is_asked_with_what_was_measured_and_places_nodes_in_any_order(lab: ModuleType) -> None:
    asked: list[tuple[Sequence[NodeInfo], Links]] = []

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        asked.append((nodes, links))
        return Placement((Assignment("c", 0, 2), Assignment("a", 2, 6)), 1000)

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name)
            async with net.coordinator(plan=plan, measure_links=True) as coordinator:
                assert await lab.collect(coordinator, [1, 2, 3], 5) == lab.oracle([1, 2, 3], 5)
                assert [stage.node for stage in await coordinator.stats()] == ["c", "a"]
                assert coordinator.placement.chunk_rows == lab.OFFER.max_rows
                assert [node.label for node in coordinator.nodes] == ["a", "b", "c"]
                assert net.nodes[7002].stages == []

    lab.run(main)
    ((nodes, links),) = asked
    assert nodes == [NodeInfo(name, "host", 7001 + i, lab.OFFER) for i, name in enumerate("abc")]
    assert set(links) == {(s, t) for s in (*"abc", COORDINATOR) for t in (*"abc", COORDINATOR) if s != t}
    assert all(isinstance(link, LinkSpeed) for link in links.values())


def test_stats_count_the_work_of_each_stage_and_slow_stages_take_longer(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(0.5))
            net.add("b", hop=lab.slow_hop(2.0))
            async with net.coordinator(plan=plan_at((0, 2, 6), 4)) as coordinator:
                await lab.collect(coordinator, [1] * 8, 5)
                first, second = await coordinator.stats()
                assert (first.node, first.first, first.last, first.ram_bytes) == ("a", 0, 2, 1)
                assert (first.stats.prefill, second.stats.prefill) == (Work(2, 8, 1.0), Work(2, 8, 4.0))
                assert (first.stats.decode, second.stats.decode) == (Work(4, 4, 2.0), Work(4, 4, 8.0))

    lab.run(main)


def test_no_plan_is_the_coordinators_failure_and_the_nodes_stay(lab: ModuleType) -> None:
    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        raise NoPlanError("12 MB are missing")

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            with pytest.raises(NoPlanError, match="12 MB are missing"):
                async with net.coordinator(plan=plan):
                    pass
            with pytest.raises(NoPlanError, match="need 2 nodes and there are 1"):
                async with net.coordinator(plan=plan_at((0, 3, 6))):
                    pass
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
                assert await lab.collect(coordinator, [1], 3) == lab.oracle([1], 3)

    lab.run(main)


def test_a_survey_gives_a_node_nothing_to_do(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            options = lab.CoordinatorOptions(hop=lab.inline, open_stream=net.open_stream)
            addresses = [("host", 7001), ("host", 7002)]
            found = await survey(addresses, lab.identity("laptop", 9), lab.SHAPE, options)
            assert [node.label for node in found.nodes] == ["a", "b"]
            assert ("a", "b") in found.links and (COORDINATOR, "b") in found.links
            assert all(node.stages == [] for node in net.nodes.values())

    lab.run(main)


def test_another_model_is_refused_with_both_hashes(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b", model="bb" * 32)
            with pytest.raises(MismatchError) as caught:
                async with net.coordinator(plan=plan_at((0, 3, 6))):
                    pass
            assert "laptop (a peer) has the model aaaaaaaaaaaaaaaa, b has bbbbbbbbbbbbbbbb" in str(
                caught.value
            )

    lab.run(main)


def test_another_numerics_version_is_refused_with_both(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", identity=replace(lab.identity("a", 1), numerics=2))
            with pytest.raises(
                MismatchError, match=r"numerics version 1 .* has 2 .*: upgrade shoal on laptop \(a peer\)"
            ):
                async with net.coordinator(plan=plan_at((0, 6))):
                    pass

    lab.run(main)


def test_nobody_there_names_the_address(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            words = r"host:7009 cannot be reached \(Connection refused\)"
            with pytest.raises(NodeLostError, match=words):
                async with net.coordinator(7009, plan=plan_at((0, 6))):
                    pass
            with pytest.raises(NodeLostError, match=words + ".*; the other nodes .* need 2 nodes"):
                async with net.coordinator(7001, 7009, plan=plan_at((0, 3, 6))):
                    pass

    lab.run(main)


def test_somebody_who_never_greets_is_no_node(lab: ModuleType) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            net = lab.FakeNetwork(nursery)

            async def silent(host: str, port: int) -> trio.abc.Stream:
                here, net.there = trio.testing.memory_stream_pair()
                return here

            net.open_stream = silent
            with pytest.raises(NodeLostError, match="did not say Hello within 10 s"):
                async with net.coordinator(7001, plan=plan_at((0, 6))):
                    pass

    lab.run(main)


def test_a_stage_that_cannot_be_loaded_is_the_coordinators_error_with_the_nodes_name(lab: ModuleType) -> None:
    def broken(first: int, last: int) -> object:
        raise ModelFileError("unit-03.safetensors is missing")

    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b", open_stage=broken)
            with pytest.raises(ModelFileError, match=r"b: unit-03\.safetensors is missing"):
                async with net.coordinator(plan=plan_at((0, 3, 6))):
                    pass

    lab.run(main)


def test_a_node_that_another_cannot_reach_has_no_link_and_fails_in_a_chain(lab: ModuleType) -> None:
    seen: list[Links] = []

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        seen.append(links)
        return plan_at((0, 3, 6))(nodes, links)

    async def main() -> None:
        async with lab.network() as net:

            async def cannot(host: str, port: int) -> trio.abc.Stream:
                raise OSError(113, "No route to host")

            net.add("a", open_stream=cannot)
            net.add("b")
            timing = Timing(patience=5.0)  # it could be that the link is back soon
            with pytest.raises(
                NodeLostError, match=r"a: b \(host:7002\) cannot be reached \(No route to host\)"
            ):
                async with net.coordinator(plan=plan, measure_links=True, timing=timing):
                    pass

    lab.run(main)
    assert ("a", "b") not in seen[0] and ("b", "a") in seen[0]


def test_a_second_coordinator_is_refused_while_a_node_is_busy_and_served_after(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
                with pytest.raises(NetError, match="a is busy with laptop"):
                    async with net.coordinator(plan=plan_at((0, 6)), number=98):
                        pass
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)
            await trio.testing.wait_all_tasks_blocked()
            assert [stage.closed for stage in net.nodes[7001].stages] == [True]
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)

    lab.run(main)


def test_a_coordinator_that_follows_another_at_once_is_served(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a", hop=lab.slow_hop(1.0))
            for seed in range(3):
                async with (
                    net.coordinator(plan=plan_at((0, 6))) as coordinator,
                    coordinator.generate([seed], max_tokens=9) as tokens,
                ):
                    await anext(tokens)
                    await trio.sleep(0.5)  # the node computes the next one when the coordinator leaves
            assert [stage.closed for stage in net.nodes[7001].stages] == [True, True, False]

    lab.run(main)


def test_a_coordinator_that_hangs_is_lost_to_its_nodes(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            never = Timing(heartbeat=1e9, overdue=1e9, handshake=10)
            with pytest.raises(NodeLostError, match="it closed the connection"):
                async with net.coordinator(plan=plan_at((0, 6)), timing=never, recover=False):
                    await trio.sleep_forever()
            assert 10 <= trio.current_time() < 11
            assert net.nodes[7001].stages[0].closed
            assert "has said nothing for 10 s" in net.nodes[7001].log[-1]

    lab.run(main)


def test_heartbeats_keep_an_idle_chain_alive(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            net.add("b")
            async with net.coordinator(plan=plan_at((0, 3, 6))) as coordinator:
                await trio.sleep(60)
                assert await lab.collect(coordinator, [1], 5) == lab.oracle([1], 5)
                assert coordinator.recoveries == 0

    lab.run(main)


def test_the_failure_of_the_block_itself_comes_out_as_it_is(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            net.add("a")
            with pytest.raises(ZeroDivisionError):
                async with net.coordinator(plan=plan_at((0, 6))):
                    _ = 1 / 0

    lab.run(main)


@pytest.mark.parametrize("addresses", [[], [("host", 1), ("host", 1)]])
def test_a_coordinator_needs_addresses_each_once(lab: ModuleType, addresses: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="at least one address, and no address twice"):
        Coordinator(addresses, lab.identity("laptop", 1), lab.SHAPE, plan_at((0, 6)))
