"""Joins the network and the planner: plans for the nodes that a coordinator has found, reports in the plan's
terms."""

from __future__ import annotations

import platform
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import trio

from . import __version__, house, planner
from .answering import Put, Settings, Stop, most_tokens
from .engine.batch import ReadRequest, Result
from .engine.batcher import PutResult
from .engine.errors import NoPlanError, ShoalError, ignore
from .engine.generate import check_text
from .engine.model_directory import Model
from .engine.roster import Report
from .engine.stage import StageOptions
from .net import rebalance
from .net.coordinator import Coordinator, CoordinatorOptions
from .net.identity import Identity, identity_of, shape_of
from .net.liveness import DEFAULT_TIMING
from .net.members import Moves
from .net.moves import Move
from .net.pace import slowed
from .net.placement import (
    COORDINATOR,
    FilesMissingError,
    Links,
    NodeInfo,
    Outcome,
    Placement,
    Proposal,
    StageReport,
    Usage,
)
from .net.session import Answer, Session
from .net.survey import survey
from .plan_report import RunMeasurements
from .planner.chunks import chunkings, window
from .planner.copies import copies
from .planner.groups import groupings
from .planner.home import at_home
from .planner.streams import Follower
from .planning import layer_constraints, planner_model, runs_layers
from .portal import Portal, open_portal
from .private import Private, plan_ends
from .reporting import StepTimes, status_of
from .status import Status

CALL_SECONDS = 0.1
"""Longest time that a call with rows of a prompt should take, since other sequences and a cancel wait for
it."""
CLEARLY = 1.1
"""Files are fetched for a plan that is better by more than this factor."""
STATS_SECONDS = 1.0
"""How long stages are asked for their measurements."""
_CHUNKS = (8, 256)
_STREAMS_SECONDS = 10.0
"""For how long the place of an answer that has ended is kept for another."""
_LAST_LINES_SECONDS = 1.0
"""How long the last sentences may take at the end."""


def coordinator_identity(model: Model, *, insecure: bool = False) -> Identity:
    """The identity of this process as a coordinator, with a new incarnation each time, so that nodes never
    confuse two coordinators. It is of the house of this device, if there is one; `insecure`: in any case
    without TLS."""
    own = None if insecure else house.trust()
    return identity_of(model, f"coordinator on {platform.node()}", __version__, own)


def cluster_of(nodes: Sequence[NodeInfo], links: Links, *, offered: bool = False) -> planner.Cluster:
    """The planner's view of the nodes that answered and of their links, by the latest measurements; with
    `offered`, of nodes as they were at the start. Nodes that run no layers are none of it, nor second ranges
    without the first. NoPlanError: there is no other."""
    nodes = [node for node in nodes if runs_layers(node.offer.device)]
    pairs = [(node, _first_of(node, nodes)) for node in nodes]
    devices = tuple(
        slowed(
            replace(node.offer.device, name=node.label, beside="" if first is None else first.label),
            1.0 if offered else node.slower,
        )
        for node, first in pairs
        if first is not None or not node.offer.device.beside
    )
    if not devices:
        raise NoPlanError("No plan: there is no device yet that runs layers.")
    there = {COORDINATOR, *(device.name for device in devices)}
    return planner.Cluster(
        devices, {ends: link for ends, link in links.items() if there.issuperset(ends)}, COORDINATOR
    )


def _first_of(node: NodeInfo, nodes: Sequence[NodeInfo]) -> NodeInfo | None:
    """The node whose second range a node is, on the same device; None: it is none, or that node is not
    there. What a node says of itself makes it no part of another device."""
    where = node.host, node.home, node.offer.device.beside
    firsts = (one for one in nodes if not one.offer.device.beside)
    return next((one for one in firsts if (one.host, one.home, one.offer.device.name) == where), None)


def home_of(nodes: Sequence[NodeInfo]) -> frozenset[str]:
    """The labels of the nodes on this device, without second ranges (planner/home.py)."""
    return frozenset(node.label for node in nodes if node.home and not node.offer.device.beside)


