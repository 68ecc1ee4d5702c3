"""The partial-order reduction: steps that may be taken before all others.

If no step that can happen before a step depends on it, then every run has an equal one that begins with it,
and only this step need be followed (a persistent set of one step). The graph of steps without faults has no
cycle, which the search checks, so no step is put off for ever. The reduction is compared with the whole graph
where that is small enough (test_explorer.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.net import stage_state as node_state
from shoal.net.members import ClusterState
from shoal.net.messages import Assign, Broken, Loaded, Open, Prepared, Step

from .coordinator import Front
from .search import State
from .stage import COORDINATOR, Node

if TYPE_CHECKING:
    from .world import Distributed


def first(model: Distributed, state: State) -> Any:
    """The action of such a step, or None."""
    action = _outdated(model, state)
    return _alone(model, state) if action is None and calm(model, state) else action


def _outdated(model: Distributed, state: State) -> Any:
    """A message of an epoch that is over for its receiver: it is dropped whenever it is read, and no fault
    changes that."""
    value, n = model.values, model.bound.nodes
    known: ClusterState = value[state[model.CLUSTER]]
    line = value[state[model.FRONT]].line
    for i in range(n):
        reports, results = value[state[model.reports + i]], value[state[model.results + i]]
        if reports and value[reports[0]].epoch < known.epoch and not isinstance(value[reports[0]], Loaded):
            return ("hear", i)
        if results and line is not None and value[results[0]].epoch < line.flow.epoch:
            return ("result", i)
    for wire, _, queue in value[state[model.WIRES]]:
        if queue and wire[0] == "step":
            node: Node = value[state[model.FIXED + wire[2]]]
            force = node.state.force
            if node.up and force is not None and value[queue[0]][0].epoch < force.assign.epoch:
                return ("wire", wire)
    return None


def calm(model: Distributed, state: State) -> bool:
    """Whether no fault can happen any more, and none is left to be noticed. Then the coordinator sends a node
    no order before it has heard that the node has carried out the last ones. The model checks that whenever
    an order is sent."""
    value = model.values
    env, known = value[state[model.ENV]], value[state[model.CLUSTER]]
    if env.faults or env.plans or env.measuring or value[state[model.FRONT]].lost:
        return False
    if known.phase not in ("loading", "serving", "moving", "committing"):
        return False
    if len(known.members) < model.bound.nodes:
        return False
    if any(known.members[i].alive and not known.members[i].condition.leaving for i in model.bound.leaving):
        return False
    if known.transition is None and (
        env.moves < len(model.bound.moves) or model.reconsiders(state[model.CLUSTER])
    ):
        return False
    for i, link in enumerate(value[state[model.LINKS]]):
        node: Node = value[state[model.FIXED + i]]
        if node.notices or link != ("up" if node.up else "down"):
            return False
        if not node.up and model.bound.returns != "never":
            return False
        if any(isinstance(value[number], Broken) for number in value[state[model.reports + i]]):
            return False
    return True


def _alone(model: Distributed, state: State) -> Any:
    """In a calm state: a step on which nothing else depends, and which depends on nothing that may still
    happen."""
    value, n = model.values, model.bound.nodes
    known: ClusterState = value[state[model.CLUSTER]]
    nodes: list[Node] = [value[state[model.FIXED + i]] for i in range(n)]
    for i, node in enumerate(nodes):
        orders = value[state[model.orders + i]]
        if orders:
            order, force = value[orders[0]], node.state.force
            if (
                len(orders) == 1 and not node.tasks and node.state.change is None and force is not None
                and isinstance(order, Assign) and order.base == force.assign.epoch.counter
            ):  # fmt: skip
                return ("order", i)
            continue
        for what, number in model.local(state[model.FIXED + i]):
            task = value[number]
            if isinstance(task, node_state.OpenStage | node_state.Prepare | node_state.Dial):
                return (what, i, number)
    for wire, _, queue in value[state[model.WIRES]]:
        node = nodes[wire[2]]
        if not queue or not node.up or value[state[model.orders + wire[2]]]:
            continue
        message, _ = value[queue[0]]
        giver = 0 if wire[1] == COORDINATOR else nodes[wire[1]].incarnation
        if not model.nodes.accepts(node, wire, message, giver):
            continue
        if wire[0] == "bulk" or known.transition is None:
            return ("wire", wire)
        if isinstance(message, Step | Open) and not _copies(known, node, wire[2]):
            return ("wire", wire)
    return _unheard(model, state)


def _copies(known: ClusterState, node: Node, i: int) -> bool:
    """Whether a node sends keys and values ahead, now or after an order that is on its way: what it sends
    depends on the rows that it has run."""
    assert known.transition is not None
    label = known.members[i].label
    if known.transition.step != "preparing" or label not in [s.giver for s in known.transition.shifts]:
        return False
    change = node.state.change
    return change is None or any(due.what == "copy" for due in change.due)


def _unheard(model: Distributed, state: State) -> Any:
    """A report, or the connection to the first node, for which the coordinator does nothing but wait for
    another one. The last one, which makes it act, is taken at any time."""
    known: ClusterState = model.value(state[model.CLUSTER])
    front: Front = model.value(state[model.FRONT])
    move = known.transition
    for i in range(model.bound.nodes):
        reports = model.value(state[model.reports + i])
        if not reports:
            continue
        message = model.value(reports[0])
        if move is not None and move.step == "preparing" and isinstance(message, Prepared):
            others = set(move.members) - move.prepared - {i}
            if message.epoch == move.epoch and (others or not move.reached):
                return ("hear", i)
        if isinstance(message, Loaded) and message.epoch == known.epoch:
            awaited = set(known.holders() if move is None else move.members)
            if known.phase in ("loading", "committing") and awaited - known.loaded - {i}:
                return ("hear", i)
    waits = front.first is not None and not front.first.connected and front.first.serve is None
    if waits and move is not None and move.step == "preparing" and set(move.members) - move.prepared:
        return ("dialled",)
    return None
