"""What a node does with its stage, from order to order: `decide(state, event) -> (state, commands)`, without
I/O or a clock.

    Assign without base   force: loading ──> serving ──next node lost──> stopping ──> standing
    Assign with base      change: preparing ──> prepared ──Commit──> moving ──> adopting ──> force: serving
                                      └─────────────┴── Abort, or a fault: the force goes on as it was
           and the base has ended    force: serving ──> stopping ──> standing, and then it prepares

`force` is the stage of the epoch in force, and `change` is what is prepared beside it. A stage whose next
node is lost stands still with its keys and values until the next order. After Commit the stage has left the
old epoch, so a fault drops everything, and the coordinator assigns units anew.

Orders are the coordinator's messages. All other events say that a command has been carried out, and events
of epochs that are over are ignored. Commands of one event are carried out in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .messages import Abort, Assign, Broken, Commit, Epoch, Gift, Peer, Release


class Due(NamedTuple):
    """A part of a phase that is not over: `weights` to load, the `next` node to reach, keys and values to
    `copy` ahead to a taker, the `loop` to stop, the `tail` to send to a taker, a giver's `complete`. `peer`
    is the taker's or giver's incarnation."""

    what: Literal["weights", "next", "copy", "loop", "tail", "complete"]
    peer: int = 0


WEIGHTS, NEXT, LOOP = Due("weights"), Due("next"), Due("loop")


@dataclass(frozen=True, slots=True)
class Force:
    """The stage in force. It accepts rows of its epoch while it is `serving`."""

    assign: Assign
    phase: Literal["loading", "serving", "stopping", "standing"]


@dataclass(frozen=True, slots=True)
class Change:
    """The stage of a transition. `due` is what is left of the phase, and `completed` the givers that have
    sent Complete. `opened`: it has a stage of its own, since the node has none in the base epoch."""

    assign: Assign
    phase: Literal["preparing", "prepared", "moving", "adopting"]
    due: frozenset[Due]
    completed: frozenset[int] = frozenset()
    commit: Commit | None = None
    opened: bool = False


@dataclass(frozen=True, slots=True)
class NodeState:
    """The state of a node for its coordinator."""

    force: Force | None = None
    change: Change | None = None
    newest: Epoch | None = None
    """The epoch of the last Assign."""

    @property
    def epoch(self) -> Epoch | None:
        """The epoch in force; None if there is none."""
        return None if self.force is None else self.force.assign.epoch

    def awaits(self, epoch: Epoch) -> bool:
        """Whether a giver's messages of this epoch are those of a transition whose Assign may be on its
        way."""
        return self.newest is None or epoch > self.newest

    def taken(self, epoch: Epoch, giver: int) -> frozenset[int] | None:
        """The units whose keys and values are accepted from a giver; None if none are in that epoch, or not
        any more."""
        change = self.change
        if change is None or change.assign.epoch != epoch or giver in change.completed:
            return None
        takes = [take for take in change.assign.takes if take.giver == giver]
        return frozenset(u for take in takes for u in range(take.first, take.last)) if takes else None


# --- events: orders, and


@dataclass(frozen=True, slots=True)
class Ready:
    """The stage of the epoch is loaded."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Reached:
    """The next node of the epoch is connected."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Copied:
    """Little is left to send to the taker before the commit."""

    epoch: Epoch
    taker: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The giver has sent Complete, and all that it sent before has been imported."""

    epoch: Epoch
    giver: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The loop of the stage has ended, and no call of it runs."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Sent:
    """The rest of the positions of the commit and Complete have been sent to the taker."""

    epoch: Epoch
    taker: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """The stage has changed to the range and the sessions of the epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Gone:
    """The coordinator has disconnected."""


Order = Assign | Commit | Abort | Release
Event = Order | Ready | Reached | Copied | Completed | Stopped | Sent | Adopted | Broken | Gone
"""A Broken is a fault in the epoch that it names: without `peer` one of the stage itself, else one of a
connection."""


# --- commands


@dataclass(frozen=True, slots=True)
class OpenStage:
    """Load the units of an assignment as a stage of its own. Then Ready."""

    assign: Assign


@dataclass(frozen=True, slots=True)
class Prepare:
    """Prepare the units of an assignment beside the running ones of the same stage. Then Ready."""

    assign: Assign


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to the next node. Then Reached, and Broken when the connection ends."""

    epoch: Epoch
    peer: Peer


