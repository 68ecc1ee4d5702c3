"""The coordinator's decisions as a function: literal cases, and invariants under random interleavings."""

from dataclasses import replace

import pytest
from tests.net.clusters import (
    GONE,
    JOINS,
    THREE,
    TO_LOAD,
    TO_PLAN,
    TO_SERVE,
    TWO,
    after,
    arrived,
    epoch,
    fresh,
    hello,
    said,
)

from shoal.engine.errors import ModelFileError, NoPlanError, ShoalError
from shoal.net.errors import LocalProtocolError, MismatchError, NodeLostError, RemoteProtocolError
from shoal.net.events import (
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
    Redial,
    SendAssign,
    SendPing,
    SendRelease,
    Serve,
    StageBroken,
    StageLoaded,
    Stalled,
    Tick,
    TryAnew,
)
from shoal.net.known import HEAD, KnownLinks
from shoal.net.members import ClusterState
from shoal.net.messages import Assign, Peer, Progress
from shoal.net.placement import COORDINATOR, Placement
from shoal.planner import Assignment, LinkSpeed
from shoal.planner.groups import plain_groupings


def test_from_the_first_hello_to_serving() -> None:
    state, commands = after(fresh(), *JOINS[:2])
    assert (state.phase, commands) == ("gathering", [])
    state, commands = after(state, JOINS[2])
    pairs = ((-1, 0), (-1, 1), (-1, 2), (0, 1), (0, 2), (1, 2))
    assert (state.phase, commands) == ("measuring", [MeasureLinks(pairs)])
    state, commands = after(state, LinksMeasured())
    assert (state.phase, commands) == ("planning", [MakePlan(1, (0, 1, 2))])
    state, commands = after(state, Planned(1, THREE))
    assert state.phase == "loading"
    assert commands == [
        SendAssign(0, Assign(epoch(1), 0, 2, Peer("b", "host", 7002, 101, 707), 4, 99, plain_groupings(3))),
        SendAssign(1, Assign(epoch(1), 2, 4, Peer("c", "host", 7003, 102, 714), 4, 100, plain_groupings(3))),
        SendAssign(2, Assign(epoch(1), 4, 6, None, 4, 101, plain_groupings(3))),
    ]
    state, commands = after(
        state, StageLoaded(2, epoch(1)), StageLoaded(0, epoch(1)), StageLoaded(2, epoch(1))
    )
    assert (state.phase, commands) == ("loading", [])
    state, commands = after(state, StageLoaded(1, epoch(1)))
    assert (state.phase, commands) == ("serving", [Serve(epoch(1))])


def test_a_node_without_a_stage_is_released() -> None:
    _, commands = after(fresh(), *TO_PLAN, Planned(1, TWO))
    assert commands[0] == SendRelease(1, epoch(1))
    assert [c.member for c in commands if isinstance(c, SendAssign)] == [2, 0]


def test_nodes_of_one_name_get_labels_that_differ() -> None:
    state, _ = after(
        fresh(), *(Joined(i, hello(name, i)) for i, name in enumerate(("pi", "pi", COORDINATOR)))
    )
    assert [member.label for member in state.members] == [
        "pi@host:7001",
        "pi@host:7002",
        "coordinator@host:7003",
    ]


def test_exact_and_approximate_nodes_mix_only_when_asked_for() -> None:
    mixed = (JOINS[0], JOINS[1], Joined(2, hello("c", 102, exact=False)))
    state, commands = after(fresh(), *mixed)
    (fail,) = commands
    assert isinstance(fail, Fail) and isinstance(fail.error, MismatchError)
    assert "b computes exactly and c approximately" in str(fail.error)
    assert state.phase == "failed"
    assert after(fresh(approximate=True), *mixed)[0].phase == "measuring"


PAIRS = MeasureLinks(((-1, 0), (-1, 2), (0, 2)))
NO_PLAN = NoPlanError("12 MB are missing")


