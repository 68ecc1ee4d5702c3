"""The coordinator's decisions under random events, and with nodes that carry out what they are told at random
times."""

import random
from dataclasses import dataclass, field, replace

import pytest
from tests.net.clusters import GONE, JOINS, NAMES, epoch, fresh, hello

from shoal.engine.errors import NoPlanError
from shoal.net.cluster import decide
from shoal.net.events import (
    Command,
    Event,
    Fail,
    Heard,
    Hold,
    Joined,
    Left,
    LinksMeasured,
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
    SendPing,
    SendRelease,
    Serve,
    StageBroken,
    StageLoaded,
    StagePrepared,
    Stalled,
    Tick,
    Unreach,
)
from shoal.net.liveness import Timing
from shoal.net.members import ClusterState
from shoal.net.messages import Assign, Commit, Condition, Epoch, Kept
from shoal.net.placement import Placement
from shoal.planner import Assignment

HASTY = Timing(1.0, 10.0, 10.0, patience=0.5)
NO_PLAN = NoPlanError("12 MB are missing")


@dataclass
class Ledger:
    """What must hold after every event, whatever happened. It remembers what was ordered."""

    given: set[Epoch] = field(default_factory=set)
    """Epochs that nodes were given."""
    orders: dict[int, Assign] = field(default_factory=dict)
    """Those of the newest epoch."""
    last: int = 0
    """The counter of the epoch that was served last, and not replaced by one loaded anew."""
    held: bool = False
    open: set[Epoch] = field(default_factory=set)
    """Transitions of which the end was not told."""
    reached: Epoch | None = None

    def check(self, before: ClusterState, commands: tuple[Command, ...], state: ClusterState) -> None:
        orders: dict[int, Assign] = {}
        for command in commands:
            match command:
                case SendAssign(member, assign):
                    assert state.members[member].alive and member not in orders
                    orders[member] = assign
                case SendCommit(member, commit):
                    self._commit(state, before, member, commit)
                case SendAbort(member, given_up):
                    assert before.members[member].alive and given_up in self.given
                case SendRelease(member, released):
                    assert state.members[member].alive and released == state.epoch
                    assert member not in state.holders()
                case Reach(reached):
                    assert self.reached is None and state.members[command.member].alive
                    self.reached = reached
                case Unreach(reached):
                    assert self.reached == reached
                    self.reached = None
                    self.held = self.held and state.phase == "serving"  # Resume follows
                case Hold(_, base):
                    assert base == state.epoch and not self.held and state.standing
                    self.held = True
                case Resume(resumed):
                    assert resumed == state.epoch and self.held and state.phase == "serving"
                    self.held = False
                case Serve(served, base, lost):
                    assert served == state.epoch and state.loaded == frozenset(state.holders())
                    assert state.standing == state.loaded
                    assert base is None or (base == self.last and self.reached == served)
                    assert 0 <= lost[0] <= lost[1] < state.units
                    self.last, self.held, self.reached = served.counter, False, None
                case Pause(paused):
                    assert paused in self.given
                    self.held = False
                case Moved(None, failure=failure):
                    assert failure
                case Moved(moved, failure=failure):
                    assert moved is not None and moved in self.open
                    assert (not failure) == (moved == state.epoch and state.phase == "serving")
                    self.open.remove(moved)
                case MakePlan(number):
                    assert number > before.plans
                case SendPing(member):
                    assert state.members[member].alive
                case Fail():
                    assert state.phase == "failed"
        if orders:
            self._ordered(before, state, orders)
        self._state(before, commands, state)

    def _ordered(self, before: ClusterState, state: ClusterState, orders: dict[int, Assign]) -> None:
        (new,) = {assign.epoch for assign in orders.values()}
        (base,) = {assign.base for assign in orders.values()}
        assert all(new > other for other in self.given)
        self.given.add(new)
        self.orders = orders
        units = [u for assign in orders.values() for u in range(assign.first, assign.last)]
        assert sorted(units) == list(range(state.units))
        if base is None:
            assert new == state.epoch and state.standing == frozenset()
            self.last = 0
            return
        move = state.transition
        assert (
            move is not None and new == move.epoch and base == move.base == self.last == state.epoch.counter
        )
        assert set(orders) == set(move.members) >= state.standing
        self.open.add(new)
        for taker, assign in orders.items():
            had = {u for u, holder in enumerate(state.standing_units()) if holder == taker}
            taken = set[int]()
            for take in assign.takes:
                (giver,) = (i for i in orders if state.incarnation(i) == take.giver)
                (gift,) = (g for g in orders[giver].gives if (g.first, g.last) == (take.first, take.last))
                assert gift.taker.incarnation == state.incarnation(taker) and giver in state.standing
                assert gift.history == (taker not in state.standing)
                taken |= set(range(take.first, take.last))
            assert not taken & had and taken <= set(range(assign.first, assign.last))
            lacks = set(range(assign.first, assign.last)) - had - taken - set(range(*move.lost))
            assert lacks <= {state.units - 1}  # the LM head has no keys and values
        gives = sum(len(assign.gives) for assign in orders.values())
        assert gives == sum(len(assign.takes) for assign in orders.values())

    def _commit(self, state: ClusterState, before: ClusterState, member: int, commit: Commit) -> None:
        assert state.members[member].alive and member in self.orders
        assert commit.epoch == state.epoch and self.held and state.phase == "committing"
        move = before.transition
        assert move is not None and move.reached and move.prepared == set(move.members)

    def _state(self, before: ClusterState, commands: tuple[Command, ...], state: ClusterState) -> None:
        plans = [command for command in commands if isinstance(command, MakePlan)]
        if plans and state.phase != "failed" and plans[-1].number == state.plans:
            all_leave = replace(state, insufficient=frozenset(state.incarnation(i) for i in state.alive()))
            assert set(plans[-1].members) <= set(all_leave.usable()) <= set(state.alive())
        assert len([command for command in commands if isinstance(command, Serve | Fail)]) <= 1
        if state.phase in ("loading", "serving", "committing"):
            assert all(state.members[i].alive for i in state.holders())
        move = state.transition
        assert state.phase != "committing" or (move is not None and move.step == "committed")
        assert move is not None or state.phase != "moving"
        if move is not None and state.phase != "failed":
            assert state.phase == "committing" or (
                state.phase in ("serving", "moving") and move.step != "committed"
            )
            assert self.open == {move.epoch}
            assert all(state.members[i].alive for i in move.members)
        elif state.phase != "failed":
            assert not self.open
        assert all(state.members[i].alive for i in state.standing)
        ended = state.phase != "serving" and (before.phase == "serving" or state.epoch > before.epoch)
        if before.phase == "serving" and ended and state.phase != "committing":
            assert any(isinstance(command, Pause | Fail) for command in commands)
        assert state.epoch >= before.epoch and state.issued >= before.issued