@dataclass(frozen=True, slots=True)
class CopyAhead:
    """Connect to a taker and send it keys and values of finished positions, again and again, of the units of
    these gifts. Then Copied, and Broken when the connection ends before Complete has been sent."""

    epoch: Epoch
    taker: Peer
    gifts: tuple[Gift, ...]


@dataclass(frozen=True, slots=True)
class StopLoop:
    """Run no rows of the epoch any more, and close the connection to its next node. Then Stopped."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class SendTail:
    """Send the taker what it lacks of the commit's sessions, and Complete. Then Sent."""

    commit: Commit
    taker: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Change the stage to the prepared range and the commit's sessions. Then Adopted."""

    assign: Assign
    commit: Commit


@dataclass(frozen=True, slots=True)
class StartLoop:
    """Run rows of the epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Tell:
    """Send the coordinator a report: Prepared or Loaded of the epoch, or what is broken."""

    what: Literal["prepared", "loaded"] | Broken
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Drop:
    """Undo all that was done for an epoch, close its connections, and stop its loop. The stage is closed if
    the epoch is in force, or if it was opened for this one."""

    epoch: Epoch


Command = OpenStage | Prepare | Dial | CopyAhead | StopLoop | SendTail | Adopt | StartLoop | Tell | Drop
Outcome = tuple[NodeState, tuple[Command, ...]]


def decide(state: NodeState, event: Event) -> Outcome:
    """The state after an event, and the commands to carry out."""
    match event:
        case Assign():
            return _assigned(replace(state, newest=event.epoch), event)
        case Commit():
            return _committed(state, event)
        case Abort(epoch):
            change = state.change
            if change is None or change.assign.epoch != epoch or change.commit is not None:
                return state, ()
            return replace(state, change=None), (Drop(epoch),)
        case Release() | Gone():
            return _dropped(state)
        case Broken():
            return _broken(state, event)
        case Completed(epoch, giver):
            change = state.change
            if change is None or change.assign.epoch != epoch:
                return state, ()
            change = replace(change, completed=change.completed | {giver})
            return _done(replace(state, change=change), epoch, Due("complete", giver))
        case Ready(epoch):
            return _done(state, epoch, WEIGHTS)
        case Reached(epoch):
            return _done(state, epoch, NEXT)
        case Copied(epoch, taker):
            return _done(state, epoch, Due("copy", taker))
        case Sent(epoch, taker):
            return _done(state, epoch, Due("tail", taker))
        case Stopped(epoch):
            return _stopped(state, epoch)
        case Adopted(epoch):
            return _adopted(state, epoch)


def _assigned(state: NodeState, assign: Assign) -> Outcome:
    """A new order replaces what is prepared, and without its base in force the whole stage."""
    if assign.base is None:
        state, dropped = _dropped(state)
        return replace(state, force=Force(assign, "loading")), (*dropped, OpenStage(assign))
    force = state.force
    based = (
        force is not None
        and force.phase != "loading"
        and force.assign.epoch == replace(assign.epoch, counter=assign.base)
        and (state.change is None or state.change.commit is None)
    )
    commands: tuple[Command, ...] = ()
    if not based:
        state, commands = _dropped(state)
    elif state.change is not None:
        commands = (Drop(state.change.assign.epoch),)
    due = set[Due]()
    stops = based and assign.ended and force is not None and force.phase in ("serving", "stopping")
    if stops and force is not None and force.phase == "serving":
        commands += (StopLoop(force.assign.epoch),)
        state = replace(state, force=replace(force, phase="stopping"))
    if assign.first < assign.last:
        due.add(WEIGHTS)
        if not stops:  # else once the loop has ended
            commands += (Prepare(assign) if based else OpenStage(assign),)
    if assign.next is not None:
        commands += (Dial(assign.epoch, assign.next),)
        due.add(NEXT)
    for taker in _takers(assign):
        gifts = tuple(gift for gift in assign.gives if gift.taker.incarnation == taker.incarnation)
        commands += (CopyAhead(assign.epoch, taker, gifts),)
        due.add(Due("copy", taker.incarnation))
    state = replace(state, change=Change(assign, "preparing", frozenset(due), opened=not based))
    state, more = _advanced(state)
    return state, (*commands, *more)


def _takers(assign: Assign) -> list[Peer]:
    """The nodes to which keys and values go, each once."""
    return list({gift.taker.incarnation: gift.taker for gift in assign.gives}.values())


def _committed(state: NodeState, commit: Commit) -> Outcome:
    """No rows are on their way: the loop stops, the tails follow, and then the stage changes."""
    change, force = state.change, state.force
    if change is None or change.assign.epoch != commit.epoch or change.phase != "prepared":
        return state, ()  # it broke at the same time, and the coordinator has been told
    givers = {take.giver for take in change.assign.takes} - change.completed
    due = {Due("tail", taker.incarnation) for taker in _takers(change.assign)}
    due |= {Due("complete", giver) for giver in givers}
    commands: tuple[Command, ...] = ()
    if force is not None and force.phase != "standing":
        due.add(LOOP)
        if force.phase == "serving":
            commands = (StopLoop(force.assign.epoch),)
            force = replace(force, phase="stopping")
    change = replace(change, phase="moving", commit=commit, due=frozenset(due))
    state, more = _advanced(replace(state, force=force, change=change))
    if LOOP not in due:
        more = (*_tails(change), *more)
    return state, (*commands, *more)


def _tails(change: Change) -> tuple[Command, ...]:
    assert change.commit is not None
    return tuple(SendTail(change.commit, taker.incarnation) for taker in _takers(change.assign))


def _stopped(state: NodeState, epoch: Epoch) -> Outcome:
    force, change = state.force, state.change
    if force is None or force.assign.epoch != epoch or force.phase != "stopping":
        return state, ()
    state = replace(state, force=replace(force, phase="standing"))
    if change is not None and change.assign.ended and WEIGHTS in change.due:
        return state, (Prepare(change.assign),)
    if change is None or change.phase != "moving":
        return state, ()
    state, commands = _done(state, change.assign.epoch, LOOP)
    return state, (*_tails(change), *commands)


def _done(state: NodeState, epoch: Epoch, due: Due) -> Outcome:
    """A part of a phase is over."""
    force, change = state.force, state.change
    if change is not None and change.assign.epoch == epoch:
        if due not in change.due:
            return state, ()
        return _advanced(replace(state, change=replace(change, due=change.due - {due})))
    if force is None or force.assign.epoch != epoch or force.phase != "loading":
        return state, ()
    if due == WEIGHTS and force.assign.next is not None:
        return state, (Dial(epoch, force.assign.next),)
    return replace(state, force=replace(force, phase="serving")), (StartLoop(epoch), Tell("loaded", epoch))


def _advanced(state: NodeState) -> Outcome:
    """Goes on to the next phase of the change if nothing of this one is due."""
    change = state.change
    assert change is not None
    epoch = change.assign.epoch
    if change.due:
        return state, ()
    if change.phase == "preparing":
        return replace(state, change=replace(change, phase="prepared")), (Tell("prepared", epoch),)
    if change.phase != "moving":
        return state, ()
    if change.assign.first == change.assign.last:
        state, dropped = _dropped(state)
        return state, (Tell("loaded", epoch), *dropped)
    assert change.commit is not None
    return replace(state, change=replace(change, phase="adopting")), (Adopt(change.assign, change.commit),)


def _adopted(state: NodeState, epoch: Epoch) -> Outcome:
    change = state.change
    if change is None or change.assign.epoch != epoch or change.phase != "adopting":
        return state, ()
    state = replace(state, force=Force(change.assign, "serving"), change=None)
    return state, (StartLoop(epoch), Tell("loaded", epoch))


def _broken(state: NodeState, fault: Broken) -> Outcome:
    """A fault of the change before its commit leaves the force as it is; a later one drops both. A stage
    whose next node is lost stands still."""
    force, change = state.force, state.change
    told = Tell(fault, fault.epoch)
    if change is not None and change.assign.epoch == fault.epoch:
        if change.commit is None:
            return replace(state, change=None), (Drop(fault.epoch), told)
        state, dropped = _dropped(state)
        return state, (*dropped, told)
    if force is None or force.assign.epoch != fault.epoch or force.phase in ("stopping", "standing"):
        return state, ()
    if fault.peer is None:
        state, dropped = _dropped(state)
        return state, (*dropped, told)
    if force.phase == "loading":
        return replace(state, force=replace(force, phase="standing")), (told,)
    return replace(state, force=replace(force, phase="stopping")), (StopLoop(fault.epoch), told)


def _dropped(state: NodeState) -> Outcome:
    parts = [part.assign.epoch for part in (state.change, state.force) if part is not None]
    return replace(state, force=None, change=None), tuple(Drop(epoch) for epoch in parts)
