"""What is measured while a chain works: rows for the next plan, and a plan that follows them."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import trio
from tests.patience import LIMIT

from shoal.cluster_view import cluster_of
from shoal.engine.batch import Want
from shoal.net.chain_pace import ChainPace
from shoal.net.connection import in_thread
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.dial import open_tcp
from shoal.net.inbox import Batch
from shoal.net.liveness import Timing
from shoal.net.members import ClusterState, Member
from shoal.net.messages import Epoch, Pace, Pong, Step
from shoal.net.node import Node
from shoal.net.pace import NodePace, Onward, row_bytes
from shoal.net.placement import COORDINATOR, Links, NodeInfo, Placement
from shoal.planner import (
    Assignment,
    LinkSpeed,
    ModelCosts,
    Plan,
    Question,
    Unit,
    Workload,
    plan,
)
from shoal.planning import stage_expectation

EPOCH = Epoch(1, 1)
LAYER = Unit("layer", 2_000_000, 2_000_000, 0, 0, 0, 8)
UNITS = ModelCosts((LAYER, *[LAYER] * 4, LAYER))  # 2 ms each on the fake nodes, which read 1 GB/s
BY_ROWS = ModelCosts((replace(LAYER, macs=2_000_000),) * 6)
"""Rows that share a call win nothing here, so streams go faster over several nodes."""


def batch(rows: int = 1, first: int = 0) -> Batch:
    return Batch((), (Step(1, EPOCH, first, (5,) * rows, Want.TOKEN),))


def test_a_node_compares_its_steps_with_its_offer() -> None:
    asked: list[tuple[list[tuple[int, int, bool]], float]] = []

    def expect(steps: Sequence[tuple[int, int, bool]], pause: float) -> float:
        asked.append((list(steps), pause))
        return 0.010

    pace = NodePace()
    pace.assigned(expect)
    pace.count(batch(), 1.0, 9.0)  # the first step of a stage: pages are new
    assert (pace.slower, asked) == (1.0, [])
    pace.count(batch(3, 7), 9.5, 9.530)
    assert asked == [([(3, 7, True)], pytest.approx(0.5))]
    assert pace.slower == pytest.approx(1.2)  # a tenth of the way to 3
    pace.count(Batch((), ()), 10.0, 11.0)
    for at in range(100):
        pace.count(batch(), 20.0 + at, 20.030 + at)
    assert pace.slower == pytest.approx(3.0, rel=1e-3)
    pace.assigned(None)  # another stage, of which nobody knows what it should take
    pace.count(batch(), 1.0, 2.0)
    pace.count(batch(), 2.0, 4.0)
    assert pace.slower == pytest.approx(3.0, rel=1e-3)


def test_a_node_that_has_changed_for_good_is_known_after_six_calls() -> None:
    pace = NodePace()
    pace.assigned(lambda steps, pause: 0.010)
    now = 0.0

    def call(seconds: float, rows: int = 1) -> None:
        nonlocal now
        pace.count(batch(rows), now, now + seconds)
        now += seconds

    call(0.3)
    for _ in range(20):
        call(0.010)
    for seconds in (0.026, 0.010, 0.024, 0.025, 0.026, 0.027, 0.024):  # the second one was as before
        call(seconds)
    assert 1.5 < pace.slower < 2.0
    call(0.026)
    assert pace.slower == pytest.approx(2.55)
    for _ in range(6):
        call(0.009)
    assert pace.slower == pytest.approx(0.9)
    for at in range(40):  # prompts are not predicted so well
        call(0.010 if at % 4 == 3 else 0.020, rows=1 if at % 4 == 3 else 50)
        assert pace.slower < 2.0


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_change(seed: int) -> None:
    rng, pace = random.Random(seed), NodePace()
    pace.assigned(lambda steps, pause: 0.010)
    now = 0.0
    for _ in range(3000):
        seconds = 0.010 * rng.uniform(0.8, 1.25)
        pace.count(batch(), now, now + seconds)
        now += seconds
        assert 0.9 < pace.slower < 1.15


def test_what_a_stage_should_take_is_what_its_rows_say(lab: ModuleType) -> None:
    device = replace(lab.OFFER.device, step_overhead_s=0.001, idle_overhead_s=0.004)
    expect = stage_expectation(UNITS, device)(1, 4)
    assert expect([(1, 30, True)], 0.0) == pytest.approx(0.007)
    assert expect([(1, 30, True), (1, 5, True)], 0.1) == pytest.approx(0.011)


def test_pings_behind_rows_tell_latency_and_rate() -> None:
    rows = [Step(1, EPOCH, 0, (), Want.TOKEN, np.zeros((2, 1000), np.float32))]
    size = row_bytes(rows[0])
    assert size == pytest.approx(8000, abs=100)
    connection = Onward(LinkSpeed(0.002, 1e6, 0.003))
    for at in range(300):
        nonce = connection.due(rows, float(at))
        assert nonce is not None
        assert connection.due(rows, at + 0.1) is None  # not so often
        connection.answered(nonce + 1, at + 0.2)  # not its answer
        assert connection.measured is not None
        connection.answered(nonce, at + 0.020 + connection.measured.latency_s)
    measured = connection.measured
    assert measured is not None
    # 20 ms for what took 10: the larger part, the bytes, takes more of the blame
    assert measured.latency_s + size / measured.bytes_per_s == pytest.approx(0.020, rel=1e-3)
    assert 0.002 < measured.latency_s < 0.004
    assert measured.bytes_per_s < 0.5e6
    assert measured.latency_p95_s == pytest.approx(1.5 * measured.latency_s)
    unknown = Onward(None)
    assert unknown.due(rows, 0.0) is None
    assert unknown.measured is None


def test_the_coordinator_keeps_what_it_hears_of_the_current_epoch() -> None:
    old = LinkSpeed(0.002, 1e6)
    links = dict.fromkeys(((COORDINATOR, "a"), ("a", COORDINATOR), ("a", "b"), ("b", "a")), old)
    state = ClusterState(
        (Member("h", 1, label="a"), Member("h", 2, label="b")),
        6,
        EPOCH,
        placement=Placement((Assignment("a", 0, 3), Assignment("b", 3, 6))),
    )
    pace = ChainPace(links)
    nonce = pace.pinged(0, 10.0)
    new = LinkSpeed(0.008, 2e6, 0.009)
    pace.answered(state, 0, Pong(nonce, Pace(EPOCH, 2.5, new)), 10.008)  # 4 ms each way instead of 2
    assert pace.slower("a") == 2.5
    assert pace.slower("b") == 1.0
    assert links["a", "b"] == new
    assert links["b", "a"] == replace(new, bytes_per_s=1e6)
    assert links[COORDINATOR, "a"].latency_s == links["a", COORDINATOR].latency_s == pytest.approx(0.0022)
    before = dict(links)
    pace.answered(state, 0, Pong(nonce + 1, Pace(Epoch(1, 0), 9.0, old)), 11.0)
    assert (pace.slower("a"), links) == (2.5, before)
    assert pace.answered(state, 0, Pong(pace.pinged(0, 12.0)), 12.5, fetching=True)
    assert links == before, "the ping has waited behind files"


def follow(plans: list[Plan]) -> Callable[[Sequence[NodeInfo], Links], Placement]:
    """A coordinator's plan by the planner, for the fake model's units; keeps the plans."""

    def place(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        question = Question(BY_ROWS, cluster_of(nodes, links), Workload(64, 4, 1, 4), "throughput")
        found = plan(question, method="dp")
        assert isinstance(found, Plan)
        plans.append(found)
        return Placement(found.assignments, 4)

    return place


class Clock:
    """Steps in a thread that take `factor` times what the offer says."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.lock = threading.Lock()

    async def hop(self, call: Callable[[], Any], /) -> Any:
        def slow() -> Any:
            stage = getattr(getattr(call, "func", None), "__self__", None)
            if hasattr(stage, "do"):  # a step, not the loading of a stage
                inner, (batch,) = stage._stage, call.args
                rows = sum(step.rows for step in batch.steps)
                time.sleep(0.002 * rows * (inner.last - inner.first) * self.factor)
            return call()

        return await in_thread(slow)


