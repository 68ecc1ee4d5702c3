"""Signals that end a process, as one exception: whatever it holds is put in order, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class EndingSignals:
    """A context in which SIGTERM and SIGHUP raise KeyboardInterrupt, unless whoever started the process lets
    it ignore them."""

    def __init__(self) -> None:
        self._received = signal.SIGINT
        self._handled: list[signal.Signals] = []

    @property
    def exit_code(self) -> int:
        """The exit code of a process that was interrupted, as a shell reports it."""
        return 128 + self._received

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._interrupt)
                    self._handled.append(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        # An event loop's own handler knows when it may be interrupted.
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
