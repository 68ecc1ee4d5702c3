"""Transitions from one epoch to the next: the coordinator's decisions, without I/O or a clock.

    preparing ──all prepared, first node reached──> holding ──quiet──> committed ──all loaded──> served
        └──────────────── fault, too late ─────────────┴──> given up: the base goes on

The base is the epoch in force. Its chain runs until the hold, or has ended before: then the nodes that are
left still have their stages, with all keys and values (`ClusterState.standing`). What a node held that is
lost, no node has: these units are filled again after the transition, and nothing else is computed twice.

Where no stage is left to go on from, and after a fault between Commit and the last Loaded, an epoch is loaded
anew (`load`), and all tokens are sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from ..planner.groups import plain_groupings
from .events import (
    Command,
    Hold,
    Moved,
    Pause,
    Quiet,
    Reach,
    Resume,
    Say,
    SendAbort,
    SendAssign,
    SendCommit,
    SendRelease,
    Serve,
    Shift,
    StagePrepared,
    Unreach,
)
from .liveness import load_bound
from .members import ClusterState, Setback, Transition, peer_of
from .messages import Assign, Commit, Epoch, Gift, Take
from .placement import Placement

COPY_SECONDS, COPY_FACTOR = 60.0, 4.0
"""Keys and values may be copied ahead for COPY_FACTOR times as long as predicted, and at least for
COPY_SECONDS: rows go first, so a link that is busy with answers delays them."""
HOLD_SECONDS = 10.0
"""The longest wait for the Steps on their way. Chunks of a prompt may be among them."""
COMMIT_SECONDS = 30.0
"""The longest time from Commit to the last Loaded, in which only the newest positions are sent."""
SETBACK_SECONDS, MOST_SETBACK = 5.0, 60.0
"""The time before a transition is tried again that was given up; doubled by each that follows."""
MOST_GIFTS = 64
"""The most of `gives`, or `takes`, of an Assign."""

Outcome = tuple[ClusterState, tuple[Command, ...]]
Flow = tuple[int, int, int, int]
"""Units [first, last) that move, their giver and their taker."""


def flows(before: Sequence[int | None], after: Sequence[int]) -> tuple[tuple[Flow, ...], tuple[int, int]]:
    """The units whose keys and values move, in runs, and the range of those that are lost. `before` and
    `after` name the holder of each unit; None: there is none. The range is the smallest that covers all lost
    units, and those within it do not move. The last unit, the LM head, has no keys and values to lose."""
    gone = [unit for unit, holder in enumerate(before[:-1]) if holder is None]
    lost = (gone[0], gone[-1] + 1) if gone else (0, 0)
    moving = [
        (unit, giver, taker)
        for unit, (giver, taker) in enumerate(zip(before, after, strict=True))
        if giver is not None and giver != taker and not lost[0] <= unit < lost[1]
    ]
    runs = groupby(enumerate(moving), key=lambda item: (item[1][0] - item[0], *item[1][1:]))
    found = []
    for (_, giver, taker), run in runs:
        units = [unit for _, (unit, _, _) in run]
        found.append((units[0], units[-1] + 1, giver, taker))
    return tuple(found), lost


def load(state: ClusterState, placement: Placement, now: float) -> Outcome:
    """Begins an epoch without a base: nodes drop what they hold, and load their stages."""
    epoch = state.next_epoch()
    state = replace(
        state, phase="loading", since=now, epoch=epoch, issued=epoch.counter, placement=placement,
        added=(), loaded=frozenset(), standing=frozenset(),
    )  # fmt: skip
    holders = state.holders()
    idle = tuple(SendRelease(i, epoch) for i in state.alive() if i not in holders)
    assigns = _orders(state, placement, epoch)
    return state, (*idle, *(SendAssign(i, assign) for i, assign in assigns.items()))


def begin(state: ClusterState, placement: Placement, why: str, now: float, copying: float = 0.0) -> Outcome:
    """Begins the transition to a placement, from a chain that is served or one that has ended. Loads anew if
    that is asked for, or if there is nothing to go on from."""
    holders = state.holders_of(placement)
    stages = zip(holders, placement.stages, strict=True)
    after = [i for i, stage in stages for _ in range(stage.first, stage.last)]
    standing = state.standing_units()
    moving, lost = flows(standing, after) if state.standing else ((), (0, 0))
    informed = state.standing | {taker for *_, taker in moving}
    informed |= {i for unit, i in enumerate(after) if lost[0] <= unit < lost[1]}
    if standing and standing[-1] is None and lost[1] == state.units - 1:
        informed |= {after[-1]}  # what fills the layers before the LM head goes on to it (generation.loss_of)
    ended: tuple[Command, ...] = (Pause(state.epoch),) if state.phase == "serving" else ()
    if (
        state.moves == "reload"
        or not state.standing
        or not informed >= set(holders)  # nobody would tell it the sessions' tokens
        or len(moving) > MOST_GIFTS
    ):
        state, commands = load(state, placement, now)
        return state, (*ended, *commands)
    epoch, base, recovery = state.next_epoch(), state.epoch.counter, state.phase != "serving"
    labels = [member.label for member in state.members]
    members = (*holders, *sorted(state.standing - set(holders)))
    orders = _orders(state, placement, epoch)
    commands = tuple(
        SendAssign(
            i,
            replace(
                orders.get(i, _emptied(epoch, placement)),
                base=base,
                ended=recovery,
                gives=tuple(
                    Gift(peer_of(state.members[taker]), first, last, taker not in state.standing)
                    for first, last, giver, taker in moving
                    if giver == i
                ),
                takes=tuple(
                    Take(state.incarnation(giver), first, last)
                    for first, last, giver, taker in moving
                    if taker == i
                ),
            ),
        )
        for i in members
    )
    added = tuple(state.adds(placement, i) for i in range(len(state.members)))
    copy = max(COPY_SECONDS, COPY_FACTOR * copying) if moving else 0.0
    move = Transition(
        epoch, base, placement, why, members,
        tuple(Shift(first, last, labels[giver], labels[taker]) for first, last, giver, taker in moving),
        lost, added, recovery, began=now, since=now, bound=load_bound(max(added)) + copy,
    )  # fmt: skip
    state = replace(state, transition=move, issued=epoch.counter)
    if recovery:
        state = replace(state, phase="moving", since=now)
    return state, (*commands, Reach(epoch, holders[0]))


def _orders(state: ClusterState, placement: Placement, epoch: Epoch) -> dict[int, Assign]:
    """The assignments of a placement's stages, by member, without base."""
    holders = state.holders_of(placement)
    peers = [peer_of(state.members[i]) for i in holders]
    before = (epoch.coordinator, *(peer.incarnation for peer in peers[:-1]))
    groupings = placement.groupings or plain_groupings(len(placement.stages))
    return {
        i: Assign(epoch, stage.first, stage.last, after, placement.chunk_rows, previous, groupings)
        for i, stage, after, previous in zip(
            holders, placement.stages, (*peers[1:], None), before, strict=True
        )
    }


