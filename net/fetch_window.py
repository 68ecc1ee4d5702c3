"""How many bytes of files a node asks for ahead, so that a transfer gives way to the tokens of answers.

The time from a request to its answer, less what it takes on an idle connection, is the time that the bytes
wait in queues on their way, as everything else that uses the link does. The window grows while they wait for
less than a target, and shrinks when they wait for longer, as LEDBAT does (RFC 6817). What an idle connection
takes is measured every BASE_SECONDS by letting it fall idle (as in LEDBAT++), so that a queue of its own
never counts as distance.
"""

from __future__ import annotations

from collections import deque

from .messages import FILE_BYTES

GENTLE_SECONDS, FULL_SECONDS = 0.015, 0.05
"""The time that bytes may wait in queues while the source or this node computes for answers, and else. Also
then it has a bound: answers that begin, and pings, wait for what is on its way."""
LEAST, MOST = 2 * 1024, 4 * 1024 * 1024
"""Bounds of the window in bytes."""
BASE_SECONDS = 20.0
_BASES, _LAST = 3, 4
"""So many measurements of an idle connection, and of the last answers, of which the least counts: others may
use the link, too."""
_AHEAD = 3
"""Requests in a window."""


class Window:
    """The window of one connection. Times in seconds of a clock that `now` has."""

    def __init__(self) -> None:
        self.bytes = LEAST
        self._bases = deque[float](maxlen=_BASES)
        self._measured = 0.0
        self._delays = deque[float](maxlen=_LAST)
        self._idle = False
        """Whether a request is on its way alone, which measures an idle connection."""
        self._changed = 0.0
        self._starting = True
        """Whether the bytes have never waited for as long as they may."""

    def request(self, outstanding: int, now: float) -> int:
        """The bytes to ask for next while `outstanding` bytes are on their way; 0: none for now."""
        if self._idle or not self._bases or now - self._measured > BASE_SECONDS:
            if outstanding:
                return 0
            self._idle = True
            return LEAST
        size = min(FILE_BYTES, max(LEAST, self.bytes // _AHEAD))
        return size if outstanding + size <= max(self.bytes, LEAST) else 0

    def answered(self, seconds: float, now: float, *, gentle: bool) -> None:
        """Notes that an answer came `seconds` after its request. `gentle`: answers of the model are computed,
        to which the transfer gives way."""
        if self._idle:
            self._bases.append(seconds)
            self._measured, self._idle = now, False
            return
        self._delays.append(seconds)
        if now - self._changed < seconds:  # what is measured is not yet the effect of the last change
            return
        self._changed = now
        target = GENTLE_SECONDS if gentle else FULL_SECONDS
        excess = max(0.0, min(self._delays) - min(self._bases)) / target
        if excess >= 1:
            self._starting = False
        factor = 2.0 if self._starting and excess < 0.5 else 1 + max(-0.5, (1 - excess) / 4)
        self.bytes = min(MOST, max(LEAST, int(self.bytes * factor)))
        self._delays.clear()
