"""The planner's rows: what it is asked, and assignments (plans are in evaluation.py).

Frozen, plain, and checked when made: a row that exists can be planned with. Devices and links are the same
rows from the measurement through the network to the plan, so the checks also bound what a stranger may send.
Ranges of units are half-open; bytes are whole, times in seconds, rates per second; a MAC is one
multiply-accumulate.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Objective = Literal["latency", "throughput", "first_token"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "first_token")

MOST_BYTES = 1 << 60
MOST_SECONDS = 1e9
SLOWEST, FASTEST = 1e-3, 1e18  # rates
MOST_ROWS = 4096  # of one call
LEAST_CHUNK = 8  # rows of a prompt's chunk, where it may have so many
MOST_RATES = 64  # row counts at which a device was measured


def check_whole(what: str, value: object, least: int = 0, most: int = MOST_BYTES) -> None:
    """A whole number (no bool) within [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be a whole number >= {least}, not {value!r:.60}")
    if value > most:
        raise ValueError(f"{what} is larger than {most}")


def check_real(what: str, value: object, *, above: float = -math.inf, least: float = -math.inf) -> float:
    """A finite number (no bool), > `above` and >= `least`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{what} must be a number, not {value!r:.60}")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, not {value!r}")
    if value <= above:
        raise ValueError(f"{what} must be > {above:g}, not {value!r:.60}")
    if value < least:
        raise ValueError(f"{what} must be >= {least:g}, not {value!r:.60}")
    return value


def check_seconds(what: str, value: object) -> None:
    """A number within [0, MOST_SECONDS]."""
    if check_real(what, value, least=0) > MOST_SECONDS:
        raise ValueError(f"{what} is larger than {MOST_SECONDS:g}")


def check_rate(what: str, value: object) -> None:
    """A number > 0 within [SLOWEST, FASTEST]."""
    check_real(what, value, above=0)
    if check_real(what, value, least=SLOWEST) > FASTEST:
        raise ValueError(f"{what} is larger than {FASTEST:g}")


def check_name(what: str, value: object) -> None:
    """A string of 1 to 100 characters that can be printed."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} needs a name that is not empty, not {value!r:.60}")
    if not value.isprintable():
        raise ValueError(f"{what} has a name that cannot be printed: {value!r:.60}")
    if len(value) > 100:
        raise ValueError(f"{what} has a name of {len(value)} characters, more than 100")


def _check_row_rates(owner: str, rates: object) -> None:
    if not isinstance(rates, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in rates):
        raise ValueError(f"{owner}: row_rates must be a tuple of (rows, MAC/s) pairs, not {rates!r:.60}")
    if len(rates) > MOST_RATES:
        raise ValueError(f"{owner}: row_rates has {len(rates)} pairs, more than {MOST_RATES}")
    before = 0
    for rows, rate in rates:
        check_whole(f"{owner}: rows of row_rates", rows, before + 1, MOST_ROWS)
        check_rate(f"{owner}: MAC/s at {rows} rows", rate)
        before = rows


@dataclass(frozen=True, slots=True)
class Unit:
    """The costs of one unit of a model: the embedding, a layer, or the final norm with the LM head."""

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
        for key in ("bytes", "read_bytes", "macs", "kv_bytes_per_token", "fixed_state_bytes", "cut_bytes",
                    "workspace_bytes", "attend_macs"):  # fmt: skip
            check_whole(f"unit {self.name}: {key}", getattr(self, key))
        if self.read_bytes > self.bytes:
            raise ValueError(f"unit {self.name}: read_bytes {self.read_bytes} exceed its bytes {self.bytes}")


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """A model's units in order: embedding, layers, LM head. `tied_bytes` of the last unit are also unit 0's:
    a device that has both holds them once. State is allocated in pages of `kv_page_tokens` positions."""

    units: tuple[Unit, ...]
    tied_bytes: int = 0
    kv_page_tokens: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.units, tuple) or len(self.units) < 2:
            raise ValueError("a model needs a tuple of at least two units, an embedding and an LM head")
        check_whole("the model's tied_bytes", self.tied_bytes)
        check_whole("the model's kv_page_tokens", self.kv_page_tokens, 1)
        end = min(self.units[0].bytes, self.units[-1].bytes)
        if self.tied_bytes > end:
            raise ValueError(f"the model's tied_bytes {self.tied_bytes} exceed an end unit's {end} bytes")


