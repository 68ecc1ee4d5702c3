"""The coordinator of the model: the real decisions about nodes, the real sessions and their chain, and around
them what the coordinator's tasks do.

Epochs, Chain, Session and Generation are objects that change. Between two steps of the model they are kept as
values: `CoordinatorStep` makes the objects from a `Front`, a step uses them, and its `front` takes their
values. Admission is left out: every session is admitted. Times are left out, too: after each step all times
of the state are 0, and time that passes is an event with a late `now`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import astuple, fields, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from unittest.mock import patch

from shoal.engine import sharing
from shoal.engine.batch import Sampling
from shoal.engine.errors import ShoalError
from shoal.net import cluster, events
from shoal.net.chain import Chain
from shoal.net.epochs import Epochs, _FirstLink
from shoal.net.errors import NodeLostError
from shoal.net.generation import Drawn, Flow, Generation, Part
from shoal.net.members import NO_HEARTBEAT, ClusterState
from shoal.net.messages import Abort, Close, Epoch, Loaded, Release
from shoal.net.sampling_updates import UpdateSender
from shoal.net.session import Session

from .search import Violation
from .stage import COORDINATOR, PENALISED, VOCAB, Effect, Values, answer

CONTEXT = 50
LOST = NodeLostError("lost")


class Question(NamedTuple):
    """A prompt, and the number of tokens of its answer."""

    prompt: Values
    tokens: int


class Talk(NamedTuple):
    """A session as a value: its generation, how many questions were asked, and how many tokens of the present
    answer it has given. `joined`: the chain has it. `over`: its answer was left before the end."""

    generation: tuple[Any, ...]
    asked: int = 0
    given: int = 0
    joined: bool = False
    over: bool = False


class Line(NamedTuple):
    """A chain as a value. `waits` is the transition for which it waits until nothing is in flight, and
    `order` has the number and index of each session, and `told` the sessions of which the last member was
    told something. `keeper`: the member that has kept rows."""

    flow: Flow
    stages: tuple[Part, ...]
    filler: int
    keeper: int | None
    stopped: bool
    ended: bool
    waits: Epoch | None
    kept: tuple[tuple[int, int], ...]
    closes: tuple[Close, ...] | None
    told: tuple[int, ...]
    order: tuple[tuple[int, int], ...]


class First(NamedTuple):
    """The connection to the first node of an epoch that is not served yet, and the command that waits for
    it."""

    epoch: Epoch
    member: int
    serve: events.Serve | None = None
    connected: bool = False


class Front(NamedTuple):
    """The coordinator's side of sessions. `number` is that of the next session. `loaded` are the nodes'
    latest reports. `lost` are connections to first nodes that have ended, or (True) carry nothing, which
    nobody has noticed yet."""

    talks: tuple[Talk, ...]
    line: Line | None = None
    first: First | None = None
    number: int = 0
    loaded: tuple[Loaded | None, ...] = ()
    lost: tuple[tuple[int, Epoch, bool], ...] = ()


class _Admission:
    """Admits every session."""

    def grow(self, session: object, positions: int) -> bool:
        return True

    def parts(self, session: object) -> None:
        return

    def end(self, session: object, *, keep: bool) -> None:
        return

    def lost(self, session: object) -> None:
        return

    def forget(self, session: object) -> None:
        return

    def open(self, room: object) -> None:
        return

    def change(self, room: object) -> None:
        return


class _Control:
    """What Epochs uses of a control connection."""

    def __init__(self, loaded: Loaded | None) -> None:
        self.loaded = loaded


class _Link:
    """The connection to the first node of an epoch, and its scope. What is sent becomes an effect, and so
    does its end."""

    def __init__(self, step: CoordinatorStep, member: int, epoch: Epoch) -> None:
        self._step, self.member = step, member
        self._wire = ("step", COORDINATOR, member, epoch.counter)

    def post(self, *messages: Any) -> bool:
        self._step.effects += [("send", self._wire, message, ()) for message in messages]
        return True

    def cancel(self) -> None:
        self._step.effects.append(("close", self._wire))


class _Tasks:
    """Where Epochs starts tasks: those that connect."""

    def __init__(self, step: CoordinatorStep) -> None:
        self._step = step

    def start_soon(self, task: object, first: _FirstLink, member: int) -> None:
        scope: Any = _Link(self._step, member, first.epoch)
        first.scope = scope


class Script(NamedTuple):
    """What the sessions of a model ask, and how they are run."""

    questions: tuple[tuple[Question, ...], ...]
    answers: tuple[tuple[Values, ...], ...]
    window: int
    rows: int
    keep: bool
    share: bool
    sampling: Sampling

    @classmethod
    def of(cls, questions: Iterable[Iterable[Question]], units: int, *, window: int, rows: int,
           keep: bool, share: bool, penalised: bool) -> Script:  # fmt: skip
        """The script of these questions, with the answers that one process gives."""
        asked = tuple(tuple(each) for each in questions)
        answers = tuple(
            tuple(answer(q.prompt, q.tokens, units, penalised=penalised) for q in each) for each in asked
        )
        return cls(asked, answers, window, rows, keep, share, PENALISED if penalised else Sampling())

    def front(self, nodes: int) -> Front:
        """The sessions before any question."""
        generation = _values(Generation(0, self.sampling, CONTEXT, VOCAB))
        return Front(tuple(Talk(generation) for _ in self.questions), loaded=(None,) * nodes)

    def complete(self, front: Front) -> bool:
        """Whether all answers are complete."""
        return all(
            talk.over or (talk.asked == len(asked) and talk.given == asked[-1].tokens)
            for talk, asked in zip(front.talks, self.questions, strict=True)
        )

    def may_ask(self, front: Front) -> list[int]:
        """The sessions that may ask their next question. They begin in their order: they are alike, so a
        state in which another is first differs only by names."""
        found = []
        for i, (talk, asked) in enumerate(zip(front.talks, self.questions, strict=True)):
            before = talk.asked == 0 or talk.over or talk.given == asked[talk.asked - 1].tokens
            first = talk.asked or all(other.asked for other in front.talks[:i])
            if talk.asked < len(asked) and before and first and (self.keep or not talk.over):
                found.append(i)
        return found


class CoordinatorStep:
    """The coordinator during one step."""

    def __init__(self, script: Script, state: ClusterState, front: Front) -> None:
        self.script, self.state, self.effects = script, state, list[Effect]()
        self._lost = list(front.lost)
        self._happened, self._deciding = deque[Any](), False
        self._number, self._talks = front.number, list(front.talks)
        self._sessions = [self._session(talk) for talk in front.talks]
        self._controls = [_Control(loaded) for loaded in front.loaded]
        parts: Any = None, None, None, _Admission(), self._controls
        self._epochs = Epochs(
            *parts, state=lambda: self.state, happens=self.happens,
            post=lambda member, message: self.effects.append(("down", member, message)),
        )  # fmt: skip
        tasks: Any = _Tasks(self)
        self._epochs.tasks = tasks
        self._waits: Epoch | None = None
        if front.line is not None:
            self._epochs.chain = self._chain(front.line)
        if front.first is not None:
            self._epochs._next = self._first(front.first)

    # --- values and objects

    def _session(self, talk: Talk) -> Session:
        session = Session(None, _generation(talk.generation), _Admission(), count())  # type: ignore[arg-type]
        session._keep = self.script.keep
        return session

    def _chain(self, line: Line) -> Chain:
        link: Any = _Link(self, line.stages[0].member, line.flow.epoch)
        chain = Chain(line.flow, link, line.stages, link)
        chain.filler, chain.ended = line.filler, line.ended
        chain.stopped = 0.0 if line.stopped else None
        chain._kept, chain._closes = dict(line.kept), None if line.closes is None else list(line.closes)
        chain._told = set(line.told)
        chain.tell = partial(self._epochs._post, chain.last)
        if line.waits is not None:
            waits = self._waits = line.waits
            chain._quiet = lambda sessions: self.happens(events.Quiet(waits, sessions))
        if line.keeper is not None:
            chain.refill = partial(self._epochs._post, line.keeper)
        for number, index in line.order:
            chain.sessions[number] = self._sessions[index]
            self._sessions[index]._chain = chain
        return chain

    def _first(self, first: First) -> _FirstLink:
        link: Any = _Link(self, first.member, first.epoch)
        return _FirstLink(first.epoch, first.serve, scope=link, connection=link if first.connected else None)

    def front(self) -> Front:
        """The values after the step."""
        chain, line, first = self._epochs.chain, None, None
        if chain is not None:
            keeper = None if chain.refill is None else chain.refill.args[0]  # type: ignore[attr-defined]
            line = Line(
                chain.flow, tuple(chain.stages), chain.filler, keeper, chain.stopped is not None, chain.ended,
                None if chain._quiet is None else self._waits, tuple(sorted(chain._kept.items())),
                None if chain._closes is None else tuple(chain._closes), tuple(sorted(chain._told)),
                tuple((n, self._sessions.index(s)) for n, s in chain.sessions.items()),  # type: ignore[arg-type]
            )  # fmt: skip
        link = self._epochs._next
        if link is not None:
            scope: Any = link.scope
            first = First(link.epoch, scope.member, link.serve, link.connection is not None)
        talks = tuple(
            talk._replace(generation=_values(session._generation), joined=session._chain is not None)
            for talk, session in zip(self._talks, self._sessions, strict=True)
        )
        loaded = tuple(control.loaded for control in self._controls)
        return Front(talks, line, first, self._number, loaded, tuple(self._lost))

    # --- what happens

    def happens(self, event: Any, now: float = 0.0) -> None:
        """As `Coordinator._happens`."""
        self._happened.append(event)
        if self._deciding:
            return
        self._deciding = True
        while self._happened:
            self.state, commands = cluster.decide(self.state, self._happened.popleft(), now)
            for command in commands:
                self._carry_out(command)
        self._deciding = False

    def deliver(self, member: int, message: Any) -> None:
        """As `Coordinator._deliver`."""
        chain = self._epochs.chain
        if chain is None or chain.ended:
            return
        if not chain.expects(member, message):
            raise Violation(f"node {member} sends a Result and is not at the end of the rows' way: {message}")
        chain.deliver(member, [message])

    def loaded(self, member: int, message: Loaded) -> None:
        """A report of a node."""
        self._controls[member].loaded = message
        self.happens(events.StageLoaded(member, message.epoch))

    def ask(self, index: int) -> None:
        """The user asks the next question of a session (`Session.begin`)."""
        talk, session = self._talks[index], self._sessions[index]
        question = self.script.questions[index][talk.asked]
        self._talks[index] = talk._replace(asked=talk.asked + 1, given=0, over=False)
        session._generation.ask(question.prompt, question.tokens)
        if session._chain is not None:
            session._chain.send(session.due_steps())

    def leave(self, index: int) -> None:
        """The user leaves an answer."""
        self._talks[index] = self._talks[index]._replace(over=True)
        self._sessions[index].end(keep=self.script.keep)

    def reached(self) -> None:
        """The first node of an epoch is connected."""
        first = self._epochs._next
        assert first is not None
        link: Any = first.scope
        first.connection = link
        self._epochs._reached(first)

    def unreachable(self, incarnation: int) -> None:
        """The first node of an epoch cannot be connected."""
        first: Any = self._epochs._next
        self.happens(events.StageBroken(first.scope.member, first.epoch, LOST, incarnation))

    def broken(self, member: int, epoch: Epoch, again: bool, incarnation: int) -> None:
        """The connection to a first node has ended. Nobody is told if it was not wanted any more."""
        self._lost.remove((member, epoch, again))
        chain, first = self._epochs.chain, self._epochs._next
        wanted = chain is not None and chain.flow.epoch == epoch and not chain.ended
        if wanted or (first is not None and first.epoch == epoch):
            self.happens(events.StageBroken(member, epoch, LOST, None if again else incarnation, again))

    def settle(self) -> None:
        """Lets sessions that wait for a chain join it (`Session._join`), and reads the tokens."""
        chain = self._epochs.chain
        for index, session in enumerate(self._sessions):
            if session._failed is not None:
                raise Violation(f"session {index} has failed: {session._failed}")
            while session._found:
                talk, found = self._talks[index], session._found.popleft()
                assert isinstance(found, Drawn)
                token = found.token
                right = self.script.answers[index][talk.asked - 1]
                if not talk.over and (talk.given >= len(right) or token != right[talk.given]):
                    raise Violation(
                        f"token {talk.given} of session {index} is {token}, and the answer is {right}"
                    )
                self._talks[index] = talk._replace(given=talk.given + 1)
            generation = session._generation
            if generation.finished and not self._talks[index].over and self._talks[index].asked:
                right = self.script.answers[index][self._talks[index].asked - 1]
                if self._talks[index].given < len(right):
                    raise Violation(f"the answer of session {index} ends early")
            if chain is None or not chain.open or session._chain is not None or generation.finished:
                continue
            source = self._source(chain, generation)
            if source is not None and source.later:
                continue
            session._chain = chain
            generation.session, self._number = self._number, self._number + 1
            shared = (None, 0) if source is None else (source.session._generation.session, source.positions)
            opening = generation.start(chain.flow, *shared)
            chain.join(opening.session, session)
            chain.send([opening, *session.due_steps()])

    def _source(self, chain: Chain, generation: Generation) -> sharing.Source[Session] | None:
        """The session with which one begins that joins; for a single position, too."""
        if not self.script.share:
            return None
        sessions: list[Any] = list(chain.sessions.values())
        with patch.object(sharing, "LEAST", 1):
            return sharing.source_for(generation.skippable, sessions)

    # --- commands

    def _carry_out(self, command: Any) -> None:
        """As `Coordinator._carry_out`."""
        match command:
            case events.SendAssign(member, message):
                self.effects.append(("down", member, message))
            case events.SendCommit(member, commit):
                self.effects += [("committing", commit), ("down", member, commit)]
            case events.SendRelease(member, epoch):
                self.effects.append(("down", member, Release(epoch)))
            case events.SendAbort(member, epoch):
                self.effects.append(("down", member, Abort(epoch)))
            case events.HangUp(member) | events.Redial(member):
                self.effects.append(("hang up", member))
            case events.MeasureLinks():
                self.effects.append(("measure",))
            case events.MakePlan(number, members):
                self.effects.append(("plan", number, members))
            case events.Reach(epoch, member):
                self._epochs.reach(epoch, member)
            case events.Unreach(epoch):
                self._epochs.unreach(epoch)
            case events.Hold(epoch, base):
                self._waits = epoch
                self._epochs.hold(epoch, base)
            case events.Resume(epoch):
                self._epochs.resume(epoch)
            case events.Serve(epoch):
                self.effects.append(("serving", epoch))
                self._epochs.serve(command)
            case events.Pause(epoch):
                self._epochs.pause(epoch)
            case events.Fail(error):
                raise Violation(f"the coordinator has ended: {error}")
            case events.Dial() | events.SendPing() | events.Say() | events.TryAnew() | events.Moved():
                pass
            case _:
                raise AssertionError(command)


class _Items(NamedTuple):
    """A list, a deque or what the last node was told, as a value."""

    kind: type
    items: tuple[Any, ...]


def _values(generation: Generation) -> tuple[Any, ...]:
    """The values of a Generation."""
    found = (getattr(generation, field.name) for field in fields(generation))
    return tuple(map(_value, found))


def _value(value: Any) -> Any:
    if isinstance(value, UpdateSender):
        return _Items(UpdateSender, astuple(value))
    return _Items(type(value), tuple(value)) if isinstance(value, list | deque) else value


def _object(value: Any) -> Any:
    if not isinstance(value, _Items):
        return value
    return UpdateSender(*value.items) if value.kind is UpdateSender else value.kind(value.items)


def _generation(values: tuple[Any, ...]) -> Generation:
    made = object.__new__(Generation)
    for field, value in zip(fields(Generation), values, strict=True):
        setattr(made, field.name, _object(value))
    return made


_ERRORS: dict[type, ShoalError] = {}


def timeless(state: ClusterState) -> ClusterState:
    """A state of the coordinator without times, and with one error for each kind of error."""
    members = tuple(
        replace(
            m, heartbeat=NO_HEARTBEAT, joined=0.0, began=0.0, lost=None if m.lost is None else _error(m.lost)
        )
        for m in state.members
    )
    move, setback = state.transition, state.setback
    if move is not None:
        move = replace(move, began=0.0, since=0.0, bound=1.0, held=None if move.held is None else 0.0)
    return replace(
        state,
        members=members,
        since=0.0,
        moved=0.0,
        waiting=None if state.waiting is None else 0.0,
        failure=None if state.failure is None else _error(state.failure),
        transition=move,
        setback=None if setback is None else replace(setback, until=0.0),
    )


def _error(error: ShoalError) -> ShoalError:
    return _ERRORS.setdefault(type(error), error)