def survey_cluster(
    model: Model, addresses: Sequence[tuple[str, int]], *, insecure: bool = False
) -> planner.Cluster:
    """Asks running nodes what they offer and measures their links; `insecure` as for coordinator_identity.
    NetError: a node cannot be reached."""
    return cluster_of(*_surveyed(model, addresses, insecure=insecure))


def survey_home(
    model: Model, addresses: Sequence[tuple[str, int]], *, insecure: bool = False
) -> tuple[planner.Cluster, frozenset[str], Mapping[str, frozenset[int]]]:
    """As survey_cluster, which of the nodes are on this device, and the units whose files nodes hold, where
    these are not all."""
    nodes, links = _surveyed(model, addresses, insecure=insecure)
    return cluster_of(nodes, links), home_of(nodes), _held(nodes, model.n_units)


def _surveyed(
    model: Model, addresses: Sequence[tuple[str, int]], *, insecure: bool
) -> tuple[Sequence[NodeInfo], Links]:
    who = coordinator_identity(model, insecure=insecure)
    found = trio.run(partial(survey, addresses, who, shape_of(model)))
    return found.nodes, found.links


def _held(nodes: Sequence[NodeInfo], units: int) -> dict[str, frozenset[int]]:
    return {node.label: node.held for node in nodes if node.held is not None and len(node.held) < units}


def _keeping(question: planner.Question, nodes: Sequence[NodeInfo]) -> planner.Question:
    """The question, where nodes may only get units whose files they hold."""
    units = len(question.model.units)
    there = {device.name for device in question.cluster.devices}
    held = {
        node.label: node.held
        for node in nodes
        if node.label in there and node.held is not None and len(node.held) < units
    }
    return replace(question, constraints=replace(question.constraints, held=held))


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


def _is_near(
    question: planner.Question,
    stages: Sequence[planner.Assignment],
    best: planner.Plan,
    home: frozenset[str] | None,
) -> bool:
    """Whether some stages have room and are nearly as good as the best plan, with their ends at `home`."""
    try:
        found = planner.evaluate(question, stages)
    except ValueError:  # a node or a link is not there, or there are no stages
        return False
    if home is not None and not at_home(question.cluster, stages, home):
        return False
    fits = all(stage.ram_bytes <= stage.cap_bytes for stage in found.stages)
    return fits and found.step_seconds <= CLEARLY * best.step_seconds


