"""`shoal invite`: lets one device join the house of this one, which is its head."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, add_mdns, address, seconds
from ..engine.errors import ShoalError

if TYPE_CHECKING:
    from ..net.messages import Address


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "invite",
        "let another device join this one's house",
        "Prints a token for `shoal join` on the other device, also as a QR code, and waits until that device "
        "has joined. The token can be used once. Ctrl-C withdraws it. This device becomes the head of the "
        "house with its first invite: it alone can use the others.",
    )
    parser.add_argument(
        "--listen",
        type=address,
        default=("::", 0),
        metavar="HOST:PORT",
        help="address that the other device can reach (default [::]:0, all of this device and any free port)",
    )
    add_mdns(parser, "announce this address in the local network")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=600.0,
        metavar="S",
        help="how long the token is valid (default 600)",
    )
    parser.add_argument("--name", help="name of this device in a new house (default: its host name)")
    parser.add_argument("--no-qr", action="store_true", help="print no QR code")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when a device has joined. UntrustedError: none has."""
    import trio

    from .. import house
    from ..local.client import running
    from ..nearby import announce
    from ..net.connection import open_tasks
    from ..net.tls import der_of, key_of
    from ..pairing import Inviting

    house.open_or_create(args.name)
    homes: tuple[Address, ...] = ()
    hint = "Then start `shoal up MODEL` on this device, so that it has layers to run."
    with suppress(ShoalError):  # the head is another version, which does not matter here
        up = running()
        if up is not None:
            homes = house.head_addresses()
            hint = f"It joins `shoal up {Path(up.model).name}`, which runs on this device."

    async def main() -> None:
        inviting = await Inviting.open(args.listen, args.seconds, _log, homes)
        token = inviting.invite.token()
        print(
            f"On the other device, within {args.seconds:.0f} s:\n\n    shoal join {token}\n\n{hint}\n",
            flush=True,
        )
        if not args.no_qr:
            _show(token)
        async with open_tasks() as tasks:
            if args.mdns:
                tasks.start_soon(announce, "join", inviting.invite.head, inviting.listeners, _log)
            device = await inviting.wait(args.seconds)
            tasks.cancel_scope.cancel()
        key = key_of(der_of(device))
        print(f"{device.name} has joined (key {key[:16]}). `shoal devices` lists the house.", flush=True)

    trio.run(main)
    return 0


def _show(token: str) -> None:
    """Prints a QR code, where the terminal can show one."""
    try:
        import segno
    except ImportError:
        _log("there is no QR code, since the segno package is missing: pip install segno")
        return
    if sys.stdout.isatty():
        segno.make(token, micro=False).terminal(compact=True)
        print(flush=True)


def _log(line: str) -> None:
    print(f"shoal: {line}", file=sys.stderr, flush=True)
