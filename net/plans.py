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
from .members import ITSELF, ClusterState, Phase
from .placement import FilesMissingError, Placement
from .transition import Outcome

GAIN = 1.1
"""How many times as fast as the plan in force a plan with other nodes must be."""
SETTLED_SECONDS, MOST_SETTLED = 3.0, 60.0
"""How long a node must have been back, and a chain have been served, before such a plan is tried. The time
grows with each loss of the node."""

CROWDED_SECONDS = 600.0
"""After which time a plan is tried again for which a node had no memory."""

FETCHED_SECONDS = 5.0
"""While a node fetches files, layers do not move more often than this: answers stand still each time."""


def end(state: ClusterState, error: ShoalError, now: float) -> Outcome:
    """Ends the coordinator. One that is to stay goes on with the chain that is served, or waits for nodes; it
    says why, once."""
    if not state.open_ended:
        return replace(state, phase="failed"), (Fail(error),)
    if state.phase == "serving":
        return state, (Say(str(error)),)
    said = () if str(error) == str(state.failure) else (Say(f"waiting for devices: {error}"),)
    state = replace(state, failure=error)
    since = now if state.waiting is None else state.waiting
    return replace(enter(state, "waiting", now), waiting=since), said


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


def _unheld(state: ClusterState, placement: Placement) -> str | None:
    """The first node that does not hold the files of a stage of its, in words; None: there is none."""
    for i, stage in zip(state.holders_of(placement), placement.stages, strict=True):
        if not state.held(i).issuperset(range(stage.first, stage.last)):
            return f"{stage.device} does not have the files of units [{stage.first}, {stage.last})"
    return None


def measure(state: ClusterState) -> Outcome:
    """Measures the links that are unknown, unless others are being measured. Where nodes come and go, those
    between nodes are estimated first: with n nodes, one that joins is planned with after one measurement
    instead of 2 n - 1."""
    if state.open_ended:
        new = state.to_estimate()
        state = replace(
            state, measured=state.measured | new, old=state.old | new, estimated=state.estimated | new
        )
    pairs = state.unmeasured()
    if state.open_ended:
        pairs = tuple(pair for pair in pairs if ITSELF in pair) or pairs
    if not pairs or state.measuring:
        return state, ()
    ends = frozenset(state.ends(*pair) for pair in pairs)
    return replace(state, measuring=ends, old=state.old - ends), (MeasureLinks(pairs),)


def measure_again(state: ClusterState, now: float) -> Outcome:
    """Measures the links that are only known from before, or estimated, after the chain has been served for a
    while. What the former are now is left to the rebalancer."""
    pairs = state.measured_before()
    if not pairs or state.measuring or now - state.since < SETTLED_SECONDS or state.fetches(now):
        return state, ()
    ends = frozenset(state.ends(*pair) for pair in pairs)
    return replace(state, measuring=ends, old=state.old - ends), (MeasureLinks(pairs, again=True),)


def links_measured(state: ClusterState, event: LinksMeasured, now: float) -> Outcome:
    estimates = state.measuring & state.estimated
    state = replace(
        state,
        measured=state.measured | state.measuring,
        unreachable=(state.unreachable - state.measuring) | event.unreachable,
        measuring=frozenset(),
    )
    # Where a link was estimated, another plan may be better now.
    state = replace(state, considered=state.considered.difference(*estimates))
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
    state = _targeted(state, answer)
    if state.trial:
        return _tried(replace(state, trial=False), answer, now)
    if state.phase != "planning":
        return state, ()
    if isinstance(answer, NoPlanError):
        return _no_plan(state, answer, now)
    if isinstance(answer, ShoalError):
        return end(state, answer, now)
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return end(state, error, now)
    if _unheld(state, answer):  # a node has removed files meanwhile
        return plan(state, now)
    return transition.begin(state, answer, "a node was lost", now)


def _targeted(state: ClusterState, answer: Placement | ShoalError) -> ClusterState:
    """The state with what each node that was planned for should hold; that stays as it is without a plan."""
    found = answer.target if isinstance(answer, Placement | FilesMissingError) else None
    for i in state.alive():
        member = state.members[i]
        if state.incarnation(i) in state.considered:
            units = member.target or () if found is None else found.get(member.label, ())
            state = state.changed(i, target=tuple(units))
    return state


def _tried(state: ClusterState, answer: Placement | ShoalError, now: float) -> Outcome:
    """Changes to a plan that was made while a chain is served, if it is better or empties a node that is
    leaving."""
    if state.phase != "serving" or state.transition is not None:  # it comes too late, and is asked for again
        return replace(state, considered=state.considered - state.growing(state.alive())), ()
    leaving = _leaving(state)
    if isinstance(answer, ShoalError):
        if not leaving or not isinstance(answer, NoPlanError):
            return state, ()
        state, said = _insufficient(state)
        return replace(state, considered=frozenset(state.incarnation(i) for i in state.usable())), said
    stages = {stage.device for stage in answer.stages}
    emptied = [i for i in leaving if state.members[i].label not in stages]
    if not emptied and (answer.stages in state.crowded or not _better(answer, state.placement)):
        return state, ()
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return end(state, error, now)
    if _unheld(state, answer):
        return state, ()
    early = set[int]() if emptied else _unsettled(state, answer, now)
    if early:
        return replace(state, considered=state.considered - early), ()
    if emptied:
        why = f"{', '.join(state.members[i].label for i in emptied)} is leaving"
        return transition.begin(state, answer, why, now)
    more = "more nodes" if stages - {stage.device for stage in state.placement.stages} else "fetched layers"
    better = f"a plan with {more} is better"
    if answer.private and not state.placement.private:
        better = "a plan whose ends stay home is better"
    state, commands = transition.begin(state, answer, better, now)
    return state, (Say(f"{better}: changing to it"), *commands)


