"""Plans whose ends stay home (planner/home.py): where the user has asked for that, or it costs little."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Literal

from . import planner
from .engine.errors import NoPlanError
from .planner.home import SMALL, Cost, at_home, questions, seconds_of
from .planning import plan_or_error, plan_that_fits

Private = Literal["auto", "always", "never"]
"""Whether both ends of the model have to be on devices of the user's own. "auto": where that costs less than
planner.home.SMALL."""
Planned = tuple[planner.Plan, planner.Workload]


def private_of(asked: bool | None) -> Private:
    """The choice of a command line's --private (True), --no-private (False), or neither."""
    return "auto" if asked is None else "always" if asked else "never"


def plan_ends(
    question: planner.Question, home: Collection[str], private: Private, *, shrink: bool, explain: bool = True
) -> Planned:
    """As planning.plan_that_fits; the plan says in `ends` whether both ends are on devices of `home`, and
    what that costs. NoPlanError: there is no plan, or none with its ends there where they have to be."""
    if private == "never" or not (home or private == "always"):
        return plan_that_fits(question, shrink=shrink, explain=explain)
    if not home:
        raise NoPlanError(f"No plan: {_WANTED}, and no node runs on this device. Start one here.")
    free, without = _found(question, shrink=shrink, explain=explain)
    if free is not None and at_home(question.cluster, free[0].stages, home):
        return _said(free, f"{_on(free[0])}; that costs nothing")
    best = _best(question if free is None else replace(question, workload=free[1]), home, shrink=False)
    if best is None and shrink and (free is None or private == "always"):
        best = _best(question, home, shrink=True)
    if best is None:
        if private == "auto" and free is not None:
            return _said(free, f"the ends do not stay home: {_listed(home)} has no room for both")
        if private == "auto" and without is not None:
            raise without
        raise NoPlanError(
            f"No plan: {_WANTED}, and no plan has both on {_listed(home)}. Raise the cap of that device, "
            "start its node with --both-ends always, or do without --private."
        )
    asked, (plan, workload) = best
    text = f"{_on(plan)}; otherwise there is no plan"
    if free is not None:
        cost, shorter = Cost(plan, free[0]), workload.context < free[1].context
        if private == "auto" and (cost.share >= SMALL or shorter):
            return _said(free, f"the ends do not stay home: that {cost.text} (--private)")
        text = f"{_on(plan)}; that {cost.text}"
        if shorter:
            text += f", and a context of {workload.context} tokens instead of {free[1].context}"
    if explain:
        plan = plan_or_error(replace(asked, workload=workload))
    return _said((plan, workload), text)


_WANTED = "both ends of the model are to stay home (--private)"


def _on(plan: planner.Plan) -> str:
    first, last = plan.stages[0].device, plan.stages[-1].device
    return f"both ends stay home, on {first}" + ("" if last in (first, f"end of {first}") else f" and {last}")


def _found(
    question: planner.Question, *, shrink: bool, explain: bool = False
) -> tuple[Planned | None, NoPlanError | None]:
    try:
        return plan_that_fits(question, shrink=shrink, explain=explain), None
    except NoPlanError as error:
        return None, error


def _best(
    question: planner.Question, home: Collection[str], *, shrink: bool
) -> tuple[planner.Question, Planned] | None:
    """The best plan with its ends at home and what was asked for it: the longest context first, then the
    fastest."""

    def all_found() -> Iterator[tuple[planner.Question, Planned]]:
        for asked in questions(question, home):
            found, _ = _found(asked, shrink=shrink)
            if found is not None:
                yield asked, found

    return min(all_found(), key=lambda one: (-one[1][1].context, seconds_of(one[1][0])), default=None)


def _said(found: Planned, text: str) -> Planned:
    return replace(found[0], ends=text), found[1]


def _listed(home: Collection[str]) -> str:
    return ", ".join(sorted(home))
