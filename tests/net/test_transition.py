"""Transitions as the coordinator decides them: what moves between two placements, and every way through."""

from dataclasses import replace

import pytest
from tests.net.clusters import (
    GONE,
    JOINS,
    KEPT,
    NAMES,
    SHIFTED,
    SHORT,
    THREE,
    TO_PLAN,
    WITHOUT_B,
    A,
    B,
    C,
    after,
    all_prepared,
    arrived,
    assigns,
    chain,
    committed,
    epoch,
    hello,
    kinds,
    said,
    serving,
)

from shoal.engine.errors import NoPlanError, OperatingSystemError
from shoal.net.errors import NodeLostError, StageStuckError
from shoal.net.events import (
    Event,
    HangUp,
    Heard,
    Hold,
    Joined,
    Left,
    MakePlan,
    MeasureLinks,
    Moved,
    Pause,
    Planned,
    Proposed,
    Quiet,
    Reach,
    Reached,
    Resume,
    SendAbort,
    SendAssign,
    SendCommit,
    SendRelease,
    Serve,
    Shift,
    StageBroken,
    StageLoaded,
    StagePrepared,
    Tick,
    Unreach,
)
from shoal.net.members import ClusterState
from shoal.net.messages import Assign, Commit, Condition, Gift, Progress, Take
from shoal.net.placement import Placement
from shoal.net.transition import COMMIT_SECONDS, COPY_SECONDS, HOLD_SECONDS, flows
from shoal.planner.groups import plain_groupings

# --- what moves


@pytest.mark.parametrize(
    ("before", "after_", "moving", "lost"),
    [
        ("aabbcc", "aabbcc", [], (0, 0)),
        ("aabbcc", "abbbcc", [(1, 2, "a", "b")], (0, 0)),
        # Several boundaries at once, and through b.
        ("aabbcc", "abbccc", [(1, 2, "a", "b"), (3, 4, "b", "c")], (0, 0)),
        # The order of the nodes changes.
        ("aabbcc", "ccaabb", [(0, 2, "a", "c"), (2, 4, "b", "a"), (4, 6, "c", "b")], (0, 0)),
        ("aabbcc", "bbaacc", [(0, 2, "a", "b"), (2, 4, "b", "a")], (0, 0)),
        # One joins, one leaves, both at once.
        ("aaabbb", "aaccbb", [(2, 3, "a", "c"), (3, 4, "b", "c")], (0, 0)),
        ("aabbcc", "aaaccc", [(2, 3, "b", "a"), (3, 4, "b", "c")], (0, 0)),
        ("aaabbb", "aaaccc", [(3, 6, "b", "c")], (0, 0)),
        # The middle one is lost: what it held is on no node.
        ("aa..cc", "aaaccc", [], (2, 4)),
        # Both neighbours shift besides.
        ("aa..cc", "accccc", [(1, 2, "a", "c")], (2, 4)),
        ("aa..cc", "aaaaac", [(4, 5, "c", "a")], (2, 4)),
        # The last is lost. The LM head holds nothing.
        ("aabb..", "aaabbb", [(2, 3, "b", "a")], (4, 5)),
        ("aabbb.", "aaabbb", [(2, 3, "b", "a")], (0, 0)),
        ("..bbcc", "bbbccc", [(3, 4, "b", "c")], (0, 2)),
        # Both ends: the range covers what is between, which does not move then.
        ("..bb..", "bbbbbb", [], (0, 5)),
        ("a.bb.c", "aaaccc", [], (1, 5)),
        ("a.bb.c", "aabbcc", [], (1, 5)),
    ],
)
def test_what_moves_between_two_placements(
    before: str, after_: str, moving: list[tuple[int, int, str, str]], lost: tuple[int, int]
) -> None:
    index = {name: i for i, name in enumerate("abc")}
    found = flows([index.get(name) for name in before], [index[name] for name in after_])
    assert found == (
        tuple((first, last, index[giver], index[taker]) for first, last, giver, taker in moving),
        lost,
    )


# --- the way through


