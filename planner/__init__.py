"""Who holds which layers: measured profiles in, a plan and what it predicts out.

Plain rows only: nothing of the engine or the network is imported here, and no third-party package until a
MILP is really solved, so that a phone can plan with the standard library alone.

    check     single values
    rows      the questions: units, devices, links, workload; and the answers: plan, or infeasible
    cost      every formula, once
    tables    the formulas evaluated for one problem, and the searches' common step
    dp        exact for a fixed order of devices
    orders    exact over all orders of a few devices; a good order of many
    milp      exact over orders and layer counts with PuLP
    solve     plan(): picks the method and fills the answer; evaluate() does so for stages made by hand
    explain   why each device is in or out, and what is missing, in words
    profile   measured rows as JSON, and the devices and links made of them
    report    a plan as text and as JSON
"""

if not __name__.startswith("shoal."):
    raise ImportError(f"import this package as shoal.planner, not as {__name__}")

from .milp import SolverMissing
from .profile import DeviceProfile, LinkProfile, Profile, cluster_from, device_row, link_row
from .profile import dumps as dump_profile
from .profile import loads as load_profile
from .report import Measured, render, render_infeasible, to_json
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
from .solve import evaluate, plan

__all__ = [
    "Alone",
    "Cluster",
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
    "render",
    "render_infeasible",
    "to_json",
]
