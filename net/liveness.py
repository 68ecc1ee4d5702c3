"""How long a silent peer, a long call and a chain that does not move are waited for.

Nothing here waits or reads a clock: the caller passes the time, in seconds of any monotonic clock.

A peer is pinged, and the bound of its silence follows the round trips (`RoundTrip`, after RFC 6298). Pings
are messages of the protocol, since a proxy may acknowledge every byte of TCP and pass nothing on: TCP's own
keepalive and TCP_USER_TIMEOUT see only the proxy, and would add nothing. A call of a stage is bounded by what
the profile predicts (`call_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

TICK_SECONDS = 0.25
"""The time between two looks at what is silent, and how precisely silence is measured."""
IDLE_TICK_SECONDS = 0.5
"""The time between two looks while nothing is computed."""
SILENCE_SECONDS = 2.0
"""The least bound of silence. TCP repeats a lost segment after 0.2, 0.6 and 1.4 s, and other programs can
hold a process up for hundreds of milliseconds."""
SILENCE_TRIPS = 4
"""How many late round trips are added to it."""
SUSPECT_SECONDS = 0.3
"""How much later than usual an answer is when a new connection is tried beside the old one."""
FIRST_LATE = 0.75
"""The late round trip of a link that was never measured."""
CALL_SECONDS, CALL_FACTOR = 3.0, 8.0
"""A call may take CALL_FACTOR times what was predicted, and CALL_SECONDS more."""
LOAD_SECONDS, LOAD_BYTES_PER_S = 30.0, 20e6
"""A stage may take LOAD_SECONDS to load, and what a slow memory card needs for its bytes."""
REDIAL_SECONDS, SLOWEST_REDIAL, QUICK_REDIALS = 0.3, 5.0, 67


@dataclass(frozen=True, slots=True)
class Timing:
    """Times in seconds: between pings while nothing is due, of the longest silence before a peer counts as
    lost, the limit for connecting and exchanging Hello, between pings while answers are computed, the wait
    for other nodes after the first has joined, and the wait for lost nodes that the model needs."""

    heartbeat: float = 1.0
    overdue: float = 10.0
    handshake: float = 10.0
    busy: float = 0.5
    gather: float = 3.0
    patience: float = 60.0


DEFAULT_TIMING = Timing()


def next_tick(now: float, seconds: float) -> float:
    """The next time that is a multiple of so many seconds. Tasks that look from time to time do so at these
    times, so that a process that has nothing else to do wakes once for all of them."""
    return (math.floor(now / seconds) + 1) * seconds


class AwakeClock:
    """A clock that stands still while this process does not run: suspended, or on a device that sleeps. What
    counts as a peer's silence is then only time in which this process could have heard it. `tick` is called
    often, and a longer pause counts as `most` seconds."""

    def __init__(self, now: float, most: float = 2 * TICK_SECONDS) -> None:
        self._time, self._last, self._most = 0.0, now, most

    def at(self, now: float) -> float:
        """The time of this clock at `now`."""
        return self._time + min(now - self._last, self._most)

    def tick(self, now: float) -> float:
        """Counts the time since the last tick; returns the time of this clock."""
        self._time, self._last = self.at(now), now
        return self._time


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The round trips of a link, smoothed, and their mean deviation, as RFC 6298 estimates them."""

    smoothed: float | None = None
    spread: float = 0.0

    def measured(self, seconds: float) -> RoundTrip:
        """The estimate after one more round trip."""
        if self.smoothed is None:
            return RoundTrip(seconds, seconds / 2)
        error = seconds - self.smoothed
        return RoundTrip(self.smoothed + error / 8, self.spread + (abs(error) - self.spread) / 4)

    @property
    def late(self) -> float:
        """The round trip that few exceed."""
        return FIRST_LATE if self.smoothed is None else self.smoothed + 4 * self.spread

    def suspect(self) -> float:
        """The silence after which a new connection is worth a try."""
        return SUSPECT_SECONDS + self.late

    def bound(self, most: float) -> float:
        """The silence after which the peer counts as lost."""
        return min(most, SILENCE_SECONDS + SILENCE_TRIPS * self.late)


UNKNOWN_TRIP = RoundTrip()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The pings of one connection, and the silence after them. Silence begins with the first ping that
    nothing has followed, so a peer that was not pinged is never silent."""

    trip: RoundTrip = UNKNOWN_TRIP
    pinged: float = float("-inf")
    """When the last ping was sent."""
    waiting: float | None = None
    """When the first ping was sent after which nothing has been heard."""

    def ping(self, now: float) -> Heartbeat:
        """After a ping is sent."""
        return replace(self, pinged=now, waiting=now if self.waiting is None else self.waiting)

    def heard(self, trip: float | None = None) -> Heartbeat:
        """After anything arrived; with the round trip, if it answers the last ping."""
        return replace(self, waiting=None, trip=self.trip if trip is None else self.trip.measured(trip))

    def due(self, now: float, seconds: float) -> bool:
        """Whether another ping is due, so many seconds after the last one. A look that comes a little early
        counts as in time: the next one may be TICK_SECONDS later."""
        return now - self.pinged >= seconds - TICK_SECONDS / 4

    def silence(self, now: float) -> float:
        """The seconds since the first ping that nothing has followed."""
        return 0.0 if self.waiting is None else now - self.waiting

    def bound(self, most: float, *, busy: bool) -> float:
        """The silence after which the peer counts as lost: `most`, or less while it is `busy` with
        answers."""
        return self.trip.bound(most) if busy else most


def call_bound(expected: float) -> float:
    """The longest time of a call that should take `expected` seconds."""
    return CALL_SECONDS + CALL_FACTOR * expected


def load_bound(size: int) -> float:
    """The longest that loading `size` bytes may take. It bounds the first call, too, which may read them."""
    return LOAD_SECONDS + size / LOAD_BYTES_PER_S


def redial_pause(tries: int) -> float:
    """The pause before the next attempt to reach a lost node, after `tries` in a row have failed. A node is
    found soon after a short cut of its link, and one that stays away costs little."""
    return min(SLOWEST_REDIAL, REDIAL_SECONDS * 1.5 ** max(0, tries - QUICK_REDIALS))


@dataclass(slots=True)
class Stillness:
    """For how long something has not moved although it should."""

    _seen: Hashable = None
    _since: float | None = None

    def seconds(self, now: float, state: Hashable, *, due: bool) -> float:
        """The seconds for which `state` has stayed the same and something was due."""
        if not due:
            self._since = None
        elif self._since is None or state != self._seen:
            self._since = now
        self._seen = state
        return 0.0 if self._since is None else now - self._since
