"""Nodes whose policy wants them left out, or used less."""

from dataclasses import replace

from tests.net.clusters import (
    GONE,
    JOINS,
    NAMES,
    SHIFTED,
    SHORT,
    THREE,
    TO_PLAN,
    WITHOUT_B,
    A,
    C,
    after,
    arrived,
    assigns,
    committed,
    epoch,
    fresh,
    hello,
    said,
    serving,
)

from shoal.engine.errors import NoPlanError
from shoal.net.events import (
    Heard,
    Joined,
    Left,
    MakePlan,
    Planned,
    Proposed,
    SendAbort,
    SendRelease,
    Serve,
    StageBroken,
    StageLoaded,
    Tick,
)
from shoal.net.messages import Condition, Gift

LEAVING = Heard(1, condition=Condition(leaving=True, reason="battery at 12 %"))


def test_a_node_that_is_leaving_is_emptied_and_released() -> None:
    state = serving()
    assert said(state, LEAVING, now=10.0) == ["b (host:7002) is leaving: battery at 12 %"]
    state, commands = after(state, LEAVING, now=10.0)
    assert commands == [] and said(state, LEAVING, now=10.1) == []
    state, commands = after(state, Tick(), now=10.25)
    assert MakePlan(2, (0, 2)) in commands and state.phase == "serving"
    # It is no reason against the plan that it is slower.
    slower = replace(WITHOUT_B, tokens_per_s=-1.0)
    state, commands = after(state, Planned(2, slower), now=10.5)
    assert assigns(commands)[1].gives == (Gift(A, 2, 3), Gift(C, 3, 4))
    state, commands = arrived(state, now=11.0)
    assert commands[:2] == [Serve(epoch(2), 1), SendRelease(1, epoch(2))]
    for greeted in (False, True):
        assert said(state, Left(1, GONE, greeted), now=12.0) == ["b (host:7002) has left"]
    state, _ = after(state, Left(1, GONE), now=12.0)
    assert state.members[1].losses == 0 and state.phase == "serving"


def test_a_smaller_share_is_said_once() -> None:
    state, why = serving(), "its battery has 43 °C, more than 42 °C"
    heat = Heard(1, condition=Condition(0.7, False, why))
    assert said(state, heat) == [f"b (host:7002) computes for at most 70% of the time: {why}"]
    state, _ = after(state, heat)
    assert said(state, heat) == []
    whole = Heard(1, condition=Condition())
    assert said(state, whole) == ["b (host:7002) computes for at most 100% of the time"]
    assert state.phase == "serving" and state.members[1].condition.share == 0.7


def test_a_node_that_the_others_need_stays_and_that_is_said_once() -> None:
    state, _ = after(serving(), LEAVING, Tick(), now=10.0)
    failed = Planned(2, NoPlanError("12 MB are missing"))
    assert said(state, failed, now=11.0) == [
        "the other nodes cannot hold the model without b (host:7002): not left out yet"
    ]
    state, commands = after(state, failed, now=11.0)
    assert commands == [] and state.phase == "serving"
    state, _ = after(state, *(Heard(i) for i in range(3)), now=11.0)
    for now in (12.0, 20.0, 60.0):
        assert not any(isinstance(c, MakePlan) for c in after(state, Tick(), now=now)[1])
    # A loss: it is planned with, since there is no other way.
    commands = after(state, Left(2, GONE), now=20.0)[1]
    assert commands[-1] == MakePlan(3, (0, 1))


def test_another_node_may_let_it_go_after_all() -> None:
    four = (*NAMES, "d")
    state, _ = after(fresh(four, moves="move"), *JOINS, Left(3, GONE), *TO_PLAN[3:], Planned(1, THREE))
    state, _ = after(state, *(StageLoaded(i, epoch(1)) for i in range(3)))
    state, _ = after(state, LEAVING, Tick(), Planned(2, NoPlanError("no")), now=10.0)
    state, _ = after(state, Joined(3, hello("d", 103)), now=20.0)
    state, _ = after(state, *TO_PLAN[3:], *(Heard(i) for i in range(3)), now=20.0)
    assert MakePlan(3, (0, 2, 3)) in after(state, Tick(), now=20.25)[1]


def test_a_loss_beside_a_node_that_is_leaving_uses_it_only_if_it_must() -> None:
    state, _ = after(serving(), LEAVING, now=10.0)
    state, commands = after(state, Left(2, GONE), now=10.1)
    assert commands[-1] == MakePlan(2, (0,))
    failed = Planned(2, NoPlanError("no"))
    assert said(state, failed, now=10.2) == [
        "the other nodes cannot hold the model without b (host:7002): not left out yet"
    ]
    assert after(state, failed, now=10.2)[1] == [MakePlan(3, (0, 1))]


def test_a_node_that_begins_to_leave_ends_the_transition_that_would_use_it() -> None:
    state, _ = after(serving(WITHOUT_B), Proposed(THREE, ""))
    state, commands = after(state, LEAVING)
    assert commands[0] == SendAbort(0, epoch(2)) and state.transition is None
    # Not one that empties it, and not after the commit.
    state, _ = after(serving(), Proposed(WITHOUT_B, ""))
    assert after(state, LEAVING)[0].transition is not None
    state, _ = after(serving(), Proposed(SHIFTED, ""))
    assert after(committed(state), LEAVING)[0].phase == "committing"


def test_a_node_that_need_not_leave_any_more_is_planned_with_again() -> None:
    state, _ = after(serving(), LEAVING, Tick(), Planned(2, WITHOUT_B), now=10.0)
    state, _ = arrived(state, now=11.0)
    stays = Heard(1, condition=Condition())
    assert said(state, stays, now=20.0) == ["b (host:7002) can be used again"]
    state, _ = after(state, Heard(0), Heard(2), stays, now=20.0)
    assert MakePlan(3, (0, 1, 2)) in after(state, Tick(), now=23.0)[1]


def test_a_failed_attempt_to_empty_a_node_is_repeated_later() -> None:
    state, _ = after(serving(), LEAVING, Tick(), Planned(2, WITHOUT_B), now=10.0)
    state, _ = after(state, StageBroken(0, epoch(2), SHORT, None), now=11.0)
    assert not any(isinstance(c, MakePlan) for c in after(state, Tick(), now=15.9)[1])
    assert MakePlan(3, (0, 2)) in after(state, Tick(), now=16.0)[1]


def test_a_share_of_a_node_is_kept_for_plans() -> None:
    half = Heard(1, condition=Condition(share=0.5))
    state, commands = after(serving(), half)
    assert (state.members[1].condition.share, commands) == (0.5, [])
    assert said(serving(), half) == ["b (host:7002) computes for at most 50% of the time"]
    # A new process has a policy of its own.
    assert after(state, Joined(1, hello("b", 555)))[0].members[1].condition == Condition()
