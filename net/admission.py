"""Admission of sessions to the chain: which hold keys and values on the nodes, which wait, and which are set
aside.

Each node has room for a number of pages of keys and values, and a session takes whole pages on all of them.
`decide` is the policy, a pure function:

- Requests are admitted in the order in which they arrived. A request that does not fit yet holds up all later
  ones, also smaller ones, so that it is not passed over for ever.
- Sessions that are idle between two answers keep their state until another session needs the room; the one
  that has been idle for longest goes first.
- Sessions that were opened from another one share its pages (engine/sharing.py): a shared page counts once.
- If running answers outgrow the room, the youngest is set aside: its state is freed, it waits in its old
  place of the queue, and is computed again when there is room. The tokens of its answer are the same.

A request whose keys and values the chain cannot hold at all is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Generic, Protocol, TypeVar

import trio

from ..engine.errors import ContextError
from ..engine.layout import PAGE

KEPT_SHARE = 2
"""State that is kept for others takes at most 1/KEPT_SHARE of the room. Weights that move, copies of weights
and kept rows find the rest."""
_AT_ONCE = 4
"""How many of those that wait are looked at in a decision. Others follow."""
SOON = 4
"""A session is admitted if it and those that run have room to grow by a fourth of a page."""


class Admitted(Protocol):
    """The part of a session that admission uses."""

    @property
    def busy(self) -> bool:
        """Whether somebody uses the session; else it only keeps state for others."""

    def leave(self) -> None:
        """Frees its state on all nodes."""

    def lender(self) -> tuple[Admitted, int] | None:
        """The session from which this one, which waits, would be opened now, and the positions that they
        would share."""


S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Claim(Generic[S]):
    """The pages that a session has or, if it waits, needs to begin; and those that it will `soon` need; both
    without those that it may share with others, which are `shared`."""

    session: S
    pages: int
    soon: int
    shared: tuple[int, ...] = ()


def pages_of(claims: Iterable[Claim[S]]) -> int:
    """The pages of sessions together: a shared one counts once."""
    claims = list(claims)
    return sum(claim.pages for claim in claims) + len({page for claim in claims for page in claim.shared})


@dataclass(frozen=True, slots=True)
class Decision(Generic[S]):
    """The idle sessions whose state is dropped, the running ones to set aside, and the waiting ones to admit,
    in this order."""

    dropped: tuple[S, ...] = ()
    set_aside: tuple[S, ...] = ()
    admitted: tuple[S, ...] = ()


def decide(
    running: Sequence[Claim[S]],
    waiting: Sequence[Claim[S]],
    idle: Sequence[Claim[S]],
    *,
    pages: int | None,
    slots: int,
) -> Decision[S]:
    """What to do with `pages` pages (None: any number) and `slots` places for sessions. `running` and
    `waiting` are in the order of arrival, and `idle` begins with the longest idle.

    A running session is set aside only for an older one, and a single one never. A waiting session is
    admitted only if all that run have what they will need soon, so that it is not set aside at once. None is
    admitted in a decision that sets one aside."""
    run, rest = list(running), list(idle)
    dropped: list[S] = []
    aside: list[Claim[S]] = []

    def exceeds(*more: Claim[S]) -> bool:
        claims = (*run, *rest, *more)
        return len(claims) > slots or (pages is not None and pages_of(claims) > pages)

    while rest and exceeds():
        dropped.append(rest.pop(0).session)
    while len(run) > 1 and exceeds():
        aside.append(run.pop())
    admitted: list[S] = []
    for claim in waiting if not aside else ():
        soon = pages_of(replace(other, pages=other.soon) for other in (*run, claim))
        if run and (len(run) >= slots or (pages is not None and soon > pages)):
            break
        rest = [other for other in rest if other.session != claim.session]  # it takes over its own state
        while rest and exceeds(claim):
            dropped.append(rest.pop(0).session)
        run.append(claim)
        admitted.append(claim.session)
    return Decision(tuple(dropped), tuple(claim.session for claim in aside), tuple(admitted))


@dataclass(frozen=True, slots=True)
class ChainRoom:
    """The room of a chain: pages of keys and values in the node that has fewest (None: without a limit), and
    the positions of a page."""

    node: str = ""
    pages: int | None = None
    page: int = PAGE

    def of(self, positions: int) -> int:
        """The number of pages of so many positions."""
        return -(-positions // self.page)

    def holds(self, positions: int) -> bool:
        """Whether a single session of so many positions fits."""
        return self.pages is None or self.of(positions) <= self.pages

    def check(self, positions: int, what: str) -> None:
        """ContextError: a single session of so many positions does not fit. `what` is it for the message."""
        if not self.holds(positions):
            assert self.pages is not None
            raise ContextError(
                f"{what} needs keys and values for {positions} tokens, and {self.node} has room for "
                f"{self.pages * self.page}: shorten the prompt, ask for fewer tokens, or start that node "
                "with more --ram"
            )


@dataclass(slots=True)
class _Place:
    """A session's place: the number of its request, the positions for which it holds or needs pages, the most
    that it can come to need, and the value of `Admission._freed` when it last began to send. `shared` names
    its first pages as far as other sessions may have them, too. `alone`: it has found none to share with."""

    order: int
    positions: int
    most: int
    freed: int = 0
    shared: tuple[int, ...] = ()
    alone: bool = False

    def soon(self, positions: int) -> int:
        """The positions after so many more."""
        return min(self.positions + positions, max(self.positions, self.most))


_Places = dict[Admitted, _Place]


class Admission:
    """Carries out what `decide` decides for the sessions of one coordinator. A session calls `begin` and
    `end` for each answer, and `grow` before it sends rows."""

    def __init__(self, slots: int) -> None:
        """`slots`: the most sessions that hold state in the chain."""
        self._slots = slots
        self._room = ChainRoom()
        self._refused: int | None = None
        """Fewer pages than `_room` has: nodes have refused more. None once no answer runs."""
        self._numbers, self._shared = count(), count()
        self._freed = 0
        """How many times the state of a session was freed."""
        self._running: _Places = {}
        self._waiting: _Places = {}
        self._idle: _Places = {}
        """Longest idle first. A session that waits for its next answer may be here, too."""
        self._changed = trio.Event()

    def open(self, room: ChainRoom) -> None:
        """Begins an epoch: the chain has this room, and holds nothing yet."""
        self.make_room()
        self.change(room)

    def change(self, room: ChainRoom) -> None:
        """Goes on in an epoch whose chain has this room, and holds what the last one held."""
        self._room, self._refused = room, None
        for session in [s for s, place in self._running.items() if not room.holds(place.positions)]:
            self._set_aside(session)
        self._settle()
        self._wake()  # those that do not fit at all are told so

    async def begin(self, session: Admitted, positions: int, most: int, own: int = 0) -> None:
        """Waits until a session may run an answer, whose prompt has so many positions and which can come to
        need `most`. Of its own state it keeps the first `own` positions. ContextError: the chain has no room
        for so many."""
        self._room.check(
            most, f"a prompt of {positions} tokens and an answer of up to {most - positions + 1}"
        )
        kept, shared = self._idle.get(session), tuple[int, ...]()
        if kept is not None:  # the nodes hold them until the first rows of this answer have been run
            positions, most = max(positions, kept.positions), max(most, kept.positions)
            shared = kept.shared[: own // self._room.page]  # it writes to what follows
        self._waiting[session] = _Place(next(self._numbers), positions, most, shared=shared)
        self._settle()
        try:
            await trio.lowlevel.checkpoint()
            await self.admitted(session)
        except BaseException:
            self.end(session, keep=kept is not None)
            raise

    async def admitted(self, session: Admitted) -> None:
        """Waits until a session that was set aside may go on. ContextError: it has outgrown the chain."""
        while session not in self._running:
            positions = self._waiting[session].positions
            self._room.check(positions, f"an answer that has grown to {positions} tokens with its prompt")
            await self._changed.wait()

    def runs(self, session: Admitted) -> bool:
        """Whether a session is admitted and not set aside."""
        return session in self._running

    def share(self, session: Admitted, source: Admitted | None, positions: int) -> bool:
        """Notes that a running session begins with positions of another one; None: with none. False: it was
        set aside, or the source was dropped."""
        place = self._running.get(session)
        if place is None:
            return False
        place.shared, place.alone = (), source is None
        if source is not None:
            if source in self._idle:  # the last one to be dropped
                self._idle[source] = self._idle.pop(source)
            place.shared = self._lent(source, positions)
        self._settle()
        there = source is None or source in self._running or source in self._idle
        return there and session in self._running

    def _lent(self, source: Admitted, positions: int) -> tuple[int, ...]:
        """The pages of a session that another one shares which begins with so many of its positions."""
        place = self._running.get(source) or self._idle.get(source)
        pages = positions // self._room.page
        if place is None:
            return ()
        missing = pages - len(place.shared)
        if missing > 0:
            place.shared += tuple(islice(self._shared, missing))
        return place.shared[:pages]

    def grow(self, session: Admitted, positions: int) -> bool:
        """Takes the pages that a session needs to have run so many positions. False: it was set aside."""
        place = self._running.get(session)
        if place is not None and positions > place.positions:
            more = self._room.of(positions) > self._room.of(place.positions)
            place.positions = positions
            if more:
                if not self._room.holds(positions):
                    self._set_aside(session)
                self._settle()
        return session in self._running

    def end(self, session: Admitted, *, keep: bool) -> None:
        """Ends an answer, also one that waits. With `keep`, its state stays in the chain."""
        self._waiting.pop(session, None)
        place = self._running.pop(session, None)
        if place is not None and keep:
            self._idle[session] = place
        self._freed += not keep
        self._settle()

    def forget(self, session: Admitted) -> None:
        """Removes a session that has been closed."""
        self._idle.pop(session, None)
        self.end(session, keep=False)

    @property
    def positions(self) -> int:
        """The positions that all sessions hold, in whole pages; shared ones count once."""
        return pages_of([*self._claims(self._running), *self._claims(self._idle)]) * self._room.page

    @property
    def running(self) -> int:
        """The number of answers that have their place in the chain."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """The number of answers that wait for it."""
        return len(self._waiting)

    def lost(self, session: Admitted) -> None:
        """Notes that the state of a session went with its chain. If it is idle, it takes no room in the next
        one."""
        self.parts(session)
        if self._idle.pop(session, None) is not None:
            self._freed += 1

    def parts(self, session: Admitted) -> None:
        """Notes that a session shares no pages any more: some of them are computed again. `change` or `open`
        follows."""
        for places in (self._running, self._waiting, self._idle):
            if session in places:
                places[session].shared = ()

    def make_room(self) -> bool:
        """Drops the state of all idle sessions; returns whether there were any."""
        idle = list(self._idle)
        for session in idle:
            self._drop(session)
        return bool(idle)

    def refused(self, session: Admitted) -> bool:
        """Decides whether to try again a session whose rows had no room on a node. It waits until another
        answer has ended or was set aside; if none runs, it waits for nothing, since the rows may have met
        state that has been freed meanwhile. False: they have not."""
        place = self._running.get(session)
        if place is not None and len(self._running) > 1:
            self._refused = pages_of(self._claims(self._running)) - 1
            self._set_aside(session)
            self._settle()
        elif place is not None:
            before, place.freed = place.freed, self._freed
            return before < self._freed
        return True

    def _settle(self) -> None:
        """Decides until nothing changes."""
        while True:
            if not self._running:
                self._refused = None
            requests = list(islice(self._requests(), _AT_ONCE))  # first, since they name shared pages
            decision = decide(
                self._claims(self._running),
                requests,
                self._claims(self._idle),
                pages=self._room.pages if self._refused is None else self._refused,
                slots=self._slots,
            )
            if decision == Decision():
                self._curb()
                return
            for session in decision.dropped:
                self._drop(session)
            for session in decision.set_aside:
                self._set_aside(session)
            for session in decision.admitted:
                self._idle.pop(session, None)
                self._running[session] = place = self._waiting.pop(session)
                place.freed = self._freed
            self._running = _by_arrival(self._running)
            self._wake()

    def _curb(self) -> None:
        """Drops state that is kept for others and takes too much of the room, the longest idle first."""
        if self._room.pages is None:
            return
        kept = [session for session in self._idle if not session.busy and session not in self._waiting]
        while kept and (
            pages_of(self._claim(session, self._idle[session]) for session in kept) * KEPT_SHARE
            > self._room.pages
        ):
            self._drop(kept.pop(0))

    def _claims(self, places: _Places) -> list[Claim[Admitted]]:
        return [self._claim(*item) for item in places.items()]

    def _claim(self, session: Admitted, place: _Place) -> Claim[Admitted]:
        room, shared = self._room, place.shared
        soon = room.of(place.soon(room.page // SOON))
        return Claim(session, room.of(place.positions) - len(shared), soon - len(shared), shared)

    def _requests(self) -> Iterator[Claim[Admitted]]:
        """The claims of those that wait and would fit alone, with what they would share now."""
        for session, place in self._waiting.items():
            if not self._room.holds(place.positions):
                continue
            if session not in self._idle and not place.alone:
                lender = session.lender()
                place.shared = () if lender is None else self._lent(*lender)
            yield self._claim(session, place)

    def _set_aside(self, session: Admitted) -> None:
        place = self._waiting[session] = self._running.pop(session)
        place.shared = ()
        self._waiting = _by_arrival(self._waiting)
        self._freed += 1
        session.leave()

    def _drop(self, session: Admitted) -> None:
        del self._idle[session]
        self._freed += 1
        session.leave()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _by_arrival(places: _Places) -> _Places:
    return dict(sorted(places.items(), key=lambda item: item[1].order))