def _emptied(epoch: Epoch, placement: Placement) -> Assign:
    """The assignment of a node that loses all of its units."""
    return Assign(epoch, 0, 0, None, placement.chunk_rows, epoch.coordinator)


# --- the way to the next epoch


def prepared(state: ClusterState, event: StagePrepared, now: float) -> Outcome:
    """A node has prepared its stage."""
    move = state.transition
    if move is None or move.step != "preparing" or move.epoch != event.epoch:
        return state, ()
    if event.member not in move.members or event.member in move.prepared:
        return state, ()
    move = replace(move, prepared=move.prepared | {event.member}, sent=move.sent + event.sent)
    return _held(state, move, now)


def reached(state: ClusterState, epoch: Epoch, now: float) -> Outcome:
    """The coordinator is connected to the first node of the prepared chain."""
    move = state.transition
    if move is None or move.step != "preparing" or move.epoch != epoch:
        return state, ()
    return _held(state, replace(move, reached=True), now)


def _held(state: ClusterState, move: Transition, now: float) -> Outcome:
    """Holds the chain if nothing else is to be prepared."""
    if not move.reached or move.prepared != set(move.members):
        return replace(state, transition=move), ()
    move = replace(move, step="holding", since=now, held=now)
    return replace(state, transition=move), (Hold(move.epoch, state.epoch),)


