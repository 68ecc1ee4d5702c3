"""The encrypted socket of a TLS stream, with full buffers, two threads at once, and ends of all kinds."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from tests.houses import Houses
from tests.patience import LIMIT

from shoal.net import tls
from shoal.net.tls import _MOST_READS, TlsStream


@asynccontextmanager
async def ends(place: Path) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """Two ends of a TLS connection whose sockets hold little."""
    trust = Houses(place).trust("head", ["head"])
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    here = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
    there = await listener.accept()
    for stream in (here, there):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    found: dict[str, TlsStream] = {}

    async def accepted() -> None:
        found["there"] = await trust.accepted(there, "a")

    async with trio.open_nursery() as tasks:
        tasks.start_soon(accepted)
        found["here"] = await trust.dialled(here, "b")
    async with listener, found["here"], found["there"]:
        yield found["here"], found["there"]


def limited(main: object) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT):
            await main()  # type: ignore[operator]

    trio.run(run)


def test_all_bytes_arrive_in_order_both_ways_at_once(tmp_path: Path) -> None:
    """Each side has a thread that sends while another receives, as a stage and the event loop do."""
    sent = {name: os.urandom(200_000) for name in ("here", "there")}
    got = {name: bytearray() for name in sent}

    def send(stream: TlsStream, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[stream.channel.send(left) :]
            except BlockingIOError:
                select.select([], [stream.channel], [], 10)

    def receive(stream: TlsStream, into: bytearray, size: int) -> None:
        while len(into) < size:
            try:
                data = stream.channel.recv(4096)
            except BlockingIOError:
                select.select([stream.channel], [], [], 10)
                continue
            assert data, "the other side has not ended"
            into += data

    async def main() -> None:
        async with ends(tmp_path) as (here, there):
            jobs = [
                threading.Thread(target=send, args=(here, sent["here"])),
                threading.Thread(target=send, args=(there, sent["there"])),
                threading.Thread(target=receive, args=(there, got["there"], len(sent["here"]))),
                threading.Thread(target=receive, args=(here, got["here"], len(sent["there"]))),
            ]
            for job in jobs:
                job.start()
            for job in jobs:
                await trio.to_thread.run_sync(job.join)
        assert got["there"] == sent["here"] and got["here"] == sent["there"]

    limited(main)


def test_what_was_read_from_the_socket_is_returned_at_once(tmp_path: Path) -> None:
    """A thread waits for the socket: bytes that were decrypted and not returned would wait for ever."""

    async def main() -> None:
        async with ends(tmp_path) as (here, there):
            sizes = (1, 100, 3000) * 2
            for size in sizes:
                await here.send_all(bytes(size))
            got = 0
            while got < sum(sizes):
                await trio.lowlevel.wait_readable(there.channel.fileno())
                with suppress(BlockingIOError):
                    got += len(there.channel.recv(65536))
                readable, _, _ = select.select([there.channel], [], [], 0)
                if not readable:
                    with pytest.raises(BlockingIOError):
                        there.channel.recv(65536)

    limited(main)


def test_a_record_that_arrives_in_many_pieces_is_returned_with_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer may send nothing more until it has an answer."""

    async def main() -> None:
        async with ends(tmp_path) as (here, there):
            here.channel._seal(memoryview(b"a question"))
            record = bytes(here.channel._sealed)
            pieces = [record[i : i + 1] for i in range(_MOST_READS - 1)] + [record[_MOST_READS - 1 :]]
            with monkeypatch.context() as patch:
                patch.setattr(there.channel, "_socket", SimpleNamespace(recv=lambda most: pieces.pop(0)))
                assert there.channel.recv(65536) == b"a question" and not pieces

    limited(main)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="Python's ssl cannot ask for new keys")
