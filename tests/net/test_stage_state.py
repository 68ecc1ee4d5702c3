"""What a node does with its stage from order to order, as literals: events in, commands out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Literal

import pytest

from shoal.net.messages import Abort, Assign, Broken, Commit, Epoch, Gift, Kept, Peer, Release, Take
from shoal.net.stage_state import (
    Adopt,
    Adopted,
    Command,
    Completed,
    Copied,
    CopyAhead,
    Dial,
    Drop,
    Event,
    Force,
    Gone,
    NodeState,
    OpenStage,
    Prepare,
    Reached,
    Ready,
    SendTail,
    Sent,
    StartLoop,
    StopLoop,
    Stopped,
    Tell,
    decide,
)

OLD, NEW, NEWER = Epoch(5, 1), Epoch(5, 2), Epoch(5, 3)
AFTER = Peer("after", "host", 7002, 72)
TAKER, SECOND = Peer("taker", "host", 7003, 73), Peer("second", "host", 7004, 74)
FIRST = Assign(OLD, 2, 4, AFTER, 8, 99)
GIFT = Gift(TAKER, 3, 4)
MOVE = Assign(NEW, 1, 3, AFTER, 8, 99, base=1, gives=(GIFT,), takes=(Take(71, 1, 2),))
EMPTY = Assign(NEW, 0, 0, None, 8, 0, base=1, gives=(Gift(TAKER, 2, 3), Gift(SECOND, 3, 4)))
COMMIT = Commit(NEW, (Kept(1, 70),))
STAGE_FAULT, NEXT_FAULT = Broken(NEW, 3, "no memory", None), Broken(NEW, 10, "after is lost", 72)


EMPTY_STATE = NodeState()


def after(*events: Event, state: NodeState = EMPTY_STATE) -> tuple[NodeState, list[Command]]:
    """The state after events, and the commands of the last one."""
    commands: tuple[Command, ...] = ()
    for event in events:
        state, commands = decide(state, event)
    return state, list(commands)


def in_force(assign: Assign, phase: Literal["loading", "serving", "standing"]) -> NodeState:
    return NodeState(Force(assign, phase), newest=assign.epoch)


def serving() -> NodeState:
    state, _ = after(FIRST, Ready(OLD), Reached(OLD))
    return state


def given_up() -> NodeState:
    """The stage serves, and a transition has been given up."""
    return replace(serving(), newest=NEW)


def prepared(assign: Assign = MOVE) -> NodeState:
    takers = {gift.taker.incarnation for gift in assign.gives}
    state, commands = after(
        assign, Ready(NEW), Reached(NEW), *(Copied(NEW, taker) for taker in sorted(takers)), state=serving()
    )
    assert commands == [Tell("prepared", NEW)]
    return state


def test_a_stage_is_loaded_then_reaches_the_next_node_then_serves() -> None:
    state, commands = after(FIRST)
    assert (state, commands) == (in_force(FIRST, "loading"), [OpenStage(FIRST)])
    state, commands = after(Ready(OLD), state=state)
    assert commands == [Dial(OLD, AFTER)]
    state, commands = after(Reached(OLD), state=state)
    assert (state, commands) == (serving(), [StartLoop(OLD), Tell("loaded", OLD)])
    last = replace(FIRST, next=None)
    assert after(last, Ready(OLD))[1] == [StartLoop(OLD), Tell("loaded", OLD)]


def test_an_assignment_without_base_drops_what_there_is() -> None:
    fresh = replace(FIRST, epoch=NEWER)
    assert after(fresh, state=serving()) == (
        in_force(fresh, "loading"),
        [Drop(OLD), OpenStage(fresh)],
    )
    assert after(fresh, state=prepared())[1] == [Drop(NEW), Drop(OLD), OpenStage(fresh)]


@pytest.mark.parametrize("end", [Release(NEWER), Gone()])
def test_a_release_and_the_loss_of_the_coordinator_drop_everything(end: Event) -> None:
    assert after(end) == (NodeState(), [])
    assert after(end, state=serving()) == (NodeState(newest=OLD), [Drop(OLD)])
    assert after(end, state=prepared()) == (NodeState(newest=NEW), [Drop(NEW), Drop(OLD)])
    assert after(COMMIT, end, state=prepared()) == (NodeState(newest=NEW), [Drop(NEW), Drop(OLD)])


def test_a_transition_is_prepared_beside_the_stage_in_force() -> None:
    state, commands = after(MOVE, state=serving())
    assert commands == [Prepare(MOVE), Dial(NEW, AFTER), CopyAhead(NEW, TAKER, (GIFT,))]
    assert state.force == Force(FIRST, "serving")


def test_a_stage_whose_base_has_ended_stops_before_the_next_one_is_prepared() -> None:
    """What is prepared may then take the place of what ran."""
    ended, again = replace(MOVE, ended=True), replace(MOVE, epoch=NEWER, ended=True)
    state, commands = after(ended, state=serving())
    assert commands == [StopLoop(OLD), Dial(NEW, AFTER), CopyAhead(NEW, TAKER, (GIFT,))]
    assert after(Reached(NEW), Copied(NEW, 73), state=state)[1] == []
    stopped, commands = after(Stopped(OLD), state=state)
    assert (stopped.force, commands) == (Force(FIRST, "standing"), [Prepare(ended)])
    ready, commands = after(Reached(NEW), Copied(NEW, 73), Ready(NEW), state=stopped)
    assert commands == [Tell("prepared", NEW)]
    _, commands = after(replace(COMMIT), state=ready)
    assert commands == [SendTail(COMMIT, 73)]
    # Another transition takes its place: while the loop ends, and later.
    _, commands = after(again, Stopped(OLD), state=state)
    assert commands == [Prepare(again)]
    assert Prepare(again) in after(again, state=stopped)[1]
    assert after(Abort(NEW), Stopped(OLD), state=state) == (
        NodeState(Force(FIRST, "standing"), newest=NEW),
        [],
    )
    # A node that loses all of its units has nothing to prepare.
    state, commands = after(replace(EMPTY, ended=True), Copied(NEW, 73), Copied(NEW, 74), state=serving())
    assert commands == [Tell("prepared", NEW)]
    assert after(Stopped(OLD), state=state)[1] == []


@pytest.mark.parametrize("order", list(permutations([Ready(NEW), Reached(NEW), Copied(NEW, 73)])))
def test_it_is_prepared_when_all_parts_are_whatever_their_order(order: tuple[Event, ...]) -> None:
    state, _ = after(MOVE, state=serving())
    for event in order[:2]:
        state, commands = after(event, event, state=state)  # told twice, it counts once
        assert commands == []
    assert after(order[2], state=state)[1] == [Tell("prepared", NEW)]


def orders() -> Iterator[tuple[Event, ...]]:
    """The possible orders of what follows a commit: the giver's Complete may even precede it."""
    for order in permutations([COMMIT, Stopped(OLD), Sent(NEW, 73), Completed(NEW, 71)]):
        if order.index(COMMIT) < order.index(Stopped(OLD)) < order.index(Sent(NEW, 73)):
            yield order


