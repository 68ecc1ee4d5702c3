"""The coordinator's decisions about its nodes: `decide(state, event, now) -> (state, commands)`, without I/O
or a clock.

    gathering ──all joined──> measuring ──> planning ──> loading ──all loaded──> serving
                                               ↑                       │            │
                                               └───── a node is lost ──┴────────────┘
    failed: reached from any phase, and final

Each plan that is carried out gets an epoch of its own. The loss of a node that holds a stage ends the epoch,
and the survivors are planned for at once. Before the first epoch is served any loss is a failure: the user is
still at the terminal and can correct it. `now` is in seconds of any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..engine.errors import ShoalError
from ..planner import Assignment
from ..planner.groups import plain_groupings
from .errors import LocalProtocolError, MismatchError, NodeLostError, StageStuckError
from .events import (
    DEFAULT_TIMING,
    Command,
    Event,
    Fail,
    HangUp,
    Heard,
    Joined,
    Left,
    LinksMeasured,
    MakePlan,
    MeasureLinks,
    Pause,
    Planned,
    SendAssign,
    SendPing,
    SendRelease,
    Serve,
    StageBroken,
    StageLoaded,
    Tick,
    Timing,
)
from .liveness import call_bound, load_bound
from .messages import Assign, Epoch, Hello, Peer
from .placement import COORDINATOR, Placement

NO_PLACEMENT = Placement(())
Phase = Literal["gathering", "measuring", "planning", "loading", "serving", "failed"]


@dataclass(frozen=True, slots=True)
class Member:
    """A node as the coordinator knows it, identified by its index in the list of addresses."""

    host: str
    port: int
    hello: Hello | None = None
    label: str = ""
    """The node's name, or name@host:port if another has the same name."""
    lost: str = ""
    """The reason for its loss; empty while it is not lost."""
    heard: float = 0.0
    pinged: float = 0.0

    @property
    def alive(self) -> bool:
        """Joined and not lost."""
        return self.hello is not None and not self.lost


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
    phase: Phase = "gathering"
    plans: int = 0
    """The number of plans requested so far; an answer to an earlier request is ignored."""
    placement: Placement = NO_PLACEMENT
    loaded: frozenset[int] = frozenset()
    unit_bytes: tuple[int, ...] = ()
    """The bytes of each unit's weights; empty if they are unknown."""
    served: bool = False
    """Whether any epoch has been served."""

    def bytes_of(self, stage: Assignment) -> int:
        """The bytes of the weights of a stage; 0 if they are unknown."""
        return sum(self.unit_bytes[stage.first : stage.last])

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


Outcome = tuple[ClusterState, tuple[Command, ...]]


def decide(state: ClusterState, event: Event, now: float) -> Outcome:
    """The state after an event, and the commands to carry out."""
    if state.phase == "failed":
        return state, ()
    match event:
        case Joined():
            return _joined(state, event, now)
        case Heard():
            return _heard(state, event, now)
        case Left(member, error):
            return _left(state, member, error)
        case LinksMeasured():
            return _plan(state) if state.phase == "measuring" else (state, ())
        case Planned(number, answer):
            current = state.phase == "planning" and number == state.plans
            return _planned(state, answer) if current else (state, ())
        case StageLoaded(member, epoch):
            return _loaded(state, member, epoch)
        case StageBroken():
            return _broken(state, event)
        case Tick():
            return _tick(state, now)


def check_placement(state: ClusterState, placement: Placement) -> None:
    """Checks a plan. LocalProtocolError, since plans are made by our own code: it does not cover the units in
    order, or names an absent node, or a node twice."""
    edges = [0, *(stage.last for stage in placement.stages)]
    if (
        [stage.first for stage in placement.stages] != edges[:-1]
        or sorted(set(edges)) != edges
        or edges[-1] != state.units
    ):
        raise LocalProtocolError(f"the plan's stages {edges} do not cover units 0 to {state.units} in order")
    names = [stage.device for stage in placement.stages]
    there = {state.members[i].label for i in state.alive()}
    if len(set(names)) < len(names) or not set(names) <= there:
        raise LocalProtocolError(f"the plan names {names}; each must be one of {sorted(there)}, once")
    if placement.chunk_rows < 1:
        raise LocalProtocolError(f"the plan has chunks of {placement.chunk_rows} rows")


def _with_member(state: ClusterState, member: int, **changes: object) -> ClusterState:
    changed = replace(state.members[member], **changes)  # type: ignore[arg-type]
    return replace(state, members=(*state.members[:member], changed, *state.members[member + 1 :]))


def _fail(state: ClusterState, error: ShoalError) -> Outcome:
    return replace(state, phase="failed"), (Fail(error),)


def _joined(state: ClusterState, event: Joined, now: float) -> Outcome:
    state = _with_member(state, event.member, hello=event.hello, heard=now, pinged=now)
    if state.phase != "gathering" or any(member.hello is None for member in state.members):
        return state, ()
    state = replace(state, members=_labelled(state.members))
    exact = {hello.offer.exact: member for member, hello in _devices(state) if hello.offer}
    if len(exact) == 2 and not state.approximate:
        first, second = exact[True], exact[False]
        return _fail(
            state,
            MismatchError(
                f"{first.label} computes exactly and {second.label} approximately (its backend is not "
                "native), so answers would depend on the plan: start all nodes with the same --backend"
            ),
        )
    return replace(state, phase="measuring"), (MeasureLinks(state.alive()),)