def test_a_peer_that_asks_for_new_keys_again_and_again_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request leaves an answer, which waits until this side has something to send."""
    monkeypatch.setattr(tls, "_MOST_UNSENT", 200)

    async def main() -> None:
        houses = Houses(tmp_path)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        where = "{}:{}".format(*listener.socket.getsockname()[:2])
        shown = ["-cert", str(houses.own("a")), "-key", str(houses.own("a")), "-alpn", "shoal"]
        command = ["openssl", "s_client", "-tls1_3", "-connect", where, *shown]
        async with trio.open_nursery() as tasks:
            start = partial(
                trio.run_process, command, stdin=subprocess.PIPE, check=False, capture_stdout=True
            )
            peer = await tasks.start(partial(start, capture_stderr=True))
            stream = await houses.trust("head", ["head", "a"]).accepted(await listener.accept(), "a")

            async def ask() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while True:  # it takes what it reads at once for one request
                        await peer.stdin.send_all(b"K\n")
                        await trio.sleep(0.005)

            tasks.start_soon(ask)
            with pytest.raises(trio.BrokenResourceError, match="asks for new keys"):
                await stream.receive_some()
            tasks.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)
        await listener.aclose()

    limited(main)


def test_bytes_before_the_end_are_returned_and_then_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (here, there):
            await here.send_all(b"the last words")
            await here.send_eof()
            assert await there.receive_some() == b"the last words"
            assert [await there.receive_some() for _ in range(2)] == [b"", b""]

    limited(main)


def test_a_cut_connection_ends_for_both_sides_with_the_reason_here(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (here, there):

            async def waits() -> None:
                with pytest.raises(trio.BrokenResourceError, match="no longer a device"):
                    await here.receive_some()

            async with trio.open_nursery() as tasks:
                tasks.start_soon(waits)
                await trio.testing.wait_all_tasks_blocked()
                here.channel.cut("b is no longer a device")
            with pytest.raises(trio.BrokenResourceError, match="no longer a device"):
                await here.send_all(b"more")
            assert await there.receive_some() == b""

    limited(main)


def test_a_changed_byte_breaks_the_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (here, there):
            here.channel._seal(memoryview(b"a token"))
            record = bytearray(here.channel._sealed)
            record[-1] ^= 1
            await here._stream.send_all(record)
            with pytest.raises(trio.BrokenResourceError):
                await there.receive_some()

    limited(main)


def test_a_reader_of_a_long_message_is_woken_seldom_and_never_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of messages arrive in packets, as over a link that is slower than this device."""
    sizes = [1, 200_000, 40_000, 17, 16_384, 300_000, 5]
    waits, wait = 0, trio.lowlevel.wait_readable

    async def counted(handle: object) -> None:
        nonlocal waits
        waits += 1
        await wait(handle)  # type: ignore[arg-type]

    async def packets(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            for at in range(0, len(data), 1448):
                await sink.send_all(data[at : at + 1448])
                await trio.sleep(0.0002)

    async def main() -> None:
        trust = Houses(tmp_path).trust("head", ["head"])
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        pairs = []
        for _ in range(2):
            dialled = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
            pairs.append((dialled, await listener.accept()))
        (here, near), (there, far) = pairs
        found: dict[str, TlsStream] = {}

        async def accepted() -> None:
            found["there"] = await trust.accepted(there, "a")

        async with trio.open_nursery() as tasks:
            tasks.start_soon(packets, near, far)
            tasks.start_soon(packets, far, near)
            async with trio.open_nursery() as handshakes:
                handshakes.start_soon(accepted)
                found["here"] = await trust.dialled(here, "b")
            reader = found["there"]
            monkeypatch.setattr(trio.lowlevel, "wait_readable", counted)
            for size in sizes:  # each waits for its answer, so that nothing of the next one is there
                message = os.urandom(size)
                tasks.start_soon(found["here"].send_all, message)
                got = bytearray()
                while len(got) < size:
                    reader.wanted = size - len(got)
                    got += await reader.receive_some(256 * 1024)
                assert bytes(got) == message
            monkeypatch.undo()
            tasks.cancel_scope.cancel()
        for stream in (*found.values(), near, far, listener):
            await trio.aclose_forcefully(stream)

    limited(main)
    assert waits <= 2 * (len(sizes) + sum(sizes) // tls.WAKE_BYTES) < sum(sizes) // 1448 // 4
