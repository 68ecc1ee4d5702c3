"""The messages between processes: a frozen dataclass for each; their types and rules are in
net/message_table.py.

`Hello` and `Error` are allowed on every connection. Hello is first, from the side that dialled, and states
the purpose of the connection, which determines the other messages allowed on it:

    control   coordinator to node: orders down; answers, tokens and failures up
    step      coordinator to first node, node to next node: sessions and rows down; answers to pings up
    probe     coordinator or node to a node: pings and bytes that measure the link
    bulk      node to node: keys and values that move with their units
    files     node to node: files of a model, which the side that dialled asks for

docs/protocol.md is the description for readers of a capture and writers of other implementations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from ..engine.arrays import F32
from ..engine.batch import Logprobs, Sampling, Want
from ..engine.strict import AtMost, Between, Printable
from ..planner import Device, LinkSpeed
from ..planner.groups import MOST_SEQUENCES, Grouping

PROTOCOL = 8
"""The protocol version in the header of each frame, raised by every change that older processes cannot
read."""

CONTROL_LIMIT = 64 * 1024
STEP_LIMIT = 4 * 1024 * 1024
BULK_LIMIT = 64 * 1024
PAGES_LIMIT = 4 * 1024 * 1024
FILE_BYTES = 256 * 1024
"""The most bytes of a file in one message."""
FILES_LIMIT, SUMS_LIMIT = FILE_BYTES + 64, 1024 * 1024
MOST_SESSIONS = 256
"""The most sessions that a node serves at a time."""
MOST_TOKENS = 8192
"""The most token ids in a message to the last node."""
MOST_DEVICES = 64
"""The most devices of a house."""
MOST_ADDRESSES = 4
"""The most addresses of a house's head."""
MOST_WANTED = 32
"""The most rows in a Step that wants something of each, and in a call: a stage has room for the logits of so
many by default."""
MOST_SOURCES = 64
"""The most sources of files in an order."""

U32 = Annotated[int, Between(0, (1 << 32) - 1)]
U64 = Annotated[int, Between(0, (1 << 64) - 1)]
Units = Annotated[int, Between(0, 1 << 16)]
RowCount = Annotated[int, Between(1, 4096)]
Position = Annotated[int, Between(0, (1 << 31) - 1)]
Port = Annotated[int, Between(1, 65535)]
Bytes = Annotated[int, Between(0, 1 << 60)]
Seconds = Annotated[float, Between(0, 1e9)]
Name = Annotated[str, Printable(1, 64)]
Host = Annotated[str, Printable(1, 253)]
Text = Annotated[str, Printable(0, 1000)]
Hash = Annotated[str, Printable(1, 128)]
ErrorCode = Annotated[int, Between(1, 255)]
UnitList = Annotated[tuple[Units, ...], AtMost(1024)]
FileName = Annotated[str, Printable(1, 100)]
Purpose = Literal["control", "step", "probe", "bulk", "files"]
Role = Literal["head", "device"]


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
    max_rows: RowCount
    threads: Annotated[int, Between(1, 4096)]
    backend: Name
    exact: bool
    """Whether results have the same bits as on every other exact device."""
    held: UnitList | None = None
    """The units whose files are whole on the node's disk, in ascending order; None: all."""


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
    """A request for an immediate Pong. `answers`, from a coordinator: answers are computed, or wait, so that
    a node is needed although its stage does nothing."""

    nonce: U64
    answers: bool = False


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
    """How much of a node may be used, by its policy (net/throttling.py): the `share` of the time in which it
    may compute, and whether it is `leaving`, so that its layers must move to other nodes. `reason` is a
    clause for the user, or empty. `battery` (per cent that are left) and its `temperature` (°C) are for
    reports."""

    share: Annotated[float, Between(0.01, 1.0)] = 1.0
    leaving: bool = False
    reason: Text = ""
    battery: Annotated[float, Between(0, 100)] | None = None
    temperature: Annotated[float, Between(-100, 200)] | None = None


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
    node has no stage in the base epoch, so it is told of the sessions, too (Carried)."""

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
    are kept, those of `gives` and `takes` travel. A node that loses all of its units has first = last = 0.
    `ended`: no rows of the base follow, whatever becomes of this. So its stage stops, and where the RAM has
    no room for both ranges, the weights that only the old one needs go first."""

    epoch: Epoch
    first: Units
    last: Units
    next: Peer | None
    chunk_rows: RowCount
    previous: U64
    groupings: Annotated[tuple[Grouping, ...], AtMost(MOST_SEQUENCES)] = ()
    base: U32 | None = None
    gives: Annotated[tuple[Gift, ...], AtMost(64)] = ()
    takes: Annotated[tuple[Take, ...], AtMost(64)] = ()
    ended: bool = False


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

    units: UnitList


