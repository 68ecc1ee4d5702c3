"""Who holds which layers: measured profiles in, a plan and what it predicts out.

Plain rows only: nothing of the engine or the network is imported here, and no third-party package until a
MILP is really solved, so that a phone can plan with the standard library alone.

    check     single values
    rows      the questions: units, devices, links, workload; and the answers: plan, or infeasible
    cost      every formula, once
    constraints  what a plan must keep to beside caps
    goal      what a plan makes least: one formula per objective
    tables    one problem's times and room, and the searches' common step; tabulate fills them, kinds
    dp        exact for a fixed order of devices
    orders    exact over all orders of a few devices; a good order of many
    milp      exact over orders and layer counts with PuLP
    solve     plan(): picks the method
    streams   how several streams gather in shared calls, and what a token then takes
    judge     which chain is best in the end
    evaluation  the figures of given stages
    explain   why each device is in or out, and what is missing, in words
    profile   measured rows as JSON, and the devices and links made of them
    refresh   rows that follow what is measured while they run
    report    a plan as text and as JSON

What only a head needs is imported when it is first asked for: a node, which only follows its own pace, keeps
3 MB for layers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if not __name__.startswith("shoal."):
    raise ImportError(f"import this package as shoal.planner, not as {__name__}")

from .constraints import Constraints
from .profile import DeviceProfile, LinkProfile, Profile, cluster_from, device_row, link_row
from .profile import dumps as dump_profile
from .profile import loads as load_profile
from .refresh import refreshed, refreshed_link
from .rows import (
    Alone,
    Cluster,
    Device,
    Infeasible,
    Link,
    Model,
    Plan,
    Reason,
    Stage,
    Unit,
    Workload,
)

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .milp import SolverMissing
    from .report import Measured, render, render_infeasible, to_json
    from .solve import plan

_LATE = {
    "Measured": "report",
    "SolverMissing": "milp",
    "evaluate": "evaluation",
    "plan": "solve",
    "render": "report",
    "render_infeasible": "report",
    "to_json": "report",
}

__all__ = [
    "Alone",
    "Cluster",
    "Constraints",
    "Device",
    "DeviceProfile",
    "Infeasible",
    "Link",
    "LinkProfile",
    "Measured",
    "Model",
    "Plan",
    "Profile",
    "Reason",
    "SolverMissing",
    "Stage",
    "Unit",
    "Workload",
    "cluster_from",
    "device_row",
    "dump_profile",
    "evaluate",
    "link_row",
    "load_profile",
    "plan",
    "refreshed",
    "refreshed_link",
    "render",
    "render_infeasible",
    "to_json",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATE[name]}", __name__), name)
    return value
