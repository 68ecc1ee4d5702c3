"""The planner's rows: what it is asked (units, devices, links, workload) and what it answers (a plan, or why
none).

Frozen, plain, and checked when made: a row that exists is a row that can be planned with. Ranges of units are
half-open. Bytes are whole bytes, times are seconds, rates are per second; a MAC is one multiply-add.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .check import check_name, check_real, check_row_rates, check_whole

Objective = Literal["latency", "throughput", "first_token"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "first_token")
TOKEN_BYTES = 4  # a token id on its way from the head to the first device, or from the last one back


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a model: the embedding, a layer, or the final norm and head."""

    name: str
    bytes: int  # resident weights
    read_bytes: int  # weight bytes that one decoded row reads; of an embedding, one row of the table
    macs: int  # per row
    kv_bytes_per_token: int  # state that grows with the position, per sequence
    fixed_state_bytes: int  # state that does not, per sequence
    cut_bytes: int  # one row on its way to the next unit
    workspace_bytes: int = 0  # scratch at the largest batch; units of a stage share it, so the largest counts
    attend_macs: int = 0  # of attention, per row and position of the state

    def __post_init__(self) -> None:
        check_name("a unit", self.name)
        for field in ("bytes", "read_bytes", "macs", "kv_bytes_per_token", "fixed_state_bytes", "cut_bytes",
                      "workspace_bytes", "attend_macs"):  # fmt: skip
            check_whole(f"unit {self.name}: {field}", getattr(self, field))
        if self.read_bytes > self.bytes:
            raise ValueError(f"unit {self.name}: read_bytes {self.read_bytes} exceed its bytes {self.bytes}")


@dataclass(frozen=True, slots=True)
class Model:
    """Units in order: embedding, layers, head. `tied_bytes` of the last unit are also unit 0's: a device that
    has both holds them once. State is allocated in pages of `kv_page_tokens` positions."""

    units: tuple[Unit, ...]
    tied_bytes: int = 0
    kv_page_tokens: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.units, tuple) or len(self.units) < 2:
            raise ValueError("a model needs a tuple of at least two units, an embedding and a head")
        check_whole("the model's tied_bytes", self.tied_bytes)
        check_whole("the model's kv_page_tokens", self.kv_page_tokens, 1)
        ends = min(self.units[0].bytes, self.units[-1].bytes)
        if self.tied_bytes > ends:
            raise ValueError(
                f"the model's tied_bytes {self.tied_bytes} exceed the {ends} bytes of an end unit"
            )


@dataclass(frozen=True, slots=True)
class Device:
    """One device as measured, and the RAM it promises. What nobody measured costs nothing."""

    name: str
    ram_bytes: int  # the cap: all that the node may take, its own base included
    read_bytes_per_s: float  # weights and state, by the real kernels
    macs_per_s: float  # matmuls of many rows
    base_bytes: int = 0  # the process before it holds a unit
    step_overhead_s: float = 0.0  # per step, whatever the stage holds
    idle_overhead_s: float = 0.0  # what a step after a pause takes more than one right after another
    row_rates: tuple[tuple[int, float], ...] = ()  # (rows of a call, MAC/s), ascending; none: macs_per_s
    attend_macs_per_s: float = math.inf  # attention of one row of a sequence
    prefill_attend_macs_per_s: float = math.inf  # and of many

    def __post_init__(self) -> None:
        check_name("a device", self.name)
        check_whole(f"device {self.name}: ram_bytes", self.ram_bytes)
        check_whole(f"device {self.name}: base_bytes", self.base_bytes)
        check_real(f"device {self.name}: read_bytes_per_s", self.read_bytes_per_s, above=0)
        check_real(f"device {self.name}: macs_per_s", self.macs_per_s, above=0)
        for field in ("step_overhead_s", "idle_overhead_s"):
            check_real(f"device {self.name}: {field}", getattr(self, field))
        for field in ("attend_macs_per_s", "prefill_attend_macs_per_s"):
            check_real(f"device {self.name}: {field}", getattr(self, field), above=0, endless=True)
        check_row_rates(f"device {self.name}", self.row_rates)


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two nodes: a message of n bytes arrives after latency_s + n / bytes_per_s."""

    latency_s: float
    bytes_per_s: float  # infinite for a loop inside one process

    def __post_init__(self) -> None:
        check_real("a link's latency_s", self.latency_s)
        check_real("a link's bytes_per_s", self.bytes_per_s, above=0, endless=True)


LOOPBACK = Link(0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices, the links between them, and `head`: the node where tokens enter and return.

    A pair without a link cannot be neighbours in a chain. The head may be one of the devices; its way to
    itself is then free unless a link says otherwise.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link]
    head: str

    def __post_init__(self) -> None:
        if not isinstance(self.devices, tuple) or not self.devices:
            raise ValueError("a cluster needs a tuple of at least one device")
        check_name("the head", self.head)
        names = [device.name for device in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"device {twice[0]} is listed twice")
        for source, target in self.links:
            for end in (source, target):
                if end != self.head and end not in names:
                    raise ValueError(f"link {source} -> {target}: there is no device {end}")

    def device(self, name: str) -> Device:
        """The device of that name; ValueError if there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in self.devices)
        raise ValueError(f"there is no device {name}; there are {known}")

    def link(self, source: str, target: str) -> Link | None:
        """The link from node to node, None where there is none."""
        link = self.links.get((source, target))
        return LOOPBACK if link is None and source == target else link


