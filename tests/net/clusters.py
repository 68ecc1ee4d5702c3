"""Three nodes, a, b and c, of a model with six units, and what brings their coordinator to serve them; for
tests of net/cluster.py and net/transition.py."""

from dataclasses import replace

from shoal.engine.errors import NoPlanError
from shoal.net.cluster import decide
from shoal.net.errors import NodeLostError
from shoal.net.events import (
    Command,
    Event,
    Joined,
    LinksMeasured,
    Planned,
    Quiet,
    Reached,
    Say,
    SendAssign,
    StageLoaded,
    StagePrepared,
)
from shoal.net.liveness import Timing
from shoal.net.members import ClusterState, Member
from shoal.net.messages import Assign, Epoch, Hello, Kept, Offer, Peer
from shoal.net.placement import Placement
from shoal.planner import Assignment, Device

NAMES = ("a", "b", "c")
OFFER = Offer(Device("fake", 10**9, 1e9, 1e9), 8, 1, "fake", True)
THREE = Placement((Assignment("a", 0, 2), Assignment("b", 2, 4), Assignment("c", 4, 6)), 4)
TWO = Placement((Assignment("c", 0, 3), Assignment("a", 3, 6)), 4)
GONE = NodeLostError("gone")


def epoch(counter: int) -> Epoch:
    return Epoch(99, counter)


def hello(name: str, number: int, exact: bool = True) -> Hello:
    return Hello("control", name, number, "0.1.0", 1, "aa", replace(OFFER, exact=exact), number * 7)


def fresh(names: tuple[str, ...] = NAMES, **changes: object) -> ClusterState:
    members = tuple(Member("host", 7001 + i) for i in range(len(names)))
    return ClusterState(members, 6, Epoch(99, 0), Timing(1.0, 10.0, 10.0), **changes)  # type: ignore[arg-type]


def after(state: ClusterState, *events: Event, now: float = 0.0) -> tuple[ClusterState, list[Command]]:
    """The state, and the commands of the last event, except what it says."""
    commands: tuple[Command, ...] = ()
    for event in events:
        state, commands = decide(state, event, now)
    return state, [command for command in commands if not isinstance(command, Say)]


def said(state: ClusterState, event: Event, now: float = 0.0) -> list[str]:
    """What the user is told."""
    return [command.text for command in decide(state, event, now)[1] if isinstance(command, Say)]


JOINS = tuple(Joined(i, hello(name, 100 + i)) for i, name in enumerate(NAMES))
TO_PLAN = (*JOINS, LinksMeasured())
TO_LOAD = (*TO_PLAN, Planned(1, THREE))
TO_SERVE = (*TO_LOAD, *(StageLoaded(i, epoch(1)) for i in (2, 0, 1)))


# --- transitions

A, B, C = (Peer(name, "host", 7001 + i, 100 + i, 700 + 7 * i) for i, name in enumerate(NAMES))
SHORT = NoPlanError("12 MB are missing")
KEPT = (Kept(5, 12), Kept(9, 0))


def chain(*stages: tuple[str, int, int], **changes: float) -> Placement:
    return Placement(tuple(Assignment(*stage) for stage in stages), 4, **changes)  # type: ignore[arg-type]


SHIFTED = chain(("a", 0, 1), ("b", 1, 5), ("c", 5, 6))
WITHOUT_B = chain(("a", 0, 3), ("c", 3, 6))


def serving(placement: Placement = THREE, now: float = 0.0, **changes: object) -> ClusterState:
    """The nodes of the placement have served epoch 1 since `now`."""
    state, _ = after(fresh(moves="move", **changes), *TO_PLAN, Planned(1, placement), now=now)
    state, _ = after(state, *(StageLoaded(i, epoch(1)) for i in state.holders()), now=now)
    assert state.phase == "serving"
    return state


def assigns(commands: list[Command]) -> dict[int, Assign]:
    return {c.member: c.assign for c in commands if isinstance(c, SendAssign)}


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def all_prepared(state: ClusterState) -> list[Event]:
    move = state.transition
    assert move is not None
    return [*(StagePrepared(i, move.epoch, 0.5, 1000) for i in move.members), Reached(move.epoch)]


def committed(state: ClusterState, now: float = 0.0) -> ClusterState:
    move = state.transition
    assert move is not None
    state, _ = after(state, *all_prepared(state), Quiet(move.epoch, KEPT), now=now)
    assert state.phase == "committing"
    return state


def arrived(state: ClusterState, now: float = 0.0) -> tuple[ClusterState, list[Command]]:
    """After the nodes and the coordinator have carried out the orders of the newest epoch."""
    move = state.transition
    members = state.holders() if move is None else move.members
    if move is not None:
        state = committed(state, now)
    return after(state, *(StageLoaded(i, state.epoch) for i in members), now=now)