def test_layers_move_beside_a_chain_that_is_arrived() -> None:
    state, commands = after(serving(), Proposed(SHIFTED, "b is idle"), now=10.0)
    assert (state.phase, state.epoch, state.placement) == ("serving", epoch(1), THREE)
    assert commands == [
        SendAssign(0, Assign(epoch(2), 0, 1, B, 4, 99, plain_groupings(3), 1, (Gift(B, 1, 2),), ())),
        SendAssign(
            1,
            Assign(epoch(2), 1, 5, C, 4, 100, plain_groupings(3), 1, (), (Take(100, 1, 2), Take(102, 4, 5))),
        ),
        SendAssign(2, Assign(epoch(2), 5, 6, None, 4, 101, plain_groupings(3), 1, (Gift(B, 4, 5),), ())),
        Reach(epoch(2), 0),
    ]
    state, commands = after(state, StagePrepared(1, epoch(2), 0.5, 0), Reached(epoch(2)), now=11.0)
    state, more = after(state, StagePrepared(0, epoch(2), 0.5, 700), now=11.5)
    assert (commands, more) == ([], [])
    state, commands = after(state, StagePrepared(2, epoch(2), 0.5, 300), now=12.0)
    assert commands == [Hold(epoch(2), epoch(1))]
    assert (state.phase, state.epoch) == ("serving", epoch(1))
    state, commands = after(state, Quiet(epoch(2), KEPT), now=12.25)
    assert commands == [SendCommit(i, Commit(epoch(2), KEPT)) for i in range(3)]
    assert (state.phase, state.epoch, state.placement) == ("committing", epoch(2), SHIFTED)
    state, commands = after(state, StageLoaded(1, epoch(2)), StageLoaded(0, epoch(2)), now=12.5)
    assert commands == []
    state, commands = after(state, StageLoaded(2, epoch(2)), now=13.0)
    assert commands == [
        Serve(epoch(2), 1),
        Moved(
            epoch(2), "b is idle", (Shift(1, 2, "a", "b"), Shift(4, 5, "c", "b")), (0, 0), False, 3.0, 1.0,
            1000,
        ),
    ]  # fmt: skip
    assert (state.phase, state.transition, state.loaded) == ("serving", None, {0, 1, 2})
    # The next one begins where this one has ended.
    _, commands = after(state, Proposed(THREE, "again"))
    assert {assign.base for assign in assigns(commands).values()} == {2}
    assert {assign.epoch for assign in assigns(commands).values()} == {epoch(3)}


def test_the_last_report_may_be_that_of_the_first_node_that_is_reached() -> None:
    state, _ = after(serving(), Proposed(SHIFTED, ""))
    state, commands = after(state, *all_prepared(state)[:-1])
    assert commands == []
    assert after(state, Reached(epoch(2)))[1] == [Hold(epoch(2), epoch(1))]


def test_the_order_of_the_nodes_changes() -> None:
    turned = chain(("c", 0, 2), ("a", 2, 6))
    state, commands = after(serving(), Proposed(turned, ""))
    orders = assigns(commands)
    assert list(orders) == [2, 0, 1]
    assert (orders[2].next, orders[2].previous) == (A, 99)
    assert (orders[0].next, orders[0].previous) == (None, 102)
    assert orders[0].gives == (Gift(C, 0, 2),)
    assert orders[0].takes == (Take(101, 2, 4), Take(102, 4, 6))
    assert orders[1] == Assign(epoch(2), 0, 0, None, 4, 99, base=1, gives=(Gift(A, 2, 4),))
    assert commands[-1] == Reach(epoch(2), 2)
    # b has no unit any more. It is waited for, and may go then.
    state = committed(state)
    state, commands = after(state, StageLoaded(0, epoch(2)), StageLoaded(2, epoch(2)))
    assert commands == []
    state, commands = after(state, StageLoaded(1, epoch(2)))
    assert commands[:2] == [Serve(epoch(2), 1), SendRelease(1, epoch(2))]
    assert state.loaded == state.standing == {0, 2}


def test_a_node_that_joins_gets_the_history_of_the_sessions() -> None:
    state, commands = after(serving(WITHOUT_B), Proposed(THREE, ""))
    orders = assigns(commands)
    assert orders[0].gives == (Gift(B, 2, 3, history=True),)
    assert orders[2].gives == (Gift(B, 3, 4, history=True),)
    assert orders[1].takes == (Take(100, 2, 3), Take(102, 3, 4)) and orders[1].base == 1
    assert arrived(state)[0].standing == {0, 1, 2}


def test_a_plan_with_a_node_that_is_back_becomes_a_transition_within_ten_seconds() -> None:
    state = serving(chain(("a", 0, 3), ("c", 3, 6), tokens_per_s=100.0))
    state, _ = after(state, Left(1, GONE), now=20.0)
    state, _ = after(state, JOINS[1], now=21.0)
    state, commands = after(state, Tick(), now=24.0)
    assert MakePlan(2, (0, 1, 2)) in commands
    state, commands = after(state, Planned(2, replace(THREE, tokens_per_s=150.0)), now=24.5)
    assert set(assigns(commands)) == {0, 1, 2} and state.phase == "serving"
    assert not any(isinstance(command, Pause) for command in commands)
    state, commands = arrived(state, now=26.0)
    assert commands[0] == Serve(epoch(2), 1) and state.placement.tokens_per_s == 150.0


