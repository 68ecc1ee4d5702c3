"""Constraints, energy, moving and copies: against brute force with the same wish, or worked out by hand."""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from shoal.planner import cost
from shoal.planner.constraints import Constraints, Running
from shoal.planner.evaluation import evaluate, joules
from shoal.planner.rows import (
    OBJECTIVES,
    Cluster,
    Device,
    Infeasible,
    Link,
    Model,
    Objective,
    Plan,
    Stage,
    Unit,
    Workload,
)
from shoal.planner.solve import plan

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 0, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 4_000_000, 4_000_000, 4_000_000, 0, 0, 4)
MODEL = Model((EMBEDDING, *[LAYER] * 4, HEAD), tied_bytes=4_000_000)
LOAD = Workload(context=64, sequences=3, streams=3, prompt_tokens=20, chunk_tokens=8)


def random_cluster(seed: int, caps: tuple[int, int] = (6_000_000, 16_000_000)) -> Cluster:
    rng = random.Random(seed)
    devices = tuple(
        Device(
            name,
            rng.randint(*caps),
            10 ** rng.uniform(8, 9),
            10 ** rng.uniform(8, 9.5),
            idle_overhead_s=rng.choice([0.0, 1e-3]),
            joules_per_step=rng.choice([0.0, 1e-2]),
            joules_per_byte=rng.choice([0.0, 1e-9, 1e-8]),
        )
        for name in "abc"
    )
    links = {
        pair: Link(10 ** rng.uniform(-5, -2), 10 ** rng.uniform(5, 8))
        for pair in itertools.permutations(["h", "a", "b", "c"], 2)
    }
    return Cluster(devices, links, "h")


def every_plan(cluster: Cluster, objective: Objective, **options: Any) -> list[Plan]:
    """All that fit the caps."""
    names, units = [device.name for device in cluster.devices], len(MODEL.units)
    plans = []
    for count in range(1, len(names) + 1):
        for order in itertools.permutations(names, count):
            for inner in itertools.combinations(range(1, units), count - 1):
                edges = [0, *inner, units]
                stages = [Stage(name, a, b) for name, a, b in zip(order, edges, edges[1:], strict=False)]
                found = evaluate(MODEL, cluster, LOAD, stages, objective, **options)
                if all(ram <= cap for ram, cap in zip(found.ram_bytes, found.cap_bytes, strict=True)):
                    plans.append(found)
    return plans


def layers_of(found: Plan) -> dict[str, int]:
    return {s.device: min(s.last, found.units - 1) - max(s.first, 1) for s in found.stages}


def seconds(found: Plan) -> float:
    return found.step_seconds


