"""Why each device is in a plan or out of it, and what a problem without a plan lacks, in words."""

import math
from collections.abc import Sequence

from . import cost, dp, orders
from .rows import Cluster, Model, Plan, Reason, Stage, Workload
from .tables import TimeTables

QUICK_EXACT = 5  # devices up to which "without it" is exact; beyond, the best of a few orders
MB = 1e6
NAMED = 3  # devices that an answer without a plan names


def units_text(first: int, last: int, units: int) -> str:
    """Units [first, last) of a model of `units` in words: 'embedding + layers 1-12'."""
    parts = ["embedding"] if first == 0 else []
    low, high = max(first, 1), min(last, units - 1) - 1
    if low == high:
        parts.append(f"layer {low}")
    elif low < high:
        parts.append(f"layers {low}-{high}")
    if last == units:
        parts.append("head")
    return " + ".join(parts)


def give_reasons(
    plan: Plan, cluster: Cluster, tables: TimeTables, chain: dp.Chain, devices: Sequence[int]
) -> tuple[Reason, ...]:
    """A reason for every device of the cluster, in its order. `devices`: those that the plan could choose
    from."""
    used = {j for j, _, _ in chain.stages}
    reasons = []
    for j, device in enumerate(cluster.devices):
        if j in used:
            text = _why_in(plan, tables, j, devices)
        elif j not in devices:
            text = "not in the given order"
        else:
            text = _why_out(plan, cluster, tables, j, chain)
        reasons.append(Reason(device.name, j in used, text))
    return tuple(reasons)


def _rate(plan: Plan, tables: TimeTables, chain: dp.Chain) -> str:
    return f"{cost.per_second(dp.value(tables, plan.objective, plan.streams, chain)):.2f} tokens/s"


def _why_in(plan: Plan, tables: TimeTables, j: int, devices: Sequence[int]) -> str:
    others = [i for i in devices if i != j]
    if not others:
        return "the only device"
    without, _ = orders.search_orders(
        tables, others, plan.objective, plan.streams, exact_devices=QUICK_EXACT, trials=0
    )
    if without is None:
        return "needed: without it the model does not fit"
    return f"without it: {_rate(plan, tables, without)} instead of {plan.tokens_per_s:.2f}"


def _why_out(plan: Plan, cluster: Cluster, tables: TimeTables, j: int, chain: dp.Chain) -> str:
    device = cluster.devices[j]
    if all(fit == c for c, fit in enumerate(tables.first_fit[j])):
        return f"its cap of {device.ram_bytes / MB:.1f} MB has no room for any unit"
    order = [i for i, _, _ in chain.stages]
    best: dp.Chain | None = None
    for at in range(len(order) + 1):
        trial, place = [*order[:at], j, *order[at:]], at
        found = dp.best_chain(
            tables,
            plan.objective,
            plan.streams,
            lambda t, trial=trial, place=place: dp.cheapest(t, trial, place),  # type: ignore[misc]
        )
        if found is not None and (
            best is None
            or dp.value(tables, plan.objective, plan.streams, found)
            < dp.value(tables, plan.objective, plan.streams, best)
        ):
            best = found
    if best is None:
        return "no chain of links with room leads through it"
    return f"with it: {_rate(plan, tables, best)} instead of {plan.tokens_per_s:.2f}"


def say_lack(
    model: Model, cluster: Cluster, workload: Workload, stages: Sequence[Stage], missing: int, exact: bool
) -> str:
    """How many MB the caps are short of, and which caps, in the split that lacks least."""
    lacks = []
    for stage in stages:
        device = cluster.device(stage.device)
        ram = cost.range_ram_bytes(model, device, workload, stage.first, stage.last)
        what = f"{mb_up(ram)} for {units_text(stage.first, stage.last, len(model.units))}"
        text = f"{device.name} promises {mb_up(device.ram_bytes)} and would need {what}"
        lacks.append((ram - device.ram_bytes, text))
    short = [text for lack, text in sorted(lacks, key=lambda entry: -entry[0]) if lack > 0]
    more = f"; and {len(short) - NAMED} more" if len(short) > NAMED else ""
    bound = "" if exact else "up to "
    return f"the RAM caps are {bound}{mb_up(missing)} short in total: {'; '.join(short[:NAMED])}{more}"


def mb_up(size: int) -> str:
    """Bytes as MB, rounded up, so that what is asked for suffices."""
    return f"{math.ceil(size / MB * 10) / 10:.1f} MB"
