"""What `shoal plan` says of nodes that do not hold the files of all units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from . import planner
from .engine.errors import NoPlanError
from .engine.model_directory import Model
from .planning import MB
from .private import Planned

_BETTER = 1.1
"""Files are fetched for a plan that is faster by more than this factor."""


def plan_by_files(
    model: Model,
    question: planner.Question,
    held: Mapping[str, frozenset[int]],
    plan: Callable[[planner.Question], Planned],
) -> tuple[Planned, str]:
    """The plan with which `shoal run` would begin, and a sentence about files that the nodes would fetch, or
    "". `held`: the units whose files devices have, where these are not all. NoPlanError: as for `plan`."""
    if not held:
        return plan(question), ""
    best = plan(question)
    size = _missing(model, held, best[0].assignments)
    if not size:
        return best, ""
    fetch = f"{size / MB:,.1f} MB of files that are not there yet"
    try:
        now = plan(replace(question, constraints=replace(question.constraints, held=held)))
    except NoPlanError:
        return best, f"before the nodes answer by this plan, they fetch {fetch}"
    if best[0].tokens_per_s <= _BETTER * now[0].tokens_per_s:
        return now, ""
    faster = f"{best[0].tokens_per_s:.3g} tokens/s"
    return now, f"this plan keeps to the files that the nodes hold; for {faster} they fetch {fetch}"


def _missing(model: Model, held: Mapping[str, Collection[int]], stages: Sequence[planner.Assignment]) -> int:
    """The bytes of files that stages need and their devices lack."""
    size = 0
    for stage in stages:
        own = held.get(stage.device)
        if own is None:
            continue
        names = {name for u in range(stage.first, stage.last) for name in model.index.units[u].files}
        there = {name for u in own for name in model.index.units[u].files}
        size += sum(model.index.files[name].size for name in names - there)
    return size