@dataclass(frozen=True, slots=True)
class Device:
    """What one device offers: the RAM that it promises, and its rates and overheads as measured with the real
    kernels. The defaults, for what nobody measured, cost nothing. `beside` names the device whose process and
    CPU this one shares: it is a second range of that device, for the model's last unit alone, in a chain that
    begins there (home.py). A tied table counts for the first range only."""

    name: str
    ram_bytes: int  # the cap: all that the node may take, its own base included
    read_bytes_per_s: float  # weights and state
    macs_per_s: float  # matmuls of many rows
    base_bytes: int = 0  # the process before it holds a unit
    step_overhead_s: float = 0.0  # per call, whatever the stage holds
    idle_overhead_s: float = 0.0  # what a call after a pause takes more than one right after another
    row_rates: tuple[tuple[int, float], ...] = ()  # (rows of a call, MAC/s), ascending; none: macs_per_s
    attend_macs_per_s: float = FASTEST  # attention of one row of a sequence
    prefill_attend_macs_per_s: float = FASTEST  # and of many
    beside: str = ""

    def __post_init__(self) -> None:
        check_name("a device", self.name)
        if self.beside:
            check_name(f"what device {self.name} is beside", self.beside)
            if self.beside == self.name:
                raise ValueError(f"device {self.name} is beside itself")
        for key in ("ram_bytes", "base_bytes"):
            check_whole(f"device {self.name}: {key}", getattr(self, key))
        for key in ("read_bytes_per_s", "macs_per_s", "attend_macs_per_s", "prefill_attend_macs_per_s"):
            check_rate(f"device {self.name}: {key}", getattr(self, key))
        for key in ("step_overhead_s", "idle_overhead_s"):
            check_seconds(f"device {self.name}: {key}", getattr(self, key))
        _check_row_rates(f"device {self.name}", self.row_rates)


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """One direction between two nodes: a message of n bytes arrives after latency_s + n / bytes_per_s in half
    of all cases; in 95 % of them the latency is at most `latency_p95_s` (0: not measured)."""

    latency_s: float
    bytes_per_s: float  # infinite within one process
    latency_p95_s: float = 0.0

    def __post_init__(self) -> None:
        check_seconds("a link's latency_s", self.latency_s)
        if self.bytes_per_s != math.inf:
            check_rate("a link's bytes_per_s", self.bytes_per_s)
        check_seconds("a link's latency_p95_s", self.latency_p95_s)


LOOPBACK = LinkSpeed(0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices, the links between them, and the coordinator: the node where tokens enter and return. A pair
    without a link cannot be neighbours in a chain. The coordinator may be one of the devices; its way to
    itself is then free unless a link says otherwise. `hosts`: the machine of a device, by its name, as far as
    known; several on one are processes that share its memory."""

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], LinkSpeed]
    coordinator: str
    hosts: Mapping[str, Hashable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.devices, tuple) or not self.devices:
            raise ValueError("a cluster needs a tuple of at least one device")
        check_name("the coordinator", self.coordinator)
        names = [device.name for device in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"device {twice[0]} is listed twice")
        for source, target in self.links:
            for end in (source, target):
                if end != self.coordinator and end not in names:
                    raise ValueError(f"link {source} -> {target}: there is no device {end}")

    def device(self, name: str) -> Device:
        """The device of that name; ValueError if there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in self.devices)
        raise ValueError(f"there is no device {name}; there are {known}")

    def link(self, source: str, target: str) -> LinkSpeed | None:
        """The link from node to node, None where there is none."""
        link = self.links.get((source, target))
        return LOOPBACK if link is None and source == target else link


