"""What given stages would do: the plan's figures, straight from the formulas, whoever chose the stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import cost
from .rows import Alone, Cluster, Model, Objective, Plan, Stage, Workload
from .streams import Steady, Streams


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a decode call of `batch` streams' rows along a chain, and of a token; and the mean rows of
    each stage's calls."""

    batch: int
    rows: tuple[float, ...]
    stages: tuple[float, ...]
    hops: tuple[float, ...]
    busy: tuple[float, ...]
    step: float


def check_stages(model: Model, cluster: Cluster, stages: Sequence[Stage]) -> None:
    """ValueError: stages that do not cover the units in order, that name an unknown device or one twice."""
    edges = [0, *(stage.last for stage in stages)]
    if not stages or [stage.first for stage in stages] != edges[:-1] or edges[-1] != len(model.units):
        raise ValueError(
            f"the stages must cover units 0 to {len(model.units)} in order, without gap or overlap"
        )
    names = [stage.device for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError("a device may have one stage only")
    for name in names:
        cluster.device(name)


def timing(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    objective: Objective,
    streams: Streams,
) -> Timing:
    """The times of stages that cover the model. ValueError: a link is not there."""
    links = cost.chain_hops(model, cluster, stages)
    steady: Steady | None = None
    if objective == "throughput" and workload.streams > 1:
        steady = streams.steady(stages)
    batch = 1 if steady is None else max(1, round(max(steady.rows)))
    alone_at_head = len(stages) == 1 and not any(cost.hop_seconds(link, size) for link, size in links)
    times = tuple(
        cost.stage_decode_seconds(
            model,
            cluster.device(stage.device),
            workload,
            stage.first,
            stage.last,
            batch=batch,
            idle=steady is None and not alone_at_head,
        )
        for stage in stages
    )
    hops = tuple(cost.hop_seconds(link, size * batch) for link, size in links)
    return Timing(
        batch=batch,
        rows=(1.0,) * len(stages) if steady is None else steady.rows,
        stages=times,
        hops=hops,
        busy=tuple(cost.link_busy_seconds(link, size * batch) for link, size in links),
        step=sum(times) + sum(hops) if steady is None else steady.seconds,
    )


def evaluate(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    objective: Objective = "latency",
    *,
    streams: Streams | None = None,
) -> Plan:
    """What given stages would do, whether or not they fit the caps: for a split made by hand or an equal one.

    ValueError when the stages do not cover the units in order, name an unknown device or one twice, or need a
    link that is not there. `streams` are tables of the same question that others made.
    """
    stages = tuple(stages)
    check_stages(model, cluster, stages)
    devices = [cluster.device(stage.device) for stage in stages]
    streams = streams or Streams(model, cluster, workload)
    times = timing(model, cluster, workload, stages, objective, streams)
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
        alone=tuple(
            alone(model, cluster, workload, device.name, objective, streams) for device in cluster.devices
        ),
        reasons=(),
        method="given stages",
        optimal=False,
        batch=times.batch,
    )


def alone(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    name: str,
    objective: Objective,
    streams: Streams,
) -> Alone:
    """What one device would do with the whole model."""
    device, units = cluster.device(name), len(model.units)
    ram = cost.range_ram_bytes(model, device, workload, 0, units)
    missing = max(0, ram - device.ram_bytes)
    try:
        times = timing(model, cluster, workload, [Stage(name, 0, units)], objective, streams)
    except ValueError:  # no way from the head or back
        return Alone(name, None, ram, missing)
    return Alone(name, cost.per_second(times.step), ram, missing)
