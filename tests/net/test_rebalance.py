"""The rebalancer: when it proposes to move layers, which, and what it learns from the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from tests.net.swarm import PHONES, ROOM, Factors, Swarm, fresh, question

from shoal.net.placement import Outcome, Usage
from shoal.net.rebalance import BUDGET, MINUTE, VAIN_SECONDS, Memory, View, expected_tokens, happened, look
from shoal.net.trials import distance
from shoal.planner import Assignment, LinkSpeed

UNEQUAL = (0.8, 0.5, 0.2, 0.2)


def drops(name: str, factor: float = 2.5, since: float = 10.0, until: float = 1e9) -> Factors:
    def factors(now: float) -> Mapping[str, float]:
        return {name: factor} if since <= now < until else {}

    return factors


def swings(name: str, half: float, factor: float = 2.5) -> Factors:
    def factors(now: float) -> Mapping[str, float]:
        return {name: factor} if int(now / half) % 2 else {}

    return factors


@pytest.mark.parametrize(
    ("made", "most", "expected"), [(0, 512, 64), (0, 10, 10), (100, 512, 100), (500, 512, 12), (12, 12, 0)]
)
def test_a_long_answer_is_expected_to_last(made: int, most: int, expected: int) -> None:
    assert expected_tokens(made, most) == expected


@pytest.mark.slow
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    ("speeds", "rooms"), [((0.5, 0.4, 0.4, 0.4), (ROOM,) * 4), PHONES], ids=["alike", "phones"]
)
def test_a_device_that_drops_to_40_percent_costs_little_after_five_seconds(
    speeds: Sequence[float], rooms: Sequence[int], streams: int, at: int
) -> None:
    """Whichever device of the chain it is: after 5 s the chain is about as fast as a new plan. That of the
    phones' quickest device exchanges the ends of the chain, and no device has room for both of its stages in
    the middle of such a change: it takes three. For one stream, what a new plan gains is not worth them."""
    asked = question(streams, speeds, rooms)
    tight = (speeds, rooms) == PHONES and at == 2
    part = 0.87 if tight and streams == 1 else 0.92
    name = fresh(asked).stages[at].device
    swarm, without = (Swarm(asked, drops(name), moves=moves) for moves in (True, False))
    swarm.run(15)
    new = fresh(asked, {name: 2.5}).tokens_per_s
    assert swarm.rate() >= part * new
    assert len(swarm.changes) <= (3 if tight else 2)
    without.run(15)
    assert swarm.run(60) >= min(part, 0.97 * new / without.rate()) * without.run(60)


def test_layers_of_the_slowest_stage_of_many_streams_are_worth_most() -> None:
    """c holds a third of the layers, and paces all others."""
    asked = question(4)
    swarm, without = (Swarm(asked, drops("c"), moves=moves) for moves in (True, False))
    swarm.run(40)
    without.run(40)
    assert swarm.run(20) >= 1.32 * without.run(20)
    ((when, proposal),) = swarm.changes
    assert 11 <= when <= 12
    assert proposal.why == "c takes 2.4 times as long as offered"
    assert proposal.seconds_before / proposal.seconds_after > 1.32
    assert proposal.bytes > 0


@pytest.mark.slow
def test_a_device_that_recovers_gets_its_layers_back() -> None:
    asked = question(4, UNEQUAL)
    name = fresh(asked).stages[1].device
    swarm = Swarm(asked, drops(name, factor=8, until=40))
    swarm.run(90)
    assert swarm.rate() >= 0.92 * fresh(asked).tokens_per_s


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("streams", [1, 4])
def test_nothing_moves_in_ten_minutes_of_steady_devices(streams: int, noise: float) -> None:
    swarm = Swarm(question(streams, UNEQUAL), noise=noise, seed=streams)
    swarm.run(600)
    assert swarm.changes == []


@pytest.mark.slow
@pytest.mark.parametrize("half", [5.0, 10.0, 25.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_device_that_swings_makes_one_change_a_swing_at_most_and_no_harm(half: float, noise: float) -> None:
    asked = question(4, UNEQUAL)
    name = fresh(asked).stages[0].device
    swarm, without = (
        Swarm(asked, swings(name, half, 4.0), noise if moves else 0.0, moves=moves) for moves in (True, False)
    )
    assert swarm.run(200) >= 0.97 * without.run(200)
    assert 1 <= len(swarm.changes) <= 200 / half
    for swing in range(int(200 / half)):
        assert sum(swing * half <= when < (swing + 1) * half for when, _ in swarm.changes) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("at", "noise"), [(1, 0.0), (2, 0.05)])
def test_the_way_back_is_as_easy_as_the_way_there(at: int, noise: float) -> None:
    """What is lost without it, while the device is quick, is less than other changes have to gain."""
    asked = question(4, (0.5, 0.4, 0.4))
    start = fresh(asked).assignments
    swarm, without = (
        Swarm(asked, swings(start[at].device, 10.0, 1.6), noise if moves else 0.0, moves=moves)
        for moves in (True, False)
    )
    assert swarm.run(89) >= 1.03 * without.run(89)
    assert [int(when / 10) for when, _ in swarm.changes] == list(range(1, 9))  # one a swing
    assert all(when % 10 <= 1.6 for when, _ in swarm.changes)
    assert all(proposal.placement.stages == start for _, proposal in swarm.changes[1::2])


@pytest.mark.slow
def test_of_changes_that_are_nearly_as_good_one_keeps_the_device_that_swings_in_use() -> None:
    """Without a stage it is not measured, and its layers do not return."""
    asked = question(4, *PHONES)
    name = fresh(asked).stages[1].device
    swarm, without = (Swarm(asked, swings(name, 10.0), moves=moves) for moves in (True, False))
    assert swarm.run(120) >= 1.03 * without.run(120)
    for _, proposal in swarm.changes:
        assert name in [stage.device for stage in proposal.placement.stages]


@pytest.mark.slow
def test_changes_cost_a_small_share_of_the_time_whatever_they_gain() -> None:
    """A device that swings between very fast and very slow, so that each change would gain much."""
    asked = question(4, UNEQUAL)
    name = fresh(asked).stages[0].device
    swarm = Swarm(asked, swings(name, 9.0, 20.0))
    swarm.run(300)
    times = [when for when, _ in swarm.changes]
    for start in times:
        spent = sum(proposal.cost_s for when, proposal in swarm.changes if start <= when < start + MINUTE)
        assert spent <= BUDGET * MINUTE + 0.5  # the first is free


@pytest.mark.slow
def test_a_change_that_brings_nothing_is_undone_once_and_not_tried_again() -> None:
    """The model is wrong about all stages but those at the start: with any others tokens take as long as
    before."""
    asked = question(4)
    start = fresh(asked).assignments
    slow = fresh(asked, {}).tokens_per_s

    def wrong(stages: Sequence[Assignment]) -> float:
        return 1.0 if tuple(stages) == start else 1.8

    swarm, without = (Swarm(asked, drops("c"), moves=moves, wrong=wrong) for moves in (True, False))
    assert swarm.run(300) >= 0.97 * without.run(300)
    assert slow > without.rate()
    (moved, first), (undone, back), *others = swarm.changes
    assert 11 <= moved <= 12
    assert undone - moved < 6
    assert back.placement.stages == start
    assert back.why == "the last change has brought nothing"
    (_, verdict), *_ = swarm.verdicts
    assert verdict.undo
    assert verdict.measured < verdict.before < verdict.predicted
    # others are tried, and undone as well, less and less often
    assert len(others) <= 4
    for when, proposal in others[::2]:
        assert distance(proposal.placement.stages, first.placement.stages) >= distance(
            proposal.placement.stages, start
        )
        assert when > undone + 8


@pytest.mark.slow
def test_a_failed_change_is_tried_again_when_something_else_has_changed() -> None:
    asked = question(4)
    start = fresh(asked).assignments

    def factors(now: float) -> Mapping[str, float]:
        return {"c": 2.5 if now < 100 else 8.0} if now >= 10 else {}

    def wrong(stages: Sequence[Assignment]) -> float:
        return 1.8 if tuple(stages) != start and swarm.now < 100 else 1.0

    swarm = Swarm(asked, factors, wrong=wrong)
    swarm.run(99)
    tried = len(swarm.changes)
    assert swarm.stages == start
    swarm.run(20)
    assert len(swarm.changes) > tried
    assert swarm.rate() >= 0.92 * fresh(asked, {"c": 8.0}).tokens_per_s


@pytest.mark.slow
def test_a_device_without_layers_is_tried_again_and_less_and_less_often() -> None:
    """Three quick devices and one that is so slow that it gets nothing at all."""
    asked = question(1, (0.5, 0.5, 0.5, 0.2), (200_000_000,) * 4)
    name = fresh(asked).stages[-1].device
    swarm = Swarm(asked, drops(name, factor=30.0))
    swarm.run(300)
    assert name not in [stage.device for stage in swarm.stages]
    tries = [
        when for when, proposal in swarm.changes if name in [s.device for s in proposal.placement.stages]
    ]
    assert len(tries) <= 4
    back = Swarm(asked, drops(name, factor=30.0, until=40.0))
    back.run(120)
    assert back.rate() >= 0.92 * fresh(asked).tokens_per_s


# --- single looks


@pytest.mark.slow
def test_a_change_must_pay_within_the_answers_that_are_left() -> None:
    for remaining, moved in ((1e6, True), (400.0, True), (8.0, False), (0.0, False)):
        swarm = Swarm(question(4), drops("c"), remaining=remaining)
        swarm.run(30)
        assert bool(swarm.changes) == moved, remaining


def test_no_answers_no_change() -> None:
    asked = question(4)
    stages, memory = fresh(asked).assignments, Memory()
    for at in range(60):
        view = View(asked, {"c": 5.0}, stages, Usage(), at / 2)
        memory, proposal = look(memory, view)
        assert proposal is None


@pytest.mark.slow
def test_weights_that_are_not_there_and_pages_on_a_slow_link_cost() -> None:
    quick = {ends: LinkSpeed(0.004, 1e9) for ends in question(4).cluster.links}
    asked = replace(question(4), cluster=replace(question(4).cluster, links=quick))
    loads = Swarm(asked, drops("c"))
    loads.run(12)
    copies = Swarm(asked, drops("c"), copies=dict.fromkeys("abcd", frozenset(range(32))))
    copies.run(12)
    assert copies.changes[0][1].cost_s < loads.changes[0][1].cost_s
    slow = {ends: LinkSpeed(0.004, 2e5) for ends in asked.cluster.links}
    asked = replace(asked, cluster=replace(asked.cluster, links=slow))
    far = Swarm(asked, drops("c"), remaining=500.0, stages=fresh(question(4)).assignments)
    far.run(30)
    assert far.changes == []


@pytest.mark.slow
def test_the_stage_that_is_behind_must_not_wait_more_than_the_thief() -> None:
    """If c waits for half of the time, it is not what the others wait for, whatever the model says."""
    for waiting, moved in (
        ({}, True),
        ({"c": 0.02, "d": 0.6}, True),
        ({"c": 0.6, "d": 0.1, "a": 0.1, "b": 0.1}, False),
    ):
        swarm = Swarm(question(4), drops("c"), waiting=waiting)
        swarm.run(20)
        assert bool(swarm.changes) == moved, waiting
        if moved and waiting:
            assert swarm.changes[0][1].why.endswith("waits 60% of the time")


@pytest.mark.slow
def test_after_proposals_that_cannot_be_carried_out_there_are_fewer_and_others() -> None:
    swarm = Swarm(question(4), drops("c"), aborts=True)
    swarm.run(300)
    placements = [proposal.placement.stages for _, proposal in swarm.changes]
    assert len(set(placements)) == len(placements) <= 8
    times = [when for when, _ in swarm.changes]
    gaps = [after - before for before, after in pairwise(times)]
    assert all(gap >= VAIN_SECONDS * 2**at for at, gap in enumerate(gaps))


@pytest.mark.slow
def test_a_change_that_takes_three_steps_ends_with_the_one_that_fails() -> None:
    """What was to follow is dropped, and the next look begins with the stages that there are."""
    asked = question(4, *PHONES)
    name = fresh(asked).stages[2].device
    swarm = Swarm(asked, drops(name))
    while not swarm.changes:
        swarm.run(0.5)
    (_, first), target = swarm.changes[0], fresh(asked, {name: 2.5}).assignments
    assert first.why.endswith("and it makes room for what follows")
    assert swarm.stages == first.placement.stages
    assert swarm.memory.goal is not None and swarm.memory.goal.new == target
    assert [step.stages for step in swarm.memory.way][-1] == target
    swarm.aborts = True
    swarm.run(0.5)
    assert len(swarm.changes) == 2
    swarm.run(0.5)
    assert swarm.memory.way == () and swarm.memory.trial is None
    swarm.aborts = False
    swarm.run(30)
    assert swarm.rate() > 1.03 * swarm.rate(fresh(asked).assignments)
    # The end of the answer is none of the way, on which stages may be worse than before it.
    half = Swarm(asked, drops(name))
    while not half.changes:
        half.run(0.5)
    memory, proposal = look(half.memory, View(asked, {name: 2.5}, half.stages, Usage(), half.now))
    assert proposal is not None and proposal.placement.stages == half.memory.way[0].stages
    assert memory.way == half.memory.way[1:]


def test_stages_that_others_have_changed_are_looked_at_anew() -> None:
    """A node is lost in the middle of a trial: its verdict is dropped."""
    asked = question(4)
    swarm = Swarm(asked, drops("c"))
    swarm.run(12.5)
    assert swarm.memory.trial is not None
    swarm.stages = fresh(asked).assignments
    swarm.run(1.0)
    assert swarm.memory.trial is None
    assert swarm.verdicts == []


def test_a_link_that_is_gone_or_a_device_that_has_left_is_no_error() -> None:
    asked = question(4)
    stages = fresh(asked).assignments
    links = {ends: link for ends, link in asked.cluster.links.items() if "c" not in ends}
    cut = replace(asked, cluster=replace(asked.cluster, links=links))
    _, proposal = look(Memory(), View(cut, {}, stages, Usage(4, 200, 1e6, 0), 0.0))
    assert proposal is None
    swarm = Swarm(asked, drops("c"))
    swarm.run(10)
    fewer = tuple(d for d in asked.cluster.devices if d.name != "c")
    gone = replace(asked, cluster=replace(asked.cluster, devices=fewer, links=links))
    _, proposal = look(swarm.memory, View(gone, {}, stages, Usage(4, 200, 1e6, 0), 10.5))
    assert proposal is None


def test_standstills_that_are_longer_than_predicted_make_changes_dearer() -> None:
    swarm = Swarm(question(4), drops("c"))
    swarm.run(11.5)
    asked = swarm.memory.asked
    assert asked is not None
    late = happened(swarm.memory, Outcome(True, 3.0, 10 * asked.cost_s))
    assert late.scale > 2 * swarm.memory.scale
    assert happened(Memory(), Outcome(False)).scale == 1.0


@pytest.mark.slow
def test_a_device_that_was_never_measured_is_no_better_than_the_others() -> None:
    """Something slows all devices down, for example other programs on the machine of a test."""
    asked = question(4, (0.5, 0.5, 0.5, 0.5), (200_000_000,) * 4)
    used = {stage.device for stage in fresh(asked).stages}
    assert len(used) < 4
    swarm = Swarm(asked, lambda now: dict.fromkeys("abcd", 1.25) if now >= 10 else {})
    swarm.run(60)
    for _, proposal in swarm.changes:
        assert {stage.device for stage in proposal.placement.stages} <= used
