"""The coordinator's interface to a planner: its arguments, the plan that it returns, and plans with given
cuts.

The coordinator calls a function to plan, so that this package needs no solver, and tests can use fixed plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..engine.errors import NoPlanError
from ..planner import Assignment, LinkSpeed
from ..planner.chunks import Chunking
from ..planner.groups import Grouping
from .messages import Offer, Stats
from .wire import max_step_rows

COORDINATOR = "coordinator"
"""The label of the coordinator in `Links`. No node has this label."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node that has joined: its label (unique, never COORDINATOR), the address on which it listens, its
    offer, and `slower`, the factor by which its steps now take longer than offered."""

    label: str
    host: str
    port: int
    offer: Offer
    slower: float = 1.0


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan: assignments to nodes by label, in the order of the chain, and the most prompt rows of a call. A
    call should take at most 100 ms by the profile, so that it does not delay other answers or a cancellation
    for longer. `groupings`: how 1, 2, 3 … sequences that decode share calls; if it is empty, there is a group
    for each stage. `chunks`: how prompts are cut; if it is empty, into chunks of `chunk_rows`. `window`: the
    most Steps of a session in flight; if it is 0, one for each stage and two for the links to the
    coordinator. Plans are compared by the tokens per second that they predict and the context length that
    they have room for (0: unknown). `detail` is the planner's own record of the plan."""

    stages: tuple[Assignment, ...]
    chunk_rows: int = 128
    groupings: tuple[Grouping, ...] = ()
    chunks: tuple[tuple[int, Chunking], ...] = ()
    window: int = 0
    tokens_per_s: float = 0.0
    context: int = 0
    detail: object = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class StageReport:
    """A stage of the chain: its units, the time and memory that loading took, and its work since."""

    node: str
    first: int
    last: int
    load_seconds: float
    ram_bytes: int
    stats: Stats


Links = Mapping[tuple[str, str], LinkSpeed]
Planner = Callable[[Sequence[NodeInfo], Links], Placement]
"""A function that makes a plan for the nodes that have joined. It is called in a worker thread. Links are
keyed by (from label, to label); those that could not be measured are missing. It raises NoPlanError if no
plan exists."""


def plan_at(edges: Sequence[int], chunk_rows: int = 128) -> Planner:
    """A Planner with given cuts: node i, in the order of the addresses, holds units [edges[i], edges[i +
    1])."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        if len(nodes) < len(edges) - 1:
            raise NoPlanError(
                f"the cuts {list(edges)} need {len(edges) - 1} nodes and there are {len(nodes)}: start more"
            )
        ranges = zip(nodes, edges, edges[1:], strict=False)
        return Placement(tuple(Assignment(n.label, first, last) for n, first, last in ranges), chunk_rows)

    return plan


def fit_chunk(placement: Placement, nodes: Sequence[NodeInfo], cut_cols: int) -> Placement:
    """The placement with chunks reduced to what every node accepts and a Step can carry."""
    limits = [node.offer.max_rows for node in nodes] + [max_step_rows(cut_cols)]
    return replace(placement, chunk_rows=min(placement.chunk_rows, *limits))
