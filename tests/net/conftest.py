"""A network in memory and a model whose tokens are arithmetic (fake_stage.py), for tests of everything above
the wire. The fake stage computes inline, so a mock clock may jump while it does."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from tests.net.fake_stage import COLS, CONTEXT, PAGE, PRIME, STATELESS, UNITS, VOCAB, FakeStage

from shoal.engine.batch import Run, Sampling, Want
from shoal.net.assignment import NodeParts
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import Identity, ModelShape
from shoal.net.messages import Offer, Peer
from shoal.net.node import Node
from shoal.net.placement import Planner
from shoal.planner import Device

__all__ = ["PAGE", "PRIME"]  # of tests, as attributes of `lab`
SHAPE = ModelShape(UNITS, VOCAB, CONTEXT, COLS)
OFFER = Offer(
    Device("fake", ram_bytes=10**9, read_bytes_per_s=1e9, macs_per_s=1e9, base_bytes=10**7),
    max_rows=8, threads=1, backend="fake", exact=True,
)  # fmt: skip


def identity(name: str, incarnation: int, model: str = "aa" * 32) -> Identity:
    return Identity(name, incarnation, "0.1.0", 1, model)


def oracle(
    prompt: Sequence[int], count: int, sampling: Sampling | None = None, end: Collection[int] = (),
    context: int = CONTEXT,
) -> list[int]:  # fmt: skip
    """The answer that one process gives, one row at a time."""
    stage, known = FakeStage(0, UNITS), list(prompt)
    stage.open_sequence(0, sampling or Sampling(), context)
    for position, token in enumerate(known):
        want = Want.TOKEN if position >= len(prompt) - 1 else Want.NOTHING
        (result,) = stage.run([Run(0, position, [token], want)])
        if want is Want.TOKEN:
            assert result.token is not None
            if result.token in end or len(known) - len(prompt) == count:
                break
            known.append(result.token)
            if len(known) > context:
                break
    return known[len(prompt) :][:count]


@dataclass
class FakeNode:
    """A node in memory, and what its stages were asked."""

    node: Node
    parts: NodeParts
    stages: list[FakeStage]
    log: list[str]
    streams: list[trio.StapledStream[Any, Any]] = field(default_factory=list)
    own: list[trio.StapledStream[Any, Any]] = field(default_factory=list)
    up: bool = True


class Hangs:
    """A hop like a thread's, whose calls do not return once `hung` is set, and cannot be cut short."""

    def __init__(self) -> None:
        self.hung, self.freed = False, trio.Event()

    async def __call__(self, call: Callable[[], Any], /) -> Any:
        if self.hung:
            with trio.move_on_after(300, shield=True):  # at last, so that a test that fails ends
                await self.freed.wait()
        await trio.lowlevel.checkpoint()
        return call()


def slow_hop(seconds: float) -> Callable[[Callable[[], Any]], Awaitable[Any]]:
    """A hop that takes that long, and like one into a thread cannot be cut short."""

    async def hop(call: Callable[[], Any], /) -> Any:
        with trio.CancelScope(shield=True):
            await trio.sleep(seconds)
        return call()

    return hop


async def inline(call: Callable[[], Any], /) -> Any:
    """Instead of a hop into a thread."""
    await trio.lowlevel.checkpoint()
    return call()


