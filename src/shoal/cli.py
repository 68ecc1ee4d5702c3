"""The `shoal` command: runs one command line, and turns an error into one line and an exit code.

Exit codes: 0 success; 2 wrong usage; 19 some lines of a file have an error instead of a result; 129, 130 and
143 ended by SIGHUP, SIGINT (Ctrl-C) and SIGTERM; 141 the reader of the output has gone away. The others are
in engine/errors.py and net/errors.py.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import Self

from .arguments import build_parser, module_name
from .engine.errors import OperatingSystemError, ShoalError
from .engine.host import limit_libraries
from .engine.os_errors import translated
from .streams import standard_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    with standard_streams(), EndingSignals() as signals:
        args = argparse.Namespace(traceback=False)
        try:
            try:
                parser = build_parser(sys.argv[1:] if argv is None else argv)
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
    """Run the command that was parsed."""
    limit_libraries()  # the command is about to import NumPy
    code: int = import_module(f"{__package__}.commands.{module_name(args.command)}").run(args)
    return code


def report(error: BaseException, leaves: Sequence[BaseException]) -> int:
    """Print a line for each error that is meant for the user; return the exit code. Mistakes of this program
    are raised again."""
    meant = [said for leaf in leaves if (said := _for_user(leaf)) is not None]
    if len(meant) < len(leaves):
        raise error
    with suppress(BrokenPipeError):  # the reader of the messages has gone away
        for message in dict.fromkeys(str(said) for said in meant):
            print(f"shoal: error: {message}", file=sys.stderr)
    return meant[0].exit_code


def _for_user(error: BaseException) -> ShoalError | None:
    """The error as the user reads it. None: it is a mistake of this program."""
    said = translated(error) if isinstance(error, OSError | MemoryError) else error
    if isinstance(said, OperatingSystemError) and said.place is not None:
        from .store import cache_directory

        with suppress(OperatingSystemError):
            cache = str(cache_directory())
            if str(said.place).startswith(cache) or cache.startswith(f"{said.place}/"):
                return OperatingSystemError(f"{said}, or set XDG_CACHE_HOME to another directory")
    return said if isinstance(said, ShoalError) else None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in an exception group, which nurseries raise; any other exception is its only leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


class EndingSignals:
    """A context in which SIGTERM and SIGHUP raise KeyboardInterrupt, so that a command cleans up as after
    Ctrl-C. A signal that the parent process made this one ignore stays ignored: SIGINT is blocked instead,
    since an event loop can only be interrupted where SIGINT has Python's own handler."""

    def __init__(self) -> None:
        self._received = signal.SIGINT
        self._handled: list[signal.Signals] = []
        self._blocked: set[int | signal.Signals] | None = None
        """The signals that were blocked before SIGINT was; None: it is not ignored."""

    @property
    def exit_code(self) -> int:
        """The exit code of a process that was interrupted, as a shell reports it."""
        return 128 + self._received

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._interrupt)
                    self._handled.append(number)
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, *error: object) -> None:
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        if self._blocked is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # which drops those that wait
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        # An event loop has a handler of its own, which knows when it may be interrupted.
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
