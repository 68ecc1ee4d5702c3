"""Why each device is in a plan or out of it, and what a problem without a plan lacks, in words."""

from collections.abc import Sequence

from . import cost, dp, orders
from .rows import Cluster, Model, Plan, Reason, Stage, Workload
from .tables import TimeTables

QUICK_EXACT = 5  # devices up to which "without it" is exact; beyond, the best of a few orders
MB = 1e6


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
    """Which caps are how much too low, in the split that lacks least."""
    parts = []
    for stage in stages:
        device = cluster.device(stage.device)
        ram = cost.range_ram_bytes(model, device, workload, stage.first, stage.last)
        if ram > device.ram_bytes:
            what = units_text(stage.first, stage.last, len(model.units))
            cap = f"{device.ram_bytes / MB:.1f} MB"
            parts.append(f"{device.name} would need {ram / MB:.1f} MB for {what} and promises {cap}")
    short = f"the RAM caps are {'' if exact else 'up to '}{missing / MB:.1f} MB short"
    return f"{short}: {'; '.join(parts)}"
