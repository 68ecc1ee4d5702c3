"""The coordinator's decisions about its nodes: `decide(state, event, now) -> (state, commands)`, without I/O
or a clock.

    gathering ──> measuring ──> planning ─┬─> loading ──────────────┬──all loaded──> serving ─┐
                      ↑            ↑ │    └─> moving ──> committing ┘                │   ↑    │ transition
                      │            └─┼──────── a node is lost ───────────────────────┘   └────┘
                      └── waiting <──┘ no plan
    failed: reached from any phase, and final

Each plan that is carried out gets an epoch of its own, by a transition from the one in force
(net/transition.py): beside a chain that is served, or as `moving` after the chain has ended. The first one,
and one after a fault that no transition covers, is loaded from nothing.

The loss of a node that holds a stage ends the chain, and the others are planned for at once. Nodes are
dialled again for as long as the coordinator lives. One that comes back is used where a plan needs it, or when
a plan with it is better than the one in force. One that is leaving, by its own policy, is emptied, if the
others suffice. If they cannot hold the model, the coordinator waits for nodes, for a bounded time. Before the
first plan, the user is still at the terminal: a node that cannot be reached is left out if the others
suffice, and is an error otherwise.

`now` is in seconds of a monotonic clock that stands still while this process does not run (liveness.Awake).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..engine.errors import NoPlanError, ShoalError
from . import transition
from .errors import LocalProtocolError, MismatchError, NetError, NodeLostError, StageStuckError
from .events import (
    Command,
    Event,
    Fail,
    HangUp,
    Heard,
    Joined,
    Left,
    LinksMeasured,
    MakePlan,
    MeasureLinks,
    Moved,
    Planned,
    Proposed,
    Quiet,
    Reached,
    Redial,
    Say,
    SendPing,
    StageBroken,
    StageLoaded,
    StagePrepared,
    Stalled,
    Tick,
    TryAnew,
)
from .identity import host_port
from .liveness import Pulse, call_bound, load_bound
from .members import NO_POLICY, ClusterState, Phase, Transition, labelled
from .messages import Condition
from .placement import Placement

GAIN = 1.1
"""How many times as fast as the plan in force a plan with other nodes must be."""
SETTLED_SECONDS, MOST_SETTLED = 3.0, 60.0
"""How long a node must have been back, and a chain have been served, before such a plan is tried. The time
grows with each loss of the node."""
QUICK_SECONDS, MOST_AGAIN = 10.0, 3
"""How often the same chain is tried again after its connections have failed, each time within
QUICK_SECONDS."""
BUSY_BYTES_PER_S = 200e6
"""A node that loads so many bytes may be silent for a second longer, since its memory and disk are busy."""
RETRY_SECONDS = 1.0
"""The time between two measurements of links that cannot be measured, while nodes are waited for."""

Outcome = tuple[ClusterState, tuple[Command, ...]]


def decide(state: ClusterState, event: Event, now: float) -> Outcome:
    """The state after an event, and the commands to carry out."""
    if state.phase == "failed":
        return state, ()
    match event:
        case Joined():
            return _joined(state, event, now)
        case Heard():
            return _heard(state, event, now)
        case Left(member, error, greeted):
            return _left(state, member, error, now, own=greeted)
        case LinksMeasured():
            return _links_measured(state, event, now)
        case Planned(number, answer):
            return _planned(state, answer, now) if number == state.plans else (state, ())
        case Proposed():
            return _proposed(state, event, now)
        case StagePrepared():
            return transition.prepared(state, event, now)
        case Reached(epoch):
            return transition.reached(state, epoch, now)
        case Quiet():
            return transition.quiet(state, event, now)
        case StageLoaded(member, epoch):
            return transition.loaded(state, member, epoch, now)
        case StageBroken():
            return _broken(state, event, now)
        case Stalled(member):
            return _stalled(state, member)
        case Tick():
            return _tick(state, event, now)


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


def _fail(state: ClusterState, error: ShoalError) -> Outcome:
    return replace(state, phase="failed"), (Fail(error),)


def _enter(state: ClusterState, phase: Phase, now: float) -> ClusterState:
    return replace(state, phase=phase, since=now)


# --- members that join and leave


def _joined(state: ClusterState, event: Joined, now: float) -> Outcome:
    """A node has joined for the first time, has come back, or has a new connection: it has dropped what it
    held for the old one."""
    member, before, incarnation = event.member, state.members[event.member], event.hello.incarnation
    same = before.hello is not None and before.hello.incarnation == incarnation
    if before.faulty == incarnation:
        return state, (HangUp(member),)
    commands: tuple[Command, ...] = ()
    if before.alive and not same:  # its old connection has not ended yet
        restarted = NodeLostError(f"{before.called} has restarted")
        state, commands = _left(state, member, restarted, now, hang_up=False)
    was = state.members[member].alive
    state = state.changed(
        member,
        hello=event.hello,
        lost=None,
        joined=before.joined if was else now,
        pulse=Pulse(before.pulse.trip, now),
        condition=before.condition if same else NO_POLICY,
    )
    state = replace(state, considered=state.considered - {incarnation}) if not was else state
    for other in state.alive():
        if other != member and state.incarnation(other) == incarnation:
            state, more = _left(state.changed(other, barred=True), other, _twice(state, other, member), now)
            commands += more
    if state.phase == "gathering":
        if len(state.alive()) == 1:
            state = replace(state, since=now)
        state, more = _gathered(state, now)
        return state, (*commands, *more)
    state = labelled(state)
    mixed = _mixed(state, member)
    if mixed is not None:
        state, more = _left(state, member, mixed, now, own=True)
    elif was:  # only the connection is new
        state, more = _emptied(state, member, f"{state.members[member].called} has a new connection", now)
    else:
        told = "has joined" if before.hello is None else "is back"
        commands += (Say(f"{state.members[member].called} {told}"),)
        state, more = _advance(state, now)
    return state, (*commands, *more)


def _emptied(state: ClusterState, member: int, reason: str, now: float) -> Outcome:
    """A live node has dropped its stage, and what it has prepared."""
    held, changes = state.holds(member), state.changes(member)
    state = replace(state, standing=state.standing - {member})
    if held:
        return _again(state, reason, now)
    if not changes:
        return state, ()
    state, commands = transition.give_up(state, reason, now)
    if state.phase != "moving":
        return state, commands
    state, more = _advance(_enter(state, "measuring", now), now)
    return state, (*commands, *more)


def _twice(state: ClusterState, one: int, other: int) -> NetError:
    """The error of a node that is listed under two addresses. It serves the newer connection."""
    first, second = (host_port(state.members[i].host, state.members[i].port) for i in (one, other))
    return NetError(f"{first} is the same node as {second}: give each node once")


def _gathered(state: ClusterState, now: float) -> Outcome:
    """Goes on when every node has joined or cannot be reached, or has had `timing.gather` seconds since the
    first joined. Those that join later are used as if they had been lost."""
    pending = any(member.pending for member in state.members)
    late = state.recover and bool(state.alive()) and now - state.since >= state.timing.gather
    if pending and not late:
        return state, ()
    absent = [member for member in state.members if not member.alive]
    if not state.alive():
        return _fail(state, next(member.lost for member in absent if member.lost is not None))
    state = labelled(state)
    mixed = _mixed(state)
    if mixed is not None:
        return _fail(state, mixed)
    said = tuple(
        Say(f"{member.lost or f'{member.called} has not answered yet'}: going on without it")
        for member in absent
    )
    state, commands = _advance(_enter(state, "measuring", now), now)
    return state, (*said, *commands)


def _mixed(state: ClusterState, newest: int | None = None) -> MismatchError | None:
    """The error of nodes that cannot be in one chain, since only some of them compute exactly."""
    devices = [state.members[i] for i in state.alive() if i != newest]
    if newest is not None:
        devices.append(state.members[newest])
    exact = {member.hello.offer.exact: member for member in devices if member.hello and member.hello.offer}
    if len(exact) < 2 or state.approximate:
        return None
    return MismatchError(
        f"{exact[True].label} computes exactly and {exact[False].label} approximately (its backend is not "
        "native), so answers would depend on the plan: start all nodes with the same --backend"
    )


def _left(
    state: ClusterState,
    member: int,
    error: ShoalError,
    now: float,
    *,
    hang_up: bool = True,
    own: bool = False,
) -> Outcome:
    """A node is lost, or could not be reached. `own`: the error is its own word, or what it has done."""
    lost = state.members[member]
    if lost.lost is not None:
        return state, ()
    held, changes, strict = state.holds(member), state.changes(member), not state.recover
    at_fault = lost.alive and own and not isinstance(error, NodeLostError | StageStuckError)
    left = lost.alive and lost.condition.leaving and not held and not own
    state = state.changed(
        member,
        lost=error,
        losses=lost.losses + (lost.alive and not left),
        faulty=state.incarnation(member) if at_fault else lost.faulty,
    )
    state = replace(state, standing=state.standing - {member})
    if strict and (held or not state.served):
        return _fail(state, error)
    if state.phase == "gathering":
        return _gathered(state, now)
    said = Say(f"{lost.called} has left" if left else str(error))
    commands: tuple[Command, ...] = (*((HangUp(member),) if hang_up else ()), said)
    more: tuple[Command, ...] = ()
    if held:
        state, ended = transition.end_chain(state, str(error), now)
        state, more = _advance(state, now)
        return state, (*commands, *ended, *more)
    if changes:
        state, ended = transition.give_up(state, str(error), now)
        commands += ended
        state = _enter(state, "measuring", now) if state.phase == "moving" else state
    if state.trial:  # it may be in that plan
        state = replace(state, trial=False, plans=state.plans + 1)
    if state.phase == "planning":
        state, more = _plan(state, now)
    elif state.phase == "measuring":
        state, more = _advance(state, now)
    return state, (*commands, *more)


# --- from links to a plan


def _measure(state: ClusterState) -> Outcome:
    """Measures the links that are unknown, unless others are being measured."""
    pairs = state.unmeasured()
    if not pairs or state.measuring:
        return state, ()
    return replace(state, measuring=frozenset(state.ends(*pair) for pair in pairs)), (MeasureLinks(pairs),)


def _links_measured(state: ClusterState, event: LinksMeasured, now: float) -> Outcome:
    state = replace(
        state,
        measured=state.measured | state.measuring,
        unreachable=(state.unreachable - state.measuring) | event.unreachable,
        measuring=frozenset(),
    )
    return _advance(state, now)


def _advance(state: ClusterState, now: float) -> Outcome:
    """Measures links that are unknown, and plans if no chain is there. The survivors of a loss are planned
    for before the links of newcomers are known, and a chain that is served goes on meanwhile."""
    state, commands = _measure(state)
    if state.phase in ("measuring", "waiting"):
        first = state.epoch.counter == 0 and bool(state.unmeasured())
        if not state.alive() or (state.usable() and not first):
            state, more = _plan(state, now)
            commands += more
    return state, commands


def _plan(state: ClusterState, now: float, *, trial: bool = False) -> Outcome:
    usable = state.usable()
    considered = frozenset(state.incarnation(i) for i in usable)
    state = replace(state, plans=state.plans + 1, trial=trial, considered=considered)
    if not usable:
        return _no_plan(state, None, now)
    if not trial:
        state = replace(_enter(state, "planning", now), loaded=frozenset())
    return state, (MakePlan(state.plans, usable),)


def _planned(state: ClusterState, answer: Placement | ShoalError, now: float) -> Outcome:
    if state.phase == "serving" and state.trial:
        return _tried(replace(state, trial=False), answer, now)
    if state.phase != "planning":
        return state, ()
    if isinstance(answer, NoPlanError):
        return _no_plan(state, answer, now)
    if isinstance(answer, ShoalError):
        return _fail(state, answer)
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return _fail(state, error)
    return transition.begin(state, answer, "a node was lost", now)


def _tried(state: ClusterState, answer: Placement | ShoalError, now: float) -> Outcome:
    """Changes to a plan that was made while a chain is served, if it is better or empties a node that is
    leaving."""
    if state.transition is not None:  # proposed in the meantime
        return replace(state, considered=frozenset()), ()
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
        return _fail(state, error)
    if emptied:
        why = f"{', '.join(state.members[i].label for i in emptied)} is leaving"
        return transition.begin(state, answer, why, now)
    better = "a plan with more nodes is better"
    state, commands = transition.begin(state, answer, better, now)
    return state, (Say(f"{better}: changing to it"), *commands)


def _proposed(state: ClusterState, event: Proposed, now: float) -> Outcome:
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


def _better(plan: Placement, old: Placement) -> bool:
    """Whether a plan is worth the interruption: it holds a longer context, or is faster by GAIN."""
    faster = plan.tokens_per_s > GAIN * old.tokens_per_s
    return plan.context > old.context or (plan.context == old.context and faster)


def _no_plan(state: ClusterState, reason: NoPlanError | None, now: float) -> Outcome:
    """Waits for nodes, if there was a plan once and a node is lost. `reason` None: no node is left."""
    if reason is not None and state.unmeasured():  # newcomers may change that
        return _measure(_enter(state, "measuring", now))
    said: tuple[Command, ...] = ()
    if reason is not None and any(
        state.members[i].condition.leaving and state.incarnation(i) not in state.considered
        for i in state.alive()
    ):
        state, said = _insufficient(state)
    if reason is not None and state.considered != {state.incarnation(i) for i in state.usable()}:
        state, commands = _plan(state, now)
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
        return _fail(state, error)
    since = now if state.waiting is None else state.waiting
    if now - since >= state.timing.patience:
        return _fail(state, error)
    if state.waiting is None:
        said = (*said, Say(f"waiting for nodes, {state.timing.patience:g} s at most"))
    return replace(_enter(state, "waiting", now), waiting=since, failure=error), said


# --- faults


def _again(state: ClusterState, reason: str, now: float, *, anew: bool = False) -> Outcome:
    """Begins another epoch with the placement in force. `anew`: the stages are loaded again, since one of
    them may be at fault."""
    quick = now - state.since < QUICK_SECONDS
    state, ended = transition.end_chain(replace(state, again=state.again + 1 if quick else 1), reason, now)
    if anew:
        state, commands = transition.load(state, state.placement, now)
    else:
        state, commands = transition.begin(state, state.placement, reason, now)
    return state, (*ended, *commands)


def _heard(state: ClusterState, event: Heard, now: float) -> Outcome:
    """Removes a node of which a call has been running for too long. The bound of a call whose time is not
    predicted is that of loading the stage, which it may do."""
    member, progress = state.members[event.member], event.progress
    state = state.changed(
        event.member, pulse=member.pulse.heard(now - member.pulse.pinged if event.answered else None)
    )
    if event.condition is not None and event.condition != member.condition and member.alive:
        return _conditioned(state, event.member, event.condition, now)
    if progress is None or progress.epoch != state.epoch or progress.running is None:
        return state, ()
    if not member.alive or not state.holds(event.member) or event.member not in state.holders():
        return state, ()
    stage = state.placement.stages[state.holders().index(event.member)]
    expected = progress.expected
    bound = load_bound(state.bytes_of(stage)) if expected is None else call_bound(expected)
    if progress.running <= bound:
        return state, ()
    error = StageStuckError(
        f"{member.called}: a call of its stage has been running for {progress.running:.0f} s, much longer "
        "than it should: stop that node and start it again"
    )
    return _left(state, event.member, error, now)


def _conditioned(state: ClusterState, member: int, condition: Condition, now: float) -> Outcome:
    """The policy of a node wants another use of it. One that is leaving is emptied, at the next Tick; what is
    prepared with it is given up."""
    before, called = state.members[member].condition, state.members[member].called
    state = state.changed(member, condition=condition)
    if condition.leaving == before.leaving:
        return state, ()
    if not condition.leaving:
        state = state.changed(member, joined=now)
        state = replace(state, considered=state.considered - {state.incarnation(member)})
        return state, (Say(f"{called} can be used again"),)
    reason = f"{called} is leaving" + (f": {condition.reason}" if condition.reason else "")
    commands: tuple[Command, ...] = (Say(reason),)
    move = state.transition
    if state.phase == "serving" and move is not None and member in state.holders_of(move.placement):
        state, more = transition.give_up(state, reason, now)
        commands += more
    return state, commands


def _broken(state: ClusterState, event: StageBroken, now: float) -> Outcome:
    """Removes the node at fault: the sender, whose stage failed, or the next node, which it cannot reach. If
    only a connection has failed, the same chain begins another epoch, unless that has not helped before. A
    fault of a transition ends it."""
    move = state.transition
    if move is not None and event.epoch == move.epoch:
        return _unmoved(state, move, event, now)
    if event.epoch != state.epoch:
        return state, ()
    if state.phase not in ("loading", "serving"):  # the chain has ended, and another one is planned for
        return _emptied(state, event.member, str(event.error), now) if event.peer is None else (state, ())
    if event.again and state.again < MOST_AGAIN:
        return _again(state, "a connection has failed", now)
    blamed = _blamed(state, event)
    if blamed != event.member:  # the link between them may be another now
        state = replace(state, measured=state.measured - {state.ends(event.member, blamed)})
    return _left(state, blamed, event.error, now, own=event.peer is None)


def _unmoved(state: ClusterState, move: Transition, event: StageBroken, now: float) -> Outcome:
    """A transition has failed. The chain that is served goes on; without one, the stages are loaded again,
    and what fails then is the node's fault."""
    reason = str(event.error)
    if move.step == "committed":
        said = Say(f"the layers are loaded again: {reason}")
        state, commands = _again(state, reason, now, anew=True)
        return state, (said, *commands)
    blamed, more = _blamed(state, event), tuple[Command, ...]()
    state, commands = transition.give_up(state, reason, now, failed=True)
    if state.phase == "moving":
        state, more = transition.load(state, move.placement, now)
    elif blamed != event.member:
        state = replace(state, measured=state.measured - {state.ends(event.member, blamed)})
        state, more = _measure(state)
    return state, (*commands, *more)


