"""Files that nodes lack: which are ordered from whom, when plans are tried anew, and what users are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.net.clusters import (
    GONE,
    NAMES,
    SHORT,
    THREE,
    TO_PLAN,
    after,
    arrived,
    chain,
    epoch,
    fresh,
    hello,
    kinds,
    said,
    serving,
)

from shoal.engine.errors import ModelFileError, NoPlanError
from shoal.net.events import (
    Command,
    Fail,
    FilesHeld,
    Heard,
    Joined,
    Left,
    LinksMeasured,
    MakePlan,
    Moved,
    Planned,
    Proposed,
    StageBroken,
    StageLoaded,
    Tick,
)
from shoal.net.holding import FetchReport, orders, reports, same_order
from shoal.net.members import ClusterState, peer_of
from shoal.net.messages import Condition, Fetch, Held, Hello, Source
from shoal.net.placement import COORDINATOR, FilesMissingError
from shoal.planner import LinkSpeed

ALONE = chain(("a", 0, 6), tokens_per_s=10.0)
TARGET = {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
MB = 1_000_000


def lacking(name: str, number: int, units: Sequence[int]) -> Hello:
    full = hello(name, number)
    assert full.offer is not None
    return replace(full, offer=replace(full.offer, held=tuple(units)))


def holds(member: int, *units: int, wanted: int = 0, got: int = 0, problem: str = "") -> FilesHeld:
    return FilesHeld(member, Held(units, wanted, got, problem))


PARTS = (
    Joined(0, hello("a", 100)),
    Joined(1, lacking("b", 101, ())),
    Joined(2, lacking("c", 102, (5,))),
    LinksMeasured(),
)
FIRST = Planned(1, replace(ALONE, target=TARGET))


def alone() -> ClusterState:
    """Only a holds all files, and serves since time 0."""
    state, _ = after(fresh(moves="move"), *PARTS, FIRST, StageLoaded(0, epoch(1)))
    assert state.phase == "serving"
    return state


def ordered(state: ClusterState, now: float = 100.0, **copies: tuple[int, ...]) -> dict[int, Fetch]:
    return orders(state, copies, {}, now)


def source(state: ClusterState, member: int, *units: int) -> Source:
    return Source(peer_of(state.members[member]), units)


# --- orders


def test_nodes_that_hold_all_files_get_no_orders() -> None:
    assert ordered(serving()) == {}


def test_each_node_gets_what_the_target_wants_from_whoever_has_it() -> None:
    state = alone()
    assert ordered(state) == {
        1: Fetch((2, 3), (source(state, 0, 2, 3),)),
        2: Fetch((4, 5), (source(state, 0, 4),)),
    }
    state, _ = after(state, holds(1, 2, 4))
    found = ordered(state)
    assert found[1] == Fetch((3, 2), (source(state, 0, 3),))
    assert found[2] == Fetch((4, 5), (source(state, 0, 4), source(state, 1, 4)))


def test_copies_are_wanted_after_the_target_and_rare_units_first() -> None:
    state, _ = after(alone(), holds(1, 0, 2))
    assert ordered(state, b=(5, 0, 1, 3), a=(3,))[1] == Fetch((3, 2), (source(state, 0, 3),))
    state, _ = after(state, holds(1, 0, 2, 3))
    assert ordered(state, b=(5, 0, 1, 3), a=(3,))[1] == Fetch(
        (2, 3, 1, 0, 5), (source(state, 0, 1, 5), source(state, 2, 5))
    )


def test_the_nearest_source_is_first() -> None:
    state, _ = after(alone(), holds(2, 2, 3, 5))
    slow, quick = LinkSpeed(0.001, 1e6), LinkSpeed(0.01, 1e8)
    for links, expected in [
        ({("a", "b"): slow, ("c", "b"): quick}, [2, 0]),
        ({("a", "b"): quick, ("c", "b"): slow}, [0, 2]),
        ({("c", "b"): slow, ("b", "a"): quick, (COORDINATOR, "b"): quick}, [2, 0]),
    ]:
        peers = [one.peer for one in orders(state, {}, links, 100.0)[1].sources]
        assert peers == [peer_of(state.members[i]) for i in expected]


def test_sources_that_are_lost_are_no_sources_and_nobody_fetches_for_one_that_leaves() -> None:
    state, _ = after(alone(), holds(2, 2, 5), Left(2, GONE))
    assert ordered(state) == {1: Fetch((2, 3), (source(state, 0, 2, 3),))}
    state, _ = after(state, Heard(1, condition=Condition(leaving=True)))
    assert ordered(state) == {1: Fetch((), ())}


def test_nothing_is_fetched_from_a_node_before_a_plan_counts_with_it() -> None:
    """A phone that is back before the laptop is planned for as if it were alone."""
    state, _ = after(fresh(NAMES[:2]), Joined(1, lacking("b", 101, (2, 3))), Left(0, GONE), LinksMeasured())
    state, _ = after(state, Planned(1, FilesMissingError("not yet", {"b": tuple(range(6))})))
    state, _ = after(state, Joined(0, hello("a", 100)), now=1.0)
    assert set(ordered(state)[1].units) == set(range(6)) and ordered(state)[1].sources == ()
    state, _ = after(state, LinksMeasured(), Planned(2, replace(ALONE, target=TARGET)), now=1.1)
    assert ordered(state)[1] == Fetch((2, 3), ())


def test_a_node_that_comes_with_files_fetches_when_others_have_had_time_to_come_back() -> None:
    """A process that has lost its connection goes on at once."""
    state = alone()
    assert ordered(state, now=9.9).keys() == {1} and ordered(state, now=10.0).keys() == {1, 2}
    state, _ = after(state, Left(2, GONE), Joined(2, lacking("c", 102, (5,))), now=20.0)
    assert ordered(state, now=20.0).keys() == {1, 2}
    state, _ = after(state, Left(2, GONE), Joined(2, lacking("c", 103, (5,))), now=30.0)
    assert ordered(state, now=39.9).keys() == {1} and ordered(state, now=40.0).keys() == {1, 2}


def test_an_order_is_sent_again_only_for_other_units_or_sources() -> None:
    state = alone()
    one = ordered(state)[1]
    assert not same_order(None, one) and same_order(None, Fetch((), ()))
    assert same_order(one, Fetch(one.units[::-1], one.sources))
    assert not same_order(one, Fetch(one.units[:1], one.sources))
    assert not same_order(one, Fetch(one.units, ()))
    assert not same_order(one, Fetch(one.units, (source(state, 0, 2),)))


# --- plans


def plans_of(commands: list[Command]) -> list[MakePlan]:
    return [command for command in commands if isinstance(command, MakePlan)]


def test_each_unit_that_arrives_is_planned_for_and_layers_move_to_it() -> None:
    state, commands = after(alone(), Tick(), now=20.0)
    assert not plans_of(commands)  # the target alone is no reason
    state, _ = after(state, holds(1, 2), now=20.0)
    state, commands = after(state, Tick(), now=20.1)
    assert plans_of(commands) == [MakePlan(2, (0, 1, 2))]
    state, _ = after(state, holds(1, 2, 3), now=20.2)  # while that is planned
    state, commands = after(state, Planned(2, replace(ALONE, target=TARGET)), now=20.3)
    assert commands == [] and state.transition is None
    state, commands = after(state, Tick(), now=20.5)
    assert plans_of(commands) == [MakePlan(3, (0, 1, 2))]
    state, commands = after(state, Planned(3, replace(ALONE, target=TARGET)), Tick(), now=20.6)
    assert not plans_of(commands)


def test_a_plan_with_fetched_layers_begins_a_transition() -> None:
    state, _ = after(alone(), holds(1, 2, 3, 4, 5), Tick(), now=20.0)
    better = replace(chain(("a", 0, 2), ("b", 2, 6), tokens_per_s=20.0), target={"b": (1, 2, 3, 4, 5)})
    assert said(state, Planned(2, better), 20.1) == ["a plan with more nodes is better: changing to it"]
    state, commands = after(state, Planned(2, better), now=20.1)
    assert state.transition is not None and kinds(commands).count("SendAssign") == 2
    state, _ = arrived(state, now=20.2)
    state, _ = after(state, holds(1, 1, 2, 3, 4, 5), Tick(), now=21.0)
    more = chain(("a", 0, 1), ("b", 1, 6), tokens_per_s=30.0)
    assert said(state, Planned(3, more), 21.1) == ["a plan with fetched layers is better: changing to it"]


def test_a_plan_for_which_a_node_has_no_memory_is_tried_again_when_something_has_changed() -> None:
    state, _ = after(alone(), holds(1, 2, 3, 4, 5), Tick(), now=20.0)
    better = replace(chain(("a", 0, 2), ("b", 2, 6), tokens_per_s=20.0), target={"b": (1, 2, 3, 4, 5)})
    alike = replace(better, tokens_per_s=25.0)
    state, _ = after(state, Planned(2, better), StageBroken(0, epoch(2), SHORT, None), now=20.1)
    assert not plans_of(after(state, Tick(), now=25.0)[1])
    state, commands = after(state, *(Heard(i) for i in range(3)), Tick(), now=25.2)
    assert plans_of(commands)
    state, commands = after(state, Planned(3, alike), now=25.3)
    assert (state.transition, commands) == (None, [])
    later, commands = after(state, *(Heard(i) for i in range(3)), Tick(), now=620.0)
    assert not plans_of(commands), "nobody asks again and again"
    later, commands = after(later, *(Heard(i) for i in range(3)), Tick(), now=620.2)
    assert plans_of(commands) and after(later, Planned(4, alike), now=620.3)[0].transition is not None
    # A plan with other stages, and one after a device has restarted, are tried at once.
    state = replace(state, trial=True)
    other = replace(better, stages=chain(("a", 0, 3), ("b", 3, 6)).stages)
    assert after(state, Planned(3, other), now=26.0)[0].transition is not None
    state, _ = after(state, Joined(2, lacking("c", 555, (5,))), now=26.0)
    state = replace(state, trial=True)
    assert after(state, Planned(state.plans, alike), now=26.1)[0].transition is not None


def test_a_trial_that_comes_too_late_is_made_again_for_what_was_fetched() -> None:
    both = replace(chain(("a", 0, 3), ("b", 3, 6), tokens_per_s=20.0), target={"b": (2, 3, 4, 5)})
    state, _ = after(alone(), holds(1, 3, 4, 5), Tick(), now=20.0)
    state, _ = after(state, Planned(2, both), now=20.0)
    state, _ = arrived(state, now=20.1)
    state, commands = after(state, holds(1, 2, 3, 4, 5), Tick(), now=21.0)
    assert plans_of(commands) == [MakePlan(3, (0, 1, 2))]
    state, _ = after(state, Proposed(chain(("a", 0, 4), ("b", 4, 6)), "a test"), now=21.1)
    assert state.transition is not None
    state, _ = after(state, Planned(3, chain(("a", 0, 2), ("b", 2, 6), tokens_per_s=30.0)), now=21.2)
    state, _ = arrived(state, now=21.3)
    state, commands = after(state, Tick(), now=21.4)
    assert plans_of(commands) == [MakePlan(4, (0, 1, 2))]


def test_layers_do_not_move_for_each_file_but_for_the_last() -> None:
    both = replace(chain(("a", 0, 5), ("b", 5, 6), tokens_per_s=20.0), target={"b": (2, 3, 4, 5)})
    state, _ = after(alone(), holds(1, 3, 5), Tick(), now=20.0)
    state, _ = after(state, Planned(2, both), now=20.0)
    state, _ = arrived(state, now=20.1)
    state, commands = after(state, holds(1, 3, 4, 5), Tick(), now=25.0)
    assert not plans_of(commands)
    assert plans_of(after(state, Tick(), now=25.1)[1])
    assert plans_of(after(state, holds(1, 2, 3, 4, 5), Tick(), now=25.0)[1])


def test_only_units_of_the_target_are_planned_for() -> None:
    """Copies are for the rebalancer, which sees what is held."""
    state, commands = after(alone(), Tick(), holds(1, 5), Tick(), now=20.0)
    assert not plans_of(commands)
    assert plans_of(after(state, holds(1, 3, 5), Tick(), now=20.0)[1])


def test_a_node_without_files_is_planned_for_at_once_and_used_when_it_has_settled() -> None:
    state, _ = after(
        fresh(moves="move"), Joined(0, hello("a", 100)), Left(1, GONE), Left(2, GONE), LinksMeasured()
    )
    state, _ = after(state, Planned(1, ALONE), StageLoaded(0, epoch(1)))
    state, commands = after(state, Joined(1, lacking("b", 101, ())), LinksMeasured(), Tick(), now=1.0)
    assert plans_of(commands) == [MakePlan(2, (0, 1))]
    state, _ = after(state, Planned(2, replace(ALONE, target=TARGET)), now=1.1)
    assert ordered(state)[1].units == (2, 3)
    quick = replace(chain(("a", 0, 2), ("b", 2, 6), tokens_per_s=20.0), target=TARGET)
    state, commands = after(state, holds(1, 2, 3, 4, 5), Tick(), now=3.2)
    assert not plans_of(commands), "it has just joined"
    state, commands = after(state, Joined(2, lacking("c", 102, (0,))), LinksMeasured(), Tick(), now=3.3)
    assert plans_of(commands) == [MakePlan(3, (0, 1, 2))]
    state, _ = after(state, Planned(3, quick), Tick(), now=3.4)
    assert state.transition is None and state.members[2].target == (4, 5)
    state, commands = after(state, Tick(), now=4.1)
    assert plans_of(commands) == [MakePlan(4, (0, 1, 2))]
    state, _ = after(state, Planned(4, quick), now=4.2)
    assert state.transition is not None


def test_what_a_lost_node_should_have_held_is_planned_for_anew() -> None:
    state, _ = after(alone(), Tick(), now=20.0)
    state, commands = after(state, Left(2, GONE), Tick(), now=20.1)
    assert plans_of(commands) == [MakePlan(2, (0, 1))]
    state, _ = after(state, Planned(2, replace(ALONE, target={"a": (0, 1, 2), "b": (3, 4, 5)})), now=20.2)
    assert ordered(state)[1].units == (3, 4, 5)
    state, commands = after(state, Tick(), now=20.3)
    assert not plans_of(commands)
    state, _ = after(state, Joined(2, lacking("c", 102, (4,))), LinksMeasured(), now=20.4)
    assert ordered(state)[2].units == (5, 4), "the same process goes on with what it had to fetch"


def test_no_stage_is_given_to_a_node_without_its_files() -> None:
    unheld = chain(("a", 0, 3), ("b", 3, 6), tokens_per_s=20.0)
    state, _ = after(alone(), holds(1, 3, 4, 5), Tick(), holds(1, 3), now=20.0)
    state, commands = after(state, Planned(2, unheld), now=20.1)  # they are gone again
    assert commands == [] and state.transition is None
    _, (refused,) = after(state, Proposed(unheld, "a test"), now=20.2)
    assert isinstance(refused, Moved)
    assert refused.failure == "b does not have the files of units [3, 6)"
    state, commands = after(fresh(), *PARTS, Planned(1, unheld))
    assert plans_of(commands) == [MakePlan(2, (0, 1, 2))] and state.phase == "planning"


def test_a_node_without_its_files_after_all_is_not_used_again() -> None:
    """It says that it holds units, and cannot load them."""
    state, _ = after(alone(), holds(1, 3, 4, 5), Tick(), now=20.0)
    state, _ = after(state, Planned(2, chain(("a", 0, 3), ("b", 3, 6), tokens_per_s=20.0)), now=20.1)
    broken = ModelFileError("b: unit 3 was altered")
    assert state.transition is not None
    state, _ = arrived(state, now=20.2)
    state, _ = after(state, StageBroken(1, state.epoch, broken, None), now=21.0)
    assert state.members[1].faulty == 101 and state.phase in ("measuring", "planning")
    state, commands = after(state, Joined(1, lacking("b", 101, (3, 4, 5))), now=30.0)
    assert kinds(commands) == ["HangUp"]


def test_files_that_are_missing_in_a_transition_are_the_fault_of_a_node_without_a_stage() -> None:
    """One with a stage keeps it."""
    better = Planned(2, chain(("a", 0, 3), ("b", 3, 6), tokens_per_s=20.0))
    state, _ = after(alone(), holds(1, 3, 4, 5), Tick(), better, now=20.0)
    broken = ModelFileError("unit 3 was altered")
    move = state.transition
    assert move is not None
    for member, name in enumerate("ab"):
        found, commands = after(state, StageBroken(member, move.epoch, broken, None), now=20.5)
        assert found.phase == "serving" and found.transition is None
        assert (found.members[member].faulty is not None) == (name == "b")
        assert ("HangUp" in kinds(commands)) == (name == "b")


def test_a_node_that_had_to_remove_files_which_it_was_about_to_load_is_used_again() -> None:
    """It has told so before its stage failed."""
    better = Planned(2, chain(("a", 0, 3), ("b", 3, 6), tokens_per_s=20.0))
    moving, _ = after(alone(), holds(1, 3, 4, 5), Tick(), better, now=20.0)
    served, _ = arrived(moving, now=20.2)
    gone = ModelFileError("unit 3 is missing")
    for state in (moving, served):
        there = state.epoch if state.transition is None else state.transition.epoch
        state, _ = after(state, holds(1, 4, 5), StageBroken(1, there, gone, None), now=21.0)
        assert state.members[1].lost is gone and state.members[1].faulty is None
        state, commands = after(state, Joined(1, lacking("b", 101, (4, 5))), now=30.0)
        assert "HangUp" not in kinds(commands) and state.members[1].alive


def test_nodes_that_suffice_once_they_have_fetched_let_another_leave() -> None:
    state, _ = after(alone(), Heard(0, condition=Condition(leaving=True)), Tick(), now=20.0)
    missing = FilesMissingError("not yet", {"b": (0, 1, 2), "c": (3, 4, 5)})
    state, _ = after(state, Planned(2, missing), now=20.1)
    assert ordered(state) == {
        1: Fetch((0, 1, 2), (source(state, 0, 0, 1, 2),)),
        2: Fetch((3, 4, 5), (source(state, 0, 3, 4),)),
    }
    state, commands = after(state, Tick(), now=21.0)
    assert not plans_of(commands)
    state, commands = after(state, holds(1, 0, 1, 2), holds(2, 3, 4, 5), Tick(), now=22.0)
    assert plans_of(commands) == [MakePlan(3, (1, 2))]
    state, _ = after(state, Planned(3, chain(("b", 0, 3), ("c", 3, 6))), now=22.1)
    assert state.transition is not None and state.transition.why == "a is leaving"


# --- no plan yet


def fetching(**timing: float) -> ClusterState:
    """Nobody holds the last unit but c, which has no other."""
    state, _ = after(
        fresh(NAMES[1:]), Joined(0, lacking("b", 101, (0, 1, 2))), Joined(1, lacking("c", 102, (3, 5))),
        LinksMeasured(),
    )  # fmt: skip
    state = replace(state, timing=replace(state.timing, **timing))
    missing = FilesMissingError("no device has the files of layer 4 yet", {"b": (0, 1, 2), "c": (3, 4, 5)})
    assert said(state, Planned(1, missing)) == [f"waiting for weights. {missing}"]
    state, commands = after(state, Planned(1, missing))
    assert state.phase == "waiting" and not commands
    return state


def test_the_first_plan_waits_for_files_and_patience_for_bytes() -> None:
    state = fetching(patience=6.0)
    missing = state.failure
    assert missing is not None
    for got in range(1, 10):
        heard = Heard(0, answered=True), Heard(1, answered=True)
        event = holds(1, 3, 5, wanted=10 * MB, got=got * MB)
        state, commands = after(state, *heard, event, Tick(), now=5.0 * got)
        assert state.phase == "waiting" and "Fail" not in kinds(commands)
    state, commands = after(state, holds(1, 3, 4, 5, wanted=10 * MB, got=10 * MB), now=46.0)
    assert plans_of(commands) == [MakePlan(2, (0, 1))]
    state, _ = after(state, Planned(2, missing), now=46.0)
    assert state.phase == "waiting"
    state, commands = after(state, Tick(), now=51.0)
    assert "Fail" not in kinds(commands)
    _, commands = after(state, Tick(), now=52.5)
    assert Fail(missing) in commands


def test_without_any_hope_there_is_an_error_at_once() -> None:
    error = NoPlanError("the RAM caps are short")
    assert after(fresh(), *TO_PLAN, Planned(1, error))[1] == [Fail(error)]


def test_progress_is_told_by_tenths_while_nothing_is_served() -> None:
    state = fetching()
    told = list[str]()
    for got in range(0, 201, 4):
        event = holds(1, 3, 5, wanted=200 * MB, got=got * MB)
        told += said(state, event)
        state, _ = after(state, event)
    assert told[0] == "fetching weights: 20 of 200 MB"
    assert len(told) == 10
    whole = holds(1, 3, 4, 5, wanted=200 * MB, got=200 * MB)
    assert said(state, whole)[0] == "c (host:7002) has all files that it should hold"
    state, _ = after(state, whole)
    more = holds(1, 0, 3, 4, 5, wanted=300 * MB, got=300 * MB)
    assert not any("has all files" in line for line in said(state, more)), "copies are not told"
    assert said(serving(THREE), holds(1, *range(6), wanted=100, got=50)) == []


def test_a_problem_is_told_once_if_the_target_needs_the_files() -> None:
    state = alone()
    assert said(state, holds(1, 2, 3, wanted=10, got=5, problem="the disk has no room for copies")) == []
    event = holds(1, wanted=10, got=5, problem="the disk is full")
    assert said(state, event) == ["b (host:7002): the disk is full"]
    state, _ = after(state, event)
    assert said(state, event) == []


# --- reports


def test_reports_have_the_rate_at_which_bytes_arrive() -> None:
    state = alone()
    assert reports(state, 0.0) == ()
    for at in range(40):
        state, _ = after(state, holds(1, wanted=100 * MB, got=at * MB), now=at / 2)
    assert reports(state, 19.6) == (FetchReport("b", 100 * MB, 39 * MB, pytest.approx(2 * MB), ""),)
    assert reports(state, 30.0)[0].bytes_per_s == 0.0
    state, _ = after(state, holds(1, wanted=200 * MB, got=100 * MB), now=20.0)  # another order
    assert reports(state, 20.0)[0].bytes_per_s == pytest.approx(2 * MB)
