"""The coordinator's decisions about its nodes: `decide(state, event, now) -> (state, commands)`, without I/O
or a clock.

    gathering ──> measuring ──> planning ──> loading ──all loaded──> serving
                      ↑            ↑ │                      │           │
                      │            └─┼──── a node is lost ──┴───────────┘
                      └── waiting <──┘ no plan
    failed: reached from any phase, and final

Each plan that is carried out gets an epoch of its own. The loss of a node that holds a stage ends the epoch,
and the others are planned for at once. Nodes are dialled again for as long as the coordinator lives. One that
comes back is used where a plan needs it, or when a plan with it is better than the one in force. If the
others cannot hold the model, the coordinator waits for nodes, for a bounded time. Before the first plan, the
user is still at the terminal: a node that cannot be reached is left out if the others suffice, and is an
error otherwise.

`now` is in seconds of a monotonic clock that stands still while this process does not run (liveness.Awake).
"""

from __future__ import annotations

from dataclasses import replace

from ..engine.errors import NoPlanError, ShoalError
from ..planner.groups import plain_groupings
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
    Pause,
    Planned,
    Proposed,
    Quiet,
    Reached,
    Redial,
    Say,
    SendAssign,
    SendPing,
    SendRelease,
    Serve,
    StageBroken,
    StageLoaded,
    StagePrepared,
    Stalled,
    Tick,
    TryAnew,
)
from .identity import host_port
from .liveness import Pulse, call_bound, load_bound
from .members import ClusterState, Phase, labelled, peer_of
from .messages import Assign, Epoch
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
        case StageLoaded(member, epoch):
            return _loaded(state, member, epoch, now)
        case StageBroken():
            return _broken(state, event, now)
        case Stalled(member):
            return _stalled(state, member)
        case Tick():
            return _tick(state, event, now)
        case Proposed() | StagePrepared() | Reached() | Quiet():
            return state, ()


