"""Constraints: against brute force with the same wish."""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from shoal.planner.evaluation import Infeasible, Plan, evaluate
from shoal.planner.moves import replans, steals
from shoal.planner.rows import (
    Assignment,
    Cluster,
    Constraints,
    Device,
    LinkSpeed,
    ModelCosts,
    Objective,
    Question,
    Unit,
    Workload,
)
from shoal.planner.solve import plan

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 0, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 4_000_000, 4_000_000, 4_000_000, 0, 0, 4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 4, HEAD), tied_bytes=4_000_000)
LOAD = Workload(context=64, sequences=3, streams=3, prompt_tokens=20, chunk_tokens=8)


def random_cluster(seed: int, caps: tuple[int, int] = (6_000_000, 16_000_000)) -> Cluster:
    rng = random.Random(seed)
    rows = []
    for name in "abc":
        speeds = (rng.randint(*caps), 10 ** rng.uniform(8, 9), 10 ** rng.uniform(8, 9.5))
        rows.append(Device(name, *speeds, idle_overhead_s=rng.choice([0.0, 1e-3])))
        rng.choice("ab"), rng.choice("abc")  # so that a seed's cluster stays what it was
    devices = tuple(rows)
    links = {
        pair: LinkSpeed(10 ** rng.uniform(-5, -2), 10 ** rng.uniform(5, 8))
        for pair in itertools.permutations(["h", "a", "b", "c"], 2)
    }
    return Cluster(devices, links, "h")


def every_plan(cluster: Cluster, objective: Objective) -> list[Plan]:
    """All that fit the caps."""
    names, units = [device.name for device in cluster.devices], len(MODEL.units)
    plans = []
    for count in range(1, len(names) + 1):
        for order in itertools.permutations(names, count):
            for inner in itertools.combinations(range(1, units), count - 1):
                edges = [0, *inner, units]
                stages = [Assignment(name, a, b) for name, a, b in zip(order, edges, edges[1:], strict=False)]
                found = evaluate(Question(MODEL, cluster, LOAD, objective), stages)
                if all(stage.ram_bytes <= stage.cap_bytes for stage in found.stages):
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
        answer = plan(Question(MODEL, cluster, LOAD, objective, constraints), method=method, explain=False)
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
            Question(MODEL, cluster, LOAD, constraints=constraints)
    with pytest.raises(ValueError, match="a is excluded and has 2 layers"):
        Constraints(exclude=frozenset("a"), layers={"a": 2})
    with pytest.raises(ValueError, match="b is excluded and holds an end"):
        Constraints(exclude=frozenset("b"), last="b")
    with pytest.raises(ValueError, match="a gets no layers, which leaves it out, and an end"):
        Constraints(first="a", layers={"a": 0})
    with pytest.raises(ValueError, match="a holds both ends, so all of the model, and b is to have layers"):
        Constraints(first="a", last="a", layers={"b": 3})
    with pytest.raises(ValueError, match="all devices are left out"):
        Question(
            ModelCosts((EMBEDDING, HEAD)),
            cluster,
            LOAD,
            constraints=Constraints(exclude=frozenset("abc")),
        )
    for constraints, message in [
        (Constraints(layers={"b": 3}), "b has to be in the plan, and the order leaves it out"),
        (Constraints(first="b"), "b has to be in the plan, and the order leaves it out"),
        (Constraints(first="c", last="a"), "c comes after a in the order"),
        (Constraints(first="c", layers={"a": 1}), "c comes after a in the order"),
        (Constraints(last="a", layers={"c": 1}), "c comes after a in the order"),
    ]:
        with pytest.raises(ValueError, match=message):
            Question(MODEL, cluster, LOAD, constraints=replace(constraints, order=("a", "c")))


def test_a_device_holds_only_units_whose_files_it_has() -> None:
    """Where that leaves no plan, the answer names what is missing; else, the caps are what is short."""
    cluster = random_cluster(0, caps=(20_000_000, 20_000_001))

    def asked(**held: range) -> Question:
        files = {name: frozenset(units) for name, units in held.items()}
        return Question(MODEL, cluster, LOAD, constraints=Constraints(held=files))

    found = plan(asked(a=range(3), b=range(2, 6), c=range(0)))
    assert isinstance(found, Plan) and {stage.device for stage in found.stages} == {"a", "b"}
    (reason,) = (reason.text for reason in found.reasons if reason.device == "c")
    assert reason == "it has no unit's files yet"
    nobody = plan(asked(a=range(2), b=range(3, 6), c=range(2)))
    assert isinstance(nobody, Infeasible) and nobody.missing_bytes == 0
    assert nobody.reason == "no device has the files of layer 2 yet"
    small = replace(cluster, devices=tuple(replace(d, ram_bytes=7_000_000) for d in cluster.devices))
    lacking = plan(replace(asked(b=range(0), c=range(0)), cluster=small))
    assert isinstance(lacking, Infeasible) and "do not have their files yet: b, c" in lacking.reason
    none = replace(cluster, devices=tuple(replace(d, ram_bytes=1_000_000) for d in cluster.devices))
    short = plan(replace(asked(b=range(0), c=range(2)), cluster=none))
    assert isinstance(short, Infeasible) and short.missing_bytes > 0 and "RAM caps are" in short.reason
    with pytest.raises(ValueError, match="a holds units that the model does not have: 6"):
        asked(a=range(7))


def test_no_layers_are_stolen_by_a_device_without_their_files() -> None:
    taken, others = 0, 0
    for seed in range(12):
        rng = random.Random(seed)
        cluster, now = random_cluster(seed, caps=(20_000_000, 20_000_001)), [Assignment("c", 0, 6)]
        held = {name: frozenset(u for u in range(6) if rng.random() < 0.8) for name in "ab"}
        question = Question(MODEL, cluster, LOAD, constraints=Constraints(held=held))
        found = [*(steal.stages for steal in steals(question, now)), *replans(question, now)]
        stages = [stage for stages in found for stage in stages]
        assert all(question.constraints.holds(stage.device, stage.first, stage.last) for stage in stages)
        taken += len({stage.device for stage in stages} & {"a", "b"})
        free = replace(question, constraints=Constraints())
        for freed in (*(steal.stages for steal in steals(free, now)), *replans(free, now)):
            others += any(not question.constraints.holds(s.device, s.first, s.last) for s in freed)
    assert taken > 3 and others > 3
