"""Real sockets and worker threads on loopback, the fake model: what memory streams cannot show."""

import itertools
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from tests.patience import LIMIT

from shoal.net import tags
from shoal.net.connection import in_thread
from shoal.net.connection_limits import WAITING
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.dial import open_tcp
from shoal.net.errors import NodeLostError
from shoal.net.listen import _SILENT
from shoal.net.node import Node
from shoal.net.placement import plan_at
from shoal.planner import Assignment


@asynccontextmanager
async def nodes(
    lab: ModuleType, count: int, own_thread: bool = True
) -> AsyncIterator[tuple[list[tuple[str, int]], Any]]:
    """Nodes that listen on ports of their own; their addresses, and the fake network that made them."""
    async with trio.open_nursery() as tasks:
        net, addresses = lab.FakeNetwork(tasks), []
        for i in range(count):
            net.add(f"n{i}")
            node = net.nodes[7001 + i]
            parts = replace(node.parts, hop=in_thread, open_stream=open_tcp, own_thread=own_thread, spin=True)
            node.node = Node(parts)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await tasks.start(_serve, node, listeners)
            addresses.append(listeners[0].socket.getsockname()[:2])
        yield addresses, net
        tasks.cancel_scope.cancel()


async def _serve(
    node: Any, listeners: Any, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.CancelScope() as node.scope:
        await node.node.serve(listeners, task_status=task_status)


def limited(main: Any) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(run)


def test_a_chain_over_sockets_and_threads_gives_the_same_tokens(lab: ModuleType) -> None:
    async def main() -> None:
        async with nodes(lab, 3) as (addresses, _):
            plan = plan_at((0, 2, 4, 6), 4)
            async with Coordinator.open(addresses, lab.identity("laptop", 9), lab.SHAPE, plan) as coordinator:

                async def one(seed: int) -> None:
                    prompt = [seed] * (5 * seed + 1)
                    assert await lab.collect(coordinator, prompt, 10) == lab.oracle(prompt, 10)

                async with trio.open_nursery() as tasks:
                    for seed in range(4):
                        tasks.start_soon(one, seed)
                links = coordinator.links.values()
                assert all(link.latency_s < 1 and link.bytes_per_s > 1e5 for link in links)

    limited(main)


@pytest.mark.slow
def test_layers_move_over_sockets_while_threads_compute(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "CHUNK", 4)

    async def main() -> None:
        async with nodes(lab, 3) as (addresses, net):
            plan, me = plan_at((0, 2, 4, 6), 4), lab.identity("laptop", 9)
            options = CoordinatorOptions(moves="move", measure_links=False)
            async with Coordinator.open(addresses, me, lab.SHAPE, plan, options) as coordinator:
                edges = [(0, 1, 4, 6), (0, 2, 2, 6), (0, 0, 4, 6), (0, 3, 6, 6)] * 2

                async def one(seed: int) -> None:
                    while len(coordinator.moves) < len(edges):
                        for length in (2, 20):
                            prompt = [seed] * length
                            assert await lab.collect(coordinator, prompt, 40) == lab.oracle(prompt, 40)

                async with trio.open_nursery() as tasks:
                    for seed in range(4):
                        tasks.start_soon(one, seed)
                    for count, cut in enumerate(edges):
                        ranges = enumerate(itertools.pairwise(cut))
                        coordinator.move([Assignment(f"n{i}", a, b) for i, (a, b) in ranges if a < b], "")
                        while len(coordinator.moves) <= count:  # noqa: ASYNC110
                            await trio.sleep(0.001)
                assert {move.moved.failure for move in coordinator.moves} <= {""}
                for node in net.nodes.values():
                    assert sum(not stage.closed for stage in node.stages) <= 1

    limited(main)


@pytest.mark.parametrize("flood", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 3_000_000], ids=["short", "3 MB"])
def test_a_stranger_hears_why_before_the_socket_closes(lab: ModuleType, flood: bytes) -> None:
    """Bytes that nobody has read would make the system take the answer back, with a reset."""

    async def main() -> None:
        async with nodes(lab, 1) as (addresses, _):
            stream = await trio.open_tcp_stream(*addresses[0])
            answer = b""
            async with trio.open_nursery() as tasks:
                tasks.start_soon(stream.send_all, flood)
                while data := await stream.receive_some(4096):
                    answer += data
            assert b"does not speak shoal's protocol" in answer
            await stream.aclose()
            async with Coordinator.open(
                addresses, lab.identity("laptop", 9), lab.SHAPE, plan_at((0, 6))
            ) as coordinator:
                assert await lab.collect(coordinator, [1], 3) == lab.oracle([1], 3)

    limited(main)


