"""What is explored: the size of a world, what happens in it, and its faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from shoal.net.messages import Offer
from shoal.net.placement import Placement
from shoal.planner import Assignment, Device

from .coordinator import Question

NUMBER = 99
NAMES = ("a", "b", "c", "d")
OFFER = Offer(Device("fake", 10**9, 1e9, 1e9), 8, 1, "fake", True)


Cut = tuple[tuple[int, int, int], ...]
"""A plan: the units [first, last) of each node, as (node, first, last)."""


@dataclass(frozen=True)
class Bound:
    """What is explored. `plans` are the cuts for sets of nodes; a set without an entry cannot hold the model.
    `moves` are cuts for all nodes, each of which is proposed once, at any time. `kinds` are the kinds of
    faults, of which `faults` happen. `returns`: whether a crashed node comes back: "may" (progress does not
    need it), "will", or "never". `leaves`: sessions that may be left at any time. `leaving`: nodes whose
    policy may ask at any time that they be emptied. `late`: so many of the last nodes are not known at first,
    and are added at some time, to a coordinator that stays.
    `share`: a session begins with what another one holds of its prompt. `penalised`: the tokens of answers
    depend on earlier ones, of which the last node is told. `kept_rows`: the positions of a
    session whose rows a stage keeps."""

    questions: tuple[tuple[Question, ...], ...]
    plans: dict[tuple[int, ...], Cut]
    nodes: int = 3
    units: int = 6
    moves: tuple[Cut, ...] = ()
    faults: int = 0
    kinds: frozenset[str] = frozenset()
    returns: str = "never"
    leaves: frozenset[int] = frozenset()
    leaving: tuple[int, ...] = ()
    late: int = 0
    window: int = 2
    rows: int = 2
    keep: bool = False
    share: bool = False
    penalised: bool = False
    quick: bool = True
    most_epochs: int = 12
    kept_rows: int = 0
    strategy: str = "move"
    reduce: bool = True


def placement(cut: Cut) -> Placement:
    """A plan from (node, first, last)."""
    stages = tuple(Assignment(NAMES[i], first, last) for i, first, last in cut)
    return Placement(stages, 8, tokens_per_s=10.0 * len(stages))


class Env(NamedTuple):
    """The rest: faults and moves that are left, requests for plans and measurements."""

    faults: int
    moves: int = 0
    plans: tuple[tuple[int, tuple[int, ...]], ...] = ()
    measuring: bool = False