@dataclass(frozen=True, slots=True)
class Spares:
    """Report of the copies that a node holds, after each change."""

    units: UnitList


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
    positions: RowCount


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
    """The start of a session, sent down the chain ahead of its rows. With `source`, it begins with the first
    `positions` of that session, whose keys and values they share from then on. All stages hold these
    positions when this is sent, and run it before whatever is sent later."""

    session: U64
    epoch: Epoch
    context: Annotated[int, Between(1, (1 << 31) - 1)]
    source: U64 | None = None
    positions: Position = 0


@dataclass(frozen=True, slots=True)
class Close:
    """The end of a session, sent down the chain. Each node drops the session's queued rows and frees its
    state. The coordinator also sends it to the last node, on `control`, if it has told that node something of
    the session, which then forgets it."""

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
    """Rows of one session at positions [first, first + rows). On the way to the first stage they are token
    ids, `tokens`; further on they are `hidden`, f32 [rows, cols], the output of the previous stage, and there
    are no token ids. `tags` are those of the chunks that end in these positions (net/tags.py).

    `want` and `report` are as in engine.batch.Run; all but LOGITS may be wanted, and at most MOST_WANTED rows
    want something each. `more`: the previous stage has computed these rows in one call with those of the next
    Step on the connection. `part` (enter, until): only units [enter, until) run these rows, to fill lost keys
    and values; `hidden` is the input of unit `enter`.

    The last stage waits until the coordinator has told it the `told`th thing about the session in this epoch
    (0: nothing). `masked`: that is the Mask of the token that is drawn. There, `draw` has what the stage was
    told of this Step; it is not sent."""

    session: int
    epoch: Epoch
    first: int
    tokens: tuple[int, ...]
    want: Want
    hidden: F32 | None = field(default=None, compare=False)
    more: bool = False
    part: tuple[int, int] | None = None
    report: int | None = None
    told: int = 0
    masked: bool = False
    tags: tuple[int, ...] = ()
    draw: Draw | None = field(default=None, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.tokens) if self.hidden is None else len(self.hidden)


@dataclass(frozen=True, slots=True)
class Draw:
    """How the last stage draws the tokens of a Step: the parameters; the token ids of all positions, from
    the first to the last that counts, where they matter; and the tokens that are allowed, as in
    engine.batch.Run.allowed."""

    sampling: Sampling = Sampling()
    history: NDArray[np.int32] | None = None
    allowed: NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(array.nbytes for array in (self.history, self.allowed) if array is not None)


@dataclass(frozen=True, slots=True)
class SetSampling:
    """The parameters with which the tokens of a session are drawn, from the coordinator to the last node.
    Without it, they are the default ones. What the last node is told of a session, by SetSampling, Tokens and
    Mask, is numbered from 1 on in each epoch."""

    session: U64
    epoch: Epoch
    number: Annotated[int, Between(1, (1 << 32) - 1)]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of positions [first, first + len(tokens)) of a session, which replace earlier ones, from the
    coordinator to the last node. It needs them to penalise tokens that have occurred, and to score tokens."""

    session: int
    epoch: Epoch
    number: int
    first: int
    tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Mask:
    """The tokens that may be drawn for one position of a session, from the coordinator to the last node.
    `bits` as in engine.batch.Run.allowed."""

    session: int
    epoch: Epoch
    number: int
    bits: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Result:
    """Report of the last stage that it has run positions [first, first + rows) of a session; with what was
    wanted of them: `token`, or `tokens` or `scores` of each row, and `logprobs` as in engine.batch.Result.
    For a Step with `part` it is sent by the stage of the last unit of the part."""

    session: int
    epoch: Epoch
    first: int
    rows: int
    token: int | None
    tokens: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """The Result of positions of which the rows themselves are wanted: f32 [rows, cols]."""

    session: int
    epoch: Epoch
    first: int
    output: F32 = field(compare=False)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.output)


@dataclass(frozen=True, slots=True)
class PairedDevice:
    """A device of a house: its name there, its role, and its certificate, DER in base64."""

    name: Name
    role: Role
    certificate: Annotated[str, Printable(1, 2048)]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a device listens."""

    host: Host
    port: Port