def test_a_failed_attempt_to_use_a_node_that_is_back_is_repeated_later() -> None:
    state = serving(chain(("a", 0, 3), ("c", 3, 6), tokens_per_s=100.0), now=10.0)
    state, _ = after(state, Left(1, GONE), JOINS[1], now=20.0)
    state, _ = after(state, Tick(), Planned(2, replace(THREE, tokens_per_s=150.0)), now=23.0)
    state, _ = after(state, StageBroken(1, epoch(2), SHORT, None), *(Heard(i) for i in range(3)), now=24.0)
    assert not any(isinstance(command, MakePlan) for command in after(state, Tick(), now=28.9)[1])
    assert MakePlan(3, (0, 1, 2)) in after(state, Tick(), now=29.0)[1]


def test_a_proposal_that_overtakes_a_plan_with_a_node_that_is_back_only_delays_it() -> None:
    state = serving(chain(("a", 0, 3), ("c", 3, 6), tokens_per_s=100.0), now=10.0)
    state, _ = after(state, Left(1, GONE), JOINS[1], now=20.0)
    state, _ = after(state, Tick(), Proposed(chain(("a", 0, 2), ("c", 2, 6)), ""), now=23.0)
    planned = Planned(2, replace(THREE, tokens_per_s=150.0))
    broken, _ = after(state, StageBroken(0, epoch(1), GONE, 102, again=True), now=23.1)
    for changing, counter in ((state, 2), (committed(state, 23.1), 2), (broken, 3)):
        late, commands = after(changing, planned, now=23.2)
        assert commands == [] and not late.trial
        last = [StageLoaded(i, epoch(counter)) for i in (0, 2)]
        late, _ = after(late, *last, now=23.2) if late.phase == "committing" else arrived(late, now=23.2)
        late, _ = after(late, Heard(0), Heard(1), Heard(2), now=27.0)
        assert MakePlan(3, (0, 1, 2)) in after(late, Tick(), now=27.0)[1]


def test_layers_that_move_again_and_again_keep_no_node_out() -> None:
    state, _ = after(serving(WITHOUT_B), Left(1, GONE), JOINS[1], now=10.0)
    for second in (11.0, 12.0, 13.0):
        assert MakePlan(2, (0, 1, 2)) not in after(state, Tick(), now=second - 0.5)[1]
        state, _ = after(
            state, Proposed(chain(("a", 0, int(second) % 4 + 1), ("c", int(second) % 4 + 1, 6)), "")
        )
        state, _ = arrived(state, now=second)
    assert MakePlan(2, (0, 1, 2)) in after(state, Tick(), now=13.25)[1]


def test_events_of_other_epochs_and_nodes_change_nothing() -> None:
    state, _ = after(serving(chain(("a", 0, 3), ("b", 3, 6))), Proposed(chain(("b", 0, 6)), ""))
    for event in (
        StagePrepared(0, epoch(1), 0.0, 0),
        StagePrepared(2, epoch(2), 0.0, 0),  # has no part in it
        Reached(epoch(1)),
        Quiet(epoch(2), KEPT),  # was not asked for yet
        StageLoaded(0, epoch(2)),
        StageLoaded(0, epoch(1)),
    ):
        assert after(state, event) == (state, [])
    state, _ = after(state, *all_prepared(state))
    for event in (Quiet(epoch(1), KEPT), Reached(epoch(2)), StagePrepared(0, epoch(2), 0.0, 0)):
        assert after(state, event) == (state, [])
    assert after(serving(), Quiet(epoch(1), ()), Reached(epoch(1)), StagePrepared(0, epoch(1), 0, 0))[1] == []


# --- refusals


def refusal(state: ClusterState, placement: Placement, now: float = 0.0) -> str:
    before, commands = after(state, Proposed(placement, "why not"), now=now)
    assert before == state
    (moved,) = commands
    assert isinstance(moved, Moved) and (moved.epoch, moved.why) == (None, "why not")
    return moved.failure


def test_a_proposal_that_cannot_be_carried_out_is_refused() -> None:
    moving, _ = after(serving(), Proposed(SHIFTED, ""))
    lost, _ = after(serving(), Left(1, GONE))
    assert refusal(moving, WITHOUT_B) == refusal(lost, WITHOUT_B) == "the chain is changing already"
    assert refusal(serving(), THREE) == "it is the plan in force"
    _, (moved,) = after(serving(), Proposed(SHIFTED, "", base=epoch(0)))
    assert isinstance(moved, Moved) and moved.failure == "the chain has changed since"
    assert after(serving(), Proposed(SHIFTED, "", base=epoch(1)))[0].transition is not None
    assert "--moves off" in refusal(replace(serving(), moves="off"), SHIFTED)
    assert "do not cover" in refusal(serving(), chain(("a", 0, 3), ("b", 4, 6)))
    assert "must be one of" in refusal(serving(), chain(("a", 0, 3), ("d", 3, 6)))
    leaving, _ = after(serving(), Heard(1, condition=Condition(leaving=True)))
    assert "must be one of ['a', 'c']" in refusal(leaving, SHIFTED)


