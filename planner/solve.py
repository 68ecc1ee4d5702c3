"""plan(): one question in, one answer out. Picks the search, judges what it found, and says why in words.

A chain is judged by its goal's formula; or, where several sequences gather in shared calls or a prompt comes
in chunks, by following it (streams.py). No search can minimise the latter, so there the searches' answers are
only starting points, whose boundaries and devices are changed as long as that helps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

from . import cost, milp, search
from .evaluation import Infeasible, Plan, Reason, evaluate, token_seconds
from .rows import Assignment, Question
from .search import Chain, cheapest, cheapest_any_order
from .streams import Follower
from .tables import TimeTables, counts_suffice, goals, lack_tables, tables_of

Method = Literal["auto", "milp", "dp"]
SAME = 1e-6  # relative: what two exact methods may differ by
BETTER = 1 - 1e-9
TRIALS = 100  # chains that are followed for one plan
MOVES = (1, -1, 2, -2, 4, -4)  # units that a boundary moves by
MB = 1e6
NOTABLE = 1.005  # more tokens/s than that are more
NAMED = 3  # devices that an answer without a plan names
QUICK_EXACT = 5  # devices up to which all orders are tried in some milliseconds


def plan(
    question: Question, *, method: Method = "auto", explain: bool = True, time_limit: float = 10.0
) -> Plan | Infeasible:
    """The best assignment of the model's units to the cluster's devices, any of which may get nothing.

    A given order is planned by exact DP. Otherwise `method` "dp" searches orders without a solver, "milp"
    solves a MILP, at most `time_limit` seconds, and "auto" takes whichever is exact sooner: the DP up to
    QUICK_EXACT devices (up to EXACT_DEVICES where layers differ, or a device holds only some), beyond them
    the MILP if PuLP and a solver are there. The plan's `method` says what was taken. `explain` fills
    `reasons` (some more searches).
    SolverMissing: method "milp" without PuLP or solver. ValueError: an unknown method.
    """
    if method not in ("auto", "milp", "dp"):
        raise ValueError(f"unknown method {method!r}; there are auto, milp, dp")
    planning = Planning(question)
    solver, why = _solver(question, method)
    found = []
    for tables in planning.tables:
        chain, optimal, how = _search(tables, question, solver, why, time_limit)
        if chain is not None:
            found.append(Found(tables, chain, planning.value(tables, chain), how, optimal))
    if not found:
        return _infeasible(question)
    best = planning.best(found)
    answer = evaluate(question, stages_of(question, best.chain), planning.follower)
    answer = replace(answer, method=best.how, optimal=best.optimal)
    return replace(answer, reasons=_reasons(planning, answer, best)) if explain else answer


@dataclass(frozen=True, slots=True)
class Found:
    """A search's answer with the tables of its problem, and its value in the end."""

    tables: TimeTables
    chain: Chain
    value: float
    how: str
    optimal: bool


