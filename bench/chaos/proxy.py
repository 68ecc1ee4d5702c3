"""Links that can fail: a listener in front of each node, through which all others reach it.

A link that is cut loses what is sent until it is mended. Each direction then carries its bytes only when
TCP's next retransmission would be due; the pauses between those double. A link that is black carries nothing
any more, and nobody is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio
from bench.lab.hello import frame_bytes, said

FIRST_RETRY, FIRST_SYN_RETRY = 0.2, 1.0


@dataclass(eq=False)
class Link:
    """One connection through a gate: what it is for, and between whom."""

    purpose: str
    source: str
    target: str
    black: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancelling it closes both ends."""


@dataclass
class Gate:
    """The listener in front of the node `name`. `links` are its open connections."""

    name: str
    target: tuple[str, int]
    address: tuple[str, int] = ("127.0.0.1", 0)
    links: set[Link] = field(default_factory=set)

    async def serve(
        self, network: Network, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Passes connections on until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = listener.socket.getsockname()[:2]

        async def connected(stream: trio.SocketStream) -> None:
            await self._pass_on(network, stream)

        task_status.started()
        await trio.serve_listeners(connected, [listener])

    async def _pass_on(self, network: Network, near: trio.SocketStream) -> None:
        try:
            hello = await _hello(near)
            link = Link(*said(hello), target=self.name)
            await network.passable(link, trio.current_time(), FIRST_SYN_RETRY)
            far = await trio.open_tcp_stream(*self.target)
        except (OSError, trio.BrokenResourceError):
            await trio.aclose_forcefully(near)
            return
        self.links.add(link)
        try:
            with link.scope:
                async with near, far, trio.open_nursery() as tasks:
                    await far.send_all(hello)
                    tasks.start_soon(_pump, network, link, near, far)
                    await _pump(network, link, far, near)
                    tasks.cancel_scope.cancel()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.links.discard(link)


@dataclass
class Network:
    """All gates, and which links fail now."""

    gates: list[Gate] = field(default_factory=list)
    cut: dict[str, float] = field(default_factory=dict)
    """Nodes that are cut off, and until when."""

    def links(self, name: str, purpose: str | None = None) -> Iterator[Link]:
        """The open connections to and from a node; with a purpose, only those to it for that."""
        for gate in self.gates:
            for link in gate.links:
                if purpose is None and name in (link.source, link.target):
                    yield link
                if purpose == link.purpose and name == link.target:
                    yield link

    async def passable(self, link: Link, sent: float, retry: float = FIRST_RETRY) -> None:
        """Waits until what was sent on a link at the time `sent` arrives."""
        while True:
            if link.black:
                await trio.sleep_forever()
            mended = max(self.cut.get(link.source, 0.0), self.cut.get(link.target, 0.0))
            if mended <= trio.current_time():
                return
            tries = math.ceil(math.log2((mended - sent) / retry + 1))
            await trio.sleep_until(sent + retry * (2**tries - 1))


async def _pump(network: Network, link: Link, source: trio.SocketStream, sink: trio.SocketStream) -> None:
    while True:
        data = await source.receive_some(65536)
        await network.passable(link, trio.current_time())
        if not data:
            await sink.send_eof()
            return
        await sink.send_all(data)


async def _hello(stream: trio.SocketStream) -> bytes:
    """The bytes of the first frame; OSError: the connection ended before."""
    data = b""
    while len(data) < frame_bytes(data):
        more = await stream.receive_some(65536)
        if not more:
            raise OSError("the connection ended in its first frame")
        data += more
    return data
