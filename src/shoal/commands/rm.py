"""`shoal rm`: removes models from this device."""

from __future__ import annotations

import argparse

from ..store import remove


def run(args: argparse.Namespace) -> int:
    """Prints the name of each model that was removed. ModelFileError: there is none of that name."""
    for name in args.names:
        remove(name)
        print(f"removed {name}")
    return 0
