"""`node` and `demo`: other processes and devices."""

from pathlib import Path

from .kinds import address, factor, positive, seconds
from .shared import Commands, add_engine, add_model, command


def node(commands: Commands) -> None:
    parser = command(
        commands,
        "node",
        "offer this device as a node, until Ctrl-C",
        "It runs the layers that a head (`shoal run --nodes`) gives it.",
    )
    add_model(parser)
    parser.add_argument(
        "--listen",
        type=address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="where to listen: all addresses of HOST, [::] for all of this device; port 0 takes a free one "
        "and says which (default 127.0.0.1:0)",
    )
    parser.add_argument("--name", help="what to call this device in plans (default: its host name)")
    parser.add_argument(
        "--ram",
        type=positive,
        metavar="MB",
        help="never use more RAM than this, the process itself included (default: three quarters of what is "
        "available; in a container, of what it may use)",
    )
    parser.add_argument(
        "--slow",
        type=factor,
        default=1.0,
        metavar="F",
        help="take F times as long for each step, to play a slower device (default 1)",
    )
    parser.add_argument(
        "--slow-file",
        type=Path,
        metavar="FILE",
        help="take F from this file instead, again whenever it is replaced",
    )
    parser.add_argument(
        "--slow-turns",
        type=Path,
        metavar="FILE",
        help="of the nodes of this machine that share this file, one computes at a time",
    )
    parser.add_argument(
        "--measure-seconds",
        type=seconds,
        default=0.5,
        metavar="S",
        help="how long to measure this device at the start (default 0.5)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen on an address that others can reach, without encryption",
    )
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="write HOST:PORT there once listening")
    add_engine(parser)


def demo(commands: Commands) -> None:
    parser = command(commands, "demo", "three nodes on this machine answer a question together, step by step")
    parser.add_argument(
        "--prompt",
        default="What is the capital of France?",
        metavar="TEXT",
        help="the question (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=positive, default=300, metavar="S", help="give up after S seconds (default 300)"
    )