@pytest.mark.parametrize("moves", ["off", "reload"])
def test_nodes_that_are_back_are_not_used_if_nothing_may_change(moves: str) -> None:
    state, _ = after(replace(serving(WITHOUT_B), moves=moves), Left(1, GONE), JOINS[1], now=10.0)
    asked = any(isinstance(command, MakePlan) for command in after(state, Tick(), now=60.0)[1])
    assert asked == (moves == "reload")


def test_without_moves_all_is_loaded_again() -> None:
    state, commands = after(replace(serving(), moves="reload"), Proposed(SHIFTED, ""))
    assert (state.phase, state.epoch) == ("loading", epoch(2))
    assert kinds(commands) == ["Pause", "SendAssign", "SendAssign", "SendAssign"]
    assert {assign.base for assign in assigns(commands).values()} == {None}


# --- a transition that fails

ABORTS = [SendAbort(0, epoch(2)), SendAbort(1, epoch(2)), SendAbort(2, epoch(2)), Unreach(epoch(2))]


@pytest.mark.parametrize("holding", [False, True])
def test_a_node_that_cannot_prepare_leaves_the_chain_as_it_is(holding: bool) -> None:
    state, _ = after(serving(), Proposed(SHIFTED, "why"), now=10.0)
    if holding:
        state, _ = after(state, *all_prepared(state), now=10.0)
    broken = StageBroken(1, epoch(2), SHORT, None)
    assert said(state, broken, now=11.0) == ["the layers stay where they are: 12 MB are missing"]
    state, commands = after(state, broken, now=11.0)
    resume = [Resume(epoch(1))] if holding else []
    assert commands[:-1] == ABORTS + resume
    moved = commands[-1]
    assert isinstance(moved, Moved) and moved.failure == "12 MB are missing" and moved.epoch == epoch(2)
    assert (state.phase, state.epoch, state.placement, state.alive()) == (
        "serving",
        epoch(1),
        THREE,
        (0, 1, 2),
    )
    # Late reports of it, and its Quiet, are of no use any more.
    late: list[Event] = [StagePrepared(1, epoch(2), 0, 0), Reached(epoch(2)), Quiet(epoch(2), KEPT), broken]
    assert after(state, *late, now=11.0) == (state, [])
    # The same is not tried again at once, and later for longer; another one is.
    assert refusal(state, SHIFTED, now=15.9) == "it has just failed"
    again, _ = after(state, Proposed(SHIFTED, ""), now=16.0)
    assert again.transition is not None and again.transition.epoch == epoch(3)
    again, _ = after(again, StageBroken(1, epoch(3), SHORT, None), now=17.0)
    assert refusal(again, SHIFTED, now=26.9) == "it has just failed"
    other, commands = after(state, Proposed(WITHOUT_B, ""), now=12.0)
    assert {assign.epoch for assign in assigns(commands).values()} == {epoch(3)}
    # It is no reason for a plan with other nodes: there are none.
    heard, _ = after(state, *(Heard(i) for i in range(3)), now=60.0)
    assert not any(isinstance(command, MakePlan) for command in after(heard, Tick(), now=60.0)[1])
    # One that is served ends the row.
    assert arrived(other, now=13.0)[0].setback is None


@pytest.mark.parametrize("open_ended", [False, True])
def test_a_taker_that_cannot_be_reached_is_not_lost_but_the_link_is_measured_again(open_ended: bool) -> None:
    known = replace(serving(open_ended=open_ended), estimated=frozenset())  # from before
    state, _ = after(known, Proposed(SHIFTED, ""))
    state, commands = after(state, StageBroken(0, epoch(2), GONE, 101))
    assert commands[-1] == MeasureLinks(((0, 1),)) and Resume(epoch(1)) not in commands
    assert state.alive() == (0, 1, 2) and state.phase == "serving"


