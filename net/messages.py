"""The messages between processes: a frozen dataclass for each, and the table MESSAGES of their types and
rules.

`Hello` and `Error` are allowed on every connection. Hello is first, from the side that dialled, and states
the purpose of the connection, which determines the other messages allowed on it:

    control   coordinator to node: orders down; answers, tokens and failures up
    step      coordinator to first node, node to next node: sessions and rows down; answers to pings up
    probe     coordinator or node to a node: pings and bytes that measure the link
    bulk      node to node: keys and values that move with their units

docs/protocol.md is the description for readers of a capture and writers of other implementations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..engine.arrays import F32
from ..engine.batch import Sampling, Want
from ..engine.strict import AtMost, Between, Printable
from ..planner import Device, LinkSpeed
from ..planner.groups import MOST_SEQUENCES, Grouping

PROTOCOL = 4
"""The protocol version in the header of each frame, raised by every change that older processes cannot
read."""

CONTROL_LIMIT = 64 * 1024
STEP_LIMIT = 4 * 1024 * 1024
BULK_LIMIT = 64 * 1024
PAGES_LIMIT = 4 * 1024 * 1024
MOST_SESSIONS = 256
"""The most sessions that a node serves at a time."""

U32 = Annotated[int, Between(0, (1 << 32) - 1)]
U64 = Annotated[int, Between(0, (1 << 64) - 1)]
Units = Annotated[int, Between(0, 1 << 16)]
Rows = Annotated[int, Between(1, 4096)]
Position = Annotated[int, Between(0, (1 << 31) - 1)]
Port = Annotated[int, Between(1, 65535)]
Bytes = Annotated[int, Between(0, 1 << 60)]
Seconds = Annotated[float, Between(0, 1e9)]
Name = Annotated[str, Printable(1, 64)]
Host = Annotated[str, Printable(1, 253)]
Text = Annotated[str, Printable(0, 1000)]
Hash = Annotated[str, Printable(1, 128)]
ErrorCode = Annotated[int, Between(1, 255)]
Purpose = Literal["control", "step", "probe", "bulk"]


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """The period in which one plan of one coordinator is in force. `coordinator` is a random number drawn
    when the coordinator starts, so that a restarted one never receives its own old messages; `counter` grows
    with every plan."""

    coordinator: U64
    counter: U32

    def __str__(self) -> str:
        return f"{self.coordinator:016x}/{self.counter}"


@dataclass(frozen=True, slots=True)
class Offer:
    """A node's device as measured, and how the node computes. The rates of a node that simulates a slower
    device are those of the simulated device."""

    device: Device
    max_rows: Rows
    threads: Annotated[int, Between(1, 4096)]
    backend: Name
    exact: bool
    """Whether results have the same bits as on every other exact device."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of each side: the purpose of the connection, the sender, and the values that must
    agree. Only a node that answers has an `offer`. `ticket` is a random number, or 0: in the answer to a
    coordinator it is the number that other peers must show; they have it from the coordinator (`Peer`)."""

    purpose: Purpose
    name: Name
    incarnation: U64
    engine: Name
    numerics: U32
    model: Hash
    offer: Offer | None
    ticket: U64 = 0


@dataclass(frozen=True, slots=True)
class Error:
    """The reason why the sender ends the connection: an exit code (net/errors.py) and a sentence."""

    code: ErrorCode
    text: Text


@dataclass(frozen=True, slots=True)
class Ping:
    """A request for an immediate Pong."""

    nonce: U64


@dataclass(frozen=True, slots=True)
class Pace:
    """Speeds that a node has measured at work in an epoch: its steps take `slower` times as long as offered,
    and `onward` is the link to the next node."""

    epoch: Epoch
    slower: Annotated[float, Between(1e-6, 1e6)]
    onward: LinkSpeed | None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a stage does in an epoch: the calls that it has finished, since when the current one has been
    running (None: none is), how long it should take by the profile (None: unknown, as for the first call,
    which may read weights from the disk), and the bytes of the messages that wait."""

    epoch: Epoch
    calls: Bytes
    running: Seconds | None
    expected: Seconds | None
    waiting: Bytes


@dataclass(frozen=True, slots=True)
class Condition:
    """How much of a node may be used, by its policy (net/care.py): the `share` of the time in which it may
    compute, and whether it is `leaving`, so that its layers must move to other nodes. `reason` is a clause
    for the user, or empty."""

    share: Annotated[float, Between(0.01, 1.0)] = 1.0
    leaving: bool = False
    reason: Text = ""


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to the Ping with the same nonce. A coordinator also gets the pace and the progress of the
    stage, if there is one, and the condition of the node, if it has a policy. On a `step` connection a node
    also sends a Pong that answers no Ping (nonce 0) while it receives rows or cannot accept more. Unless
    `at_once`, the Ping may have waited for the end of a stage's call, so its time is no measure of the
    link."""

    nonce: U64
    pace: Pace | None = None
    progress: Progress | None = None
    at_once: bool = True
    condition: Condition | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """The address of a node for other nodes. `incarnation` tells whether the process there is the expected
    one, and `ticket` is the number that it lets in."""

    name: Name
    host: Host
    port: Port
    incarnation: U64
    ticket: U64 = 0


@dataclass(frozen=True, slots=True)
class Gift:
    """Units [first, last) of a stage whose keys and values move to the node `taker`. With `history`, that
    node has no stage in the base epoch, so it needs the sessions' tokens, too."""

    taker: Peer
    first: Units
    last: Units
    history: bool = False


