"""Our plan and the equal split on the devices of a lab, predicted beside measured.

Devices and links are measured once, as `shoal plan --nodes` does; both plans are predicted from the same
measurement, and then run: `streams` answers at a time, several times, of which the table shows the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from shoal import planner
from shoal.cluster_view import survey_cluster
from shoal.engine.errors import NoPlanError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.planner.cost import range_ram_bytes
from shoal.planning import plan_or_error, planner_model

from .lab import Lab
from .runs import PROMPT, measure, tokens_for


@dataclass(frozen=True, slots=True)
class Row:
    """One plan under one load. Tokens/s of all streams together; `runs` as measured, in their order."""

    name: str
    streams: int
    plan: planner.Plan
    runs: tuple[float, ...]

    @property
    def predicted(self) -> float:
        return self.plan.tokens_per_s

    @property
    def measured(self) -> float:
        return statistics.median(self.runs)

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1

    @property
    def split(self) -> str:
        """Units by device, in the chain's order."""
        return ", ".join(f"{stage.device} {stage.last - stage.first}" for stage in self.plan.stages)


def compare(lab: Lab, model: Model, streams: Sequence[int], repeats: int, context: int) -> Iterator[Row]:
    """Rows for each number of streams: our plan, then the equal split. NoPlanError: the caps hold neither."""
    rows = planner_model(model, StageOptions())
    cluster = survey_cluster(model, lab.addresses, insecure=True)
    for count in streams:
        objective: planner.Objective = "latency" if count == 1 else "throughput"
        workload = planner.Workload(context, sequences=count, streams=count, prompt_tokens=PROMPT)
        question = planner.Question(rows, cluster, workload, objective)
        ours = plan_or_error(question)
        equal = planner.evaluate(question, equal_split(rows, cluster, workload))
        for name, plan in (("ours", ours), ("equal", equal)):
            tokens = tokens_for(plan.tokens_per_s, count, context)
            runs = trio.run(measure, lab, model, plan.stages, count, repeats, tokens)
            yield Row(name, count, plan, tuple(run.tokens_per_s for run in runs))


def equal_split(
    model: planner.ModelCosts, cluster: planner.Cluster, workload: planner.Workload
) -> list[planner.Assignment]:
    """As many layers on each device, in their order, as the caps allow: the counts' least sum of squares, and
    among equals more layers on earlier devices.

    The embedding is on the first device, the head on the last. NoPlanError: no such split fits."""
    units, devices = len(model.units), cluster.devices
    best: dict[int, tuple[int, list[int], list[planner.Assignment]]] = {0: (0, [], [])}
    for i, device in enumerate(devices):
        longer: dict[int, tuple[int, list[int], list[planner.Assignment]]] = {}
        for first, (squares, fewer, stages) in best.items():
            for last in [units] if i == len(devices) - 1 else range(first + 1, units):
                if last <= first or range_ram_bytes(model, device, workload, first, last) > device.ram_bytes:
                    continue
                layers = min(last, units - 1) - max(first, 1)
                value = (squares + layers**2, [*fewer, -layers])
                if last not in longer or value < longer[last][:2]:
                    longer[last] = (*value, [*stages, planner.Assignment(device.name, first, last)])
        best = longer
    if units not in best:
        raise NoPlanError(
            "no split that gives every device a part fits the caps: raise some, or leave one out"
        )
    return best[units][2]


def render(rows: Sequence[Row]) -> str:
    """The rows as a table, and what they say about ours against the equal split of one stream."""
    lines = [
        "| streams | plan | units | predicted t/s | measured t/s | of it predicted | runs |",
        "|-:|-|-|-:|-:|-:|-|",
    ]
    for row in rows:
        runs = f"{min(row.runs):.2f} to {max(row.runs):.2f}, {len(row.runs)}"
        lines.append(
            f"| {row.streams} | {row.name} | {row.split} | {row.predicted:.2f} | {row.measured:.2f} | "
            f"{row.error:+.0%} | {runs} |"
        )
    found = {(row.name, row.streams): row.measured for row in rows}
    base = found.get(("equal", 1))
    for (name, streams), speed in found.items():
        if name == "ours" and base:
            many = f"{streams} stream{'s' * (streams > 1)}"
            lines.append(f"ours, {many}: {speed / base:.2f}x of one stream on the equal split")
    return "\n".join(lines) + "\n"