def test_preparing_is_bounded_by_the_bytes_that_are_loaded_and_copied() -> None:
    state, _ = after(serving(unit_bytes=(20_000_000,) * 6), Proposed(SHIFTED, "", copying=20.0), now=100.0)
    bound = 30.0 + 2 + 80.0  # b loads two units of 20 MB
    state, _ = after(state, StagePrepared(0, epoch(2), 1, 1), *(Heard(i) for i in range(3)), now=200.0)
    assert Unreach(epoch(2)) not in after(state, Tick(), now=100.0 + bound)[1]
    late = f"b (host:7002), c (host:7003) could not prepare within {bound:.0f} s"
    assert said(state, Tick(), now=100.1 + bound) == [f"the layers stay where they are: {late}"]
    assert Unreach(epoch(2)) in after(state, Tick(), now=100.1 + bound)[1]
    short, _ = after(serving(), Proposed(SHIFTED, ""))
    assert short.transition is not None and short.transition.bound == 30.0 + COPY_SECONDS


def test_a_chain_is_not_held_for_ever() -> None:
    state, _ = after(serving(), Proposed(SHIFTED, ""), now=100.0)
    state, _ = after(state, *all_prepared(state), now=130.0)
    assert Resume(epoch(1)) not in after(state, Tick(), now=130.0 + HOLD_SECONDS)[1]
    state, commands = after(state, Tick(), now=130.1 + HOLD_SECONDS)
    assert Resume(epoch(1)) in commands and state.transition is None and state.phase == "serving"


# --- deaths


def test_the_others_keep_what_they_hold_when_a_node_is_lost() -> None:
    state, commands = after(serving(), Left(1, GONE))
    assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    assert state.standing == {0, 2} and state.epoch == epoch(1)
    state, commands = after(state, Planned(2, WITHOUT_B))
    assert commands == [
        SendAssign(0, Assign(epoch(2), 0, 3, C, 4, 99, plain_groupings(2), 1, ended=True)),
        SendAssign(2, Assign(epoch(2), 3, 6, None, 4, 100, plain_groupings(2), 1, ended=True)),
        Reach(epoch(2), 0),
    ]
    assert (state.phase, state.epoch) == ("moving", epoch(1))
    state, commands = after(state, *all_prepared(state))
    assert commands == [Hold(epoch(2), epoch(1))]
    state, commands = after(state, Quiet(epoch(2), KEPT))
    assert commands == [SendCommit(i, Commit(epoch(2), KEPT, 2, 4)) for i in (0, 2)]
    state, commands = after(state, StageLoaded(0, epoch(2)), StageLoaded(2, epoch(2)))
    assert commands[0] == Serve(epoch(2), 1, (2, 4))
    moved = commands[1]
    assert isinstance(moved, Moved) and moved.recovery and moved.lost == (2, 4) and moved.failure == ""


@pytest.mark.parametrize(
    ("dead", "placement", "lost"),
    [
        (0, chain(("b", 0, 4), ("c", 4, 6)), (0, 2)),  # the head's neighbour
        (2, chain(("a", 0, 3), ("b", 3, 6)), (4, 5)),
    ],
)
def test_the_death_of_the_first_or_last_node(dead: int, placement: Placement, lost: tuple[int, int]) -> None:
    state, _ = after(serving(), Left(dead, GONE), Planned(2, placement))
    move = state.transition
    assert move is not None and move.lost == lost
    assert after(state, *all_prepared(state))[1] == [Hold(epoch(2), epoch(1))]
    assert arrived(state)[1][0] == Serve(epoch(2), 1, lost)


def test_both_ends_die() -> None:
    state, _ = after(serving(), Left(0, GONE), Left(2, GONE))
    state, commands = after(state, Planned(3, chain(("b", 0, 6))))
    assert assigns(commands) == {1: Assign(epoch(2), 0, 6, None, 4, 99, plain_groupings(1), 1, ended=True)}
    assert arrived(state)[1][0] == Serve(epoch(2), 1, (0, 5))


def test_the_second_death_is_planned_for_from_the_same_base() -> None:
    """In each phase of the first recovery before its commit."""
    alone = chain(("a", 0, 6))
    planning, _ = after(serving(), Left(1, GONE))
    moving, _ = after(planning, Planned(2, WITHOUT_B))
    holding, _ = after(moving, *all_prepared(moving))
    for state in (planning, moving, holding):
        state, commands = after(state, Left(2, GONE))
        aborted = [] if state.issued == 1 else [SendAbort(0, epoch(2)), Unreach(epoch(2))]
        assert [c for c in commands if not isinstance(c, Moved)] == [
            HangUp(2), *aborted, MakePlan(3, (0,)),
        ]  # fmt: skip
        assert (state.phase, state.standing, state.epoch) == ("planning", {0}, epoch(1))
        counter = state.issued + 1
        state, commands = after(state, Planned(3, alone))
        assert assigns(commands) == {
            0: Assign(epoch(counter), 0, 6, None, 4, 99, plain_groupings(1), 1, ended=True)
        }
        assert arrived(state)[1][0] == Serve(epoch(counter), 1, (2, 5))