@dataclass(frozen=True, slots=True)
class Take:
    """Units [first, last) whose keys and values the node with the incarnation `giver` sends."""

    giver: U64
    first: Units
    last: Units


@dataclass(frozen=True, slots=True)
class Assign:
    """An order to run units [first, last) in this epoch. `next` is the node after this one; None on the last,
    which returns tokens to the coordinator. A call has at most `chunk_rows` prompt rows. `previous` is the
    incarnation of the only peer whose rows are accepted: the node before this one, or the coordinator for the
    first stage. `groupings`: how 1, 2, 3 … sequences that decode share calls; without them, all that wait do.

    Without `base`, the node drops older assignments with their sessions, and loads the stage. With `base`,
    the counter of an earlier epoch, this is a transition from that epoch (docs/protocol.md): the stage is
    prepared beside the running one, which goes on until Commit or Abort. Keys and values of units that stay
    are kept, those of `gives` and `takes` travel. A node that loses all of its units has first = last = 0."""

    epoch: Epoch
    first: Units
    last: Units
    next: Peer | None
    chunk_rows: Rows
    previous: U64
    groupings: Annotated[tuple[Grouping, ...], AtMost(MOST_SEQUENCES)] = ()
    base: U32 | None = None
    gives: Annotated[tuple[Gift, ...], AtMost(64)] = ()
    takes: Annotated[tuple[Take, ...], AtMost(64)] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Report that the stage of a transition is ready beside the running one: its weights are loaded, the next
    node is connected, and keys and values have been sent but for those of the last few positions. `seconds`
    and `sent` (bytes of keys and values) are what that has taken."""

    epoch: Epoch
    seconds: Seconds
    sent: Bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """A session, and the number of its positions, from the first, that are kept."""

    session: U64
    positions: Position


@dataclass(frozen=True, slots=True)
class Commit:
    """An order to change to the prepared epoch. No rows are on their way. `sessions` are those that go on,
    each with the positions that it keeps; all others end. The answer is Loaded, once the node holds the keys
    and values of those positions in all of its units, but for units [lost_first, lost_last), which no node
    has."""

    epoch: Epoch
    sessions: Annotated[tuple[Kept, ...], AtMost(MOST_SESSIONS)]
    lost_first: Units = 0
    lost_last: Units = 0


@dataclass(frozen=True, slots=True)
class Abort:
    """An order to forget the prepared epoch. The running one goes on."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Spare:
    """An order to hold copies of the weights of these units, in RAM that the node has promised and does not
    need, so that they can move to it without being loaded. It replaces earlier orders."""

    units: Annotated[tuple[Units, ...], AtMost(1024)]


@dataclass(frozen=True, slots=True)
class Spares:
    """Report of the copies that a node holds, after each change."""

    units: Annotated[tuple[Units, ...], AtMost(1024)]


@dataclass(frozen=True, slots=True)
class Refill:
    """An order to send the kept rows of positions [first, last) of a session again, through units [enter,
    until), whose keys and values are lost. `enter` is the end of the stage that kept them."""

    session: U64
    epoch: Epoch
    first: Position
    last: Position
    enter: Units
    until: Units


@dataclass(frozen=True, slots=True)
class Release:
    """An order to drop the assignment: the node has no stage in this epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Room:
    """The room of a stage for keys and values: `pages` in each of its layers, of `positions` positions each.
    A session takes whole pages."""

    pages: Bytes
    positions: Rows


@dataclass(frozen=True, slots=True)
class Loaded:
    """Report that the stage is loaded and the next node connected. `ram_bytes` is the process's resident
    memory. `room` is None if the stage has no limit of keys and values, or no layer with them. `rows` are the
    positions, from the first, whose rows the stage has kept (Refill)."""

    epoch: Epoch
    seconds: Seconds
    ram_bytes: Bytes
    room: Room | None = None
    rows: Annotated[tuple[Kept, ...], AtMost(MOST_SESSIONS)] = ()


@dataclass(frozen=True, slots=True)
class Broken:
    """Report that the stage cannot run. `peer` is the next node's incarnation if that node is at fault.
    `again`: only the connection to it has failed, and a new one works, so the same chain can be tried
    again."""

    epoch: Epoch
    code: ErrorCode
    text: Text
    peer: U64 | None
    again: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """An order to measure the link to another node."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Measured:
    """The measured link to the node with incarnation `peer`. If `link` is None, `problem` is the reason."""

    peer: U64
    link: LinkSpeed | None
    problem: Text


@dataclass(frozen=True, slots=True)
class GetStats:
    """A request for Stats."""


