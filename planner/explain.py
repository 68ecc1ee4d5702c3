"""Why each device is in a plan or out of it, and what a problem without a plan lacks, in words."""

import math
from collections.abc import Callable, Sequence

from . import cost
from .alternatives import QUICK_EXACT, Case, Search, with_it, without
from .judge import Found, Judge
from .rows import Cluster, Model, Plan, Reason, Stage, Workload

MB = 1e6
NOTABLE = 1.005  # more tokens/s than that are more
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
    plan: Plan,
    cluster: Cluster,
    found: Found,
    judge: Judge,
    cases: Sequence[Case],
    devices: Sequence[int],
    fixed: bool,
    why_none: Callable[[Sequence[int]], str],
) -> tuple[Reason, ...]:
    """A reason for every device of the cluster, in its order. `cases`: all that were searched; `devices`:
    those that the plan could choose from, `fixed`: in this order; `why_none`: why there is no plan with some
    of them, in words."""
    used = {j for j, _, _ in found.chain.stages}
    reasons = []
    for j, device in enumerate(cluster.devices):
        if j in used:
            text = _why_in(plan, judge, cases, j, devices, fixed, why_none)
        elif j not in devices:
            text = "left out by the order or the constraints given"
        else:
            text = _why_out(plan, cluster, found, judge, cases, j, devices, fixed)
        reasons.append(Reason(device.name, j in used, text))
    return tuple(reasons)


def _instead(plan: Plan, judge: Judge, cases: Sequence[Case], search: Search) -> str | None:
    """What the best chain that a search finds would give, and what the plan gives; None when it finds
    none. Where no plan is proved, this search may find a better."""
    best = math.inf
    for tables, goal in cases:
        chain = search(tables, goal)
        if chain is not None:
            best = min(best, judge.value(tables, goal, chain))
    if best == math.inf:
        return None
    if plan.objective == "first_token":
        return f"first token after {best * 1e3:.0f} ms instead of {plan.first_token_seconds * 1e3:.0f}"
    text = f"{cost.per_second(best):.2f} tokens/s instead of {plan.tokens_per_s:.2f}"
    if plan.optimal or cost.per_second(best) <= plan.tokens_per_s * NOTABLE:
        return text
    return f"{text}: more, which the search did not see"


def _why_in(
    plan: Plan,
    judge: Judge,
    cases: Sequence[Case],
    j: int,
    devices: Sequence[int],
    fixed: bool,
    why_none: Callable[[Sequence[int]], str],
) -> str:
    others = [i for i in devices if i != j]
    if not others:
        return "the only device"
    if j in cases[0][0].pins:
        return "its layers are given"

    text = _instead(plan, judge, cases, without(j, devices, fixed))
    return f"needed: without it {why_none(others)}" if text is None else f"without it: {text}"


def _why_out(
    plan: Plan,
    cluster: Cluster,
    found: Found,
    judge: Judge,
    cases: Sequence[Case],
    j: int,
    devices: Sequence[int],
    fixed: bool,
) -> str:
    device = cluster.devices[j]
    if all(fit == c for c, fit in enumerate(found.tables.first_fit[j])):
        return f"its cap of {device.ram_bytes / MB:.1f} MB has no room for any unit"
    text = _instead(plan, judge, cases, with_it(j, found.chain, devices, fixed))
    if text is None:
        proved = fixed or len(devices) <= QUICK_EXACT
        return f"no chain with room {'leads' if proved else 'was found'} through it"
    return f"with it: {text}"


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
