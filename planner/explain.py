"""Why each device is in a plan or out of it, and what a question without a plan lacks, in words."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import cost
from .evaluation import Plan, Reason
from .rows import Assignment, Question
from .tables import TimeTables

if TYPE_CHECKING:
    from .search import Chain
    from .solve import Found, Planning

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
        parts.append("LM head")
    return " + ".join(parts)


def give_reasons(planning: "Planning", plan: Plan, found: "Found") -> tuple[Reason, ...]:
    """A reason for every device of the cluster, in its order."""
    used = {j for j, _, _ in found.chain.stages}
    reasons = []
    for j, device in enumerate(planning.question.cluster.devices):
        if j in used:
            text = _why_in(planning, plan, j)
        elif j not in planning.devices:
            text = "left out by the order or the constraints given"
        else:
            text = _why_out(planning, plan, found, j)
        reasons.append(Reason(device.name, j in used, text))
    return tuple(reasons)


def _why_in(planning: "Planning", plan: Plan, j: int) -> str:
    others = [i for i in planning.devices if i != j]
    if not others:
        return "the only device"
    if j in planning.tables[0].pins:
        return "its layers are given"
    text = _instead(planning, plan, lambda tables: planning.without(tables, j))
    return f"needed: without it {planning.why_none(others)}" if text is None else f"without it: {text}"


def _why_out(planning: "Planning", plan: Plan, found: "Found", j: int) -> str:
    device = planning.question.cluster.devices[j]
    if all(fit == c for c, fit in enumerate(found.tables.first_fit[j])):
        return f"its cap of {device.ram_bytes / MB:.1f} MB has no room for any unit"
    text = _instead(planning, plan, lambda tables: planning.with_it(tables, j, found.chain))
    if text is None:
        return f"no chain with room {'leads' if planning.thorough else 'was found'} through it"
    return f"with it: {text}"


def _instead(
    planning: "Planning", plan: Plan, chain_of: "Callable[[TimeTables], Chain | None]"
) -> str | None:
    """What the best chain that a search finds would give, and what the plan gives; None when it finds none.
    Where no plan is proved, this search may find a better."""
    chains = [(tables, chain_of(tables)) for tables in planning.tables]
    best = min((planning.value(t, chain) for t, chain in chains if chain is not None), default=math.inf)
    if best == math.inf:
        return None
    if plan.objective == "first_token":
        return f"first token after {best * 1e3:.0f} ms instead of {plan.first_token_seconds * 1e3:.0f}"
    text = f"{cost.per_second(best):.2f} tokens/s instead of {plan.tokens_per_s:.2f}"
    if plan.optimal or cost.per_second(best) <= plan.tokens_per_s * NOTABLE:
        return text
    return f"{text}: more, which the search did not see"


def say_lack(question: Question, stages: Sequence[Assignment], missing: int, exact: bool) -> str:
    """How many MB the caps are short of, and which caps, in the split that lacks least."""
    model, lacks = question.model, []
    for stage in stages:
        device = question.cluster.device(stage.device)
        ram = cost.range_ram_bytes(model, device, question.workload, stage.first, stage.last)
        what = f"{_mb_up(ram)} for {units_text(stage.first, stage.last, len(model.units))}"
        text = f"{device.name} promises {_mb_up(device.ram_bytes)} and would need {what}"
        lacks.append((ram - device.ram_bytes, text))
    short = [text for lack, text in sorted(lacks, key=lambda entry: -entry[0]) if lack > 0]
    more = f"; and {len(short) - NAMED} more" if len(short) > NAMED else ""
    bound = "" if exact else "up to "
    return f"the RAM caps are {bound}{_mb_up(missing)} short in total: {'; '.join(short[:NAMED])}{more}"


def _mb_up(size: int) -> str:
    """Bytes as MB, rounded up, so that what is asked for suffices."""
    return f"{math.ceil(size / MB * 10) / 10:.1f} MB"
