"""The coordinator's interface to a planner: its arguments, the plan that it returns, and plans with given
cuts.

The coordinator calls a function to plan, so that this package needs no solver, and tests can use fixed plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..engine.errors import NoPlanError
from ..planner import Assignment, LinkSpeed
from ..planner.chunks import Chunking
from ..planner.groups import Grouping
from .messages import Offer, Stats
from .packed import max_step_rows

COORDINATOR = "coordinator"
"""The label of the coordinator in `Links`. No node has this label."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node that has joined: its label (unique, never COORDINATOR), the address on which it listens, its
    offer, and `slower`, the factor by which its steps now take longer than offered, its rests included.
    `held`: the units whose files it holds, which alone can be assigned to it; None: all. `home`: it runs on
    the coordinator's own device."""

    label: str
    host: str
    port: int
    offer: Offer
    slower: float = 1.0
    held: frozenset[int] | None = None
    home: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan: assignments to nodes by label, in the order of the chain, and the most prompt rows of a call. A
    call should take at most 100 ms by the profile, so that it does not delay other answers or a cancellation
    for longer. `groupings`: how 1, 2, 3 … sequences that decode share calls; if it is empty, there is a group
    for each stage. `chunks`: how prompts are cut; if it is empty, into chunks of `chunk_rows`. `window`: the
    most Steps of a session in flight; if it is 0, one for each stage and two for the links to the
    coordinator. Plans are compared by the tokens per second that they predict and the context length that
    they have room for (0: unknown). `target`: the units that each node should hold on disk, for the best
    plan that does not depend on who holds what. `private`: both ends of the chain are on the coordinator's
    own device, and should stay there. `detail` is the planner's own record of the plan."""

    stages: tuple[Assignment, ...]
    chunk_rows: int = 128
    groupings: tuple[Grouping, ...] = ()
    chunks: tuple[tuple[int, Chunking], ...] = ()
    window: int = 0
    tokens_per_s: float = 0.0
    context: int = 0
    target: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    private: bool = False
    detail: object = field(default=None, compare=False)

    def moved(self, stages: Sequence[Assignment]) -> Placement:
        """Other stages instead."""
        ends = all(self.stages[i].device == stages[i].device for i in (0, -1))
        return replace(self, stages=tuple(stages), groupings=(), window=0, private=self.private and ends)


class FilesMissingError(NoPlanError):
    """There is no plan before nodes have fetched files. `target` as in Placement."""

    def __init__(self, text: str, target: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(text)
        self.target = target


@dataclass(frozen=True, slots=True)
class StageReport:
    """A stage of the chain: its units, the time and memory that loading took, and its work since."""

    node: str
    first: int
    last: int
    load_seconds: float
    ram_bytes: int
    stats: Stats


@dataclass(frozen=True, slots=True)
class Usage:
    """What a chain is used for at the moment, as the coordinator measures it. `streams` answers are being
    computed, at `depth` positions in the mean, and should need `remaining` more tokens in all
    (net/rebalance.expected_tokens). `tokens` is the number of tokens of all answers so far; it only grows.
    `positions`: those of all open sessions. `reading`: prompts are being computed, so that tokens/s say
    little. `waiting`: the share of the last seconds in which each stage did not compute, where it is known.
    `copies`: the units whose weights each node holds beside those of its stage."""

    streams: int = 0
    depth: int = 0
    remaining: float = 0.0
    tokens: int = 0
    positions: int = 0
    reading: bool = False
    waiting: Mapping[str, float] = field(default_factory=dict)
    copies: Mapping[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement that should be better than the one in force. `why` is a clause for the user. Predicted are
    the seconds of a token before and after, of all answers together; the seconds by which the change delays
    the answers; and the bytes of keys and values that travel."""

    placement: Placement
    why: str
    seconds_before: float
    seconds_after: float
    cost_s: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a proposal: whether it was `committed`; the seconds until it was committed or aborted,
    and for how many of them the answers stood still."""

    committed: bool
    seconds: float = 0.0
    standstill: float = 0.0


Links = Mapping[tuple[str, str], LinkSpeed]
Planner = Callable[[Sequence[NodeInfo], Links], Placement]
"""A function that makes a plan for the nodes that have joined. It is called in a worker thread. Links are
keyed by (from label, to label); those that could not be measured are missing. It raises NoPlanError if no
plan exists, and FilesMissingError if there is one once nodes have fetched files."""


class Rebalancer(Protocol):
    """Proposes changes of a placement while it is in use. One thread at a time calls it."""

    def look(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement, usage: Usage, now: float
    ) -> Proposal | None:
        """A better placement for these nodes, or None. It is called every half second while a chain is
        served and no change is under way, in a worker thread. `now` is in seconds of a clock that never goes
        back."""

    def happened(self, outcome: Outcome) -> None:
        """Notes what became of the last proposal. It must be called before the next `look`."""

    def copies(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement
    ) -> Mapping[str, tuple[int, ...]]:
        """The units whose weights each node should hold beside those of its stage, in the order of their use,
        whether or not it has their files yet."""


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
