"""A log of what others can cause as often as they like."""

from __future__ import annotations

from collections.abc import Callable

LINES, LINES_SECONDS = 20, 10.0


class RateLimitedLog:
    """Passes on at most LINES lines within LINES_SECONDS, and then how many more there were: that number, and
    `what` they were."""

    def __init__(self, log: Callable[[str], None], what: str, clock: Callable[[], float]) -> None:
        self._log, self._what, self._clock = log, what, clock
        self._since, self._lines = -LINES_SECONDS, 0

    def __call__(self, line: str) -> None:
        now = self._clock()
        if now >= self._since + LINES_SECONDS:
            if self._lines > LINES:
                self._log(f"{self._lines - LINES} {self._what}")
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines <= LINES:
            self._log(line)
