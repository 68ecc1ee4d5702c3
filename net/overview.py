"""What a coordinator knows at one moment of its nodes, links and answers, for a report (`shoal top`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..planner import LinkSpeed
from .holding import FetchReport
from .members import ClusterState
from .moves import Move


@dataclass(frozen=True, slots=True)
class NodeOverview:
    """A member of the cluster: the share of the last seconds in which its stage did not compute, the bytes
    that its process had when its stage was loaded, where these are known; and the units whose weights it
    holds beside those of its stage."""

    waiting: float | None
    ram_bytes: int | None
    copies: frozenset[int]


@dataclass(frozen=True, slots=True)
class Overview:
    """A coordinator. `nodes` are in the order of the members. `tokens` have been made of all answers so far,
    `tokens_per_s` in the last three seconds, None if no results were due in them; `running` answers have
    their place in the chain, `queued` ones wait for it. `fetches` says how far nodes are with the files that
    they should hold."""

    state: ClusterState
    nodes: tuple[NodeOverview, ...]
    links: Mapping[tuple[str, str], LinkSpeed]
    tokens: int
    tokens_per_s: float | None
    running: int
    queued: int
    recoveries: int
    moves: tuple[Move, ...]
    fetches: tuple[FetchReport, ...]
