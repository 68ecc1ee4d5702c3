"""Progress of a long job: on a terminal a bar with speed and time left, otherwise a line for every 10 %.

Where nobody knows how much there is to do: what is done and the speed, otherwise a line for every minute."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

_INTERVAL = 0.1  # seconds between two drawings of a bar
_MINUTE = 60.0
_MEMORY = 3.0  # seconds over which the speed is averaged
_TEXT = 48  # columns kept for the numbers
_WITH_SPEED = ("MB", "lines")


class Progress:
    """Progress of one job, counted in bytes (unit MB) or in other units. A context manager: its end ends the
    line."""

    def __init__(
        self,
        label: str,
        *,
        unit: str = "MB",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.unit = label, unit
        self.total: int | None = 1
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._marks: list[tuple[float, int]] = []
        self._drawn = -_INTERVAL
        self._tenth = -1
        self._minute = 0.0
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end_line()

    def update(self, done: int, total: int | None) -> None:
        """Reports that `done` of `total` are done; None: nobody knows how many there are."""
        now, self.total = self._clock(), None if total is None else max(total, 1)
        if not self._marks:
            self._tenth = 10 * done // self.total if done and self.total else -1
            self._minute = now + _MINUTE
        self._marks.append((now, done))
        while len(self._marks) > 2 and self._marks[1][0] < now - _MEMORY:
            self._marks.pop(0)
        if self._terminal:
            if now - self._drawn >= _INTERVAL or (self.total is not None and done >= self.total):
                self._drawn = now
                self._draw(done)
        elif self._is_due(done, now):
            self._stream.write(f"{self.label}: {self._text(done)}\n")
            self._stream.flush()

    def _is_due(self, done: int, now: float) -> bool:
        """Whether it is time for a line."""
        if self.total is None:
            due = now >= self._minute
            self._minute = now + _MINUTE if due else self._minute
            return due
        tenth = 10 * done // self.total
        due, self._tenth = tenth > self._tenth, max(tenth, self._tenth)
        return due

    def warn(self, message: str) -> None:
        """Prints a warning on a line of its own. The bar continues below it."""
        self.end_line()
        self._stream.write(f"shoal: warning: {message}\n")
        self._stream.flush()

    def end_line(self) -> None:
        """Ends the line of the bar, if there is one."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _draw(self, done: int) -> None:
        text = self._text(done)
        columns = shutil.get_terminal_size().columns
        room = min(
            30, columns - len(self.label) - _TEXT
        )  # independent of the text, so that the bar does not jump
        filled = 0 if self.total is None else room * done // self.total
        bar = f" [{'#' * filled}{' ' * (room - filled)}]" if room >= 5 and self.total is not None else ""
        line = f"{self.label}{bar} {text}"[: columns - 1]
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def _text(self, done: int) -> str:
        (first, before), (now, _) = self._marks[0], self._marks[-1]
        speed = (done - before) / (now - first) if now > first else 0.0
        scale = 1e6 if self.unit == "MB" else 1
        digits = 1 if self.unit == "MB" else 0
        pace = f"  {speed / scale:.1f} {self.unit}/s" if speed and self.unit in _WITH_SPEED else ""
        if self.total is None:
            return f"{done / scale:.{digits}f} {self.unit}{pace}"
        left = _duration((self.total - done) / speed) if speed and done < self.total else ""
        amount = f"{done / scale:.{digits}f}/{self.total / scale:.{digits}f} {self.unit}"
        return f"{100 * done // self.total:3d} %  {amount}{pace}" + (f"  {left} left" if left else "")


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"
