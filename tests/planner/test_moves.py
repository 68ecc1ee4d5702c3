"""Which layers should be stolen: against every chain of the same devices, and worked out by hand."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest

from shoal.planner import cost, plan
from shoal.planner.evaluation import Plan, evaluate, token_seconds
from shoal.planner.moves import SIZES, replans, room_beside, steals, travel, way
from shoal.planner.rows import (
    Assignment,
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Question,
    Unit,
    Workload,
)
from shoal.planner.streams import Follower

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 100, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 2_000_000, 2_000_000, 2_000_000, 0, 0, 4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 9, HEAD), kv_page_tokens=16)
LINKS = {pair: LinkSpeed(0.001, 1e9) for pair in itertools.permutations("habc", 2)}
STAGES = (Assignment("a", 0, 4), Assignment("b", 4, 7), Assignment("c", 7, 11))


def question(streams: int = 1, **rates: float) -> Question:
    """Equal devices, but for those whose bytes/s are given; a depth of 20 positions is two pages."""
    devices = tuple(Device(n, 20_000_000, rates.get(n, 1e9), rates.get(n, 1e9)) for n in "abc")
    load = Workload(64, sequences=max(streams, 2), streams=streams, depth=20)
    objective = "latency" if streams == 1 else "throughput"
    return Question(MODEL, Cluster(devices, LINKS, "h"), load, objective)


def chains(order: Sequence[str], units: int = 11) -> Iterator[list[Assignment]]:
    """All chains of these devices in this order, each of which has at least a unit."""
    for cuts in itertools.combinations(range(1, units), len(order) - 1):
        yield [
            Assignment(n, a, b)
            for n, (a, b) in zip(order, itertools.pairwise((0, *cuts, units)), strict=True)
        ]


def test_a_slow_device_gives_all_of_its_layers_to_the_quicker_neighbour() -> None:
    asked = question(b=2.5e8, c=5e8)
    first, *others = steals(asked, STAGES)
    assert (first.giver, first.taker, first.units) == ("b", "a", 3)
    assert first.stages == (Assignment("a", 0, 7), Assignment("c", 7, 11))
    # 4 ms a layer on b, 1 ms on a, and one hop less; of the state 20 positions of 100 bytes, at their rates
    saved = evaluate(asked, STAGES).step_seconds - first.seconds
    assert saved == pytest.approx(3 * (0.003 + 2000 / 2.5e8 - 2000 / 1e9) + 0.001 + 1000 / 1e9)
    assert others[-1].stages == (Assignment("a", 0, 11),)
    assert all(later.seconds < earlier.seconds for earlier, later in itertools.pairwise([first, *others]))


def test_nothing_is_stolen_where_nothing_gains() -> None:
    free = {ends: LinkSpeed(0.0, math.inf) for ends in LINKS}
    asked = replace(question(), cluster=Cluster(question().cluster.devices, free, "h"))
    assert list(steals(asked, STAGES)) == []  # for one sequence of equal devices any cut is as good


def test_layers_pass_through_the_stages_between() -> None:
    """The last device has time and room for two layers, and the first is behind: both boundaries move, and
    the device between the two keeps its number of layers."""
    asked = question(6, a=5e8, b=1e9, c=4e9)
    a, b, c = asked.cluster.devices
    full = replace(c, ram_bytes=cost.range_ram_bytes(MODEL, c, asked.workload, 5, 11))
    first = next(steals(replace(asked, cluster=Cluster((a, b, full), LINKS, "h")), STAGES))
    assert (first.giver, first.taker, first.units) == ("a", "c", 2)
    assert first.stages == (Assignment("a", 0, 2), Assignment("b", 2, 5), Assignment("c", 5, 11))


@pytest.mark.parametrize("streams", [1, 5])
@pytest.mark.parametrize("seed", range(8))
def test_steals_and_new_plans_come_to_the_best_chain(seed: int, streams: int) -> None:
    """One steal after another comes to where no boundary is better elsewhere, and a new plan is the best of
    all chains."""
    rng = random.Random(seed)
    asked = question(streams, **{name: 10 ** rng.uniform(8, 9.3) for name in "abc"})
    seconds = partial(token_seconds, asked, follower=Follower(asked))
    stages = rng.choice(list(chains(rng.sample("abc", 3))))
    before, last = seconds(stages), tuple(stages)
    for steal in steals(asked, stages):
        assert steal.seconds == pytest.approx(evaluate(asked, steal.stages).step_seconds)
        assert steal.seconds < before
        before, last = steal.seconds, steal.stages
    for near in chains([stage.device for stage in last]):
        moved = [abs(a.first - b.first) for a, b in zip(near, last, strict=True) if a.first != b.first]
        assert len(moved) != 1 or moved[0] not in SIZES or seconds(near) >= before * (1 - 1e-8)
    everything = (
        seconds(chain)
        for count in (1, 2, 3)
        for names in itertools.permutations("abc", count)
        for chain in chains(names)
    )
    assert min(map(seconds, replans(asked, stages))) <= 1.001 * min(everything)


def test_a_taker_without_room_takes_nothing() -> None:
    asked = question(b=2.5e8)
    needed = cost.range_ram_bytes(MODEL, asked.cluster.devices[0], asked.workload, 0, 5)
    full = tuple(replace(d, ram_bytes=needed - 1 if d.name == "a" else 10) for d in asked.cluster.devices)
    assert list(steals(replace(asked, cluster=Cluster(full, LINKS, "h")), STAGES)) == []
    roomy = (replace(full[0], ram_bytes=needed), *full[1:])
    (only,) = steals(replace(asked, cluster=Cluster(roomy, LINKS, "h")), STAGES)
    assert (only.giver, only.taker, only.units) == ("b", "a", 1)


def test_a_stage_is_not_emptied_where_it_is_the_only_way() -> None:
    asked = question(b=1e7)
    links = {ends: link for ends, link in LINKS.items() if set(ends) != set("ac")}
    *_, last = steals(replace(asked, cluster=Cluster(asked.cluster.devices, links, "h")), STAGES)
    assert "b" not in [stage.device for stage in last.stages] or len(last.stages) == 3
    evaluate(replace(asked, cluster=Cluster(asked.cluster.devices, links, "h")), last.stages)


def test_how_deep_the_sequences_are_decides() -> None:
    """b reads and computes like a, and attends ten times as slowly: it loses layers as contexts grow."""
    unit = replace(LAYER, attend_macs=1000)
    model = ModelCosts((EMBEDDING, *[unit] * 9, HEAD))
    devices = tuple(
        Device(n, 20_000_000, 1e9, 1e9, attend_macs_per_s=1e8 if n == "b" else 1e9) for n in "abc"
    )
    free = {ends: LinkSpeed(0.0, math.inf) for ends in LINKS}

    def at(depth: int) -> Question:
        load = Workload(1000, sequences=1, depth=depth)
        return Question(model, Cluster(devices, free, "h"), load)

    assert list(steals(at(0), STAGES)) == []
    first = next(steals(at(900), STAGES))
    assert (first.giver, first.units) == ("b", 3)


def test_a_device_without_a_stage_takes_layers_or_a_whole_stage() -> None:
    two = [Assignment("a", 0, 4), Assignment("b", 4, 11)]
    asked = question(6, a=3e8)
    assert any("c" in [stage.device for stage in stages] for stages in replans(asked, two))
    *_, last = steals(asked, two)
    assert "c" in [stage.device for stage in last.stages]
    asked = question(6, b=1e8, c=9.5e8)
    first = next(steals(asked, two, allowed=lambda stages: stages[0] == two[0]))
    assert first.stages == (Assignment("a", 0, 4), Assignment("c", 4, 11))  # instead of b


def test_in_the_middle_of_a_change_a_device_holds_both_stages() -> None:
    asked = question(6)
    new = [Assignment("b", 0, 3), Assignment("a", 3, 7), Assignment("c", 7, 11)]
    # of a units 0 to 6, of b units 0 to 2 and 4 to 6
    need = 4_000_000 + 6 * 1_000_000 + 7 * 500 * 100

    def beside(ram: int) -> bool:
        devices = tuple(
            replace(d, ram_bytes=ram if d.name == "a" else d.ram_bytes) for d in asked.cluster.devices
        )
        return room_beside(replace(asked, cluster=Cluster(devices, LINKS, "h")), STAGES, new, positions=500)

    state = LAYER.kv_bytes_per_token
    assert need == 10_000_000 + 7 * 500 * state
    assert beside(need)
    assert not beside(need - 6 * 500 * state)
    assert room_beside(asked, STAGES, STAGES, positions=10**9)  # who keeps its stage needs no more


def test_the_ends_of_a_chain_are_exchanged_by_way_of_a_device_that_has_room() -> None:
    """a and c have room for a stage each. Two of the three changes empty one of them."""
    asked = question()
    new = (Assignment("c", 0, 4), Assignment("b", 4, 7), Assignment("a", 7, 11))
    links = {ends: LinkSpeed(0.001, 1e9) for ends in itertools.permutations("habcd", 2)}

    def found(spare: int, ram: int = 9_000_000) -> tuple[tuple[Assignment, ...], ...] | None:
        rams = {"a": ram, "b": 3_500_000, "c": ram, "d": spare}
        devices = tuple(Device(name, rams[name], 1e9, 1e9) for name in "abcd")
        tight = replace(asked, cluster=Cluster(devices, links, "h"))
        between = way(tight, STAGES, new, 20, Follower(tight))
        for one, other in itertools.pairwise((STAGES, *(between or ()), new)):
            assert between is None or room_beside(tight, one, other, 20)
        return between

    assert found(0) is None
    # d holds the first stage meanwhile, or the last one.
    first, last = (Assignment("d", 0, 4), *STAGES[1:]), (*STAGES[:2], Assignment("d", 7, 11))
    assert found(8_000_000) in ((first, (*first[:2], new[2])), (last, (new[0], *last[1:])))
    assert found(0, 20_000_000) == ()
    shifted = (Assignment("a", 0, 3), Assignment("b", 3, 7), Assignment("c", 7, 11))
    assert way(asked, STAGES, shifted, 20, Follower(asked)) == ()


@pytest.mark.parametrize("used", [4, 7])
def test_new_plans_of_many_devices_are_quick_and_better(used: int) -> None:
    """Of nine devices only some are tried, whatever has a stage among them."""
    names = "abcdefgih"[:9]
    rng = random.Random(3)
    devices = tuple(Device(n, 9_000_000, 10 ** rng.uniform(8.5, 9.3), 1e9) for n in names)
    links = {ends: LinkSpeed(0.001, 1e8) for ends in itertools.permutations((*names, "o"), 2)}
    asked = Question(MODEL, Cluster(devices, links, "o"), Workload(64, 6, streams=6, depth=20), "throughput")
    held = replace(asked.constraints, order=tuple(names[:used]))
    start = plan(replace(asked, constraints=held), method="dp", explain=False)
    assert isinstance(start, Plan)
    slow = replace(devices[0], read_bytes_per_s=devices[0].read_bytes_per_s / 5)
    asked = replace(asked, cluster=Cluster((slow, *devices[1:]), links, "o"))
    before = evaluate(asked, start.assignments).step_seconds
    found = list(replans(asked, start.assignments))
    assert 1 < len(found) < 20
    assert min(evaluate(asked, stages).step_seconds for stages in found) < 0.9 * before


def test_weights_and_state_travel_to_whoever_lacks_them() -> None:
    new = [Assignment("a", 0, 6), Assignment("c", 6, 11)]
    needed = travel(question(), STAGES, new, {"a": frozenset({4}), "c": frozenset()})
    assert needed.weights == {"a": 1_000_000, "c": 1_000_000}
    assert needed.state == {("b", "a"): 200, ("b", "c"): 100}
    assert travel(question(), STAGES, STAGES, {}) == travel(question(), new, new, {})


def test_stages_that_are_no_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="must cover units 0 to 11"):
        next(steals(question(), STAGES[:2]))
