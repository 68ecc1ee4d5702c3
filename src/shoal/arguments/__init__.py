"""The grammar of the command line: every subcommand, its options, and the words a first-time user reads.

What each command finds in its `args` is listed in commands/__init__.py.
"""

import argparse

from .. import __version__
from .bench import bench
from .models import convert, inspect, ls, pull, rm, verify
from .node import demo, node
from .parser import Parser
from .plan import plan, profile
from .run import run
from .shared import add_traceback


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal",
        description="Run one language model across the devices you own: each holds some of its layers.",
        epilog='New here? `shoal pull smollm2-135m`, then `shoal run smollm2-135m "Hello"`. '
        "`shoal COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    add_traceback(parser, default=False, text="on an error show where in the code it arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for add in (pull, ls, rm, convert, verify, inspect, run, plan, profile, bench, node, demo):
        add(commands)
    return parser
