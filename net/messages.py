"""What processes say to each other: one frozen dataclass per message, and the one table of them.

`Hello` and `Error` may come on every connection, and Hello comes first, from the side that dialled. It states
the connection's purpose, which settles what else may be said there:

    control   coordinator to node: orders down; answers, tokens and failures up
    step      coordinator to first node, node to next node: sessions and rows down; answers to pings up
    probe     coordinator or node to a node: pings and bytes that measure the link

docs/protocol.md says the same to people who write another implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..engine.arrays import F32
from ..engine.batch import Sampling, Want
from ..engine.strict import Between, Printable
from ..planner import Device, LinkSpeed

PROTOCOL = 2
"""Raised by every change that an older process would not understand; it stands in each frame's header."""

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
    """What a node offers: the device as measured (a factor by which it plays a slower one is in the numbers),
    and how it computes."""

    device: Device
    max_rows: Rows
    threads: Annotated[int, Between(1, 4096)]
    backend: Name
    exact: bool
    """Results are the same bits as on every other exact device."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks, for what purpose, and what must agree. `offer` is stated by nodes that answer."""

    purpose: Purpose
    name: Name
    incarnation: U64
    engine: Name
    numerics: U32
    model: Hash
    offer: Offer | None


@dataclass(frozen=True, slots=True)
class Error:
    """Why the sender ends the connection: an exit code of net/errors.py, and a sentence."""

    code: ErrorCode
    text: Text


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by Pong at once."""

    nonce: U64


@dataclass(frozen=True, slots=True)
class Pace:
    """How a node keeps up under an epoch: its steps take `slower` times as long as it offered, and `onward`
    is the link to the next node as its rows find it."""

    epoch: Epoch
    slower: Annotated[float, Between(1e-6, 1e6)]
    onward: LinkSpeed | None


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to the Ping with the same nonce. A coordinator also gets the pace of the stage, if there is
    one."""

    nonce: U64
    pace: Pace | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A node as another one finds it; `incarnation` proves that it is the one that was meant."""

    name: Name
    host: Host
    port: Port
    incarnation: U64


@dataclass(frozen=True, slots=True)
class Assign:
    """An order to load units [first, last) for this epoch and to drop older assignments. `next` is the node
    after this one; None on the last, which returns tokens to the coordinator. A call has at most `chunk_rows`
    prompt rows."""

    epoch: Epoch
    first: Units
    last: Units
    next: Peer | None
    chunk_rows: Rows


@dataclass(frozen=True, slots=True)
class Release:
    """Drop the assignment: this node has no part in the epoch that comes."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Loaded:
    """The stage is open and the next node reached. `ram_bytes` is what the process holds now."""

    epoch: Epoch
    seconds: Seconds
    ram_bytes: Bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """The assignment cannot go on here. `peer` is the next node's incarnation if that one is at fault."""

    epoch: Epoch
    code: ErrorCode
    text: Text
    peer: U64 | None


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure the link from you to that node."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Measured:
    """The link to the node of that incarnation; without a measure, `problem` says why."""

    peer: U64
    link: LinkSpeed | None
    problem: Text


@dataclass(frozen=True, slots=True)
class GetStats:
    """Answered by Stats."""


@dataclass(frozen=True, slots=True)
class Work:
    """Calls of the stage, rows in them, and the time they took."""

    steps: Bytes
    rows: Bytes
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Stats:
    """A stage's work under its epoch: `decode` are calls whose runs all had one row, `prefill` the others."""

    epoch: Epoch | None
    decode: Work
    prefill: Work


@dataclass(frozen=True, slots=True)
class Open:
    """A session begins; it travels down the chain ahead of its rows."""

    session: U64
    epoch: Epoch
    sampling: Sampling
    context: Annotated[int, Between(1, (1 << 31) - 1)]


@dataclass(frozen=True, slots=True)
class Close:
    """A session ends; its rows that wait anywhere are dropped, and its state freed."""

    session: U64
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Failed:
    """A session cannot go on: its state is gone here, and the coordinator is to close it."""

    session: U64
    epoch: Epoch
    code: ErrorCode
    text: Text


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one session at positions [first, first + len(tokens)), with the cut of the previous stage.

    `hidden` is f32 [rows, cols]; None for the first stage, which needs the token ids only. Later stages need
    the ids too, for the sampler's history. `want` is NOTHING or TOKEN: logits do not cross the network."""

    session: int
    epoch: Epoch
    first: int
    tokens: tuple[int, ...]
    want: Want
    hidden: F32 | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Result:
    """The rows [first, first + rows) of a session have passed the last stage; `token` if one was wanted."""

    session: int
    epoch: Epoch
    first: int
    rows: int
    token: int | None


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes that fill a link while it is measured; their values mean nothing."""

    size: int


Message = (
    Hello | Error | Ping | Pong | Assign | Release | Loaded | Broken | Measure | Measured | GetStats | Stats
    | Open | Close | Failed | Step | Result | Data
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the message table. `down` and `up` are the purposes of the connections on which the side that
    dialled, or that was dialled, may send it."""

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