def _unsettled(state: ClusterState, placement: Placement, now: float) -> set[int]:
    """The incarnations of the nodes for which a placement comes too early: those that have just joined; or
    all that can do more than before, if the chain has just begun."""
    holders, after = state.holders(), state.holders_of(placement)
    fresh = {state.incarnation(i) for i in after if i not in holders and not _has_settled(state, i, now)}
    return fresh or (state.growing(after) if now - state.since < SETTLED_SECONDS else fresh)


def _has_settled(state: ClusterState, member: int, now: float) -> bool:
    """Whether a node has been there for long enough to be used."""
    there = state.members[member]
    wait = min(MOST_SETTLED, SETTLED_SECONDS * 2.0 ** (max(0, there.losses - 1)))
    return now - there.joined >= wait


def proposed(state: ClusterState, event: Proposed, now: float) -> Outcome:
    """Begins the transition to a placement that the rebalancer, or somebody else, wants."""
    placement, setback = event.placement, state.setback
    refusal = _unfit(state, placement, state.usable())
    if state.moves == "off":
        refusal = "layers are moved only after losses (--moves off)"
    elif state.phase != "serving" or state.transition is not None:
        refusal = "the chain is changing already"
    elif event.base not in (None, state.epoch):
        refusal = "the chain has changed since"
    elif placement == state.placement:
        refusal = "it is the plan in force"
    elif setback is not None and setback.stages == placement.stages and now < setback.until:
        refusal = "it has just failed"
    if refusal is None:
        refusal = _unheld(state, placement)
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
    """Whether a plan is worth the interruption: it holds a longer context, is faster by GAIN, or its ends
    stay home."""
    if new.private and not old.private and new.context == old.context:
        return True
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
    if isinstance(reason, FilesMissingError):
        state, more = _without_files(state, reason, now)
        return state, (*said, *more)
    errors = [member.lost for member in state.members if member.lost is not None]
    error: ShoalError
    if reason is not None and state.open_ended:
        error = reason
    elif reason is None:
        error = errors[-1]
    elif errors:
        kind = NodeLostError if state.served else type(errors[0])
        error = kind(f"{'; '.join(map(str, errors))}; the other nodes cannot go on: {reason}")
    else:
        error = reason
    pending = [member.called for member in state.members if member.pending]
    if pending and not state.served and not state.open_ended:  # until the attempts to connect have ended
        if state.waiting is None:
            state = replace(state, waiting=now)
            said = (*said, Say(f"waiting for {', '.join(pending)}: {error}"))
        return replace(enter(state, "waiting", now), failure=error), said
    hope = state.waiting is not None or state.unreachable or any(m.may_return for m in state.members)
    if state.epoch.counter == 0 or not hope or state.open_ended:
        state, more = end(state, error, now)
        return state, (*said, *more)
    since = now if state.waiting is None else state.waiting
    if now - since >= state.timing.patience:
        return end(state, error, now)
    if state.waiting is None:
        said = (*said, Say(f"waiting for nodes, {state.timing.patience:g} s at most"))
    return replace(enter(state, "waiting", now), waiting=since, failure=error), said


def _without_files(state: ClusterState, reason: FilesMissingError, now: float) -> Outcome:
    """Waits for files, for as long as bytes arrive (holding.files_held)."""
    since = now if state.waiting is None else state.waiting
    if now - since >= state.timing.patience and not state.open_ended:
        return end(state, reason, now)
    new = not isinstance(state.failure, FilesMissingError)
    said = (Say(f"waiting for weights. {reason}"),) if new else ()
    return replace(enter(state, "waiting", now), waiting=since, failure=reason), said


def reconsidered(state: ClusterState, now: float) -> Outcome:
    """Asks for a plan without nodes that are leaving, or with nodes that have joined since the last one."""
    settled = now - state.since >= SETTLED_SECONDS
    if settled:
        state = replace(state, waiting=None, failure=None)
    if state.crowded and now >= state.crowded_until:
        again = state.considered - state.growing(state.alive())
        state = replace(state, crowded=frozenset(), considered=again)
    if state.trial or (state.setback is not None and now < state.setback.until):
        return state, ()
    if _leaving(state):
        return plan(state, now, trial=True)
    if state.moves == "off":
        return state, ()
    usable = [(i, state.members[i]) for i in state.usable() if state.incarnation(i) not in state.considered]
    if any(member.held is not None and member.target is None for _, member in usable):
        return plan(state, now, trial=True)  # it has to fetch files first
    if now - state.moved < FETCHED_SECONDS:  # nodes that get more files now are tried later
        usable = [(i, member) for i, member in usable if state.held(i).issuperset(member.target or ())]
    if settled and any(_has_settled(state, i, now) for i, _ in usable):
        return plan(state, now, trial=True)
    return state, ()
