"""plan(): one question in, one answer out. Picks the method, evaluates what it found, and says why in
words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from . import cost, dp, milp, orders
from .alternatives import QUICK_EXACT, Case, Search, with_it, without
from .constraints import Constraints
from .evaluation import evaluate
from .explain import give_reasons, say_lack
from .goal import Goal, goals
from .judge import BETTER, Following, Found, Judge, stages_of
from .rows import OBJECTIVES, Cluster, Infeasible, Link, Model, Objective, Plan, Stage, Workload
from .streams import Streams
from .tables import TimeTables
from .tabulate import ANYTHING, decode_tables, lack_tables, prompt_tables

Method = Literal["auto", "milp", "dp"]
SAME = 1e-6  # relative: what two exact methods may differ by


def plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    objective: Objective = "latency",
    order: Sequence[str] | None = None,
    *,
    constraints: Constraints = ANYTHING,
    method: Method = "auto",
    explain: bool = True,
    time_limit: float = 10.0,
) -> Plan | Infeasible:
    """The best assignment of the model's units to the cluster's devices, any of which may get nothing.

    `order` fixes the order (and leaves out devices that it does not name): exact DP. Otherwise `method`
    "milp" solves a MILP, at most `time_limit` seconds; "dp" searches orders without a solver; "auto" takes
    the MILP where PuLP and a solver are there and the layers are alike, else the DP, and the plan's `method`
    says which and why.  `explain` fills `reasons` (some more searches). SolverMissing: method "milp"
    without PuLP or solver. ValueError: an unknown objective, method or device, constraints that contradict
    the model, or method "milp" for layers that differ.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    if method not in ("auto", "milp", "dp"):
        raise ValueError(f"unknown method {method!r}; there are auto, milp, dp")
    if method == "milp" and not milp.layers_alike(model):
        raise ValueError("the MILP counts layers, and this model's layers differ: use method auto or dp")
    constraints.check(model, cluster, order)
    devices = [j for j in _places(cluster, order) if constraints.allowed(cluster.devices[j].name)]
    shared = objective == "throughput" and workload.streams > 1
    streams = Streams(model, cluster, workload) if shared else None
    following = _following(model, cluster, workload, objective, streams)
    judge = Judge(cluster, following)
    found: list[Found] = []
    cases: list[Case] = []
    for goal in goals(objective, workload):
        tables = _tables(model, cluster, workload, constraints, goal)
        cases.append((tables, goal))
        if order is not None:
            chain, optimal = dp.best_proved(tables, goal, lambda t: dp.cheapest(t, devices))
            how = "exact DP for the given order"
        else:
            why = _why_no_milp(model, method)
            chain, optimal, how = _search(tables, devices, goal, method, why, time_limit)
        if chain is not None:
            found.append(Found(tables, goal, chain, how, optimal, judge.value(tables, goal, chain)))
    if not found:
        return _infeasible(model, cluster, workload, constraints, devices, order is not None)
    best = judge.best(found)
    if following is not None and order is None and len(devices) <= orders.EXACT_DEVICES:
        best = _other_devices(best, judge, cases, devices)
    stages = stages_of(cluster, best.chain)
    answer = evaluate(model, cluster, workload, stages, objective, streams=streams)
    answer = replace(answer, method=best.how, optimal=best.optimal)
    if not explain:
        return answer
    fixed, why_none = order is not None, partial(_why_none, model, cluster, workload, constraints)
    reasons = give_reasons(answer, cluster, best, judge, cases, devices, fixed, why_none)
    return replace(answer, reasons=reasons)


def _following(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    objective: Objective,
    streams: Streams | None,
) -> Following | None:
    """What chains are judged by where the goals' formulas are not what they come to."""
    if streams is not None:

        def seconds(stages: Sequence[Stage]) -> float:
            return streams.steady(stages).seconds

        return Following("the streams", seconds)
    if objective == "first_token" and len(cost.chunks(workload)) > 1:
        return Following("the prompt's chunks", partial(cost.first_token_seconds, model, cluster, workload))
    return None


def _places(cluster: Cluster, order: Sequence[str] | None) -> list[int]:
    """The devices to plan with, by index: all, or those of `order` in that order."""
    if order is None:
        return list(range(len(cluster.devices)))
    if not order:
        raise ValueError("the order names no device")
    places = [cluster.devices.index(cluster.device(name)) for name in order]
    if len(set(places)) < len(places):
        raise ValueError("the order names a device twice")
    return places


