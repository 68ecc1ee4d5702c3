"""Which files of the model nodes hold, and which they should fetch from each other: decisions without I/O or
a clock.

Plans keep to the units that nodes hold (placement.NodeInfo). Each comes with what nodes should hold for the
best plan without this limit; what a node lacks of that it is ordered to fetch. Whenever it has got something,
another plan is tried, as for a node that has joined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import plans
from .events import Command, FilesHeld, Say
from .members import SILENT_SECONDS, ClusterState, Fetching, Member, peer_of
from .messages import MOST_SOURCES, Fetch, Source
from .placement import Links
from .transition import Outcome

MB = 1e6
COMPARED_BYTES = 1e6
"""Sources are compared by the time in which so many bytes arrive from them."""
RETURN_SECONDS = 10.0
"""A node that comes with files has had a place in a house before. For so long the others may come back, too,
and with them the target should be one for which it has all."""
PARTS = 10
"""Progress is told in so many parts while nothing can be served."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a node fetches: of the `wanted` bytes of files that it should hold it has `got`, at so many bytes
    a second. `problem` is the reason why it does not get the rest, or empty."""

    label: str
    wanted: int
    got: int
    bytes_per_s: float
    problem: str


def reports(state: ClusterState, now: float) -> tuple[FetchReport, ...]:
    """What live nodes fetch, or have fetched."""
    found = []
    for i in state.alive():
        member, one = state.members[i], state.members[i].fetching
        arrives = one.got < one.wanted and now - one.at <= SILENT_SECONDS
        rate = one.bytes_per_s if arrives else 0.0
        if one.wanted:
            found.append(FetchReport(member.label, one.wanted, one.got, rate, one.problem))
    return tuple(found)


# --- what nodes hold


def files_held(state: ClusterState, event: FilesHeld, now: float) -> Outcome:
    """A node tells which files it holds, and how many bytes of those that it should hold."""
    index, before = event.member, state.members[event.member]
    if not before.alive:
        return state, ()
    old, new = state.held(index), frozenset(event.held.units)
    gained, grown = new - old, {state.incarnation(index)}
    state = state.changed(index, held=new, fetching=before.fetching.told(event.held, now))
    if state.waiting is not None and (gained or event.held.got > before.fetching.got):
        state = replace(state, waiting=now)  # patience is for nodes that are not there
    commands = _said(state, index, old, before.fetching)
    if gained:
        state = replace(state, insufficient=state.insufficient - grown)
    if gained.intersection(before.target or ()):
        state = replace(state, considered=state.considered - grown)
    if state.phase != "waiting" or not gained:
        return state, commands
    state, more = plans.advance(state, now)
    return state, (*commands, *more)


def _said(state: ClusterState, member: int, held: frozenset[int], before: Fetching) -> tuple[Command, ...]:
    """What the user is told of a node's files of the target: a problem, that all are there; or, while nothing
    can be served, each tenth of the bytes that all nodes need. It has `held` units before."""
    there = state.members[member]
    called, after, target = there.called, there.fetching, set(there.target or ())
    lacks = target - state.held(member)
    if after.problem and after.problem != before.problem:
        return (Say(f"{called}: {after.problem}", member),) if lacks else ()
    if target - held and not lacks:
        return (Say(f"{called} has all files that it should hold", member),)
    if state.phase != "waiting" or before.wanted != after.wanted:
        return ()
    known = [state.members[i].fetching for i in state.alive()]
    got, wanted = sum(one.got for one in known), max(1, sum(one.wanted for one in known))
    if (got - after.got + before.got) * PARTS // wanted == got * PARTS // wanted:
        return ()
    return (Say(f"fetching weights: {got / MB:,.0f} of {wanted / MB:,.0f} MB", member),)


# --- what they should hold


def orders(
    state: ClusterState, copies: Mapping[str, Sequence[int]], links: Links, now: float
) -> dict[int, Fetch]:
    """The orders to members that do not hold all files: what the target needs there, and once that is there
    `copies` of other units, by label. Units that few nodes hold come first, and so do the sources from which
    bytes arrive soonest."""
    alive = state.alive()
    lacking = [i for i in alive if _may_fetch(state.members[i], now)]
    if not lacking:
        return {}
    there = Counter(unit for i in alive for unit in state.held(i))
    found = {}
    for i in lacking:
        member = state.members[i]
        units = list[int]()
        for part in (member.target or (), copies.get(member.label, ())):
            if state.held(i).issuperset(units) and not member.condition.leaving:
                units += sorted(set(part) - set(units), key=lambda unit: (there[unit], unit))
        missing = [unit for unit in units if unit not in state.held(i)]
        found[i] = Fetch(tuple(units), _sources(state, i, missing, links))
    return found


def _may_fetch(member: Member, now: float) -> bool:
    assert member.hello is not None
    offer = member.hello.offer
    new = offer is None or not offer.held
    return member.held is not None and (new or now - member.began >= RETURN_SECONDS)


def _sources(state: ClusterState, taker: int, missing: Sequence[int], links: Links) -> tuple[Source, ...]:
    """The nodes that hold some of the missing units, the nearest first. One that was not planned for is none:
    with it the target may be another, of which the taker has all."""
    to = state.members[taker].label

    def seconds(member: int) -> float:
        link = links.get((state.members[member].label, to))
        return math.inf if link is None else link.latency_s + COMPARED_BYTES / link.bytes_per_s

    found = []
    for i in sorted(state.alive(), key=seconds):
        units = tuple(unit for unit in missing if unit in state.held(i))
        hello = state.members[i].hello
        gives = hello is None or hello.offer is None or not hello.offer.device.beside  # the first range does
        if i != taker and units and gives and state.members[i].target is not None:
            found.append(Source(peer_of(state.members[i]), units))
    return tuple(found[:MOST_SOURCES])


def same_order(one: Fetch | None, other: Fetch) -> bool:
    """Whether nothing has to be sent: no units are wanted, or two orders differ in their order alone."""

    def content(order: Fetch) -> object:
        return set(order.units), {(source.peer, frozenset(source.units)) for source in order.sources}

    return content(one or Fetch((), ())) == content(other)
