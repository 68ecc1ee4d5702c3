"""When the coordinator plans, for which nodes, and what becomes of a plan: decisions without I/O or a clock.

Plans are made for the nodes whose links are known, without those that are leaving. Where no chain is served,
the next plan is carried out. While one is, a plan with nodes that have joined must be better, one without
nodes that are leaving need not be, and others may propose placements of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..engine.errors import NoPlanError, ShoalError
from . import transition
from .errors import LocalProtocolError, NodeLostError
from .events import Command, Fail, LinksMeasured, MakePlan, MeasureLinks, Moved, Proposed, Say
from .members import ClusterState, Phase
from .placement import Placement
from .transition import Outcome

GAIN = 1.1
"""How many times as fast as the plan in force a plan with other nodes must be."""
SETTLED_SECONDS, MOST_SETTLED = 3.0, 60.0
"""How long a node must have been back, and a chain have been served, before such a plan is tried. The time
grows with each loss of the node."""


def fail(state: ClusterState, error: ShoalError) -> Outcome:
    """Ends the coordinator."""
    return replace(state, phase="failed"), (Fail(error),)


def enter(state: ClusterState, phase: Phase, now: float) -> ClusterState:
    """The state at the beginning of a phase."""
    return replace(state, phase=phase, since=now)


def check_placement(state: ClusterState, placement: Placement) -> None:
    """Checks a plan. LocalProtocolError, since plans are made by our own code: it does not cover the units in
    order, or names an absent node, or a node twice."""
    unfit = _unfit(state, placement, state.alive())
    if unfit is not None:
        raise LocalProtocolError(unfit)


def _unfit(state: ClusterState, placement: Placement, members: Sequence[int]) -> str | None:
    """The reason why a placement is none for these members; None if it is one."""
    edges = [0, *(stage.last for stage in placement.stages)]
    if (
        [stage.first for stage in placement.stages] != edges[:-1]
        or sorted(set(edges)) != edges
        or edges[-1] != state.units
    ):
        return f"the plan's stages {edges} do not cover units 0 to {state.units} in order"
    names = [stage.device for stage in placement.stages]
    there = {state.members[i].label for i in members}
    if len(set(names)) < len(names) or not set(names) <= there:
        return f"the plan names {names}; each must be one of {sorted(there)}, once"
    if placement.chunk_rows < 1:
        return f"the plan has chunks of {placement.chunk_rows} rows"
    return None


def measure(state: ClusterState) -> Outcome:
    """Measures the links that are unknown, unless others are being measured."""
    pairs = state.unmeasured()
    if not pairs or state.measuring:
        return state, ()
    return replace(state, measuring=frozenset(state.ends(*pair) for pair in pairs)), (MeasureLinks(pairs),)


def links_measured(state: ClusterState, event: LinksMeasured, now: float) -> Outcome:
    state = replace(
        state,
        measured=state.measured | state.measuring,
        unreachable=(state.unreachable - state.measuring) | event.unreachable,
        measuring=frozenset(),
    )
    return advance(state, now)


def advance(state: ClusterState, now: float) -> Outcome:
    """Measures links that are unknown, and plans if no chain is there. The survivors of a loss are planned
    for before the links of newcomers are known, and a chain that is served goes on meanwhile."""
    state, commands = measure(state)
    if state.phase in ("measuring", "waiting"):
        first = state.epoch.counter == 0 and bool(state.unmeasured())
        if not state.alive() or (state.usable() and not first):
            state, more = plan(state, now)
            commands += more
    return state, commands


def plan(state: ClusterState, now: float, *, trial: bool = False) -> Outcome:
    usable = state.usable()
    considered = frozenset(state.incarnation(i) for i in usable)
    state = replace(state, plans=state.plans + 1, trial=trial, considered=considered)
    if not usable:
        return _no_plan(state, None, now)
    if not trial:
        state = replace(enter(state, "planning", now), loaded=frozenset())
    return state, (MakePlan(state.plans, usable),)


def planned(state: ClusterState, answer: Placement | ShoalError, now: float) -> Outcome:
    if state.trial:
        return _tried(replace(state, trial=False), answer, now)
    if state.phase != "planning":
        return state, ()
    if isinstance(answer, NoPlanError):
        return _no_plan(state, answer, now)
    if isinstance(answer, ShoalError):
        return fail(state, answer)
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return fail(state, error)
    return transition.begin(state, answer, "a node was lost", now)


def _tried(state: ClusterState, answer: Placement | ShoalError, now: float) -> Outcome:
    """Changes to a plan that was made while a chain is served, if it is better or empties a node that is
    leaving."""
    if state.phase != "serving" or state.transition is not None:  # it comes too late, and is asked for again
        holders = state.holders()
        idle = {state.incarnation(i) for i in state.alive() if i not in holders}
        return replace(state, considered=state.considered - idle), ()
    leaving = _leaving(state)
    if isinstance(answer, ShoalError):
        if not leaving or not isinstance(answer, NoPlanError):
            return state, ()
        state, said = _insufficient(state)
        return replace(state, considered=frozenset(state.incarnation(i) for i in state.usable())), said
    stages = {stage.device for stage in answer.stages}
    emptied = [i for i in leaving if state.members[i].label not in stages]
    if not emptied and not _better(answer, state.placement):
        return state, ()
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return fail(state, error)
    if emptied:
        why = f"{', '.join(state.members[i].label for i in emptied)} is leaving"
        return transition.begin(state, answer, why, now)
    better = "a plan with more nodes is better"
    state, commands = transition.begin(state, answer, better, now)
    return state, (Say(f"{better}: changing to it"), *commands)


def proposed(state: ClusterState, event: Proposed, now: float) -> Outcome:
    """Begins the transition to a placement that the rebalancer, or somebody else, wants."""
    placement, setback = event.placement, state.setback
    refusal = _unfit(state, placement, state.usable())
    if state.moves == "off":
        refusal = "layers are moved only after losses (--moves off)"
    elif state.phase != "serving" or state.transition is not None:
        refusal = "the chain is changing already"
    elif placement == state.placement:
        refusal = "it is the plan in force"
    elif setback is not None and setback.stages == placement.stages and now < setback.until:
        refusal = "it has just failed"
    if refusal is not None:
        return state, (Moved(None, event.why, failure=refusal),)
    return transition.begin(state, placement, event.why, now, event.copying)


def _leaving(state: ClusterState) -> tuple[int, ...]:
    """The holders that are leaving and may: the others are not known to be insufficient."""
    usable = state.usable()
    return tuple(i for i in state.holders() if state.members[i].condition.leaving and i not in usable)


def _insufficient(state: ClusterState) -> Outcome:
    """Keeps nodes that are leaving, since the others, for which a plan was requested, cannot hold the
    model."""
    names = [state.members[i].called for i in state.alive() if state.members[i].condition.leaving]
    said = Say(f"the other nodes cannot hold the model without {', '.join(names)}: not left out yet")
    return replace(state, insufficient=state.considered), (said,)


def _better(new: Placement, old: Placement) -> bool:
    """Whether a plan is worth the interruption: it holds a longer context, or is faster by GAIN."""
    faster = new.tokens_per_s > GAIN * old.tokens_per_s
    return new.context > old.context or (new.context == old.context and faster)


def _no_plan(state: ClusterState, reason: NoPlanError | None, now: float) -> Outcome:
    """Waits for nodes, if there was a plan once and a node is lost. `reason` None: no node is left."""
    if reason is not None and state.unmeasured():  # newcomers may change that
        return measure(enter(state, "measuring", now))
    said: tuple[Command, ...] = ()
    if reason is not None and any(
        state.members[i].condition.leaving and state.incarnation(i) not in state.considered
        for i in state.alive()
    ):
        state, said = _insufficient(state)
    if reason is not None and state.considered != {state.incarnation(i) for i in state.usable()}:
        state, commands = plan(state, now)
        return state, (*said, *commands)
    errors = [member.lost for member in state.members if member.lost is not None]
    error: ShoalError
    if reason is None:
        error = errors[-1]
    elif errors:
        kind = NodeLostError if state.served else type(errors[0])
        error = kind(f"{'; '.join(map(str, errors))}; the other nodes cannot go on: {reason}")
    else:
        error = reason
    hope = state.waiting is not None or state.unreachable or any(m.may_return for m in state.members)
    if state.epoch.counter == 0 or not hope:
        return fail(state, error)
    since = now if state.waiting is None else state.waiting
    if now - since >= state.timing.patience:
        return fail(state, error)
    if state.waiting is None:
        said = (*said, Say(f"waiting for nodes, {state.timing.patience:g} s at most"))
    return replace(enter(state, "waiting", now), waiting=since, failure=error), said


def reconsidered(state: ClusterState, now: float) -> Outcome:
    """Asks for a plan without nodes that are leaving, or with nodes that have joined since the last one."""
    settled = now - state.since >= SETTLED_SECONDS
    if settled:
        state = replace(state, waiting=None, failure=None)
    if state.trial or (state.setback is not None and now < state.setback.until):
        return state, ()
    if _leaving(state):
        return plan(state, now, trial=True)
    if not settled or state.moves == "off":
        return state, ()
    for i in state.usable():
        member = state.members[i]
        wait = min(MOST_SETTLED, SETTLED_SECONDS * 2.0 ** (max(0, member.losses - 1)))
        if state.incarnation(i) not in state.considered and now - member.joined >= wait:
            return plan(state, now, trial=True)
    return state, ()