def test_a_node_that_cannot_be_reached_at_first_is_left_out() -> None:
    refused = Left(1, GONE)
    for order in ((JOINS[0], refused, JOINS[2]), (refused, JOINS[0], JOINS[2]), (*JOINS[::2], refused)):
        state, commands = after(fresh(), *order)
        assert (state.phase, commands) == ("measuring", [PAIRS])
    assert said(after(fresh(), *JOINS[::2])[0], refused) == ["gone: going on without it"]
    state, commands = after(state, LinksMeasured())
    assert commands == [MakePlan(1, (0, 2))]
    # The others do not suffice: the error is that of the node, with its exit code.
    _, (fail,) = after(state, Planned(1, NO_PLAN))
    assert isinstance(fail, Fail) and isinstance(fail.error, NodeLostError)
    assert str(fail.error) == "gone; the other nodes cannot go on: 12 MB are missing"


def test_when_no_node_can_be_reached_the_first_error_is_raised_at_once() -> None:
    first, second = MismatchError("another model"), NodeLostError("refused")
    state, commands = after(fresh(), Left(1, second), Left(0, first))
    assert commands == []
    assert after(state, Left(2, GONE))[1] == [Fail(first)]


def test_a_node_that_does_not_answer_is_waited_for_a_while() -> None:
    state, _ = after(fresh(), JOINS[0], now=50.0)
    state, _ = after(state, JOINS[2], now=51.0)
    assert after(state, Tick(), now=52.9)[0].phase == "gathering"
    texts = said(state, Tick(), now=53.0)
    assert texts == ["the node (host:7002) has not answered yet: going on without it"]
    state, commands = after(state, Tick(), now=53.0)
    assert state.phase == "measuring" and commands == [SendPing(0), SendPing(2), PAIRS]
    # It answers while the links are measured: the first plan knows it.
    state, commands = after(state, JOINS[1], now=53.1)
    assert commands == []
    state, commands = after(state, LinksMeasured(), now=53.2)
    assert commands == [MeasureLinks(((-1, 1), (0, 1), (1, 2)))]
    assert after(state, LinksMeasured(), now=53.3)[1] == [MakePlan(1, (0, 1, 2))]


def test_a_node_that_is_needed_is_waited_for_until_it_answers_or_cannot_be_reached() -> None:
    state, _ = after(fresh(), JOINS[0], JOINS[2], now=50.0)
    state, _ = after(state, Tick(), LinksMeasured(), now=53.0)
    assert said(state, Planned(1, NO_PLAN), now=53.1) == [
        "waiting for the node (host:7002): 12 MB are missing"
    ]
    state, commands = after(state, Planned(1, NO_PLAN), now=53.1)
    assert (state.phase, commands) == ("waiting", [])
    there, commands = after(state, JOINS[1], LinksMeasured(), now=57.0)
    assert commands == [MakePlan(2, (0, 1, 2))]
    assert after(there, Planned(2, THREE), now=57.0)[0].phase == "loading"
    state, commands = after(state, Left(1, GONE), now=60.0)
    assert commands[-1:] == [MakePlan(2, (0, 2))]
    _, (fail,) = after(state, Planned(2, NO_PLAN), now=60.0)
    assert isinstance(fail, Fail)
    assert str(fail.error) == "gone; the other nodes cannot go on: 12 MB are missing"


@pytest.mark.parametrize("events", [JOINS, TO_PLAN, TO_LOAD], ids=len)
def test_a_loss_before_anything_was_served_means_another_plan(events: tuple[Event, ...]) -> None:
    state, commands = after(fresh(), *events, Left(1, GONE))
    if state.phase == "measuring":
        state, commands = after(state, LinksMeasured())
    assert commands[-1] == MakePlan(state.plans, (0, 2))
    state, _ = after(state, Planned(state.plans, TWO))
    state, commands = after(state, StageLoaded(0, state.epoch), StageLoaded(2, state.epoch))
    assert (state.phase, commands) == ("serving", [Serve(state.epoch)])


