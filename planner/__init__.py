"""Who holds which layers: measured devices and links in, a plan and what it predicts out.

Plain rows only: nothing of the engine or the network is imported here, and no third-party package until a
MILP is really solved, so that a phone can plan with the standard library alone.

    rows         what is asked: units, devices, links, workload, constraints; and assignments
    cost         every formula of the cost model
    streams      one walker of messages along a chain: concurrent sequences, first token
    tables       the cost model in the shape that searches step through
    search       exact for a given order or over the orders of a few devices; a good order of many
    milp         exact over orders and layers with PuLP
    solve        plan(): picks the search, judges what it finds, and says why in words
    evaluation   plans: the figures of given stages
    moves        which one boundary should move

What only a coordinator needs is imported when first asked for: a node, which follows its own pace, saves 3
MB.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if not __name__.startswith("shoal."):
    raise ImportError(f"import this package as shoal.planner, not as {__name__}")

from .rows import (
    Assignment,
    Cluster,
    Constraints,
    Device,
    LinkSpeed,
    ModelCosts,
    Objective,
    Question,
    Unit,
    Workload,
)

if TYPE_CHECKING:
    from .evaluation import Alone, Hop, Infeasible, Plan, PlannedStage, Reason, evaluate
    from .milp import SolverMissing
    from .moves import Move, best_move
    from .solve import plan, units_text

_LATE = {
    "evaluation": ("Alone", "Hop", "Infeasible", "Plan", "PlannedStage", "Reason", "evaluate"),
    "milp": ("SolverMissing",),
    "moves": ("Move", "best_move"),
    "solve": ("plan", "units_text"),
}
_MODULES = {name: module for module, names in _LATE.items() for name in names}

__all__ = [
    "Alone", "Assignment", "Cluster", "Constraints", "Device", "Hop", "Infeasible", "LinkSpeed", "ModelCosts",
    "Move", "Objective", "Plan", "PlannedStage", "Question", "Reason", "SolverMissing", "Unit", "Workload",
    "best_move", "evaluate", "plan", "units_text",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value
