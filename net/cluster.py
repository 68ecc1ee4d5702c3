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

Where the coordinator is to stay (`open_ended`), nodes may be none at first, are found later
(net/arrivals.py), and are waited for without a limit: what would end it otherwise is told to the user.

`now` is in seconds of a monotonic clock that stands still while this process does not run
(liveness.AwakeClock).
"""

from __future__ import annotations

from dataclasses import replace

from ..engine.errors import ModelFileError, NoPlanError, ShoalError
from . import arrivals, holding, plans, transition
from .errors import MismatchError, NetError, NodeLostError, StageStuckError
from .events import (
    Command,
    Event,
    FilesHeld,
    Found,
    HangUp,
    Heard,
    Joined,
    Left,
    LinksMeasured,
    Planned,
    Proposed,
    Quiet,
    Reached,
    Redial,
    Removed,
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
from .liveness import Heartbeat
from .members import ITSELF, NO_FETCHING, NO_POLICY, ClusterState, Transition, device_of, labelled
from .messages import Condition, Hello
from .transition import Outcome

QUICK_SECONDS, MOST_AGAIN = 10.0, 3
"""How often the same chain is tried again after its connections have failed, each time within
QUICK_SECONDS."""
BUSY_BYTES_PER_S = 200e6
"""A node that loads so many bytes may be silent for a second longer, since its memory and disk are busy."""
RETRY_SECONDS = 1.0
"""The time between two measurements of links that cannot be measured, while nodes are waited for."""


def decide(state: ClusterState, event: Event, now: float) -> Outcome:
    """The state after an event, and the commands to carry out."""
    if state.phase == "failed":
        return state, ()
    match event:
        case Found():
            return arrivals.found(state, event, now)
        case Removed(member, error):
            return _left(state.changed(member, barred=True), member, error, now)
        case Joined():
            return _joined(state, event, now)
        case Heard():
            return _heard(state, event, now)
        case FilesHeld():
            return holding.files_held(state, event, now)
        case Left(member, error, greeted):
            return _left(state, member, error, now, own=greeted)
        case LinksMeasured():
            return plans.links_measured(state, event, now)
        case Planned(number, answer):
            return plans.planned(state, answer, now) if number == state.plans else (state, ())
        case Proposed():
            return plans.proposed(state, event, now)
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
        announced=None,
        lost=None,
        joined=before.joined if was else now,
        began=before.began if same else now,
        heartbeat=Heartbeat(before.heartbeat.trip, now),
        condition=before.condition if same else NO_POLICY,
        held=_held(event.hello),
        target=before.target if same else None,
        fetching=NO_FETCHING,
    )
    state = replace(state, considered=state.considered - {incarnation}) if not was else state
    if not same:  # links of the same process are measured, or have to be
        state = _recalled(replace(state, crowded=frozenset()), event)
    for other in state.alive():
        if other != member and state.incarnation(other) == incarnation:
            state, more = _left(state.changed(other, barred=True), other, _twice(state, other, member), now)
            commands += more
    if state.phase == "gathering" and len(state.alive()) == 1:
        state = replace(state, since=now)
    gathering = state.phase == "gathering"
    state = state if gathering else labelled(state)
    mixed = None if gathering and not state.open_ended else _mixed(labelled(state), member)
    if mixed is not None:
        state, more = _left(state, member, mixed, now, own=True)
    elif gathering:
        if state.open_ended and not was:
            commands += (Say(f"{labelled(state).members[member].called} has joined", member),)
        state, more = _gathered(state, now)
    elif was:  # only the connection is new
        state, more = _emptied(state, member, f"{state.members[member].called} has a new connection", now)
    else:
        told = "has joined" if before.hello is None else "is back"
        commands += (Say(f"{state.members[member].called} {told}", member),)
        state, more = plans.advance(state, now)
    return state, (*commands, *more)


def _recalled(state: ClusterState, event: Joined) -> ClusterState:
    """The state with the links of a node that has joined which are known from before."""
    there = {ITSELF, *state.alive()} - {event.member}
    ends = {state.ends(event.member, other) for other in event.known & there} - state.measured
    return replace(state, measured=state.measured | ends, old=state.old | ends)


def _held(hello: Hello) -> frozenset[int] | None:
    """The units whose files a node that has joined holds."""
    offer = hello.offer
    return None if offer is None or offer.held is None else frozenset(offer.held)


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
    state, more = plans.advance(plans.enter(state, "measuring", now), now)
    return state, (*commands, *more)


def _twice(state: ClusterState, one: int, other: int) -> NetError:
    """The error of a node that is listed under two addresses. It serves the newer connection."""
    first, second = (host_port(state.members[i].host, state.members[i].port) for i in (one, other))
    return NetError(f"{first} is the same node as {second}: give each node once")


def _gathered(state: ClusterState, now: float) -> Outcome:
    """Goes on when every node and every expected device has joined or cannot be reached, or has had
    `timing.gather` seconds since the first joined. Those that join later are used as if they had been
    lost."""
    devices = {device_of(state.incarnation(i)) for i in state.alive()}
    pending = any(member.pending for member in state.members) or not state.expected <= devices
    late = state.recover and bool(state.alive()) and now - state.since >= state.timing.gather
    if pending and not late:
        return state, ()
    absent = [member for member in state.members if not member.alive]
    if not state.alive() and state.open_ended:
        return state, ()
    if not state.alive():
        return plans.end(state, next(member.lost for member in absent if member.lost is not None), now)
    state = labelled(state)
    mixed = _mixed(state)
    if mixed is not None:
        return plans.end(state, mixed, now)
    said = tuple(
        Say(f"{member.lost or f'{member.called} has not answered yet'}: going on without it")
        for member in absent
        if not state.open_ended  # that was said when it was lost
    )
    state, commands = plans.advance(plans.enter(state, "measuring", now), now)
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
    if isinstance(error, ModelFileError) and state.lacks_files(member):
        at_fault = False  # it had to make room on its disk, and has told so
    left = lost.alive and lost.condition.leaving and not held and isinstance(error, NodeLostError)
    state = state.changed(
        member,
        lost=error,
        losses=lost.losses + (lost.alive and not left),
        faulty=state.incarnation(member) if at_fault else lost.faulty,
    )
    state = replace(state, standing=state.standing - {member})
    if strict and (held or not state.served):
        return plans.end(state, error, now)
    said = Say(f"{lost.called} has left" if left else str(error), member)
    commands: tuple[Command, ...] = (*((HangUp(member),) if hang_up else ()), said)
    if state.phase == "gathering":
        state, more = _gathered(state, now)
        return state, (*commands, *more) if state.open_ended else more
    more = ()
    if held:
        state, ended = transition.end_chain(state, str(error), now)
        state, more = plans.advance(state, now)
        return state, (*commands, *ended, *more)
    if changes:
        state, ended = transition.give_up(state, str(error), now)
        commands += ended
        state = plans.enter(state, "measuring", now) if state.phase == "moving" else state
    if state.trial:  # it may be in that plan
        state = replace(state, trial=False, plans=state.plans + 1)
    if lost.target:  # others should fetch its files
        state = replace(state, considered=state.considered - state.growing(state.alive()))
    if state.phase == "planning":
        state, more = plans.plan(state, now)
    elif state.phase == "measuring" or (state.phase == "waiting" and not state.served):
        state, more = plans.advance(state, now)
    return state, (*commands, *more)


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
    """Removes a node of which a call has been running for too long."""
    member, progress = state.members[event.member], event.progress
    state = state.changed(
        event.member,
        heartbeat=member.heartbeat.heard(now - member.heartbeat.pinged if event.answered else None),
    )
    if event.condition is not None and event.condition != member.condition and member.alive:
        return _conditioned(state, event.member, event.condition, now)
    if progress is None or progress.running is None or not member.alive:
        return state, ()
    has = state.holds(event.member) or event.member in state.standing
    if not state.leaves(progress.epoch) and not (progress.epoch == state.epoch and has):
        return state, ()
    bound = state.call_bound(event.member, progress.expected)
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
        reason = f": {condition.reason}" if condition.reason else ""
        share = Say(f"{called} computes for at most {condition.share:.0%} of the time{reason}", member)
        return state, (share,) if condition.share != before.share else ()
    if not condition.leaving:
        state = state.changed(member, joined=now)
        state = replace(state, considered=state.considered - {state.incarnation(member)})
        state, more = plans.advance(state, now) if state.phase == "waiting" else (state, ())
        return state, (Say(f"{called} can be used again", member), *more)
    reason = f"{called} is leaving" + (f": {condition.reason}" if condition.reason else "")
    commands: tuple[Command, ...] = (Say(reason, member),)
    move = state.transition
    if state.phase == "serving" and move is not None and member in state.holders_of(move.placement):
        state, more = transition.give_up(state, reason, now)
        commands += more
    return state, commands


def _broken(state: ClusterState, event: StageBroken, now: float) -> Outcome:
    """Removes the node at fault: the sender, whose stage failed, or the next node, which it cannot reach. If
    only a connection has failed, the same chain begins another epoch, unless that has not helped before. A
    fault of a transition ends it."""
    move, own = state.transition, event.peer is None
    if move is not None and (event.epoch == move.epoch or (own and state.leaves(event.epoch))):
        return _unmoved(state, move, event, now)
    if event.epoch != state.epoch:
        return state, ()
    if state.phase not in ("loading", "serving"):  # the chain has ended, and another one is planned for
        return _emptied(state, event.member, str(event.error), now) if own else (state, ())
    if event.again and state.again < MOST_AGAIN:
        return _again(state, "a connection has failed", now)
    blamed = _blamed(state, event)
    if blamed != event.member:
        state = state.failed_over(event.member, blamed)
    return _left(state, blamed, event.error, now, own=own)


def _unmoved(state: ClusterState, move: Transition, event: StageBroken, now: float) -> Outcome:
    """A transition has failed. The chain that is served goes on; without one, the stages are loaded again,
    and what fails then is the node's fault. A node without a stage that has not the files which it said it
    holds is at fault at once; one that cannot load what its offer had room for is lost, and the second time
    at fault: its offer is not believed any more."""
    reason, idle = str(event.error), event.member not in state.holders()
    at_fault = isinstance(event.error, StageStuckError) or (isinstance(event.error, ModelFileError) and idle)
    if at_fault and event.peer is None:
        return _left(state, event.member, event.error, now, own=True)
    if idle and event.peer is None and not isinstance(event.error, NetError | NoPlanError):
        process = state.incarnation(event.member)
        again = state.members[event.member].unloaded == process
        state = state.changed(event.member, unloaded=process)
        return _left(state, event.member, event.error, now, own=again)
    if move.step == "committed":
        said = Say(f"the layers are loaded again: {reason}")
        state, commands = _again(state, reason, now, anew=True)
        return state, (said, *commands)
    blamed, more = _blamed(state, event), tuple[Command, ...]()
    if isinstance(event.error, NoPlanError) and state.phase == "serving":
        crowded = state.crowded | {move.placement.stages}
        state = replace(state, crowded=crowded, crowded_until=now + plans.CROWDED_SECONDS)
    state, commands = transition.give_up(state, reason, now, failed=True)
    if state.phase == "moving":
        state, more = transition.load(state, move.placement, now)
    elif blamed != event.member:
        state = state.failed_over(event.member, blamed)
        state, more = plans.measure(state)
    return state, (*commands, *more)


def _blamed(state: ClusterState, event: StageBroken) -> int:
    for i in state.alive():
        if event.peer is not None and state.incarnation(i) == event.peer:
            return i
    return event.member


def _stalled(state: ClusterState, member: int) -> Outcome:
    """Replaces the control connection to a node, if it is still silent: a new one works."""
    heartbeat = state.members[member].heartbeat
    if not state.members[member].alive or heartbeat.waiting is None:
        return state, ()
    return state.changed(member, heartbeat=replace(heartbeat, waiting=None)), (Redial(member),)


def _tick(state: ClusterState, event: Tick, now: float) -> Outcome:
    state, beats = _beats(state, event, now)
    commands: tuple[Command, ...] = ()
    if state.phase == "gathering":
        state, commands = _gathered(state, now)
    elif state.phase in ("measuring", "planning", "waiting") and _tired(state, now):
        assert state.failure is not None, "waiting has a reason"
        state, commands = plans.end(state, state.failure, now)
    elif state.phase == "waiting" and state.unreachable and now - state.since >= RETRY_SECONDS:
        retry = replace(state, measured=state.measured - state.unreachable, unreachable=frozenset())
        state, commands = plans.advance(plans.enter(retry, "measuring", now), now)
    elif state.phase == "serving" and event.stalled and not _silent(state, now):
        why = "the chain stands still, and no node reports a fault"
        state, more = _again(state, why, now, anew=True)
        commands = (Say(f"{why}: its stages are loaded again"), *more)
    elif state.transition is not None:
        state, commands = _hurried(state, state.transition, now)
    elif state.phase == "serving":
        state, commands = plans.reconsidered(state, now)
        if not event.busy:
            state, more = plans.measure_again(state, now)
            commands += more
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


def _tired(state: ClusterState, now: float) -> bool:
    return not state.open_ended and state.waiting is not None and now - state.waiting >= state.timing.patience


def _silent(state: ClusterState, now: float) -> bool:
    """Whether a node of the chain is late with an answer, which may be why the chain stands still."""
    heartbeats = (state.members[i].heartbeat for i in state.holders())
    return any(heartbeat.silence(now) > heartbeat.trip.suspect() for heartbeat in heartbeats)


def _beats(state: ClusterState, event: Tick, now: float) -> Outcome:
    """Pings the nodes, tries those anew whose answer is late, and removes those that are silent for too long.
    A node that loads many weights may be silent for longer."""
    commands: list[Command] = []
    for i in state.alive():
        member, changing = state.members[i], state.phase in ("loading", "moving", "committing")
        heartbeat, timing = member.heartbeat, state.timing
        busy = (state.holds(i) or state.changes(i)) and (changing or event.busy)
        silence = heartbeat.silence(now)
        bound = heartbeat.bound(timing.overdue, busy=busy)
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
        if busy and silence > heartbeat.trip.suspect():
            commands.append(TryAnew(i))
        if heartbeat.due(now, timing.busy if busy else timing.heartbeat):
            state = state.changed(i, heartbeat=heartbeat.ping(now))
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
