"""`shoal node`: runs layers of a model for a coordinator, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..arguments import Commands, add_boot, add_command, add_serving, factor, prints_boot, seconds
from ..imports import quick_imports


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "node",
        "run layers of a model for a coordinator",
        "Serves until Ctrl-C. Without MODEL it serves its house: it connects to `shoal up` on the head, runs "
        "the head's model, and fetches the files of its layers from the other devices. With MODEL it waits "
        "for a coordinator, such as `shoal run --nodes`. When it ends, its layers move to the other nodes "
        "first, so that answers go on; a second Ctrl-C ends it at once.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="name from `shoal ls`, or path to a model directory (default: that of the head of the house)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="accept everybody who reaches the port, without encryption, although this device is paired",
    )
    add_serving(parser)
    parser.add_argument(
        "--both-ends",
        choices=("always", "if-small"),
        help="offer a second range for the LM head alone, at the next port, so that a plan can have both "
        "ends of the model on this device (--private); it takes part of --ram, and needs MODEL. if-small: "
        "only if that part is at most 5%%",
    )
    add_boot(parser)
    add_hidden(parser)


def add_hidden(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the lab and of tests: docs/lab.md."""
    hidden = partial(parser.add_argument, help=argparse.SUPPRESS)
    hidden("--slow", type=factor, default=1.0)
    hidden("--slow-file", type=Path)
    hidden("--slow-turns", type=Path)
    hidden("--measure-seconds", type=seconds, default=0.5)
    hidden("--port-file", type=Path)
    hidden("--power-files", type=Path, default=Path("/"))


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop, and returns 0. AddressInUseError: the port is in use."""
    if prints_boot(args):
        return 0
    # trio imports ssl and idna. A node connects to addresses and needs TLS in a house only: it saves 1.5 MB.
    with quick_imports("ssl", "idna"):
        from ..node_process import serve

    serve(args)
    return 0