@dataclass(frozen=True, slots=True)
class Work:
    """Calls of a stage: their number, their rows, and their time."""

    steps: Bytes
    rows: Bytes
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Stats:
    """The work of a stage in its epoch. `decode` counts calls in which each sequence had one row, `prefill`
    all others."""

    epoch: Epoch | None
    decode: Work
    prefill: Work


@dataclass(frozen=True, slots=True)
class Open:
    """The start of a session, sent down the chain ahead of its rows."""

    session: U64
    epoch: Epoch
    sampling: Sampling
    context: Annotated[int, Between(1, (1 << 31) - 1)]


@dataclass(frozen=True, slots=True)
class Close:
    """The end of a session, sent down the chain. Each node drops the session's queued rows and frees its
    state."""

    session: U64
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Failed:
    """Report that a session cannot go on. The node has freed its state, and the coordinator must close it."""

    session: U64
    epoch: Epoch
    code: ErrorCode
    text: Text


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one session at positions [first, first + len(tokens)), with the output of the previous stage.

    `hidden` is f32 [rows, cols], or None for the first stage, which needs only the token ids. Later stages
    need the ids for the sampler's history. `want` is NOTHING or TOKEN, since logits are not sent over the
    network. `more`: the previous stage has computed these rows in one call with those of the next Step on the
    connection. `part` (enter, until): only units [enter, until) run these rows, to fill lost keys and values;
    `hidden` is the input of unit `enter`."""

    session: int
    epoch: Epoch
    first: int
    tokens: tuple[int, ...]
    want: Want
    hidden: F32 | None = field(default=None, compare=False)
    more: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Report of the last stage that it has run positions [first, first + rows) of a session; with the sampled
    token, if one was wanted. For a Step with `part` it is sent by the stage of the last unit of the part."""

    session: int
    epoch: Epoch
    first: int
    rows: int
    token: int | None


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of any value, sent to measure the rate of a link."""

    size: int


@dataclass(frozen=True, slots=True)
class Carried:
    """A session of a transition: its parameters, and token ids of positions from `first` on. Only a taker
    without a stage in the base epoch gets them, before the session's Pages."""

    session: U64
    epoch: Epoch
    sampling: Sampling
    context: Annotated[int, Between(1, (1 << 31) - 1)]
    first: Position
    tokens: Annotated[tuple[U32, ...], AtMost(4096)]


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of positions [first, last) of a session in one unit, as `Stage.export_positions`
    returns them. They replace what was sent before for positions from `first` on."""

    session: int
    epoch: Epoch
    unit: int
    first: int
    last: int
    data: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Complete:
    """Report of a giver that all keys and values of a commit have been sent."""

    epoch: Epoch


Message = (
    Hello | Error | Ping | Pong | Assign | Release | Loaded | Broken | Measure | Measured | GetStats | Stats
    | Open | Close | Failed | Step | Result | Data | Prepared | Commit | Abort | Spare | Spares | Refill
    | Carried | Pages | Complete
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the message table. `limit` is the largest body in bytes. The side that dialled may send the
    message on connections with a purpose in `down`, and the side that was dialled on those with a purpose in
    `up`."""

    code: int
    kind: type[Message]
    limit: int
    down: frozenset[Purpose]
    up: frozenset[Purpose]


def _entry(code: int, kind: type[Message], down: str, up: str, limit: int = CONTROL_LIMIT) -> Entry:
    known: dict[str, Purpose] = {"control": "control", "step": "step", "probe": "probe", "bulk": "bulk"}
    return Entry(
        code, kind, limit, frozenset(known[p] for p in down.split()), frozenset(known[p] for p in up.split())
    )


MESSAGES: tuple[Entry, ...] = (
    _entry(1, Hello, "control step probe bulk", "control step probe bulk"),
    _entry(2, Error, "control step probe bulk", "control step probe bulk"),
    _entry(3, Ping, "control step probe", ""),
    _entry(4, Pong, "", "control step probe"),
    _entry(5, Assign, "control", ""),
    _entry(6, Release, "control", ""),
    _entry(7, Loaded, "", "control"),
    _entry(8, Broken, "", "control"),
    _entry(9, Measure, "control", ""),
    _entry(10, Measured, "", "control"),
    _entry(11, GetStats, "control", ""),
    _entry(12, Stats, "", "control"),
    _entry(13, Open, "step", ""),
    _entry(14, Close, "step", ""),
    _entry(15, Failed, "", "control"),
    _entry(16, Prepared, "", "control"),
    _entry(17, Commit, "control", ""),
    _entry(18, Abort, "control", ""),
    _entry(19, Spare, "control", ""),
    _entry(20, Spares, "", "control"),
    _entry(21, Refill, "control", ""),
    _entry(22, Carried, "bulk", ""),
    _entry(23, Complete, "bulk", ""),
    _entry(32, Step, "step", "", STEP_LIMIT),
    _entry(33, Result, "", "control"),
    _entry(34, Data, "probe", "", BULK_LIMIT),
    _entry(35, Pages, "bulk", "", PAGES_LIMIT),
)
BY_CODE = {entry.code: entry for entry in MESSAGES}
BY_KIND = {entry.kind: entry for entry in MESSAGES}
