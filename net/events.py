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
    lost, the limit for connecting and exchanging Hello, and between pings while answers are computed."""

    heartbeat: float = 1.0
    overdue: float = 10.0
    handshake: float = 10.0
    busy: float = 0.5


DEFAULT_TIMING = Timing()


# --- events


@dataclass(frozen=True, slots=True)
class Joined:
    """The node and the coordinator have exchanged Hello."""

    member: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Heard:
    """A message arrived from the node: a Pong with the progress of its stage, or any other."""

    member: int
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """The connection to the node has ended, or could not be made."""

    member: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class LinksMeasured:
    """The links have been measured, as MeasureLinks asked."""


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
class Tick:
    """A heartbeat interval has passed: time to look for pings due and silent nodes."""


Event = Joined | Heard | Left | LinksMeasured | Planned | StageLoaded | StageBroken | Tick


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
    """End the connection to the node."""

    member: int


@dataclass(frozen=True, slots=True)
class MeasureLinks:
    """Measure the links between these members and the coordinator, then report LinksMeasured."""

    members: tuple[int, ...]


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


Command = SendPing | SendAssign | SendRelease | HangUp | MeasureLinks | MakePlan | Serve | Pause | Fail