def check_placement(state: ClusterState, placement: Placement) -> None:
    """Checks a plan. LocalProtocolError, since plans are made by our own code: it does not cover the units in
    order, or names an absent node, or a node twice."""
    edges = [0, *(stage.last for stage in placement.stages)]
    if (
        [stage.first for stage in placement.stages] != edges[:-1]
        or sorted(set(edges)) != edges
        or edges[-1] != state.units
    ):
        raise LocalProtocolError(f"the plan's stages {edges} do not cover units 0 to {state.units} in order")
    names = [stage.device for stage in placement.stages]
    there = {state.members[i].label for i in state.alive()}
    if len(set(names)) < len(names) or not set(names) <= there:
        raise LocalProtocolError(f"the plan names {names}; each must be one of {sorted(there)}, once")
    if placement.chunk_rows < 1:
        raise LocalProtocolError(f"the plan has chunks of {placement.chunk_rows} rows")


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
    was, held = state.members[member].alive, state.holds(member)
    state = state.changed(
        member,
        hello=event.hello,
        lost=None,
        joined=before.joined if was else now,
        pulse=Pulse(before.pulse.trip, now),
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
    elif was and held:  # only the connection is new
        state, more = _load_again(state, now)
    else:
        if not was:
            told = "has joined" if before.hello is None else "is back"
            commands += (Say(f"{state.members[member].called} {told}"),)
        state, more = _advance(state, now)
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
    held, strict = state.holds(member), not state.recover
    at_fault = lost.alive and own and not isinstance(error, NodeLostError | StageStuckError)
    state = state.changed(
        member,
        lost=error,
        losses=lost.losses + lost.alive,
        faulty=state.incarnation(member) if at_fault else lost.faulty,
    )
    if strict and (held or not state.served):
        return _fail(state, error)
    if state.phase == "gathering":
        return _gathered(state, now)
    ended: tuple[Command, ...] = ((HangUp(member),) if hang_up else ()) + (Say(str(error)),)
    if held:
        paused = Pause(state.epoch)
        state, commands = _advance(_enter(state, "measuring", now), now)
        return state, (*ended, paused, *commands)
    if state.phase == "planning":
        state, commands = _plan(state, now)
    elif state.phase == "measuring":
        state, commands = _advance(state, now)
    elif state.trial:  # it may be in that plan
        state, commands = replace(state, trial=False, plans=state.plans + 1), ()
    else:
        commands = ()
    return state, (*ended, *commands)


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
    paused: tuple[Command, ...] = ()
    if state.phase == "serving" and state.trial:
        state = replace(state, trial=False)
        if isinstance(answer, ShoalError) or not _better(answer, state.placement):
            return state, ()
        paused = (Say("a plan with more nodes is better: changing to it"), Pause(state.epoch))
    elif state.phase != "planning":
        return state, ()
    if isinstance(answer, NoPlanError):
        return _no_plan(state, answer, now)
    if isinstance(answer, ShoalError):
        return _fail(state, answer)
    try:
        check_placement(state, answer)
    except LocalProtocolError as error:
        return _fail(state, error)
    state, commands = _load(replace(state, placement=answer), now)
    return state, (*paused, *commands)


def _better(plan: Placement, old: Placement) -> bool:
    """Whether a plan is worth the interruption: it holds a longer context, or is faster by GAIN."""
    faster = plan.tokens_per_s > GAIN * old.tokens_per_s
    return plan.context > old.context or (plan.context == old.context and faster)


def _no_plan(state: ClusterState, reason: NoPlanError | None, now: float) -> Outcome:
    """Waits for nodes, if there was a plan once and a node is lost. `reason` None: no node is left."""
    if reason is not None and state.unmeasured():  # newcomers may change that
        return _measure(_enter(state, "measuring", now))
    if reason is not None and state.considered != {state.incarnation(i) for i in state.usable()}:
        return _plan(state, now)
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
    said = (Say(f"waiting for nodes, {state.timing.patience:g} s at most"),) if state.waiting is None else ()
    return replace(_enter(state, "waiting", now), waiting=since, failure=error), said


# --- epochs


def _load(state: ClusterState, now: float) -> Outcome:
    """Begins an epoch with the placement of the state."""
    epoch = replace(state.epoch, counter=state.epoch.counter + 1)
    state = replace(_enter(state, "loading", now), epoch=epoch, loaded=frozenset(), trial=False)
    holders = state.holders()
    peers = [peer_of(state.members[i]) for i in holders]
    before = (epoch.coordinator, *(peer.incarnation for peer in peers[:-1]))
    placement = state.placement
    groupings = placement.groupings or plain_groupings(len(placement.stages))
    assigns = tuple(
        SendAssign(
            i,
            Assign(epoch, stage.first, stage.last, after, placement.chunk_rows, previous, groupings),
        )
        for i, stage, after, previous in zip(
            holders, placement.stages, (*peers[1:], None), before, strict=True
        )
    )
    idle = tuple(SendRelease(i, epoch) for i in state.alive() if i not in holders)
    return state, (*idle, *assigns)


def _load_again(state: ClusterState, now: float) -> Outcome:
    """Begins another epoch with the placement in force."""
    ended = state.epoch
    quick = now - state.since < QUICK_SECONDS
    state, commands = _load(replace(state, again=state.again + 1 if quick else 1), now)
    return state, (Pause(ended), *commands)


def _loaded(state: ClusterState, member: int, epoch: Epoch, now: float) -> Outcome:
    if state.phase != "loading" or epoch != state.epoch or member not in state.holders():
        return state, ()
    state = replace(state, loaded=state.loaded | {member})
    if state.loaded != frozenset(state.holders()):
        return state, ()
    state = replace(_enter(state, "serving", now), served=True)
    return state, (Serve(epoch),)


# --- faults


def _heard(state: ClusterState, event: Heard, now: float) -> Outcome:
    """Removes a node of which a call has been running for too long. The bound of a call whose time is not
    predicted is that of loading the stage, which it may do."""
    member, progress = state.members[event.member], event.progress
    state = state.changed(
        event.member, pulse=member.pulse.heard(now - member.pulse.pinged if event.answered else None)
    )
    if progress is None or progress.epoch != state.epoch or progress.running is None:
        return state, ()
    if not member.alive or not state.holds(event.member):
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


def _broken(state: ClusterState, event: StageBroken, now: float) -> Outcome:
    """Removes the node at fault: the sender, whose stage failed, or the next node, which it cannot reach. If
    only a connection has failed, the same chain begins another epoch, unless that has not helped before."""
    if event.epoch != state.epoch or state.phase not in ("loading", "serving"):
        return state, ()
    if event.again and state.again < MOST_AGAIN:
        return _load_again(state, now)
    blamed = event.member
    for i in state.alive():
        if event.peer is not None and state.incarnation(i) == event.peer:
            blamed = i
    if blamed != event.member:  # the link between them may be another now
        state = replace(state, measured=state.measured - {state.ends(event.member, blamed)})
    return _left(state, blamed, event.error, now, own=event.peer is None)


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
    elif state.phase not in ("serving", "failed") and _tired(state, now):
        assert state.failure is not None, "waiting has a reason"
        state, commands = _fail(state, state.failure)
    elif state.phase == "waiting" and state.unreachable and now - state.since >= RETRY_SECONDS:
        retry = replace(state, measured=state.measured - state.unreachable, unreachable=frozenset())
        state, commands = _advance(_enter(retry, "measuring", now), now)
    elif state.phase == "serving" and event.stalled and not _silent(state, now):
        said = Say("the chain stands still, and no node reports a fault: its stages are loaded again")
        state, more = _load_again(state, now)
        commands = (said, *more)
    elif state.phase == "serving":
        state, commands = _reconsidered(state, now)
    return state, (*beats, *commands)


def _silent(state: ClusterState, now: float) -> bool:
    """Whether a node of the chain is late with an answer, which may be why the chain stands still."""
    pulses = (state.members[i].pulse for i in state.holders())
    return any(pulse.silence(now) > pulse.trip.suspect() for pulse in pulses)


def _tired(state: ClusterState, now: float) -> bool:
    return state.waiting is not None and now - state.waiting >= state.timing.patience


def _reconsidered(state: ClusterState, now: float) -> Outcome:
    """Asks for a plan with nodes that have joined since the last one."""
    if now - state.since < SETTLED_SECONDS:
        return state, ()
    state = replace(state, waiting=None, failure=None)
    if state.trial:
        return state, ()
    for i in state.usable():
        member = state.members[i]
        settled = min(MOST_SETTLED, SETTLED_SECONDS * 2.0 ** (max(0, member.losses - 1)))
        if state.incarnation(i) not in state.considered and now - member.joined >= settled:
            return _plan(state, now, trial=True)
    return state, ()


def _beats(state: ClusterState, event: Tick, now: float) -> Outcome:
    """Pings the nodes, tries those anew whose answer is late, and removes those that are silent for too long.
    A node that loads many weights may be silent for longer."""
    commands: list[Command] = []
    for i in state.alive():
        member, loading = state.members[i], state.phase == "loading"
        pulse, timing = member.pulse, state.timing
        busy = state.holds(i) and (loading or event.busy)
        silence = pulse.silence(now)
        bound = pulse.bound(timing.overdue, busy=busy)
        if busy and loading:
            stage = state.placement.stages[state.holders().index(i)]
            bound = min(timing.overdue, bound + state.bytes_of(stage) / BUSY_BYTES_PER_S)
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
    loading = state.phase == "loading" and state.holds(member) and member not in state.loaded
    return loading and now - state.since > state.load_bound()
