"""Plans for the nodes of a coordinator, with the cost model of `planner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import planner
from .cluster_view import cluster_of, held_of, home_of
from .engine.errors import NoPlanError, ShoalError
from .engine.model_directory import Model
from .engine.stage import StageOptions
from .net.placement import FilesMissingError, Links, NodeInfo, Placement
from .planner.chunks import chunkings, window
from .planner.groups import groupings
from .planner.home import at_home
from .planner.pressed import Pressed, pressed
from .planner.streams import Follower
from .planning import layer_constraints, planner_model
from .private import Private, plan_ends

CALL_SECONDS = 0.1
"""Longest time that a call with rows of a prompt should take, since other sequences and a cancel wait for
it."""
CLEARLY = 1.1
"""Files are fetched for a plan that is better by more than this factor."""
_CHUNKS = (8, 256)


def placement_of(question: planner.Question, stages: Sequence[planner.Assignment]) -> Placement:
    """These stages for the coordinator, with the best groups of sequences and chunks of prompts by the
    measurements in the question. ValueError: a link is not there."""
    way, load = Follower(question).on_machines(stages), question.workload
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


def keeping(question: planner.Question, nodes: Sequence[NodeInfo]) -> planner.Question:
    """The question, where nodes may only get units whose files they hold."""
    there = {device.name for device in question.cluster.devices}
    held = held_of([node for node in nodes if node.label in there], len(question.model.units))
    return replace(question, constraints=replace(question.constraints, held=held))


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
        limited = keeping(question, nodes)
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

    def beside(self, nodes: Sequence[NodeInfo], links: Links, tokens: int) -> Pressed:
        """What the concurrent sequences of the last plan and a prompt of so many tokens take together, by the
        latest measurements. ValueError: a link is missing."""
        assert self.plan is not None, "something was planned"
        question, load = self._question(cluster_of(nodes, links), self.workload), self.workload
        way = Follower(question).way(self.plan.assignments)
        return pressed(way, load.streams, tokens, load.decode_depth)

    def _question(self, cluster: planner.Cluster, workload: planner.Workload) -> planner.Question:
        held = planner.Constraints()
        if self._layers:
            held = layer_constraints(self._layers, cluster)
        return planner.Question(self.costs, cluster, workload, self._objective, held)
