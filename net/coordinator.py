"""The coordinator: connects to nodes, makes a chain of them, and runs sessions through it.

Decisions are made in net/cluster.py. Here one task for each node turns its messages into events, one task
passes the events to `decide` in order, and each command is carried out at once or by a task of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import trio

from ..engine.batch import Sampling
from ..engine.errors import ShoalError, ignore
from ..planner import LinkSpeed
from . import events
from .admission import Admission, ChainRoom
from .cluster import decide
from .connection import Connection, Hop, Kind, OpenStream, dial, enter_dial, in_thread, open_tasks, open_tcp
from .errors import NodeLostError, RemoteProtocolError, from_wire
from .events import DEFAULT_TIMING, Command, Event, Timing
from .generation import Flow, Generation
from .identity import Identity, ModelShape
from .liveness import TICK_SECONDS, Awake, Stillness, call_bound, redial_pause
from .members import ITSELF, ClusterState, Member, Moves, peer_of
from .messages import (
    Abort,
    Broken,
    Epoch,
    Failed,
    GetStats,
    Loaded,
    Measure,
    Measured,
    Message,
    Ping,
    Pong,
    Prepared,
    Progress,
    Release,
    Result,
    Stats,
)
from .pace import ChainPace
from .placement import COORDINATOR, NodeInfo, Placement, Planner, StageReport, fit_chunk
from .probe import OneAtATime, measure_peer, probe
from .session import Answer, Chain, Session
from .watch import SETTLE_SECONDS, ConnectionStalledError, Watch

LASTING_SECONDS = 5.0
"""A connection that has lasted for so long was no failed attempt to connect."""


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """Options of a coordinator. `recover`: go on with the other nodes after one is lost. `moves`: how the
    placement changes while answers are computed (members.Moves). `approximate`: allow nodes whose results are
    not exact beside exact ones. `log` is called with sentences for the user, in the
    event loop's thread: it must not block. Tests replace `hop` and `open_stream`."""

    timing: Timing = DEFAULT_TIMING
    measure_links: bool = True
    recover: bool = True
    moves: Moves = "reload"
    approximate: bool = False
    max_sessions: int = 32
    log: Callable[[str], None] = ignore
    hop: Hop = in_thread
    open_stream: OpenStream = open_tcp


DEFAULT_OPTIONS = CoordinatorOptions()


