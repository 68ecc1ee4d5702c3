"""Whether a change of the stages has brought what was predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..planner import Assignment

Stages = tuple[Assignment, ...]

JUDGE_SECONDS, JUDGE_TOKENS = 3.0, 30
"""For how long, and for how many tokens, the speed is measured before it is judged."""
JUDGE_WITHIN = 20.0
"""If that is not possible within this time, the change is not judged."""
LEAST_PART = 1 / 3
"""A change that has brought less than this part of the predicted gain has failed."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The tokens of so many seconds, and how many the cost model expects in that time. The model's error is
    nearly the same for all stages, so the ratio of the two is compared."""

    tokens: float = 0.0
    seconds: float = 0.0
    expected: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(self.tokens + other.tokens, self.seconds + other.seconds, self.expected + other.expected)

    @property
    def known(self) -> bool:
        """Whether there are enough tokens."""
        return self.tokens >= JUDGE_TOKENS

    @property
    def ratio(self) -> float:
        """Measured to expected tokens."""
        return self.tokens / self.expected


@dataclass(frozen=True, slots=True)
class Trial:
    """A change from old stages to new ones, and the predicted seconds of a token with either, while there are
    so many streams. `speed` was measured before it, and `since` is the time of the change. `undoes` another
    one."""

    old: Stages
    new: Stages
    seconds_before: float
    seconds_after: float
    cost_s: float
    streams: int
    speed: Speed
    undoes: bool = False
    since: float = math.inf

    def judged(self, speed: Speed) -> Verdict | None:
        """The verdict after the speed that was measured since the change; None: it was not measured for long
        enough."""
        if not speed.known or speed.seconds < JUDGE_SECONDS:
            return None
        measured, ratio = speed.tokens / speed.seconds, self.speed.ratio if self.speed.known else speed.ratio
        before, predicted = ratio / self.seconds_before, ratio / self.seconds_after
        if self.undoes or not self.speed.known:
            return Verdict(before, predicted, measured, failed=False, undo=False)
        promised = self.seconds_before / self.seconds_after
        brought = promised * speed.ratio / ratio
        unsure = self.streams / self.speed.tokens + self.streams / speed.tokens  # a token of each at the ends
        failed = brought + unsure < 1 + LEAST_PART * (promised - 1)
        return Verdict(before, predicted, measured, failed, undo=failed and brought < 1 + unsure)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tokens/s of a change: those before it, the predicted ones, and the measured ones. A change that has
    `failed` is not tried again; `undo`: nor is it any better than what was before."""

    before: float
    predicted: float
    measured: float
    failed: bool
    undo: bool


def distance(one: Stages, other: Stages) -> int:
    """The number of units that different devices hold."""
    shared = sum(
        max(0, min(a.last, b.last) - max(a.first, b.first))
        for a in one
        for b in other
        if a.device == b.device
    )
    return max(stage.last for stage in one) - shared