class NetworkPlanner:
    """Plans for the nodes that are there, each time the coordinator asks; keeps the last plan for the report.
    Where nodes do not hold all files, a plan that does not depend on this is the target for which they fetch
    some, and the plan in force is the best that keeps to what they hold. A target that is nearly the best
    stays as it is, and where the plan in force is nearly the best it is the target, too: so nothing is
    fetched for small changes of measurements, or because the house has begun again.

    With `shrink`, a context that does not fit is reduced to the largest that does: `workload` is what was
    planned for. `layers` is the number of layers on each node, in the nodes' order, which the chain keeps;
    without it the planner chooses. `private` says whether both ends are to be on nodes of this device; a
    placement whose ends are there is private, and stays so while layers move. `explain`: plans come with
    reasons, for a report.

    NoPlanError: the nodes cannot hold the model. FilesMissingError: not before they have fetched files.
    """

    def __init__(
        self,
        model: Model,
        workload: planner.Workload,
        objective: planner.Objective = "latency",
        *,
        shrink: bool = False,
        layers: Sequence[int] = (),
        explain: bool = True,
        private: Private = "auto",
    ) -> None:
        self.model, self.costs = model, planner_model(model, StageOptions())
        self._layers, self._explain, self._private = layers, explain, private
        self._asked, self._objective, self._shrink = workload, objective, shrink
        self.workload = workload
        self.plan: planner.Plan | None = None
        self._target: Sequence[planner.Assignment] = ()

    def __call__(self, nodes: Sequence[NodeInfo], links: Links) -> Placement:
        """The assignments of the best plan for these nodes, as net/placement.py needs them."""
        cluster, home = cluster_of(nodes, links), home_of(nodes)
        try:
            question = self._question(cluster, self._asked)
        except ValueError as error:  # the given layers are not those of the model
            raise ShoalError(str(error)) from error
        limited = _keeping(question, nodes)
        try:
            plan, self.workload = plan_ends(
                limited, home, self._private, shrink=self._shrink, explain=self._explain
            )
        except NoPlanError as error:
            if limited == question:
                raise
            raise FilesMissingError(str(error), self._target_of(question, home, ())) from None
        target = {} if limited == question else self._target_of(question, home, plan.assignments)
        self.plan = plan
        return replace(
            placement_of(replace(question, workload=self.workload), plan.assignments),
            tokens_per_s=plan.tokens_per_s,
            context=self.workload.context,
            target=target,
            private=self._private != "never" and at_home(cluster, plan.stages, home),
            detail=plan,
        )

    def _target_of(
        self, question: planner.Question, home: frozenset[str], stages: Sequence[planner.Assignment]
    ) -> Mapping[str, tuple[int, ...]]:
        """The units that each node should hold, if `stages` are the best with those that they hold now.
        NoPlanError: whatever they hold, there is no plan."""
        best, workload = plan_ends(question, home, self._private, shrink=self._shrink, explain=False)
        question = replace(question, workload=workload)
        ends = home if self._private != "never" and at_home(question.cluster, best.stages, home) else None
        near = (kept for kept in (self._target, stages) if _is_near(question, kept, best, ends))
        self._target = next(near, best.assignments)
        return {stage.device: tuple(range(stage.first, stage.last)) for stage in self._target}

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
        ends = before.detail.ends if isinstance(before.detail, planner.Plan) and before.private else ""
        plan = replace(planner.evaluate(question, stages), method="moving layers", ends=ends)
        placed = placement_of(question, stages)
        return replace(
            placed,
            tokens_per_s=plan.tokens_per_s,
            context=before.context,
            private=before.private,
            detail=plan,
        )

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
        return replace(found, method=plan.method, optimal=plan.optimal, reasons=plan.reasons, ends=plan.ends)

    def _question(self, cluster: planner.Cluster, workload: planner.Workload) -> planner.Question:
        held = planner.Constraints()
        if self._layers:
            held = layer_constraints(self._layers, cluster)
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
        cluster = cluster_of(nodes, links, offered=True)
        question = _keeping(self._question(cluster, placement, usage, home_of(nodes)), nodes)
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


def _room(context: int, prompt: Sequence[int]) -> int:
    """The most tokens that an answer may have in the context of the plan in force."""
    return max(1, context - len(prompt))


async def _planned(coordinator: Coordinator) -> None:
    """Waits for the first plan, which has the context length."""
    if not coordinator.placement.stages:
        await coordinator.chain()


class NodeSession:
    """An answering.Session on nodes. `context()` is the context length of the plan in force, which may have
    become less since the session began: an answer ends there at the latest."""

    def __init__(self, portal: Portal[Coordinator], session: Session, context: Callable[[], int]) -> None:
        self._portal, self._session, self._context = portal, session, context
        self._scope = trio.CancelScope()

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Generator[int, None, None]:
        """As answering.Session. ContextError: the nodes have no room for the prompt. NodeLostError: a node is
        lost, and the others cannot hold the model."""
        self._scope = scope = trio.CancelScope()

        async def feed(put: Callable[[int], None]) -> None:
            with scope:
                await _planned(self._portal.opened)
                most = min(max_tokens, _room(self._context(), prompt))
                async with self._session.answer(prompt, max_tokens=most, end=end) as tokens:
                    async for token in tokens:
                        if report is not None:
                            report.cached = tokens.cached
                        put(token)

        return self._portal.stream(feed)

    def stop(self) -> None:
        """Ends the answer under way, if there is one; in any thread."""
        self._portal.tell(self._scope.cancel)

    def close(self) -> None:
        """Frees the session's keys and values on all nodes."""
        self._portal.tell(self._session.close)


