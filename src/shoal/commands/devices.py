"""`shoal devices`: the devices of this one's house; the head renames and revokes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, add_json
from ..engine.errors import ShoalError

if TYPE_CHECKING:
    from ..net.messages import PairedDevice

_NAMES = {"list": 0, "rename": 2, "revoke": 1, "leave": 0}


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "devices",
        "list, rename or revoke the devices of the house",
        "`rename OLD NEW` and `revoke NAME` are for the head. A revoked device loses its connections within "
        "a second, and can join again with another invite only. `leave` makes this device forget its house.",
    )
    parser.add_argument("action", nargs="?", choices=tuple(_NAMES), default="list", help="(default list)")
    parser.add_argument("names", metavar="NAME", nargs="*", help="for rename: OLD NEW; for revoke: NAME")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0. ShoalError: there is no such device. UntrustedError: this device is not the head."""
    from .. import house

    if len(args.names) != _NAMES[args.action]:
        raise ShoalError(f"`shoal devices {args.action}` takes {_NAMES[args.action]} names: see --help")
    match args.action:
        case "rename":
            house.change(lambda devices: _renamed(devices, *args.names))
        case "revoke":
            house.change(lambda devices: _without(devices, args.names[0]))
            print(f"{args.names[0]} is no longer a device of the house")
            return 0
        case "leave":
            house.leave()
            print("this device has forgotten its house: `shoal devices revoke` on the head removes it there")
            return 0
    _list(house.load() or (), args.json)
    return 0


def _of(devices: Sequence[PairedDevice], name: str) -> PairedDevice:
    for device in devices:
        if device.name == name:
            return device
    names = ", ".join(device.name for device in devices)
    raise ShoalError(f"there is no device {name!r}; there are: {names}")


def _renamed(devices: Sequence[PairedDevice], old: str, new: str) -> list[PairedDevice]:
    from ..house import device_name

    changed = _of(devices, old)
    if not new.strip() or device_name(new) != new:
        raise ShoalError("a name has 1 to 64 characters that can be printed")
    if any(device.name == new for device in devices):
        raise ShoalError(f"there is a device {new!r} already")
    return [replace(device, name=new) if device is changed else device for device in devices]


def _without(devices: Sequence[PairedDevice], name: str) -> list[PairedDevice]:
    gone = _of(devices, name)
    if gone.role == "head":
        raise ShoalError(f"{name} is the head of the house: revoke the others, or `shoal devices leave`")
    return [device for device in devices if device is not gone]


def _list(devices: Sequence[PairedDevice], as_json: bool) -> None:
    from ..net.tls import der_of, key_of
    from ..text_table import table

    rows = [(device.name, device.role, key_of(der_of(device))) for device in devices]
    if as_json:
        print(json.dumps([{"name": name, "role": role, "key": key} for name, role, key in rows], indent=2))
    elif rows:
        print(table(("NAME", "ROLE", "KEY"), [(name, role, key[:16]) for name, role, key in rows]))
    else:
        print("this device has no house: `shoal invite` begins one, `shoal join TOKEN` joins one")
