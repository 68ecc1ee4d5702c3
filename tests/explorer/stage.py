"""A node of the model: the node's real decisions, and around them what its tasks do.

The stage is arithmetic, as in tests/net/conftest.py: every unit has a running number for each position that
depends on all rows before, so a lost, doubled or misplaced row changes the tokens. The numbers are its keys
and values. The first unit, the embedding, and the last one, the head, have none. A stage knows only how many
tokens a session has, and zeros take their place; the last one is told of those that it penalises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from shoal.engine.batch import Sampling, Want
from shoal.net import stage_state as node
from shoal.net.messages import (
    Abort,
    Assign,
    Broken,
    Carried,
    Close,
    Commit,
    Complete,
    Epoch,
    Kept,
    Loaded,
    Open,
    Pages,
    Prepared,
    Refill,
    Release,
    Result,
    SetSampling,
    Step,
    Tokens,
)

from .search import Violation

PRIME, VOCAB = 65521, 97
Values = tuple[int, ...]
Cache = Mapping[int, Mapping[int, Values]]
"""Keys and values: by session, by unit, for each position."""
Wire = tuple[str, int, int, int]
"""A connection between nodes: its purpose, who dialled it, whom, and the counter of the epoch."""
COORDINATOR, POSITIONS = -1, -1
PENALISED = Sampling(repetition_penalty=2.0)


def unit(number: int, before: Values, value: int) -> int:
    """What a unit computes for a row."""
    return ((before[-1] if before else 1) * 31 + value * (number + 1) + 7) % PRIME


def drawn(value: int, penalised: Values = ()) -> int:
    """The token that follows a row which ends as `value`."""
    return (value + sum(penalised)) % VOCAB


def answer(prompt: Values, count: int, units: int, *, penalised: bool = False) -> Values:
    """The tokens that one process gives for a prompt."""
    caches = {number: list[int]() for number in range(1, units - 1)}
    known, got = list(prompt), list[int]()
    for position in range(len(prompt) + count - 1):
        value = known[position]
        for number, cache in caches.items():
            value = unit(number, tuple(cache[-1:]), value)
            cache.append(value)
        if position >= len(prompt) - 1:
            got.append(drawn(value, tuple(known) if penalised else ()))
            known.append(got[-1])
    return tuple(got)


class Stage(NamedTuple):
    """The units [first, last) of a stage, and its open sessions: zeros for their tokens, and keys and values
    by unit.
    `rows` are those that it has sent on in the epoch before, by session, if some units were lost."""

    first: int
    last: int
    cache: tuple[tuple[int, tuple[Values, ...]], ...] = ()
    rows: tuple[tuple[int, Values], ...] = ()

    def sessions(self) -> dict[int, tuple[Values, ...]]:
        return dict(self.cache)

    def holding(self, sessions: Mapping[int, tuple[Values, ...]]) -> Stage:
        return self._replace(cache=tuple(sorted(sessions.items())))


class Node(NamedTuple):
    """A node. `ticket` is 0 while it serves no coordinator. `tasks` are commands that are being carried out,
    and `notices` the connections of which it has not noticed yet that they have ended."""

    up: bool
    incarnation: int
    ticket: int
    tickets: int = 0
    state: node.NodeState = node.NodeState()
    stage: Stage | None = None
    arrived: tuple[tuple[int, int, Values], ...] = ()
    """Pages of a transition: session, unit, values."""
    histories: tuple[tuple[int, Values], ...] = ()
    """Zeros for the tokens of sessions that are carried to a node without a stage."""
    told: tuple[tuple[int, int, int, Values], ...] = ()
    """What the last stage was told: session, counter of the epoch, number of the last thing, tokens."""
    sent: tuple[tuple[int, int, int, int], ...] = ()
    """What was sent to a taker: its incarnation, session, unit, positions."""
    tasks: frozenset[Any] = frozenset()
    notices: frozenset[Any] = frozenset()


Effect = tuple[Any, ...]
Outcome = tuple[Node, tuple[Effect, ...]]
"""Effects: ("up", message), ("send", wire, message, values), ("close", purpose, counter) for all
connections of an epoch that the node has dialled, ("end", wire) for one."""


class Nodes:
    """The behaviour of the nodes of a model."""

    def __init__(self, units: int, index: Callable[[int], int], rows: int) -> None:
        """`index` finds the node with an incarnation. Stages keep the rows of so many positions."""
        self.units, self.index, self.rows = units, index, rows

    def layers(self, stage: Stage | Assign) -> range:
        """The units of a stage that have keys and values."""
        return range(max(stage.first, 1), min(stage.last, self.units - 1))

    # --- what may happen

    def order(self, me: int, it: Node, message: Any) -> Outcome:
        """A message of the coordinator."""
        match message:
            case Assign() | Commit() | Abort() | Release():
                return self._decide(me, it, message)
            case Refill():
                return self._refill(me, it, message)
            case SetSampling() | Tokens() | Close():
                return self._hear(me, it, message), ()
        raise Violation(f"a node gets {message}")

    def _hear(self, me: int, it: Node, message: Any) -> Node:
        """What the last stage is told of a session."""
        force, counter = it.state.force, message.epoch.counter
        if force is None or force.assign.epoch != message.epoch:
            return it
        if force.assign.next is not None or force.phase == "loading":
            raise Violation(f"node {me} is told of session {message.session}, and draws no token of it")
        told = {session: more for session, *more in it.told if more[0] == counter}
        _, number, tokens = told.pop(message.session, (counter, 0, ()))
        if not isinstance(message, Close):
            if message.number != number + 1:
                raise Violation(f"node {me} is told number {message.number} after {number}")
            if isinstance(message, Tokens):
                if message.first > len(tokens):
                    raise Violation(f"node {me} is told tokens from {message.first} on after {len(tokens)}")
                tokens = _joined(tokens, message.first, message.tokens, whole=False)
            told[message.session] = [counter, message.number, tokens]
        return it._replace(told=tuple(sorted((session, *more) for session, more in told.items())))

    def _told(self, it: Node, message: Any) -> Values | None:
        """The tokens that a Step penalises; None: the stage has not been told enough."""
        told = {(session, counter): (number, tokens) for session, counter, number, tokens in it.told}
        number, tokens = told.get((message.session, message.epoch.counter), (0, ()))
        return tokens[: message.first + message.rows] if number >= message.told else None

    def finish(self, me: int, it: Node, task: Any, fault: Broken | None = None) -> Outcome:
        """A command has been carried out, or has failed."""
        it = it._replace(tasks=it.tasks - {task})
        if fault is not None:
            return self._decide(me, it, fault)
        return self._decide(me, *self._carried_out(me, it, task))

    def gone(self, me: int, it: Node) -> Outcome:
        """The coordinator's connection has ended."""
        it = it._replace(ticket=0, notices=it.notices - {"coordinator"})
        it, effects = self._decide(me, it, node.Gone())
        return it._replace(state=node.NodeState()), effects

    def lost(self, me: int, it: Node, wire: Wire, peer: int, again: bool) -> Outcome:
        """A connection that this node has dialled has ended."""
        it = it._replace(notices=it.notices - {(wire, peer, again)})
        for part in (it.state.force, it.state.change):
            if part is not None and part.assign.epoch.counter == wire[3]:
                return self._decide(me, it, Broken(part.assign.epoch, 1, "", peer, again))
        return it, ()

    def accepts(self, it: Node, wire: Wire, message: Any, giver: int) -> bool:
        """Whether the node reads a message now; else it waits in the connection."""
        state = it.state
        if wire[0] == "bulk":
            return not state.awaits(message.epoch)
        for part in (state.force, state.change):
            if part is not None and part.assign.epoch == message.epoch:
                if isinstance(message, Step) and part.phase == "serving" and part.assign.next is None:
                    return self._told(it, message) is not None
                return part is state.force and part.phase != "loading"
        return True

    def receive(self, me: int, it: Node, wire: Wire, message: Any, values: Values, giver: int) -> Outcome:
        """A message of another node, or of the coordinator on a step connection."""
        match message:
            case Open() | Close() | Step():
                return self._rows(me, it, message, values)
            case Pages(session, epoch, number, first, _):
                if number not in (it.state.taken(epoch, giver) or ()):
                    return it, ()
                before = {(s, u): v for s, u, v in it.arrived}
                held = before.get((session, number), ())
                if len(held) < first:
                    raise Violation(
                        f"pages of session {session}, unit {number} from {first}, after {len(held)}"
                    )
                before[session, number] = held[:first] + values
                return it._replace(arrived=tuple(sorted((s, u, v) for (s, u), v in before.items()))), ()
            case Carried(session, epoch, _, first):
                if it.state.taken(epoch, giver) is None:
                    return it, ()
                histories = dict(it.histories)
                held = histories.get(session, ())
                if len(held) < first:
                    raise Violation(f"positions of session {session} from {first}, after {len(held)}")
                histories[session] = held[:first] + values
                return it._replace(histories=tuple(sorted(histories.items()))), ()
            case Complete(epoch):
                return self._decide(me, it, node.Completed(epoch, giver))
        raise Violation(f"a node gets {message}")

    # --- the real decisions, and their commands

    def _decide(self, me: int, it: Node, event: Any, effects: tuple[Effect, ...] = ()) -> Outcome:
        if event is None:
            return it, effects
        before, stage = it.state, it.stage
        state, commands = node.decide(before, event)
        it = it._replace(state=state)
        for command in commands:
            it, more = self._command(me, it, before, command)
            effects += more
        change = before.change
        aborts = change is not None and change.commit is None and isinstance(event, Abort | Broken)
        if aborts and event.epoch == change.assign.epoch and (state.force, it.stage) != (before.force, stage):
            raise Violation(f"node {me} does not leave the base epoch as it was: {type(event).__name__}")
        return it, effects

    def _command(self, me: int, it: Node, before: node.NodeState, command: Any) -> Outcome:
        match command:
            case node.Tell(what, epoch):
                force, change = it.state.force, it.state.change
                emptied = force is None and change is None
                changed = force is not None and force.assign.epoch == epoch
                if what == "loaded" and not emptied and not changed:
                    raise Violation(f"node {me} says Loaded {epoch.counter} before it has changed to it")
                return it, (("up", _report(it, what, epoch)),)
            case node.Drop(epoch):
                return self._drop(it, before, epoch)
            case node.StartLoop():
                return it, ()
            case node.StopLoop(epoch):
                return it._replace(tasks=it.tasks | {command}), (("close", "step", epoch.counter),)
            case _:
                return it._replace(tasks=it.tasks | {command}), ()

    def _drop(self, it: Node, before: node.NodeState, epoch: Epoch) -> Outcome:
        tasks = frozenset(task for task in it.tasks if _epoch(task) != epoch)
        closed = (("close", "step", epoch.counter), ("close", "bulk", epoch.counter))
        it = it._replace(tasks=tasks)
        if before.force is not None and before.force.assign.epoch == epoch:
            return it._replace(stage=None), closed
        return it._replace(arrived=(), histories=(), sent=()), closed

    def _carried_out(self, me: int, it: Node, task: Any) -> tuple[Node, Any, tuple[Effect, ...]]:
        match task:
            case node.OpenStage(assign):
                if assign.base is None:
                    it = it._replace(stage=Stage(assign.first, assign.last))
                return it, node.Ready(assign.epoch), ()
            case node.Prepare(assign):
                return it, node.Ready(assign.epoch), ()
            case node.Dial(epoch):
                return it, node.Reached(epoch), ()
            case node.CopyAhead(epoch, taker, gifts):
                it, sent = self._copy(me, it, epoch, taker.incarnation, gifts, None)
                return it, node.Copied(epoch, taker.incarnation), sent
            case node.StopLoop(epoch):
                return it, node.Stopped(epoch), ()
            case node.SendTail(commit, taker):
                assert it.state.change is not None
                gifts = [g for g in it.state.change.assign.gives if g.taker.incarnation == taker]
                positions = {kept.session: kept.positions for kept in commit.sessions}
                it, sent = self._copy(me, it, commit.epoch, taker, gifts, positions)
                wire = ("bulk", me, self.index(taker), commit.epoch.counter)
                last = ("send", wire, Complete(commit.epoch), ()), ("end", wire)
                return it, node.Sent(commit.epoch, taker), (*sent, *last)
            case node.Adopt(assign, commit):
                return self._adopt(it, assign, commit), node.Adopted(assign.epoch), ()
        raise AssertionError(task)

    # --- keys and values

    def _copy(
        self, me: int, it: Node, epoch: Epoch, taker: int, gifts: Iterable[Any],
        positions: Mapping[int, int] | None,
    ) -> tuple[Node, tuple[Effect, ...]]:  # fmt: skip
        """Sends what the taker lacks of finished positions, or up to those of a commit."""
        if it.stage is None:
            return it, ()
        sent = {(t, s, u): n for t, s, u, n in it.sent}
        wire = ("bulk", me, self.index(taker), epoch.counter)
        effects: list[Effect] = []
        gifts, layers = tuple(gifts), self.layers(it.stage)
        units = [number for gift in gifts for number in range(gift.first, gift.last) if number in layers]
        history = any(gift.history for gift in gifts)
        for session, (zeros, *caches) in it.stage.cache:
            end = len(zeros) if positions is None else positions.get(session, 0)
            for number in [POSITIONS] * history + units:
                values = zeros if number == POSITIONS else caches[layers.index(number)]
                first, values = sent.get((taker, session, number), 0), values[:end]
                if first >= len(values):
                    continue
                sent[taker, session, number] = len(values)
                message: Any = Pages(session, epoch, number, first, len(values), b"")
                if number == POSITIONS:
                    message = Carried(session, epoch, 50, first, len(values), ())
                effects.append(("send", wire, message, values[first:]))
        return it._replace(sent=tuple(sorted((t, s, u, n) for (t, s, u), n in sent.items()))), tuple(effects)

    def _adopt(self, it: Node, assign: Assign, commit: Commit) -> Node:
        arrived = {(session, number): values for session, number, values in it.arrived}
        old, sessions, rows = it.stage, dict[int, tuple[Values, ...]](), dict[int, Values]()
        before = range(0) if old is None else self.layers(old)
        lost = range(commit.lost_first, commit.lost_last)
        for session, positions in ((kept.session, kept.positions) for kept in commit.sessions):
            held = None if old is None else old.sessions().get(session)
            zeros = dict(it.histories).get(session) if held is None else held[0]
            has = {number: arrived.get((session, number), ()) for number in self.layers(assign)}
            if held is not None:
                has.update({number: held[1 + before.index(number)] for number in before if number in has})
            for number, values in has.items():
                if number in lost:
                    has[number] = ()
                elif len(values) < positions:
                    raise Violation(
                        f"a stage changes to epoch {assign.epoch.counter} and has {len(values)} of "
                        f"{positions} positions of session {session} in unit {number}"
                    )
            if zeros is None:
                continue  # its Open is yet to come
            if len(zeros) < positions:
                raise Violation(f"a stage knows {len(zeros)} of {positions} positions of session {session}")
            sessions[session] = tuple(values[:positions] for values in (zeros, *has.values()))
            if held is not None and lost and old is not None:
                sent = held[0] if old.last - 1 not in before else held[1 + before.index(old.last - 1)]
                rows[session] = sent[: min(positions, self.rows)]
        stage = Stage(assign.first, assign.last, rows=tuple(sorted(rows.items()))).holding(sessions)
        return it._replace(stage=stage, arrived=(), histories=(), sent=())

    def _rows(self, me: int, it: Node, message: Any, values: Values) -> Outcome:
        force, stage = it.state.force, it.stage
        if force is None or force.assign.epoch != message.epoch or force.phase != "serving" or stage is None:
            return it, ()
        if it.state.change is not None and it.state.change.commit is not None:
            raise Violation(
                f"node {me} runs rows of epoch {message.epoch.counter} after Commit of the next one"
            )
        sessions, peer = stage.sessions(), force.assign.next
        onward = None if peer is None else ("step", me, self.index(peer.incarnation), message.epoch.counter)
        if isinstance(message, Open | Close):
            if isinstance(message, Close):
                sessions.pop(message.session, None)
            else:
                begins: tuple[Values, ...] = ((),) * (1 + len(self.layers(stage)))
                if message.source is not None:
                    source, n = sessions.get(message.source, begins), message.positions
                    if min(map(len, source)) < n:
                        raise Violation(
                            f"node {me} does not hold {n} positions of session {message.source}, with which "
                            f"session {message.session} begins"
                        )
                    begins = tuple(values[:n] for values in source)
                sessions.setdefault(message.session, begins)
            sent = () if onward is None else (("send", onward, message, ()),)
            return it._replace(stage=stage.holding(sessions)), sent
        held = sessions.get(message.session)
        if held is None:
            raise Violation(f"rows of session {message.session}, which is not open at node {me}")
        enter, until = message.part or (0, self.units)
        if len(held[0]) < message.first:
            raise Violation(f"node {me} knows only {len(held[0])} positions of session {message.session}")
        row = message.tokens if stage.first == 0 and enter == 0 else values
        numbers = {number: at for at, number in enumerate(self.layers(stage), 1) if enter <= number < until}
        caches = list(held)
        caches[0] = _joined(held[0], message.first, (0,) * message.rows, whole=message.part is None)
        for number, at in numbers.items():
            if len(held[at]) < message.first:
                raise Violation(
                    f"node {me} runs session {message.session} from position {message.first}, and has only "
                    f"{len(held[at])} in unit {number}"
                )
            done = held[at][: message.first]
            for value in row:
                done += (unit(number, done, value),)
            row = done[message.first :]
            caches[at] = _joined(held[at], message.first, row, whole=message.part is None)
        sessions[message.session] = tuple(caches)
        sent = tuple(
            (t, s, u, min(n, message.first) if s == message.session else n) for t, s, u, n in it.sent
        )  # what is run again is sent again
        it = it._replace(stage=stage.holding(sessions), sent=sent)
        count = message.rows
        if stage.last == self.units or until <= stage.last:
            token = drawn(row[-1], self._told(it, message) or ()) if message.want is Want.TOKEN else None
            return it, (("up", Result(message.session, message.epoch, message.first, count, token)),)
        assert onward is not None
        return it, (("send", onward, replace(message, tokens=(0,) * count), row),)

    def _refill(self, me: int, it: Node, refill: Refill) -> Outcome:
        stage, first, last = it.stage, refill.first, refill.last
        if stage is None or refill.session not in stage.sessions():
            return it, ()
        rows = dict(stage.rows)[refill.session]
        if last > len(rows):
            raise Violation(
                f"node {me} is asked for {last} rows of session {refill.session}, and has {len(rows)}"
            )
        part = refill.enter, refill.until
        zeros = (0,) * (last - first)
        step = Step(refill.session, refill.epoch, first, zeros, Want.NOTHING, part=part)
        return self._rows(me, it, step, rows[first:last])


def _joined(values: Values, first: int, more: Values, *, whole: bool) -> Values:
    """Values of which those from `first` on are replaced; all of them if `whole`."""
    return values[:first] + more + (() if whole else values[first + len(more) :])


def _report(it: Node, what: Any, epoch: Epoch) -> Any:
    if isinstance(what, Broken):
        return what
    if what == "prepared":
        return Prepared(epoch, 0.0, 0)
    rows = (
        () if it.stage is None else tuple(Kept(session, len(rows)) for session, rows in it.stage.rows if rows)
    )
    return Loaded(epoch, 0.0, 0, None, rows)


def _epoch(task: Any) -> Epoch:
    match task:
        case node.OpenStage(assign) | node.Prepare(assign) | node.Adopt(assign):
            return assign.epoch
        case node.SendTail(commit):
            return commit.epoch
        case _:
            return task.epoch
