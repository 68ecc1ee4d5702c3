"""The coordinator's decisions as a function: literal cases, and invariants under random interleavings."""

import random
from dataclasses import replace

import pytest

from shoal.engine.errors import NoPlanError, ShoalError
from shoal.net.cluster import ClusterState, Member, decide
from shoal.net.errors import LocalProtocolError, MismatchError, NodeLostError
from shoal.net.events import (
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
    SendAssign,
    SendPing,
    SendRelease,
    Serve,
    StageBroken,
    StageLoaded,
    Tick,
    Timing,
)
from shoal.net.messages import Assign, Epoch, Hello, Offer, Peer, Progress
from shoal.net.placement import COORDINATOR, Placement
from shoal.planner import Assignment, Device
from shoal.planner.groups import plain_groupings

NAMES = ("a", "b", "c")
OFFER = Offer(Device("fake", 10**9, 1e9, 1e9), 8, 1, "fake", True)
THREE = Placement((Assignment("a", 0, 2), Assignment("b", 2, 4), Assignment("c", 4, 6)), 4)
TWO = Placement((Assignment("c", 0, 3), Assignment("a", 3, 6)), 4)
GONE = NodeLostError("gone")


def epoch(counter: int) -> Epoch:
    return Epoch(99, counter)


def hello(name: str, number: int, exact: bool = True) -> Hello:
    return Hello("control", name, number, "0.1.0", 1, "aa", replace(OFFER, exact=exact), number * 7)


def fresh(names: tuple[str, ...] = NAMES, **changes: object) -> ClusterState:
    members = tuple(Member("host", 7001 + i) for i in range(len(names)))
    return ClusterState(members, 6, Epoch(99, 0), Timing(1.0, 10.0, 10.0), **changes)  # type: ignore[arg-type]


def after(state: ClusterState, *events: Event, now: float = 0.0) -> tuple[ClusterState, list[Command]]:
    """The state, and the commands of the last event."""
    commands: tuple[Command, ...] = ()
    for event in events:
        state, commands = decide(state, event, now)
    return state, list(commands)


JOINS = tuple(Joined(i, hello(name, 100 + i)) for i, name in enumerate(NAMES))
TO_PLAN = (*JOINS, LinksMeasured())
TO_LOAD = (*TO_PLAN, Planned(1, THREE))
TO_SERVE = (*TO_LOAD, *(StageLoaded(i, epoch(1)) for i in (2, 0, 1)))


