"""The rebalancer with the planner, as a coordinator has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.net.swarm import MODEL, question

from shoal.cluster_view import cluster_of
from shoal.engine.errors import NoPlanError
from shoal.net.messages import Offer
from shoal.net.placement import (
    COORDINATOR,
    FilesMissingError,
    NodeInfo,
    Outcome,
    Placement,
    Proposal,
    Usage,
)
from shoal.network_planner import NetworkPlanner
from shoal.network_rebalancer import NetworkRebalancer
from shoal.planner import LinkSpeed, Plan, Workload

STREAMS = 4


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> NetworkPlanner:
    return planner_of(monkeypatch)


def planner_of(
    monkeypatch: pytest.MonkeyPatch, streams: int = STREAMS, context: int = 512, **options: Any
) -> NetworkPlanner:
    monkeypatch.setattr("shoal.network_planner.planner_model", lambda model, options: MODEL)
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


def test_plans_of_a_head_come_without_reasons_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for explain in (True, False):
        plans = planner_of(monkeypatch, explain=explain)
        stages = plans(nodes(), LINKS).stages
        assert plans.plan is not None and plans.plan.assignments == stages
        found.append((stages, bool(plans.plan.reasons)))
    assert found == [(stages, True), (stages, False)]


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


def lacking(**held: range) -> list[NodeInfo]:
    return [
        replace(node, held=frozenset(held[node.label]) if node.label in held else None) for node in nodes()
    ]


def test_plans_keep_to_what_is_held_and_the_target_does_not(plans: NetworkPlanner) -> None:
    free, units = plans(nodes(), LINKS), len(MODEL.units)
    assert free.target == {}
    target = {stage.device: tuple(range(stage.first, stage.last)) for stage in free.stages}
    assert set(target) == {"a", "b", "c"}
    # Without c's files another plan is as good, so nothing is to be fetched.
    same = plans(lacking(c=range(0)), LINKS)
    assert {stage.device for stage in same.stages} == set(same.target) == {"a", "b", "d"}

    def there(**slower: float) -> list[NodeInfo]:
        return [replace(node, slower=slower.get(node.label, 1.0)) for node in lacking(c=range(0))]

    worse = plans(there(d=3.0), LINKS)
    assert {stage.device for stage in worse.stages} == {"a", "b", "d"}
    assert worse.target == target
    # A target that is still nearly the best stays, and one that is not is given up.
    assert plans(there(d=3.0, c=1.05), LINKS).target == target
    assert "c" not in plans(there(d=1.2, c=6.0), LINKS).target
    assert plans(nodes(), LINKS).target == {}
    with pytest.raises(FilesMissingError, match="no device has the files of embedding yet") as missing:
        plans(lacking(**dict.fromkeys(NAMES, range(1, units))), LINKS)
    assert len(missing.value.target) == 3


def test_no_proposal_gives_layers_to_a_node_without_their_files(plans: NetworkPlanner) -> None:
    """The devices hold the files of their stages, and no others."""
    stages = {stage.device: range(stage.first, stage.last) for stage in plans(nodes(), LINKS).stages}
    stages["d"] = range(0)
    rebalancer, placement = NetworkRebalancer(plans), plans(lacking(**stages), LINKS)
    for at in range(40):
        there = [
            replace(node, slower=2.5 if at >= 20 and node.label == "c" else 1.0) for node in lacking(**stages)
        ]
        found = rebalancer.look(there, LINKS, placement, Usage(STREAMS, 200, 1e5, 20 * at), at / 2)
        assert found is None
    assert any(rebalancer.copies(lacking(**stages), LINKS, placement).values())  # they are worth fetching


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


def test_private_ends_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first device gets hot: it gives layers and keeps the end, unless all others are at home, too."""

    def look(home: Sequence[str], hot: str, missing: str = "") -> Proposal | None:
        plans = planner_of(monkeypatch, private="always")
        there = [replace(node, home=node.label in home) for node in nodes()]
        placement = plans(there, LINKS)
        assert placement.private
        rebalancer = NetworkRebalancer(plans)
        for at in range(40):
            now = [replace(node, slower=2.5 if node.label == hot and at >= 20 else 1.0) for node in there]
            usage = Usage(STREAMS, 200, 1e5, 20 * at)
            here = [node for node in now if node.label != missing]
            found = rebalancer.look(here, LINKS, placement, usage, at / 2)
            if found is not None:
                assert found.placement.private
                assert {found.placement.stages[i].device for i in (0, -1)} <= set(home)
                return found
        return None

    ends = [plan.device for plan in planner_of(monkeypatch)(nodes(), LINKS).stages]
    found = look((ends[0], ends[-1]), ends[0])
    assert found is not None
    assert look((ends[0], ends[-1]), ends[0], missing=ends[-1]) is None
    assert look(NAMES, ends[0]) is not None


@pytest.mark.parametrize(
    ("host", "name", "beside"),
    [("10.0.0.2", "b", "a"), ("127.0.0.1", "b", "a"), ("127.0.0.1", "x", "b")],
)
def test_a_device_that_calls_itself_a_second_range_gets_no_end(
    monkeypatch: pytest.MonkeyPatch, host: str, name: str, beside: str
) -> None:
    """It may lie, or its first range may be away while a node of this device has the same name."""
    there = {node.label: replace(node, home=node.label == "a") for node in nodes()}
    second = replace(there["b"].offer.device, ram_bytes=60_000_000, name=name, beside=beside)
    there["b"] = replace(there["b"], host=host, offer=replace(there["b"].offer, device=second))
    assert "b" not in [stage.device for stage in planner_of(monkeypatch)([*there.values()], LINKS).stages]
    with pytest.raises(NoPlanError, match="no plan has both on a"):
        planner_of(monkeypatch, private="always")([*there.values()], LINKS)


def test_a_second_range_is_used_however_little_it_promises() -> None:
    """That of a small model, which a node that runs no layers may promise, too."""
    first, second, *_ = nodes()
    for beside, expected in ((first.offer.device.name, ["", first.label]), ("", [""])):
        device = replace(second.offer.device, ram_bytes=700_000, beside=beside)
        end = replace(second, host=first.host, home=first.home, offer=replace(second.offer, device=device))
        assert [one.beside for one in cluster_of([first, end], LINKS).devices] == expected


def test_nodes_that_are_reached_under_one_address_share_a_machine(plans: NetworkPlanner) -> None:
    apart = [replace(node, host=node.label) for node in nodes()]
    hosts = cluster_of([*nodes()[:2], *apart[2:]], LINKS).hosts
    first, second, *others = (hosts[node.label] for node in nodes())
    assert first == second not in others
    quick = dict.fromkeys(LINKS, LinkSpeed(1e-4, 1e9))
    one, several = (plans(found, quick) for found in (nodes(), apart))
    assert one.stages == several.stages, "plans do not depend on it"
    assert one.groupings[1].groups < several.groupings[1].groups