@dataclass(frozen=True, slots=True)
class Workload:
    """What the cluster is to serve: `context` positions of state for each of `sequences`, `streams` of them
    decoding at once, prompts of `prompt_tokens` in chunks of `chunk_tokens` rows. A decoded row reads the
    state of `depth` positions; when None, of the middle of an answer that goes from the prompt's end to the
    end of the context."""

    context: int
    sequences: int = 1
    prompt_tokens: int = 1
    streams: int = 1
    chunk_tokens: int = 128
    depth: int | None = None

    def __post_init__(self) -> None:
        for field in ("context", "sequences", "prompt_tokens", "streams", "chunk_tokens"):
            check_whole(f"workload: {field}", getattr(self, field), 1)
        if self.prompt_tokens > self.context:
            raise ValueError(
                f"workload: a prompt of {self.prompt_tokens} exceeds the context of {self.context} tokens"
            )
        if self.streams > self.sequences:
            raise ValueError(
                f"workload: {self.streams} streams need as many sequences, and there are {self.sequences}"
            )
        if self.depth is not None:
            check_whole("workload: depth", self.depth)
            if self.depth > self.context:
                raise ValueError(f"workload: depth {self.depth} exceeds the context of {self.context} tokens")

    @property
    def decode_depth(self) -> int:
        """Positions whose state a decoded row reads."""
        return (self.prompt_tokens + self.context) // 2 if self.depth is None else self.depth


@dataclass(frozen=True, slots=True)
class Stage:
    """Units [first, last) on one device."""

    device: str
    first: int
    last: int

    def __post_init__(self) -> None:
        check_name("a stage's device", self.device)
        check_whole(f"stage on {self.device}: first", self.first)
        check_whole(f"stage on {self.device}: last", self.last, self.first + 1)


@dataclass(frozen=True, slots=True)
class Alone:
    """What one device would do with the whole model: its tokens/s whether or not it fits (None: no way to the
    head), and the bytes it lacks to hold it."""

    device: str
    tokens_per_s: float | None
    ram_bytes: int
    missing_bytes: int

    @property
    def possible(self) -> bool:
        """The device reaches the head and holds the model under its cap."""
        return self.tokens_per_s is not None and self.missing_bytes == 0


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a device is in the plan or out of it, in words."""

    device: str
    used: bool
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Who holds what, and what that should give.

    Times are of one decode call, which has a row of each of `batch` streams. `hop_seconds`,
    `link_busy_seconds` and `link_bytes` have one more entry than `stages`: head to first, between neighbours,
    last to head. `step_seconds` is seconds a token: of several streams together what following them gives,
    else one round of one stream through all stages and hops.
    """

    objective: Objective
    streams: int
    units: int
    stages: tuple[Stage, ...]
    stage_seconds: tuple[float, ...]
    hop_seconds: tuple[float, ...]
    link_busy_seconds: tuple[float, ...]  # of each hop, how long the link itself is taken
    link_bytes: tuple[int, ...]  # a token, on each hop
    step_seconds: float
    tokens_per_s: float  # of all streams together for throughput, else of one
    first_token_seconds: float  # from the prompt's arrival to its first token
    ram_bytes: tuple[int, ...]  # of each stage's device
    cap_bytes: tuple[int, ...]
    alone: tuple[Alone, ...]
    reasons: tuple[Reason, ...]
    method: str  # how it was found, in words
    optimal: bool  # proved best over all orders and cuts (of those allowed)
    batch: int = 1  # streams that share a call where most do, in the mean

    @property
    def best_alone(self) -> Alone | None:
        """The fastest device that could do it all by itself under its cap."""
        able = [alone for alone in self.alone if alone.possible]
        return max(able, key=lambda alone: alone.tokens_per_s or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No plan exists. `missing_bytes`: the least RAM that the caps lack in total, zero when RAM is not what
    is missing; `exact` when no smaller amount would do."""

    missing_bytes: int
    reason: str
    exact: bool = True
