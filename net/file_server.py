"""The side of a `files` connection that gives files of its model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from ..engine.errors import ModelFileError
from .connection import Connection, Hop, open_tasks
from .errors import NetError, RemoteProtocolError
from .files import Files
from .messages import FileBytes, GetBytes, GetSums, Message, Sums

IDLE_SECONDS = 60.0
"""How long a connection without a request stays open. Whoever needs more connects again."""
AHEAD_BYTES = 512 * 1024
"""What is read at a time: a hop into another thread for each small request would cost more than the bytes."""
MOST_SUMS = 8
"""Requests for sums that may wait before no other request is read."""
RESTS = 3
"""How many times as long as it computes sums a node rests while its stage is used."""
T = TypeVar("T")


async def serve_files(connection: Connection, files: Files, busy: Callable[[], bool], hop: Hop) -> None:
    """Answers the requests of a peer until it disconnects. Only what was read last is in memory. While it is
    `busy`, computing sums takes most of its time to rest.

    RemoteProtocolError: it asked for a file that the model has not, or for bytes that the file has not.
    NetError: the file is not whole here, or nothing was asked for IDLE_SECONDS."""
    async with open_tasks() as tasks:
        server = _Server(connection, files, busy, hop)
        tasks.start_soon(server.send_sums)
        while True:
            request = None
            with trio.move_on_after(IDLE_SECONDS):
                request = await connection.receive()
            if request is None:
                raise NetError(f"{connection.peer} has asked for no file for {IDLE_SECONDS:g} s")
            await server.answer(request)


class _Server:
    def __init__(self, connection: Connection, files: Files, busy: Callable[[], bool], hop: Hop) -> None:
        self._connection, self._files, self._busy, self._hop = connection, files, busy, hop
        self._read = "", 0, memoryview(b"")
        """The file, the first byte, and the bytes that were read last."""
        self._wanted, self._to_sum = trio.open_memory_channel[str](MOST_SUMS)

    async def answer(self, request: Message) -> None:
        """Answers a request; sums are left to `send_sums`."""
        if isinstance(request, GetSums):
            await self._wanted.send(request.name)
            return
        assert isinstance(request, GetBytes), "the wire lets nothing else through"
        data = await self._bytes(request.name, request.first, request.last)
        await self._connection.send(FileBytes(request.first, self._busy(), data))
        await self._connection.flush()

    async def _bytes(self, name: str, first: int, last: int) -> memoryview:
        known, begin, data = self._read
        if name != known or not begin <= first < last <= begin + len(data):
            ahead = max(0, AHEAD_BYTES - (last - first))
            data = memoryview(await self._do(partial(self._files.read, name, first, last, ahead)))
            begin, self._read = first, (name, first, data)
        return data[first - begin : last - begin]

    async def send_sums(self) -> None:
        """Computes and sends sums until cancelled."""
        async for name in self._to_sum:
            sums = list[bytes]()
            began = trio.current_time()
            while (found := await self._do(partial(self._files.sum, name, len(sums)))) is not None:
                sums.append(found)
                if self._busy():
                    await trio.sleep(RESTS * (trio.current_time() - began))
                began = trio.current_time()
            await self._connection.send(Sums(name, b"".join(sums)))

    async def _do(self, call: Callable[[], T]) -> T:
        try:
            return await self._hop(call)
        except ValueError as error:
            raise RemoteProtocolError(f"{self._connection.peer} asked for {error}") from error
        except ModelFileError as error:
            raise NetError(str(error)) from error
