"""The coordinator: connects to nodes, makes a chain of them, and runs sessions through it.

Decisions are made in net/cluster.py. Here one task for each node turns its messages into events, and each
command is carried out at once, or by a task of its own. An event is decided in the turn of the event loop in
which it happens: answers stand still between the last Result of one epoch and the first Step of the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import trio

from ..engine.batch import ReadRequest, Sampling
from ..engine.errors import ShoalError, ignore
from ..engine.sampler import Allow
from ..planner import Assignment, LinkSpeed
from . import events, holding, house_list
from .admission import Admission
from .chain import Answer as Taken
from .chain import Chain
from .chain_pace import ChainPace
from .cluster import decide
from .connection import Hop, in_thread, open_tasks
from .control import Control
from .dial import OpenStream, dial, open_tcp
from .epochs import Epochs
from .errors import NetError, NodeLostError, RemoteProtocolError, from_wire
from .events import Command, Event
from .generation import Generation
from .holding import FetchReport
from .identity import Identity, ModelShape, is_home
from .known import KnownLinks, estimate
from .liveness import DEFAULT_TIMING, TICK_SECONDS, AwakeClock, Stillness, Timing, call_bound, redial_pause
from .measuring import LinkMeasurer
from .members import ClusterState, Member, Moves, device_of, peer_of
from .messages import (
    Abort,
    Broken,
    Epoch,
    Failed,
    GetStats,
    Held,
    Loaded,
    Measured,
    Message,
    Ping,
    Pong,
    Prepared,
    Release,
    Result,
    Rows,
    Spare,
    Spares,
    Stats,
)
from .moves import Move, MoveLog, usage_of
from .overview import NodeOverview, Overview
from .placement import (
    NodeInfo,
    Placement,
    Planner,
    Rebalancer,
    StageReport,
    Usage,
    fit_chunk,
)
from .probe import probe
from .session import Answer, Reading, Session

LASTING_SECONDS = 5.0
"""A connection that has lasted for so long was no failed attempt to connect."""
FAULTY_SECONDS = 60.0
"""The pause before a process that has failed is looked for again, by a coordinator that stays."""
REBALANCE_SECONDS = 0.5
"""The time between two questions to the rebalancer."""


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """Options of a coordinator. `recover`: go on with the other nodes after one is lost. `moves`: how the
    placement changes while answers are computed (members.Moves). `rebalancer` proposes such changes.
    `approximate`: allow nodes whose results are not exact beside exact ones. `share_prefixes`: a session
    begins with what others hold of its prompt, and complete answers keep their state for that. `open_ended`:
    nodes come and go, and may be none at first. `log` is called with sentences for the user, in the event
    loop's thread: it must not block. `open_stream` connects to nodes (see reverse.DeviceListener); tests
    replace it and `hop`. In a house, `known_links` are used before links are measured, and follow what is
    measured; the first plan waits a little for the `expected` devices (members.device_of)."""

    timing: Timing = DEFAULT_TIMING
    measure_links: bool = True
    recover: bool = True
    open_ended: bool = False
    moves: Moves = "move"
    approximate: bool = False
    max_sessions: int = 32
    share_prefixes: bool = True
    rebalancer: Rebalancer | None = None
    log: Callable[[str], None] = ignore
    hop: Hop = in_thread
    open_stream: OpenStream = open_tcp
    known_links: KnownLinks | None = None
    expected: frozenset[int] = frozenset()


DEFAULT_OPTIONS = CoordinatorOptions()


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

    With `options.open_ended`, `open` returns at once, nodes are also given by `add`, and answers wait for as
    long as the nodes that are there cannot hold the model: `chain` returns when they can. The reasons go to
    `options.log`.

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
        if len(set(addresses)) < len(addresses) or not (addresses or options.open_ended):
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
            open_ended=options.open_ended,
            expected=options.expected,
            moves=options.moves,
            unit_bytes=shape.unit_bytes,
        )
        self._pace = ChainPace(self.links)
        self._copies: Mapping[str, Sequence[int]] = {}
        """The units of which the rebalancer wants copies, by label."""
        self._awake = AwakeClock(0.0)
        self._results, self._still = 0, Stillness()
        self._controls = [Control(options.log) for _ in addresses]
        self._happened = deque[Event]()
        self._deciding = False
        self._failure: ShoalError | None = None
        self._failed = trio.Event()
        self._log = MoveLog(options.log, shape.units)
        self._admission = Admission(options.max_sessions)
        self._epochs = Epochs(
            identity, options.open_stream, options.timing, self._admission, self._controls,
            state=lambda: self._state, happens=self._happens, post=self._post,
        )  # fmt: skip
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
        coordinator._awake = AwakeClock(trio.current_time())
        async with open_tasks() as tasks:
            coordinator._tasks = coordinator._epochs.tasks = tasks
            tasks.start_soon(coordinator._fail)
            tasks.start_soon(coordinator._tick)
            for member in range(len(addresses)):
                coordinator._dial(member)
            if options.rebalancer is not None:
                tasks.start_soon(coordinator._rebalance, options.rebalancer)
            if not options.open_ended:
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
    def devices(self) -> frozenset[int]:
        """The devices of a house that have layers by the newest plan (members.device_of)."""
        return frozenset(device_of(self._state.incarnation(i)) for i in self._state.holders())

    @property
    def recoveries(self) -> int:
        """The number of times that the chain has ended, because a node or a connection was lost, and another
        was begun. Moves of layers do not count."""
        return self._epochs.recoveries

    @property
    def moves(self) -> Sequence[Move]:
        """What became of the latest transitions, the oldest first."""
        return self._log.moves

    def add(self, host: str, port: int, incarnation: int | None = None, *, anew: bool = False) -> None:
        """Adds a node, which is dialled as those that were given at the start; one that is known and lost is
        dialled at once. With the `incarnation` of its process, a node that is known under another address has
        moved here. `anew`: its connections may be dead without notice, so they are tried."""
        self._happens(events.Found(host, port, incarnation, anew))

    def remove(self, host: str, port: int) -> None:
        """Ends the use of a node, until it is added again; nothing if there is none at that address."""
        for i, member in enumerate(self._state.members):
            if (member.host, member.port) == (host, port) and not member.barred:
                self._happens(events.Removed(i, NetError(f"{member.called} was removed")))

    @property
    def fetches(self) -> tuple[FetchReport, ...]:
        """How far nodes are with the files that they should hold on disk."""
        return holding.reports(self._state, self._awake.at(trio.current_time()))

    def overview(self) -> Overview:
        """What is known at the moment of nodes, links and answers."""
        epoch, log, admission = self._state.epoch, self._log, self._admission
        recent = log.recent(self._awake.at(trio.current_time()))
        nodes = []
        for control in self._controls:
            loaded = control.loaded if control.loaded is not None and control.loaded.epoch == epoch else None
            ram = None if loaded is None else loaded.ram_bytes
            nodes.append(NodeOverview(control.waiting, ram, control.copies))
        return Overview(
            self._state, tuple(nodes), dict(self.links), self._epochs.tokens, recent,
            admission.running, admission.queued, self._epochs.recoveries, tuple(log.moves), self.fetches,
        )  # fmt: skip

    def free_idle(self) -> None:
        """Frees the keys and values of sessions that are between two answers, and those that complete answers
        have left for later ones. They are computed again when they are needed."""
        self._admission.make_room()

    def session(
        self,
        sampling: Sampling | None = None,
        *,
        context: int | None = None,
        report: int | None = None,
        allow: Allow | None = None,
    ) -> Session:
        """A sequence of at most `context` tokens (default: the model's context) for consecutive answers, each
        of which computes only the new part of its prompt. `report` and `allow` as in Generation."""
        return self._new_session(sampling, context, report, allow, lingers=False)

    def _new_session(
        self,
        sampling: Sampling | None,
        context: int | None,
        report: int | None = None,
        allow: Allow | None = None,
        *,
        lingers: bool,
    ) -> Session:
        most = self.shape.context if context is None else min(context, self.shape.context)
        generation = Generation(0, sampling or Sampling(), most, self.shape.vocab, report, allow)
        return Session(
            self, generation, self._admission, self._numbers,
            shares=self.options.share_prefixes, lingers=lingers and self.options.share_prefixes,
        )  # fmt: skip

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int,
        end: Collection[int] = (),
        context: int | None = None,
        report: int | None = None,
        allow: Allow | None = None,
    ) -> Answer:
        """The answer to a prompt of token ids. As in engine.generate, it ends after `max_tokens`, at the end
        of the context, or before a token in `end`. `report` and `allow` as in Generation. Errors as for
        Session.answer."""
        session = self._new_session(sampling, context, report, allow, lingers=True)
        return session.answer(prompt, max_tokens=max_tokens, end=end, keep=False)

    def read(self, request: ReadRequest) -> Reading:
        """Reads a text: see Session.read."""
        session = self.session(context=request.context, report=request.report)
        return session.read(request.tokens, request.first, request.want)

    async def stats(self) -> tuple[StageReport, ...]:
        """The work of each stage of the chain in this epoch. NodeLostError: a node was lost meanwhile."""
        reports = []
        for member, stage in zip(self._state.holders(), self._state.placement.stages, strict=True):
            answer = await self._controls[member].ask(GetStats(), Stats, self._state.members[member].label)
            loaded = self._controls[member].loaded
            if loaded is None or loaded.epoch != self._state.epoch:
                raise NodeLostError(f"{stage.device} is still loading the layers of a lost node: ask again")
            reports.append(
                StageReport(stage.device, stage.first, stage.last, loaded.seconds, loaded.ram_bytes, answer)
            )
        return tuple(reports)

    @property
    def current(self) -> Chain | None:
        """The current chain, which may have ended; None before the first."""
        return self._epochs.chain

    async def chain(self) -> Chain:
        """The current chain, for sessions; waits while there is none, or while it is held."""
        return await self._epochs.wait()

    def move(self, stages: Sequence[Assignment], why: str) -> None:
        """Changes to these stages, by labels of nodes, while answers go on. What becomes of it is added to
        `moves`: at once if it cannot be begun, for example while another transition is under way."""
        self._happens(events.Proposed(self._fitting(self._state.placement.moved(stages)), why))

    # --- events

    def _happens(self, event: Event) -> None:
        """Decides about an event, and carries out the commands. An event that happens meanwhile is next."""
        self._happened.append(event)
        if self._deciding:
            return
        self._deciding = True
        while self._happened:
            now = self._awake.at(trio.current_time())
            self._state, commands = decide(self._state, self._happened.popleft(), now)
            for command in commands:
                self._carry_out(command)
        self._deciding = False

    async def _fail(self) -> None:
        """Ends the coordinator with the error of a Fail command."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            self._look_at_house()
            now, epochs = self._awake.tick(trio.current_time()), self._epochs
            self._log.tick(now, epochs.tokens, due=epochs.due)
            self._order_files()
            self._happens(events.Tick(epochs.busy, self._stands_still(now)))

    def _stands_still(self, now: float) -> bool:
        """Whether results are due, and for too long none has arrived and no stage has finished a call."""
        stages = [self._controls[i] for i in self._state.holders()]
        progress = [stage.progress for stage in stages if stage.progress is not None]
        moved = (self._state.epoch, self._results, tuple(told.calls for told in progress))
        seconds = self._still.seconds(now, moved, due=self._epochs.due)
        if seconds <= call_bound(0.0):
            return False
        running = [told for told in progress if told.running is not None]
        if any(told.expected is None for told in running):
            return seconds > self._state.load_bound()
        size = self._state.placement.chunk_rows * self.shape.cut_cols * 4
        wire = max((size / link.bytes_per_s for link in self.links.values()), default=0.0)
        return seconds > call_bound(wire + max((told.expected or 0.0 for told in running), default=0.0))

    def _dial(self, member: int) -> None:
        """Keeps a connection to a node from now on."""
        while len(self._controls) <= member:
            self._controls.append(Control(self.options.log))
        control = self._controls[member]
        control.redial()
        if not control.kept:
            control.kept = True
            self._tasks.start_soon(self._keep_connected, member)

    async def _keep_connected(self, member: int) -> None:
        """Keeps a connection to a node: dials again for as long as this coordinator lives."""
        control, tries = self._controls[member], 0
        while not self._state.members[member].barred:
            control.scope, control.at_once, control.wake = trio.CancelScope(), False, trio.Event()
            with control.scope:
                await self._converse(member)
            lasted = control.greeted is not None and trio.current_time() - control.greeted > LASTING_SECONDS
            tries = 0 if lasted or control.at_once else tries + 1
            if not control.at_once:
                # Where nodes tell of themselves, another process in the place of a faulty one does.
                waits = self.options.open_ended and self._state.members[member].at_fault
                with trio.move_on_after(FAULTY_SECONDS if waits else redial_pause(tries)):
                    await control.wake.wait()
        control.kept = False

    async def _converse(self, member: int) -> None:
        """Connects to one node and receives its messages. The end of the connection is an event, unless this
        coordinator ends it."""
        control, where, options = self._controls[member], self._state.members[member], self.options
        control.greeted = None
        try:
            async with dial(
                options.open_stream, where.host, where.port, self.identity, "control",
                seconds=options.timing.handshake,
            ) as (connection, hello):  # fmt: skip
                if hello.offer is None:
                    raise RemoteProtocolError(f"{connection.peer} is not a node: it offers no device")
                self._check_units(hello.offer.held or (), connection.peer)
                if self.identity.trust is not None:
                    await house_list.introduce(connection, self.identity.trust, options.timing.handshake)
                control.connection, control.greeted = connection, trio.current_time()
                known = self.options.known_links
                there = frozenset[int]() if known is None else known.of(self._state, hello.incarnation)
                self._happens(events.Joined(member, hello, there))
                self._recall()
                self._ping(member)  # the first plan counts with the node's condition
                while True:
                    messages = await connection.receive_some()
                    self._deliver(member, [m for m in messages if isinstance(m, Result | Rows | Failed)])
                    reports = [m for m in messages if not isinstance(m, Result | Rows | Failed)]
                    for i, message in enumerate(reports):
                        if i:  # a node may send many at once: answers go on between them
                            await trio.lowlevel.checkpoint()
                        self._hear(member, message)
        except ShoalError as error:
            control.ended()
            self._happens(events.Left(member, error, greeted=control.greeted is not None))
        finally:
            control.ended()

    def _look_at_house(self) -> None:
        """Tells all nodes when the list of devices was changed here, and removes those of devices that were
        taken off it."""
        trust = self.identity.trust
        if trust is None or not house_list.changed(trust, self.options.log):
            return
        for removed in house_list.revoked(trust, self._state):
            self._happens(removed)
        for i in self._state.alive():
            self._post(i, house_list.told(trust))

    def _hear(self, member: int, message: Message) -> None:
        control = self._controls[member]
        control.reported(trio.current_time(), self._state.members[member].called)
        match message:
            case Pong():
                now = trio.current_time()
                fetching = self._state.fetches(self._awake.at(now))
                answered = self._pace.answered(self._state, member, message, now, fetching=fetching)
                control.ponged(message)
                self._happens(events.Heard(member, message.progress, answered, message.condition))
                return
            case Prepared(epoch, seconds, sent):
                self._happens(events.StagePrepared(member, epoch, seconds, sent))
            case Loaded(epoch):
                if epoch == self._state.epoch:
                    control.loaded = message
                self._happens(events.StageLoaded(member, epoch))
            case Broken(epoch, code, text, blamed, again):
                error = from_wire(code, text, self._state.members[member].label)
                self._happens(events.StageBroken(member, epoch, error, blamed, again))
            case Spares(units):
                control.copies = frozenset(units)
            case Held(units):
                self._check_units(units, self._state.members[member].label)
                self._happens(events.FilesHeld(member, message))
            case Measured() | Stats():
                control.answer(message)
            case _:
                raise AssertionError(f"the wire lets no {type(message).__name__} through")
        self._happens(events.Heard(member))

    def _check_units(self, units: Sequence[int], who: str) -> None:
        """RemoteProtocolError: the model does not have them."""
        if any(unit >= self.shape.units for unit in units):
            raise RemoteProtocolError(
                f"{who} has files of units that the model of {self.shape.units} has not"
            )

    def _deliver(self, member: int, messages: Sequence[Taken]) -> None:
        """Passes messages of a stage to their sessions. RemoteProtocolError: another node than the one at the
        end of the rows' way has sent a Result."""
        chain = self._epochs.chain
        self._results += len(messages)
        if chain is None:
            return
        for message in messages:
            if isinstance(message, Result | Rows) and not chain.expects(member, message):
                who = self._state.members[member].label
                raise RemoteProtocolError(f"{who} sent a Result and is not the last node of the chain")
            if isinstance(message, Rows) and message.output.shape[1] != self.shape.cut_cols:
                who, cols = self._state.members[member].label, message.output.shape[1]
                raise RemoteProtocolError(f"{who} sent rows of {cols} columns of {self.shape.cut_cols}")
        chain.deliver(member, messages)

    # --- commands

    def _carry_out(self, command: Command) -> None:
        match command:
            case events.SendPing(member):
                self._ping(member)
            case events.SendAssign(member, assign):
                self._post(member, assign)
            case events.SendCommit(member, commit):
                self._post(member, commit)
            case events.SendAbort(member, epoch):
                self._post(member, Abort(epoch))
            case events.SendRelease(member, epoch):
                self._post(member, Release(epoch))
            case events.HangUp(member):
                self._controls[member].scope.cancel()
            case events.Redial(member):
                self._controls[member].redial()
            case events.Dial(member):
                self._dial(member)
            case events.TryAnew(member):
                self._tasks.start_soon(self._try_anew, member)
            case events.Say(text, member):
                (self.options.log if member is None else self._controls[member].say)(text)
            case events.MeasureLinks(pairs, again):
                self._tasks.start_soon(self._measure_links, pairs, again)
            case events.MakePlan(number, members):
                self._recall()
                self._tasks.start_soon(self._make_plan, number, members)
            case events.Reach(epoch, member):
                self._epochs.reach(epoch, member)
            case events.Unreach(epoch):
                self._epochs.unreach(epoch)
            case events.Hold(epoch, base):
                self._epochs.hold(epoch, base)
            case events.Resume(epoch):
                self._epochs.resume(epoch)
            case events.Serve():
                self._epochs.serve(command)
            case events.Pause(epoch):
                self._epochs.pause(epoch)
            case events.Moved():
                self._log.ended(command, self._epochs.standstill)
            case events.Fail(error):
                self._failure = error
                self._failed.set()

    def _ping(self, member: int) -> None:
        answers = self._admission.running + self._admission.queued > 0
        self._post(member, Ping(self._pace.pinged(member, trio.current_time()), answers))

    def _post(self, member: int, message: Message) -> None:
        """Sends without waiting. A node that accepts no orders is lost."""
        control = self._controls[member]
        if not control.post(message):
            assert control.connection is not None
            peer = control.connection.peer
            self._happens(
                events.Left(member, NodeLostError(f"{peer} is lost: it does not read what is sent to it"))
            )

    async def _try_anew(self, member: int) -> None:
        """Reports a control connection that is silent while a new connection to the same node is answered."""
        peer, options = peer_of(self._state.members[member]), self.options
        anew = partial(probe, options.open_stream, self.identity, peer, options.timing.handshake)
        if await self._controls[member].try_anew(anew):
            self._happens(events.Stalled(member))

    def _recall(self) -> None:
        """Adds what is known of links from before, or can be estimated, where nothing was measured yet."""
        if self.options.known_links is not None:
            self.options.known_links.recall(self._state, self.links)
        estimate(self._state, self.links)

    async def _measure_links(self, pairs: Sequence[tuple[int, int]], again: bool) -> None:
        unreachable: frozenset[tuple[int, int]] = frozenset()
        if self.options.measure_links:
            options, me = self.options, self.identity
            measurer = LinkMeasurer(
                self._state.members, self._controls, self.links, me, options.open_stream,
                options.timing.handshake, lambda member, error: self._happens(events.Left(member, error)),
                again,
            )  # fmt: skip
            unreachable = await measurer.measure(pairs)
            if options.known_links is not None:
                options.known_links.learn(self._state, pairs, self.links)
        self._happens(events.LinksMeasured(unreachable))

    async def _make_plan(self, number: int, members: Sequence[int]) -> None:
        nodes = [self._info(i) for i in members]
        answer: Placement | ShoalError
        try:
            placement: Placement = await self.options.hop(partial(self._plan, nodes, dict(self.links)))
            answer = fit_chunk(placement, nodes, self.shape.cut_cols)
        except ShoalError as error:
            answer = error
        self._happens(events.Planned(number, answer))
        self._order_files()  # bytes travel from now on, not from the next tick

    def _fitting(self, placement: Placement) -> Placement:
        """The placement with chunks that its nodes and a Step can carry."""
        labels = {stage.device for stage in placement.stages}
        return fit_chunk(placement, [n for n in self.nodes if n.label in labels], self.shape.cut_cols)

    # --- moves

    async def _rebalance(self, rebalancer: Rebalancer) -> None:
        """Asks for a better placement while the chain is served, and for the copies of weights that nodes
        should hold."""
        hop, asked = self.options.hop, None
        while True:
            await trio.sleep(REBALANCE_SECONDS)
            outcome = self._log.outcome()
            if outcome is not None:
                await hop(partial(rebalancer.happened, outcome))
            chain, placement, base = self._epochs.chain, self._state.placement, self._state.epoch
            nodes, links = [self._info(i) for i in self._state.usable()], dict(self.links)
            if chain is None or not chain.open or self._state.transition is not None:
                continue
            there = chain.flow.epoch, tuple(node.label for node in nodes)
            if there != asked:
                asked = there
                self._copies = await hop(partial(rebalancer.copies, nodes, links, placement))
            self._order_copies()
            if any(s.filling and not s.generation.finished for s in chain.sessions.values()):
                continue
            now, usage = self._awake.at(trio.current_time()), self._usage(chain)
            look = partial(rebalancer.look, nodes, links, placement, usage, now)
            proposal = await hop(look)
            if proposal is not None:
                self._log.proposed(proposal)
                fitting = self._fitting(proposal.placement)
                self._happens(events.Proposed(fitting, proposal.why, base=base))

    def _order_copies(self) -> None:
        """Tells each node of which units it should hold copies, as far as it has their files."""
        for member in self._state.alive():
            wanted, held = self._copies.get(self._state.members[member].label, ()), self._state.held(member)
            units = tuple(unit for unit in wanted if unit in held)
            if units != self._controls[member].ordered:
                self._controls[member].ordered = units
                self._post(member, Spare(units))

    def _order_files(self) -> None:
        """Tells each node that lacks files which it should hold, and from whom it gets them."""
        now = self._awake.at(trio.current_time())
        for member, order in holding.orders(self._state, self._copies, self.links, now).items():
            if not holding.same_order(self._controls[member].fetch, order):
                self._controls[member].fetch = order
                self._post(member, order)

    def _usage(self, chain: Chain) -> Usage:
        """What the chain is used for at the moment."""
        answers = [s.generation for s in chain.sessions.values() if not s.generation.finished]
        there = [(self._state.members[i].label, self._controls[i]) for i in self._state.alive()]
        return replace(
            usage_of(answers, self._epochs.tokens, self._admission.positions),
            waiting={name: control.waiting for name, control in there if control.waiting is not None},
            copies={name: control.copies for name, control in there},
        )

    def _info(self, member: int) -> NodeInfo:
        where = self._state.members[member]
        assert where.hello is not None and where.hello.offer is not None
        # A rest after each call is as good as a slower device.
        slower = self._pace.slower(where.label) / where.condition.share
        home = is_home(self.identity, where.hello.incarnation, where.host)
        return NodeInfo(where.label, where.host, where.port, where.hello.offer, slower, where.held, home)