async def serve(node: Node, listeners: list[trio.SocketListener], scope: trio.CancelScope) -> None:
    with scope:
        await node.serve(listeners)


@pytest.mark.slow
@pytest.mark.alone
def test_a_node_that_gets_hot_has_fewer_layers_in_the_next_plan(lab: ModuleType) -> None:
    """Real sockets and threads. Of three equal nodes one gets four times as slow at work; another dies."""
    plans: list[Plan] = []
    clocks = {name: Clock() for name in "abc"}
    scopes: dict[str, trio.CancelScope] = {}

    async def main() -> None:
        async with trio.open_nursery() as tasks:
            net, addresses = lab.FakeNetwork(tasks), {}
            for at, name in enumerate("abc"):
                net.add(name)
                parts = replace(
                    net.nodes[7001 + at].parts,
                    hop=clocks[name].hop,
                    open_stream=open_tcp,
                    expect=stage_expectation(BY_ROWS, lab.OFFER.device),
                )
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                addresses[name] = listeners[0].socket.getsockname()[:2]
                scopes[name] = trio.CancelScope()
                tasks.start_soon(serve, Node(parts), listeners, scopes[name])
            options = CoordinatorOptions(timing=Timing(heartbeat=0.05))
            identity = lab.identity("laptop", 9)
            async with Coordinator.open(
                list(addresses.values()), identity, lab.SHAPE, follow(plans), options
            ) as coordinator:

                async def answers(count: int) -> None:
                    async with trio.open_nursery() as some:
                        for seed in range(4):
                            some.start_soon(one, seed, count)

                async def one(seed: int, count: int) -> None:
                    assert await lab.collect(coordinator, [seed + 1], count) == lab.oracle([seed + 1], count)

                await answers(10)
                first = layers(plans[-1])
                assert sorted(first.values()) == [2, 2, 2]
                calm = {node.label: node.slower for node in coordinator.nodes}
                assert all(0.5 < slower < 2.0 for slower in calm.values())
                hot, dies = plans[-1].stages[0].device, plans[-1].stages[1].device
                clocks[hot].factor = 4.0
                await answers(50)
                slower = {node.label: node.slower for node in coordinator.nodes}
                assert slower[hot] > 2.0 * max(slower[name] for name in slower if name != hot)
                scopes[dies].cancel()
                await answers(5)
                assert coordinator.recoveries == 1
                after = layers(plans[-1])
                (other,) = set("abc") - {hot, dies}
                assert after.get(hot, 0) <= 1 < after[other]
            tasks.cancel_scope.cancel()

    def layers(found: Plan) -> dict[str, int]:
        return {stage.device: stage.last - stage.first for stage in found.stages}

    async def limited() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(limited)