class Nodes:
    """A chain of nodes behind blocking calls. The network runs in an event loop in a thread of its own."""

    def __init__(self, portal: Portal[Coordinator], plans: NetworkPlanner) -> None:
        self._portal, self._plans, self._times = portal, plans, StepTimes()

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
        session = coordinator.session(settings.sampling, context=settings.context, allow=settings.allow)
        return NodeSession(self._portal, session, lambda: self.context)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Stop:
        """See answering.Engine."""

        begun: list[Answer] = []

        async def feed(give: Callable[[int], None]) -> None:
            await _planned(self._portal.opened)
            answer = self._portal.opened.generate(
                prompt,
                settings.sampling,
                max_tokens=min(most_tokens(prompt, settings), _room(self.context, prompt)),
                end=settings.end,
                context=settings.context,
                report=None if report is None else report.count,
                allow=settings.allow,
            )
            async with answer as tokens:
                begun.append(tokens)
                async for token in tokens:
                    if report is not None:
                        report.cached = tokens.cached
                        report.found.extend(tokens.logprobs)
                    give(token)

        return partial(self._end, self._portal.start(feed, put), begun)

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """See answering.Engine."""
        check_text(request.tokens, request.context)

        async def feed(give: Callable[[Result], None]) -> None:
            async with self._portal.opened.read(request) as results:
                async for result in results:
                    give(result)

        return partial(self._end, self._portal.start(feed, put), ())

    def _end(
        self, stop: partial[None], begun: Sequence[Answer], *, wait: bool = True, keep: bool = False
    ) -> None:
        """See answering.Stop."""

        def rest() -> None:
            for answer in begun:
                answer.rest()

        if keep:
            self._portal.tell(rest)
        stop(wait=wait)

    def status(self) -> Status:
        """What is known at the moment of nodes, links and answers. Measurements of stages that do not answer
        soon are left out."""
        return self._portal.call(self._status)

    async def _status(self) -> Status:
        coordinator, reports = self._portal.opened, tuple[StageReport, ...]()
        with trio.move_on_after(STATS_SECONDS), suppress(ShoalError):
            reports = await coordinator.stats()
        overview, plan = coordinator.overview(), coordinator.placement.detail
        if isinstance(plan, planner.Plan):
            with suppress(ValueError):  # a node of the plan is lost: it is as it was predicted
                now = partial(self._plans.now, coordinator.nodes, overview.links, plan=plan)
                plan = await trio.to_thread.run_sync(now)
        known = plan if isinstance(plan, planner.Plan) else None
        return status_of(self._plans.model, overview, known, self._times.look(reports))

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
    share_prefixes: bool = True,
    insecure: bool = False,
    private: Private = "auto",
    log: Callable[[str], object] = ignore,
) -> Iterator[Nodes]:
    """A chain of nodes that run the model; `shrink` as for NetworkPlanner. Lost nodes that the model needs
    are waited for, at most `wait` seconds. `moves`: how the plan changes while answers are computed
    (net.members.Moves). `share_prefixes` is as in CoordinatorOptions, `insecure` as for coordinator_identity,
    `private` as for NetworkPlanner.
    `log` is called with sentences about nodes that are lost or come back, in a thread of its own.
    NoPlanError: the nodes cannot hold the model.
    NetError: a node cannot be reached."""
    plans = NetworkPlanner(model, workload, shrink=shrink, private=private)
    with in_order(log) as say:
        options = CoordinatorOptions(
            timing=replace(DEFAULT_TIMING, patience=wait),
            moves=moves,
            share_prefixes=share_prefixes,
            rebalancer=None if moves == "off" else NetworkRebalancer(plans),
            log=say,
        )
        who, shape = coordinator_identity(model, insecure=insecure), shape_of(model)
        opening = partial(Coordinator.open, addresses, who, shape, plans, options)
        with open_portal(opening) as portal:
            yield Nodes(portal, plans)


@contextmanager
def in_order(log: Callable[[str], object]) -> Iterator[Callable[[str], None]]:
    """Calls `log` in a thread of its own, since it may block and the network must not: a terminal that is
    stopped accepts no more text. What cannot be written, as on a full disk, is lost."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def call() -> None:
        while (line := lines.get()) is not None:
            with suppress(OSError):
                log(line)

    thread = threading.Thread(target=call, name="shoal messages", daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join(_LAST_LINES_SECONDS)