@pytest.mark.parametrize("order", list(orders()))
def test_after_commit_the_tail_follows_the_loop_and_the_change_follows_all(order: tuple[Event, ...]) -> None:
    state, told = prepared(), []
    for event in order:
        assert Adopt(MOVE, COMMIT) not in told
        state, commands = decide(state, event)
        told += commands
    assert told == [StopLoop(OLD), SendTail(COMMIT, 73), Adopt(MOVE, COMMIT)]
    state, commands = after(Adopted(NEW), state=state)
    assert (state, commands) == (
        in_force(MOVE, "serving"),
        [StartLoop(NEW), Tell("loaded", NEW)],
    )


def test_a_stage_that_only_gets_new_neighbours_changes_once_its_loop_has_stopped() -> None:
    same = replace(FIRST, epoch=NEW, base=1)
    state, commands = after(same, Ready(NEW), Reached(NEW), COMMIT, state=serving())
    assert commands == [StopLoop(OLD)]
    assert after(Stopped(OLD), state=state)[1] == [Adopt(same, COMMIT)]


def test_a_node_that_loses_all_units_sends_its_tails_and_is_free() -> None:
    state, commands = after(EMPTY, state=serving())
    assert commands == [CopyAhead(NEW, gift.taker, (gift,)) for gift in EMPTY.gives]
    state, commands = after(Copied(NEW, 74), Copied(NEW, 73), state=state)
    assert commands == [Tell("prepared", NEW)]
    state, commands = after(COMMIT, Stopped(OLD), state=state)
    assert commands == [SendTail(COMMIT, 73), SendTail(COMMIT, 74)]
    state, commands = after(Sent(NEW, 73), Sent(NEW, 74), state=state)
    assert (state, commands) == (NodeState(newest=NEW), [Tell("loaded", NEW), Drop(NEW), Drop(OLD)])


