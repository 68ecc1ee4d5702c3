"""The coordinator's view of its nodes, as data: which have joined, which are lost, and the newest plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from ..engine.errors import ShoalError
from ..planner import Assignment
from .errors import NetError, NodeLostError, StageStuckError
from .events import DEFAULT_TIMING, Timing
from .identity import host_port
from .liveness import Pulse, load_bound
from .messages import Epoch, Hello, Peer
from .placement import COORDINATOR, Placement

NO_PLACEMENT, NO_PULSE = Placement(()), Pulse()
ITSELF = -1
"""The coordinator, where the indices of members are asked for."""
Phase = Literal["gathering", "measuring", "planning", "loading", "serving", "waiting", "failed"]
Ends = tuple[int, int]
"""The incarnations of two processes, the smaller first."""


@dataclass(frozen=True, slots=True)
class Member:
    """A node as the coordinator knows it, identified by its index in the list of addresses."""

    host: str
    port: int
    hello: Hello | None = None
    label: str = ""
    """The node's name, or name@host:port if another has the same name."""
    lost: ShoalError | None = None
    """The reason for its loss, or for a first attempt to connect that failed; None while it is not lost."""
    losses: int = 0
    """How often it was lost after it had joined."""
    joined: float = 0.0
    """When it last joined."""
    pulse: Pulse = NO_PULSE
    faulty: int | None = None
    """The incarnation of a process that has broken the protocol or could not run its stage: it would do so
    again, so that process is not used any more."""
    barred: bool = False
    """Not to be dialled again: it is another member under a second address."""

    @property
    def alive(self) -> bool:
        """Joined and not lost."""
        return self.hello is not None and self.lost is None

    @property
    def pending(self) -> bool:
        """Whether the first attempt to connect has not ended."""
        return self.hello is None and self.lost is None

    @property
    def may_return(self) -> bool:
        """Whether it is lost and may be usable later: it was not reached, its stage does not return yet, or
        it is busy."""
        if self.lost is None or (self.hello is not None and self.hello.incarnation == self.faulty):
            return False
        return isinstance(self.lost, NodeLostError | StageStuckError) or type(self.lost) is NetError

    @property
    def called(self) -> str:
        """The node's name and address, for messages."""
        where = host_port(self.host, self.port)
        return f"{self.label or 'the node'} ({where})"


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The coordinator's view of its nodes. `epoch` and `placement` are those of the newest plan."""

    members: tuple[Member, ...]
    units: int
    epoch: Epoch
    timing: Timing = DEFAULT_TIMING
    approximate: bool = False
    """Allow nodes whose results are not exact beside exact ones."""
    recover: bool = True
    """Go on without a node that is lost. Otherwise any fault before a chain is served, and the loss of a node
    with a stage, ends the coordinator."""
    unit_bytes: tuple[int, ...] = ()
    """The bytes of each unit's weights; empty if they are unknown."""
    phase: Phase = "gathering"
    since: float = 0.0
    """When the phase began; while gathering, when the first node joined."""
    waiting: float | None = None
    """Since when the nodes that are there cannot hold the model; None after a chain was served for a
    while."""
    failure: ShoalError | None = None
    """The error to end with when the nodes that are waited for do not come."""
    again: int = 0
    """How often in quick succession the same chain was tried again."""
    plans: int = 0
    """The number of plans requested so far; an answer to an earlier request is ignored."""
    trial: bool = False
    """Whether the newest request is for a plan that is only carried out if it is better than the one in
    force."""
    considered: frozenset[int] = frozenset()
    """The incarnations for which the newest plan was requested."""
    measured: frozenset[Ends] = frozenset()
    """The links that were measured, or that could not be."""
    unreachable: frozenset[Ends] = frozenset()
    """Those that could not be."""
    measuring: frozenset[Ends] = frozenset()
    """The links that are being measured."""
    placement: Placement = NO_PLACEMENT
    loaded: frozenset[int] = frozenset()
    served: bool = False
    """Whether any epoch has been served."""

    def index(self, label: str) -> int:
        """The index of the live member with that label. KeyError: there is none."""
        for i, member in enumerate(self.members):
            if member.label == label and member.alive:
                return i
        raise KeyError(label)

    def alive(self) -> tuple[int, ...]:
        """The indices of members that have joined and are not lost."""
        return tuple(i for i, member in enumerate(self.members) if member.alive)

    def holders(self) -> tuple[int, ...]:
        """The members with a stage, in the order of the chain, including lost ones."""
        labels = [member.label for member in self.members]
        return tuple(labels.index(stage.device) for stage in self.placement.stages)

    def holds(self, member: int) -> bool:
        """Whether the member has a stage of an epoch that is loaded or served."""
        return self.phase in ("loading", "serving") and member in self.holders()

    def incarnation(self, member: int) -> int:
        """The incarnation of a member that has joined, or of the coordinator."""
        if member == ITSELF:
            return self.epoch.coordinator
        hello = self.members[member].hello
        assert hello is not None
        return hello.incarnation

    def ends(self, one: int, other: int) -> Ends:
        """The link between two members."""
        first, second = sorted((self.incarnation(one), self.incarnation(other)))
        return first, second

    def unmeasured(self) -> tuple[tuple[int, int], ...]:
        """The pairs of live members, the coordinator among them, whose link has not been measured."""
        pairs = combinations((ITSELF, *self.alive()), 2)
        return tuple(pair for pair in pairs if self.ends(*pair) not in self.measured)

    def usable(self) -> tuple[int, ...]:
        """Live members whose links to each other and to the coordinator were measured, the longest joined
        first where not all can be."""
        unknown = {frozenset(pair) for pair in self.unmeasured()}
        found: list[int] = []
        for i in sorted(self.alive(), key=lambda i: self.members[i].joined):
            if not any(frozenset((i, other)) in unknown for other in (ITSELF, *found)):
                found.append(i)
        return tuple(sorted(found))

    def load_bound(self) -> float:
        """The seconds within which all stages of the placement should be loaded."""
        return max((load_bound(self.bytes_of(stage)) for stage in self.placement.stages), default=0.0)

    def bytes_of(self, stage: Assignment) -> int:
        """The bytes of the weights of a stage; 0 if they are unknown."""
        return sum(self.unit_bytes[stage.first : stage.last])

    def changed(self, member: int, **changes: object) -> ClusterState:
        """The state with changes of one member."""
        new = replace(self.members[member], **changes)  # type: ignore[arg-type]
        return replace(self, members=(*self.members[:member], new, *self.members[member + 1 :]))


def peer_of(member: Member) -> Peer:
    """The address and incarnation by which another node connects to a member."""
    assert member.hello is not None
    hello = member.hello
    return Peer(hello.name, member.host, member.port, hello.incarnation, hello.ticket)


def labelled(state: ClusterState) -> ClusterState:
    """The state with a label for each live member: its name, if no other has it. A label is kept for ever."""
    names = [COORDINATOR, *(member.hello.name for member in state.members if member.hello)]
    for i in state.alive():
        member = state.members[i]
        if member.hello is not None and not member.label:
            name = member.hello.name
            unique = names.count(name) == 1 and all(other.label != name for other in state.members)
            label = name if unique else f"{name}@{host_port(member.host, member.port)}"
            state = state.changed(i, label=label)
    return state
