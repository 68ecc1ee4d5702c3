"""What a hop costs that goes through the head, because two devices cannot reach each other: the time of a
message from one to the other, and the bytes a second, over loopback, beside those of a direct connection:

    python -m bench.relay [--bytes 2304] [--hops 2000] [--mb 64]

The head is a process of its own, and both devices are in this one. All connections have TLS. A real network
adds the way to the head and from there; a loaded machine adds the time until the head has a core."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import trio
from bench.lap import percentile

from shoal import house
from shoal.net.relay import pass_bytes
from shoal.net.tls import TlsStream, Trust
from shoal.processes import end, end_with_parent
from shoal.text_table import table

_TURNS, _PIECE = 20, 256 * 1024
Ends = tuple[TlsStream, TlsStream]


def _trust() -> Trust:
    trust = house.trust()
    assert trust is not None
    return trust


async def _head() -> None:
    """The head: passes bytes between the first two devices that connect."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    trust = _trust()
    await pass_bytes(*[await trust.accepted(await listener.accept(), "a device") for _ in range(2)])


async def _through(port: int) -> Ends:
    """Two devices that are connected to the head."""
    first, second = [
        await _trust().dialled(await trio.open_tcp_stream("127.0.0.1", port), "the head") for _ in range(2)
    ]
    return first, second


async def _direct() -> Ends:
    """Two devices that are connected to each other."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    raw = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
    accepted, found = await listener.accept(), list[TlsStream]()

    async def accept() -> None:
        found.append(await _trust().accepted(accepted, "a device"))

    async with listener, trio.open_nursery() as tasks:
        tasks.start_soon(accept)
        dialled = await _trust().dialled(raw, "a device")
    return dialled, found[0]


async def _receive(stream: TlsStream, count: int) -> None:
    while count > 0:
        data = await stream.receive_some(_PIECE)
        if not data:
            raise RuntimeError("the connection has ended")
        count -= len(data)


async def _hops(ends: Ends, message: bytes, count: int) -> list[float]:
    """The seconds of each message, there and back in turns."""
    times = []
    for i in range(count):
        source, target = ends if i % 2 else ends[::-1]
        start = time.perf_counter()
        await source.send_all(message)
        await _receive(target, len(message))
        times.append(time.perf_counter() - start)
    return times


async def _rate(ends: Ends, count: int) -> float:
    """The bytes a second of one direction."""
    start = time.perf_counter()
    async with trio.open_nursery() as tasks:
        tasks.start_soon(_receive, ends[1], count)
        for _ in range(count // _PIECE):
            await ends[0].send_all(bytes(_PIECE))
    return count / (time.perf_counter() - start)


async def _measure(port: int, size: int, hops: int, mb: int) -> list[list[str]]:
    both = await _direct(), await _through(port)
    times: list[list[float]] = [[], []]
    rates: list[list[float]] = [[], []]
    for turn in range(_TURNS):
        for which in (turn % 2, 1 - turn % 2):
            times[which] += await _hops(both[which], bytes(size), hops // _TURNS)
            rates[which].append(await _rate(both[which], mb * 1_000_000 // _TURNS // _PIECE * _PIECE))
    for stream in (*both[0], *both[1]):
        await trio.aclose_forcefully(stream)
    lines = []
    for share in (0.5, 0.95):
        values = [f"{percentile(found, share) * 1e3:.3f}" for found in times]
        lines.append([f"{size} bytes, ms, p{share * 100:.0f}", *values])
    lines.append(["MB/s, p50", *(f"{percentile(found, 0.5) / 1e6:.0f}" for found in rates)])
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.relay", description=__doc__)
    parser.add_argument("--bytes", type=int, default=2304, help="of a message (default 2304: 576 floats)")
    parser.add_argument("--hops", type=int, default=2000, metavar="N", help="(default 2000)")
    parser.add_argument("--mb", type=int, default=64, metavar="N", help="for the rate (default 64)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as place:
        os.environ["XDG_CONFIG_HOME"] = place
        house.open_or_create("bench")
        program = "import trio; from bench.relay import _head; trio.run(_head)"
        head = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, preexec_fn=end_with_parent
        )
        try:
            assert head.stdout is not None
            port = int(head.stdout.readline())
            lines = trio.run(_measure, port, args.bytes, args.hops, args.mb)
        finally:
            end([head])
    print(table(("", "direct", "through the head"), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