@pytest.mark.parametrize("holding", [False, True])
def test_a_death_of_the_base_ends_what_is_prepared_beside_it(holding: bool) -> None:
    state, _ = after(serving(), Proposed(SHIFTED, "why"))
    if holding:
        state, _ = after(state, *all_prepared(state))
    state, commands = after(state, Left(1, GONE))
    assert commands[0] == HangUp(1)
    assert commands[1:4] == [SendAbort(0, epoch(2)), SendAbort(2, epoch(2)), Unreach(epoch(2))]
    assert isinstance(commands[4], Moved) and commands[4].failure == "gone"
    assert commands[5:] == [Pause(epoch(1)), MakePlan(2, (0, 2))]
    _, commands = after(state, Planned(2, WITHOUT_B))
    assert {assign.epoch for assign in assigns(commands).values()} == {epoch(3)}
    assert {assign.base for assign in assigns(commands).values()} == {1}


@pytest.mark.parametrize("holding", [False, True])
def test_the_death_of_a_node_that_was_to_join_interrupts_nothing(holding: bool) -> None:
    state, _ = after(serving(WITHOUT_B), Proposed(THREE, ""))
    if holding:
        state, _ = after(state, *all_prepared(state))
    state, commands = after(state, Left(1, GONE))
    resume = [Resume(epoch(1))] if holding else []
    assert commands[:-1] == [
        HangUp(1), SendAbort(0, epoch(2)), SendAbort(2, epoch(2)), Unreach(epoch(2)), *resume,
    ]  # fmt: skip
    assert (state.phase, state.epoch, state.placement) == ("serving", epoch(1), WITHOUT_B)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_between_commit_and_the_last_loaded_begins_anew(dead: int) -> None:
    """Also that of a node without a unit in the new epoch, whose keys and values may not have arrived."""
    state, _ = after(serving(), Proposed(chain(("c", 0, 2), ("a", 2, 6)), ""))
    state, commands = after(committed(state), StageLoaded(dead, epoch(2)), Left(dead, GONE))
    assert Pause(epoch(2)) in commands and state.standing == frozenset()
    names = [name for name in NAMES if name != NAMES[dead]]
    _, commands = after(state, Planned(2, chain((names[0], 0, 3), (names[1], 3, 6))))
    assert kinds(commands) == ["SendAssign", "SendAssign"]
    assert {(assign.epoch, assign.base) for assign in assigns(commands).values()} == {(epoch(3), None)}


def test_a_fault_between_commit_and_the_last_loaded_begins_anew() -> None:
    state, _ = after(serving(), Proposed(SHIFTED, ""), now=10.0)
    state = committed(state, now=10.0)
    for event, now in (
        (StageBroken(1, epoch(2), GONE, None), 11.0),
        (StageBroken(1, epoch(2), GONE, 102, True), 11.0),
        (JOINS[1], 11.0),
        (Tick(), 10.1 + COMMIT_SECONDS),
    ):
        quick, _ = after(state, *(Heard(i) for i in range(3)), now=now)
        failed, commands = after(quick, event, now=now)
        assert (failed.phase, failed.alive(), failed.placement) == ("loading", (0, 1, 2), SHIFTED), event
        assert Pause(epoch(2)) in commands
        assert {(a.epoch, a.base) for a in assigns(commands).values()} == {(epoch(3), None)}
        assert [c.failure != "" for c in commands if isinstance(c, Moved)] == [True]
    # A stage of the base that broke before Commit reached it will never change.
    broken, _ = after(state, StageBroken(1, epoch(1), SHORT, None), now=11.0)
    assert broken.phase == "loading" and broken.alive() == (0, 1, 2)
    # A connection of the base that ends now is of no interest.
    assert after(state, StageBroken(0, epoch(1), GONE, 101), now=11.0) == (state, [])
    assert Pause(epoch(2)) not in after(state, Tick(), now=10.0 + COMMIT_SECONDS)[1]


@pytest.mark.parametrize("counter", [1, 2])
def test_a_call_that_does_not_return_is_noticed_at_any_time(counter: int) -> None:
    """A stage that hangs never stops its loop, so it cannot change either."""
    state, _ = after(serving(), Proposed(SHIFTED, ""), now=10.0)
    state = committed(state, now=10.0)
    hangs = Heard(1, Progress(epoch(counter), 7, 11.1, 1.0, 0))
    assert after(state, Heard(1, Progress(epoch(counter), 7, 11.0, 1.0, 0)))[0] == state
    for event in (hangs, StageBroken(1, epoch(counter), StageStuckError("b hangs"), None)):
        lost, commands = after(state, event, now=11.0)
        assert HangUp(1) in commands and MakePlan(2, (0, 2)) in commands and lost.alive() == (0, 2)
    if counter == 1:  # also before the commit, and in a stage whose chain has ended
        state, _ = after(serving(), Proposed(SHIFTED, ""), now=10.0)
        assert HangUp(1) in after(state, hangs)[1]
        state, _ = after(serving(), Left(2, GONE), now=10.0)
        assert HangUp(1) in after(state, hangs)[1]


