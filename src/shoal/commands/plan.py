"""`shoal plan`: decides which device holds which layers, and predicts how fast that is."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import (
    Commands,
    add_command,
    add_context,
    add_insecure,
    add_json,
    add_layers,
    add_model,
    add_nodes,
    add_private,
    listed,
    name,
    positive,
)
from ..engine.errors import ShoalError
from ..imports import quick_imports

if TYPE_CHECKING:
    from .. import planner


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        "decide which device holds which layers",
        "Predicts tokens/s and the time to the first token, and says whether one device alone would be "
        "faster.",
    )
    add_model(parser)
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument(
        "--devices", type=Path, metavar="FILE", help="read the devices' profiles from a .toml or .json file"
    )
    add_nodes(devices, "ask these running nodes for their profiles")
    add_insecure(parser)
    add_context(parser)
    parser.add_argument(
        "--streams", type=positive, default=1, metavar="N", help="concurrent sequences (default 1)"
    )
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput", "first-token"),
        default="latency",
        help="what to optimise. latency: tokens/s of one sequence; throughput: tokens/s of all concurrent "
        "sequences; first-token: time to the first token of an answer (default latency)",
    )
    parser.add_argument(
        "--prompt", type=positive, default=128, metavar="N", help="prompt length in tokens (default 128)"
    )
    group = parser.add_argument_group("constraints")
    add_layers(group)
    group.add_argument(
        "--exclude", type=listed(name), default=(), metavar="NAME,...", help="devices to exclude"
    )
    group.add_argument("--first", metavar="NAME", help="device that holds the embedding")
    group.add_argument("--last", metavar="NAME", help="device that holds the LM head")
    add_private(
        group,
        "the coordinator's device",
        "with --nodes, where it costs less than 5%%; with --devices, for speed alone",
    )
    parser.add_argument(
        "--svg",
        type=Path,
        metavar="FILE",
        help="draw the timeline of one token and of several as an SVG file",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the plan as a table or JSON, and draws it. NoPlanError: the devices cannot hold the model."""
    with quick_imports():
        from .. import planner
        from ..contexts import context_of, notice
        from ..device_files import read_devices
        from ..engine.model_directory import Model
        from ..engine.stage import StageOptions
        from ..plan_files import plan_by_files
        from ..plan_report import render, to_json
        from ..plan_svg import draw
        from ..planning import default_workload, planner_model
        from ..private import plan_ends, private_of
        from ..store import resolve
        from ..streams import write_output

    model = Model.open(resolve(args.model))
    costs, objective = planner_model(model, StageOptions()), args.objective.replace("-", "_")
    private = private_of(args.private)
    if args.nodes:
        from ..cluster_view import survey_home

        cluster, home, held = survey_home(model, args.nodes, insecure=args.insecure)
    else:
        cluster, home, held = read_devices(args.devices), frozenset[str](), {}
        if private == "always":
            cluster, home = _at_home(costs, cluster)
    context = context_of(args.context, model)
    workload = default_workload(
        context, given=args.context is not None, prompt=args.prompt, streams=args.streams
    )
    try:
        question = planner.Question(costs, cluster, workload, objective, _constraints(args, cluster))
    except ValueError as error:
        raise ShoalError(str(error)) from error
    shrink = args.context is None
    (plan, planned), files = plan_by_files(
        model, question, held, lambda asked: plan_ends(asked, home, private, shrink=shrink)
    )
    if planned.context < context:
        print(notice(planned.context, context), file=sys.stderr)
    if files:
        print(f"shoal: {files}", file=sys.stderr)
    if args.svg is not None:
        write_output(args.svg, draw(plan))
    print(to_json(plan) if args.json else render(plan), end="")
    return 0


def _at_home(costs: planner.ModelCosts, cluster: planner.Cluster) -> tuple[planner.Cluster, frozenset[str]]:
    """The devices of a file where the coordinator's is to have both ends, and its name. ShoalError: it is not
    one of them."""
    from ..planner.home import with_second_range

    here = cluster.coordinator
    if all(device.name != here for device in cluster.devices):
        raise ShoalError(
            f"--private keeps both ends of the model on the coordinator's device, and {here} is none of the "
            "devices: describe it as one"
        )
    with suppress(ValueError):  # without room for a second range it may have all of the model
        cluster = with_second_range(costs, cluster, here)
    return cluster, frozenset({here})


def _constraints(args: argparse.Namespace, cluster: planner.Cluster) -> planner.Constraints:
    """The constraints of the command line. With --layers, the devices keep their order.

    ShoalError: --layers does not have one number for each device. ValueError: constraints contradict each
    other."""
    from .. import planner
    from ..planning import layer_constraints

    if not args.layers:
        return planner.Constraints(frozenset(args.exclude), {}, args.first, args.last)
    return layer_constraints(args.layers, cluster, args.exclude, first=args.first, last=args.last)