@pytest.mark.parametrize("events", [(), JOINS[:1], JOINS, TO_PLAN, TO_LOAD], ids=len)
def test_without_recovery_any_loss_before_anything_was_served_is_a_failure(events: tuple[Event, ...]) -> None:
    state, commands = after(fresh(recover=False), *events, Left(1, GONE))
    assert (state.phase, commands) == ("failed", [Fail(GONE)])
    assert after(state, *TO_SERVE, Tick(), now=1e6) == (state, [])


def test_a_lost_stage_ends_the_epoch_and_the_others_go_on() -> None:
    state, commands = after(fresh(moves="reload"), *TO_SERVE, Left(1, GONE))
    assert state.phase == "planning"
    assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    state, commands = after(state, Planned(2, TWO))
    assert commands == [
        SendAssign(2, Assign(epoch(2), 0, 3, Peer("a", "host", 7001, 100, 700), 4, 99, plain_groupings(2))),
        SendAssign(0, Assign(epoch(2), 3, 6, None, 4, 102, plain_groupings(2))),
    ]
    state, commands = after(state, StageLoaded(0, epoch(1)), StageLoaded(2, epoch(1)))
    assert (state.phase, commands) == ("loading", [])
    state, commands = after(state, StageLoaded(0, epoch(2)), StageLoaded(2, epoch(2)))
    assert (state.phase, commands) == ("serving", [Serve(epoch(2))])


def test_a_second_loss_during_recovery_plans_once_more() -> None:
    alone = Placement((Assignment("a", 0, 6),), 4)
    state, _ = after(fresh(moves="reload"), *TO_SERVE, Left(1, GONE))
    planning, commands = after(state, Left(2, GONE))
    assert commands == [HangUp(2), MakePlan(3, (0,))]
    assert after(planning, Planned(2, TWO)) == (planning, [])
    assert after(planning, Planned(3, alone))[1] == [
        SendAssign(0, Assign(epoch(2), 0, 6, None, 4, 99, plain_groupings(1)))
    ]
    loading, _ = after(state, Planned(2, TWO))
    _, commands = after(loading, Left(2, GONE))
    assert commands == [HangUp(2), Pause(epoch(2)), MakePlan(3, (0,))]


def test_not_wanting_to_recover_is_a_failure() -> None:
    state, commands = after(fresh(recover=False), *TO_SERVE, Left(0, GONE))
    assert (state.phase, commands) == ("failed", [Fail(GONE)])


def test_a_loss_is_counted_once() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE))
    assert after(state, Left(1, GONE)) == (state, [])


def test_losing_a_node_without_a_stage_changes_nothing() -> None:
    events = (*TO_PLAN, Planned(1, TWO), StageLoaded(0, epoch(1)), StageLoaded(2, epoch(1)))
    for recover in (True, False):
        state, commands = after(fresh(recover=recover), *events, Left(1, GONE))
        assert (state.phase, commands) == ("serving", [HangUp(1)])


def test_without_a_plan_nothing_begins() -> None:
    assert after(fresh(), *TO_PLAN, Planned(1, NO_PLAN))[1] == [Fail(NO_PLAN)]


@pytest.mark.parametrize("start", [TO_SERVE, TO_LOAD], ids=["served", "loading"])
def test_lost_nodes_that_the_model_needs_are_waited_for(start: tuple[Event, ...]) -> None:
    state, _ = after(fresh(), *start, now=100.0)
    state, _ = after(state, Left(1, GONE), now=101.0)
    assert said(state, Planned(2, NO_PLAN)) == ["waiting for nodes, 60 s at most"]
    state, commands = after(state, Planned(2, NO_PLAN), now=102.0)
    assert (state.phase, commands) == ("waiting", [])
    # It comes back as the same process, so its links are known.
    state, commands = after(state, JOINS[1], now=130.0)
    assert (state.phase, commands) == ("planning", [MakePlan(3, (0, 1, 2))])
    state, commands = after(state, Planned(3, THREE), now=130.0)
    assert [type(command) for command in commands[:3]] == [SendAssign] * 3
    state, commands = arrived(state, now=131.0)
    kept = Serve(epoch(2), 1, (2, 4)) if start is TO_SERVE else Serve(epoch(2))
    assert (state.phase, commands[0]) == ("serving", kept)


