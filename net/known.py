"""What is known from before of the links between the devices of a house: before the head began, or before a
node did.

With it, a plan is made as soon as the devices are there; the links are measured again when nothing is
computed (plans.measure_again). A device is known by its key, since labels and processes change. Each pair has
a value for either direction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import permutations

from ..planner import LinkSpeed
from .members import ITSELF, ClusterState, device_of
from .placement import COORDINATOR, Links

HEAD = -1
"""The coordinator, which is not its device: that may run a node, too."""
DeviceLinks = Mapping[tuple[int, int], LinkSpeed]
"""Links from one device to another (members.device_of, or HEAD)."""


class KnownLinks:
    """The links between devices, as they were measured last."""

    def __init__(self, links: DeviceLinks) -> None:
        self._links = dict(links)

    @property
    def links(self) -> DeviceLinks:
        return self._links

    def keep(self, devices: Collection[int]) -> None:
        """Forgets the links of other devices than these and the coordinator."""
        there = {HEAD, *devices}
        self._links = {ends: link for ends, link in self._links.items() if there.issuperset(ends)}

    def of(self, state: ClusterState, incarnation: int) -> frozenset[int]:
        """The live members, the coordinator among them, to which the links of a process are known."""
        own = device_of(incarnation)
        others = {other: _device(state, other) for other in (ITSELF, *state.alive())}
        return frozenset(
            other
            for other, device in others.items()
            if (own, device) in self._links and (device, own) in self._links
        )

    def recall(self, state: ClusterState, links: dict[tuple[str, str], LinkSpeed]) -> None:
        """Adds the links between live members to `links`, by labels, where it has none, but for those that
        have to be measured first."""
        for one, other in permutations((ITSELF, *state.alive()), 2):
            if state.ends(one, other) not in state.measured:
                continue
            known = self._links.get((_device(state, one), _device(state, other)))
            ends = _label(state, one), _label(state, other)
            if known is not None and all(ends):
                links.setdefault(ends, known)

    def learn(
        self,
        state: ClusterState,
        pairs: Sequence[tuple[int, int]],
        links: Links,
    ) -> None:
        """Keeps what `links` has of these pairs of members, and forgets what it has not."""
        there = {ITSELF, *state.alive()}
        for one, other in (*pairs, *((b, a) for a, b in pairs)):
            found = links.get((_label(state, one), _label(state, other)))
            ends = _device(state, one), _device(state, other)
            if found is not None:
                self._links[ends] = found
            elif there.issuperset((one, other)):
                self._links.pop(ends, None)


def estimate(state: ClusterState, links: dict[tuple[str, str], LinkSpeed]) -> None:
    """Adds the links between nodes that were not measured yet to `links`, by labels, where it has none: as if
    all bytes went by the coordinator's place in the network, as at an access point. A message takes the
    latencies of both ways, and the rate of the slower one."""
    for one, other in permutations(state.alive(), 2):
        ends = _label(state, one), _label(state, other)
        ways = [links.get((COORDINATOR, label)) for label in ends]
        if state.ends(one, other) in state.estimated & state.old and ends not in links and all(ways):
            first, second = (way for way in ways if way is not None)
            links[ends] = LinkSpeed(
                first.latency_s + second.latency_s,
                min(first.bytes_per_s, second.bytes_per_s),
                first.latency_p95_s + second.latency_p95_s,
            )


def _label(state: ClusterState, member: int) -> str:
    """The label in `Links`; of a member that has none yet, nothing."""
    return COORDINATOR if member == ITSELF else state.members[member].label


def _device(state: ClusterState, member: int) -> int:
    return HEAD if member == ITSELF else device_of(state.incarnation(member))
