"""`plan` and `profile`."""

import argparse
from pathlib import Path

from .kinds import names, positive, wholes
from .shared import Commands, add_engine, add_json, add_model, add_nodes, command


def plan(commands: Commands) -> None:
    parser = command(
        commands,
        "plan",
        "say which device should hold which layers, how fast that is, and whether one alone is faster",
    )
    add_model(parser)
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument(
        "--devices", type=Path, metavar="FILE", help="a .toml or .json file with the devices' profiles"
    )
    add_nodes(devices, "ask these running nodes for their profiles")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of context to make room for (default: the model's, or the most that fits)",
    )
    parser.add_argument(
        "--streams", type=positive, default=1, metavar="N", help="requests at the same time (default 1)"
    )
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput", "first-token"),
        default="latency",
        help="latency: one request as fast as can be; throughput: many together; first-token: the answer to "
        "a prompt begins as soon as can be (default latency)",
    )
    parser.add_argument(
        "--prompt", type=positive, default=128, metavar="N", help="tokens of a prompt (default 128)"
    )
    _constraints(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw one token, and several, as an SVG")
    add_json(parser)


def _constraints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("constraints")
    group.add_argument(
        "--layers",
        type=wholes,
        default=(),
        metavar="N,N,...",
        help="exactly so many layers on each device, in their order; 0 leaves one out",
    )
    group.add_argument("--exclude", type=names, default=(), metavar="NAME,...", help="devices to leave out")
    group.add_argument("--first", metavar="NAME", help="the device that holds the embedding")
    group.add_argument("--last", metavar="NAME", help="the device that holds the head")


def profile(commands: Commands) -> None:
    parser = command(commands, "profile", "measure how fast this device runs a model's operations")
    add_model(parser)
    add_engine(parser)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what `plan --devices FILE` reads")
    add_json(parser)