def test_a_node_that_was_restarted_is_measured_before_it_is_planned_with() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE), Planned(2, NO_PLAN))
    state, commands = after(state, Joined(1, hello("b", 555)))
    assert commands == [MeasureLinks(((-1, 1), (0, 1), (1, 2))), MakePlan(3, (0, 2))]
    state, commands = after(state, Planned(3, NO_PLAN))
    assert (state.phase, commands) == ("measuring", [])
    assert after(state, LinksMeasured())[1] == [MakePlan(4, (0, 1, 2))]


def test_a_node_that_is_back_before_the_answer_of_the_planner_is_planned_with() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE), JOINS[1])
    state, commands = after(state, Planned(2, NO_PLAN))
    assert (state.phase, commands) == ("planning", [MakePlan(3, (0, 1, 2))])


def test_waiting_ends_with_the_error_of_before() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE), now=100.0)
    state, _ = after(state, Planned(2, NO_PLAN), now=101.0)
    assert not any(isinstance(command, Fail) for command in after(state, Tick(), now=160.9)[1])
    # Other nodes that come and go do not prolong it.
    state, _ = after(state, Left(0, GONE), JOINS[0], Planned(3, NO_PLAN), now=150.0)
    fail = after(state, Tick(), now=161.0)[1][-1]
    assert isinstance(fail, Fail) and isinstance(fail.error, NodeLostError)
    assert str(fail.error) == "gone; the other nodes cannot go on: 12 MB are missing"


def test_when_all_are_lost_they_are_waited_for() -> None:
    """As after a time in which the coordinator's own device slept."""
    state, _ = after(fresh(), *TO_SERVE, now=100.0)
    state, commands = after(state, *(Left(i, GONE) for i in range(3)), now=200.0)
    assert (state.phase, commands) == ("waiting", [HangUp(2)])
    # The first that is back has no plan alone, which does not end the wait.
    state, commands = after(state, JOINS[2], now=200.3)
    assert commands == [MakePlan(5, (2,))]
    state, commands = after(state, JOINS[0], Planned(5, NO_PLAN), now=200.4)
    assert commands == [MakePlan(6, (0, 2))]
    state, _ = after(state, Planned(6, NO_PLAN), now=200.5)
    assert state.phase == "waiting"
    assert after(state, JOINS[1], now=200.6)[1] == [MakePlan(7, (0, 1, 2))]


def test_a_node_at_fault_itself_is_used_again_only_after_a_restart() -> None:
    fault = RemoteProtocolError("garbage")
    state, _ = after(fresh(), *TO_SERVE, Left(1, fault, greeted=True), Planned(2, TWO))
    assert after(state, JOINS[1])[1] == [HangUp(1)]
    assert after(state, JOINS[1])[0].members[1].lost is fault
    assert after(state, Joined(1, hello("b", 555)))[0].members[1].alive
    # By the word of its neighbour, or for a connection that it has not accepted, it is only lost.
    for event in (StageBroken(0, epoch(1), fault, 101), StageBroken(1, epoch(1), fault, 101), Left(1, fault)):
        state, _ = after(fresh(), *TO_SERVE, event, Planned(2, TWO))
        assert state.members[1].lost is fault and after(state, JOINS[1])[0].members[1].alive
    # If it is the only one, waiting would be of no use.
    _, commands = after(fresh(), *TO_SERVE, Left(1, fault, greeted=True), Planned(2, NO_PLAN))
    assert isinstance(commands[0], Fail) and "garbage; the other nodes cannot go on" in str(commands[0].error)


