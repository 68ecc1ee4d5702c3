"""What a coordinator knows of the speeds of its nodes and links at work. A node does not import this file,
nor what it needs of the coordinator's state."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from ..planner import LinkSpeed
from .members import ClusterState
from .messages import Pace, Pong
from .pace import after
from .placement import COORDINATOR


class ChainPace:
    """The measured speeds of all nodes of a coordinator, by label. It updates `links` in place."""

    def __init__(self, links: dict[tuple[str, str], LinkSpeed]) -> None:
        self._links = links
        self._slower: dict[str, float] = {}
        self._pinged: dict[int, tuple[int, float]] = {}
        self._nonce = 0

    def slower(self, label: str) -> float:
        """How many times as long as offered a node's steps take; 1 before it has reported anything."""
        return self._slower.get(label, 1.0)

    def pinged(self, member: int, now: float) -> int:
        """Records a ping to a member, sent now; returns its nonce."""
        self._nonce += 1
        self._pinged[member] = (self._nonce, now)
        return self._nonce

    def answered(
        self, state: ClusterState, member: int, pong: Pong, now: float, *, fetching: bool = False
    ) -> bool:
        """Evaluates a member's Pong; returns whether it answers the last ping. Half of the round trip is
        taken as the latency of the links to and from the member, unless nodes are `fetching` files: pings
        wait behind these, and the next plan would want other files instead. Its own report counts if it is
        of the current epoch."""
        label = state.members[member].label
        nonce, sent = self._pinged.get(member, (-1, now))
        if pong.nonce == nonce and not fetching:
            for ends in ((COORDINATOR, label), (label, COORDINATOR)):
                if ends in self._links:
                    self._links[ends] = after(self._links[ends], 0, (now - sent) / 2)
        labels = [stage.device for stage in state.placement.stages]
        if pong.pace is not None and pong.pace.epoch == state.epoch and label in labels:
            self._told(label, dict(pairwise(labels)).get(label), pong.pace)
        return pong.nonce == nonce

    def _told(self, label: str, following: str | None, pace: Pace) -> None:
        """Records a member's report. Its latency is used for both directions of the link, since a radio that
        is slow in one direction is usually slow in both; otherwise the next plan would reverse the chain for
        nothing."""
        self._slower[label] = pace.slower
        if following is not None and pace.onward is not None:
            self._links[label, following] = pace.onward
            back = self._links.get((following, label))
            if back is not None:
                self._links[following, label] = replace(pace.onward, bytes_per_s=back.bytes_per_s)
