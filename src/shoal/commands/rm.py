"""`shoal rm`: deletes models from this device."""

from __future__ import annotations

import argparse

from ..arguments import Commands, add_command


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rm",
        "delete models from this device",
        "Downloaded checkpoints are kept; `shoal ls` shows where.",
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="name from `shoal ls`")


def run(args: argparse.Namespace) -> int:
    """Prints the name of each model that was removed. ModelFileError: no model has that name."""
    from ..held_files import remove_fetched
    from ..store import model_path, remove

    for name in args.names:
        if model_path(name).exists() or remove_fetched(name) is None:
            remove(name)
        print(f"removed {name}")
    return 0