def test_a_stage_that_cannot_be_loaded_blames_its_node() -> None:
    error = ModelFileError("a shard is missing")
    for events in (TO_LOAD, TO_SERVE):
        state, commands = after(fresh(), *events, StageBroken(1, epoch(1), error, None))
        assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
        # A stage of the chain that has ended: the node itself is planned with.
        broken, commands = after(state, StageBroken(0, epoch(1), error, None))
        assert (broken.phase, broken.alive(), commands) == ("planning", (0, 2), [])
        # The others do not suffice: waiting for the same process would be of no use.
        _, (fail,) = after(state, Planned(2, NO_PLAN))
        kind = ModelFileError if events is TO_LOAD else NodeLostError
        assert isinstance(fail, Fail) and type(fail.error) is kind


# --- nodes that come back while others serve

FAST = replace(THREE, tokens_per_s=111.0, context=100)
SLOW = replace(TWO, tokens_per_s=100.0, context=100)


def without_b() -> ClusterState:
    """Nodes a and c have served without b since 10 s."""
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE), Planned(2, SLOW), now=8.0)
    state, _ = arrived(state, now=10.0)
    assert state.phase == "serving"
    return state


def test_a_node_that_is_back_is_used_when_that_is_better() -> None:
    state, commands = after(without_b(), JOINS[1], now=20.0)
    assert (state.phase, commands) == ("serving", [])
    assert said(without_b(), JOINS[1]) == ["b (host:7002) is back"]
    state, commands = after(state, Tick(), now=22.9)
    assert not any(isinstance(command, MakePlan) for command in commands)
    state, commands = after(state, Tick(), now=23.0)
    assert commands[0] == MakePlan(3, (0, 1, 2)) and state.phase == "serving"
    assert not any(isinstance(command, MakePlan) for command in after(state, Tick(), now=30.0)[1])
    state, commands = after(state, Planned(3, FAST), now=30.0)
    assert state.phase == "serving" and not any(isinstance(command, Pause) for command in commands)
    assert [c.assign.epoch for c in commands if isinstance(c, SendAssign)] == [epoch(3)] * 3
    state, commands = arrived(state, now=31.0)
    assert commands[0] == Serve(epoch(3), 2) and state.placement == FAST


@pytest.mark.parametrize(
    ("answer", "changes"),
    [
        (NO_PLAN, False),
        (replace(FAST, tokens_per_s=109.0), False),
        (replace(FAST, tokens_per_s=111.0), True),
        (replace(FAST, tokens_per_s=50.0, context=101), True),  # the chain lacked memory
        (replace(FAST, tokens_per_s=500.0, context=99), False),
    ],
)
def test_a_plan_must_be_worth_the_interruption(answer: Placement | ShoalError, changes: bool) -> None:
    state, _ = after(without_b(), JOINS[1], Tick(), now=20.0)
    state, _ = after(state, Tick(), now=23.0)
    state, commands = after(state, Planned(3, answer), now=23.5)
    assert (state.transition is not None) == changes and state.phase == "serving"
    if not changes:
        assert commands == [] and state.placement == SLOW
        assert not any(isinstance(command, MakePlan) for command in after(state, Tick(), now=30.0)[1])


def test_a_node_that_comes_and_goes_must_stay_longer_each_time() -> None:
    state = without_b()
    for _ in range(3):
        state, _ = after(state, JOINS[1], Left(1, GONE), now=20.0)
    state, _ = after(state, JOINS[1], now=20.0)
    assert state.members[1].losses == 4
    assert not any(isinstance(command, MakePlan) for command in after(state, Tick(), now=43.9)[1])
    assert MakePlan(state.plans + 1, (0, 1, 2)) in after(state, Tick(), now=44.0)[1]


def test_a_loss_while_a_better_plan_is_made_drops_it() -> None:
    state, _ = after(without_b(), JOINS[1], now=20.0)
    state, _ = after(state, Tick(), now=23.0)
    lost, commands = after(state, Left(1, GONE), now=23.1)
    assert (lost.phase, commands) == ("serving", [HangUp(1)])
    assert after(lost, Planned(3, FAST), now=23.2) == (lost, [])
    lost, commands = after(state, Left(0, GONE), now=23.1)
    assert commands[-1] == MakePlan(4, (1, 2))
    assert after(lost, Planned(3, FAST), now=23.2) == (lost, [])


