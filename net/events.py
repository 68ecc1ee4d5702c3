"""Events and commands of net/cluster.py: what can happen to nodes, and what a coordinator can do about it.

A member is identified by its index in the coordinator's list of addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.errors import ShoalError
from .messages import Assign, Epoch, Hello, Progress
from .placement import Placement


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


# --- events


@dataclass(frozen=True, slots=True)
class Joined:
    """The node and the coordinator have exchanged Hello on a new control connection."""

    member: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Heard:
    """A message arrived from the node: a Pong, with the progress of its stage, or any other. `answered`: it
    answers the last ping."""

    member: int
    progress: Progress | None = None
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """The connection to the node has ended, or could not be made. `greeted`: the node had said Hello, so the
    error is its own word, or what it has done."""

    member: int
    error: ShoalError
    greeted: bool = False


@dataclass(frozen=True, slots=True)
class LinksMeasured:
    """The links have been measured, as MeasureLinks asked. `unreachable` are the incarnations of those ends,
    the smaller first, of which one cannot reach the other."""

    unreachable: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to MakePlan `number`: a placement, or the reason why there is none."""

    number: int
    answer: Placement | ShoalError


@dataclass(frozen=True, slots=True)
class StageLoaded:
    """The node has loaded its stage of the epoch."""

    member: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class StageBroken:
    """The node cannot run its stage of the epoch. `peer` is the incarnation of another node, if that one is
    at fault. `again`: only a connection has failed, and the same chain can be tried again."""

    member: int
    epoch: Epoch
    error: ShoalError
    peer: int | None
    again: bool = False


@dataclass(frozen=True, slots=True)
class Stalled:
    """The node answers on a new connection, while the control connection is silent."""

    member: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Some time has passed: time to look for pings due and silent nodes. `busy`: sessions are open.
    `stalled`: answers are due, and for too long no stage has finished a call."""

    busy: bool = False
    stalled: bool = False


Event = Joined | Heard | Left | LinksMeasured | Planned | StageLoaded | StageBroken | Stalled | Tick


# --- commands


@dataclass(frozen=True, slots=True)
class SendPing:
    """Ping the node."""

    member: int


@dataclass(frozen=True, slots=True)
class SendAssign:
    """Send the node its assignment."""

    member: int
    assign: Assign


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Tell the node that it has no stage in the epoch."""

    member: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class HangUp:
    """End the connection to the node, and dial it again after a while."""

    member: int


@dataclass(frozen=True, slots=True)
class Redial:
    """End the connection to the node, and dial it again at once. Report Joined, or Left."""

    member: int


@dataclass(frozen=True, slots=True)
class TryAnew:
    """Find out whether a new connection to the node works while the old one is silent, then report
    Stalled."""

    member: int


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the user."""

    text: str


@dataclass(frozen=True, slots=True)
class MeasureLinks:
    """Measure the links between these pairs of members, -1 for the coordinator, then report LinksMeasured."""

    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Make a plan for these members, then report Planned with the same number."""

    number: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Serve:
    """Connect to the first node of the loaded chain, and let sessions go on."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Pause:
    """End the epoch: sessions wait for the next one."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Fail:
    """End the coordinator with this error."""

    error: ShoalError


Command = (
    SendPing | SendAssign | SendRelease | HangUp | Redial | TryAnew | Say | MeasureLinks | MakePlan | Serve
    | Pause | Fail
)  # fmt: skip
