"""`shoal up`: keeps the house's model ready on the devices that are there, for all commands of this user."""

from __future__ import annotations

import argparse

from ..arguments import (
    Commands,
    add_boot,
    add_command,
    add_context,
    add_lending,
    add_mdns,
    add_moves,
    add_private,
    address,
    positive,
    prints_boot,
)
from ..engine.errors import ShoalError
from ..http_arguments import HOST, PORT, add_http
from ..imports import quick_imports

DEVICES_PORT = 7077
"""See house.PORT, whose module is heavy."""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "up",
        "keep a model ready on the devices of the house",
        "This device becomes the head of its house. The model runs on the devices that have joined by "
        "`shoal join`, and on this one, and its layers move as they come and go. `shoal run` and the other "
        "commands of this user then answer there. Runs until Ctrl-C.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="name, path, or SOURCE of `shoal pull`, which is fetched and converted on first use (default: "
        "the model of the last start)",
    )
    parser.add_argument(
        "--listen",
        type=address,
        default=("::", DEVICES_PORT),
        metavar="HOST:PORT",
        help=f"where the devices of the house connect (default [::]:{DEVICES_PORT}, all addresses of this "
        "device)",
    )
    add_mdns(parser, "announce this address in the local network")
    parser.add_argument("--name", help="name of this device in a new house (default: its host name)")
    add_lending(parser)
    add_context(parser)
    parser.add_argument(
        "--streams",
        type=positive,
        default=1,
        metavar="N",
        help="answers at the same time that the plan makes room for (default 1)",
    )
    add_moves(parser)
    parser.add_argument(
        "--no-layers",
        action="store_true",
        help="run no layers on this device, which still gives the others the files of theirs",
    )
    add_private(parser)
    web = parser.add_argument_group("HTTP", "the interface of OpenAI's API, for other programs and browsers")
    where = web.add_mutually_exclusive_group()
    where.add_argument(
        "--http",
        type=address,
        metavar="HOST:PORT",
        help=f"address to listen on (default {HOST}:{PORT}, if it is free; port 0: a free one)",
    )
    where.add_argument("--no-http", action="store_true", help="do not listen for HTTP")
    add_http(web)
    add_boot(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 after Ctrl-C or SIGTERM. AddressInUseError: the port is taken, or `shoal up` runs already.
    UntrustedError: this device is not the head of its house."""
    if prints_boot(args):
        return 0
    if args.private and args.no_layers:
        raise ShoalError("--private keeps both ends of the model on this device, so that it needs layers")
    with quick_imports():
        from ..up_first import begun

    with begun(args) as first:
        with quick_imports():
            from ..up import serve

        serve(args, first)
    return 0
