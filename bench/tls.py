"""What TLS adds to a hop between two processes: the time of a thread from `post` on one connection to
`arrived` on the other, over loopback, with and without, in turns:

    python -m bench.tls [--rows 1,64] [--cols 576] [--hops 2000]

Both ends are in one thread, so no other thread has to wake. A lap over two nodes and a coordinator has three
hops."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trio
from bench.lap import percentile

from shoal import house
from shoal.engine.batch import Want
from shoal.net.connection import Connection, open_connection
from shoal.net.messages import Epoch, Hello, Step
from shoal.net.tags import counted
from shoal.text_table import table

_TURNS = 20


async def _pair(secure: bool, purpose: str) -> tuple[trio.abc.Stream, trio.abc.Stream]:
    """Two ends of a connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    here = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
    there = await listener.accept()
    await listener.aclose()
    if not secure:
        return here, there
    trust = house.trust()
    assert trust is not None
    ends: list[trio.abc.Stream] = [here, there]

    async def dialled() -> None:
        ends[0] = await trust.dialled(here, purpose)

    async def accepted() -> None:
        ends[1] = await trust.accepted(there, purpose)

    async with trio.open_nursery() as tasks:
        tasks.start_soon(dialled)
        tasks.start_soon(accepted)
    return ends[0], ends[1]


async def _greet(one: Connection, other: Connection) -> None:
    hello = Hello("step", "bench", 1, "0", 1, "0", None)
    for sender, receiver in ((one, other), (other, one)):
        await sender.send(hello)
        await receiver.expect(Hello)


def _hops(one: Connection, other: Connection, step: Step, count: int) -> list[float]:
    """The seconds of each hop."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        if not one.post(step):
            raise RuntimeError("the queue is full")
        while not other.arrived():
            one._flush()  # what the socket did not take at once, as the task that writes does
        times.append(time.perf_counter() - start)
    return times


async def _measure(rows: int, cols: int, hops: int) -> list[list[float]]:
    hidden = np.random.default_rng(1).standard_normal((rows, cols)).astype(np.float32)
    step = Step(1, Epoch(1, 1), 0, (), Want.TOKEN, hidden, tags=(1,) * counted(0, rows))
    found: list[list[float]] = [[], []]
    async with trio.open_nursery() as tasks:
        ends = []
        for secure in (False, True):
            here, there = await _pair(secure, "bench")
            one = await _enter(tasks, here, True)
            other = await _enter(tasks, there, False)
            await _greet(one, other)
            ends.append((one, other))
        for turn in range(_TURNS):
            for which in (turn % 2, 1 - turn % 2):
                found[which] += _hops(*ends[which], step, hops // _TURNS)
        tasks.cancel_scope.cancel()
    return found


async def _enter(tasks: trio.Nursery, stream: trio.abc.Stream, dialled: bool) -> Connection:
    async def keep(task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED) -> None:
        async with open_connection(stream, "bench", dialled=dialled) as connection:
            task_status.started(connection)
            await trio.sleep_forever()

    made: Connection = await tasks.start(keep)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tls", description=__doc__)
    parser.add_argument("--rows", default="1,64", metavar="N,...", help="rows of a message (default 1,64)")
    parser.add_argument("--cols", type=int, default=576, metavar="N", help="(default 576)")
    parser.add_argument("--hops", type=int, default=2000, metavar="N", help="(default 2000)")
    args = parser.parse_args(arguments)
    lines = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as place:
        os.environ["XDG_CONFIG_HOME"] = str(Path(place))
        house.open_or_create("bench")
        for rows in map(int, args.rows.split(",")):
            plain, secure = trio.run(_measure, rows, args.cols, args.hops)
            for share in (0.5, 0.95):
                values = [percentile(times, share) * 1e3 for times in (plain, secure)]
                cells = [f"{value:.3f}" for value in (*values, values[1] - values[0])]
                lines.append([f"{rows}", f"p{share * 100:.0f}", *cells])
    print(table(("rows", "", "plain, ms", "TLS, ms", "more, ms"), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
