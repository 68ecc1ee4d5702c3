"""LinguaLinked's own objective, solved on our profiles: `python -m bench.planner_lingualinked`.

As its released code states it: the sum of every module's operations over its device's rate, plus transfers,
whose latencies are added for all pairs of devices (a constant) and whose bytes weigh 1000 times too little;
modules contiguous, the first one on the head; weights within 0.7 of the RAM. No keys and values, no reading
of weights, no slowest stage. Devices are free to get nothing there, too. The command compares what it chooses
with our plans, both as our cost model predicts them, on random clusters of 4 devices.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace

from bench.planner import problem

from shoal.planner import (
    Assignment,
    Cluster,
    Constraints,
    Device,
    Infeasible,
    LinkSpeed,
    ModelCosts,
    Objective,
    Plan,
    Question,
    Workload,
    evaluate,
    plan,
)

RAM_SHARE = 0.7
UNIT_ERROR = 1000


def stages(model: ModelCosts, cluster: Cluster) -> tuple[Assignment, ...] | None:
    """What it would assign; None where the weights do not fit. Its quadratic program is ours with other
    rows: exact by all orders and cuts."""
    units = tuple(
        replace(
            unit, read_bytes=0, kv_bytes_per_token=0, fixed_state_bytes=0, workspace_bytes=0, attend_macs=0
        )
        for unit in model.units
    )
    devices = tuple(
        Device(device.name, int(RAM_SHARE * device.ram_bytes), 1e18, device.macs_per_s)
        for device in cluster.devices
    )
    names = {cluster.coordinator, *(device.name for device in devices)}
    links = {
        (a, b): LinkSpeed(0.0, UNIT_ERROR * link.bytes_per_s)
        for (a, b), link in cluster.links.items()
        if {a, b} <= names
    }
    first = cluster.coordinator if cluster.coordinator in {device.name for device in devices} else None
    question = Question(
        ModelCosts(units, model.tied_bytes, model.kv_page_tokens),
        Cluster(devices, links, cluster.coordinator),
        Workload(context=1),  # it knows neither context nor streams
        constraints=Constraints(first=first),
    )
    answer = plan(question, method="dp", explain=False)
    return None if isinstance(answer, Infeasible) else answer.assignments


def main() -> None:
    """Prints a line for each objective."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner_lingualinked")
    parser.add_argument("--problems", type=int, default=100)
    args = parser.parse_args()
    objectives: tuple[Objective, ...] = ("latency", "throughput")
    for objective in objectives:
        gains: list[float] = []
        over = neither = 0
        for seed in range(args.problems):
            question = problem(seed, 4, 24)
            cluster = question.cluster
            cluster = Cluster(cluster.devices, _with_coordinator(cluster), cluster.devices[0].name)
            question = replace(question, cluster=cluster, objective=objective)
            ours = plan(question, explain=False)
            theirs = stages(question.model, cluster)
            if isinstance(ours, Infeasible) or theirs is None:
                neither += 1
                continue
            their_plan = evaluate(question, theirs)
            if _breaks_a_cap(their_plan):
                over += 1
            gains.append(ours.tokens_per_s / their_plan.tokens_per_s)
        low, middle, high = (min(gains), statistics.median(gains), max(gains)) if gains else [math.nan] * 3
        print(
            f"{objective}: ours predicts {middle:.2f} times the tokens/s of LinguaLinked's objective in the "
            f"median of {len(gains)} clusters ({low:.2f} to {high:.2f}); {over} of its plans break "
            f"a RAM cap; {neither} clusters more hold the model by one of the two rules at most"
        )


def _breaks_a_cap(found: Plan) -> bool:
    return any(stage.ram_bytes > stage.cap_bytes for stage in found.stages)


def _with_coordinator(cluster: Cluster) -> dict[tuple[str, str], LinkSpeed]:
    """The links without those of a coordinator apart: the first device is that, as its phones have it."""
    return {ends: link for ends, link in cluster.links.items() if cluster.coordinator not in ends}


if __name__ == "__main__":
    main()
