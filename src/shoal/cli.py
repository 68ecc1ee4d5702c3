"""The command line: loads the one command that is asked for, and turns errors into a line and an exit code.

Imports argparse and nothing heavy: `shoal --help` answers at once, and works where numpy does not. Exit
codes: 0 done, 2 wrong usage, 129, 130 and 143 ended by SIGHUP, SIGINT (Ctrl-C) and SIGTERM, 141 the reader of
our output went away; the others are in engine/errors.py and net/errors.py.
"""

import argparse
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

from .arguments import build_parser
from .deferred import deferred
from .engine.errors import OperatingSystemError, ShoalError
from .engine.host import limit_libraries
from .engine.os_errors import translated
from .signals import EndingSignals
from .streams import standard_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    with standard_streams(), EndingSignals() as signals:
        args = argparse.Namespace(traceback=False)
        try:
            try:
                parser = build_parser()
                parser.parse_args(argv, args)
                if args.command is not None:
                    return run(args)
                parser.print_help()
                return 0
            finally:
                sys.stdout.flush()
        except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
            leaves = list(_leaves(error))
            if all(isinstance(leaf, BrokenPipeError) for leaf in leaves):
                return 141  # as in `shoal ls | head -1`
            if args.traceback:
                raise
            if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
                return signals.exit_code
            return report(error, leaves)


def run(args: argparse.Namespace) -> int:
    """Import the command that the line names, and run it."""
    # trio imports these, a node that is told addresses uses neither, and they take 1.5 MB of a small device.
    unused = ("ssl", "idna") if args.command == "node" else ()
    limit_libraries()  # the command is about to import NumPy
    collecting = gc.isenabled()
    gc.disable()  # imports leave nothing to collect, and looking for it takes 10 ms
    with deferred(*unused):
        command = importlib.import_module(f"{__package__}.commands.{args.command}")
    if collecting:
        gc.enable()
    code: int = command.run(args)
    return code


def report(error: BaseException, leaves: Sequence[BaseException]) -> int:
    """Print a line for each error meant for the user; return the exit code. Our own mistakes go on."""
    meant = [said for leaf in leaves if (said := _for_user(leaf)) is not None]
    if len(meant) < len(leaves):
        raise error
    with suppress(BrokenPipeError):  # whoever reads the messages went away
        for message in dict.fromkeys(str(said) for said in meant):
            print(f"shoal: error: {message}", file=sys.stderr)
    return meant[0].exit_code


def _for_user(error: BaseException) -> ShoalError | None:
    """The error as the user is to read it; None: it is a mistake of this program."""
    said = translated(error) if isinstance(error, OSError | MemoryError) else error
    if isinstance(said, OperatingSystemError) and said.place is not None:
        from .store import cache_directory

        with suppress(OperatingSystemError):
            cache = str(cache_directory())
            if str(said.place).startswith(cache) or cache.startswith(f"{said.place}/"):
                return OperatingSystemError(f"{said}, or set XDG_CACHE_HOME to another directory")
    return said if isinstance(said, ShoalError) else None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions themselves, out of the groups in which nurseries wrap them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
