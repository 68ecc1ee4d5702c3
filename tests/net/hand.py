"""A coordinator moved by hand, for tests of transitions: it sends orders and rows to nodes in memory, and
expects the tokens of one process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar

from shoal.engine.batch import Sampling, Want
from shoal.net import tags
from shoal.net.connection import Connection
from shoal.net.dial import dial
from shoal.net.messages import (
    Abort,
    Assign,
    Broken,
    Close,
    Commit,
    Epoch,
    Gift,
    Kept,
    Loaded,
    Open,
    Prepared,
    Result,
    SetSampling,
    Step,
    Take,
)

ME = 99
Kind = TypeVar("Kind")
Place = tuple[int, int, int]
"""A stage: the port of its node, and its units [first, last)."""


@dataclass
class Hand:
    """A coordinator moved by hand: connections to the nodes, the stages in force, and what each session has
    computed."""

    lab: ModuleType
    net: Any
    controls: dict[int, Connection]
    down: AsyncExitStack
    """It closes the connection to the first node."""
    counter: int = 0
    newest: int = 0
    """The counter of the epoch that was assigned last; it may have been given up."""
    places: list[Place] = field(default_factory=list)
    steps: Connection | None = None
    known: dict[int, list[int]] = field(default_factory=dict)
    samplings: dict[int, Sampling] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    told: dict[int, int] = field(default_factory=dict)
    """How many things the last node was told of each session."""
    loaded: dict[int, Loaded] = field(default_factory=dict)
    faults: defaultdict[int, list[Broken]] = field(default_factory=lambda: defaultdict(list))

    @property
    def epoch(self) -> Epoch:
        return Epoch(5, self.counter)

    def stage(self, port: int) -> Any:
        """The newest stage of a node."""
        return self.net.nodes[port].stages[-1]

    def assigns(
        self, places: Sequence[Place], *, base: bool, history: Sequence[int] = ()
    ) -> dict[int, Assign]:
        """The orders for the next epoch, by port, to those that have or get units. Nodes in `history` are
        told tokens."""
        self.newest += 1
        epoch, old = Epoch(5, self.newest), {port: range(a, b) for port, a, b in self.places}
        new = {port: range(a, b) for port, a, b in places}
        following = {a: port for port, a, _ in places}
        orders = {}
        for port in new if not base else new | old:
            mine, before = new.get(port, range(0)), old.get(port, range(0))
            gives = [
                Gift(self.net.peer(other), both.start, both.stop, other in history)
                for other, theirs in new.items()
                if other != port and (both := common(before, theirs))
            ]
            takes = [
                Take(other, both.start, both.stop)
                for other, theirs in old.items()
                if other != port and (both := common(mine, theirs))
            ]
            last = mine.stop in (0, self.lab.UNITS)
            before_me = [other for other, units in new.items() if units.stop == mine.start and mine]
            orders[port] = Assign(
                epoch, mine.start, mine.stop,
                None if last else self.net.peer(following[mine.stop]),
                8, ME if mine.start == 0 else before_me[0],
                base=self.counter if base else None,
                gives=tuple(gives) if base else (), takes=tuple(takes) if base else (),
            )  # fmt: skip
        return orders

    async def load(self, *places: Place) -> None:
        """An epoch without a base."""
        for port, assign in self.assigns(places, base=False).items():
            await self.controls[port].send(assign)
        self.counter = self.newest
        await self.serve(places)

    async def serve(self, places: Sequence[Place]) -> None:
        """All have loaded: rows of the epoch go to the first of them."""
        for port, _, _ in places:
            self.loaded[port] = await self.hear(port, Loaded)
            assert self.loaded[port].epoch == self.epoch
        self.places = list(places)
        await self.down.aclose()
        self.steps = await self.down.enter_async_context(connected(self.lab, self.net, places[0][0], "step"))

    async def prepare(self, *places: Place, history: Sequence[int] = ()) -> set[int]:
        """Orders a transition, and waits until it is prepared; returns the ports that take part."""
        orders = self.assigns(places, base=True, history=history)
        for port, assign in orders.items():
            await self.controls[port].send(assign)
        for port in orders:
            assert (await self.hear(port, Prepared)).epoch == Epoch(5, self.newest)
        return set(orders)

    async def hear(self, port: int, kind: type[Kind]) -> Kind:
        """The next report of a node, but for Prepared of transitions that were given up. A Broken that comes
        before is kept for later."""
        if kind is Broken and self.faults[port]:
            return self.faults[port].pop(0)  # type: ignore[return-value]
        while True:
            report = await self.controls[port].receive()
            if isinstance(report, kind):
                return report
            if isinstance(report, Broken):
                self.faults[port].append(report)
                continue
            assert isinstance(report, Prepared) and report.epoch < Epoch(5, self.newest)

    async def abort(self, ports: Iterable[int]) -> None:
        """Gives the transition up."""
        for port in ports:
            await self.controls[port].send(Abort(Epoch(5, self.newest)))
        self.newest += 1

    async def commit(self, ports: set[int], *places: Place, lost: tuple[int, int] = (0, 0)) -> None:
        """Changes to what is prepared."""
        self.counter = self.newest
        kept = tuple(Kept(session, positions) for session, positions in self.positions.items())
        for port in ports:
            await self.controls[port].send(Commit(self.epoch, kept, *lost))
        for port in ports - {place[0] for place in places}:
            assert (await self.hear(port, Loaded)).room is None
        await self.serve(places)

    async def move(self, *places: Place, history: Sequence[int] = ()) -> None:
        await self.commit(await self.prepare(*places, history=history), *places)

    async def open(self, session: int, *prompt: int, seed: int = 0) -> None:
        """Opens a session and reads its prompt."""
        self.samplings[session] = Sampling(seed=seed)
        assert self.steps is not None
        await self.steps.send(Open(session, self.epoch, self.lab.CONTEXT))
        self.told[session] = 0
        self.known[session], self.positions[session] = list(prompt), 0
        await self.step(session)

    async def tell(self, session: int) -> Step:
        """The next Step of a session. The last node is told its parameters before, if they are not the
        default ones."""
        known, sampling = self.known[session], self.samplings[session]
        step = step_of(session, self.epoch, known, self.positions[session], len(known), Want.TOKEN)
        if sampling == Sampling():
            return step
        self.told[session] += 1
        last = self.controls[self.places[-1][0]]
        await last.send(SetSampling(session, self.epoch, self.told[session], sampling))
        return replace(step, told=self.told[session])

    async def step(self, session: int, count: int = 1) -> None:
        """Computes the next `count` tokens of a session."""
        assert self.steps is not None
        for _ in range(count):
            first, known = self.positions[session], self.known[session]
            await self.steps.send(await self.tell(session))
            result = await self.hear(self.places[-1][0], Result)
            assert (result.session, result.epoch, result.first) == (session, self.epoch, first)
            assert result.token is not None
            self.positions[session] = len(known)
            known.append(result.token)

    async def rewind(self, session: int, positions: int, *tokens: int) -> None:
        """Goes back to a position, and on with other tokens."""
        self.known[session][positions:] = tokens
        self.positions[session] = positions
        await self.step(session)

    async def close(self, session: int) -> None:
        assert self.steps is not None
        await self.steps.send(Close(session, self.epoch))
        for part in (self.known, self.samplings, self.positions, self.told):
            part.pop(session)

    def check(self, **prompts: int) -> None:
        """The tokens after each prompt of so many tokens are those of one process."""
        assert {int(session[1:]) for session in prompts} == self.known.keys()
        for name, length in prompts.items():
            known = self.known[int(name[1:])]
            expected = self.lab.oracle(known[:length], len(known) - length, self.samplings[int(name[1:])])
            assert known[length:] == expected

    def ran(self) -> int:
        """How many rows of all units the nodes have run so far."""
        return sum(
            rows for node in self.net.nodes.values() for stage in node.stages for batch in stage.batches
            for _, _, rows in batch
        )  # fmt: skip


def step_of(
    session: int, epoch: Epoch, known: Sequence[int], first: int, last: int, want: Want, **how: Any
) -> Step:
    """A Step with positions [first, last) of what is known."""
    own = list[int]()
    tags.extend(own, known, last)
    its = tuple(own[tags.spanned(first, last)])
    return Step(session, epoch, first, tuple(known[first:last]), want, tags=its, **how)


def common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


@asynccontextmanager
async def connected(
    lab: ModuleType, net: Any, port: int, purpose: str, number: int = ME
) -> AsyncIterator[Connection]:
    me, peer = lab.identity("laptop", number), net.peer(port)
    async with dial(net.open_stream, "host", port, me, purpose, seconds=5, peer=peer) as (connection, _):  # type: ignore[arg-type]
        yield connection


def with_nodes(lab: ModuleType, test: Callable[[Hand], Awaitable[None]], *names: str, **changes: Any) -> None:
    """Runs a test with nodes of these names, at ports from 7001 on."""

    async def main() -> None:
        async with lab.network() as net, AsyncExitStack() as stack, AsyncExitStack() as down:
            controls = {}
            for name in names or ("a", "b"):
                _, port = net.add(name, **changes)
                controls[port] = await stack.enter_async_context(connected(lab, net, port, "control"))
            await test(Hand(lab, net, controls, down))

    lab.run(main)


def places(edges: Sequence[int]) -> list[Place]:
    return [(7001 + i, a, b) for i, (a, b) in enumerate(pairwise(edges))]