def _blamed(state: ClusterState, event: StageBroken) -> int:
    for i in state.alive():
        if event.peer is not None and state.incarnation(i) == event.peer:
            return i
    return event.member


def _stalled(state: ClusterState, member: int) -> Outcome:
    """Replaces the control connection to a node, if it is still silent: a new one works."""
    pulse = state.members[member].pulse
    if not state.members[member].alive or pulse.waiting is None:
        return state, ()
    return state.changed(member, pulse=replace(pulse, waiting=None)), (Redial(member),)


def _tick(state: ClusterState, event: Tick, now: float) -> Outcome:
    state, beats = _beats(state, event, now)
    commands: tuple[Command, ...] = ()
    if state.phase == "gathering":
        state, commands = _gathered(state, now)
    elif state.phase in ("measuring", "planning", "waiting") and _tired(state, now):
        assert state.failure is not None, "waiting has a reason"
        state, commands = _fail(state, state.failure)
    elif state.phase == "waiting" and state.unreachable and now - state.since >= RETRY_SECONDS:
        retry = replace(state, measured=state.measured - state.unreachable, unreachable=frozenset())
        state, commands = _advance(_enter(retry, "measuring", now), now)
    elif state.phase == "serving" and event.stalled and not _silent(state, now):
        why = "the chain stands still, and no node reports a fault"
        state, more = _again(state, why, now, anew=True)
        commands = (Say(f"{why}: its stages are loaded again"), *more)
    elif state.transition is not None:
        state, commands = _hurried(state, state.transition, now)
    elif state.phase == "serving":
        state, commands = _reconsidered(state, now)
    return state, (*beats, *commands)


