"""plan(): one question in, one answer out. Picks the method, evaluates what it found, and says why in
words."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from . import cost, dp, milp, orders
from .explain import give_reasons, say_lack
from .rows import OBJECTIVES, Alone, Cluster, Infeasible, Model, Objective, Plan, Stage, Workload
from .tables import TimeTables, lack_tables, time_tables

Method = Literal["auto", "milp", "dp"]
SAME = 1e-6  # relative: what two exact methods may differ by


def plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    objective: Objective = "latency",
    order: Sequence[str] | None = None,
    *,
    method: Method = "auto",
    explain: bool = True,
    time_limit: float = 10.0,
) -> Plan | Infeasible:
    """The best assignment of the model's units to the cluster's devices, any of which may get nothing.

    `order` fixes the order (and leaves out devices that it does not name): exact DP. Otherwise `method`
    "milp" solves a MILP, at most `time_limit` seconds; "dp" searches orders without a solver; "auto" takes
    the MILP where PuLP and a solver are there and the layers are alike, else the DP, and the plan's `method`
    says which and why. `explain` fills `reasons` (some more searches). SolverMissing: method "milp" without
    PuLP or solver. ValueError: an unknown objective, method or device, or method "milp" for layers that
    differ.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    if method not in ("auto", "milp", "dp"):
        raise ValueError(f"unknown method {method!r}; there are auto, milp, dp")
    if method == "milp" and not milp.layers_alike(model):
        raise ValueError("the MILP counts layers, and this model's layers differ: use method auto or dp")
    devices = _places(cluster, order)
    tables = time_tables(model, cluster, workload)
    streams = workload.streams
    if order is not None:
        chain, optimal = dp.best_chain(tables, objective, streams, lambda t: dp.cheapest(t, devices)), True
        how = "exact DP for the given order"
    else:
        chain, optimal, how = _search(model, tables, devices, objective, streams, method, time_limit)
    if chain is None:
        return _infeasible(model, cluster, workload, devices, order is not None)
    stages = [Stage(cluster.devices[j].name, first, last) for j, first, last in chain.stages]
    found = evaluate(model, cluster, workload, stages, objective)
    found = replace(found, method=how, optimal=optimal)
    if not explain:
        return found
    return replace(found, reasons=give_reasons(found, cluster, tables, chain, devices))