@pytest.mark.parametrize("method", ["milp", "dp"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("seed", range(6))
def test_constraints_are_kept_at_the_least_cost(seed: int, objective: Objective, method: Any) -> None:
    cluster = random_cluster(seed)
    plans = every_plan(cluster, objective)
    cases = [
        (Constraints(exclude=frozenset("b")), lambda p: "b" not in layers_of(p)),
        (Constraints(first="c"), lambda p: p.stages[0].device == "c"),
        (Constraints(last="a"), lambda p: p.stages[-1].device == "a"),
        (Constraints(layers={"a": 1}), lambda p: layers_of(p).get("a") == 1),
        (Constraints(layers={"a": 4}), lambda p: layers_of(p).get("a") == 4),
        (Constraints(layers={"a": 2, "b": 1, "c": 1}), lambda p: layers_of(p) == {"a": 2, "b": 1, "c": 1}),
        (
            Constraints(layers={"b": 0, "c": 2}),
            lambda p: layers_of(p).get("c") == 2 and "b" not in layers_of(p),
        ),
    ]
    for constraints, kept in cases:
        least = min((seconds(p) for p in plans if kept(p)), default=math.inf)
        answer = plan(MODEL, cluster, LOAD, objective, constraints=constraints, method=method, explain=False)
        if isinstance(answer, Infeasible):
            assert least == math.inf
            assert answer.missing_bytes > 0
        else:
            assert kept(answer)
            assert answer.optimal == (objective == "latency")
            assert answer.step_seconds == pytest.approx(least, rel=1e-6)


def test_a_wish_for_a_device_that_is_not_there_or_cannot_be_is_refused() -> None:
    cluster = random_cluster(0)
    for constraints, message in [
        (Constraints(exclude=frozenset(["who"])), "no device who"),
        (Constraints(layers={"a": 5}), "add up to 5, and the model has 4"),
        (Constraints(layers={"a": 1, "b": 1, "c": 1}), "add up to 3, and the model has 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan(MODEL, cluster, LOAD, constraints=constraints)
    with pytest.raises(ValueError, match="a is excluded and has 2 layers"):
        Constraints(exclude=frozenset("a"), layers={"a": 2})
    with pytest.raises(ValueError, match="b is excluded and holds an end"):
        Constraints(exclude=frozenset("b"), last="b")
    with pytest.raises(ValueError, match="a gets no layers, which leaves it out, and an end"):
        Constraints(first="a", layers={"a": 0})
    with pytest.raises(ValueError, match="a holds both ends, so all of the model, and b is to have layers"):
        Constraints(first="a", last="a", layers={"b": 3})
    with pytest.raises(ValueError, match="all devices are left out"):
        plan(Model((EMBEDDING, HEAD)), cluster, LOAD, constraints=Constraints(exclude=frozenset("abc")))
    for constraints, message in [
        (Constraints(layers={"b": 3}), "b has to be in the plan, and the order leaves it out"),
        (Constraints(first="b"), "b has to be in the plan, and the order leaves it out"),
        (Constraints(first="c", last="a"), "c comes after a in the order"),
        (Constraints(first="c", layers={"a": 1}), "c comes after a in the order"),
        (Constraints(last="a", layers={"c": 1}), "c comes after a in the order"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan(MODEL, cluster, LOAD, order=["a", "c"], constraints=constraints)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(8))
def test_a_joule_costs_what_is_said(seed: int, objective: Objective) -> None:
    cluster, price = random_cluster(seed), 0.3

    def priced(found: Plan) -> float:
        return found.step_seconds + price * found.joules_per_token

    if objective == "first_token":  # its value is no figure of a plan: only that the price moves the choice
        dear = plan(MODEL, cluster, LOAD, objective, seconds_per_joule=1e6, explain=False)
        assert isinstance(dear, Plan)
        least = min(p.joules_per_token for p in every_plan(cluster, objective))
        assert dear.joules_per_token == pytest.approx(least)
        return
    least = min(map(priced, every_plan(cluster, objective)))
    for method in ("milp", "dp"):
        answer = plan(
            MODEL, cluster, LOAD, objective, seconds_per_joule=price, method=method, explain=False  # type: ignore[arg-type]
        )  # fmt: skip
        assert isinstance(answer, Plan)
        assert priced(answer) == pytest.approx(least, rel=1e-6) or not answer.optimal
        assert priced(answer) <= least * 1.03


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("seed", range(6))
def test_moving_is_worth_it_only_where_it_pays_off(seed: int, objective: Objective) -> None:
    cluster = random_cluster(seed)
    plans = every_plan(cluster, objective)
    worst = max(plans, key=seconds)
    for horizon in (1, 1000, 10**9):
        running = Running(worst.stages, horizon, positions=30, keeps={"a": frozenset([1, 2])})
        moved = every_plan(cluster, objective, running=running)
        least = min(p.step_seconds + p.move_seconds / horizon for p in moved)
        answer = plan(MODEL, cluster, LOAD, objective, running=running, explain=False)
        assert isinstance(answer, Plan)
        value = answer.step_seconds + answer.move_seconds / horizon
        assert value == pytest.approx(least, rel=1e-6) or (not answer.optimal and value < least * 1.03)
    stays = plan(MODEL, cluster, LOAD, objective, running=Running(worst.stages, 1), explain=False)
    assert isinstance(stays, Plan)
    assert stays.move_seconds <= worst.step_seconds
    goes = plan(MODEL, cluster, LOAD, objective, running=Running(worst.stages, 10**9), explain=False)
    assert isinstance(goes, Plan)
    assert goes.step_seconds == pytest.approx(min(map(seconds, plans)), rel=1e-3)


def test_moving_a_unit_takes_its_weights_and_state_over_the_link_from_its_holder() -> None:
    layer = replace(LAYER, kv_bytes_per_token=100)
    model = Model((EMBEDDING, layer, layer, HEAD))
    links = {("a", "b"): Link(0.5, 1e6), ("h", "b"): Link(1.0, 2e6), ("b", "h"): Link(0.0, 1e6)}
    cluster = Cluster((Device("a", 1, 1.0, 1.0), Device("b", 1, 1.0, 1.0)), links, "h")
    stages = (Stage("a", 0, 2), Stage("b", 2, 4))
    running = Running(stages, 10, positions=5000, keeps={"b": frozenset([0])})
    # the copy of unit 0 has no state to fetch; unit 1: 1 MB and 0.5 MB of state
    assert cost.move_seconds(model, cluster, running, "b") == [0.0, 0.5 + 1.5, 0.0, 0.0]
    # "gone" is not there any more: weights come from the head, state is replayed
    lost = replace(running, stages=(Stage("gone", 0, 2), Stage("b", 2, 4)))
    assert cost.move_seconds(model, cluster, lost, "b") == [0.0, 1.0 + 0.5, 0.0, 0.0]


def test_the_table_of_a_tied_end_need_not_move_to_where_the_other_end_is() -> None:
    cluster = random_cluster(0)
    running = Running((Stage("a", 0, 5), Stage("b", 5, 6)), 10)
    assert cost.move_seconds(MODEL, cluster, running, "b")[0] == 0.0
    assert cost.move_seconds(MODEL, cluster, running, "a")[5] == 0.0
    assert cost.move_seconds(MODEL, cluster, running, "c")[0] > 0.0


def test_streams_that_share_a_call_share_its_energy() -> None:
    reports = Device("a", 10**8, 1e9, 1e10, joules_per_step=1.0, joules_per_byte=1e-6)
    links = {("h", "a"): Link(1e-3, 1e8), ("a", "h"): Link(1e-3, 1e8)}
    alone, spread = Cluster((reports,), links, "h"), {}
    for streams in (1, 3):
        load = replace(LOAD, streams=streams, prompt_tokens=1)
        found = plan(MODEL, alone, load, "throughput", explain=False)
        assert isinstance(found, Plan)
        spread[streams] = found.joules_per_token
    weights = 4 * LAYER.read_bytes + HEAD.read_bytes
    table = EMBEDDING.read_bytes * 1e-6
    assert spread[1] == pytest.approx(1.0 + weights * 1e-6 + table)
    assert (spread[1] - table) / 3 + table <= spread[3] < spread[1] / 1.4
    rows = joules(MODEL, alone, LOAD, [Stage("a", 0, 6)], [2.0])
    assert rows == pytest.approx((1.0 + weights * 1e-6) / 2 + table)


def test_spare_ram_takes_copies_of_the_slower_neighbours_boundary_layers_first() -> None:
    model = Model((EMBEDDING, *[LAYER] * 8, HEAD))
    names = "abc"
    links = {pair: Link(0.001, 1e9) for pair in itertools.permutations(("h", *names), 2)}
    room = {"a": 20_000_000, "b": 5_000_000, "c": 8_500_000}
    rate = {"a": 1e9, "b": 1e9, "c": 1e8}
    devices = tuple(Device(n, room[n], rate[n], 1e12) for n in names)
    stages = [Stage("a", 0, 4), Stage("b", 4, 6), Stage("c", 6, 10)]
    found = evaluate(model, Cluster(devices, links, "h"), LOAD, stages)
    # a: one of b's two layers, its half. b: 3 MB spare: one of c (slower), one of a, and no more of c than
    # that half; c: nothing, 0.5 MB are no layer.
    assert found.copies == ((4,), (3, 6), (5,))
    full = replace(devices[2], ram_bytes=6_900_000)
    assert evaluate(model, Cluster((*devices[:2], full), links, "h"), LOAD, stages).copies[2] == ()