def test_a_node_that_joins_opens_a_stage_and_takes_over_after_complete() -> None:
    joins = Assign(NEW, 1, 3, AFTER, 8, 99, base=1, takes=(Take(71, 1, 2), Take(70, 2, 3)))
    state, commands = after(joins)
    assert commands == [OpenStage(joins), Dial(NEW, AFTER)]
    assert after(Reached(NEW), Ready(NEW), state=state)[1] == [Tell("prepared", NEW)]
    state, commands = after(Reached(NEW), Ready(NEW), Completed(NEW, 70), COMMIT, state=state)
    assert commands == []
    state, commands = after(Completed(NEW, 71), state=state)
    assert commands == [Adopt(joins, COMMIT)]
    assert after(Adopted(NEW), state=state)[1] == [StartLoop(NEW), Tell("loaded", NEW)]


@pytest.mark.parametrize("base", [0, 7])
def test_a_stage_of_another_epoch_than_the_base_is_dropped_first(base: int) -> None:
    other = replace(MOVE, base=base, epoch=NEWER)
    state, commands = after(other, state=serving())
    assert commands[:2] == [Drop(OLD), OpenStage(other)]
    assert state.force is None


@pytest.mark.parametrize("events", [(), (Ready(NEW),), (Ready(NEW), Reached(NEW), Copied(NEW, 73))])
def test_abort_leaves_the_stage_in_force_alone(events: tuple[Event, ...]) -> None:
    assert after(MOVE, *events, Abort(NEW), state=serving()) == (given_up(), [Drop(NEW)])


def test_what_arrives_for_an_aborted_or_unknown_transition_is_ignored() -> None:
    late: tuple[Event, ...] = (
        Ready(NEW), Reached(NEW), Copied(NEW, 73), Completed(NEW, 71), COMMIT, Abort(NEW), Sent(NEW, 73),
        Adopted(NEW), Stopped(NEW), STAGE_FAULT, NEXT_FAULT,
    )  # fmt: skip
    for event in late:
        assert after(event, state=serving()) == (serving(), [])


def test_abort_after_commit_comes_too_late() -> None:
    state, _ = after(COMMIT, state=prepared())
    assert after(Abort(NEW), state=state) == (state, [])


def test_a_newer_transition_replaces_the_prepared_one() -> None:
    newer = replace(MOVE, epoch=NEWER)
    state, commands = after(newer, state=prepared())
    assert commands == [Drop(NEW), Prepare(newer), Dial(NEWER, AFTER), CopyAhead(NEWER, TAKER, (GIFT,))]
    assert (state.force, after(Ready(NEW), state=state)) == (serving().force, (state, []))


@pytest.mark.parametrize("fault", [STAGE_FAULT, NEXT_FAULT])
def test_a_fault_before_commit_ends_the_transition_alone(fault: Broken) -> None:
    assert after(MOVE, fault, state=serving()) == (given_up(), [Drop(NEW), Tell(fault, NEW)])
    assert after(fault, COMMIT, state=prepared()) == (given_up(), [])


