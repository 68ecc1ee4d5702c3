"""`plan` and `profile`."""

from pathlib import Path

from .kinds import positive
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
        default=2048,
        metavar="N",
        help="tokens of context to make room for (default 2048)",
    )
    parser.add_argument(
        "--streams", type=positive, default=1, metavar="N", help="requests at the same time (default 1)"
    )
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        default="latency",
        help="latency: one request as fast as can be; throughput: many together (default latency)",
    )
    add_json(parser)


def profile(commands: Commands) -> None:
    parser = command(commands, "profile", "measure how fast this device runs a model's operations")
    add_model(parser)
    add_engine(parser)
    add_json(parser)
