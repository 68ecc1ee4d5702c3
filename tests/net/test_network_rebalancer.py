"""The rebalancer with the planner, as a coordinator has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.net.swarm import MODEL, question

from shoal.distributed import NetworkPlanner, NetworkRebalancer
from shoal.net.messages import Offer
from shoal.net.placement import COORDINATOR, NodeInfo, Outcome, Placement, Proposal, Usage
from shoal.planner import Plan, Workload

STREAMS = 4


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> NetworkPlanner:
    return planner_of(monkeypatch)


def planner_of(
    monkeypatch: pytest.MonkeyPatch, streams: int = STREAMS, context: int = 512, **options: Any
) -> NetworkPlanner:
    monkeypatch.setattr("shoal.distributed.planner_model", lambda model, options: MODEL)
    load = Workload(context, streams, streams=streams, depth=min(200, context))
    model: Any = None
    return NetworkPlanner(model, load, "throughput", **options)


ASKED = question(STREAMS)
NAMES = [device.name for device in ASKED.cluster.devices]
LINKS = {
    (COORDINATOR if a == "head" else a, COORDINATOR if b == "head" else b): link
    for (a, b), link in ASKED.cluster.links.items()
}


def nodes(names: Sequence[str] = NAMES, **slower: float) -> list[NodeInfo]:
    return [
        NodeInfo(
            d.name, "127.0.0.1", 7000 + at, Offer(d, 256, 1, "native", exact=True), slower.get(d.name, 1.0)
        )
        for at, d in enumerate(ASKED.cluster.devices)
        if d.name in names
    ]


def proposed(plans: NetworkPlanner, rebalancer: NetworkRebalancer, hot: str = "c") -> Proposal | None:
    """What is proposed within three seconds after a device has become slow."""
    placement = plans(nodes(), LINKS)
    for at in range(26):
        slower = {hot: 2.5} if at >= 20 else {}
        usage = Usage(STREAMS, 200, 1e5, 20 * at)
        found = rebalancer.look(nodes(**slower), LINKS, placement, usage, at / 2)
        if found is not None:
            assert at > 20
            return found
    return None


def test_a_proposal_is_a_whole_placement(plans: NetworkPlanner) -> None:
    rebalancer = NetworkRebalancer(plans)
    found = proposed(plans, rebalancer)
    assert found is not None
    placement = found.placement
    assert placement.stages[-1].last == len(MODEL.units)
    assert placement.groupings
    assert placement.window
    assert placement.context == 512
    plan = placement.detail
    assert isinstance(plan, Plan)
    assert plan.assignments == placement.stages
    assert placement.tokens_per_s == plan.tokens_per_s == pytest.approx(1 / found.seconds_after, rel=0.05)
    rebalancer.happened(Outcome(False))
    usage = Usage(STREAMS, 200, 1e5, 600)
    before = Placement(plans(nodes(), LINKS).stages, context=512)
    for at in range(26, 40):
        other = rebalancer.look(nodes(c=2.5), LINKS, before, usage, at / 2)
        assert other is None or other.placement.stages != placement.stages


def test_layers_that_the_user_has_given_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = planner_of(monkeypatch, layers=(7, 8, 8, 7))
    rebalancer = NetworkRebalancer(plans)
    assert proposed(plans, rebalancer, hot="b") is None
    assert rebalancer.copies(nodes(), LINKS, plans(nodes(), LINKS)) == {}


def test_the_room_is_that_of_the_plan_however_many_answers_share_it(plans: NetworkPlanner) -> None:
    """Sixteen short answers need no more room than the four long ones that were planned for."""
    rebalancer, placement = NetworkRebalancer(plans), plans(nodes(), LINKS)
    for at in range(26):
        slower = {"c": 2.5} if at >= 20 else {}
        usage = Usage(16, 100, 1e5, 60 * at)
        if rebalancer.look(nodes(**slower), LINKS, placement, usage, at / 2) is not None:
            return
    raise AssertionError("nothing was proposed")


def test_a_node_that_is_leaving_is_no_error(plans: NetworkPlanner) -> None:
    """It is not among the nodes, and has a stage still."""
    rebalancer, placement = NetworkRebalancer(plans), plans(nodes(), LINKS)
    there = nodes([name for name in NAMES if name != placement.stages[1].device])
    assert rebalancer.look(there, LINKS, placement, Usage(STREAMS, 200, 1e5, 0), 0.0) is None


def test_copies_are_of_what_neighbours_hold(plans: NetworkPlanner) -> None:
    rebalancer, placement = NetworkRebalancer(plans), plans(nodes(), LINKS)
    found = rebalancer.copies(nodes(), LINKS, placement)
    assert set(found) == {stage.device for stage in placement.stages}
    assert any(found.values())
    for stage in placement.stages:
        assert not set(found[stage.device]) & set(range(stage.first, stage.last))
    there = nodes([name for name in NAMES if name != placement.stages[1].device])
    assert rebalancer.copies(there, LINKS, placement) == {}


def test_answers_that_end_one_after_another_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for eight answers is not that for one, which may be followed by more for some seconds."""
    devices = question(8, (0.8, 0.5, 0.2, 0.2), (260_000_000,) * 4).cluster.devices
    there = [
        NodeInfo(d.name, "127.0.0.1", 7000 + at, Offer(d, 256, 1, "native", exact=True))
        for at, d in enumerate(devices)
    ]
    plans = planner_of(monkeypatch, streams=8, context=128)
    rebalancer, placement = NetworkRebalancer(plans), plans(there, LINKS)

    def look(at: int, streams: int) -> Proposal | None:
        return rebalancer.look(there, LINKS, placement, Usage(streams, 100, 1e5, 20 * at), at / 2)

    assert not any(look(at, 8 if at < 40 or at % 20 < 4 else 1) for at in range(120))
    later = [look(at, 1) for at in range(120, 160)]
    assert not any(later[:3])
    found = next(found for found in later if found is not None)
    assert found.seconds_before > 1.2 * found.seconds_after