def random_placement(rng: random.Random, state: ClusterState) -> Placement | None:
    alive = [state.members[i].label for i in state.alive()]
    if not alive:
        return None
    chosen = rng.sample(alive, rng.randint(1, len(alive)))
    edges = [0, *sorted(rng.sample(range(1, 6), len(chosen) - 1)), 6]
    return Placement(
        tuple(Assignment(n or "nobody", a, b) for n, a, b in zip(chosen, edges, edges[1:], strict=False)),
        tokens_per_s=rng.random(),
    )


def expected_event(rng: random.Random, state: ClusterState) -> Event:
    """What would happen next if nothing went wrong."""
    move, placement = state.transition, random_placement(rng, state)
    away = [i for i, member in enumerate(state.members) if not member.alive]
    if move is not None and move.step == "preparing":
        prepared = StagePrepared(rng.choice(move.members), move.epoch, 0.1, 5)
        return rng.choice((prepared, prepared, Reached(move.epoch)))
    if move is not None and move.step == "holding":
        return Quiet(move.epoch, (Kept(1, 3),))
    if state.phase in ("loading", "committing"):
        return StageLoaded(rng.choice(state.holders() if move is None else move.members), state.epoch)
    if state.phase == "planning" and placement is not None:
        return Planned(state.plans, placement)
    if away and (state.phase != "serving" or rng.random() < 0.5):
        member = rng.choice(away)
        return Joined(member, hello(NAMES[member], 100 + member + rng.choice((0, 0, 10))))
    if state.measuring:
        return LinksMeasured()
    if state.phase == "serving" and placement is not None and rng.random() < 0.3:
        return Planned(state.plans, placement) if state.trial else Proposed(placement, "why")
    return rng.choice((Tick(busy=rng.random() < 0.5), *(Heard(i, answered=True) for i in range(3))))