def test_from_the_first_hello_to_serving() -> None:
    state, commands = after(fresh(), *JOINS[:2])
    assert (state.phase, commands) == ("gathering", [])
    state, commands = after(state, JOINS[2])
    assert (state.phase, commands) == ("measuring", [MeasureLinks((0, 1, 2))])
    state, commands = after(state, LinksMeasured())
    assert (state.phase, commands) == ("planning", [MakePlan(1, (0, 1, 2))])
    state, commands = after(state, Planned(1, THREE))
    assert state.phase == "loading"
    assert commands == [
        SendAssign(0, Assign(epoch(1), 0, 2, Peer("b", "host", 7002, 101, 707), 4, 99, plain_groupings(3))),
        SendAssign(1, Assign(epoch(1), 2, 4, Peer("c", "host", 7003, 102, 714), 4, 100)),
        SendAssign(2, Assign(epoch(1), 4, 6, None, 4, 101)),
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


@pytest.mark.parametrize("events", [(), JOINS[:1], JOINS, TO_PLAN, TO_LOAD], ids=len)
def test_before_anything_was_served_a_loss_is_a_failure(events: tuple[Event, ...]) -> None:
    state, commands = after(fresh(), *events, Left(1, GONE))
    assert (state.phase, commands) == ("failed", [Fail(GONE)])
    assert after(state, *TO_SERVE, Tick(), now=1e6) == (state, [])


def test_a_lost_stage_ends_the_epoch_and_the_others_go_on() -> None:
    state, commands = after(fresh(), *TO_SERVE, Left(1, GONE))
    assert state.phase == "planning"
    assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    state, commands = after(state, Planned(2, TWO))
    assert commands == [
        SendAssign(2, Assign(epoch(2), 0, 3, Peer("a", "host", 7001, 100, 700), 4, 99, plain_groupings(2))),
        SendAssign(0, Assign(epoch(2), 3, 6, None, 4, 102)),
    ]
    state, commands = after(state, StageLoaded(0, epoch(1)), StageLoaded(2, epoch(1)))
    assert (state.phase, commands) == ("loading", [])
    state, commands = after(state, StageLoaded(0, epoch(2)), StageLoaded(2, epoch(2)))
    assert (state.phase, commands) == ("serving", [Serve(epoch(2))])


def test_a_second_loss_during_recovery_plans_once_more() -> None:
    alone = Placement((Assignment("a", 0, 6),), 4)
    state, _ = after(fresh(), *TO_SERVE, Left(1, GONE))
    planning, commands = after(state, Left(2, GONE))
    assert commands == [HangUp(2), MakePlan(3, (0,))]
    assert after(planning, Planned(2, TWO)) == (planning, [])
    assert after(planning, Planned(3, alone))[1] == [
        SendAssign(0, Assign(epoch(2), 0, 6, None, 4, 99, plain_groupings(1)))
    ]
    loading, _ = after(state, Planned(2, TWO))
    _, commands = after(loading, Left(2, GONE))
    assert commands == [HangUp(2), Pause(epoch(2)), MakePlan(3, (0,))]


def test_losing_the_last_node_or_not_wanting_to_recover_is_a_failure() -> None:
    state, _ = after(fresh(), *TO_SERVE, Left(0, NodeLostError("first")), Left(1, GONE))
    assert after(state, Left(2, GONE))[1] == [Fail(GONE)]
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


def test_no_plan_is_a_failure_that_names_who_was_lost() -> None:
    error = NoPlanError("12 MB are missing")
    assert after(fresh(), *TO_PLAN, Planned(1, error))[1] == [Fail(error)]
    _, (fail,) = after(fresh(), *TO_SERVE, Left(1, GONE), Planned(2, error))
    assert isinstance(fail, Fail) and isinstance(fail.error, NodeLostError)
    assert str(fail.error) == "gone; the other nodes cannot go on: 12 MB are missing"


def test_a_stage_that_cannot_be_loaded_blames_its_node() -> None:
    error = ShoalError("a shard is missing")
    assert after(fresh(), *TO_LOAD, StageBroken(1, epoch(1), error, None))[1] == [Fail(error)]
    state, commands = after(fresh(), *TO_SERVE, StageBroken(1, epoch(1), error, None))
    assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    assert after(state, StageBroken(0, epoch(1), error, None)) == (state, [])


def test_a_next_node_that_cannot_be_reached_is_blamed_itself() -> None:
    state, commands = after(fresh(), *TO_SERVE, StageBroken(1, epoch(1), GONE, 102))
    assert commands == [HangUp(2), Pause(epoch(1)), MakePlan(2, (0, 1))]
    assert state.members[2].lost and not state.members[1].lost


def test_a_connection_that_failed_alone_begins_another_epoch_of_the_same_chain() -> None:
    state, commands = after(fresh(), *TO_SERVE, StageBroken(0, epoch(1), GONE, 101, again=True))
    assert state.phase == "loading" and state.alive() == (0, 1, 2)
    assert commands[0] == Pause(epoch(1))
    assert [c.assign.epoch for c in commands[1:] if isinstance(c, SendAssign)] == [epoch(2)] * 3
    assert after(state, StageBroken(0, epoch(1), GONE, 101, again=True)) == (state, [])


def progress(running: float | None, expected: float | None, counter: int = 1) -> Progress:
    return Progress(epoch(counter), 7, running, expected, 0)


def test_a_stage_that_is_stuck_leaves_the_chain() -> None:
    state, commands = after(fresh(), *TO_SERVE, Heard(1, progress(11.1, 1.0)))
    assert commands == [HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    assert "b: a call of its stage has been running for 11 s" in state.members[1].lost
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
    state, commands = after(state, Tick(), now=10.0)
    assert commands[:4] == [SendPing(0), HangUp(1), Pause(epoch(1)), MakePlan(2, (0, 2))]
    assert state.members[1].lost


def test_silence_before_serving_is_a_failure_that_names_the_node() -> None:
    state, _ = after(fresh(), *TO_LOAD)
    _, (fail,) = after(state, Tick(), now=10.0)
    assert isinstance(fail, Fail) and "a (host:7001) has said nothing for 10 s" in str(fail.error)


def consistent(state: ClusterState, commands: tuple[Command, ...], before: ClusterState) -> None:
    """What must hold after every event, whatever happened."""
    for command in commands:
        match command:
            case SendAssign(member, assign):
                assert state.members[member].alive and assign.epoch == state.epoch > before.epoch
            case Serve(served):
                assert served == state.epoch and state.loaded == frozenset(state.holders())
            case MakePlan(number):
                assert number > before.plans
            case SendPing(member):
                assert state.members[member].alive
            case Fail():
                assert state.phase == "failed"
    plans = [command for command in commands if isinstance(command, MakePlan)]
    if plans and state.phase != "failed":
        assert plans[-1] == MakePlan(state.plans, state.alive())
    assert len([command for command in commands if isinstance(command, Serve | Fail)]) <= 1
    if state.phase in ("loading", "serving"):
        assert all(state.members[i].alive for i in state.holders())
    if before.phase == "serving" and state.phase != "serving":
        assert any(isinstance(command, Pause | Fail) for command in commands)
    assert state.epoch >= before.epoch


def random_event(rng: random.Random, state: ClusterState) -> Event:
    member, counter = rng.randrange(3), rng.randint(max(0, state.epoch.counter - 1), state.epoch.counter)
    alive = [state.members[i].label for i in state.alive()]
    placement = None
    if alive:
        chosen = rng.sample(alive, rng.randint(1, len(alive)))
        edges = [0, *sorted(rng.sample(range(1, 6), len(chosen) - 1)), 6]
        placement = Placement(
            tuple(Assignment(n or "nobody", a, b) for n, a, b in zip(chosen, edges, edges[1:], strict=False))
        )
    number = rng.randint(max(0, state.plans - 1), state.plans)
    loads = [StageLoaded(i, state.epoch) for i in range(3)]
    choices: list[Event] = [
        LinksMeasured(),
        Tick(),
        Heard(member),
        StageLoaded(member, epoch(counter)),
        *loads,
    ]
    if state.members[member].hello is None:
        choices += [Joined(member, hello(NAMES[member], 100 + member))] * 5
    if placement is not None:
        choices += [Planned(number, placement)] * 2
    if rng.random() < 0.1:
        choices.append(Left(member, GONE))
        choices.append(StageBroken(member, epoch(counter), GONE, rng.choice((None, 100, 101, 102))))
    return rng.choice(choices)


def test_random_interleavings_never_mix_epochs_or_use_the_lost() -> None:
    rng, phases = random.Random(3), set()
    served = recovered = 0
    for _ in range(150):
        state, now = fresh(), 0.0
        for _ in range(60):
            now += rng.random()
            before = state
            state, commands = decide(state, random_event(rng, state), now)
            consistent(state, commands, before)
            phases.add(state.phase)
            served += any(isinstance(c, Serve) for c in commands)
            recovered += any(isinstance(c, Serve) for c in commands) and state.epoch.counter > 1
    assert phases == {"gathering", "measuring", "planning", "loading", "serving", "failed"}
    assert served > 20 and recovered > 5


def test_when_every_command_is_carried_out_what_remains_serves() -> None:

    rng = random.Random(4)
    for _ in range(200):
        state, todo = fresh(), list[Event](JOINS)
        losses = rng.randint(0, 2)
        for _ in range(100):
            if not todo:
                break
            event = todo.pop(rng.randrange(len(todo)))
            state, commands = decide(state, event, 0.0)
            for command in commands:
                match command:
                    case MeasureLinks():
                        todo.append(LinksMeasured())
                    case MakePlan(number, members):
                        names = [state.members[i].label for i in members]
                        edges = [*range(len(names)), 6]
                        ranges = zip(names, edges, edges[1:], strict=False)
                        todo.append(Planned(number, Placement(tuple(Assignment(*r) for r in ranges))))
                    case SendAssign(member, assign):
                        todo.append(StageLoaded(member, assign.epoch))
                    case Serve() if losses:
                        losses -= 1
                        todo.append(Left(rng.randrange(3), GONE))
        assert state.phase == "serving"
        assert state.loaded == frozenset(state.holders())
