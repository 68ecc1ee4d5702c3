"""Invariants that concern more than one process. Those of one process are checked where it acts: tokens where
they are read (coordinator.py), rows and pages where they are used (stage.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.net.members import ClusterState
from shoal.net.messages import Commit, Epoch, Result, Step

from .coordinator import Front
from .search import State, Violation
from .stage import Node

if TYPE_CHECKING:
    from .world import Distributed


def check_commit(model: Distributed, world: list[int], commit: Commit) -> None:
    """No rows of a session that is carried are on their way when Commit is sent, unless the chain has ended:
    then stages truncate what they hold."""
    front: Front = model.value(world[model.FRONT])
    line = front.line
    if line is None or line.ended:
        return
    numbers = {kept.session for kept in commit.sessions}
    for wire, _, queue in model.value(world[model.WIRES]):
        for message, _ in map(model.value, queue):
            if isinstance(message, Step) and message.epoch == line.flow.epoch and message.session in numbers:
                raise Violation(f"Commit is sent while rows are on their way from {wire[1]} to {wire[2]}")
    for i in range(model.bound.nodes):
        for message in map(model.value, model.value(world[model.results + i])):
            if (
                isinstance(message, Result)
                and message.epoch == line.flow.epoch
                and message.session in numbers
            ):
                raise Violation(f"Commit is sent while a Result of node {i} is on its way")


def check_serve(model: Distributed, world: list[int], epoch: Epoch) -> None:
    """When sessions are let go on in an epoch, all of its stages have changed to it."""
    state: ClusterState = model.value(world[model.CLUSTER])
    for i, stage in zip(state.holders(), state.placement.stages, strict=True):
        node: Node = model.value(world[model.FIXED + i])
        if not node.up or node.incarnation != state.incarnation(i) or node.state.force is None:
            continue
        assign = node.state.force.assign
        if assign.epoch < epoch:
            raise Violation(
                f"epoch {epoch.counter} is served, and node {i} is in epoch {assign.epoch.counter}"
            )
        if assign.epoch == epoch and (assign.first, assign.last) != (stage.first, stage.last):
            raise Violation(f"node {i} runs units {assign.first} to {assign.last}, and the plan says {stage}")


def leak(model: Distributed, state: State) -> str:
    """What is left over although nothing can happen any more; empty if nothing is."""
    front: Front = model.value(state[model.FRONT])
    known: ClusterState = model.value(state[model.CLUSTER])
    open_sessions = {number for number, _ in front.line.order} if front.line is not None else set()
    for i in range(model.bound.nodes):
        node: Node = model.value(state[model.FIXED + i])
        if not node.up:
            continue
        if node.state.change is not None or node.arrived or node.histories or node.tasks:
            return f"node {i} still holds what a transition needed"
        if node.stage is not None and not set(node.stage.sessions()) <= open_sessions:
            return (
                f"node {i} still holds sessions {sorted(node.stage.sessions())}, and open are {open_sessions}"
            )
        if known.phase == "serving" and i not in known.holders() and node.stage is not None:
            return f"node {i} still holds a stage"
    stale = [wire for wire, *_ in model.value(state[model.WIRES]) if wire[3] != known.epoch.counter]
    return f"connections of old epochs are still open: {stale}" if stale else ""