def any_event(rng: random.Random, state: ClusterState) -> Event:
    """What may happen at any time, and reports of which some are late or false."""
    member, counter = rng.randrange(3), rng.randint(max(0, state.issued - 1), state.issued)
    number = rng.randint(max(0, state.plans - 1), state.plans)
    placement = random_placement(rng, state)
    blamed = rng.choice((None, 100, 101, 102))
    choices: list[Event] = [
        LinksMeasured(),
        Tick(busy=rng.random() < 0.5, stalled=rng.random() < 0.2),
        Stalled(member),
        StageLoaded(member, epoch(counter)),
        StagePrepared(member, epoch(counter), 0.0, 0),
        Reached(epoch(counter)),
        Quiet(epoch(counter), ()),
        Planned(number, NO_PLAN),
        Heard(member, condition=Condition(leaving=rng.random() < 0.5)),
        StageBroken(member, epoch(counter), GONE, blamed, again=rng.random() < 0.3),
        Left(member, GONE),
        Joined(member, hello(NAMES[member], 100 + member + rng.choice((0, 10)))),
    ]
    if placement is not None:
        choices += [Planned(number, placement), Proposed(placement, "why")]
    return rng.choice(choices)


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["move", "reload", "off"])
def test_random_interleavings_never_mix_epochs_or_use_the_lost(moves: str) -> None:
    rng, phases, transitions = random.Random(5), set[str](), set[tuple[bool, bool]]()
    served = recovered = 0
    for _ in range(120):
        state, now, ledger = fresh(moves=moves, recover=rng.random() < 0.9), 0.0, Ledger()
        state = replace(state, timing=HASTY)
        for _ in range(80):
            now += 0.4 * rng.random()
            before = state
            event = any_event(rng, state) if rng.random() < 0.25 else expected_event(rng, state)
            state, commands = decide(state, event, now)
            ledger.check(before, commands, state)
            phases.add(state.phase)
            served += any(isinstance(c, Serve) for c in commands)
            recovered += any(isinstance(c, Serve) for c in commands) and state.epoch.counter > 1
            for command in commands:
                if isinstance(command, Moved) and (command.shifts or command.lost != (0, 0)):
                    transitions.add((command.recovery, command.failure == ""))
        hash(state)  # whoever explores states keeps them in a set
    usual = {"gathering", "measuring", "planning", "loading", "serving", "waiting", "failed"}
    with_transitions = usual | {"moving", "committing"}
    assert phases == (usual if moves == "reload" else with_transitions)
    assert served > 80 and recovered > 40
    if moves == "move":
        assert transitions == {(False, False), (False, True), (True, False), (True, True)}