def _devices(state: ClusterState) -> list[tuple[Member, Hello]]:
    return [(member, member.hello) for member in state.members if member.hello is not None]


def _labelled(members: Sequence[Member]) -> tuple[Member, ...]:
    names = [COORDINATOR, *(member.hello.name if member.hello else "" for member in members)]
    return tuple(
        replace(member, label=name if names.count(name) == 1 else f"{name}@{member.host}:{member.port}")
        for member, name in zip(members, names[1:], strict=True)
    )


def _plan(state: ClusterState) -> Outcome:
    state = replace(state, phase="planning", plans=state.plans + 1, loaded=frozenset())
    return state, (MakePlan(state.plans, state.alive()),)


def _planned(state: ClusterState, answer: Placement | ShoalError) -> Outcome:
    if isinstance(answer, ShoalError):
        gone = "; ".join(member.lost for member in state.members if member.lost)
        return _fail(
            state, NodeLostError(f"{gone}; the other nodes cannot go on: {answer}") if gone else answer
        )
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return _fail(state, error)
    return _load(replace(state, placement=answer))


def _load(state: ClusterState) -> Outcome:
    """Begins an epoch with the placement of the state."""
    epoch = replace(state.epoch, counter=state.epoch.counter + 1)
    state = replace(state, phase="loading", epoch=epoch, loaded=frozenset())
    holders = state.holders()
    peers = [peer_of(state.members[i]) for i in holders]
    before = (epoch.coordinator, *(peer.incarnation for peer in peers[:-1]))
    placement = state.placement
    groupings = placement.groupings or plain_groupings(len(placement.stages))
    assigns = tuple(
        SendAssign(
            i,
            Assign(
                epoch,
                stage.first,
                stage.last,
                after,
                placement.chunk_rows,
                previous,
                () if stage.first else groupings,
            ),
        )
        for i, stage, after, previous in zip(
            holders, placement.stages, (*peers[1:], None), before, strict=True
        )
    )
    idle = tuple(SendRelease(i, epoch) for i in state.alive() if i not in holders)
    return state, (*idle, *assigns)


def peer_of(member: Member) -> Peer:
    """The address and incarnation by which another node connects to a member."""
    assert member.hello is not None
    hello = member.hello
    return Peer(hello.name, member.host, member.port, hello.incarnation, hello.ticket)


def _loaded(state: ClusterState, member: int, epoch: Epoch) -> Outcome:
    if state.phase != "loading" or epoch != state.epoch or member not in state.holders():
        return state, ()
    state = replace(state, loaded=state.loaded | {member})
    if state.loaded != frozenset(state.holders()):
        return state, ()
    return replace(state, phase="serving", served=True), (Serve(epoch),)


def _heard(state: ClusterState, event: Heard, now: float) -> Outcome:
    """Removes a node of which a call has been running for too long. The bound of a call whose time is not
    predicted is that of loading the stage, which it may do."""
    state, progress = _with_member(state, event.member, heard=now), event.progress
    if progress is None or progress.epoch != state.epoch or progress.running is None:
        return state, ()
    if event.member not in state.holders() or not state.members[event.member].alive:
        return state, ()
    stage = state.placement.stages[state.holders().index(event.member)]
    expected = progress.expected
    bound = load_bound(state.bytes_of(stage)) if expected is None else call_bound(expected)
    if progress.running <= bound:
        return state, ()
    error = StageStuckError(
        f"{state.members[event.member].label}: a call of its stage has been running for "
        f"{progress.running:.0f} s, much longer than it should: stop that node and start it again"
    )
    return _left(state, event.member, error)


def _broken(state: ClusterState, event: StageBroken) -> Outcome:
    """Removes the node at fault: the sender, whose stage failed, or the next node, which it cannot reach. If
    only a connection has failed, the same chain begins another epoch."""
    if event.epoch != state.epoch or state.phase not in ("loading", "serving"):
        return state, ()
    if event.again:
        ended = state.epoch
        state, commands = _load(state)
        return state, (Pause(ended), *commands)
    blamed = event.member
    for i in state.alive():
        hello = state.members[i].hello
        if hello is not None and hello.incarnation == event.peer:
            blamed = i
    return _left(state, blamed, event.error)


def _left(state: ClusterState, member: int, error: ShoalError) -> Outcome:
    if state.members[member].lost:
        return state, ()
    held = state.phase in ("loading", "serving") and member in state.holders()
    state = _with_member(state, member, lost=str(error) or "a node is lost")
    if not state.served or not state.alive() or (held and not state.recover):
        return _fail(state, error)
    if held:
        again, commands = _plan(state)
        return again, (HangUp(member), Pause(state.epoch), *commands)
    if state.phase == "planning":
        again, commands = _plan(state)
        return again, (HangUp(member), *commands)
    return state, (HangUp(member),)


def _tick(state: ClusterState, now: float) -> Outcome:
    commands: list[Command] = []
    for i in state.alive():
        member = state.members[i]
        silence = now - member.heard
        if silence >= state.timing.overdue:
            error = NodeLostError(
                f"{member.label or 'the node'} ({member.host}:{member.port}) has said nothing for "
                f"{silence:.0f} s: check that it is awake and on the network"
            )
            state, more = _left(state, i, error)
            commands += more
            if state.phase == "failed":
                break
        elif now - member.pinged >= state.timing.heartbeat:
            state = _with_member(state, i, pinged=now)
            commands.append(SendPing(i))
    return state, tuple(commands)