def test_the_first_call_after_a_transition_may_read_the_units_that_came_with_it() -> None:
    state, _ = after(serving(unit_bytes=(40_000_000,) * 6), Proposed(SHIFTED, ""))
    state, _ = arrived(state)

    def runs(member: int, seconds: float) -> Heard:
        return Heard(member, Progress(epoch(2), 0, seconds, None, 0))

    # 3 s, 8 times a second, and 4 s for the two units of b; a has no new one.
    assert after(state, runs(1, 15.0), runs(0, 11.0)) == (state, [])
    assert HangUp(1) in after(state, runs(1, 15.1))[1]
    assert HangUp(0) in after(state, runs(0, 11.1))[1]
    # Also while the next transition is committed already: the stage does not stop before its call ends.
    changing, _ = after(state, Proposed(THREE, ""))
    changing = committed(changing)
    assert after(changing, runs(1, 15.0), runs(0, 11.0)) == (changing, [])
    assert HangUp(1) in after(changing, runs(1, 15.1))[1]
    # A stage that was loaded anew may read all of it.
    state, _ = after(state, Tick(busy=True, stalled=True))
    state, _ = arrived(state)
    anew = Heard(1, Progress(epoch(3), 0, 38.0, None, 0))  # 30 s, and 8 s for four units
    assert after(state, anew) == (state, [])


def test_what_fails_in_a_recovery_is_loaded_again() -> None:
    state, _ = after(serving(), Left(1, GONE), Planned(2, WITHOUT_B))
    broken = StageBroken(0, epoch(2), SHORT, None)
    assert said(state, broken) == ["the layers are loaded again: 12 MB are missing"]
    state, commands = after(state, broken)
    assert (state.phase, state.epoch, state.placement) == ("loading", epoch(3), WITHOUT_B)
    assert {assign.base for assign in assigns(commands).values()} == {None}
    # If it fails again, it is the node's fault, as ever.
    state, _ = after(state, StageBroken(0, epoch(3), SHORT, None))
    assert state.members[0].lost is SHORT


def test_a_node_that_does_not_prepare_in_a_recovery_is_lost() -> None:
    state, _ = after(serving(), Left(1, GONE), Planned(2, WITHOUT_B), now=10.0)
    state, _ = after(state, StagePrepared(0, epoch(2), 0, 0), Heard(0), Heard(2), now=30.0)
    assert HangUp(2) not in after(state, Tick(), now=40.0)[1]
    state, commands = after(state, Tick(), now=40.1)
    assert HangUp(2) in commands and HangUp(0) not in commands
    assert MakePlan(3, (0,)) in commands and state.standing == {0}


def test_stages_stand_while_nodes_are_waited_for() -> None:
    state, _ = after(serving(), Left(1, GONE), Planned(2, NoPlanError("12 MB are missing")), now=10.0)
    assert state.phase == "waiting" and state.standing == {0, 2}
    state, commands = after(state, Joined(1, hello("b", 555)), now=40.0)
    state, _ = after(state, Planned(3, NoPlanError("12 MB are missing")), now=40.0)
    state, _ = after(state, *[e for e in TO_PLAN if not isinstance(e, Joined)], now=41.0)
    state, commands = after(state, Planned(4, THREE), now=41.0)
    orders = assigns(commands)
    assert orders[1] == Assign(epoch(2), 2, 4, C, 4, 100, plain_groupings(3), 1, ended=True) and all(
        assign.base == 1 for assign in orders.values()
    )
    assert arrived(state, now=42.0)[1][0] == Serve(epoch(2), 1, (2, 4))


def test_a_newcomer_whom_nobody_tells_the_tokens_is_loaded_with_the_others() -> None:
    """After the loss of c, b gets the LM head alone: no keys and values, and no rows to fill lost ones."""
    before = chain(("a", 0, 5), ("c", 5, 6))
    state, commands = after(serving(before), Left(2, GONE), Planned(2, chain(("a", 0, 5), ("b", 5, 6))))
    assert state.phase == "loading" and {a.base for a in assigns(commands).values()} == {None}
    # If a has it, nothing is lost at all.
    state, commands = after(serving(before), Left(2, GONE), Planned(2, chain(("a", 0, 6))))
    assert arrived(state)[1][0] == Serve(epoch(2), 1, (0, 0))


# --- connections


