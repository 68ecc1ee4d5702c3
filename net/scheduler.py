"""Which rows of a stage go together: groups of concurrent sequences, and the time that a group waits for one
of its sequences. Nothing here does I/O or reads a clock.

Sequences that decode send one row a lap, so a stage knows who will be back and when. All rows of a group are
computed in one call. The coordinator computes the best number of groups for each number of sequences
(planner/groups.py); the first stage, which all rows pass, keeps that many groups of equal size. A stage that
runs whatever is waiting instead would have one group more than there are stages, since it starts with half
of a group while the rest is on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..planner.groups import Grouping, of_many

Load = tuple[int, int, bool]
"""A Step as costs see it: its rows, their first position, and whether a token is wanted."""
Expect = Callable[[Sequence[Load], float], float]
"""Predicts the seconds of a call from the profile. The arguments are the loads of the call, and the seconds
of idle time before it."""

WEIGHT = 0.2
"""The weight of a new lap in the moving average of a session's laps."""
QUICKER, SLOWER = 0.3, 0.05
"""The weights of a new period in the average of those without prompts: if it is shorter, and if longer."""
COST_WEIGHT = 0.1
"""The weight of a call in the moving averages that correct expected costs."""
MOST_CHANGE = 2.0
"""The largest change, as a factor, that one measurement may show; a larger one is a hiccup and is clamped."""
LATE = 0.1
"""The part of a lap by which a row may be late before nothing waits for it, beside twice the usual spread."""
GONE_LAPS, GONE_SECONDS = 4.0, 0.05
"""A session whose row has been away for so many laps and seconds has stopped decoding."""
FIRST_SECONDS = 5.0
"""A session that has not made a lap has stopped decoding after so many seconds."""


@dataclass(slots=True)
class _Stream:
    """A session that decodes. `here`: when its next row arrived; `left`: when its last call ended, while its
    next row is away; `ended`: the same, until its next call ends. `quiet`: the usual time from the end of a
    call to the end of the next, without prompts."""

    group: int
    here: float | None = None
    left: float | None = None
    lap: float | None = None
    spread: float = 0.0
    ended: float | None = None
    quiet: float | None = None

    def back(self, now: float) -> None:
        """Counts the lap of a row that has arrived."""
        if self.left is not None:
            lap = now - self.left
            if self.lap is None:
                self.lap, self.spread = lap, lap / 4
            else:
                lap = min(lap, MOST_CHANGE * self.lap)
                self.spread += WEIGHT * (abs(lap - self.lap) - self.spread)
                self.lap += WEIGHT * (lap - self.lap)
        self.here, self.left = now, None

    def ran(self, end: float, pressed: float) -> None:
        """Counts a call. Rows of prompts last took time at `pressed`."""
        if self.ended is not None and self.ended > pressed:
            period = end - self.ended
            if self.quiet is None:
                self.quiet = period
            else:
                # Prompts on other stages, which are not seen here, make periods longer only.
                weight = QUICKER if period < self.quiet else SLOWER
                self.quiet += weight * (min(period, MOST_CHANGE * self.quiet) - self.quiet)
        self.ended = end


