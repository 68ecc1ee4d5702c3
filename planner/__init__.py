"""Who holds which layers: measured devices and links in, a plan and what it predicts out.

Plain rows only: nothing of the engine or the network is imported here, and no third-party package until a
MILP is really solved, so that a phone can plan with the standard library alone. docs/planner.md says which
file does what. What only a coordinator needs is imported when first asked for: a node, which follows its own
pace, saves 3 MB.
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
    from .moves import Steal, steals
    from .solve import plan, units_text

_LATE = {
    "evaluation": ("Alone", "Hop", "Infeasible", "Plan", "PlannedStage", "Reason", "evaluate"),
    "milp": ("SolverMissing",),
    "moves": ("Steal", "steals"),
    "solve": ("plan", "units_text"),
}
_MODULES = {name: module for module, names in _LATE.items() for name in names}

__all__ = [
    "Alone", "Assignment", "Cluster", "Constraints", "Device", "Hop", "Infeasible", "LinkSpeed", "ModelCosts",
    "Objective", "Plan", "PlannedStage", "Question", "Reason", "SolverMissing", "Steal", "Unit", "Workload",
    "evaluate", "plan", "steals", "units_text",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value