@dataclass(frozen=True, slots=True)
class Workload:
    """What the cluster is to serve: `context` positions of state for each of `sequences`, `streams` of them
    decoding at once, prompts of `prompt_tokens` in chunks of at most `chunk_tokens` rows. A decoded row reads
    the state of `depth` positions; when None, of the middle of an answer that goes from the prompt's end to
    the end of the context."""

    context: int
    sequences: int = 1
    prompt_tokens: int = 1
    streams: int = 1
    chunk_tokens: int = 128
    depth: int | None = None

    def __post_init__(self) -> None:
        for key in ("context", "sequences", "prompt_tokens", "streams", "chunk_tokens"):
            check_whole(f"workload: {key}", getattr(self, key), 1)
        check_whole("workload: depth", self.depth or 0)
        for what, tokens in (("a prompt of", self.prompt_tokens), ("depth", self.depth or 0)):
            if tokens > self.context:
                raise ValueError(f"workload: {what} {tokens} exceeds the context of {self.context} tokens")
        if self.streams > self.sequences:
            need = f"{self.streams} streams need as many sequences"
            raise ValueError(f"workload: {need}, and there are {self.sequences}")

    @property
    def decode_depth(self) -> int:
        """Positions whose state a decoded row reads."""
        return (self.prompt_tokens + self.context) // 2 if self.depth is None else self.depth

    @property
    def in_chunks(self) -> bool:
        """Whether the prompt may have several chunks."""
        return self.prompt_tokens > min(self.chunk_tokens, LEAST_CHUNK)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Units [first, last) on one device."""

    device: str
    first: int
    last: int

    def __post_init__(self) -> None:
        check_name("an assignment's device", self.device)
        check_whole(f"assignment to {self.device}: first", self.first)
        check_whole(f"assignment to {self.device}: last", self.last, self.first + 1)


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must keep to beside the RAM caps. Devices by name. `layers`: exactly so many layers (the
    embedding and the LM head are none); 0 leaves a device out. `first` holds the embedding, `last` the LM
    head. `order`: the only devices to plan with, in this order; any may get nothing. `held`: a device that is
    named there may hold only units of its set, since it has no other files."""

    exclude: frozenset[str] = frozenset()
    layers: Mapping[str, int] = field(default_factory=dict)
    first: str | None = None
    last: str | None = None
    order: tuple[str, ...] | None = None
    held: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, count in self.layers.items():
            check_whole(f"the layers of {name}", count)
            if count and name in self.exclude:
                raise ValueError(f"{name} is excluded and has {count} layers as well")
        for end in self._ends:
            if end in self.exclude:
                raise ValueError(f"{end} is excluded and holds an end of the model as well")
            if self.layers.get(end) == 0:
                raise ValueError(
                    f"{end} gets no layers, which leaves it out, and an end of the model as well"
                )
        if self.first is not None and self.first == self.last:
            for name in self._needed - {self.first}:
                both = f"{self.first} holds both ends, so all of the model"
                raise ValueError(f"{both}, and {name} is to have layers")

    @property
    def _ends(self) -> set[str]:
        return {end for end in (self.first, self.last) if end is not None}

    @property
    def _needed(self) -> set[str]:
        """Devices that have to be in the plan."""
        return self._ends | {name for name, count in self.layers.items() if count}

    def check(self, model: ModelCosts, cluster: Cluster) -> None:
        """ValueError: a device or a unit that is not there, counts that cannot add up to the model's layers,
        or an order that contradicts."""
        named = self.exclude | self._ends | set(self.layers) | set(self.held)
        for name in [*sorted(named), *(self.order or ())]:
            cluster.device(name)
        for name, units in self.held.items():
            if not units <= set(range(len(model.units))):
                raise ValueError(f"{name} holds units that the model does not have: {max(units)}")
        layers, pinned = len(model.units) - 2, sum(self.layers.values())
        free = [d.name for d in cluster.devices if d.name not in self.exclude and d.name not in self.layers]
        if pinned > layers or (pinned < layers and not free):
            raise ValueError(f"the given layers add up to {pinned}, and the model has {layers}")
        if not any(self.allowed(device.name) and not device.beside for device in cluster.devices):
            raise ValueError("all devices are left out")
        if self.order is None:
            return
        place = {name: at for at, name in enumerate(self.order)}
        if not place or len(place) < len(self.order):
            raise ValueError(f"the order names {'a device twice' if place else 'no device'}")
        for name in sorted(self._needed):
            if name not in place:
                raise ValueError(f"{name} has to be in the plan, and the order leaves it out")
            for end, other in ((self.first, name), (name, self.last)):
                if end is not None and other is not None and place[end] > place[other]:
                    raise ValueError(f"{end} comes after {other} in the order, and has to come before it")

    def allowed(self, name: str) -> bool:
        """Whether a device may get anything."""
        return name not in self.exclude and self.layers.get(name) != 0

    def keeps_ends(self, stages: Sequence[Assignment]) -> bool:
        """Whether a chain begins and ends where it has to."""
        return self.first in (None, stages[0].device) and self.last in (None, stages[-1].device)

    def holds(self, name: str, first: int, last: int) -> bool:
        """Whether a device has the files of units [first, last)."""
        return name not in self.held or self.held[name].issuperset(range(first, last))


@dataclass(frozen=True)
class Question:
    """All that a plan is made from. ValueError: an unknown objective, or constraints that contradict the
    model or the cluster."""

    model: ModelCosts
    cluster: Cluster
    workload: Workload
    objective: Objective = "latency"
    constraints: Constraints = Constraints()

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; there are {', '.join(OBJECTIVES)}")
        self.constraints.check(self.model, self.cluster)
        last = self.constraints.last
        if last is not None and self.cluster.device(last).beside not in ("", self.constraints.first):
            raise ValueError(f"{last} can only be last where {self.cluster.device(last).beside} is first")

    def allowed(self, name: str) -> bool:
        """Whether a device may get anything: a second range only as the last stage."""
        beside = self.cluster.device(name).beside
        return self.constraints.allowed(name) and (not beside or name == self.constraints.last)

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """The devices to plan with, by index: all that are allowed, in the given order if there is one."""
        names = [device.name for device in self.cluster.devices]
        order = self.constraints.order or names
        return tuple(names.index(name) for name in order if self.allowed(name))

    @property
    def shares_calls(self) -> bool:
        """Whether several sequences decode at once, so that their rows share calls."""
        return self.objective == "throughput" and self.workload.streams > 1
