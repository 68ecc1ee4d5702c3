"""Joins the network and the planner: plans for the nodes that a coordinator has found, reports in the plan's
terms."""

from __future__ import annotations

import platform
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import trio

from . import __version__, planner
from .answering import Put, Settings, most_tokens
from .engine.batcher import Report
from .engine.errors import ShoalError, ignore
from .engine.model_directory import Model
from .engine.stage import StageOptions
from .net import rebalance
from .net.coordinator import Coordinator, CoordinatorOptions
from .net.events import DEFAULT_TIMING
from .net.identity import Identity, identity_of, shape_of
from .net.members import Moves
from .net.moves import Move
from .net.pace import slowed
from .net.placement import (
    COORDINATOR,
    Links,
    NodeInfo,
    Outcome,
    Placement,
    Proposal,
    StageReport,
    Usage,
)
from .net.session import Session
from .net.survey import survey
from .plan_report import RunMeasurements
from .planner.chunks import chunkings, window
from .planner.copies import copies
from .planner.groups import groupings
from .planner.streams import Follower
from .planning import layer_constraints, plan_that_fits, planner_model
from .portal import Portal, open_portal

CALL_SECONDS = 0.1
"""Longest time that a call with rows of a prompt should take, since other sequences and a cancel wait for
it."""
_CHUNKS = (8, 256)
_STREAMS_SECONDS = 10.0
"""For how long the place of an answer that has ended is kept for another."""
_LAST_LINES_SECONDS = 1.0
"""How long the last sentences may take at the end."""


def coordinator_identity(model: Model) -> Identity:
    """The identity of this process as a coordinator, with a new incarnation each time, so that nodes never
    confuse two coordinators."""
    return identity_of(model, f"coordinator on {platform.node()}", secrets.randbits(64), __version__)


def cluster_of(nodes: Sequence[NodeInfo], links: Links, *, offered: bool = False) -> planner.Cluster:
    """The planner's view of the nodes that answered and of their links, by the latest measurements; with
    `offered`, of nodes as they were at the start."""
    devices = tuple(
        slowed(replace(node.offer.device, name=node.label), 1.0 if offered else node.slower) for node in nodes
    )
    there = {COORDINATOR, *(node.label for node in nodes)}
    return planner.Cluster(
        devices, {ends: link for ends, link in links.items() if there.issuperset(ends)}, COORDINATOR
    )


def survey_cluster(model: Model, addresses: Sequence[tuple[str, int]]) -> planner.Cluster:
    """Asks running nodes what they offer and measures their links. NetError: a node cannot be reached."""
    found = trio.run(partial(survey, addresses, coordinator_identity(model), shape_of(model)))
    return cluster_of(found.nodes, found.links)


def placement_of(question: planner.Question, stages: Sequence[planner.Assignment]) -> Placement:
    """These stages for the coordinator, with the best groups of sequences and chunks of prompts by the
    measurements in the question. ValueError: a link is not there."""
    way, load = Follower(question).way(stages), question.workload
    most = _chunk_rows(question, stages)
    return Placement(
        tuple(stages),
        most,
        groupings(way, load.decode_depth),
        chunkings(way, most, load.context),
        window(way),
    )


