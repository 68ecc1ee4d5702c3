"""What given stages would do: the plan's figures, straight from the formulas, whoever chose the stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import cost
from .constraints import Running
from .copies import spare_copies
from .goal import Goal, goals
from .rows import Alone, Cluster, Model, Objective, Plan, Stage, Workload


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one decode call along a chain, and of a token."""

    goal: Goal
    stages: tuple[float, ...]
    hops: tuple[float, ...]
    busy: tuple[float, ...]
    step: float


def timing(
    model: Model, cluster: Cluster, workload: Workload, stages: Sequence[Stage], objective: Objective
) -> Timing:
    """The times of stages that cover the model. ValueError: a link is not there."""
    links = cost.chain_hops(model, cluster, stages)
    alone_at_head = len(stages) == 1 and not any(cost.hop_seconds(link, size) for link, size in links)
    pauses = cost.stages_pause(objective, workload) and not alone_at_head
    found: list[Timing] = []
    for goal in goals("throughput" if objective == "throughput" else "latency", workload):
        times = tuple(
            cost.stage_decode_seconds(
                model,
                cluster.device(stage.device),
                workload,
                stage.first,
                stage.last,
                batch=goal.batch,
                idle=pauses,
            )
            for stage in stages
        )
        hops = tuple(cost.hop_seconds(link, size * goal.batch) for link, size in links)
        busy = tuple(cost.link_busy_seconds(link, size * goal.batch) for link, size in links)
        value = goal.value(sum(times) + sum(hops), max(*times, *busy))
        found.append(Timing(goal, times, hops, busy, value))
    return min(found, key=lambda timing: timing.step)


def evaluate(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    objective: Objective = "latency",
    *,
    running: Running | None = None,
) -> Plan:
    """What given stages would do, whether or not they fit the caps: for a split made by hand or an equal one.

    ValueError when the stages do not cover the units in order, name an unknown device or one twice, or need a
    link that is not there.
    """
    stages = tuple(stages)
    edges = [0, *(stage.last for stage in stages)]
    if not stages or [stage.first for stage in stages] != edges[:-1] or edges[-1] != len(model.units):
        raise ValueError(
            f"the stages must cover units 0 to {len(model.units)} in order, without gap or overlap"
        )
    names = [stage.device for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError("a device may have one stage only")
    devices = [cluster.device(name) for name in names]
    times = timing(model, cluster, workload, stages, objective)
    held = list(zip(stages, devices, strict=True))
    return Plan(
        objective=objective,
        streams=workload.streams,
        units=len(model.units),
        stages=stages,
        stage_seconds=times.stages,
        hop_seconds=times.hops,
        link_busy_seconds=times.busy,
        link_bytes=tuple(size for _, size in cost.chain_hops(model, cluster, stages)),
        step_seconds=times.step,
        tokens_per_s=cost.per_second(times.step),
        first_token_seconds=cost.first_token_seconds(model, cluster, workload, stages),
        ram_bytes=tuple(cost.range_ram_bytes(model, d, workload, s.first, s.last) for s, d in held),
        cap_bytes=tuple(device.ram_bytes for device in devices),
        alone=tuple(alone(model, cluster, workload, device.name, objective) for device in cluster.devices),
        reasons=(),
        method="given stages",
        optimal=False,
        batch=times.goal.batch,
        joules_per_token=sum(cost.stage_joules(model, d, workload, s.first, s.last) for s, d in held),
        move_seconds=0.0 if running is None else _move_seconds(model, cluster, running, stages),
        copies=spare_copies(model, cluster, workload, stages, times.stages),
    )


def alone(model: Model, cluster: Cluster, workload: Workload, name: str, objective: Objective) -> Alone:
    """What one device would do with the whole model."""
    device, units = cluster.device(name), len(model.units)
    ram = cost.range_ram_bytes(model, device, workload, 0, units)
    missing = max(0, ram - device.ram_bytes)
    try:
        times = timing(model, cluster, workload, [Stage(name, 0, units)], objective)
    except ValueError:  # no way from the head or back
        return Alone(name, None, ram, missing)
    return Alone(name, cost.per_second(times.step), ram, missing)


def _move_seconds(model: Model, cluster: Cluster, running: Running, stages: Sequence[Stage]) -> float:
    return sum(
        sum(cost.move_seconds(model, cluster, running, stage.device)[stage.first : stage.last])
        for stage in stages
    )
