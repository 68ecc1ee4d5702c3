"""`shoal top`: the devices of the house at work, as the head on this device sees them."""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command
from ..engine.errors import ShoalError

if TYPE_CHECKING:
    from ..local.client import RemoteEngine

SECONDS = 1.0
"""The time between two looks."""
_SCREEN, _HOME, _LINE, _REST, _BACK = (
    "\x1b[?1049h\x1b[?25l",
    "\x1b[H",
    "\x1b[K\r\n",
    "\x1b[J",
    "\x1b[?25h\x1b[?1049l",
)


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "top",
        "show the devices of the house at work",
        "For the device on which `shoal up` runs. On a terminal it is drawn again each second, until Ctrl-C "
        "or q; otherwise it is printed once.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/status.md)")
    parser.add_argument(
        "--follow", action="store_true", help="with --json: print an object a second, a line each"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0. ShoalError: no head runs on this device. NodeLostError: it has ended."""
    from ..local.client import connect

    if args.follow and not args.json:
        raise ShoalError("--follow goes with --json; without it `shoal top` follows on a terminal")
    head = connect()
    if head is None:
        raise ShoalError("no head runs on this device: start one with `shoal up`")
    with closing(head):
        if args.json:
            _print_json(head, follow=args.follow)
        elif sys.stdout.isatty():
            with suppress(KeyboardInterrupt):
                _follow(head)
        else:
            from ..status_text import render

            print("\n".join(render(head.status())))
    return 0


def _print_json(head: RemoteEngine, *, follow: bool) -> None:
    while True:
        status = asdict(head.status())
        print(json.dumps(status, indent=None if follow else 2, allow_nan=False), flush=True)
        if not follow:
            return
        time.sleep(SECONDS)


def _follow(head: RemoteEngine) -> None:
    """Draws until the user has enough. What was on the terminal before is there again after it."""
    from ..status_text import render

    with _screen():
        while True:
            size = shutil.get_terminal_size()
            lines = render(head.status(), width=size.columns, height=size.lines - 1)
            sys.stdout.write(_HOME + _LINE.join((*lines, "")) + _REST)
            sys.stdout.flush()
            if _asked_to_end():
                return


@contextmanager
def _screen() -> Iterator[None]:
    """The terminal's other screen, without a cursor and with keys that arrive at once."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    try:
        if before is not None:
            tty.setcbreak(sys.stdin)
        sys.stdout.write(_SCREEN)
        yield
    finally:
        sys.stdout.write(_BACK)
        sys.stdout.flush()
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _asked_to_end() -> bool:
    """Waits for the next look; returns at once if q was typed."""
    until = time.monotonic() + SECONDS
    if not sys.stdin.isatty():
        time.sleep(SECONDS)
        return False
    while (left := until - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            typed = os.read(sys.stdin.fileno(), 64)
            if not typed or b"q" in typed.lower():
                return True
    return False
