"""Measured values that are steady but for noise, and sometimes jump."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from ..engine.measure import median

WEIGHT = 0.2
"""The weight of a new value in the moving average."""
JUMP, NOISES = 0.1, 4.0
"""A value that is farther from the average than this, and than so many times the noise, does not belong to
it."""
RECENT = 12
"""The noise is that of so many values."""
UNKNOWN_NOISE = 0.06
"""The noise before there are enough values."""
UNSETTLED_SECONDS = 2.0
"""A value that has been changing for longer than this is taken as it is."""
JUMPS = 5
"""The number of jumps that are kept."""


@dataclass(frozen=True, slots=True)
class Level:
    """The logarithm of a measured value: the moving average, the recent values, and the times of the last
    jumps. Two values in a row that do not belong to the average are a jump: the average begins again there.
    `moving`: since when it has been changing, until two values agree."""

    value: float
    recent: tuple[float, ...]
    jumps: tuple[float, ...] = ()
    moving: float | None = None

    @classmethod
    def of(cls, measured: float) -> Level:
        """A level that begins with a measured value above 0."""
        value = math.log(measured)
        return cls(value, (value,))

    def seen(self, measured: float, now: float, known: Iterable[float] = ()) -> Level:
        """The level after another measurement. One that is near a `known` value, and does not belong to the
        average, is a jump to that value: it need not be seen twice."""
        value, last = math.log(measured), self.recent[-1]
        if value == last and self.steady and len(self.recent) == RECENT:
            return self
        off, band = value - self.value, max(JUMP, NOISES * self.noise)
        recent = (*self.recent, value)[-RECENT:]
        if abs(off) <= band:
            weight = max(WEIGHT, 1 / len(recent))
            return replace(self, value=self.value + weight * off, recent=recent, moving=None)
        near = min(map(math.log, known), key=lambda one: abs(value - one), default=math.inf)
        there = abs(value - near) <= JUMP
        if self.moving is None and not there:
            return replace(self, recent=recent, moving=now)
        jumps, since = self.jumps, now if self.moving is None else self.moving
        if not jumps or jumps[-1] < since:
            jumps = (*jumps, since)[-JUMPS:]
        if there:
            return Level(near, recent, jumps)
        return Level(value, recent, jumps, None if abs(value - last) <= band / 2 else since)

    @property
    def measured(self) -> float:
        """The smoothed value."""
        return math.exp(self.value)

    @property
    def steady(self) -> bool:
        """Whether all values kept have been the same."""
        return all(value == self.value for value in self.recent)

    @property
    def noise(self) -> float:
        """The standard deviation of single values, relative to the value. It is estimated from the median
        change between two of them, in which a jump does not count."""
        changes = [abs(after - before) for before, after in pairwise(self.recent)]
        return median(changes) / 0.95 if len(changes) >= 4 else UNKNOWN_NOISE

    def settled(self, now: float) -> bool:
        """Whether the value is not just changing."""
        return self.moving is None or now - self.moving > UNSETTLED_SECONDS

    def lasts(self, now: float) -> float:
        """The seconds for which the value should stay as it is: for ever before it has jumped twice; then as
        long as it did between jumps. One that has stayed for longer than that should stay as long again."""
        if len(self.jumps) < 2:
            return math.inf
        usual, age = median([after - before for before, after in pairwise(self.jumps)]), now - self.jumps[-1]
        return usual - age if age < usual else age