class Streams:
    """The sessions that decode, as a stage sees them, and their groups. Without groupings all rows that wait
    go together, and none waits for another."""

    def __init__(self, groupings: Sequence[Grouping] = ()) -> None:
        self._groupings = groupings
        self._streams: dict[int, _Stream] = {}
        self._lap: float | None = None
        """The laps of all streams, as a moving average, for those that have not made one."""
        self._free = 0.0
        self._looked = -math.inf

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def grouping(self) -> Grouping | None:
        """The grouping of as many sequences as there are; None if there are none, or nothing is known."""
        if not self._groupings or not self._streams:
            return None
        return of_many(self._groupings, len(self._streams))

    def arrived(self, session: int, now: float) -> None:
        """A row of the session waits from now on."""
        stream = self._streams.get(session)
        if stream is None:
            stream = self._streams[session] = _Stream(self._smallest())
            stream.here = now
            self._balance()
        else:
            stream.back(now)
            if stream.lap is not None:
                self._lap = stream.lap if self._lap is None else self._lap + WEIGHT * (stream.lap - self._lap)

    def taken(self, sessions: Iterable[int]) -> None:
        """The rows of these sessions are in the call that begins."""
        for session in sessions:
            stream = self._streams.get(session)
            if stream is not None:
                stream.here = stream.left = None

    def ran(self, sessions: Iterable[int], end: float, pressed: float = -math.inf) -> None:
        """The call of these sessions' rows ended. Rows of prompts last took time at `pressed`."""
        self._free = end
        for session in sessions:
            stream = self._streams.get(session)
            if stream is not None:
                stream.ran(end, pressed)
                if stream.here is None:
                    stream.left = end

    def forget(self, session: int) -> None:
        """The session has ended."""
        if self._streams.pop(session, None) is not None:
            self._balance()

    def drop(self, now: float) -> None:
        """Forgets sessions that have been away for so long that they no longer decode, every GONE_SECONDS."""
        if now < self._looked + GONE_SECONDS:
            return
        self._looked = now
        gone = []
        for session, stream in self._streams.items():
            if stream.left is not None:
                lap = FIRST_SECONDS if stream.lap is None else GONE_SECONDS + GONE_LAPS * stream.lap
                if now > stream.left + lap:
                    gone.append(session)
        for session in gone:
            del self._streams[session]
        if gone:
            self._balance()

    def deadline(self, stretch: float, now: float, sessions: Iterable[int] | None = None) -> float | None:
        """When the next call of these sessions must end, or of all whose row is here or due, so that none
        takes `stretch` times as long from token to token as without prompts; None if that is not known."""
        streams = self._streams
        if sessions is None:
            known = [
                stream for stream in streams.values() if stream.here is not None or self._due(stream, now)
            ]
        else:
            known = [streams[session] for session in sessions if session in streams]
        times = [s.ended + stretch * s.quiet for s in known if s.ended is not None and s.quiet is not None]
        return min(times, default=None)

    def share(self, seconds: float) -> float:
        """The share of the time in which the stage computes rows that decode, without prompts, if a call of
        all of them takes so many seconds; 1 if that is not known."""
        times = [stream.quiet for stream in self._streams.values() if stream.quiet is not None]
        return min(1.0, seconds / min(times)) if times else 1.0

    def due(self, now: float) -> tuple[float, float] | None:
        """When the next row should arrive, and until when at the latest; None if none is expected."""
        times = []
        for stream in self._streams.values():
            lap = stream.lap or self._lap
            if lap is not None and stream.left is not None and self._due(stream, now):
                times.append((stream.left + lap, self._late(stream)))
        return min(times, default=None)

    def choose(self, now: float) -> list[int] | float | None:
        """The sessions of the next call, first come first; or the time until which their group waits for
        another of its sequences; or None if no row waits."""
        waiting: dict[int, list[tuple[float, int]]] = {}
        away: dict[int, list[_Stream]] = {}
        for session, stream in self._streams.items():
            if stream.here is not None:
                waiting.setdefault(stream.group, []).append((stream.here, session))
            elif stream.left is not None:
                away.setdefault(stream.group, []).append(stream)
        grouping = self.grouping
        longest = 0.0 if grouping is None else grouping.wait
        until = None
        for group in sorted(waiting, key=lambda group: min(waiting[group])):
            rows = sorted(waiting[group])
            end = self._waits(away.get(group, ()), max(rows[0][0], self._free) + longest, now)
            if end is None:
                return [session for _, session in rows]
            until = end if until is None else min(until, end)
        return until

    def together(self, now: float, stretch: float, seconds: float) -> list[int] | float | None:
        """As `choose`, where all sequences are one group: those that wait, first come first, unless the
        others are due before any of them takes `stretch` times as long as without prompts, or within half
        of a call. A call of all takes so many `seconds`."""
        rows = sorted((s.here, session) for session, s in self._streams.items() if s.here is not None)
        if not rows:
            return None
        here = [session for _, session in rows]
        end = self.deadline(stretch, now, here)
        limit = max(math.inf if end is None else end - seconds, now + seconds / 2)
        away = [stream for stream in self._streams.values() if stream.here is None]
        until = self._waits(away, limit, now)
        return here if until is None else until

    def _waits(self, away: Iterable[_Stream], limit: float, now: float) -> float | None:
        """Until when a group waits for its sequences that are away, at most until `limit`; None if for none
        of them."""
        until = None
        for stream in away:
            lap = stream.lap or self._lap
            if lap is not None and stream.left is not None and stream.left + lap < limit:
                late = min(limit, self._late(stream))
                until = late if until is None else max(until, late)
        return until if until is not None and until > now else None

    def _due(self, stream: _Stream, now: float) -> bool:
        """Whether a stream is away and still waited for."""
        return stream.left is not None and now < self._late(stream)

    def _late(self, stream: _Stream) -> float:
        """The time from which a stream that is away is no longer waited for."""
        assert stream.left is not None
        lap = stream.lap or self._lap
        return stream.left if lap is None else stream.left + (1 + LATE) * lap + 2 * stream.spread

    # Groups.

    def _members(self) -> dict[int, list[int]]:
        members: dict[int, list[int]] = {}
        for session, stream in self._streams.items():
            members.setdefault(stream.group, []).append(session)
        return members

    def _smallest(self) -> int:
        """The group that a new sequence joins."""
        members = self._members()
        return min(members, key=lambda group: len(members[group]), default=0)

    def _balance(self) -> None:
        """Makes as many groups as are best for the number of sequences, of equal size, with few changes."""
        grouping = self.grouping
        if grouping is None:
            return
        members, count = self._members(), grouping.groups
        while len(members) > count:
            least = min(members, key=lambda group: len(members[group]))
            moved = members.pop(least)
            members[min(members, key=lambda group: len(members[group]))] += moved
        while len(members) < count:
            members[max(members) + 1] = []
        while True:
            least = min(members, key=lambda group: len(members[group]))
            most = max(members, key=lambda group: len(members[group]))
            if len(members[most]) - len(members[least]) < 2:
                break
            members[least].append(members[most].pop())
        for group, sessions in members.items():
            for session in sessions:
                self._streams[session].group = group


class Costs:
    """The expected seconds of calls: from the profile, corrected by the calls so far. Calls with rows of
    prompts are corrected on their own."""

    def __init__(self, expect: Expect) -> None:
        self._expect = expect
        self._factor = {False: 1.0, True: 1.0}

    def seconds(self, loads: Sequence[Load]) -> float:
        """The expected seconds of a call."""
        return self._factor[_has_prompt(loads)] * self._expect(loads, 0.0)

    def ran(self, loads: Sequence[Load], seconds: float) -> None:
        """Learns from a call that took so long."""
        expected, prompt = self.seconds(loads), _has_prompt(loads)
        if expected > 0:
            ratio = min(MOST_CHANGE, max(1 / MOST_CHANGE, seconds / expected))
            self._factor[prompt] *= 1 + COST_WEIGHT * (ratio - 1)


def _has_prompt(loads: Sequence[Load]) -> bool:
    return any(rows > 1 for rows, _, _ in loads)