@pytest.mark.parametrize("fault", [STAGE_FAULT, NEXT_FAULT])
@pytest.mark.parametrize("events", [(), (Stopped(OLD), Sent(NEW, 73), Completed(NEW, 71))])
def test_a_fault_after_commit_drops_everything(fault: Broken, events: tuple[Event, ...]) -> None:
    state, _ = after(COMMIT, *events, state=prepared())
    assert after(fault, state=state) == (NodeState(newest=NEW), [Drop(NEW), Drop(OLD), Tell(fault, NEW)])


def test_a_stage_without_its_next_node_stands_until_the_next_order() -> None:
    fault = Broken(OLD, 10, "after is lost", 72)
    state, commands = after(fault, state=serving())
    assert commands == [StopLoop(OLD), Tell(fault, OLD)]
    state, commands = after(Stopped(OLD), state=state)
    assert (state, commands) == (in_force(FIRST, "standing"), [])
    assert after(fault, state=state) == (state, [])
    same = replace(FIRST, epoch=NEW, base=1, next=None, last=6)
    assert after(same, Ready(NEW), COMMIT, state=state)[1] == [Adopt(same, COMMIT)]
    fresh = replace(FIRST, epoch=NEWER)
    assert after(fresh, state=state)[1] == [Drop(OLD), OpenStage(fresh)]


def test_a_transition_from_a_stage_that_is_still_stopping_waits_for_it() -> None:
    same = replace(FIRST, epoch=NEW, base=1, next=None, last=6, gives=(GIFT,))
    fault = Broken(OLD, 10, "after is lost", 72)
    state, commands = after(fault, same, Ready(NEW), Copied(NEW, 73), COMMIT, state=serving())
    assert commands == []
    assert after(Stopped(OLD), state=state)[1] == [SendTail(COMMIT, 73)]
    assert after(Stopped(OLD), Sent(NEW, 73), state=state)[1] == [Adopt(same, COMMIT)]


def test_the_next_node_is_lost_while_a_transition_is_prepared() -> None:
    fault = Broken(OLD, 10, "after is lost", 72)
    state, commands = after(fault, state=prepared())
    assert commands == [StopLoop(OLD), Tell(fault, OLD)]
    state, commands = after(Stopped(OLD), Abort(NEW), state=state)
    assert (state.force, commands) == (Force(FIRST, "standing"), [Drop(NEW)])


@pytest.mark.parametrize("events", [(), (Ready(OLD),), (Ready(OLD), Reached(OLD))])
def test_a_fault_of_the_stage_itself_drops_it(events: tuple[Event, ...]) -> None:
    fault = Broken(OLD, 3, "layer-3 is damaged", None)
    assert after(FIRST, *events, fault) == (NodeState(newest=OLD), [Drop(OLD), Tell(fault, OLD)])


def test_only_the_named_givers_units_are_accepted_until_their_complete() -> None:
    two = replace(MOVE, takes=(Take(71, 1, 2), Take(70, 2, 3)))
    state, _ = after(two, state=serving())
    assert [state.taken(NEW, giver) for giver in (71, 70, 72)] == [{1}, {2}, None]
    assert (state.taken(OLD, 71), state.taken(NEWER, 71)) == (None, None)
    state, _ = after(Completed(NEW, 71), state=state)
    assert [state.taken(NEW, giver) for giver in (71, 70)] == [None, {2}]
    assert after(Abort(NEW), state=state)[0].taken(NEW, 70) is None


def test_messages_of_a_transition_may_precede_its_assign() -> None:
    assert [NodeState().awaits(epoch) for epoch in (OLD, NEW)] == [True, True]
    assert [serving().awaits(epoch) for epoch in (OLD, NEW)] == [False, True]
    assert [prepared().awaits(epoch) for epoch in (OLD, NEW, NEWER)] == [False, False, True]
    for end in (Abort(NEW), Release(NEW)):
        state, _ = after(end, state=prepared())
        assert [state.awaits(epoch) for epoch in (OLD, NEW, NEWER)] == [False, False, True]
