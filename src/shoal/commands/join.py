"""`shoal join`: makes this device one of a house, by a token of `shoal invite`, and serves it."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, add_serving
from ..engine.errors import ShoalError
from . import node

if TYPE_CHECKING:
    from ..net.messages import PairedDevice


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "join",
        "join the house of another device, and run layers for it",
        "TOKEN is what `shoal invite` prints on the head of the house. Once this device has joined, it "
        "serves its house until Ctrl-C, and accepts no stranger. From then on `shoal node` does that.",
    )
    parser.add_argument(
        "token", metavar="TOKEN", nargs="?", help="the token (default: a line of standard input)"
    )
    parser.add_argument("--pair-only", action="store_true", help="end when this device has joined")
    add_serving(parser)
    node.add_hidden(parser)
    parser.set_defaults(
        model=None, insecure=False, both_ends=None, print_systemd=False, print_termux_boot=False
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when this device has joined and, unless told otherwise, has served. UntrustedError: it may
    not join. Other errors as for `shoal node`."""
    devices = _joined(args)
    heads = ", ".join(device.name for device in devices if device.role == "head")
    plural = "s" if len(devices) > 1 else ""
    print(f"joined the house of {heads}: {len(devices)} device{plural}", flush=True)
    if args.pair_only:
        return 0
    args.name = None  # from here on it has the name that the house has given it
    return node.run(args)


def _joined(args: argparse.Namespace) -> tuple[PairedDevice, ...]:
    import trio

    from .. import house
    from ..net.pairing import read_token
    from ..pairing import join_house

    if args.token is None and sys.stdin.isatty():
        print("token: ", end="", file=sys.stderr, flush=True)
    text = sys.stdin.readline() if args.token is None else args.token
    if not text.strip():
        raise ShoalError("there is no token: `shoal invite` on the head prints one")
    invite = read_token(text)
    house.check_free()
    return trio.run(partial(join_house, invite, house.device_name(args.name), mdns=args.mdns))
