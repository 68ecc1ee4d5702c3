"""Records of transitions: what moved, why, what was predicted and what came of it; and what a chain is used
for. Nothing here waits or reads a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..planner import units_text
from .events import Moved
from .generation import Generation
from .placement import Outcome, Proposal, Usage
from .rebalance import expected_tokens

MEASURED_SECONDS = 5.0
"""For how long answers must run, before a transition and after it, for the tokens/s of the record."""
RECENT_SECONDS = 3.0
"""For how long what was measured tells how fast answers come now."""
MOST_MOVES = 1000
"""The most records that are kept."""


class Rate:
    """The tokens/s of all answers, over the last MEASURED_SECONDS in which results were due."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[float, int]] = deque()
        self._recent: deque[tuple[float, float, int]] = deque()
        """The ticks of the last RECENT_SECONDS, each after its time."""
        self._last: tuple[float, int] | None = None

    def tick(self, now: float, tokens: int, *, due: bool) -> None:
        """Counts the time and the tokens since the last tick, if results are due."""
        before, self._last = self._last, (now, tokens)
        if before is None or not due:
            return
        self._ticks.append((now - before[0], tokens - before[1]))
        self._recent.append((now, *self._ticks[-1]))
        while now - self._recent[0][0] >= RECENT_SECONDS:
            self._recent.popleft()
        while self.seconds - self._ticks[0][0] >= MEASURED_SECONDS:
            self._ticks.popleft()

    @property
    def seconds(self) -> float:
        """The time that has been measured, at most about MEASURED_SECONDS."""
        return sum(seconds for seconds, _ in self._ticks)

    @property
    def tokens_per_s(self) -> float | None:
        """The rate; None before anything has been measured."""
        seconds = self.seconds
        return sum(tokens for _, tokens in self._ticks) / seconds if seconds > 0 else None

    def recent(self, now: float) -> float | None:
        """The rate of the last RECENT_SECONDS; None: no results were due in them."""
        counted = [tick for tick in self._recent if now - tick[0] < RECENT_SECONDS]
        seconds = sum(seconds for _, seconds, _ in counted)
        return sum(tokens for _, _, tokens in counted) / seconds if seconds > 0 else None

    def clear(self) -> None:
        """Begins anew."""
        self._ticks.clear()


@dataclass(slots=True)
class Move:
    """A transition in a model of so many `units`: `moved` says what became of it, and `proposal` what was
    predicted, if a rebalancer has proposed it. `before` and `after` are the tokens/s of all answers before it
    began and after it was committed, where answers have run for long enough, and `standstill` the seconds
    without Steps, for which answers stood still."""

    moved: Moved
    units: int
    standstill: float = 0.0
    proposal: Proposal | None = None
    before: float | None = None
    after: float | None = None

    @property
    def aborted(self) -> bool:
        """Whether it was given up, or never began."""
        return bool(self.moved.failure)

    @property
    def outcome(self) -> Outcome:
        """What the rebalancer is told."""
        return Outcome(not self.aborted, self.moved.seconds, self.standstill)

    def what(self) -> str:
        """What has been done with which layers."""
        moved, done = self.moved, list[str]()
        if moved.shifts:
            done.append(f"moved {self._shifts()}")
        if moved.lost[0] < moved.lost[1]:
            done.append(f"filled {units_text(*moved.lost, self.units)} again")
        return " and ".join(done) or "changed no layers"

    def _shifts(self) -> str:
        return ", ".join(
            f"{units_text(shift.first, shift.last, self.units)} from {shift.giver} to {shift.taker}"
            for shift in self.moved.shifts
        )

    def line(self) -> str:
        """The record in one line."""
        moved = self.moved
        if self.aborted:
            move = f"the move of {self._shifts()}" if moved.shifts else "a change of the plan"
            return f"gave up {move} ({moved.why}): {moved.failure}"
        told = f"{self.what()} ({moved.why}): {_bytes(moved.sent)} sent in {moved.seconds:.1f} s, "
        told += f"{1000 * self.standstill:.0f} ms without steps"
        if self.proposal is not None:
            old, new = self.proposal.seconds_before, self.proposal.seconds_after
            if old > 0 and new > 0:
                told += f"; predicted {1 / old:.1f} -> {1 / new:.1f} tokens/s"
        return told if self.after is None else f"{told}; {self.result()}"

    def result(self) -> str:
        """What came of it, in tokens/s."""
        assert self.after is not None
        if self.before is None:
            return f"measured {self.after:.1f} tokens/s"
        return f"measured {self.before:.1f} -> {self.after:.1f} tokens/s"


class MoveLog:
    """The records of a coordinator's transitions, in a model of so many units. `say` is called with one line
    for each that was committed, and one for the tokens/s after it."""

    def __init__(self, say: Callable[[str], None], units: int) -> None:
        self.moves = deque[Move](maxlen=MOST_MOVES)
        self._say, self._units = say, units
        self._rate = Rate()
        self._proposed: Proposal | None = None
        self._outcome: Outcome | None = None

    def tick(self, now: float, tokens: int, *, due: bool) -> None:
        """Measures the tokens/s of all answers, of which there have been so many tokens so far, and completes
        the last record."""
        self._rate.tick(now, tokens, due=due)
        move = self.moves[-1] if self.moves else None
        if move is None or move.aborted or move.after is not None or self._rate.seconds < MEASURED_SECONDS:
            return
        move.after = self._rate.tokens_per_s
        self._say(f"{move.what()}: {move.result()}")

    def recent(self, now: float) -> float | None:
        """The tokens/s of all answers in the last RECENT_SECONDS; None: no results were due in them."""
        return self._rate.recent(now)

    def proposed(self, proposal: Proposal) -> None:
        """Notes that the next transition is that of a proposal."""
        self._proposed = proposal

    def ended(self, moved: Moved, standstill: float) -> None:
        """Records what became of a transition. If it was committed, answers stood still for so long."""
        standstill = 0.0 if moved.failure else standstill
        move = Move(moved, self._units, standstill, self._proposed, self._rate.tokens_per_s)
        self.moves.append(move)
        if not move.aborted:
            self._say(move.line())
            self._rate.clear()
        if self._proposed is not None:
            self._proposed, self._outcome = None, move.outcome

    def outcome(self) -> Outcome | None:
        """What became of the last proposal, if that was not asked before."""
        outcome, self._outcome = self._outcome, None
        return outcome


def usage_of(answers: Sequence[Generation], tokens: int, positions: int = 0) -> Usage:
    """What a chain is used for that computes these answers, after so many tokens of all answers, and holds so
    many positions for all sessions. `waiting` and `copies` are left out."""
    return Usage(
        streams=len(answers),
        depth=sum(len(answer.known) for answer in answers) // max(1, len(answers)),
        remaining=float(sum(expected_tokens(answer.made, answer.most_made) for answer in answers)),
        tokens=tokens,
        positions=positions,
        reading=any(not answer.made for answer in answers),
    )


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
