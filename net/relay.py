"""Frames of net/requests.py over TLS: how a node lets the head of its house use a connection, and how the
head passes bytes between two devices.

Each end of a relay has TLS with the head, which vouches for the devices: it tells either end which one the
other is, by its key. That is as safe as the list of the house, which comes from the head as well.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

import trio

from .errors import NodeLostError, RemoteProtocolError, UntrustedError
from .requests import MAGIC, Frame, Ready, Refused, Take, decode, encode
from .tls import TlsStream, Trust

IDLE_SECONDS, LAST_SECONDS = 300.0, 1.0
PASSED_BYTES = 256 * 1024
"""What is read at a time of what the head passes on."""
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)
K = TypeVar("K", bound=Frame)


class RequestStream:
    """Frames of net/requests.py over a TLS stream. `who` names the other side in errors."""

    def __init__(self, stream: TlsStream, who: str) -> None:
        self.stream, self.who = stream, who
        self._data = b""

    async def send(self, frame: Frame) -> None:
        """Sends a frame. NodeLostError: the connection has ended."""
        try:
            await self.stream.send_all(encode(frame))
        except _GONE as error:
            raise NodeLostError(f"{self.who} is lost: the connection broke") from error

    async def receive(self, *kinds: type[K]) -> K:
        """Returns the next frame, which is of one of these kinds; raises the error of a refusal.
        NodeLostError: the connection has ended. UntrustedError: the other side does not know this device.
        RemoteProtocolError: it sent something else."""
        while True:
            try:
                found = decode(self._data)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(f"{self.who}: {error}") from error
            if found is not None:
                break
            self._data += await self._some()
        frame, size = found
        self._data = self._data[size:]
        if isinstance(frame, Refused):
            raise frame.error(self.who)
        if not isinstance(frame, kinds):
            raise RemoteProtocolError(f"{self.who} sent {type(frame).__name__} out of turn")
        return frame

    async def is_next(self) -> bool:
        """Whether a frame comes next, and nothing else. Errors as for `receive`, if the connection ends."""
        while len(self._data) < len(MAGIC):
            self._data += await self._some()
        return self._data.startswith(MAGIC)

    async def _some(self) -> bytes:
        try:
            data = await self.stream.receive_some()
        except _GONE as error:
            if self.stream.refused:
                raise UntrustedError(
                    f"{self.who} does not know this device any more: pair it again (`shoal invite` on the "
                    "head, `shoal join` here)"
                ) from error
            raise NodeLostError(f"{self.who} is lost: the connection broke") from error
        if not data:
            raise NodeLostError(f"{self.who} is lost: it closed the connection")
        return data

    def release(self) -> TlsStream:
        """The stream, for those who go on with it: they get what has been read too early."""
        self.stream.channel.unread(self._data)
        self._data = b""
        return self.stream

    async def refuse(self, error: Exception) -> None:
        """Sends the reason for ending the connection, and gives the other side time to read it (see
        Connection.refuse)."""
        with trio.move_on_after(LAST_SECONDS), suppress(NodeLostError, *_GONE):
            await self.send(Refused.of(error))
            await self.stream.send_eof()
            while await self.stream.receive_some():
                pass


async def answer_take(line: RequestStream, take: Take, trust: Trust) -> TlsStream:
    """Ends the wait of a connection: it is used by the device that the head names. UntrustedError: that is
    not of the house, or the other side is not the head; it is told so."""
    try:
        if line.stream.device.role != "head":
            raise UntrustedError(f"{line.stream.device.name} vouches for others and is not the head")
        line.stream.stands_for(trust.device(take.device))
    except UntrustedError as error:
        await line.refuse(error)
        raise
    await line.send(Ready(trust.key))
    return line.release()


async def vouched(stream: TlsStream, who: str, trust: Trust) -> None:
    """On a connection that the head has made to this node: finds out whether it is for another device."""
    data = b""
    with suppress(*_GONE):  # whoever reads next hears of it
        while len(data) < len(MAGIC) and (more := await stream.receive_some()):
            data += more
    stream.channel.unread(data)
    if data.startswith(MAGIC):
        line = RequestStream(stream, who)
        await answer_take(line, await line.receive(Take), trust)


async def pass_bytes(one: TlsStream, other: TlsStream) -> None:
    """Passes bytes in both directions until one side ends, or nothing has passed for IDLE_SECONDS."""
    async with trio.open_nursery() as tasks:
        ends = False

        def live(seconds: float) -> None:
            tasks.cancel_scope.deadline = trio.current_time() + seconds

        async def pump(source: TlsStream, target: TlsStream) -> None:
            nonlocal ends
            with suppress(*_GONE):
                while data := await source.receive_some(PASSED_BYTES):
                    await target.send_all(data)
                    if not ends:
                        live(IDLE_SECONDS)
                await target.send_eof()
            ends = True
            live(LAST_SECONDS)

        live(IDLE_SECONDS)
        tasks.start_soon(pump, one, other)
        tasks.start_soon(pump, other, one)
