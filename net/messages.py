"""The messages between processes: a frozen dataclass for each, and the table MESSAGES of their types and
rules.

`Hello` and `Error` are allowed on every connection. Hello is first, from the side that dialled, and states
the purpose of the connection, which determines the other messages allowed on it:

    control   coordinator to node: orders down; answers, tokens and failures up
    step      coordinator to first node, node to next node: sessions and rows down; answers to pings up
    probe     coordinator or node to a node: pings and bytes that measure the link

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

PROTOCOL = 3
"""The protocol version in the header of each frame, raised by every change that older processes cannot
read."""

CONTROL_LIMIT = 64 * 1024
STEP_LIMIT = 4 * 1024 * 1024
BULK_LIMIT = 64 * 1024

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
Purpose = Literal["control", "step", "probe"]


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
class Pong:
    """The answer to the Ping with the same nonce. A coordinator also gets the pace and the progress of the
    stage, if there is one. On a `step` connection a node also sends a Pong that answers no Ping (nonce 0)
    while it receives rows or cannot accept more. Unless `at_once`, the Ping may have waited for the end of a
    stage's call, so its time is no measure of the link."""

    nonce: U64
    pace: Pace | None = None
    progress: Progress | None = None
    at_once: bool = True


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
class Assign:
    """An order to load units [first, last) for this epoch and to drop older assignments. `next` is the node
    after this one; None on the last, which returns tokens to the coordinator. A call has at most `chunk_rows`
    prompt rows. `previous` is the incarnation of the only peer whose rows are accepted: the node before this
    one, or the coordinator for the first stage. `groupings`: how 1, 2, 3 … sequences that decode share calls;
    without them, all that wait do."""

    epoch: Epoch
    first: Units
    last: Units
    next: Peer | None
    chunk_rows: Rows
    previous: U64
    groupings: Annotated[tuple[Grouping, ...], AtMost(MOST_SEQUENCES)] = ()


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
    memory. `room` is None if the stage has no limit of keys and values, or no layer with them."""

    epoch: Epoch
    seconds: Seconds
    ram_bytes: Bytes
    room: Room | None = None


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
    connection."""

    session: int
    epoch: Epoch
    first: int
    tokens: tuple[int, ...]
    want: Want
    hidden: F32 | None = field(default=None, compare=False)
    more: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Report of the last stage that it has run positions [first, first + rows) of a session; with the sampled
    token, if one was wanted."""

    session: int
    epoch: Epoch
    first: int
    rows: int
    token: int | None


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of any value, sent to measure the rate of a link."""

    size: int


Message = (
    Hello | Error | Ping | Pong | Assign | Release | Loaded | Broken | Measure | Measured | GetStats | Stats
    | Open | Close | Failed | Step | Result | Data
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
    known: dict[str, Purpose] = {"control": "control", "step": "step", "probe": "probe"}
    return Entry(
        code, kind, limit, frozenset(known[p] for p in down.split()), frozenset(known[p] for p in up.split())
    )


MESSAGES: tuple[Entry, ...] = (
    _entry(1, Hello, "control step probe", "control step probe"),
    _entry(2, Error, "control step probe", "control step probe"),
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
    _entry(32, Step, "step", "", STEP_LIMIT),
    _entry(33, Result, "", "control"),
    _entry(34, Data, "probe", "", BULK_LIMIT),
)
BY_CODE = {entry.code: entry for entry in MESSAGES}
BY_KIND = {entry.kind: entry for entry in MESSAGES}
