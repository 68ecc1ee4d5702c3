"""All plans for a few devices, by the cost model: every choice of devices, every order, every cut that fits.

For one stream each is evaluated; for several those of the best bound are (a plan gives no more than its
slowest place allows, nor more than `streams` times one round).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from shoal import planner
from shoal.planner import cost
from shoal.planner.cost import StageCost
from shoal.planner.streams import Follower

EVALUATED = 300
"""Plans for several streams that are evaluated in full."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and what it should give, tokens/s."""

    stages: tuple[planner.Assignment, ...]
    tokens_per_s: float

    @property
    def devices(self) -> frozenset[str]:
        """Who takes part."""
        return frozenset(stage.device for stage in self.stages)


def every(question: planner.Question) -> tuple[list[Candidate], int]:
    """Feasible plans, the best first, and how many there are in all. For several streams: the EVALUATED ones
    of the best bounds, and the best bound of each choice of devices."""
    found = [Candidate(stages, bound) for stages, bound in _bounded(question)]
    if question.objective == "latency":
        return sorted(found, key=lambda candidate: -candidate.tokens_per_s), len(found)
    most = heapq.nlargest(EVALUATED, found, key=lambda candidate: candidate.tokens_per_s)
    kept = {candidate.stages: candidate for candidate in [*most, *shapes(found)]}
    follower = Follower(question)
    exact = [Candidate(stages, planner.evaluate(question, stages, follower).tokens_per_s) for stages in kept]
    return sorted(exact, key=lambda candidate: -candidate.tokens_per_s), len(found)


def shapes(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best of each choice of devices, the best first."""
    best: dict[frozenset[str], Candidate] = {}
    for candidate in candidates:
        if candidate.devices not in best or candidate.tokens_per_s > best[candidate.devices].tokens_per_s:
            best[candidate.devices] = candidate
    return sorted(best.values(), key=lambda candidate: -candidate.tokens_per_s)


def _bounded(question: planner.Question) -> Iterator[tuple[tuple[planner.Assignment, ...], float]]:
    """Every feasible plan with its tokens/s (one stream) or a bound of it."""
    model, cluster, workload = question.model, question.cluster, question.workload
    units, streams = len(model.units), workload.streams if question.objective == "throughput" else 1
    many = streams > 1
    seconds, room = _tables(model, cluster, workload, many)
    names = [device.name for device in cluster.devices]
    for count in range(1, len(names) + 1):
        for order in permutations(names, count):
            for cuts in combinations(range(1, units), count - 1):
                edges = (0, *cuts, units)
                ranges = list(zip(order, edges, edges[1:], strict=False))
                if not all(room[part] for part in ranges):
                    continue
                stages = tuple(planner.Assignment(*part) for part in ranges)
                hops = cost.chain_hops(model, cluster, stages)
                took = [seconds[part] for part in ranges]
                round_s = sum(took) + sum(cost.hop_seconds(link, size) for link, size in hops)
                if not many:
                    yield stages, cost.per_second(round_s)
                    continue
                # A call that streams share reads the weights once: at best all of them share it.
                yield stages, min(streams / round_s, streams / max(took))


def _tables(
    model: planner.ModelCosts, cluster: planner.Cluster, workload: planner.Workload, many: bool
) -> tuple[dict[tuple[str, int, int], float], dict[tuple[str, int, int], bool]]:
    """Seconds of one row, and whether it fits, of every range on every device."""
    seconds: dict[tuple[str, int, int], float] = {}
    room: dict[tuple[str, int, int], bool] = {}
    held = cost.held_bytes(model, workload)
    for device in cluster.devices:
        for first in range(len(model.units)):
            for last in range(first + 1, len(model.units) + 1):
                key = (device.name, first, last)
                room[key] = device.base_bytes + held[first][last - first - 1] <= device.ram_bytes
                stage = StageCost(model, device, first, last)
                pause = 0.0 if many else stage.pause
                seconds[key] = stage.decode_seconds(1, workload.decode_depth) + pause
    return seconds, room
