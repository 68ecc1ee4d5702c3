"""Events and commands of net/cluster.py: what can happen to nodes, and what a coordinator can do about it.

A member is identified by its index in the coordinator's list of addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.errors import ShoalError
from .messages import Assign, Epoch, Hello
from .placement import Placement


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how often the coordinator pings, after which silence a peer counts as lost, and how long a
    connection may take to be made and greeted."""

    heartbeat: float = 1.0
    overdue: float = 10.0
    handshake: float = 10.0


DEFAULT_TIMING = Timing()


# --- events: what happened


@dataclass(frozen=True, slots=True)
class Joined:
    """The node has greeted and been greeted."""

    member: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Heard:
    """The node said something."""

    member: int


@dataclass(frozen=True, slots=True)
class Left:
    """The connection to the node has ended, or never was."""

    member: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class LinksMeasured:
    """The measurements asked for are there."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to MakePlan `number`: a placement, or why there is none."""

    number: int
    answer: Placement | ShoalError


@dataclass(frozen=True, slots=True)
class StageLoaded:
    """The node holds its stage of the epoch."""

    member: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class StageBroken:
    """The node cannot go on with its stage of the epoch; `peer` is the incarnation of a node to blame
    instead."""

    member: int
    epoch: Epoch
    error: ShoalError
    peer: int | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Joined | Heard | Left | LinksMeasured | Planned | StageLoaded | StageBroken | Tick


# --- commands: what to do


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
    """The node has no part in the epoch."""

    member: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class HangUp:
    """End the connection to the node."""

    member: int


@dataclass(frozen=True, slots=True)
class MeasureLinks:
    """Measure the links among these members and the coordinator; then LinksMeasured."""

    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Plan with these members; then Planned with the same number."""

    number: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Serve:
    """The chain of the epoch is ready: connect to its first node and let sessions go on."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Pause:
    """The epoch is over: sessions wait for the next one."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Fail:
    """Give up with this error."""

    error: ShoalError


Command = SendPing | SendAssign | SendRelease | HangUp | MeasureLinks | MakePlan | Serve | Pause | Fail
