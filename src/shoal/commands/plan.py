"""`shoal plan`: who should hold which layers, how fast that will be, and whether one device is faster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import planner
from ..contexts import context_of, notice
from ..device_files import read_devices
from ..engine.errors import ShoalError
from ..engine.model_directory import Model
from ..engine.stage import StageOptions
from ..plan_report import render, to_json
from ..plan_svg import draw
from ..planning import default_workload, plan_that_fits, planner_model
from ..store import resolve


def run(args: argparse.Namespace) -> int:
    """Prints the plan as a table or JSON, and draws it. NoPlanError: the devices cannot hold the model."""
    model = Model.open(resolve(args.model))
    if args.nodes:
        from ..distributed import survey_cluster

        cluster = survey_cluster(model, args.nodes)
    else:
        cluster = read_devices(args.devices)
    context = context_of(args.context, model)
    workload = default_workload(
        context, given=args.context is not None, prompt=args.prompt, streams=args.streams
    )
    costs, objective = planner_model(model, StageOptions()), args.objective.replace("-", "_")
    try:
        question = planner.Question(costs, cluster, workload, objective, _constraints(args, cluster))
    except ValueError as error:
        raise ShoalError(str(error)) from error
    plan, planned = plan_that_fits(question, shrink=args.context is None)
    if planned.context < context:
        print(notice(planned.context, context), file=sys.stderr)
    if args.svg is not None:
        _write(args.svg, draw(plan))
    print(to_json(plan) if args.json else render(plan), end="")
    return 0


def _constraints(args: argparse.Namespace, cluster: planner.Cluster) -> planner.Constraints:
    """What was asked for; the devices keep their order if layers were counted out. ShoalError: the counts are
    not one a device. ValueError: they contradict the rest."""
    names = [device.name for device in cluster.devices]
    layers: dict[str, int] = {}
    if args.layers:
        if len(args.layers) != len(names):
            raise ShoalError(
                f"--layers has {len(args.layers)} numbers, and there are {len(names)} devices: "
                f"{', '.join(names)}; 0 leaves one out"
            )
        layers = dict(zip(names, args.layers, strict=True))
    order = tuple(name for name in names if name not in args.exclude) if layers else None
    return planner.Constraints(frozenset(args.exclude), layers, args.first, args.last, order)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ShoalError(f"{path} cannot be written: {error.strerror or error}") from error
