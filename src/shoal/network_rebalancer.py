"""Moves of layers while answers are computed, with the cost model of a NetworkPlanner."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import planner
from .cluster_view import cluster_of, home_of
from .net import rebalance
from .net.pace import slowed
from .net.placement import Links, NodeInfo, Outcome, Placement, Proposal, Usage
from .network_planner import NetworkPlanner, keeping
from .planner.copies import copies

_STREAMS_SECONDS = 10.0
"""For how long the place of an answer that has ended is kept for another."""


class NetworkRebalancer:
    """A net.placement.Rebalancer by the cost model of a NetworkPlanner, whose plans it changes. Layers that
    the user has given are left where they are."""

    def __init__(self, plans: NetworkPlanner) -> None:
        self._plans = plans
        self._memory = rebalance.Memory()
        self._streams = deque[tuple[float, int]]()

    def look(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement, usage: Usage, now: float
    ) -> Proposal | None:
        """A placement that pays, with the best groups of sequences and chunks of prompts for it; or None."""
        if self._plans.fixed:
            return None
        usage = self._steady(usage, now)
        cluster = cluster_of(nodes, links, offered=True)
        question = keeping(self._question(cluster, placement, usage, home_of(nodes)), nodes)
        slower = {node.label: node.slower for node in nodes}
        view = rebalance.View(question, slower, placement.stages, usage, now)
        self._memory, proposal = rebalance.look(self._memory, view)
        if proposal is None:
            return None
        changed = self._plans.placement(nodes, links, proposal.placement.stages, placement)
        return replace(proposal, placement=changed)

    def _steady(self, usage: Usage, now: float) -> Usage:
        """The usage with the most answers of the last seconds: another one may follow one that has ended.
        Tokens/s do not count until then."""
        self._streams.append((now, usage.streams))
        while now - self._streams[0][0] > _STREAMS_SECONDS:
            self._streams.popleft()
        most = max(streams for _, streams in self._streams)
        if usage.streams in (0, most):
            return usage
        return replace(usage, streams=most, reading=True)

    def happened(self, outcome: Outcome) -> None:
        """See net.placement.Rebalancer."""
        self._memory = rebalance.happened(self._memory, outcome)

    def copies(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement
    ) -> Mapping[str, tuple[int, ...]]:
        """See net.placement.Rebalancer."""
        if self._plans.fixed:
            return {}
        usage = Usage(self._plans.workload.streams)
        question = self._question(cluster_of(nodes, links), placement, usage, home_of(nodes))
        try:
            files = {node.label: node.held for node in nodes if node.held is not None}
            return copies(question, placement.stages, slowed, files)
        except ValueError:  # a node of the chain is leaving, or a link is not known
            return {}

    def _question(
        self, cluster: planner.Cluster, placement: Placement, usage: Usage, home: frozenset[str]
    ) -> planner.Question:
        """What the chain is used for, as a question. There is room for as many positions as were planned,
        which the answers share."""
        streams, planned = max(1, usage.streams), self._plans.workload
        context = max(1, usage.depth, (placement.context or planned.context) * planned.sequences // streams)
        load = planner.Workload(context, streams, streams=streams, depth=usage.depth)
        objective: planner.Objective = "throughput" if streams > 1 else "latency"
        kept, there = planner.Constraints(), {device.name for device in cluster.devices}
        if placement.private and any(not d.beside and d.name not in home for d in cluster.devices):
            first, last = placement.stages[0].device, placement.stages[-1].device
            if there.issuperset((first, last)):  # else one is leaving, and nothing will be proposed
                kept = planner.Constraints(first=first, last=last)
        return planner.Question(self._plans.costs, cluster, load, objective, kept)