def _tables(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints,
    goal: Goal,
) -> TimeTables:
    if goal.objective == "first_token":
        return prompt_tables(model, cluster, workload, constraints)
    return decode_tables(
        model,
        cluster,
        workload,
        constraints,
        batch=goal.batch,
        idle=cost.stages_pause(goal.objective, workload),
    )


def _why_no_milp(model: Model, method: Method) -> str:
    """Why the DP has to do; empty where the MILP can."""
    if method == "dp":
        return "asked for"
    return "" if milp.layers_alike(model) else "the layers differ"


def _search(
    tables: TimeTables,
    devices: Sequence[int],
    goal: Goal,
    method: Method,
    why: str,
    time_limit: float,
) -> tuple[dp.Chain | None, bool, str]:
    """The best chain over orders, whether it is proved, and how it was found."""
    if not why:
        try:
            solver = milp.load_solver()
            chain, optimal = _by_milp(tables, devices, goal, solver, time_limit)
        except milp.SolverMissing as missing:
            if method == "milp":
                raise
            why = str(missing)
        else:
            return chain, optimal, f"MILP ({solver.name}, gap 0)" if optimal else f"MILP ({solver.name})"
    chain, optimal = orders.search_orders(tables, devices, goal)
    how = "exact DP over all orders" if len(devices) <= orders.EXACT_DEVICES else "DP over searched orders"
    return chain, optimal, f"{how} ({why})"


def _by_milp(
    tables: TimeTables,
    devices: Sequence[int],
    goal: Goal,
    solver: milp.Solver,
    time_limit: float,
) -> tuple[dp.Chain | None, bool]:
    """The MILP's chain, checked and smoothed by the DP along its order: among plans of one objective's value
    the DP takes the quickest round, and it has no tolerances."""
    quick = orders.first_guess(tables, devices, goal)
    chain, optimal = milp.best_chain(tables, devices, goal, solver, known=quick, time_limit=time_limit)
    if chain is None:
        return quick, optimal and quick is None
    order = [j for j, _, _ in chain.stages]
    checked = dp.best_chain(tables, goal, partial(dp.cheapest, order=order))
    assert checked is not None, "the MILP's own chain is one of those that the DP sees"
    best = min((checked, chain), key=partial(dp.value, tables, goal))
    claimed, value = (dp.value(tables, goal, c) for c in (chain, best))
    return best, optimal and value >= claimed * (1 - SAME)


def _other_devices(best: Found, judge: Judge, cases: Sequence[Case], devices: Sequence[int]) -> Found:
    """As long as it gives more: does without a device, or lets one more in. By following what the searches
    cannot follow."""

    def found(searches: Iterable[Search]) -> list[Found]:
        chains = [(tables, goal, search(tables, goal)) for search in searches for tables, goal in cases]
        return [
            replace(best, tables=tables, goal=goal, chain=chain, value=judge.value(tables, goal, chain))
            for tables, goal, chain in chains
            if chain is not None
        ]

    fewer: dict[int, list[Found]] = {}  # without each device: no matter what else is used
    while True:
        used = {j for j, _, _ in best.chain.stages}
        fewer |= {j: found([without(j, devices)]) for j in used - fewer.keys()}
        others = [one for j in used for one in fewer[j]]
        others += found(with_it(j, best.chain, devices) for j in devices if j not in used)
        other = min(others, key=lambda one: one.value, default=best)
        if other.value >= best.value * BETTER:
            return best
        best = judge.best([other])


def _why_none(
    model: Model, cluster: Cluster, workload: Workload, constraints: Constraints, devices: Sequence[int]
) -> str:
    """Why no plan was found with these devices, in words: even with links everywhere it is too large for
    them, or else."""
    ends = {cluster.head, *(device.name for device in cluster.devices)}
    joined = replace(cluster, links={(a, b): Link(0.0, math.inf) for a in ends for b in ends if a != b})
    chain, exact = orders.least_lack(lack_tables(model, joined, workload, constraints), devices)
    if chain is not None and chain.total > 0 and exact:
        return "the model does not fit"
    return "there is no plan" if len(devices) <= QUICK_EXACT else "none was found"


def _infeasible(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints,
    devices: Sequence[int],
    fixed: bool,
) -> Infeasible:
    tables = lack_tables(model, cluster, workload, constraints)
    chain, exact = (dp.cheapest(tables, devices), True) if fixed else orders.least_lack(tables, devices)
    if chain is None:
        return Infeasible(
            0, f"no chain of links leads from the head {cluster.head} through the devices and back"
        )
    stages = stages_of(cluster, chain)
    missing = round(chain.total)
    return Infeasible(missing, say_lack(model, cluster, workload, stages, missing, exact), exact)