@dataclass
class FakeNetwork:
    """Nodes by port; a stream from anyone to any of them is a pair of memory streams."""

    nursery: trio.Nursery
    nodes: dict[int, FakeNode] = field(default_factory=dict)
    unreachable: set[int] = field(default_factory=set)

    def add(
        self,
        name: str,
        *,
        room: int = 10**9,
        pages: int | None = None,
        model: str = "aa" * 32,
        **changes: Any,
    ) -> tuple[str, int]:
        """A new node; its address."""
        port = 7001 + len(self.nodes)
        stages: list[FakeStage] = []
        log: list[str] = []

        def open_stage(first: int, last: int) -> FakeStage:
            stages.append(FakeStage(first, last, room, pages))
            return stages[-1]

        parts = NodeParts(
            identity=identity(name, port, model), offer=OFFER, units=UNITS, open_stage=open_stage,
            resident=lambda: 1, log=log.append, hop=inline, own_thread=False, stateless=STATELESS,
            open_stream=partial(self.open_stream, source=port),
        )  # fmt: skip
        parts = replace(parts, **changes)
        self.nodes[port] = FakeNode(Node(parts), parts, stages, log)
        return "host", port

    def peer(self, port: int) -> Peer:
        """A node as its coordinator, if it has one, tells others of it: with the ticket."""
        node = self.nodes[port]
        served = node.node._limits._served
        return Peer(node.parts.identity.name, "host", port, port, 0 if served is None else served.ticket)

    async def open_stream(self, host: str, port: int, source: int | None = None) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        node = self.nodes.get(port)
        if node is None or not node.up or port in self.unreachable:
            raise OSError(111, "Connection refused")
        here, there = trio.testing.memory_stream_pair()
        node.streams += [here, there]
        node.own.append(there)
        if source is not None:
            self.nodes[source].own.append(here)
        self.nursery.start_soon(node.node.connected, there)
        return here

    def mute(self, port: int) -> None:
        """The node goes on, but nothing that it writes arrives any more: a suspended process, to others."""
        for stream in self.nodes[port].own:

            async def lost(data: object) -> None:
                await trio.lowlevel.checkpoint()

            stream.send_all = lost  # type: ignore[method-assign]
        self.unreachable.add(port)

    async def kill(self, port: int) -> None:
        """The node is gone, with all its connections."""
        self.nodes[port].up = False
        for stream in self.nodes[port].streams:
            await trio.aclose_forcefully(stream)

    def restart(self, port: int) -> None:
        """Another process listens where a node was killed."""
        old = self.nodes[port]
        me = replace(old.parts.identity, incarnation=old.parts.identity.incarnation + 1000)
        parts = replace(old.parts, identity=me)
        self.nodes[port] = FakeNode(Node(parts), parts, old.stages, old.log)

    @asynccontextmanager
    async def coordinator(
        self, *ports: int, plan: Planner, measure_links: bool = False, number: int = 99, **options: Any
    ) -> AsyncIterator[Coordinator]:
        settings = CoordinatorOptions(
            hop=inline, open_stream=self.open_stream, measure_links=measure_links, **options
        )
        addresses = [("host", port) for port in ports or self.nodes]
        async with Coordinator.open(
            addresses, identity("laptop", number), SHAPE, plan, settings
        ) as coordinator:
            yield coordinator


@asynccontextmanager
async def network() -> AsyncIterator[FakeNetwork]:
    async with trio.open_nursery() as nursery:
        yield FakeNetwork(nursery)
        nursery.cancel_scope.cancel()


async def collect(coordinator: Coordinator, prompt: Sequence[int], count: int, **how: Any) -> list[int]:
    async with coordinator.generate(prompt, max_tokens=count, **how) as tokens:
        return [token async for token in tokens]


async def with_gap(tokens: AsyncIterator[int], least: float, most: float) -> list[int]:
    """The rest of an answer, whose longest pause between two tokens is of that many seconds."""
    got, longest, before = list[int](), 0.0, trio.current_time()
    async for token in tokens:
        longest, before = max(longest, trio.current_time() - before), trio.current_time()
        got.append(token)
    assert least <= longest <= most
    return got


def run(main: Callable[[], Any]) -> Any:
    """Runs an async function under a clock that jumps; one that hangs is over after a virtual hour."""

    async def limited() -> Any:
        with trio.fail_after(3600):
            return await main()

    return trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.fixture
def lab() -> ModuleType:
    """This module: a conftest cannot be imported by name."""
    return sys.modules[__name__]