class Planning:
    """One question's tables, a set for each of its goals, and how chains are judged."""

    def __init__(self, question: Question) -> None:
        self.question, self.devices = question, question.devices
        self.fixed = question.constraints.order is not None
        self.follower = Follower(question)
        self.tables = [tables_of(question, goal) for goal in goals(question)]
        self._followed = ""  # what chains are judged by, where that is no formula
        if question.shares_calls:
            self._followed = "the concurrent sequences"
        elif question.objective == "first_token" and question.workload.in_chunks:
            self._followed = "the prompt's chunks"
        self.thorough = self.fixed or len(self.devices) <= QUICK_EXACT  # `with_it` sees every chain
        self._follow = cache(lambda chain: token_seconds(question, stages_of(question, chain), self.follower))

    def value(self, tables: TimeTables, chain: Chain) -> float:
        """Seconds of a token, or until the first one."""
        return self._follow(replace(chain, total=0.0)) if self._followed else search.value(tables, chain)

    def best(self, found: Sequence[Found]) -> Found:
        """The best of the goals' answers; where chains are followed, with boundaries and devices changed."""
        if not self._followed:
            return replace(min(found, key=lambda one: one.value), optimal=all(one.optimal for one in found))
        best = self._moved_best(found)
        if not self.fixed and len(self.devices) <= search.EXACT_DEVICES:
            best = self._other_devices(best)
        how = f"{best.how} and boundaries moved, by following {self._followed}"
        return replace(best, how=how, optimal=False)

    def _moved_best(self, found: Sequence[Found]) -> Found:
        ranked = sorted(found, key=lambda one: one.value)
        return min((self._improved(one, TRIALS // len(ranked)) for one in ranked), key=lambda one: one.value)

    def _improved(self, found: Found, trials: int) -> Found:
        moves = [(at, by) for at in range(len(found.chain.stages) - 1) for by in MOVES]
        last = at = 0  # the move that helped last
        while moves and at - last < len(moves) and at < trials:
            (where, by), at = moves[at % len(moves)], at + 1
            stages, tables = list(found.chain.stages), found.tables
            (i, first, cut), (j, _, end) = stages[where : where + 2]
            cut += by
            if not (first < cut < end and tables.fits(i, first, cut) and tables.fits(j, cut, end)):
                continue
            stages[where : where + 2] = [(i, first, cut), (j, cut, end)]
            moved = Chain(tuple(stages), found.chain.total)
            value = self.value(tables, moved)
            if value < found.value * BETTER:
                found, last = replace(found, chain=moved, value=value), at
        return found

    def _other_devices(self, best: Found) -> Found:
        """As long as it gives more: does without a device, or lets one more in."""

        def found(chain_of: Callable[[TimeTables], Chain | None]) -> list[Found]:
            chains = [(tables, chain_of(tables)) for tables in self.tables]
            return [
                replace(best, tables=t, chain=c, value=self.value(t, c)) for t, c in chains if c is not None
            ]

        fewer: dict[int, list[Found]] = {}  # without each device: no matter what else is used
        while True:
            used = {j for j, _, _ in best.chain.stages}
            fewer |= {j: found(partial(self.without, j)) for j in used - fewer.keys()}
            others = [one for j in used for one in fewer[j]]
            for j in set(self.devices) - used:
                others += found(partial(self.with_it, j, best.chain))
            other = min(others, key=lambda one: one.value, default=best)
            if other.value >= best.value * BETTER:
                return best
            best = self._moved_best([other])

    # Chains that do without a device of a plan, or with one more.

    def without(self, j: int, tables: TimeTables) -> Chain | None:
        """The best chain of the other devices."""
        others = [i for i in self.devices if i != j]
        if self.fixed:
            return search.best_chain(tables, partial(cheapest, order=others))[0]
        return search.search_orders(tables, others, exact_devices=QUICK_EXACT, trials=0)[0]

    def with_it(self, j: int, chain: Chain, tables: TimeTables) -> Chain | None:
        """The best chain with device j. Of many devices: of a chain's devices in their order with j somewhere
        among them, and of all in a few orders."""
        devices = self.devices
        if not self.fixed and len(devices) <= QUICK_EXACT:
            return search.best_chain(tables, partial(cheapest_any_order, devices=devices, must=j))[0]
        used = [i for i, _, _ in chain.stages]
        orders: list[Sequence[int]] = [devices]
        if not self.fixed:
            orders = [[*used[:at], j, *used[at:]] for at in range(len(used) + 1)]
            orders += search.seed_orders(tables, devices)
        searches = (partial(cheapest, order=order, must=list(order).index(j)) for order in orders)
        chains = (search.best_chain(tables, one)[0] for one in searches)
        found = [chain for chain in chains if chain is not None]
        return min(found, key=partial(search.value, tables), default=None)

    def why_none(self, devices: Sequence[int]) -> str:
        """Why no plan was found with these devices, in words."""
        chain, exact = search.least_lack(lack_tables(self.question, joined=True), devices)
        if chain is not None and chain.total > 0 and exact:
            return "the model does not fit"
        return "there is no plan" if len(devices) <= QUICK_EXACT else "none was found"


def stages_of(question: Question, chain: Chain) -> list[Assignment]:
    """A chain by device index as assignments."""
    devices = question.cluster.devices
    return [Assignment(devices[j].name, first, last) for j, first, last in chain.stages]


def _solver(question: Question, method: Method) -> tuple[milp.Solver | None, str]:
    """What solves the MILP; or None, and why there is none."""
    if method == "dp":
        return None, "asked for"
    few = QUICK_EXACT if counts_suffice(question) else search.EXACT_DEVICES
    if question.constraints.order is not None or (method == "auto" and len(question.devices) <= few):
        return None, ""
    try:
        return milp.load_solver(), ""
    except milp.SolverMissing as missing:
        if method == "milp":
            raise
        return None, str(missing)


def _search(
    tables: TimeTables, question: Question, solver: milp.Solver | None, why: str, time_limit: float
) -> tuple[Chain | None, bool, str]:
    """The best chain, whether it is proved, and how it was found."""
    devices = question.devices
    if question.constraints.order is not None:
        chain, optimal = search.best_chain(tables, partial(cheapest, order=devices))
        return chain, optimal, "exact DP for the given order"
    if solver is not None:
        chain, optimal = _by_milp(tables, devices, solver, time_limit)
        return chain, optimal, f"MILP ({solver.name}, gap 0)" if optimal else f"MILP ({solver.name})"
    chain, optimal = search.search_orders(tables, devices)
    many = len(devices) > search.EXACT_DEVICES
    how = "DP over searched orders" if many else "exact DP over all orders"
    return chain, optimal, f"{how} ({why})" if why else how


def _by_milp(
    tables: TimeTables, devices: Sequence[int], solver: milp.Solver, time_limit: float
) -> tuple[Chain | None, bool]:
    """The MILP's chain, smoothed by the DP along its order, which takes the quickest lap of equal plans."""
    quick = search.first_guess(tables, devices)
    chain, optimal = milp.best_chain(tables, devices, solver, known=quick, time_limit=time_limit)
    if chain is None:
        return quick, optimal and quick is None
    order = [j for j, _, _ in chain.stages]
    checked, _ = search.best_chain(tables, partial(cheapest, order=order))
    assert checked is not None, "the MILP's own chain is one of those that the DP sees"
    best = min((checked, chain), key=partial(search.value, tables))
    claimed, value = (search.value(tables, one) for one in (chain, best))
    return best, optimal and value >= claimed * (1 - SAME)


def _infeasible(question: Question) -> Infeasible:
    tables, devices = lack_tables(question), question.devices
    fixed = question.constraints.order is not None
    chain, exact = (cheapest(tables, devices), True) if fixed else search.least_lack(tables, devices)
    if chain is not None and chain.total == 0 and question.constraints.held:
        return Infeasible(0, _say_unheld(question), exact, files=True)
    if chain is None:
        here = f"the coordinator {question.cluster.coordinator}"
        return Infeasible(0, f"no chain of links leads from {here} through the devices and back")
    missing = round(chain.total)
    return Infeasible(missing, _say_lack(question, stages_of(question, chain), missing, exact), exact)


# Why each device is in a plan or out of it, and what a question without a plan lacks, in words.


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


def _reasons(planning: Planning, plan: Plan, found: Found) -> tuple[Reason, ...]:
    """A reason for every device of the cluster, in its order."""
    used = {j for j, _, _ in found.chain.stages}
    reason = {True: partial(_why_in, planning, plan), False: partial(_why_out, planning, plan, found)}
    devices = [(j, d) for j, d in enumerate(planning.question.cluster.devices) if not d.beside]
    return tuple(Reason(device.name, j in used, reason[j in used](j)) for j, device in devices)


def _why_in(planning: Planning, plan: Plan, j: int) -> str:
    others = [i for i in planning.devices if i != j]
    if not others:
        return "the only device"
    if j in planning.tables[0].pins:
        return "its layers are given"
    constraints, name = planning.question.constraints, planning.question.cluster.devices[j].name
    if name in (constraints.first, constraints.last):
        return "it is to hold an end of the model"
    text = _instead(planning, plan, partial(planning.without, j))
    return f"needed: without it {planning.why_none(others)}" if text is None else f"without it: {text}"


def _why_out(planning: Planning, plan: Plan, found: Found, j: int) -> str:
    device = planning.question.cluster.devices[j]
    if j not in planning.devices:
        return "left out by the order or the constraints given"
    if planning.question.constraints.held.get(device.name) == frozenset():
        return "it has no unit's files yet"
    if all(fit == c for c, fit in enumerate(found.tables.first_fit[j])):
        return f"its cap of {device.ram_bytes / MB:.1f} MB has no room for any unit"
    text = _instead(planning, plan, partial(planning.with_it, j, found.chain))
    leads = "leads" if planning.thorough else "was found"
    return f"no chain with room {leads} through it" if text is None else f"with it: {text}"


def _instead(planning: Planning, plan: Plan, chain_of: Callable[[TimeTables], Chain | None]) -> str | None:
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


def _say_lack(question: Question, stages: Sequence[Assignment], missing: int, exact: bool) -> str:
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


def _say_unheld(question: Question) -> str:
    """Which files are missing, where the caps would suffice."""
    units, constraints = len(question.model.units), question.constraints
    names = [question.cluster.devices[j].name for j in question.devices]
    for u in range(units):
        if not any(constraints.holds(name, u, u + 1) for name in names):
            return f"no device has the files of {units_text(u, u + 1, units)} yet"
    lacking = ", ".join(name for name in names if name in constraints.held)
    return f"the devices with room for more layers do not have their files yet: {lacking}"


def _mb_up(size: int) -> str:
    """Bytes as MB, rounded up, so that what is asked for suffices."""
    return f"{math.ceil(size / MB * 10) / 10:.1f} MB"