def test_a_connection_that_failed_alone_costs_nothing() -> None:
    state, commands = after(serving(), StageBroken(0, epoch(1), GONE, 101, again=True))
    assert commands[0] == Pause(epoch(1)) and state.phase == "moving"
    orders = assigns(commands)
    assert [(a.first, a.last, a.base, a.gives, a.takes) for a in orders.values()] == [
        (0, 2, 1, (), ()), (2, 4, 1, (), ()), (4, 6, 1, (), ()),
    ]  # fmt: skip
    # Its neighbours report the ends of their connections, too.
    assert after(state, StageBroken(1, epoch(1), GONE, 102)) == (state, [])
    assert arrived(state)[1][0] == Serve(epoch(2), 1, (0, 0))


def test_a_node_with_a_new_connection_has_lost_its_units_only() -> None:
    state, commands = after(serving(), JOINS[1])
    assert commands[0] == Pause(epoch(1)) and state.phase == "moving"
    assert [assign.base for assign in assigns(commands).values()] == [1, 1, 1]
    assert arrived(state)[1][0] == Serve(epoch(2), 1, (2, 4))


def test_a_new_connection_during_a_transition_ends_it() -> None:
    state, _ = after(serving(), Proposed(SHIFTED, ""))
    # A node of the base.
    lost, commands = after(state, JOINS[1])
    assert SendAbort(0, epoch(2)) in commands and Pause(epoch(1)) in commands
    assert lost.transition is not None and (lost.transition.epoch, lost.transition.lost) == (epoch(3), (2, 4))
    # One that was to join: the chain goes on.
    state, _ = after(serving(WITHOUT_B), Proposed(THREE, ""))
    state, commands = after(state, JOINS[1])
    assert Pause(epoch(1)) not in commands and SendAbort(1, epoch(2)) in commands
    assert (state.phase, state.transition) == ("serving", None)
    # In a recovery it is planned for again.
    state, _ = after(serving(), Left(1, GONE), Planned(2, WITHOUT_B))
    state, commands = after(state, JOINS[2])
    assert commands[-1] == MakePlan(3, (0, 2)) and state.standing == {0}


def test_a_stage_that_breaks_after_its_chain_has_ended_does_not_stand() -> None:
    state, _ = after(serving(), Left(1, GONE), Planned(2, WITHOUT_B))
    state, commands = after(state, StageBroken(0, epoch(1), GONE, None))
    assert commands[-1] == MakePlan(3, (0, 2)) and state.standing == {2} and state.alive() == (0, 2)
    state, _ = after(state, Planned(3, WITHOUT_B))
    assert state.transition is not None and state.transition.lost == (0, 4)


def test_a_chain_that_stands_still_is_loaded_anew_also_beside_a_transition() -> None:
    state, _ = after(serving(), Proposed(SHIFTED, ""))
    state, commands = after(state, Tick(busy=True, stalled=True))
    assert state.phase == "loading" and state.placement == THREE
    assert Unreach(epoch(2)) in commands and Pause(epoch(1)) in commands
    assert {(a.epoch, a.base) for a in assigns(commands).values()} == {(epoch(3), None)}


def test_strict_coordinators_end_when_a_stage_is_lost_and_not_when_a_transition_fails() -> None:
    state, _ = after(serving(WITHOUT_B, recover=False), Proposed(THREE, ""))
    assert after(state, StageBroken(1, epoch(2), SHORT, None))[0].phase == "serving"
    assert after(state, Left(1, GONE))[0].phase == "serving"
    assert after(state, Left(0, GONE))[0].phase == "failed"
    assert after(committed(state), Left(1, NodeLostError("b")))[0].phase == "failed"


def test_a_node_that_cannot_load_a_stage_twice_in_a_row_is_at_fault() -> None:
    """One that has had a stage in the meantime was short of memory for a while."""
    full = OperatingSystemError("no memory is left")

    def fails(state: ClusterState) -> ClusterState:
        state, _ = after(state, Proposed(THREE, ""), now=100.0)
        assert state.transition is not None
        state, _ = after(state, StageBroken(1, state.transition.epoch, full, None), now=100.0)
        assert not state.members[1].alive and state.phase == "serving"
        return state

    once, _ = after(fails(serving(WITHOUT_B)), JOINS[1], now=100.0)
    assert once.members[1].alive
    assert after(fails(once), JOINS[1], now=100.0)[1] == [HangUp(1)]
    state, _ = after(once, Proposed(THREE, ""), now=100.0)
    state, _ = arrived(state, now=100.0)
    state, _ = after(state, Proposed(WITHOUT_B, ""), now=100.0)
    state, _ = arrived(state, now=100.0)
    assert state.placement == WITHOUT_B
    assert after(fails(state), JOINS[1], now=100.0)[0].members[1].alive