def test_a_port_where_nobody_listens_is_said_in_the_systems_words(lab: ModuleType) -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            address = taken.getsockname()
            words = f"127.0.0.1:{address[1]} cannot be reached (Connection refused): check that `shoal node`"
            with pytest.raises(NodeLostError, match=re.escape(words)):
                async with Coordinator.open([address], lab.identity("laptop", 9), lab.SHAPE, plan_at((0, 6))):
                    pass

    limited(main)


def test_a_flood_uses_no_more_descriptors_than_there_are_places(lab: ModuleType) -> None:
    """They have connected already when the node begins to accept, so it never waits for the next one."""

    class Count(trio.abc.Instrument):
        most = 0

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            self.most = max(self.most, len(os.listdir("/proc/self/fd")))

    async def main() -> None:
        async with nodes(lab, 1) as (_, net), trio.open_nursery() as tasks:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            with ExitStack() as idle:
                for _ in range(300):
                    idle.enter_context(socket.create_connection(listener.socket.getsockname()[:2]))
                before, count = len(os.listdir("/proc/self/fd")), Count()
                trio.lowlevel.add_instrument(count)
                node = net.nodes[7001].node
                await tasks.start(node.serve, [listener])
                await trio.testing.wait_all_tasks_blocked(0.05)
                trio.lowlevel.remove_instrument(count)
                assert WAITING <= count.most - before <= WAITING + _SILENT
            tasks.cancel_scope.cancel()

    limited(main)


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
def test_a_host_that_is_no_name_is_a_node_that_cannot_be_reached(lab: ModuleType, host: str) -> None:
    async def main() -> None:
        with pytest.raises(NodeLostError, match=r"cannot be reached \(the host name is not valid\)"):
            async with Coordinator.open([(host, 1)], lab.identity("laptop", 9), lab.SHAPE, plan_at((0, 6))):
                pass

    limited(main)


@pytest.mark.slow
def test_strangers_keep_no_coordinator_out_and_disturb_no_rebuild(lab: ModuleType) -> None:
    """On each node 200 idle connections, 64 probes and 16 `step` connections that come back when refused."""

    async def main() -> None:
        async with nodes(lab, 3) as (addresses, net), trio.open_nursery() as tasks:
            model = lab.identity("", 0)
            command = [sys.executable, "-m", "bench.chaos.strangers", model.model, str(model.numerics)]
            command += [f"{host}:{port}" for host, port in addresses]
            strangers = await tasks.start(
                partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            said = b""
            while not said.endswith(b"\n"):
                said += await strangers.stdout.receive_some() or b"(ended)\n"
            assert said == b"ready\n"
            me, options = lab.identity("laptop", 9), CoordinatorOptions(measure_links=False)
            async with (
                Coordinator.open(addresses, me, lab.SHAPE, plan_at((0, 3, 6)), options) as coordinator,
                coordinator.generate([1, 2], max_tokens=12) as tokens,
            ):
                got = [await anext(tokens) for _ in range(4)]
                net.nodes[7002].scope.cancel()
                got += [token async for token in tokens]
                assert (got, coordinator.recoveries) == (lab.oracle([1, 2], 12), 1)
                assert [node.label for node in coordinator.nodes] == ["n0", "n2"]
            await strangers.stdin.aclose()

    limited(main)
