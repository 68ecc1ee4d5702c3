"""What is the MILP's own: bounds, time, the solvers that PuLP may find here. That it equals the DP and brute
force is test_optimal.py's."""

import itertools
from functools import partial

import pytest
from tests.planner.test_optimal import SAME, agree, random_problem, tables_of

from shoal.planner import dp, milp
from shoal.planner.goal import Goal, goals
from shoal.planner.rows import Objective
from shoal.planner.tabulate import decode_tables


def test_out_of_time_proves_nothing(highs: milp.Solver) -> None:
    problem = random_problem(1)
    devices = range(len(problem[1].devices))
    assert milp.best_chain(decode_tables(*problem), devices, Goal("latency"), highs, time_limit=0.0) == (
        None,
        False,
    )


@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
def test_a_known_chain_is_bettered_or_given_back(objective: Objective, highs: milp.Solver) -> None:
    bettered = 0
    for seed in range(3000, 3030):
        problem = random_problem(seed)
        devices = range(len(problem[1].devices))
        for goal in goals(objective, problem[2]):
            tables = tables_of(problem, goal)
            known = dp.best_chain(tables, goal, partial(dp.cheapest, order=devices))
            best, proved = milp.best_chain(tables, devices, goal, highs)
            if known is None:
                continue
            assert best is not None
            found, still_proved = milp.best_chain(tables, devices, goal, highs, known=known)
            assert found is not None
            assert proved and still_proved
            assert dp.value(tables, goal, found) == pytest.approx(dp.value(tables, goal, best), rel=SAME)
            assert milp.best_chain(tables, devices, goal, highs, known=best) == (best, True)
            assert milp.best_chain(tables, devices, goal, highs, known=known, time_limit=0.0) == (
                known,
                False,
            )
            bettered += dp.value(tables, goal, found) < dp.value(tables, goal, known) * (1 - SAME)
    assert bettered, "in some problems another order is better"


@pytest.mark.parametrize("seed", [2041, 2068])
def test_a_problem_with_one_feasible_plan_is_not_called_infeasible(seed: int, highs: milp.Solver) -> None:
    """HiGHS 1.15.1 does, with presolve."""
    agree(random_problem(seed), "latency", highs)


def test_every_solver_here_finds_the_same() -> None:
    here = []
    for name in ("highs", "cbc", "bundled-cbc"):
        try:
            here.append(milp.load_solver(name))
        except milp.SolverMissing:
            continue
    assert here, "the development extra installs one"
    for solver, seed in itertools.product(here, (1, 2, 5)):
        agree(random_problem(seed), "latency", solver)
        agree(random_problem(seed), "throughput", solver)  # ends where a solver finds nothing better