@dataclass(frozen=True, slots=True)
class House:
    """All devices of the house, from its head: the devices that are not among them lose their connections;
    and where the head waits for devices, if it does. It is sent before any other order, and when this has
    changed."""

    devices: Annotated[tuple[PairedDevice, ...], AtMost(MOST_DEVICES)]
    addresses: Annotated[tuple[Address, ...], AtMost(MOST_ADDRESSES)] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A node that has the files of these units and gives them to a node that shows the peer's ticket."""

    peer: Peer
    units: UnitList


@dataclass(frozen=True, slots=True)
class Fetch:
    """An order to have the files of these units on disk, and to get those that are missing from the sources.
    It replaces earlier orders; without units, nothing more is fetched."""

    units: UnitList
    sources: Annotated[tuple[Source, ...], AtMost(MOST_SOURCES)]


@dataclass(frozen=True, slots=True)
class Held:
    """Report of all units whose files are whole on the node's disk. Of the `wanted` bytes of the newest order
    it has `got`. `problem` is the reason why it cannot have the rest, or empty."""

    units: UnitList
    wanted: Bytes
    got: Bytes
    problem: Text


@dataclass(frozen=True, slots=True)
class GetBytes:
    """A request for bytes [first, last) of a file of the model, at most FILE_BYTES."""

    name: FileName
    first: Bytes
    last: Bytes

    def __post_init__(self) -> None:
        if not 0 < self.last - self.first <= FILE_BYTES:
            raise ValueError(f"bytes [{self.first}, {self.last}) are not 1 to {FILE_BYTES}")


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The bytes that a GetBytes asked for, in the order of the requests. `busy`: the node computes
    for answers, so that the network should be left to them."""

    first: int
    busy: bool
    data: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class GetSums:
    """A request for the Sums of a file of the model."""

    name: FileName


@dataclass(frozen=True, slots=True)
class Sums:
    """The SHA-256 of each piece of a file (net/files.py), 32 bytes each. It is sent when it is known, perhaps
    after FileBytes that were asked for later."""

    name: FileName
    sums: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of any value, sent to measure the rate of a link."""

    size: int


@dataclass(frozen=True, slots=True)
class Carried:
    """A session of a transition, and that it has the positions [first, last): `tags` are those of the chunks
    that end there (net/tags.py). Only a taker without a stage in the base epoch gets it, before the session's
    Pages."""

    session: U64
    epoch: Epoch
    context: Annotated[int, Between(1, (1 << 31) - 1)]
    first: Position
    last: Position
    tags: Annotated[tuple[U64, ...], AtMost(1024)]


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
class Shared:
    """Instead of Pages: the first `positions` of a session have the tokens of another one, `source`, of which
    these positions have been sent before, in all units that the giver gives to this taker. The taker shares
    their pages. What is sent of the source later does not change them."""

    session: U64
    epoch: Epoch
    source: U64
    positions: Annotated[int, Between(1, (1 << 31) - 1)]


@dataclass(frozen=True, slots=True)
class Complete:
    """Report of a giver that all keys and values of a commit have been sent."""

    epoch: Epoch


Message = (
    Hello | Error | Ping | Pong | Assign | Release | Loaded | Broken | Measure | Measured | GetStats | Stats
    | Open | Close | Failed | Step | Mask | Result | Rows | Data | Prepared | Commit | Abort | Spare | Spares
    | Refill | Carried | Pages | Shared | Complete | House | Fetch | Held
    | GetBytes | FileBytes | GetSums | Sums | SetSampling | Tokens
)  # fmt: skip
