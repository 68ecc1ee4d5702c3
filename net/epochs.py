"""The chain of a coordinator from epoch to epoch: the connection to its first node, and the sessions that go
from one chain to the next.

Between the last Loaded of a transition and the first Step of the new epoch nothing is waited for: the
connection has been made before, and sessions are carried in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import trio

from ..engine.errors import ShoalError
from . import events
from .admission import Admission, ChainRoom
from .chain import Chain
from .connection import Connection, open_tasks
from .control import Control
from .dial import OpenStream, enter_dial
from .events import Event
from .generation import Fill, Flow, Part, loss_of
from .identity import Identity
from .liveness import Timing
from .members import ClusterState, peer_of
from .messages import Epoch, Kept, Message
from .probe import probe
from .watch import ConnectionStalledError, Watch


@dataclass(eq=False, slots=True)
class _FirstLink:
    """The connection to the first node of an epoch, on which its rows are sent, and its chain, once it is
    served. `serve` is the command that waits for the connection."""

    epoch: Epoch
    serve: events.Serve | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    connection: Connection | None = None
    served: trio.Event = field(default_factory=trio.Event)
    chain: Chain | None = None

    @property
    def busy(self) -> bool:
        """Whether sessions are in use."""
        return self.chain is not None and self.chain.busy


class Epochs:
    """The current chain, and the connection for the next one. `happens` is told of events, `post` sends a
    message to a member, and `state` returns the state of the cluster."""

    def __init__(
        self,
        identity: Identity,
        open_stream: OpenStream,
        timing: Timing,
        admission: Admission,
        controls: Sequence[Control],
        *,
        state: Callable[[], ClusterState],
        happens: Callable[[Event], None],
        post: Callable[[int, Message], None],
    ) -> None:
        self._dial = open_stream, identity
        self._timing, self._admission, self._controls = timing, admission, controls
        self._state, self._happens, self._post = state, happens, post
        self.chain: Chain | None = None
        """The chain in force. One that has ended stays until the next, to which its sessions may be
        carried."""
        self._next: _FirstLink | None = None
        """The connection for the epoch that is being prepared, or that waits to be served."""
        self.tasks: trio.Nursery
        self._changed = trio.Event()
        self.standstill = 0.0
        """The seconds without Steps before the current chain."""
        self.recoveries = 0
        """How many chains were begun after one had ended. Moves of layers do not count."""
        self._tokens = 0
        """Tokens of answers in earlier epochs."""

    @property
    def tokens(self) -> int:
        """The tokens of all answers so far."""
        return self._tokens + (0 if self.chain is None else self.chain.tokens)

    @property
    def due(self) -> bool:
        """Whether results are due."""
        return self.chain is not None and self.chain.due

    @property
    def busy(self) -> bool:
        """Whether sessions are in use, or wait for a chain."""
        return self.chain is None or self.chain.ended or self.chain.busy

    async def wait(self) -> Chain:
        """The current chain; waits while there is none, or while it is held."""
        while self.chain is None or not self.chain.open:
            await self._changed.wait()
        return self.chain

    def reach(self, epoch: Epoch, member: int) -> None:
        """Connects to the first node of an epoch that is being prepared, then reports Reached."""
        self._connect(_FirstLink(epoch), member)

    def _connect(self, first: _FirstLink, member: int) -> None:
        self.unreach(None)
        self._next = first
        self.tasks.start_soon(self._keep_connected, first, member)

    def unreach(self, epoch: Epoch | None) -> None:
        """Ends the connection for the epoch that is prepared, if it is this one; None: any."""
        if self._next is not None and epoch in (None, self._next.epoch):
            self._next.scope.cancel()
            self._next = None

    async def _keep_connected(self, first: _FirstLink, member: int) -> None:
        """Connects to the first node of an epoch, and keeps the connection until one of them ends."""
        peer, seconds = peer_of(self._state().members[member]), self._timing.handshake
        try:
            with first.scope:
                async with AsyncExitStack() as stack:
                    first.connection = await enter_dial(stack, *self._dial, peer, "step", seconds)
                    anew = partial(probe, *self._dial, peer, seconds)
                    watch = Watch(first.connection, self._timing, busy=lambda: first.busy, probe=anew)
                    first.scope = trio.CancelScope()  # from now on, its end leaves time to write what waits
                    with first.scope:
                        async with open_tasks() as tasks:
                            tasks.start_soon(self._write, first)
                            self._reached(first)
                            await watch.run()
        except ConnectionStalledError as error:
            self._happens(events.StageBroken(member, first.epoch, error, None, again=True))
        except ShoalError as error:
            self._happens(events.StageBroken(member, first.epoch, error, peer.incarnation))

    async def _write(self, first: _FirstLink) -> None:
        await first.served.wait()
        assert first.chain is not None
        await first.chain.write()

    def _reached(self, first: _FirstLink) -> None:
        if self._next is not first:
            first.scope.cancel()
        elif first.serve is None:
            self._happens(events.Reached(first.epoch))
        else:
            self._begin(first, first.serve)

    def hold(self, epoch: Epoch, base: Epoch) -> None:
        """Lets the base become quiet, and reports when it is, for the transition to `epoch`."""

        def quiet(sessions: tuple[Kept, ...]) -> None:
            self._happens(events.Quiet(epoch, sessions))

        if self.chain is not None and self.chain.flow.epoch == base:
            self.chain.hold(quiet)
        else:
            quiet(())

    def resume(self, epoch: Epoch) -> None:
        """Sends Steps of this epoch again."""
        if self.chain is not None and self.chain.flow.epoch == epoch:
            self.chain.resume()
            self._wake()

    def pause(self, epoch: Epoch) -> None:
        """Ends an epoch. Its sessions wait for the next one."""
        self.unreach(epoch)
        if self.chain is not None:
            self.chain.end()

    def serve(self, serve: events.Serve) -> None:
        """Begins the chain of a loaded epoch, on the connection to its first node; makes one if there is
        none."""
        first = self._next
        if first is None or first.epoch != serve.epoch:
            self._connect(_FirstLink(serve.epoch, serve), self._state().holders()[0])
        elif first.connection is None:
            first.serve = serve
        else:
            self._begin(first, serve)

    def _begin(self, first: _FirstLink, serve: events.Serve) -> None:
        """Lets sessions go on in the chain of an epoch."""
        state, old = self._state(), self.chain
        if state.epoch != serve.epoch or state.phase != "serving":
            self.unreach(serve.epoch)
            return
        assert first.connection is not None
        placement = state.placement
        window = placement.window or len(placement.stages) + 2
        flow = Flow(serve.epoch, placement.chunk_rows, window, placement.chunks)
        parts = [(s.first, s.last) for s in placement.stages]
        stages = [Part(i, *units) for i, units in zip(state.holders(), parts, strict=True)]
        chain = Chain(flow, first.connection, stages, first.scope)
        chain.tell = partial(self._post, chain.last)
        first.chain, self.chain, self._next = chain, chain, None
        if old is not None and old.flow.epoch.counter == serve.base:
            chain.send(self._carried(old, chain, serve.lost))
            self._admission.change(self._room(chain))
            chain.send(chain.due_steps())
        else:
            if old is not None:
                old.drop()
            self._admission.open(self._room(chain))
        if old is not None:
            self.recoveries += old.ended
            old.end()
            assert old.stopped is not None
            self._tokens, self.standstill = self._tokens + old.tokens, trio.current_time() - old.stopped
        first.served.set()
        self._wake()

    def _carried(self, old: Chain, new: Chain, lost: tuple[int, int]) -> list[Message]:
        """Carries the sessions of a chain to the next one; returns the messages to send there first."""
        loss = loss_of(lost, old.stages, new.stages)
        if loss.filler is None:
            return old.carry(new, lambda session: None)
        rows, keeper = dict[int, int](), loss.keeper
        if keeper is not None:
            loaded = self._controls[keeper].loaded
            assert loaded is not None and loaded.epoch == new.flow.epoch, "Serve follows the last Loaded"
            rows = {kept.session: kept.positions for kept in loaded.rows}
            new.refill = partial(self._post, keeper)
        new.filler, until, enter = loss.filler, loss.until, loss.enter
        return old.carry(new, lambda session: Fill(until, enter, rows.get(session, 0)))

    def _room(self, chain: Chain) -> ChainRoom:
        """The room of a chain that has just been loaded: that of the node with the least."""
        rooms = []
        for member in (stage.member for stage in chain.stages):
            loaded, label = self._controls[member].loaded, self._state().members[member].label
            if loaded is not None and loaded.room is not None:
                rooms.append(ChainRoom(label, loaded.room.pages, loaded.room.positions))
        return min(rooms, key=lambda room: (room.pages or 0) * room.page, default=ChainRoom())

    def _wake(self) -> None:
        """Lets those who wait for a chain look again."""
        self._changed.set()
        self._changed = trio.Event()
