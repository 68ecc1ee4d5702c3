"""`shoal plan`: who should hold which layers, how fast that will be, and whether one device is faster."""

from __future__ import annotations

import argparse

from .. import planner
from ..engine.shards import Model
from ..engine.stage import StageOptions
from ..planning import plan_or_error, planner_model, read_devices
from ..store import resolve


def run(args: argparse.Namespace) -> int:
    """Prints the plan as a table or JSON. NoPlanError: the devices cannot hold the model."""
    model = Model.open(resolve(args.model))
    if args.nodes:
        from ..distributed import survey_cluster

        cluster = survey_cluster(model, args.nodes)
    else:
        cluster = read_devices(args.devices)
    context = min(args.context, model.config.context)
    workload = planner.Workload(context=context, sequences=args.streams, streams=args.streams)
    plan = plan_or_error(planner_model(model, StageOptions()), cluster, workload, args.objective)
    print(planner.to_json(plan) if args.json else planner.render(plan), end="")
    return 0
