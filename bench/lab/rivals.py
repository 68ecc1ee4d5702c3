"""Our plan against others on one lab's devices, measured in turns:
`python -m bench.lab.rivals RESULTS.json LAB.toml MODEL`.

ours         what `shoal plan` says
equal        the split that a system without a planner makes, equal as far as the caps allow
lingualinked what LinguaLinked's own objective chooses from the same measurements
alone NAME   the quickest device that could hold everything, if one can
best N       the N-th of all plans by the cost model; shape NAMES: the best of another choice of devices

Each round runs every plan once. The devices are measured once; RESULTS.json keeps that, the plans and the
rounds, so the command goes on where it ended; with `--seconds` no run begins after so many. As root on Linux.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio
from bench.models import model_path
from bench.planner_lingualinked import stages as lingualinked

from shoal import planner
from shoal.cluster_view import survey_cluster
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.planner.cost import range_ram_bytes
from shoal.planning import plan_or_error, planner_model

from .compare import equal_split
from .exhaustive import every, shapes
from .lab import Lab
from .results import Results
from .runs import measure, tokens_for
from .spec import LabSpec, read_spec
from .validate import CONTEXT, MEASURE_SECONDS, asked, cluster_json, cluster_of_json

BEST = 5
RIVAL_ROUNDS = 2
"""Rounds in which all plans run; further ones are for the first three."""
MAIN = ("ours", "equal", "lingualinked")


def plans(
    rows: planner.ModelCosts, cluster: planner.Cluster, spec: LabSpec, streams: int
) -> tuple[dict[str, list[planner.Assignment]], dict[str, str]]:
    """Stages by name, and what there is to say of plans by name."""
    question = asked(rows, cluster, streams)
    workload = question.workload
    ours = plan_or_error(question)
    found = {"ours": list(ours.assignments), "equal": equal_split(rows, cluster, workload)}
    said: dict[str, str] = {}
    theirs = lingualinked(
        rows,
        replace(
            cluster,
            links=_without_coordinator(cluster),
            coordinator=spec.coordinator or cluster.devices[0].name,
        ),
    )
    if theirs is None:
        said["lingualinked"] = "no plan: weights may take 0.7 of each cap"
    elif over := _over(rows, cluster, workload, theirs):
        said["lingualinked"] = f"{_units(theirs)} breaks caps: {over}"
    else:
        found["lingualinked"] = list(theirs)
    if ours.best_alone is None:
        lacks = ", ".join(f"{alone.device} {alone.missing_bytes / 1e6:.0f} MB" for alone in ours.alone)
        said["alone"] = f"no device holds the model; missing: {lacks}"
    else:
        name = ours.best_alone.device
        found[f"alone {name}"] = [planner.Assignment(name, 0, len(rows.units))]
    candidates, count = every(question)
    said["best"] = f"of {count} feasible plans"
    for i, candidate in enumerate(candidates[:BEST]):
        found[f"best {i + 1}"] = list(candidate.stages)
    for candidate in shapes(candidates)[1:4]:
        found[f"shape {'+'.join(sorted(candidate.devices))}"] = list(candidate.stages)
    return found, said


def _without_coordinator(cluster: planner.Cluster) -> dict[tuple[str, str], planner.LinkSpeed]:
    """Its coordinator is one of the devices."""
    return {ends: link for ends, link in cluster.links.items() if cluster.coordinator not in ends}


def _over(
    rows: planner.ModelCosts,
    cluster: planner.Cluster,
    workload: planner.Workload,
    stages: Sequence[planner.Assignment],
) -> str:
    """Devices that would hold more than they promise, and by how much."""
    parts = []
    for stage in stages:
        device = cluster.device(stage.device)
        more = range_ram_bytes(rows, device, workload, stage.first, stage.last) - device.ram_bytes
        if more > 0:
            parts.append(f"{stage.device} by {more / 1e6:.0f} MB")
    return ", ".join(parts)


def _units(stages: Sequence[planner.Assignment]) -> str:
    return ", ".join(f"{stage.device} {stage.last - stage.first}" for stage in stages)


def study(
    lab: Lab, model: Model, results: Results, key: str, streams: int, rounds: int, until: float
) -> bool:
    """Adds rounds to a record, until there are enough; whether there are."""
    rows = planner_model(model, StageOptions())
    if key not in results.rows:
        cluster = survey_cluster(model, lab.addresses, insecure=True)
        found, said = plans(rows, cluster, lab.spec, streams)
        named = {name: [[s.device, s.first, s.last] for s in stages] for name, stages in found.items()}
        record = {
            "cluster": cluster_json(cluster),
            "plans": named,
            "said": said,
            "runs": {n: [] for n in named},
        }
        results.put(key, record)
    record = results.rows[key]
    cluster = cluster_of_json(record["cluster"])
    for turn in range(rounds):
        for name, edges in record["plans"].items():
            if len(record["runs"][name]) > turn or (name not in MAIN and turn >= RIVAL_ROUNDS):
                continue
            if time.monotonic() > until:
                return False
            stages = [planner.Assignment(*edge) for edge in edges]
            predicted = planner.evaluate(asked(rows, cluster, streams), stages).tokens_per_s
            (run,) = trio.run(
                measure, lab, model, stages, streams, 1, tokens_for(predicted, streams, CONTEXT)
            )
            record["runs"][name].append({**run.to_json(), "predicted": predicted})
            results.put(key, record)
    return True


def render(rows: dict[str, Any]) -> str:
    """The records as tables."""
    text = []
    for key, record in rows.items():
        text += [f"{key}:", "", "| plan | units | predicted t/s | measured t/s | runs |", "|-|-|-:|-:|-|"]
        middle: dict[str, float] = {}
        for name, runs in _pooled(record).items():
            speeds = [run["tokens_per_s"] for run in runs]
            middle[name] = statistics.median(speeds)
            units = ", ".join(f"{device} {last - first}" for device, first, last in record["plans"][name])
            spread = f"{min(speeds):.2f} to {max(speeds):.2f}, {len(speeds)}"
            text.append(f"| {name} | {units} | {runs[-1]['predicted']:.2f} | {middle[name]:.2f} | {spread} |")
        text += ["", *(f"{name}: {words}" for name, words in record["said"].items())]
        one = rows.get(key.rsplit(" ", 1)[0] + " 1", {"runs": {}})["runs"].get("equal")
        if "ours" in middle:
            if one:
                base = statistics.median(run["tokens_per_s"] for run in one)
                text.append(f"ours is {middle['ours'] / base:.2f}x of one stream on the equal split")
            best = max(middle, key=lambda name: middle[name])
            text.append(f"ours is {middle['ours'] / middle[best]:.2f} of the best measured, {best}")
        text.append("")
    return "\n".join(text)


def _pooled(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs by the first name that their plan has; plans without runs are left out."""
    first: dict[str, str] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, edges in record["plans"].items():
        if record["runs"].get(name):
            runs.setdefault(first.setdefault(str(edges), name), []).extend(record["runs"][name])
    return runs


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all rounds are there."""
    parser = argparse.ArgumentParser(prog="python -m bench.lab.rivals", description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file, read and added to")
    parser.add_argument("lab", type=Path, help="a TOML file, such as bench/lab/phones.toml")
    parser.add_argument("model", help="a name from `shoal ls`, a path, or NAME/TYPE of bench/models.py")
    parser.add_argument("--streams", default="1,4", help="answers at a time (default 1,4)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each plan (default 5)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so many")
    args = parser.parse_args(arguments)
    start, results, model = time.monotonic(), Results(args.results), Model.open(model_path(args.model))
    streams, done = [int(count) for count in args.streams.split(",")], True
    options = ("--measure-seconds", str(MEASURE_SECONDS))
    spec, most = read_spec(args.lab), max(streams)
    with Lab.open(spec, model.path, context=CONTEXT, sequences=most, options=options) as lab:
        for count in streams:
            key = f"{args.lab.stem} {args.model} {count}"
            done &= study(lab, model, results, key, count, args.rounds, start + args.seconds)
    print(render(results.rows))
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ShoalError as error:
        sys.exit(f"bench.lab.rivals: {error}")
