"""Who holds what: the question that a plan answers, the answer, and a plan made by hand.

The coordinator is given a plan as a callable, so that this package needs no planner and tests need no solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..engine.errors import NoPlanError
from ..planner import Assignment, LinkSpeed
from .messages import Offer, Stats
from .wire import max_step_rows

COORDINATOR = "coordinator"
"""The coordinator's own label among the nodes' labels: no node has it."""


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
    """A plan: assignments to nodes by label, in the chain's order, and the most prompt rows of one call. A
    call ought to last no longer than 100 ms by profile, so that other answers, and the end of this one, get
    their turn."""

    stages: tuple[Assignment, ...]
    chunk_rows: int = 128


@dataclass(frozen=True, slots=True)
class StageReport:
    """A stage of the chain: what it holds, how long it took to load, and its work since."""

    node: str
    first: int
    last: int
    load_seconds: float
    ram_bytes: int
    stats: Stats


Links = Mapping[tuple[str, str], LinkSpeed]
Planner = Callable[[Sequence[NodeInfo], Links], Placement]
"""Chooses a placement for the nodes that are there, called in a worker thread; links go from label to label,
one missing where it could not be measured. Raises NoPlanError if there is none."""


def plan_at(edges: Sequence[int], chunk_rows: int = 128) -> Planner:
    """A plan with given cuts: node i, in the order of the addresses, holds units [edges[i], edges[i + 1])."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        if len(nodes) < len(edges) - 1:
            raise NoPlanError(
                f"the cuts {list(edges)} need {len(edges) - 1} nodes, and there are {len(nodes)}"
            )
        ranges = zip(nodes, edges, edges[1:], strict=False)
        return Placement(tuple(Assignment(n.label, first, last) for n, first, last in ranges), chunk_rows)

    return plan


def fit_chunk(placement: Placement, nodes: Sequence[NodeInfo], cut_cols: int) -> Placement:
    """The placement with chunks that every node takes and every frame carries."""
    limits = [node.offer.max_rows for node in nodes] + [max_step_rows(cut_cols)]
    return replace(placement, chunk_rows=min(placement.chunk_rows, *limits))