def evaluate(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    objective: Objective = "latency",
) -> Plan:
    """What given stages would do, whether or not they fit the caps: for a split made by hand or an equal one.

    ValueError when the stages do not cover the units in order, name an unknown device or one twice, or need a
    link that is not there.
    """
    stages = tuple(stages)
    edges = [0, *(stage.last for stage in stages)]
    if not stages or [stage.first for stage in stages] != edges[:-1] or edges[-1] != len(model.units):
        raise ValueError(
            f"the stages must cover units 0 to {len(model.units)} in order, without gap or overlap"
        )
    names = [stage.device for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError("a device may have one stage only")
    devices = [cluster.device(name) for name in names]
    hops = cost.chain_hops(model, cluster, stages)
    stage_seconds = tuple(
        cost.stage_decode_seconds(model, device, workload, stage.first, stage.last)
        for stage, device in zip(stages, devices, strict=True)
    )
    hop_seconds = tuple(cost.hop_seconds(link, size) for link, size in hops)
    busy = tuple(cost.link_busy_seconds(link, size) for link, size in hops)
    step = cost.step_seconds(stage_seconds, hop_seconds, busy, objective, workload.streams)
    return Plan(
        objective=objective,
        streams=workload.streams,
        units=len(model.units),
        stages=stages,
        stage_seconds=stage_seconds,
        hop_seconds=hop_seconds,
        link_busy_seconds=busy,
        step_seconds=step,
        tokens_per_s=cost.per_second(step),
        first_token_seconds=cost.first_token_seconds(model, cluster, workload, stages),
        ram_bytes=tuple(
            cost.range_ram_bytes(model, device, workload, stage.first, stage.last)
            for stage, device in zip(stages, devices, strict=True)
        ),
        cap_bytes=tuple(device.ram_bytes for device in devices),
        alone=tuple(_alone(model, cluster, workload, device.name, objective) for device in cluster.devices),
        reasons=(),
        method="given stages",
        optimal=False,
    )


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


def _search(
    model: Model,
    tables: TimeTables,
    devices: Sequence[int],
    objective: Objective,
    streams: int,
    method: Method,
    time_limit: float,
) -> tuple[dp.Chain | None, bool, str]:
    """The best chain over orders, whether it is proved, and how it was found."""
    why = ""
    if method == "dp":
        why = "asked for"
    elif not milp.layers_alike(model):
        why = "the layers differ"
    else:
        try:
            solver = milp.load_solver()
            chain, optimal = _by_milp(tables, devices, objective, streams, solver, time_limit)
        except milp.SolverMissing as missing:
            if method == "milp":
                raise
            why = str(missing)
        else:
            return chain, optimal, f"MILP ({solver.name}, gap 0)" if optimal else f"MILP ({solver.name})"
    chain, optimal = orders.search_orders(tables, devices, objective, streams)
    return chain, optimal, f"{'exact DP over all orders' if optimal else 'DP over searched orders'} ({why})"


def _by_milp(
    tables: TimeTables,
    devices: Sequence[int],
    objective: Objective,
    streams: int,
    solver: milp.Solver,
    time_limit: float,
) -> tuple[dp.Chain | None, bool]:
    """The MILP's chain, checked and smoothed by the DP along its order: among plans of one objective's value
    the DP takes the quickest round, and it has no tolerances."""
    quick, _ = orders.search_orders(tables, devices, objective, streams, exact_devices=1, trials=0)
    known = None if quick is None else dp.value(tables, objective, streams, quick)
    chain, optimal = milp.best_chain(
        tables, devices, objective, streams, solver, known=known, time_limit=time_limit
    )
    if chain is None:
        return quick, optimal and quick is None
    order = [j for j, _, _ in chain.stages]
    checked = dp.best_chain(tables, objective, streams, lambda t: dp.cheapest(t, order))
    assert checked is not None, "the MILP's own chain is one of those that the DP sees"
    best = min((c for c in (checked, quick) if c), key=lambda c: dp.value(tables, objective, streams, c))
    claimed, value = (dp.value(tables, objective, streams, c) for c in (chain, best))
    return best, optimal and value >= claimed * (1 - SAME)


def _infeasible(
    model: Model, cluster: Cluster, workload: Workload, devices: Sequence[int], fixed: bool
) -> Infeasible:
    tables = lack_tables(model, cluster, workload)
    chain, exact = (dp.cheapest(tables, devices), True) if fixed else orders.least_lack(tables, devices)
    if chain is None:
        return Infeasible(
            0, f"no chain of links leads from the head {cluster.head} through the devices and back"
        )
    stages = [Stage(cluster.devices[j].name, first, last) for j, first, last in chain.stages]
    missing = round(chain.total)
    return Infeasible(missing, say_lack(model, cluster, workload, stages, missing, exact), exact)


def _alone(model: Model, cluster: Cluster, workload: Workload, name: str, objective: Objective) -> Alone:
    device, units = cluster.device(name), len(model.units)
    ram = cost.range_ram_bytes(model, device, workload, 0, units)
    missing = max(0, ram - device.ram_bytes)
    try:
        hops = cost.chain_hops(model, cluster, [Stage(name, 0, units)])
    except ValueError:  # no way from the head or back
        return Alone(name, None, ram, missing)
    seconds = cost.step_seconds(
        [cost.stage_decode_seconds(model, device, workload, 0, units)],
        [cost.hop_seconds(link, size) for link, size in hops],
        [cost.link_busy_seconds(link, size) for link, size in hops],
        objective,
        workload.streams,
    )
    return Alone(name, cost.per_second(seconds), ram, missing)
