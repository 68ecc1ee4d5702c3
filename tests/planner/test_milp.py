"""What is the MILP's own: bounds, time, the solvers that PuLP may find here. That it equals the DP and brute
force is test_optimal.py's."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
from tests.planner.test_optimal import SAME, agree, random_problem

from shoal.planner import milp, search
from shoal.planner.evaluation import Plan
from shoal.planner.rows import (
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Objective,
    Question,
    Unit,
    Workload,
)
from shoal.planner.solve import plan
from shoal.planner.tables import Goal, goals, tables_of


def test_out_of_time_proves_nothing(highs: milp.Solver) -> None:
    question = random_problem(1)
    tables = tables_of(question, Goal("latency"))
    assert milp.best_chain(tables, question.devices, highs, time_limit=0.0) == (None, False)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
def test_a_known_chain_is_bettered_or_given_back(
    objective: Objective, alike: bool, highs: milp.Solver
) -> None:
    bettered = 0
    for seed in range(3000, 3030 if alike else 3012):
        question = random_problem(seed, objective, alike=alike)
        devices = question.devices
        for goal in goals(question):
            tables = tables_of(question, goal)
            known, _ = search.best_chain(tables, partial(search.cheapest, order=devices))
            best, proved = milp.best_chain(tables, devices, highs)
            if known is None:
                continue
            assert best is not None
            found, still_proved = milp.best_chain(tables, devices, highs, known=known)
            assert found is not None
            assert proved and still_proved
            assert search.value(tables, found) == pytest.approx(search.value(tables, best), rel=SAME)
            assert milp.best_chain(tables, devices, highs, known=best) == (best, True)
            assert milp.best_chain(tables, devices, highs, known=known, time_limit=0.0) == (known, False)
            bettered += search.value(tables, found) < search.value(tables, known) * (1 - SAME)
    assert bettered, "in some problems another order is better"


def many(devices: int, *, alike: bool) -> Question:
    """More devices than the exact DP takes; the two quickest are far from each other, and no search by hand
    sees at once what to do: each holds a few layers."""
    layer = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 100, 0, 1000)
    other = replace(layer, bytes=3_000_000, read_bytes=500_000)  # a mixture of experts, say
    layers = [layer if alike or at % 3 else other for at in range(12)]
    ends = (Unit("embedding", 2_000_000, 1000, 0, 0, 0, 1000), Unit("head", 2_000_000, 2_000_000, 0, 0, 0, 4))
    rows = tuple(
        Device(f"d{at}", 4_500_000 + 700_000 * (at * 5 % 7), 1e9 / (1 + at * 7 % 4), 1e10)
        for at in range(devices)
    )
    names = ["h", *(row.name for row in rows)]
    links = {
        (a, b): LinkSpeed(1e-4 * (1 + (i * 3 + j * 5) % 11), 1e7)
        for (i, a), (j, b) in itertools.permutations(enumerate(names), 2)
    }
    return Question(ModelCosts((ends[0], *layers, ends[1])), Cluster(rows, links, "h"), Workload(64))


@pytest.mark.parametrize("alike", [True, False])
def test_the_milp_decides_where_the_exact_dp_does_not_reach(alike: bool) -> None:
    """Nine devices: one more than the DP over all orders takes. The MILP proves a plan, which no search over
    orders betters, and the DP along the plan's order finds again."""
    question = many(9, alike=alike)
    found, searched = plan(question, explain=False), plan(question, method="dp", explain=False)
    assert isinstance(found, Plan) and isinstance(searched, Plan)
    assert found.method.startswith("MILP") and found.optimal
    assert searched.method.startswith("DP over searched orders") and not searched.optimal
    assert found.step_seconds <= searched.step_seconds * (1 + SAME)
    # Of eight of them, those of the plan among them, all orders are tried.
    used = [stage.device for stage in found.stages]
    rest = [device for device in question.cluster.devices if device.name not in used]
    eight = tuple(d for d in question.cluster.devices if d not in rest[-1:])
    names = {"h", *(device.name for device in eight)}
    links = {ends: link for ends, link in question.cluster.links.items() if names.issuperset(ends)}
    exact = plan(replace(question, cluster=Cluster(eight, links, "h")), method="dp", explain=False)
    assert isinstance(exact, Plan) and exact.optimal
    assert exact.step_seconds == pytest.approx(found.step_seconds, rel=SAME)


@pytest.mark.parametrize(("devices", "alike", "by"), [
    (5, True, "exact DP"), (6, True, "MILP"), (8, False, "exact DP"), (9, False, "MILP"),
])  # fmt: skip
def test_what_decides_is_what_is_exact_sooner(devices: int, alike: bool, by: str) -> None:
    found = plan(many(devices, alike=alike), explain=False)
    assert isinstance(found, Plan)
    assert found.method.startswith(by) and found.optimal


@pytest.mark.parametrize("seed", [2041, 2068])
def test_a_problem_with_one_feasible_plan_is_not_called_infeasible(seed: int, highs: milp.Solver) -> None:
    """HiGHS 1.15.1 does, with presolve."""
    agree(random_problem(seed), highs)


def test_every_solver_here_finds_the_same() -> None:
    here = []
    for name in ("highs", "cbc", "bundled-cbc"):
        try:
            here.append(milp.load_solver(name))
        except milp.SolverMissing:
            continue
    assert here, "the development extra installs one"
    for solver, seed in itertools.product(here, (1, 2, 5)):
        agree(random_problem(seed), solver)
        agree(random_problem(seed, "throughput"), solver)  # ends where a solver finds nothing better
        agree(random_problem(seed, alike=False), solver)
