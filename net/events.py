"""Events and commands of net/cluster.py: what can happen to nodes, and what a coordinator can do about it.

A member is identified by its index in the coordinator's list of nodes. A transition (net/transition.py)
is identified by the epoch that it prepares; the epoch that runs meanwhile is its base.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine.errors import ShoalError
from .messages import Assign, Commit, Condition, Epoch, Held, Hello, Kept, Progress
from .placement import Placement

# --- events


@dataclass(frozen=True, slots=True)
class Found:
    """A node can be reached at this address: somebody has given it, or the node has connected to this
    device. `incarnation` is its process, if that is known. `anew`: its connections may be dead without
    notice, since it was asleep or its network has changed."""

    host: str
    port: int
    incarnation: int | None = None
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """The node may not be used any more, for this reason."""

    member: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class Joined:
    """The node and the coordinator have exchanged Hello on a new control connection. `known`: the members,
    the coordinator among them, to which its links are known from before (net/known.py)."""

    member: int
    hello: Hello
    known: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Heard:
    """A message arrived from the node: a Pong, with the progress of its stage and the condition of the node,
    or any other. `answered`: it answers the last ping."""

    member: int
    progress: Progress | None = None
    answered: bool = False
    condition: Condition | None = None


@dataclass(frozen=True, slots=True)
class FilesHeld:
    """The node has told which files of the model it holds."""

    member: int
    held: Held


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
    """The node has loaded its stage of the epoch, or has changed to it after Commit. A node that has no unit
    in it any more has sent all that other nodes take."""

    member: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Proposed:
    """A better placement was found, or somebody asks for one: it is carried out as a transition, or a Moved
    with the reason why not is the answer. `why` is a clause for the user, and `copying` the seconds that
    sending the keys and values should take, if that is known. `base`: the epoch than which it is better; None
    if that does not matter."""

    placement: Placement
    why: str
    copying: float = 0.0
    base: Epoch | None = None


@dataclass(frozen=True, slots=True)
class StagePrepared:
    """The node has prepared its stage of a transition, which has taken so many seconds, and has sent so many
    bytes of keys and values."""

    member: int
    epoch: Epoch
    seconds: float
    sent: int


@dataclass(frozen=True, slots=True)
class Reached:
    """The coordinator is connected to the first node of the prepared epoch, as Reach asked. If it cannot be,
    StageBroken of that epoch is reported instead."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Quiet:
    """No Step is on its way any more, as Hold asked for the transition to `epoch`. `sessions` are those that
    are open, each with the positions that all of its stages hold."""

    epoch: Epoch
    sessions: tuple[Kept, ...]


@dataclass(frozen=True, slots=True)
class StageBroken:
    """The node cannot run, or cannot prepare, its stage of the epoch. `peer` is the incarnation of another
    node, if that one is at fault. `again`: only a connection has failed, and the same chain can be tried
    again."""

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


Event = (
    Found | Removed | Joined | Heard | FilesHeld | Left | LinksMeasured | Planned | Proposed | StagePrepared
    | Reached | Quiet | StageLoaded | StageBroken | Stalled | Tick
)  # fmt: skip


# --- commands


@dataclass(frozen=True, slots=True)
class Dial:
    """Keep a connection to the node from now on."""

    member: int


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
class SendCommit:
    """Tell the node to change to the prepared epoch."""

    member: int
    commit: Commit


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the node to forget the prepared epoch."""

    member: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Reach:
    """Connect to this member, the first node of the epoch that is being prepared, beside the running chain.
    Report Reached, or StageBroken."""

    epoch: Epoch
    member: int


@dataclass(frozen=True, slots=True)
class Unreach:
    """End the connection that Reach asked for, if it is there: the transition has been given up."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Hold:
    """Send no more Steps of the epoch `base`. Report Quiet of the transition to `epoch` when no Step is on
    its way; at once, with the positions that Results have confirmed, if the chain has ended."""

    epoch: Epoch
    base: Epoch


@dataclass(frozen=True, slots=True)
class Resume:
    """Send Steps of this epoch again: the transition that held it has been given up. A Quiet that was not
    reported yet is not reported any more."""

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
    """Tell the user. `member`: the one that is told about, whose lines are limited."""

    text: str
    member: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class MeasureLinks:
    """Measure the links between these pairs of members, -1 for the coordinator, then report LinksMeasured.
    `again`: plans go on with what is known of them meanwhile, and if they cannot be measured."""

    pairs: tuple[tuple[int, int], ...]
    again: bool = False


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Make a plan for these members, then report Planned with the same number."""

    number: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Serve:
    """Let sessions go on in the chain of this epoch. Without `base`, it was loaded anew: connect to its first
    node, and send all tokens again. With `base`, the counter of the epoch before, it is the result of a
    transition: sessions are carried over with their positions, on the connection that Reach has made. No node
    has the keys and values of units [lost[0], lost[1]): they are filled first."""

    epoch: Epoch
    base: int | None = None
    lost: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Shift:
    """Units [first, last) that move from one node to another, by their labels."""

    first: int
    last: int
    giver: str
    taker: str


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a transition, for the log and for statistics. `epoch` is the one that it prepared; None
    if a proposal was refused. `why` is the reason for it, a clause. `failure` is the reason why it was given
    up or refused, a sentence without its end; empty if the new epoch is served. `recovery`: it was made after
    the chain had ended. `seconds`: from the first order to the end, `held`
    of them without Steps. `sent`: bytes of keys and values that were sent before Commit."""

    epoch: Epoch | None
    why: str
    shifts: tuple[Shift, ...] = ()
    lost: tuple[int, int] = (0, 0)
    recovery: bool = False
    seconds: float = 0.0
    held: float = 0.0
    sent: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """End the epoch: sessions wait for the next one."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Fail:
    """End the coordinator with this error."""

    error: ShoalError


Command = (
    Dial | SendPing | SendAssign | SendCommit | SendAbort | SendRelease | Reach | Unreach | Hold | Resume
    | HangUp | Redial | TryAnew | Say | MeasureLinks | MakePlan | Serve | Pause | Moved | Fail
)  # fmt: skip
