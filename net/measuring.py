"""The measurement of links between nodes, and between the coordinator and nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.errors import ShoalError
from ..planner import LinkSpeed
from .connection import open_tasks
from .control import Control
from .dial import OpenStream
from .errors import NodeLostError
from .identity import Identity
from .members import ITSELF, Ends, Member, peer_of
from .messages import Measure, Measured
from .placement import COORDINATOR
from .probe import OneAtATime, measure_peer


@dataclass(frozen=True, slots=True)
class LinkMeasurer:
    """Measures links of these members, and records them in `links` by pairs of labels. A connection may take
    `seconds` to be made."""

    members: Sequence[Member]
    controls: Sequence[Control]
    links: dict[tuple[str, str], LinkSpeed]
    identity: Identity
    open_stream: OpenStream
    seconds: float
    lost: Callable[[int, ShoalError], None]
    """Told of a member that the coordinator cannot reach, and why."""
    again: bool = False
    """What is known of the links is kept until they are measured, and if they cannot be."""

    async def measure(self, pairs: Sequence[tuple[int, int]]) -> frozenset[Ends]:
        """Measures the links of these pairs; returns those of which one end cannot reach the other. Pairs
        that share no end are measured at the same time, and others one after another, so that no device has
        to do with two measurements at once."""
        ends, unreachable = OneAtATime(), set[Ends]()

        async def measure(one: int, other: int) -> None:
            async with ends.using(one, other):
                if one == ITSELF:
                    try:
                        await self._own(other)
                    except ShoalError as error:
                        if not self.again:
                            self.lost(other, error)
                    return
                reached = [await self._between(one, other), await self._between(other, one)]
                if not all(reached) and not self.again:
                    unreachable.add(self._ends(one, other))

        async with open_tasks() as tasks:
            for pair in pairs:
                tasks.start_soon(measure, *pair)
        return frozenset(unreachable)

    async def _own(self, member: int) -> None:
        """Measures the link to a node. The one back is assumed to be as quick."""
        label, peer = self.members[member].label, peer_of(self.members[member])
        found = await measure_peer(self.open_stream, self.identity, peer, self.seconds)
        self.links[COORDINATOR, label] = self.links[label, COORDINATOR] = found

    async def _between(self, source: int, target: int) -> bool:
        """Has a node measure the link to another; returns whether it could."""
        peer = peer_of(self.members[target])
        ends = self.members[source].label, self.members[target].label
        if not self.again:
            self.links.pop(ends, None)
        try:
            answer = await self.controls[source].ask(Measure(peer), Measured, ends[0])
        except NodeLostError:
            return True  # the end of the control connection is an event
        if answer.link is None or answer.peer != peer.incarnation:
            return False
        self.links[ends] = answer.link
        return True

    def _ends(self, one: int, other: int) -> Ends:
        first, second = sorted(peer_of(self.members[i]).incarnation for i in (one, other))
        return first, second
