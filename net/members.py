"""The coordinator's view of its nodes, as data: which have joined, which are lost, and the newest plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from ..engine.errors import ShoalError
from ..planner import Assignment
from .errors import NetError, NodeLostError, StageStuckError
from .events import Shift
from .identity import host_port
from .liveness import DEFAULT_TIMING, LOAD_BYTES_PER_S, Heartbeat, Timing, call_bound, load_bound
from .messages import Condition, Epoch, Held, Hello, Peer
from .placement import COORDINATOR, Placement

NO_PLACEMENT, NO_HEARTBEAT, NO_POLICY = Placement(()), Heartbeat(), Condition()
UNPREDICTED_SECONDS = 1.0
"""What the first call after a transition should take, beside reading weights."""
SILENT_SECONDS, RATE_WEIGHT = 3.0, 0.3
"""A node that has told nothing for so long gets no bytes of files at the moment; and the weight of a new rate
in their moving average."""
ITSELF = -1
"""The coordinator, where the indices of members are asked for."""
Phase = Literal[
    "gathering", "measuring", "planning", "loading", "serving", "moving", "committing", "waiting", "failed"
]
Moves = Literal["move", "reload", "off"]
"""How the placement changes while answers are computed: layers move with their keys and values; all stages
are loaded again, and all tokens are sent again; or it changes only when a node is lost or leaves."""
Ends = tuple[int, int]
"""The incarnations of two processes, the smaller first."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """The progress of a node in fetching files, as it reported at the time `at`: bytes that it was ordered to
    hold (`wanted`) and holds (`got`), and the rate. `problem` is why it does not get the rest, or empty."""

    wanted: int = 0
    got: int = 0
    problem: str = ""
    bytes_per_s: float = 0.0
    at: float = 0.0

    def told(self, held: Held, now: float) -> Fetching:
        """The progress after another report."""
        passed, came, rate = now - self.at, held.got - self.got, self.bytes_per_s
        if held.wanted == self.wanted and came >= 0 and passed > 0:  # of the same order
            weight = RATE_WEIGHT if rate and passed <= SILENT_SECONDS else 1.0
            rate += weight * (came / passed - rate)
        return Fetching(held.wanted, held.got, held.problem, rate, now)


NO_FETCHING = Fetching()


@dataclass(frozen=True, slots=True)
class Member:
    """A node as the coordinator knows it, identified by its index in the list of members. Its address may
    change."""

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
    began: float = 0.0
    """When its process first joined."""
    heartbeat: Heartbeat = NO_HEARTBEAT
    faulty: int | None = None
    """The incarnation of a process that has broken the protocol or could not run its stage: it would do so
    again, so that process is not used any more."""
    unloaded: int | None = None
    """The incarnation of a process that could not load a stage for which its offer had room."""
    barred: bool = False
    """Not to be dialled again: it is another member under a second address, or was removed."""
    announced: int | None = None
    """The incarnation of a process that has told its address and has not said Hello yet."""
    condition: Condition = NO_POLICY
    """How much of it may be used, by its own policy."""
    held: frozenset[int] | None = None
    """The units whose files it holds; None: all."""
    target: tuple[int, ...] | None = None
    """The units that it should hold for the best plan that does not depend on who holds what; None: there is
    no plan with it yet."""
    fetching: Fetching = NO_FETCHING
    """How far it is with the files that it should hold."""

    @property
    def alive(self) -> bool:
        """Joined and not lost."""
        return self.hello is not None and self.lost is None

    @property
    def pending(self) -> bool:
        """Whether the first attempt to connect has not ended."""
        return self.hello is None and self.lost is None

    @property
    def incarnation(self) -> int | None:
        """The newest process that is known there."""
        return self.announced if self.hello is None or self.announced is not None else self.hello.incarnation

    @property
    def at_fault(self) -> bool:
        """Whether the newest process that is known there would fail again."""
        return self.faulty is not None and self.incarnation == self.faulty

    @property
    def may_return(self) -> bool:
        """Whether it is lost and may be usable later: it was not reached, its stage does not return yet, or
        it is busy."""
        if self.lost is None or self.at_fault:
            return False
        return isinstance(self.lost, NodeLostError | StageStuckError) or type(self.lost) is NetError

    @property
    def called(self) -> str:
        """The node's name and address, for messages."""
        where = host_port(self.host, self.port)
        return f"{self.label or 'the node'} ({where})"


