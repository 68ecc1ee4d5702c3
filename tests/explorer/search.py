"""Breadth-first search through all states of a model, which finds the shortest trace to a fault.

A model is a function from a state to its successors. Every edge of the graph is either a fault, of which a
state allows a bounded number, or a step that the system makes by itself. Two things are checked:

- Safety: the model raises `Violation` while it makes a successor.
- Progress: the steps without faults have no cycle, and every state without such a step is one in which all
  work is done. So every run, whatever the order of its steps, ends with all work done as soon as faults end.
  This is stronger than that a way to the end exists, and needs no assumption of fairness.

States are tuples of small integers. Only a 64-bit hash of each is kept, so two of n states are taken for one
with a probability of n² / 2⁶⁵ (3e-8 for a million). A trace is found again by making the successors of its
states once more.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

State = tuple[int, ...]


class Violation(Exception):
    """The model does what it must never do."""


class Edge(NamedTuple):
    """A step to another state. `action` is data that the model can describe. `error`: making the successor
    violated an invariant, and there is no state."""

    action: Hashable
    fault: bool
    state: State | None
    error: str = ""


class Model(Protocol):
    """What is explored."""

    def initial(self) -> State:
        """The first state."""

    def successors(self, state: State) -> Iterable[Edge]:
        """The steps from a state."""

    def lacking(self, state: State) -> str:
        """Why the work of a state is not done, from which no step leads on; empty if it is."""

    def describe(self, state: State, action: Hashable) -> str:
        """An action in a state, for a trace."""


@dataclass(frozen=True, slots=True)
class Found:
    """A violation with the shortest trace to it."""

    what: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((*self.trace, f"=> {self.what}"))


@dataclass(frozen=True, slots=True)
class Report:
    """What a search has seen. `found` is None if no invariant is violated."""

    states: int
    edges: int
    depth: int
    seconds: float
    found: Found | None
    finals: frozenset[int] = frozenset()
    """The hashes of the states from which nothing leads on."""
    whole: bool = True
    """Whether all states were seen."""


def explore(model: Model, *, most: int = 10_000_000, progress: bool = True,
            tell: Callable[[str], None] | None = None) -> Report:  # fmt: skip
    """Explores all states, or ends with the first violation."""
    began = time.monotonic()
    first = model.initial()
    seen: dict[int, int] = {hash(first): 0}
    parents, ordinals = array("q", [-1]), array("i", [0])
    targets, offsets = array("I"), array("Q", [0])
    """The steps without faults: those of state i are targets[offsets[i] : offsets[i + 1]]."""
    stuck: list[tuple[int, str]] = []
    finals = set[int]()
    frontier, depth, edges, index = [first], 0, 0, 0

    def report(found: Found | None, whole: bool = True) -> Report:
        return Report(len(seen), edges, depth, time.monotonic() - began, found, frozenset(finals), whole)

    while frontier:
        following: list[State] = []
        for state in frontier:
            for ordinal, edge in enumerate(model.successors(state)):
                edges += 1
                if edge.state is None:
                    path = [*_path(parents, ordinals, index), ordinal]
                    return report(Found(edge.error, _trace(model, path)))
                key = hash(edge.state)
                target = seen.get(key)
                if target is None:
                    target = seen[key] = len(parents)
                    parents.append(index)
                    ordinals.append(ordinal)
                    following.append(edge.state)
                if not edge.fault:
                    targets.append(target)
            offsets.append(len(targets))
            if offsets[-1] == offsets[-2]:
                finals.add(hash(state))
                lacking = model.lacking(state)
                if lacking and not stuck:
                    stuck.append((index, lacking))
            index += 1
        if tell is not None:
            tell(f"depth {depth}: {len(seen)} states, {edges} edges, {time.monotonic() - began:.1f} s")
        if len(seen) > most:
            return report(None, whole=False)
        frontier, depth = following, depth + 1
    if stuck and progress:
        at, lacking = stuck[0]
        what = f"nothing can happen any more, and {lacking}"
        return report(Found(what, _trace(model, _path(parents, ordinals, at))))
    return report(_endless(model, parents, ordinals, targets, offsets) if progress else None)


def _endless(
    model: Model, parents: array[int], ordinals: array[int], targets: array[int], offsets: array[int]
) -> Found | None:
    """A run that never ends: the steps without faults have a cycle."""
    count = len(parents)
    waiting = array("I", bytes(4 * count))
    for target in targets:
        waiting[target] += 1
    ready = [i for i in range(count) if not waiting[i]]
    left = count
    while ready:
        i = ready.pop()
        left -= 1
        for at in range(offsets[i], offsets[i + 1]):
            target = targets[at]
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if not left:
        return None
    # Every state that is left is in a cycle or behind one; going back along the rest ends in a cycle.
    return _cycle(model, parents, ordinals, targets, offsets, waiting)


def _cycle(
    model: Model, parents: array[int], ordinals: array[int], targets: array[int], offsets: array[int],
    waiting: array[int],
) -> Found:  # fmt: skip
    before: dict[int, int] = {}
    for i in range(len(parents)):
        if waiting[i]:
            for at in range(offsets[i], offsets[i + 1]):
                if waiting[targets[at]]:
                    before[targets[at]] = i
    at = next(iter(before))
    order: dict[int, int] = {}
    while at not in order:
        order[at] = len(order)
        at = before[at]
    ring = [i for i, when in order.items() if when >= order[at]]
    first = min(ring)
    ring.reverse()  # in the direction of time
    ring = [*ring[ring.index(first) :], *ring[: ring.index(first)], first]
    path = _path(parents, ordinals, first)
    lines = list(_trace(model, path))
    state = _follow(model, path)
    lines.append("from here on, over and over:")
    for target in ring[1:]:
        key_edges = [e for e in model.successors(state) if not e.fault and e.state is not None]
        wanted = hash(_follow(model, _path(parents, ordinals, target)))
        edge = next(e for e in key_edges if hash(e.state) == wanted)
        lines.append(model.describe(state, edge.action))
        assert edge.state is not None
        state = edge.state
    return Found("the system goes round in a circle without any fault", tuple(lines))


def _path(parents: array[int], ordinals: array[int], index: int) -> list[int]:
    path = []
    while parents[index] >= 0:
        path.append(ordinals[index])
        index = parents[index]
    return path[::-1]


def _follow(model: Model, path: list[int]) -> State:
    state = model.initial()
    for ordinal in path:
        following = list(model.successors(state))[ordinal].state
        assert following is not None
        state = following
    return state


def _trace(model: Model, path: list[int]) -> tuple[str, ...]:
    state, lines = model.initial(), []
    for number, ordinal in enumerate(path, 1):
        edge = list(model.successors(state))[ordinal]
        fault = "FAULT " if edge.fault else ""
        lines.append(f"{number:3}. {fault}{model.describe(state, edge.action)}")
        if edge.state is None:
            break
        state = edge.state
    return tuple(lines)