def test_a_newcomer_is_measured_beside_the_chain() -> None:
    state, commands = after(without_b(), Joined(1, hello("b", 555)), now=20.0)
    assert (state.phase, commands) == ("serving", [MeasureLinks(((-1, 1), (0, 1), (1, 2)))])
    assert not any(isinstance(command, MakePlan) for command in after(state, Tick(), now=30.0)[1])
    # A loss in the meantime: the survivor whose links are known is planned for.
    assert after(state, Left(0, GONE), now=30.0)[1][-1] == MakePlan(3, (2,))
    state, _ = after(state, LinksMeasured(), now=30.0)
    assert MakePlan(3, (0, 1, 2)) in after(state, Tick(), now=30.1)[1]


def test_links_that_could_not_be_measured_are_tried_again_while_nodes_are_waited_for() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE), Planned(2, NO_PLAN), now=10.0)
    state, _ = after(state, Joined(1, hello("b", 555)), Planned(3, NO_PLAN), now=11.0)
    cut = frozenset({(100, 555)})
    state, _ = after(state, LinksMeasured(cut), Planned(4, NO_PLAN), now=12.0)
    assert state.phase == "waiting"
    assert MeasureLinks(((0, 1),)) not in after(state, Tick(), now=12.9)[1]
    state, commands = after(state, Tick(), now=13.0)
    assert MeasureLinks(((0, 1),)) in commands
    assert after(state, LinksMeasured(), Planned(5, NO_PLAN), LinksMeasured(), now=13.5)[0].plans >= 6


# --- connections


def test_a_new_connection_to_the_same_process_begins_another_epoch_of_the_same_chain() -> None:
    state, commands = after(fresh(), *TO_SERVE, JOINS[1])
    assert commands[0] == Pause(epoch(1)) and state.phase == "moving"
    assert [c.assign.epoch for c in commands[1:] if isinstance(c, SendAssign)] == [epoch(2)] * 3
    # A node without a stage: nothing.
    events = (*TO_PLAN, Planned(1, TWO), StageLoaded(0, epoch(1)), StageLoaded(2, epoch(1)))
    assert after(fresh(), *events, JOINS[1])[1] == []


def test_a_node_that_restarts_before_its_old_connection_ends_is_lost_and_back() -> None:
    state, commands = after(fresh(), *TO_SERVE, Joined(1, hello("b", 555)))
    assert commands[0] == Pause(epoch(1)) and HangUp(1) not in commands
    assert commands[-1] == MakePlan(2, (0, 2)) or MakePlan(2, (0, 2)) in commands
    assert state.members[1].alive and state.incarnation(1) == 555


def test_a_late_answer_is_a_reason_to_try_another_connection() -> None:
    state, _ = after(fresh(), *TO_SERVE)
    state, commands = after(state, Tick(busy=True), now=1.0)
    assert commands == [SendPing(0), SendPing(1), SendPing(2)]
    state, _ = after(state, *(Heard(i, answered=True) for i in range(3)), now=1.01)
    assert state.members[0].heartbeat.trip.smoothed == pytest.approx(0.01)
    state, commands = after(state, Tick(busy=True), now=1.5)
    assert SendPing(1) in commands
    state, _ = after(state, Heard(0), Heard(2), now=1.6)
    assert TryAnew(1) not in after(state, Tick(busy=True), now=1.8)[1]
    assert after(state, Tick(busy=True), now=1.9)[1] == [TryAnew(1)]
    assert TryAnew(1) not in after(state, Tick(), now=1.9)[1]  # nothing is due
    assert after(state, Stalled(1), now=2.1)[1] == [Redial(1)]
    assert after(state, Heard(1), Stalled(1), now=2.1)[1] == []  # it has answered after all
    state, commands = after(state, Tick(busy=True), now=3.65)
    assert HangUp(1) in commands and Pause(epoch(1)) in commands  # 2 s, and 4 late round trips of 30 ms