@dataclass(frozen=True, slots=True)
class Transition:
    """A change from the epoch with the counter `base` to `epoch`, which has begun (net/transition.py).
    `members` are all nodes that have a stage before or after it, `shifts` the units that move, `lost` the
    range of units whose keys and values no node has, and `added` the bytes of weights that each member of the
    coordinator loads. `recovery`: the chain of the base has ended."""

    epoch: Epoch
    base: int
    placement: Placement
    why: str
    members: tuple[int, ...]
    shifts: tuple[Shift, ...]
    lost: tuple[int, int]
    added: tuple[int, ...]
    recovery: bool
    began: float
    since: float
    """When the step began."""
    bound: float = 0.0
    """The longest time, in seconds, that preparing may take."""
    step: Literal["preparing", "holding", "committed"] = "preparing"
    prepared: frozenset[int] = frozenset()
    reached: bool = False
    """Whether the coordinator is connected to the first node of the prepared chain."""
    sent: int = 0
    """The bytes of keys and values that were sent ahead."""
    held: float | None = None
    """When the hold began."""


@dataclass(frozen=True, slots=True)
class Setback:
    """Transitions that have failed in a row: how many, and the stages of the last one, which is not tried
    again before `until`."""

    stages: tuple[Assignment, ...]
    count: int
    until: float


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The coordinator's view of its nodes. `epoch` and `placement` are those in force: of the newest plan
    that was committed, or is loaded without a base."""

    members: tuple[Member, ...]
    units: int
    epoch: Epoch
    timing: Timing = DEFAULT_TIMING
    moves: Moves = "move"
    approximate: bool = False
    """Allow nodes whose results are not exact beside exact ones."""
    open_ended: bool = False
    """Nodes come and go, and may be none at first: the lack of nodes or of a plan ends nothing, and is waited
    for without a limit."""
    recover: bool = True
    """Go on without a node that is lost. Otherwise any fault before a chain is served, and the loss of a node
    with a stage, ends the coordinator."""
    unit_bytes: tuple[int, ...] = ()
    """The bytes of each unit's weights; empty if they are unknown."""
    phase: Phase = "gathering"
    since: float = 0.0
    """When the phase began; while gathering, when the first node joined. A transition beside a chain that is
    served does not begin it anew."""
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
    """The links that could not be measured."""
    measuring: frozenset[Ends] = frozenset()
    """The links that are being measured."""
    old: frozenset[Ends] = frozenset()
    """The links of `measured` whose values are from an earlier start, or estimated. They are measured again
    once nothing is computed."""
    estimated: frozenset[Ends] = frozenset()
    """The links between nodes that were estimated from the links of both to the coordinator
    (known.estimate), or over which a chain has failed: they are not estimated again."""
    expected: frozenset[int] = frozenset()
    """The devices (see device_of) that the first plan waits for, for `timing.gather` seconds."""
    insufficient: frozenset[int] = frozenset()
    """The incarnations of nodes that cannot hold the model without the nodes that are leaving."""
    placement: Placement = NO_PLACEMENT
    issued: int = 0
    """The counter of the newest epoch that nodes were given, also if it was given up."""
    moved: float = 0.0
    """When the last transition was carried out."""
    added: tuple[int, ...] = ()
    """The bytes of weights that each member of that time has loaded for the epoch that is served, or was
    served last, if a transition has begun it; else empty."""
    loaded: frozenset[int] = frozenset()
    standing: frozenset[int] = frozenset()
    """The members that have their stage of the epoch in force, with its keys and values, whether its chain is
    served or has ended."""
    transition: Transition | None = None
    setback: Setback | None = None
    crowded: frozenset[tuple[Assignment, ...]] = frozenset()
    """The stages of plans for which a node had no memory beside its stage that is served. They are not tried
    again before nodes or stages have changed, or `crowded_until`: answers may need less by then."""
    crowded_until: float = 0.0
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

    def held(self, member: int) -> frozenset[int]:
        """The units whose files a member holds."""
        held = self.members[member].held
        return frozenset(range(self.units)) if held is None else held

    def lacks_files(self, member: int) -> bool:
        """Whether a member does not hold all files of its stage, or of that which it is to have."""
        placements = (self.placement, NO_PLACEMENT if self.transition is None else self.transition.placement)
        return any(
            holder == member and not self.held(member).issuperset(range(stage.first, stage.last))
            for placement in placements
            for holder, stage in zip(self.holders_of(placement), placement.stages, strict=True)
        )

    def growing(self, members: Iterable[int]) -> set[int]:
        """The incarnations of those of the members that can do more than when they were last planned for:
        they have no stage, or have fetched files since."""
        holders = self.holders()
        more = (i for i in members if i not in holders or self.members[i].held is not None)
        return {self.incarnation(i) for i in more}

    def holders(self) -> tuple[int, ...]:
        """The members with a stage, in the order of the chain, including lost ones."""
        return self.holders_of(self.placement)

    def holders_of(self, placement: Placement) -> tuple[int, ...]:
        """The members with a stage of a placement, in the order of the chain."""
        labels = [member.label for member in self.members]
        return tuple(labels.index(stage.device) for stage in placement.stages)

    def holds(self, member: int) -> bool:
        """Whether the epoch in force ends without the member: it has a stage of one that is loaded or served,
        or takes part in a transition that is committed."""
        if self.phase == "committing":
            return self.changes(member)
        return self.phase in ("loading", "serving") and member in self.holders()

    def changes(self, member: int) -> bool:
        """Whether the member takes part in a transition."""
        return self.transition is not None and member in self.transition.members

    def leaves(self, epoch: Epoch) -> bool:
        """Whether nodes are leaving this epoch, since the transition from it is committed."""
        move = self.transition
        return (
            self.phase == "committing"
            and move is not None
            and epoch == replace(self.epoch, counter=move.base)
        )

    def standing_units(self) -> list[int | None]:
        """The holder of each unit of the epoch in force, if it has its stage still."""
        stages = zip(self.holders(), self.placement.stages, strict=True)
        return [
            i if i in self.standing else None for i, stage in stages for _ in range(stage.first, stage.last)
        ]

    def next_epoch(self) -> Epoch:
        """An epoch that no node was given yet."""
        return replace(self.epoch, counter=max(self.issued, self.epoch.counter) + 1)

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
        return tuple(pair for pair in self._pairs() if self.ends(*pair) not in self.measured)

    def measured_before(self) -> tuple[tuple[int, int], ...]:
        """The pairs of live members whose link is only known from before."""
        return tuple(pair for pair in self._pairs() if self.ends(*pair) in self.old)

    def _pairs(self) -> Iterable[tuple[int, int]]:
        return combinations((ITSELF, *self.alive()), 2)

    def to_estimate(self) -> frozenset[Ends]:
        """The unmeasured links between nodes whose links to the coordinator were measured, but for those that
        were estimated once: such an estimate has failed, or belongs to processes that have left."""
        known = {i for i in self.alive() if self.ends(ITSELF, i) in self.measured}
        return frozenset(self.ends(*p) for p in self.unmeasured() if known.issuperset(p)) - self.estimated

    def failed_over(self, one: int, other: int) -> ClusterState:
        """The state after a chain has failed at the link between two members. It may be another now: it is
        measured before it is used again, whatever is known of it, and not estimated."""
        ends = {self.ends(one, other)}
        return replace(
            self, measured=self.measured - ends, old=self.old - ends, estimated=self.estimated | ends
        )

    def fetches(self, now: float) -> bool:
        """Whether bytes of files arrive at some node."""
        known = [self.members[i].fetching for i in self.alive()]
        return any(one.got < one.wanted and now - one.at <= SILENT_SECONDS for one in known)

    def usable(self) -> tuple[int, ...]:
        """Live members whose links to each other and to the coordinator were measured, the longest joined
        first where not all can be; without those that are leaving, unless the others do not suffice."""
        unknown = {frozenset(pair) for pair in self.unmeasured()}
        found: list[int] = []
        for i in sorted(self.alive(), key=lambda i: self.members[i].joined):
            if not any(frozenset((i, other)) in unknown for other in (ITSELF, *found)):
                found.append(i)
        staying = [i for i in found if not self.members[i].condition.leaving]
        needed = {self.incarnation(i) for i in staying} <= self.insufficient
        return tuple(sorted(found if needed else staying))

    def loads(self, member: int) -> int | None:
        """The bytes of weights that a member loads for the newest orders; None if it loads nothing."""
        move = self.transition
        if self.phase == "loading" and member in self.holders():
            return self.bytes_of(self.placement.stages[self.holders().index(member)])
        if move is None or move.step != "preparing" or member not in move.members or member in move.prepared:
            return None
        return self.adds(move.placement, member)

    def adds(self, placement: Placement, member: int) -> int:
        """The bytes of the weights of units that a member has in another placement, and not in the stage that
        stands."""
        new = [u for u, holder in enumerate(self.standing_units()) if holder != member]
        stages = zip(self.holders_of(placement), placement.stages, strict=True)
        ranges = [range(stage.first, stage.last) for holder, stage in stages if holder == member]
        return sum(self.unit_bytes[u] for u in new if self.unit_bytes and any(u in r for r in ranges))

    def call_bound(self, member: int, expected: float | None) -> float:
        """The longest that a call of a member's stage may take. One whose time is not predicted is the first,
        which may read the weights from the disk: all of them, or those that came with a transition."""
        if expected is not None:
            return call_bound(expected)
        if member < len(self.added):
            return call_bound(UNPREDICTED_SECONDS) + self.added[member] / LOAD_BYTES_PER_S
        stages = dict(zip(self.holders(), self.placement.stages, strict=True))
        left = self.phase == "committing" or member not in stages  # a stage of a placement that is over
        return load_bound(sum(self.unit_bytes) if left else self.bytes_of(stages[member]))

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


def device_of(incarnation: int) -> int:
    """The device of a process of a house: the upper half of its incarnation (tls.prefix_of)."""
    return incarnation >> 32


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
