"""Plans: who holds what, and the figures of given stages, straight from the cost model, whoever chose
them."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import cost
from .rows import Assignment, Objective, Question
from .streams import Follower


@dataclass(frozen=True, slots=True)
class Hop:
    """A message between two nodes of a chain."""

    seconds: float
    busy_seconds: float  # how long the link itself is taken
    bytes: int  # a token


@dataclass(frozen=True, slots=True)
class PlannedStage(Assignment):
    """An assignment with its figures; `hop` leads to it from the node before."""

    seconds: float
    ram_bytes: int
    cap_bytes: int
    hop: Hop


@dataclass(frozen=True, slots=True)
class Alone:
    """What one device would do with the whole model: its tokens/s whether or not it fits (None: no way to the
    coordinator), and the bytes it lacks to hold it."""

    device: str
    tokens_per_s: float | None
    ram_bytes: int
    missing_bytes: int

    @property
    def possible(self) -> bool:
        """The device reaches the coordinator and holds the model under its cap."""
        return self.tokens_per_s is not None and self.missing_bytes == 0


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a device is in the plan or out of it, in words."""

    device: str
    used: bool
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Who holds what, and what that should give. Times of stages and hops are of one decode call, which has a
    row of each of `batch` sequences; `back` is the hop from the last stage to the coordinator. `step_seconds`
    is seconds a token: of several sequences what following them gives, else one lap of one sequence."""

    objective: Objective
    streams: int
    units: int
    stages: tuple[PlannedStage, ...]
    back: Hop
    step_seconds: float
    tokens_per_s: float  # of all sequences together for throughput, else of one
    first_token_seconds: float  # from the prompt's arrival to its first token
    alone: tuple[Alone, ...]
    reasons: tuple[Reason, ...] = ()
    method: str = "given stages"  # how it was found, in words
    optimal: bool = False  # proved best over all orders and cuts (of those allowed)
    batch: int = 1  # sequences that share a call where most do, in the mean
    ends: str = ""  # whether both ends of the model are at home, and what that costs, in words

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """The stages without their figures."""
        return tuple(Assignment(stage.device, stage.first, stage.last) for stage in self.stages)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Coordinator to first, between neighbours, last to coordinator."""
        return (*(stage.hop for stage in self.stages), self.back)

    @property
    def best_alone(self) -> Alone | None:
        """The fastest device that could do it all by itself under its cap."""
        able = [alone for alone in self.alone if alone.possible]
        return max(able, key=lambda alone: alone.tokens_per_s or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No plan exists. `missing_bytes`: the least RAM that the caps lack in total, zero when RAM is not what
    is missing; `exact` when no smaller amount would do. `files`: what is missing are files of units, on
    devices that have room for them."""

    missing_bytes: int
    reason: str
    exact: bool = True
    files: bool = False


def check_stages(question: Question, stages: Sequence[Assignment]) -> None:
    """ValueError: stages that do not cover the units in order, that name an unknown device or one twice."""
    edges, units = [0, *(stage.last for stage in stages)], len(question.model.units)
    if not stages or [stage.first for stage in stages] != edges[:-1] or edges[-1] != units:
        raise ValueError(f"the stages must cover units 0 to {units} in order, without gap or overlap")
    names = [stage.device for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError("a device may have one stage only")
    for name in names:
        question.cluster.device(name)


def _timing(
    question: Question, stages: Sequence[Assignment], follower: Follower
) -> tuple[float, int, list[float], list[Hop]]:
    """Seconds of a token; and of one decode call along the chain, its rows, each stage's seconds and each
    hop. ValueError: a link is not there."""
    links = cost.chain_hops(question.model, question.cluster, stages)
    shared, batch = follower.grouped(stages) if question.shares_calls else (None, 1)
    alone = len(stages) == 1 and not any(cost.hop_seconds(link, size) for link, size in links)
    pauses, depth = shared is None and not alone, question.workload.decode_depth
    costs = [follower.cost(stage) for stage in stages]
    seconds = [one.decode_seconds(batch, depth) + (one.pause if pauses else 0.0) for one in costs]
    hops = [
        Hop(cost.hop_seconds(link, size * batch), cost.link_busy_seconds(link, size * batch), size)
        for link, size in links
    ]
    lap = sum(seconds) + sum(hop.seconds for hop in hops)
    return (lap if shared is None else shared), batch, seconds, hops


def token_seconds(question: Question, stages: Sequence[Assignment], follower: Follower) -> float:
    """What the question's objective makes least: seconds of a token on such stages, or until the first one.
    ValueError: a link is not there."""
    if question.objective == "first_token":
        return follower.first_token(stages)
    return _timing(question, stages, follower)[0]


def evaluate(question: Question, stages: Sequence[Assignment], follower: Follower | None = None) -> Plan:
    """What given stages would do, whether or not they fit the caps: for a split made by hand or an equal one.
    `follower`: one of the same question, which keeps what it computed. ValueError: as for check_stages, or a
    link is not there."""
    check_stages(question, stages)
    model, cluster, load = question.model, question.cluster, question.workload
    follower = follower or Follower(question)
    token, batch, seconds, hops = _timing(question, stages, follower)

    def planned(stage: Assignment, seconds: float, hop: Hop) -> PlannedStage:
        device = cluster.device(stage.device)
        ram = cost.range_ram_bytes(model, device, load, stage.first, stage.last)
        return PlannedStage(stage.device, stage.first, stage.last, seconds, ram, device.ram_bytes, hop)

    return Plan(
        objective=question.objective,
        streams=load.streams,
        units=len(model.units),
        stages=tuple(map(planned, stages, seconds, hops)),
        back=hops[-1],
        step_seconds=token,
        tokens_per_s=cost.per_second(token),
        first_token_seconds=follower.first_token(stages),
        alone=tuple(_alone(question, one.name, follower) for one in cluster.devices if not one.beside),
        batch=batch,
    )


def _alone(question: Question, name: str, follower: Follower) -> Alone:
    """What one device would do with the whole model."""
    model, device, units = question.model, question.cluster.device(name), len(question.model.units)
    ram = cost.range_ram_bytes(model, device, question.workload, 0, units)
    missing = max(0, ram - device.ram_bytes)
    try:
        token = _timing(question, [Assignment(name, 0, units)], follower)[0]
    except ValueError:  # no way from the coordinator or back
        return Alone(name, None, ram, missing)
    return Alone(name, cost.per_second(token), ram, missing)
