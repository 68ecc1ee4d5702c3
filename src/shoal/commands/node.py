"""`shoal node`: runs layers of a model for coordinators that connect, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..arguments import (
    Commands,
    add_command,
    add_engine,
    add_model,
    address,
    factor,
    policy,
    positive,
    seconds,
)
from ..imports import quick_imports


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "node",
        "run layers of a model for a coordinator",
        "Serves until Ctrl-C. A coordinator, such as `shoal run --nodes`, connects and assigns layers to "
        "this node. When it ends, its layers move to the other nodes first, so that answers go on; a second "
        "Ctrl-C ends it at once.",
    )
    add_model(parser)
    parser.add_argument(
        "--listen",
        type=address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="address to listen on. HOST may have several addresses, and [::] means all of this device; port "
        "0 is any free one, which the node prints (default 127.0.0.1:0)",
    )
    parser.add_argument("--name", help="name of this device in plans (default: its host name)")
    parser.add_argument(
        "--ram",
        type=positive,
        metavar="MB",
        help="RAM that this process never exceeds (default: three quarters of what is available; in a "
        "container, of what the container may still use)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow an address that other devices can reach, although connections are not encrypted",
    )
    parser.add_argument(
        "--policy",
        type=policy,
        metavar="RULE,...",
        help="limits within which this device may be used, such as charging,battery=30%%,ram=100MB, beyond "
        "which it leaves; temperature=42,cpu=50%%, beyond which it works less; time=60%%, the most of the "
        "time that it works. Or phone, or none (default: phone on Android, none elsewhere; all rules are in "
        "docs/policy.md)",
    )
    add_engine(parser)
    # Options of the lab and of tests: docs/lab.md.
    hidden = partial(parser.add_argument, help=argparse.SUPPRESS)
    hidden("--slow", type=factor, default=1.0)
    hidden("--slow-file", type=Path)
    hidden("--slow-turns", type=Path)
    hidden("--measure-seconds", type=seconds, default=0.5)
    hidden("--port-file", type=Path)
    hidden("--power-files", type=Path, default=Path("/"))


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop, and returns 0. AddressInUseError: the port is in use."""
    # trio imports ssl and idna. A node has no TLS and connects to addresses, so it saves their 1.5 MB.
    with quick_imports("ssl", "idna"):
        from ..node_process import serve

    serve(args)
    return 0