def _hurried(state: ClusterState, move: Transition, now: float) -> Outcome:
    """Ends a transition that takes too long. In a recovery, `_beats` has removed nodes that are not
    prepared."""
    reason = transition.too_late(state, now)
    if reason is None:
        return state, ()
    if move.step == "committed":
        state, commands = _again(state, reason, now, anew=True)
        return state, (Say(f"{reason}: the layers are loaded again"), *commands)
    state, commands = transition.give_up(state, reason, now, failed=True)
    if state.phase == "moving":
        state, more = transition.load(state, move.placement, now)
        commands += more
    return state, commands


def _silent(state: ClusterState, now: float) -> bool:
    """Whether a node of the chain is late with an answer, which may be why the chain stands still."""
    pulses = (state.members[i].pulse for i in state.holders())
    return any(pulse.silence(now) > pulse.trip.suspect() for pulse in pulses)


def _tired(state: ClusterState, now: float) -> bool:
    return state.waiting is not None and now - state.waiting >= state.timing.patience


def _reconsidered(state: ClusterState, now: float) -> Outcome:
    """Asks for a plan without nodes that are leaving, or with nodes that have joined since the last one."""
    settled = now - state.since >= SETTLED_SECONDS
    if settled:
        state = replace(state, waiting=None, failure=None)
    if state.trial or (state.setback is not None and now < state.setback.until):
        return state, ()
    if _leaving(state):
        return _plan(state, now, trial=True)
    if not settled or state.moves == "off":
        return state, ()
    for i in state.usable():
        member = state.members[i]
        wait = min(MOST_SETTLED, SETTLED_SECONDS * 2.0 ** (max(0, member.losses - 1)))
        if state.incarnation(i) not in state.considered and now - member.joined >= wait:
            return _plan(state, now, trial=True)
    return state, ()