def test_a_chain_that_stands_still_is_loaded_again() -> None:
    state, commands = after(fresh(), *TO_SERVE, Tick(busy=True, stalled=True))
    assert Pause(epoch(1)) in commands and state.phase == "loading" and state.alive() == (0, 1, 2)
    # Not if a node is silent, which its own bound decides.
    state, _ = after(after(fresh(), *TO_SERVE)[0], Tick(busy=True), now=1.0)
    state, commands = after(state, Heard(0), Heard(2), Tick(busy=True, stalled=True), now=3.0)
    assert state.phase == "serving" and TryAnew(1) in commands


def test_connections_that_fail_again_and_again_lose_the_node() -> None:
    state, _ = after(fresh(), *TO_SERVE)
    for counter in range(1, 4):
        state, commands = after(state, StageBroken(1, epoch(counter), GONE, 102, again=True))
        assert HangUp(2) not in commands
        state, commands = arrived(state)
        assert commands[0] == Serve(epoch(counter + 1), counter)
    _, commands = after(state, StageBroken(1, epoch(4), GONE, 102, again=True))
    assert commands[:2] == [HangUp(2), Pause(epoch(4))]


def test_loading_is_bounded_by_size() -> None:
    state, _ = after(fresh(unit_bytes=(10_000_000,) * 6), *TO_LOAD, now=100.0)
    state, _ = after(state, StageLoaded(0, epoch(1)), *(Heard(i) for i in range(3)), now=120.0)
    assert state.phase == "loading"
    assert HangUp(1) not in after(state, Tick(), now=131.0)[1]  # 30 s, and 1 s for 20 MB
    state, commands = after(state, Tick(), now=131.1)
    assert HangUp(1) in commands and HangUp(0) not in commands
    assert "has not loaded its layers within 31 s" in str(state.members[1].lost)


@pytest.mark.parametrize(("size", "bound"), [(0, 5.0), (300_000_000, 8.0), (10**10, 10.0)])
def test_a_node_that_reads_many_weights_may_be_silent_for_longer(size: int, bound: float) -> None:
    """No round trip has been measured yet: 5 s, and 1 s for 200 MB of the stage's two units, at most 10 s."""
    state, _ = after(fresh(unit_bytes=(size,) * 6), *TO_LOAD)
    state, _ = after(state, Tick(), now=1.0)
    state, _ = after(state, Heard(0), Heard(2), Tick(), now=1.0 + bound)
    assert state.members[1].alive
    state, commands = after(state, Heard(0), Heard(2), Tick(), now=1.1 + bound)
    assert HangUp(1) in commands


def test_a_node_under_two_addresses_is_used_once() -> None:
    state, _ = after(fresh(), JOINS[0], Joined(1, hello("a", 100)), Left(2, GONE))
    assert state.alive() == (1,) and state.members[0].barred
    assert "host:7001 is the same node as host:7002" in str(state.members[0].lost)
    assert state.phase == "measuring"


def test_a_next_node_that_cannot_be_reached_is_blamed_itself() -> None:
    state, commands = after(fresh(), *TO_SERVE, StageBroken(1, epoch(1), GONE, 102))
    assert commands == [HangUp(2), Pause(epoch(1)), MakePlan(2, (0, 1))]
    assert state.members[2].lost and not state.members[1].lost


@pytest.mark.parametrize("open_ended", [False, True])
def test_a_link_over_which_a_chain_has_failed_is_measured_whatever_is_known_of_it_from_before(
    open_ended: bool,
) -> None:
    pairs = ((HEAD, 0), (0, HEAD), (0, 0))  # all are of device 0
    links = KnownLinks(dict.fromkeys(pairs, LinkSpeed(0.001, 1e7)))
    state, labels = fresh(open_ended=open_ended), dict[tuple[str, str], LinkSpeed]()
    for join in JOINS:
        state, commands = after(state, replace(join, known=links.of(state, join.hello.incarnation)))
    assert commands == [MakePlan(1, (0, 1, 2))]
    links.recall(state, labels)
    assert len(labels) == 12
    state, _ = after(state, Planned(1, THREE), StageBroken(1, epoch(1), GONE, 102))
    again = replace(JOINS[2], known=links.of(state, 102))
    assert again.known == {-1, 0, 1}
    state, commands = after(state, again)
    assert commands == [MeasureLinks(((1, 2),))]
    del labels["b", "c"], labels["c", "b"]
    links.recall(state, labels)
    assert len(labels) == 10, "a plan that is made meanwhile does not use it"
    links.learn(state, ((1, 2),), labels)
    assert not links.links.keys() & {(0, 0)}