def quiet(state: ClusterState, event: Quiet, now: float) -> Outcome:
    """Commits: no Step is on its way, and no way leads back."""
    move = state.transition
    if move is None or move.step != "holding" or move.epoch != event.epoch:
        return state, ()
    state = replace(
        state, phase="committing", epoch=move.epoch, placement=move.placement, loaded=frozenset(),
        standing=frozenset(), transition=replace(move, step="committed", since=now),
    )  # fmt: skip
    commit = Commit(move.epoch, event.sessions, *move.lost)
    return state, tuple(SendCommit(i, commit) for i in move.members)


def loaded(state: ClusterState, member: int, epoch: Epoch, now: float) -> Outcome:
    """A node has its stage of the epoch. When all have, the chain is served."""
    move, holders = state.transition, frozenset(state.holders())
    if state.phase not in ("loading", "committing") or epoch != state.epoch:
        return state, ()
    awaited = holders if move is None else frozenset(move.members)
    if member not in awaited:
        return state, ()
    state = replace(state, loaded=state.loaded | {member})
    if state.loaded != awaited:
        return state, ()
    state = replace(
        state, phase="serving", served=True, loaded=holders, standing=holders, crowded=frozenset()
    )
    for i in holders:
        if state.members[i].unloaded is not None:  # its memory was short for a while only
            state = state.changed(i, unloaded=None)
    if move is None:
        return replace(state, since=now), (Serve(epoch),)
    emptied = tuple(SendRelease(i, epoch) for i in move.members if i not in holders)
    since = now if move.recovery else state.since  # answers have gone on
    state = replace(state, since=since, moved=now, added=move.added, transition=None, setback=None)
    return state, (Serve(epoch, move.base, move.lost), *emptied, _moved(move, now))


def _moved(move: Transition, now: float, failure: str = "") -> Moved:
    held = 0.0 if move.held is None else now - move.held
    return Moved(
        move.epoch, move.why, move.shifts, move.lost, move.recovery, now - move.began, held, move.sent,
        failure,
    )  # fmt: skip


# --- ends


def give_up(state: ClusterState, reason: str, now: float, *, failed: bool = False) -> Outcome:
    """Ends a transition before its commit: the base stays as it is. `failed`: the same one would probably
    fail again soon, and the user is told why this one did."""
    move = state.transition
    assert move is not None and move.step != "committed"
    commands: list[Command] = [SendAbort(i, move.epoch) for i in move.members if state.members[i].alive]
    commands.append(Unreach(move.epoch))
    if state.phase == "serving" and move.step == "holding":
        commands.append(Resume(state.epoch))
    if failed:
        kept = "the layers are loaded again" if move.recovery else "the layers stay where they are"
        commands.append(Say(f"{kept}: {reason}"))
        count = 1 if state.setback is None else state.setback.count + 1
        pause = min(MOST_SETBACK, SETBACK_SECONDS * 2.0 ** (count - 1))
        state = replace(state, setback=Setback(move.placement.stages, count, now + pause))
    commands.append(_moved(move, now, reason))
    state = replace(state, transition=None, considered=state.considered - state.growing(move.members))
    return state, tuple(commands)


def end_chain(state: ClusterState, reason: str, now: float) -> Outcome:
    """Ends the epoch in force and what is prepared beside it. The stages of a chain that was served stand;
    those of one that was not drop what they have with the next order."""
    phase, move = state.phase, state.transition
    state = replace(state, phase="measuring", since=now)
    commands: tuple[Command, ...] = ()
    if move is not None and move.step == "committed":
        state, commands = replace(state, transition=None), (_moved(move, now, reason),)
    elif move is not None:
        state, commands = give_up(state, reason, now)
    if phase in ("loading", "committing"):
        state = replace(state, standing=frozenset())
    return state, (*commands, Pause(state.epoch))


def too_late(state: ClusterState, now: float) -> str | None:
    """The reason why the transition has taken too long, if it has."""
    move = state.transition
    if move is None:
        return None
    seconds = now - move.since
    if move.step == "preparing" and seconds > move.bound:
        behind = [state.members[i].called for i in move.members if i not in move.prepared]
        return f"{', '.join(behind) or 'the coordinator'} could not prepare within {seconds:.0f} s"
    if move.step == "holding" and seconds > HOLD_SECONDS:
        return f"the answers have not paused within {seconds:.0f} s"
    if move.step == "committed" and seconds > COMMIT_SECONDS:
        return f"the nodes have not changed to the new plan within {seconds:.0f} s"
    return None