def _beats(state: ClusterState, event: Tick, now: float) -> Outcome:
    """Pings the nodes, tries those anew whose answer is late, and removes those that are silent for too long.
    A node that loads many weights may be silent for longer."""
    commands: list[Command] = []
    for i in state.alive():
        member, changing = state.members[i], state.phase in ("loading", "moving", "committing")
        pulse, timing = member.pulse, state.timing
        busy = (state.holds(i) or state.changes(i)) and (changing or event.busy)
        silence = pulse.silence(now)
        bound = pulse.bound(timing.overdue, busy=busy)
        loads = state.loads(i)
        if busy and loads is not None:
            bound = min(timing.overdue, bound + loads / BUSY_BYTES_PER_S)
        if silence > bound or _overdue_load(state, i, now):
            why = f"has answered nothing for {silence:.1f} s: check that it is awake and on the network"
            if silence <= bound:
                why = f"has not loaded its layers within {now - state.since:.0f} s"
            state, more = _left(state, i, NodeLostError(f"{member.called} {why}"), now)
            commands += more
            if state.phase == "failed":
                break
            continue
        if busy and silence > pulse.trip.suspect():
            commands.append(TryAnew(i))
        if now - pulse.pinged >= (timing.busy if busy else timing.heartbeat):
            state = state.changed(i, pulse=pulse.ping(now))
            commands.append(SendPing(i))
    return state, tuple(commands)


def _overdue_load(state: ClusterState, member: int, now: float) -> bool:
    """Whether nothing but the stage of a member has been waited for, for too long."""
    if state.phase == "loading":
        late = now - state.since > state.load_bound()
        return late and state.holds(member) and member not in state.loaded
    move = state.transition
    if state.phase != "moving" or move is None or move.step != "preparing" or not state.changes(member):
        return False
    return now - move.since > move.bound and member not in move.prepared