def test_a_connection_that_failed_alone_begins_another_epoch_of_the_same_chain() -> None:
    state, commands = after(fresh(), *TO_SERVE, StageBroken(0, epoch(1), GONE, 101, again=True))
    assert state.phase == "moving" and state.alive() == (0, 1, 2)
    assert commands[0] == Pause(epoch(1))
    assert [c.assign.epoch for c in commands[1:] if isinstance(c, SendAssign)] == [epoch(2)] * 3
    assert after(state, StageBroken(0, epoch(1), GONE, 101, again=True)) == (state, [])


def progress(running: float | None, expected: float | None, counter: int = 1) -> Progress:
    return Progress(epoch(counter), 7, running, expected, 0)


def test_a_stage_that_is_stuck_leaves_the_chain() -> None:
    state, commands = after(fresh(), *TO_SERVE, Heard(1, progress(11.1, 1.0)))
    assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    assert "b (host:7002): a call of its stage has been running for 11 s" in str(state.members[1].lost)
    # The first call may take as long as loading the 60 MB of units 2 and 3: 30 s, and 3 s for the bytes.
    sized = fresh(unit_bytes=(0, 0, 30_000_000, 30_000_000, 0, 0))
    assert after(sized, *TO_SERVE, Heard(1, progress(33.1, None)))[1][0] == HangUp(1)


@pytest.mark.parametrize(
    "heard",
    [
        Heard(1),
        Heard(1, progress(None, None)),
        Heard(1, progress(11.0, 1.0)),  # 3 s, and 8 times what was predicted
        Heard(1, progress(30.0, None)),
        Heard(1, progress(1e6, 1.0, counter=0)),  # of another epoch
    ],
)
def test_a_stage_that_is_at_work_stays(heard: Heard) -> None:
    state, commands = after(fresh(), *TO_SERVE, heard)
    assert (state.phase, commands) == ("serving", [])


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (("a", 0, 5),),
        (("a", 1, 6),),
        (("a", 0, 3), ("b", 4, 6)),
        (("a", 0, 4), ("b", 3, 6)),
        (("a", 0, 3), ("a", 3, 6)),
        (("a", 0, 3), ("d", 3, 6)),
    ],
)
def test_a_plan_that_is_none_is_our_mistake(stages: tuple[tuple[str, int, int], ...]) -> None:
    placement = Placement(tuple(Assignment(*stage) for stage in stages))
    _, (fail,) = after(fresh(), *TO_PLAN, Planned(1, placement))
    assert isinstance(fail, Fail) and isinstance(fail.error, LocalProtocolError)


def test_a_plan_for_a_node_that_is_lost_by_now_is_our_mistake_too() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE))
    _, (fail,) = after(state, Planned(2, THREE))
    assert isinstance(fail, Fail) and isinstance(fail.error, LocalProtocolError)


def test_heartbeats_are_due_each_second_and_overdue_after_ten() -> None:
    state, _ = after(fresh(), *TO_SERVE)
    assert after(state, Tick(), now=0.9)[1] == []
    state, commands = after(state, Tick(), now=1.0)
    assert commands == [SendPing(0), SendPing(1), SendPing(2)]
    assert after(state, Tick(), now=1.5)[1] == []
    state, _ = after(state, Heard(0), Heard(2), now=5.0)
    state, commands = after(state, Tick(), now=11.0)
    assert HangUp(1) not in commands
    _, commands = after(state, Tick(), now=11.1)
    assert commands[:3] == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
