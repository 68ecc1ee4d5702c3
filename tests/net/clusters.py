"""Three nodes, a, b and c, of a model with six units, and what brings their coordinator to serve them; for
tests of net/cluster.py and net/transition.py."""

from dataclasses import replace

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
    StageLoaded,
    StagePrepared,
    Timing,
)
from shoal.net.members import ClusterState, Member
from shoal.net.messages import Epoch, Hello, Offer
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


def arrived(state: ClusterState, now: float = 0.0) -> tuple[ClusterState, list[Command]]:
    """After the nodes and the coordinator have carried out the orders of the newest epoch."""
    move, members = state.transition, state.holders()
    if move is not None:
        prepared = (StagePrepared(i, move.epoch, 0.0, 0) for i in move.members)
        state, _ = after(state, *prepared, Reached(move.epoch), Quiet(move.epoch, ()), now=now)
        members = move.members
    return after(state, *(StageLoaded(i, state.epoch) for i in members), now=now)


def said(state: ClusterState, event: Event, now: float = 0.0) -> list[str]:
    """What the user is told."""
    return [command.text for command in decide(state, event, now)[1] if isinstance(command, Say)]


JOINS = tuple(Joined(i, hello(name, 100 + i)) for i, name in enumerate(NAMES))
TO_PLAN = (*JOINS, LinksMeasured())
TO_LOAD = (*TO_PLAN, Planned(1, THREE))
TO_SERVE = (*TO_LOAD, *(StageLoaded(i, epoch(1)) for i in (2, 0, 1)))