@dataclass
class Fleet:
    """Nodes, and a coordinator's tasks, that carry out every command some time later. A node remembers the
    units of which it has the keys and values of all sessions; `missing` is what no node has."""

    rng: random.Random
    units: dict[int, set[int]] = field(default_factory=lambda: {0: set(), 1: set(), 2: set()})
    epochs: dict[int, int] = field(default_factory=dict)
    orders: dict[int, Assign] = field(default_factory=dict)
    todo: list[Event] = field(default_factory=lambda: list[Event](JOINS))
    missing: set[int] = field(default_factory=set)

    def carry_out(self, state: ClusterState, command: Command) -> None:
        match command:
            case MeasureLinks():
                self.todo.append(LinksMeasured())
            case MakePlan(number, members):
                names = [state.members[i].label for i in members]
                edges = [*range(len(names)), 6]
                ranges = zip(names, edges, edges[1:], strict=False)
                stages = tuple(Assignment(*r) for r in ranges)
                self.todo.append(Planned(number, Placement(stages, tokens_per_s=2.0 * len(names))))
            case SendAssign(member, assign):
                self.orders[member] = assign
                if assign.base is None:
                    self.drop(member)
                    self.units[member] = set(range(assign.first, assign.last))
                    self.epochs[member] = assign.epoch.counter
                    self.todo.append(StageLoaded(member, assign.epoch))
                else:
                    if self.epochs.get(member) != assign.base:
                        self.drop(member)
                    if self.rng.random() < 0.1:
                        self.todo.append(StageBroken(member, assign.epoch, GONE, None))
                    else:
                        self.todo.append(StagePrepared(member, assign.epoch, 0.1, 10))
            case Reach(reached):
                self.todo.append(Reached(reached))
            case Hold(prepared):
                self.todo.append(Quiet(prepared, (Kept(1, 5),)))
            case Resume():
                self.todo = [event for event in self.todo if not isinstance(event, Quiet)]
            case SendCommit(member, commit):
                assign = self.orders[member]
                assert assign.epoch == commit.epoch
                has = set(self.units[member]) | {state.units - 1}
                for take in assign.takes:
                    (giver,) = (i for i in self.orders if state.incarnation(i) == take.giver)
                    assert set(range(take.first, take.last)) <= self.units[giver] | {state.units - 1}
                    has |= set(range(take.first, take.last))
                lost = set(range(commit.lost_first, commit.lost_last))
                assert set(range(assign.first, assign.last)) <= has | lost
                self.missing = lost
                self.todo.append(StageLoaded(member, commit.epoch))
            case Serve(served, base, lost):
                assert base is None or self.missing == set(range(*lost))
                for member, assign in self.orders.items():
                    if assign.epoch == served:
                        self.units[member] = set(range(assign.first, assign.last))
                        self.epochs[member] = served.counter
                self.missing = set()
            case SendPing(member):
                self.todo.append(Heard(member, answered=True))

    def drop(self, member: int) -> None:
        self.units[member] = set()
        self.epochs.pop(member, None)


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["move", "reload"])
def test_when_every_command_is_carried_out_all_that_are_back_serve_again(moves: str) -> None:
    """Nodes leave at any time, one always stays or comes back, and all are back in the end: the chain serves,
    and has all three nodes where a plan with more nodes is faster."""
    rng = random.Random(4)
    done = 0
    for _ in range(20):
        state, now, fleet, ledger = fresh(moves=moves), 0.0, Fleet(rng), Ledger()
        losses, proposals = rng.randint(0, 4), rng.randint(0, 3)
        while fleet.todo or now < 100 or state.phase != "serving" or state.transition is not None:
            now += 0.25
            assert now < 400, state
            event: Event = Tick(busy=True)
            if losses and rng.random() < 0.05:
                losses -= 1
                event = Left(rng.randrange(3), GONE)
            elif proposals and rng.random() < 0.05 and state.phase == "serving":
                proposals -= 1
                placement = random_placement(rng, state)
                assert placement is not None
                event = Proposed(replace(placement, tokens_per_s=0.1), "why")
            elif fleet.todo and rng.random() < 0.8:
                event = fleet.todo.pop(rng.randrange(len(fleet.todo)))
            before = state
            state, commands = decide(state, event, now)
            ledger.check(before, commands, state)
            for i, member in enumerate(state.members):
                if before.members[i].lost != member.lost or (isinstance(event, Joined) and event.member == i):
                    fleet.drop(i)
                back = Joined(i, hello(NAMES[i], 100 + i + rng.choice((0, 10, 20))))
                if member.lost and not any(isinstance(e, Joined) and e.member == i for e in fleet.todo):
                    fleet.todo.append(back)
            for command in commands:
                fleet.carry_out(state, command)
                done += isinstance(command, Moved) and not command.failure
        assert state.phase == "serving"
        assert state.loaded == frozenset(state.holders()), state
    assert (done > 20) == (moves == "move")
