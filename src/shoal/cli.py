"""The command line: loads the one command that is asked for, and exceptions become a line and an exit code.

Imports argparse and nothing heavy: `shoal --help` answers at once, and works where numpy does not. Exit
codes: 0 done, 2 wrong usage, 130 interrupted, 141 the reader of our output went away; the others stand in
engine/errors.py and net/errors.py.
"""

import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

from .arguments import build_parser
from .deferred import deferred
from .engine.errors import ShoalError
from .engine.host import limit_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output went away, as in `shoal ls | head -1`; the exit must not try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    # trio imports these, a node that is told addresses uses neither, and they take 1.5 MB of a small device.
    unused = ("ssl", "idna") if args.command == "node" else ()
    limit_libraries()  # the command is about to import NumPy
    collecting = gc.isenabled()
    gc.disable()  # imports leave nothing to collect, and looking for it takes 10 ms
    with deferred(*unused):
        command = importlib.import_module(f"{__package__}.commands.{args.command}")
    if collecting:
        gc.enable()
    try:
        code: int = command.run(args)
    except BaseException as error:
        if args.traceback:
            raise
        return report(error)
    return code


def report(error: BaseException) -> int:
    """Print a line for each error meant for the user; return the exit code. Our own mistakes go on."""
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return 130
    if all(isinstance(leaf, BrokenPipeError) for leaf in leaves):
        raise leaves[0]
    meant = [leaf for leaf in leaves if isinstance(leaf, ShoalError)]
    if len(meant) < len(leaves):
        raise error
    for message in dict.fromkeys(str(leaf) for leaf in meant):
        print(f"shoal: error: {message}", file=sys.stderr)
    return meant[0].exit_code


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions themselves, out of the groups in which nurseries wrap them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
