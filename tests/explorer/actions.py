"""What can happen in a state of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shoal.net import stage_state as node_state
from shoal.net.members import ClusterState
from shoal.net.messages import Assign

from .bound import Env
from .coordinator import Front
from .search import State
from .stage import COORDINATOR, Node

if TYPE_CHECKING:
    from .world import Distributed

LATE, SETTLED = 1e4, 20.0
"""Times after which every bound is exceeded, and after which only newcomers are considered."""


def all_of(model: Distributed, state: State) -> Iterator[tuple[Any, bool]]:
    """All that can happen in a state, and whether it is a fault or otherwise need not happen."""
    value, n = model.values, model.bound.nodes
    links, env, front = value[state[model.LINKS]], value[state[model.ENV]], value[state[model.FRONT]]
    nodes = [value[state[model.FIXED + i]] for i in range(n)]
    known = len(value[state[model.CLUSTER]].members)
    if known < n:
        yield ("add", known), False
    for i in range(n):
        if value[state[model.reports + i]]:
            yield ("hear", i), False
        if value[state[model.results + i]]:
            yield ("result", i), False
    for i in range(n):
        if links[i] == "broken":
            yield ("left", i), False
        elif links[i] == "down" and nodes[i].up and i < known:
            yield ("join", i), False
    if front.first is not None and not front.first.connected:
        yield ("dialled",), False
    for lost in front.lost:
        yield ("broken", *lost), False
    for request in env.plans:
        yield ("planned", request), False
    if env.measuring:
        yield ("measured",), False
    if model.reconsiders(state[model.CLUSTER]) and not _hasty(model, state, links, nodes, front):
        yield ("settled",), False
    for i in range(n):
        if not nodes[i].up:
            if model.bound.returns != "never":
                yield ("return", i), model.bound.returns == "may"
            continue
        if value[state[model.orders + i]]:
            yield ("order", i), False
        for what, number in model.local(state[model.FIXED + i]):
            yield (what, i, number), False
    for wire, _, queue in value[state[model.WIRES]]:
        if queue and nodes[wire[2]].up:
            message, _ = value[queue[0]]
            giver = 0 if wire[1] == COORDINATOR else nodes[wire[1]].incarnation
            if model.nodes.accepts(nodes[wire[2]], wire, message, giver):
                yield ("wire", wire), False
    for index in model.script.may_ask(front):
        yield ("ask", index), False
    yield from _options(model, state, front, env)
    if env.faults:
        yield from _faults(model, state, links, nodes)


def _options(model: Distributed, state: State, front: Front, env: Env) -> Iterator[tuple[Any, bool]]:
    """Steps that may happen or not."""
    if env.moves < len(model.bound.moves):
        yield ("propose", env.moves), True
    known: ClusterState = model.values[state[model.CLUSTER]]
    for i in model.bound.leaving:
        if known.members[i].alive and not known.members[i].condition.leaving:
            yield ("leaving", i), True
    for index in model.bound.leaves:
        if front.talks[index].asked and not front.talks[index].over:
            yield ("leave", index), True


def _faults(model: Distributed, state: State, links: Any, nodes: list[Node]) -> Iterator[tuple[Any, bool]]:
    wires = model.values[state[model.WIRES]]
    kinds = model.bound.kinds
    for i, node in enumerate(nodes):
        if not node.up:
            continue
        if "crash" in kinds:
            yield ("crash", i), True
        if "cut" in kinds and links[i] == "up":
            yield ("cut", i), True
        if "redial" in kinds and links[i] == "up":
            yield ("redial", i), True
        if "load" in kinds:
            for what, number in model.local(state[model.FIXED + i]):
                if what == "task" and isinstance(
                    model.values[number], node_state.OpenStage | node_state.Prepare
                ):
                    yield ("fail", i, number), True
            orders = model.values[state[model.orders + i]]
            if model.bound.quick and orders:
                order = model.values[orders[0]]
                if isinstance(order, Assign) and order.first < order.last:
                    yield ("misload", i), True
    if "snap" in kinds:
        for wire, alive, _ in wires:
            if alive:
                yield ("snap", wire), True
    if "stick" in kinds:
        for wire, alive, _ in wires:
            if alive and wire[0] == "step":
                yield ("stick", wire), True
    if "stall" in kinds:
        yield ("stalled",), True


def ticks(model: Distributed, state: State) -> Iterator[Any]:
    """Time that passes, when nothing else can happen."""
    phase = model.value(state[model.CLUSTER]).phase
    yield ("tick", SETTLED if phase == "waiting" else LATE)


def _hasty(model: Distributed, state: State, links: Any, nodes: list[Node], front: Front) -> bool:
    """Whether too little time has passed for another try: after one that has failed, the coordinator
    waits for so long that ends of connections are noticed."""
    unnoticed = "broken" in links or front.lost or any(node.notices for node in nodes)
    return bool(unnoticed) and model.values[state[model.CLUSTER]].setback is not None
