"""The whole model: a coordinator, nodes, and the connections between them, as a graph of states.

Connections are queues, one for each direction and purpose. One that ends loses what it holds, and each of its
ends notices that at some later time. Everything that takes time in the real program (a plan, a load, a dial,
a message, a notice) is a step of its own here, and steps are taken in every order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from shoal.engine.errors import ModelFileError, NoPlanError, ShoalError
from shoal.net import cluster, events
from shoal.net import stage_state as node_state
from shoal.net.liveness import Timing
from shoal.net.members import ClusterState, Member
from shoal.net.messages import (
    Broken,
    Condition,
    Epoch,
    Failed,
    Hello,
    Loaded,
    Prepared,
    Result,
)

from . import actions, invariants, reduction, words
from .bound import NAMES, NUMBER, OFFER, Bound, Env, placement
from .coordinator import LOST, CoordinatorStep, Front, Script, timeless
from .search import Edge, State, Violation
from .stage import COORDINATOR, Node, Nodes, Wire

CLUSTER, FRONT, LINKS, WIRES, ENV = range(5)
"""A state has the numbers of these values: the state of the cluster, the coordinator's side of sessions, its
control connections, the connections of and to nodes, and the rest. Then it has, for each node, the numbers of
its state, of its reports, of the orders for it, and of its Results."""
FIXED = 5
_QUICK = (node_state.OpenStage, node_state.Prepare, node_state.Dial)


class Distributed:
    """The model to explore. `values` are the values that the numbers in a state stand for."""

    CLUSTER, FRONT, LINKS, WIRES, ENV, FIXED = CLUSTER, FRONT, LINKS, WIRES, ENV, FIXED

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        n = bound.nodes
        self.reports, self.orders, self.results = FIXED + n, FIXED + 2 * n, FIXED + 3 * n
        self.script = Script.of(
            bound.questions,
            bound.units,
            window=bound.window,
            rows=bound.rows,
            keep=bound.keep,
            share=bound.share,
            penalised=bound.penalised,
        )
        self.nodes = Nodes(bound.units, self._index, bound.kept_rows)
        self._ids: dict[Any, int] = {}
        self.values: list[Any] = []
        self._node_memo: dict[Any, Any] = {}
        self._coordinator_memo: dict[Any, Any] = {}
        self._local_memo: dict[int, list[tuple[str, int]]] = {}
        self._reconsiders: dict[int, bool] = {}
        self._quick_memo: dict[int, int | None] = {}

    # --- numbers for values

    def _id(self, value: Any) -> int:
        found = self._ids.get(value)
        if found is None:
            found = self._ids[value] = len(self.values)
            self.values.append(value)
        return found

    def value(self, number: int) -> Any:
        return self.values[number]

    @staticmethod
    def _index(incarnation: int) -> int:
        return incarnation % 10

    # --- the graph

    def initial(self) -> State:
        """All nodes serve the first plan, and no question was asked."""
        n = self.bound.nodes
        members = tuple(Member("host", 7001 + i) for i in range(n - self.bound.late))
        state = ClusterState(
            members,
            self.bound.units,
            Epoch(NUMBER, 0),
            Timing(1.0, 10.0, 10.0),
            moves=self.bound.strategy,
            open_ended=self.bound.late > 0,
        )
        up = [Node(True, 100 + i, 0) for i in range(n)]
        world = [
            self._id(state), self._id(self.script.front(n)), self._id(("down",) * n),
            self._id(()), self._id(Env(0)), *(self._id(node) for node in up), *([self._id(())] * (3 * n)),
        ]  # fmt: skip
        current: State = tuple(world)
        while True:
            edges = (
                edge
                for edge in self._edges(current)
                if not edge.fault and edge.action[0] not in ("ask", "add")
            )
            edge = next(edges, None)
            if edge is None:
                break
            assert edge.state is not None, edge.error
            current = edge.state
        assert self.value(current[CLUSTER]).phase == "serving"
        return self._with(current, {ENV: self._id(Env(self.bound.faults))})

    def successors(self, state: State) -> Iterable[Edge]:
        return self._edges(state)

    def lacking(self, state: State) -> str:
        """Why the work of a state in which nothing can happen any more is not done; empty if it is."""
        front: Front = self.value(state[FRONT])
        if not self.script.complete(front):
            return "the answers are not complete"
        return invariants.leak(self, state)

    def _edges(self, state: State) -> Iterator[Edge]:
        if self.bound.reduce:
            action = reduction.first(self, state)
            edge = None if action is None else self._edge(state, action, False)
            if edge is not None:
                yield edge
                return
        some = False
        for action, fault in actions.all_of(self, state):
            edge = self._edge(state, action, fault)
            if edge is not None:
                some = some or not fault
                yield edge
        if not some or "early" in self.bound.kinds:
            left = self.value(state[ENV]).faults
            for action in actions.ticks(self, state):
                if not some or left:
                    edge = self._edge(state, action, some)
                    if edge is not None:
                        yield edge

    def _edge(self, state: State, action: Any, fault: bool) -> Edge | None:
        try:
            new = self._apply(state, action)
        except Violation as violation:
            return Edge(action, fault, None, str(violation))
        if fault and action[0] not in ("return", "propose", "leave", "leaving"):
            env = self.value(new[ENV])
            new = self._with(new, {ENV: self._id(env._replace(faults=env.faults - 1))})
        elif new == state:
            return None
        return Edge(action, fault, new)

    @staticmethod
    def _with(state: State, changes: dict[int, int]) -> State:
        new = list(state)
        for at, value in changes.items():
            new[at] = value
        return tuple(new)

    # --- what can happen

    def local(self, number: int) -> list[tuple[str, int]]:
        """What a node does by itself: what it carries out, and ends of connections that it notices."""
        found = self._local_memo.get(number)
        if found is None:
            node: Node = self.values[number]
            tasks = [("task", self._id(task)) for task in sorted(node.tasks, key=repr)]
            notices = [("notice", self._id(notice)) for notice in sorted(node.notices, key=repr)]
            found = self._local_memo[number] = tasks + notices
        return found

    def reconsiders(self, number: int) -> bool:
        """Whether the coordinator makes a plan as time passes, with nodes that have joined or without those
        that leave."""
        found = self._reconsiders.get(number)
        if found is None:
            state: ClusterState = self.values[number]
            commands: tuple[Any, ...] = ()
            if state.phase == "serving" and state.transition is None:
                commands = cluster.decide(state, events.Tick(), actions.SETTLED)[1]
            found = any(isinstance(command, events.MakePlan) for command in commands)
            self._reconsiders[number] = found
        return found

    # --- what then happens

    def _apply(self, state: State, action: Any) -> State:
        new, self._before = list(state), state
        getattr(self, f"_do_{action[0]}")(new, *action[1:])
        if self.bound.quick:
            self._hurry(new)
        return tuple(new)

    def _first_quick(self, number: int) -> int | None:
        """A task of a node that loads or connects."""
        if number not in self._quick_memo:
            tasks = (at for what, at in self.local(number) if what == "task")
            self._quick_memo[number] = next((at for at in tasks if isinstance(self.values[at], _QUICK)), None)
        return self._quick_memo[number]

    def _hurry(self, new: list[int]) -> None:
        """Carries out at once what takes time, but of which only the coordinator can tell when it was done,
        by a report that it may hear late anyway: loading, connecting, measuring."""
        again = True
        while again:
            again = False
            for i in range(self.bound.nodes):
                number = self._first_quick(new[FIXED + i])
                if number is not None:
                    self._do_task(new, i, number)
                    again = True
            first = self.value(new[FRONT]).first
            if first is not None and not first.connected:
                self._do_dialled(new)
                again = True
            if self.value(new[ENV]).measuring:
                self._do_measured(new)
                again = True

    def _take(self, new: list[int], at: int) -> int:
        """Takes the first message of a queue; its number."""
        first, *rest = self.value(new[at])
        new[at] = self._id(tuple(rest))
        return first

    def _put(self, new: list[int], at: int, number: int) -> None:
        new[at] = self._id((*self.value(new[at]), number))

    def _do_hear(self, new: list[int], i: int) -> None:
        message = self.value(self._take(new, self.reports + i))
        match message:
            case Loaded():
                self._coordinate(new, ("loaded", i, message))
            case Prepared(epoch, seconds, sent):
                self._coordinate(new, events.StagePrepared(i, epoch, seconds, sent))
            case Broken(epoch, _, _, peer, again):
                error: ShoalError = LOST if peer is not None else ModelFileError("broken")
                self._coordinate(new, events.StageBroken(i, epoch, error, peer, again))
            case _:
                raise AssertionError(message)

    def _do_result(self, new: list[int], i: int) -> None:
        message = self.value(self._take(new, self.results + i))
        self._coordinate(new, ("deliver", i, message))

    def _do_left(self, new: list[int], i: int) -> None:
        self._link(new, i, "down")
        self._coordinate(new, events.Left(i, LOST, greeted=True))

    def _do_join(self, new: list[int], i: int) -> None:
        if self.value(new[FIXED + i]).ticket:
            self._node(new, i, ("gone",))
        node: Node = self.value(new[FIXED + i])
        tickets = node.tickets + 1
        node = node._replace(tickets=tickets, ticket=node.incarnation * 10 + tickets)
        new[FIXED + i] = self._id(node)
        self._link(new, i, "up")
        hello = Hello("control", NAMES[i], node.incarnation, "0", 1, "aa", OFFER, node.ticket)
        self._coordinate(new, events.Joined(i, hello))
        if self.value(new[CLUSTER]).phase == "failed":
            raise Violation("the coordinator has failed")

    def _do_add(self, new: list[int], i: int) -> None:
        self._coordinate(new, events.Found("host", 7001 + i))

    def _do_dialled(self, new: list[int]) -> None:
        front: Front = self.value(new[FRONT])
        state: ClusterState = self.value(new[CLUSTER])
        assert front.first is not None
        i, epoch = front.first.member, front.first.epoch
        node: Node = self.value(new[FIXED + i])
        hello = state.members[i].hello
        assert hello is not None
        if node.up and node.ticket == hello.ticket and node.incarnation == hello.incarnation:
            wire = ("step", COORDINATOR, i, epoch.counter)
            self._wires(new, lambda wires: wires.update({wire: (True, ())}))
            self._coordinate(new, ("reached",))
        else:
            self._coordinate(new, ("unreachable", hello.incarnation))

    def _do_broken(self, new: list[int], i: int, epoch: Epoch, again: bool) -> None:
        state: ClusterState = self.value(new[CLUSTER])
        self._coordinate(new, ("broken", i, epoch, again, state.incarnation(i)))

    def _do_planned(self, new: list[int], request: tuple[int, tuple[int, ...]]) -> None:
        env: Env = self.value(new[ENV])
        plans = tuple(other for other in env.plans if other != request)
        new[ENV] = self._id(env._replace(plans=plans))
        number, members = request
        cut = self.bound.plans.get(members)
        answer = NoPlanError("too few") if cut is None else placement(cut)
        self._coordinate(new, ("planned", events.Planned(number, answer)))

    def _do_measured(self, new: list[int]) -> None:
        new[ENV] = self._id(self.value(new[ENV])._replace(measuring=False))
        self._coordinate(new, events.LinksMeasured())

    def _do_settled(self, new: list[int]) -> None:
        self._coordinate(new, ("tick", actions.SETTLED))

    def _do_tick(self, new: list[int], now: float) -> None:
        self._coordinate(new, ("tick", now))

    def _do_stalled(self, new: list[int]) -> None:
        self._coordinate(new, events.Tick(busy=True, stalled=True))

    def _do_ask(self, new: list[int], index: int) -> None:
        self._coordinate(new, ("ask", index))

    def _do_leave(self, new: list[int], index: int) -> None:
        self._coordinate(new, ("leave", index))

    def _do_leaving(self, new: list[int], i: int) -> None:
        self._coordinate(new, events.Heard(i, None, False, Condition(leaving=True)))

    def _do_propose(self, new: list[int], number: int) -> None:
        env: Env = self.value(new[ENV])
        new[ENV] = self._id(env._replace(moves=number + 1))
        self._coordinate(new, events.Proposed(placement(self.bound.moves[number]), "a test"))

    def _do_order(self, new: list[int], i: int) -> None:
        self._node(new, i, ("order", self._take(new, self.orders + i)))

    def _do_task(self, new: list[int], i: int, number: int) -> None:
        task, fault = self.value(number), None
        peer, purpose = None, "step"
        match task:
            case node_state.Dial(epoch, peer):
                pass
            case node_state.CopyAhead(epoch, peer):
                purpose = "bulk"
        if peer is not None:
            target = self._index(peer.incarnation)
            there: Node = self.value(new[FIXED + target])
            if there.up and there.incarnation == peer.incarnation and there.ticket == peer.ticket:
                wire = (purpose, i, target, epoch.counter)
                self._wires(new, lambda wires: wires.update({wire: (True, ())}))
            else:
                fault = Broken(epoch, 1, "", peer.incarnation)
        self._node(new, i, ("finish", number, fault))

    def _do_fail(self, new: list[int], i: int, number: int) -> None:
        task = self.value(number)
        self._node(new, i, ("finish", number, Broken(task.assign.epoch, 1, "", None)))

    def _do_misload(self, new: list[int], i: int) -> None:
        """A node is assigned units and cannot load them."""
        self._do_order(new, i)
        for what, number in self.local(new[FIXED + i]):
            if what == "task" and isinstance(self.values[number], node_state.OpenStage | node_state.Prepare):
                self._do_fail(new, i, number)
                return

    def _do_notice(self, new: list[int], i: int, number: int) -> None:
        notice = self.value(number)
        if notice == "coordinator":
            self._node(new, i, ("gone",))
        else:
            self._node(new, i, ("lost", *notice))

    def _do_wire(self, new: list[int], wire: Wire) -> None:
        taken: list[Any] = []

        def take(wires: dict[Wire, Any]) -> None:
            alive, (first, *rest) = wires[wire]
            taken.append(first)
            if rest or alive:
                wires[wire] = (alive, tuple(rest))
            else:
                del wires[wire]

        self._wires(new, take)
        giver = 0 if wire[1] == COORDINATOR else self.value(new[FIXED + wire[1]]).incarnation
        self._node(new, wire[2], ("receive", wire, taken[0], giver))

    # --- faults

    def _do_crash(self, new: list[int], i: int) -> None:
        node: Node = self.value(new[FIXED + i])
        new[FIXED + i] = self._id(Node(False, node.incarnation, 0, node.tickets))
        self._cut_wires(new, lambda wire: i in wire[1:3])
        self._empty(new, i)
        if self.value(new[LINKS])[i] == "up":
            self._link(new, i, "broken")

    def _do_return(self, new: list[int], i: int) -> None:
        node: Node = self.value(new[FIXED + i])
        new[FIXED + i] = self._id(Node(True, node.incarnation + 10, 0))

    def _do_cut(self, new: list[int], i: int) -> None:
        self._empty(new, i)
        self._link(new, i, "broken")
        self._notice(new, i, "coordinator")

    def _do_redial(self, new: list[int], i: int) -> None:
        state: ClusterState = self.value(new[CLUSTER])
        if not state.members[i].alive:
            return
        heartbeat = replace(state.members[i].heartbeat, waiting=0.0)
        new[CLUSTER] = self._id(state.changed(i, heartbeat=heartbeat))
        self._coordinate(new, events.Stalled(i))

    def _do_snap(self, new: list[int], wire: Wire) -> None:
        self._cut_wires(new, lambda other: other == wire)

    def _do_stick(self, new: list[int], wire: Wire) -> None:
        self._cut_wires(new, lambda other: other == wire, again=True)

    # --- parts of steps

    def _link(self, new: list[int], i: int, status: str) -> None:
        links = list(self.value(new[LINKS]))
        links[i] = status
        new[LINKS] = self._id(tuple(links))

    def _empty(self, new: list[int], i: int) -> None:
        new[self.reports + i] = new[self.orders + i] = new[self.results + i] = self._id(())

    def _notice(self, new: list[int], i: int, notice: Any) -> None:
        node: Node = self.value(new[FIXED + i])
        if node.up:
            new[FIXED + i] = self._id(node._replace(notices=node.notices | {notice}))

    def _wires(self, new: list[int], change: Callable[[dict[Wire, Any]], None]) -> None:
        wires = {wire: (alive, queue) for wire, alive, queue in self.value(new[WIRES])}
        change(wires)
        new[WIRES] = self._id(tuple(sorted((wire, *rest) for wire, rest in wires.items())))

    def _cut_wires(self, new: list[int], which: Callable[[Wire], bool], again: bool = False) -> None:
        """Connections end, and what they hold is lost. The side that has dialled notices it later."""
        for wire, alive, _ in self.value(new[WIRES]):
            if not which(wire):
                continue
            self._wires(new, lambda wires, wire=wire: wires.pop(wire))  # type: ignore[misc]
            if not alive:
                continue
            if wire[1] == COORDINATOR:
                front: Front = self.value(new[FRONT])
                lost = (*front.lost, (wire[2], Epoch(NUMBER, wire[3]), again))
                new[FRONT] = self._id(front._replace(lost=lost))
            else:
                peer = self.value(new[FIXED + wire[2]]).incarnation
                self._notice(new, wire[1], (wire, peer, again))

    def _node(self, new: list[int], i: int, event: Any) -> None:
        """A step of a node."""
        key = (new[FIXED + i], event)
        found = self._node_memo.get(key)
        if found is None:
            found = self._node_memo[key] = self._node_step(i, self.value(new[FIXED + i]), event)
        if isinstance(found, Violation):
            raise found
        new[FIXED + i], effects = found
        for effect in effects:
            match effect:
                case ("up", number):
                    if self.value(new[LINKS])[i] == "up" and self.value(new[FIXED + i]).ticket:
                        result = isinstance(self.value(number), Result | Failed)
                        self._put(new, (self.results if result else self.reports) + i, number)
                case ("send", wire, number):
                    self._send(new, wire, number)
                case ("close", purpose, counter):
                    self._close(new, purpose, i, counter)
                case ("end", wire):
                    self._close(new, wire[0], i, wire[3], wire[2])
                case ("farewell",):
                    self._cut_wires(new, lambda wire: wire[2] == i)

    def _node_step(self, i: int, node: Node, event: Any) -> Any:
        try:
            match event:
                case ("order", number):
                    node, effects = self.nodes.order(i, node, self.value(number))
                case ("finish", number, fault):
                    node, effects = self.nodes.finish(i, node, self.value(number), fault)
                case ("gone",):
                    node, effects = self.nodes.gone(i, node)
                    effects += (("farewell",),)
                case ("lost", wire, peer, again):
                    node, effects = self.nodes.lost(i, node, wire, peer, again)
                case ("receive", wire, number, giver):
                    node, effects = self.nodes.receive(i, node, wire, *self.value(number), giver)
                case _:
                    raise AssertionError(event)
            node, effects = self._eager(i, node, effects)
        except Violation as violation:
            return violation
        return self._id(node), tuple(self._numbered(effect) for effect in effects)

    def _eager(self, i: int, node: Node, effects: Any) -> Any:
        """Carries out what nothing else can tell from being done at once: the loop's end, the writing of
        tails, the change of the stage."""
        while True:
            quick = [
                task for task in node.tasks
                if isinstance(task, node_state.StopLoop | node_state.SendTail | node_state.Adopt)
            ]  # fmt: skip
            if not quick:
                return node, effects
            node, more = self.nodes.finish(i, node, min(quick, key=repr))
            effects += more

    def _numbered(self, effect: Any) -> Any:
        match effect:
            case ("up", message):
                return "up", self._id(message)
            case ("send", wire, message, values):
                return "send", wire, self._id((message, values))
            case _:
                return effect

    def _send(self, new: list[int], wire: Wire, number: int) -> None:
        wires = self.value(new[WIRES])
        for at, (other, alive, queue) in enumerate(wires):
            if other == wire and alive:
                changed = (*wires[:at], (wire, True, (*queue, number)), *wires[at + 1 :])
                new[WIRES] = self._id(changed)
                return

    def _close(
        self, new: list[int], purpose: str, source: int, counter: int, target: int | None = None
    ) -> None:
        """A connection is closed by the side that dialled it: what it holds still arrives."""
        kept = []
        for wire, alive, queue in self.value(new[WIRES]):
            if (wire[0], wire[1], wire[3]) == (purpose, source, counter) and target in (None, wire[2]):
                if queue:
                    kept.append((wire, False, queue))
            else:
                kept.append((wire, alive, queue))
        new[WIRES] = self._id(tuple(kept))

    # --- the coordinator

    def _coordinate(self, new: list[int], event: Any) -> None:
        key = (new[CLUSTER], new[FRONT], event)
        found = self._coordinator_memo.get(key)
        if found is None:
            found = self._coordinator_memo[key] = self._coordinator_step(
                self.value(new[CLUSTER]), self.value(new[FRONT]), event
            )
        if isinstance(found, Violation):
            raise found
        new[CLUSTER], new[FRONT], effects = found
        for effect in effects:
            self._effect(new, effect)

    def _effect(self, new: list[int], effect: Any) -> None:
        match effect:
            case ("down", i, number):
                if (
                    self.bound.reduce
                    and self.value(new[self.reports + i])
                    and reduction.calm(self, self._before)
                ):
                    raise Violation(f"the coordinator orders node {i} before it has heard its report")
                if self.value(new[LINKS])[i] == "up":
                    self._put(new, self.orders + i, number)
            case ("send", wire, number):
                self._send(new, wire, number)
            case ("close", wire):
                self._close(new, wire[0], wire[1], wire[3])
            case ("hang up", i):
                if self.value(new[LINKS])[i] == "up":
                    self._empty(new, i)
                    self._notice(new, i, "coordinator")
                self._link(new, i, "down")
            case ("plan", number, members):
                env: Env = self.value(new[ENV])
                new[ENV] = self._id(env._replace(plans=(*env.plans, (number, members))))
            case ("measure",):
                new[ENV] = self._id(self.value(new[ENV])._replace(measuring=True))
            case ("committing", commit):
                invariants.check_commit(self, new, commit)
            case ("serving", epoch):
                invariants.check_serve(self, new, epoch)
            case _:
                raise AssertionError(effect)

    def _coordinator_step(self, state: ClusterState, front: Front, event: Any) -> Any:
        step = CoordinatorStep(self.script, state, front)
        try:
            match event:
                case ("deliver", member, message):
                    step.deliver(member, message)
                case ("loaded", member, message):
                    step.loaded(member, message)
                case ("ask", index):
                    step.ask(index)
                case ("leave", index):
                    step.leave(index)
                case ("tick", now):
                    step.happens(events.Tick(), now)
                case ("planned", answer):  # its nodes have been there for long enough
                    step.happens(answer, actions.SETTLED)
                case ("broken", member, epoch, again, incarnation):
                    step.broken(member, epoch, again, incarnation)
                case ("reached",):
                    step.reached()
                case ("unreachable", incarnation):
                    step.unreachable(incarnation)
                case _:
                    step.happens(event)
            if step.state.issued > self.bound.most_epochs:
                raise Violation(f"there have been {step.state.issued} epochs: the chain never settles")
            step.settle()
        except Violation as violation:
            return violation
        effects = [self._numbered_down(effect) for effect in step.effects]
        return self._id(timeless(step.state)), self._id(step.front()), tuple(effects)

    def _numbered_down(self, effect: Any) -> Any:
        if effect[0] == "down":
            return "down", effect[1], self._id(effect[2])
        return self._numbered(effect)

    # --- words

    def describe(self, state: State, action: Hashable) -> str:
        return words.describe(self, state, action)