def _chunk_rows(question: planner.Question, stages: Sequence[planner.Assignment]) -> int:
    """The most rows that every stage computes within CALL_SECONDS."""
    rows = []
    for stage in stages:
        macs = sum(unit.macs for unit in question.model.units[stage.first : stage.last])
        rows.append(CALL_SECONDS * question.cluster.device(stage.device).macs_per_s / max(macs, 1))
    least, most = _CHUNKS
    return min(most, max(least, int(min(rows)) // 8 * 8))


class NetworkPlanner:
    """Plans for the nodes that are there, each time the coordinator asks; keeps the last plan for the report.
    With `shrink`, a context that does not fit is reduced to the largest that does: `workload` is what was
    planned for. `layers` is the number of layers on each node, in the nodes' order, which the chain keeps;
    without it the planner chooses.

    NoPlanError: the nodes cannot hold the model.
    """

    def __init__(
        self,
        model: Model,
        workload: planner.Workload,
        objective: planner.Objective = "latency",
        *,
        shrink: bool = False,
        layers: Sequence[int] = (),
    ) -> None:
        self.costs = planner_model(model, StageOptions())
        self._layers = layers
        self._asked, self._objective, self._shrink = workload, objective, shrink
        self.workload = workload
        self.plan: planner.Plan | None = None

    def __call__(self, nodes: Sequence[NodeInfo], links: Links) -> Placement:
        """The assignments of the best plan for these nodes, as net/placement.py needs them."""
        cluster = cluster_of(nodes, links)
        try:
            question = self._question(cluster, self._asked)
        except ValueError as error:  # the given layers are not those of the model
            raise ShoalError(str(error)) from error
        plan, self.workload = plan_that_fits(question, shrink=self._shrink)
        self.plan = plan
        return replace(
            placement_of(replace(question, workload=self.workload), plan.assignments),
            tokens_per_s=plan.tokens_per_s,
            context=self.workload.context,
            detail=plan,
        )

    @property
    def fixed(self) -> bool:
        """Whether the user has given the number of layers on each node."""
        return bool(self._layers)

    def placement(
        self, nodes: Sequence[NodeInfo], links: Links, stages: Sequence[planner.Assignment], before: Placement
    ) -> Placement:
        """Other stages for what was planned before, with predictions by the latest measurements. ValueError:
        a node or a link is missing."""
        question = self._question(cluster_of(nodes, links), self.workload)
        plan = replace(planner.evaluate(question, stages), method="moving layers")
        placed = placement_of(question, stages)
        return replace(placed, tokens_per_s=plan.tokens_per_s, context=before.context, detail=plan)

    def now(
        self,
        nodes: Sequence[NodeInfo],
        links: Links,
        workload: planner.Workload | None = None,
        *,
        plan: planner.Plan | None = None,
    ) -> planner.Plan:
        """The stages of a plan, or of the last one, predicted anew by the latest measurements of nodes and
        links, for another workload if one is given. ValueError: a link is missing."""
        plan = plan or self.plan
        assert plan is not None, "something was planned"
        question = self._question(cluster_of(nodes, links), workload or self.workload)
        found = planner.evaluate(question, plan.stages)
        return replace(found, method=plan.method, optimal=plan.optimal, reasons=plan.reasons)

    def _question(self, cluster: planner.Cluster, workload: planner.Workload) -> planner.Question:
        held = planner.Constraints()
        if self._layers:
            held = layer_constraints(self._layers, [device.name for device in cluster.devices])
        return planner.Question(self.costs, cluster, workload, self._objective, held)


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
        question = self._question(cluster_of(nodes, links, offered=True), placement, usage)
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
        question = self._question(cluster_of(nodes, links), placement, usage)
        try:
            return copies(question, placement.stages, slowed)
        except ValueError:  # a node of the chain is leaving, or a link is not known
            return {}

    def _question(self, cluster: planner.Cluster, placement: Placement, usage: Usage) -> planner.Question:
        """What the chain is used for, as a question. There is room for as many positions as were planned,
        which the answers share."""
        streams, planned = max(1, usage.streams), self._plans.workload
        context = max(1, usage.depth, (placement.context or planned.context) * planned.sequences // streams)
        load = planner.Workload(context, streams, streams=streams, depth=usage.depth)
        objective: planner.Objective = "throughput" if streams > 1 else "latency"
        return planner.Question(self._plans.costs, cluster, load, objective)


def measured_of(
    reports: Sequence[StageReport], tokens_per_s: float | None, alone: dict[str, float] | None = None
) -> RunMeasurements:
    """Measurements of a run, for the report beside the prediction."""
    return RunMeasurements(
        tokens_per_s=tokens_per_s,
        stage_seconds={
            r.node: r.stats.decode.seconds / r.stats.decode.steps for r in reports if r.stats.decode.steps
        },
        alone_tokens_per_s=alone or {},
    )


class NodeSession:
    """An answering.Session on nodes. `context()` is the context length of the plan in force, which may have
    become less since the session began: an answer ends there at the latest."""

    def __init__(self, portal: Portal[Coordinator], session: Session, context: Callable[[], int]) -> None:
        self._portal, self._session, self._context = portal, session, context

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, end: Collection[int]
    ) -> Generator[int, None, None]:
        """As answering.Session. ContextError: the nodes have no room for the prompt. NodeLostError: a node is
        lost, and the others cannot hold the model."""
        max_tokens = min(max_tokens, max(1, self._context() - len(prompt)))

        async def feed(put: Callable[[int], None]) -> None:
            async with self._session.answer(prompt, max_tokens=max_tokens, end=end) as tokens:
                async for token in tokens:
                    put(token)

        return self._portal.stream(feed)

    def close(self) -> None:
        """Frees the session's keys and values on all nodes."""
        self._portal.tell(self._session.close)


class Nodes:
    """A chain of nodes behind blocking calls. The network runs in an event loop in a thread of its own."""

    def __init__(self, portal: Portal[Coordinator], plans: NetworkPlanner) -> None:
        self._portal, self._plans = portal, plans

    @property
    def plan(self) -> planner.Plan:
        """The plan in force."""
        plan = self._portal.opened.placement.detail
        assert isinstance(plan, planner.Plan), "NetworkPlanner records its plans"
        return plan

    def moves(self) -> Sequence[Move]:
        """What became of the latest changes of the plan while answers were computed, the oldest first."""
        return tuple(self._portal.opened.moves)

    @property
    def context(self) -> int:
        """The context length of the plan, in tokens."""
        return self._portal.opened.placement.context

    def session(self, settings: Settings) -> NodeSession:
        """A new session on the nodes."""
        coordinator = self._portal.opened
        session = coordinator.session(settings.sampling, context=settings.context)
        return NodeSession(self._portal, session, lambda: self.context)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Callable[[], None]:
        """See answering.Engine."""
        if report is not None:
            raise ShoalError(
                "nodes do not send log-probabilities yet: leave logprobs out, or answer in this process"
            )

        async def feed(give: Callable[[int], None]) -> None:
            answer = self._portal.opened.generate(
                prompt,
                settings.sampling,
                max_tokens=most_tokens(prompt, settings),
                end=settings.end,
                context=settings.context,
            )
            async with answer as tokens:
                async for token in tokens:
                    give(token)

        return self._portal.start(feed, put)

    def stats(self) -> tuple[Sequence[StageReport], planner.Plan]:
        """Measurements of each stage, and the plan's prediction by the latest measurements of nodes and
        links. NodeLostError: a node was lost meanwhile."""

        async def ask() -> tuple[Sequence[StageReport], planner.Plan]:
            coordinator = self._portal.opened
            now = self._plans.now(coordinator.nodes, coordinator.links, plan=self.plan)
            return await coordinator.stats(), now

        return self._portal.call(ask)


@contextmanager
def open_nodes(
    model: Model,
    addresses: Sequence[tuple[str, int]],
    workload: planner.Workload,
    *,
    shrink: bool = False,
    wait: float = DEFAULT_TIMING.patience,
    moves: Moves = "move",
    log: Callable[[str], object] = ignore,
) -> Iterator[Nodes]:
    """A chain of nodes that run the model; `shrink` as for NetworkPlanner. Lost nodes that the model needs
    are waited for, at most `wait` seconds. `moves`: how the plan changes while answers are computed
    (net.members.Moves). `log` is called with sentences about nodes that are lost or come
    back, in a thread of its own. NoPlanError: the nodes cannot hold the model. NetError: a node cannot be
    reached."""
    plans = NetworkPlanner(model, workload, shrink=shrink)
    with in_order(log) as say:
        options = CoordinatorOptions(
            timing=replace(DEFAULT_TIMING, patience=wait),
            moves=moves,
            rebalancer=None if moves == "off" else NetworkRebalancer(plans),
            log=say,
        )
        who, shape = coordinator_identity(model), shape_of(model)
        opening = partial(Coordinator.open, addresses, who, shape, plans, options)
        with open_portal(opening) as portal:
            yield Nodes(portal, plans)


@contextmanager
def in_order(log: Callable[[str], object]) -> Iterator[Callable[[str], None]]:
    """Calls `log` in a thread of its own, since it may block and the network must not: a terminal that is
    stopped accepts no more text."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def call() -> None:
        while (line := lines.get()) is not None:
            log(line)

    thread = threading.Thread(target=call, name="shoal messages", daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join(_LAST_LINES_SECONDS)