@dataclass(slots=True)
class _Peer:
    """The control connection to one node, and what was received on it."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    connection: Connection | None = None
    greeted: float | None = None
    """When the connection was greeted."""
    at_once: bool = False
    """Dial again without a pause when the connection has ended."""
    trying: bool = False
    """Whether a new connection is tried beside this one."""
    loaded: Loaded | None = None
    progress: Progress | None = None
    asking: trio.Lock = field(default_factory=trio.Lock)
    answers: trio.MemorySendChannel[Message] | None = None


class Coordinator:
    """A chain of nodes that answers prompts.

        async with Coordinator.open(addresses, identity, shape, plan) as coordinator:
            async with coordinator.generate(prompt, sampling, max_tokens=64, end=eos) as tokens:
                async for token in tokens:
                    ...
            for stage in await coordinator.stats():
                ...

    `open` returns when the chain is loaded. Any number of sessions may run at once, in tasks of their own;
    `max_sessions` of them are served at a time, and no more than the nodes have room for; the others wait in
    order (net/admission). When a node is lost, the coordinator plans again with the others and the answers go
    on. Lost nodes are dialled again, and used again. If the others cannot hold the model, answers wait for
    `timing.patience` seconds. Then the block ends with an error that
    names the node: NodeLostError, MismatchError, NoPlanError, or an error of that node's engine.

    `links` has the measured links by pairs of labels, `placement.COORDINATOR` among them.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        identity: Identity,
        shape: ModelShape,
        plan: Planner,
        options: CoordinatorOptions = DEFAULT_OPTIONS,
    ) -> None:
        if not addresses or len(set(addresses)) < len(addresses):
            raise ValueError("a coordinator needs at least one address, and no address twice")
        self.identity, self.shape, self.options = identity, shape, options
        self.links: dict[tuple[str, str], LinkSpeed] = {}
        self._plan = plan
        self._state = ClusterState(
            members=tuple(Member(host, port) for host, port in addresses),
            units=shape.units,
            epoch=Epoch(identity.incarnation, 0),
            timing=options.timing,
            approximate=options.approximate,
            recover=options.recover,
            moves=options.moves,
            unit_bytes=shape.unit_bytes,
        )
        self._pace = ChainPace(self.links)
        self._awake = Awake(0.0)
        self._results, self._still = 0, Stillness()
        self._peers = [_Peer() for _ in addresses]
        self._events, self._inbound = trio.open_memory_channel[Event](64)
        self._chain: Chain | None = None
        self._changed = trio.Event()
        self._admission = Admission(options.max_sessions)
        self._numbers = count()
        self._tasks: trio.Nursery

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        addresses: Sequence[tuple[str, int]],
        identity: Identity,
        shape: ModelShape,
        plan: Planner,
        options: CoordinatorOptions = DEFAULT_OPTIONS,
    ) -> AsyncIterator[Coordinator]:
        """Connects to the nodes, plans, assigns stages, and waits until the chain is loaded."""
        coordinator = cls(addresses, identity, shape, plan, options)
        coordinator._awake = Awake(trio.current_time())
        async with open_tasks() as tasks:
            coordinator._tasks = tasks
            tasks.start_soon(coordinator._decide)
            tasks.start_soon(coordinator._tick)
            for member in range(len(addresses)):
                tasks.start_soon(coordinator._keep_connected, member)
            await coordinator.chain()
            yield coordinator
            tasks.cancel_scope.cancel()

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes that have joined and are not lost, in the order of their addresses."""
        return tuple(self._info(i) for i in self._state.alive())

    @property
    def placement(self) -> Placement:
        """The newest plan: which node holds which units."""
        return self._state.placement

    @property
    def recoveries(self) -> int:
        """The number of times that the chain was replaced."""
        return self._state.epoch.counter - 1

    def session(self, sampling: Sampling | None = None, *, context: int | None = None) -> Session:
        """A sequence of at most `context` tokens (default: the model's context) for consecutive answers, each
        of which computes only the new part of its prompt."""
        most = self.shape.context if context is None else min(context, self.shape.context)
        generation = Generation(0, sampling or Sampling(), most, self.shape.vocab)
        return Session(self, generation, self._admission, self._numbers)

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int,
        end: Collection[int] = (),
        context: int | None = None,
    ) -> Answer:
        """The answer to a prompt of token ids. As in engine.generate, it ends after `max_tokens`, at the end
        of the context, or before a token in `end`. Errors as for Session.answer."""
        session = self.session(sampling, context=context)
        return session.answer(prompt, max_tokens=max_tokens, end=end, keep=False)

    async def stats(self) -> tuple[StageReport, ...]:
        """The work of each stage of the chain in this epoch. NodeLostError: a node was lost meanwhile."""
        reports = []
        for member, stage in zip(self._state.holders(), self._state.placement.stages, strict=True):
            answer = await self._ask(member, GetStats(), Stats)
            loaded = self._peers[member].loaded
            if loaded is None or loaded.epoch != self._state.epoch:
                raise NodeLostError(f"{stage.device} is still loading the layers of a lost node: ask again")
            reports.append(
                StageReport(stage.device, stage.first, stage.last, loaded.seconds, loaded.ram_bytes, answer)
            )
        return tuple(reports)

    async def chain(self) -> Chain:
        """The current chain, for sessions; waits while there is none."""
        while self._chain is None:
            await self._changed.wait()
        return self._chain

    # --- events

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            now = self._awake.tick(trio.current_time())
            busy = self._chain is None or bool(self._chain.sessions)
            await self._events.send(events.Tick(busy, self._stands_still(now)))

    def _stands_still(self, now: float) -> bool:
        """Whether results are due, and for too long none has arrived and no stage has finished a call."""
        chain, peers = self._chain, [self._peers[i] for i in self._state.holders()]
        progress = [peer.progress for peer in peers if peer.progress is not None]
        moved = (self._state.epoch, self._results, tuple(told.calls for told in progress))
        seconds = self._still.seconds(now, moved, due=chain is not None and chain.due)
        if seconds <= call_bound(0.0):
            return False
        running = [told for told in progress if told.running is not None]
        if any(told.expected is None for told in running):
            return seconds > self._state.load_bound()
        size = self._state.placement.chunk_rows * self.shape.cut_cols * 4
        wire = max((size / link.bytes_per_s for link in self.links.values()), default=0.0)
        return seconds > call_bound(wire + max((told.expected or 0.0 for told in running), default=0.0))

    async def _keep_connected(self, member: int) -> None:
        """Keeps a connection to a node: dials again for as long as this coordinator lives."""
        peer, tries = self._peers[member], 0
        while not self._state.members[member].barred:
            peer.scope, peer.at_once = trio.CancelScope(), False
            with peer.scope:
                await self._converse(member)
            lasted = peer.greeted is not None and trio.current_time() - peer.greeted > LASTING_SECONDS
            tries = 0 if lasted else tries + 1
            if not peer.at_once:
                await trio.sleep(redial_pause(tries))

    async def _converse(self, member: int) -> None:
        """Connects to one node and receives its messages. The end of the connection is an event, unless this
        coordinator ends it."""
        peer, where, options = self._peers[member], self._state.members[member], self.options
        peer.greeted = None
        try:
            async with dial(
                options.open_stream, where.host, where.port, self.identity, "control",
                seconds=options.timing.handshake,
            ) as (connection, hello):  # fmt: skip
                if hello.offer is None:
                    raise RemoteProtocolError(f"{connection.peer} is not a node: it offers no device")
                peer.connection, peer.greeted = connection, trio.current_time()
                await self._events.send(events.Joined(member, hello))
                while True:
                    messages = await connection.receive_some()
                    self._deliver(member, [m for m in messages if isinstance(m, Result | Failed)])
                    for message in messages:
                        await self._hear(member, message)
        except ShoalError as error:
            peer.connection = None
            await self._events.send(events.Left(member, error, greeted=peer.greeted is not None))
        finally:
            peer.connection = peer.progress = None
            if peer.answers is not None:
                peer.answers.close()

    async def _hear(self, member: int, message: Message) -> None:
        match message:
            case Result() | Failed():
                return  # was delivered before
            case Pong():
                answered = self._pace.answered(self._state, member, message, trio.current_time())
                self._peers[member].progress = message.progress
                heard = events.Heard(member, message.progress, answered, message.condition)
                await self._events.send(heard)
                return
            case Loaded(epoch):
                self._peers[member].loaded = message
                await self._events.send(events.StageLoaded(member, epoch))
            case Prepared(epoch, seconds, sent):
                await self._events.send(events.StagePrepared(member, epoch, seconds, sent))
            case Broken(epoch, code, text, blamed, again):
                error = from_wire(code, text, self._state.members[member].label)
                await self._events.send(events.StageBroken(member, epoch, error, blamed, again))
            case Measured() | Stats():
                self._answer(member, message)
            case _:
                raise AssertionError(f"the wire lets no {type(message).__name__} through")
        await self._events.send(events.Heard(member))

    def _deliver(self, member: int, messages: Sequence[Result | Failed]) -> None:
        """Passes messages of a stage to their sessions. RemoteProtocolError: another node than the last one
        has sent a Result."""
        self._results += len(messages)
        if self._chain is None:
            return
        if member != self._state.holders()[-1] and any(
            isinstance(message, Result) and message.epoch == self._chain.flow.epoch for message in messages
        ):
            who = self._state.members[member].label
            raise RemoteProtocolError(f"{who} sent a Result and is not the last node of the chain")
        self._chain.deliver(messages)

    # --- commands

    async def _decide(self) -> None:
        async for event in self._inbound:
            self._state, commands = decide(self._state, event, self._awake.at(trio.current_time()))
            for command in commands:
                self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case events.SendPing(member):
                self._post(member, Ping(self._pace.pinged(member, trio.current_time())))
            case events.SendAssign(member, assign):
                self._post(member, assign)
            case events.SendRelease(member, epoch):
                self._post(member, Release(epoch))
            case events.SendCommit(member, commit):
                self._post(member, commit)
            case events.SendAbort(member, epoch):
                self._post(member, Abort(epoch))
            case events.HangUp(member):
                self._peers[member].scope.cancel()
            case events.Redial(member):
                self._peers[member].at_once = True
                self._peers[member].scope.cancel()
            case events.TryAnew(member):
                if not self._peers[member].trying:
                    self._peers[member].trying = True
                    self._tasks.start_soon(self._try_anew, member)
            case events.Say(text):
                self.options.log(text)
            case events.MeasureLinks(pairs):
                self._tasks.start_soon(self._measure_links, pairs)
            case events.MakePlan(number, members):
                self._tasks.start_soon(self._make_plan, number, members)
            case events.Serve(epoch):
                self._tasks.start_soon(self._serve, epoch)
            case events.Pause():
                self._end_chain()
            case events.Fail(error):
                raise error

    def _post(self, member: int, message: Message) -> None:
        """Sends without waiting. `_converse` notices a connection that has ended. A node that accepts no
        orders is lost; pings may be dropped, since its silence is noticed."""
        connection = self._peers[member].connection
        if connection is None:
            return
        try:
            posted = connection.post(message)
        except NodeLostError:
            return
        if not posted and not isinstance(message, Ping):
            error = NodeLostError(f"{connection.peer} is lost: it does not read what is sent to it")
            self._tasks.start_soon(self._events.send, events.Left(member, error))

    async def _ask(self, member: int, message: Message, kind: type[Kind]) -> Kind:
        """Sends a question and waits for the answer of that kind. NodeLostError: the node is lost."""
        peer = self._peers[member]
        async with peer.asking:
            peer.answers, inbound = trio.open_memory_channel[Message](1)
            if peer.connection is not None:
                await peer.connection.send(message)
                async for answer in inbound:
                    if isinstance(answer, kind):
                        return answer
            raise NodeLostError(f"{self._state.members[member].label} is lost")

    def _answer(self, member: int, message: Message) -> None:
        """Passes an answer to the task in `_ask`; dropped if no task waits or one answer is there already."""
        answers = self._peers[member].answers
        try:
            if answers is not None:
                answers.send_nowait(message)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return

    async def _try_anew(self, member: int) -> None:
        """Reports a control connection that is silent while a new connection to the same node is answered."""
        peer, where, options = self._peers[member], self._state.members[member], self.options
        connection = peer.connection
        try:
            if connection is None:
                return
            received = connection.received
            await probe(options.open_stream, self.identity, peer_of(where), options.timing.handshake)
            await trio.sleep(SETTLE_SECONDS)
            if peer.connection is connection and connection.received == received:
                await self._events.send(events.Stalled(member))
        except ShoalError:
            return  # the node cannot be reached at all: its silence decides
        finally:
            peer.trying = False

    async def _measure_links(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Measures the links of these pairs. Pairs that share no end are measured at the same time, and
        others one after another, so that no device has to do with two measurements at once."""
        unreachable: set[tuple[int, int]] = set()
        if self.options.measure_links:
            state, ends = self._state, OneAtATime()
            labels = [member.label for member in state.members]

            async def measure(one: int, other: int) -> None:
                async with ends.using(one, other):
                    if one == ITSELF:
                        await self._measure_own(other, labels[other])
                    else:
                        both = (
                            await self._measure_between(one, other),
                            await self._measure_between(other, one),
                        )
                        if not all(both):
                            unreachable.add(state.ends(one, other))

            async with open_tasks() as tasks:
                for pair in pairs:
                    tasks.start_soon(measure, *pair)
        await self._events.send(events.LinksMeasured(frozenset(unreachable)))

    async def _measure_own(self, member: int, label: str) -> None:
        """Measures the link to a node. The one back is assumed to be as quick."""
        peer, options = peer_of(self._state.members[member]), self.options
        try:
            found = await measure_peer(options.open_stream, self.identity, peer, options.timing.handshake)
        except ShoalError as error:
            await self._events.send(events.Left(member, error))
        else:
            self.links[COORDINATOR, label] = self.links[label, COORDINATOR] = found

    async def _measure_between(self, source: int, target: int) -> bool:
        """Has a node measure the link to another; returns whether it could."""
        members = self._state.members
        peer, ends = peer_of(members[target]), (members[source].label, members[target].label)
        self.links.pop(ends, None)
        try:
            answer = await self._ask(source, Measure(peer), Measured)
        except NodeLostError:
            return True  # `_converse` reports the loss as an event
        if answer.link is None or answer.peer != peer.incarnation:
            return False
        self.links[ends] = answer.link
        return True

    async def _make_plan(self, number: int, members: Sequence[int]) -> None:
        nodes = [self._info(i) for i in members]
        answer: Placement | ShoalError
        try:
            placement: Placement = await self.options.hop(partial(self._plan, nodes, dict(self.links)))
            answer = fit_chunk(placement, nodes, self.shape.cut_cols)
        except ShoalError as error:
            answer = error
        await self._events.send(events.Planned(number, answer))

    async def _serve(self, epoch: Epoch) -> None:
        """Connects to the first node for steps and starts the chain, until the epoch or that connection
        ends."""
        if self._state.epoch != epoch or self._state.phase != "serving":
            return
        member, options = self._state.holders()[0], self.options
        where, placement = self._state.members[member], self._state.placement
        try:
            async with AsyncExitStack() as stack:
                peer, seconds = peer_of(where), options.timing.handshake
                connection = await enter_dial(
                    stack, options.open_stream, self.identity, peer, "step", seconds
                )
                if self._state.epoch != epoch or self._state.phase != "serving":
                    return
                window = placement.window or len(placement.stages) + 2
                flow = Flow(epoch, placement.chunk_rows, window, placement.chunks)
                self._admission.open(self._room())
                self._chain = chain = Chain(flow, connection)
                self._changed.set()
                self._changed = trio.Event()
                anew = partial(probe, options.open_stream, self.identity, peer, seconds)
                watch = Watch(connection, options.timing, busy=lambda: bool(chain.sessions), probe=anew)
                with chain.scope:  # cancelled when the epoch ends
                    async with open_tasks() as tasks:
                        tasks.start_soon(chain.write)
                        await watch.run()
        except ConnectionStalledError as error:
            await self._events.send(events.StageBroken(member, epoch, error, None, again=True))
        except ShoalError as error:
            incarnation = peer_of(where).incarnation
            await self._events.send(events.StageBroken(member, epoch, error, incarnation))

    def _end_chain(self) -> None:
        chain, self._chain = self._chain, None
        if chain is not None:
            chain.end()

    def _room(self) -> ChainRoom:
        """The room of the chain, which has just been loaded: that of the node with the least."""
        rooms = []
        for member in self._state.holders():
            loaded = self._peers[member].loaded
            if loaded is not None and loaded.room is not None:
                rooms.append(
                    ChainRoom(self._state.members[member].label, loaded.room.pages, loaded.room.positions)
                )
        return min(rooms, key=lambda room: (room.pages or 0) * room.page, default=ChainRoom())

    def _info(self, member: int) -> NodeInfo:
        where = self._state.members[member]
        assert where.hello is not None and where.hello.offer is not None
        slower = self._pace.slower(where.label)
        return NodeInfo(where.label, where.host, where.port, where.hello.offer, slower)
