"""Pairing over the network: the head waits for one device (`shoal invite`), the device joins (`shoal join`).

What is said, and why it is safe, stands in net/pairing.py.
"""

from __future__ import annotations

import secrets
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import trio

from . import house, nearby
from .arguments import address
from .engine.errors import ShoalError
from .net.dial import open_tcp
from .net.errors import NetError, NodeLostError, RemoteProtocolError, UntrustedError, printable, to_wire
from .net.identity import host_port
from .net.listen import accept, addresses, listen, named
from .net.messages import MOST_ADDRESSES, Address, PairedDevice
from .net.pairing import (
    HEADER_BYTES,
    SECRET_BYTES,
    Challenge,
    Invite,
    InviteState,
    Join,
    Pairing,
    Proof,
    Refused,
    Welcome,
    body_size,
    check_welcome,
    decode,
    encode,
    new_nonce,
    proof_of,
    same,
    transcript,
)
from .net.tls import TlsStream, key_of, open_tls, pairing_client, pairing_server

CONNECTION_SECONDS = 15.0
"""How long one connection may take, handshake and all."""
MOST_CONNECTIONS = 8
"""A further one ends the oldest."""
GOODBYE_SECONDS = 2.0
LAST_SECONDS = 1.0
"""How long others are told that the invite has been used."""
REACH_SECONDS = 5.0
LOOK_SECONDS = 10.0
"""How long the head is looked for by mDNS."""
M = TypeVar("M", Join, Challenge, Proof, Welcome)


class _Line:
    """One side of a pairing connection."""

    def __init__(self, stream: TlsStream, who: str) -> None:
        self._stream, self.who = stream, who
        self._data = b""

    async def send(self, message: Pairing) -> None:
        try:
            await self._stream.send_all(encode(message))
        except trio.BrokenResourceError as error:
            raise NodeLostError(f"{self.who} is lost: the connection broke") from error

    async def receive(self, kind: type[M]) -> M:
        """The next message. UntrustedError: the other side refuses. NetError: it sent something else, or
        left."""
        header = await self._exactly(HEADER_BYTES)
        try:
            message = decode(header, await self._exactly(body_size(header, kind)))
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self.who}: {error}") from error
        if isinstance(message, Refused):
            raise UntrustedError(f"{self.who}: {message.text}")
        assert isinstance(message, kind), "body_size has checked that"
        return message

    async def finish(self) -> None:
        """Gives the other side time to read what was sent last, since a socket that is closed with unread
        bytes takes that back."""
        gone = suppress(trio.BrokenResourceError, trio.ClosedResourceError)
        with trio.CancelScope(shield=True), trio.move_on_after(GOODBYE_SECONDS), gone:
            await self._stream.send_eof()
            while await self._stream.receive_some():
                pass

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            try:
                more = await self._stream.receive_some()
            except trio.BrokenResourceError as error:
                raise NodeLostError(f"{self.who} is lost: the connection broke") from error
            if not more:
                raise NodeLostError(f"{self.who} closed the connection")
            self._data += more
        found, self._data = self._data[:size], self._data[size:]
        return found


# --- the head


@dataclass(eq=False)
class Inviting:
    """The head while an invite is open. `invite` is for the token. `homes` is where `shoal up` waits for the
    device; empty: it does not run, and will at the addresses of this invite."""

    listeners: Sequence[trio.SocketListener]
    invite: Invite
    state: InviteState
    log: Callable[[str], None]
    homes: tuple[Address, ...] = ()

    @classmethod
    async def open(
        cls,
        where: tuple[str, int],
        seconds: float,
        log: Callable[[str], None],
        homes: tuple[Address, ...] = (),
    ) -> Inviting:
        """Listens. The invite is open for that time. NetError: the address cannot be used."""
        host, port = where
        listeners = await listen(host, addresses(host), port)
        shown = [address(text) for text in named(listeners)]
        others = [(host, port) for host, port in shown if host not in ("127.0.0.1", "::1")]
        key = key_of(house.own_certificate())
        secret = secrets.token_bytes(SECRET_BYTES)
        invite = Invite(tuple(others or shown), key, secret, int(time.time() + seconds))
        return cls(listeners, invite, InviteState(secret, key, trio.current_time() + seconds), log, homes)

    async def wait(self, seconds: float) -> PairedDevice:
        """Waits until a device has joined, and adds it to the house. UntrustedError: nobody has, in time or
        with the right secret."""
        joined: list[PairedDevice] = []
        context, active = pairing_server(house.directory() / house.IDENTITY), list[trio.CancelScope]()

        async def serve(stream: trio.SocketStream) -> None:
            with trio.move_on_after(CONNECTION_SECONDS) as scope:
                active.append(scope)
                if len(active) > MOST_CONNECTIONS:
                    active.pop(0).cancel()
                try:
                    device = await self._serve(stream, context)
                    if device is not None:
                        joined.append(device)
                finally:
                    if scope in active:
                        active.remove(scope)
            if self.state.over:
                await trio.sleep(LAST_SECONDS)
                tasks.cancel_scope.cancel()

        async def accept_all(listener: trio.SocketListener) -> None:
            while True:
                for stream in await accept(listener):
                    tasks.start_soon(serve, stream)

        try:
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as tasks:
                    for listener in self.listeners:
                        tasks.start_soon(accept_all, listener)
        finally:
            for listener in self.listeners:
                await trio.aclose_forcefully(listener)
        if joined:
            return joined[0]
        if self.state.over:
            raise UntrustedError("the invite has ended: somebody has tried wrong secrets. Make another one")
        raise UntrustedError("no device has joined in time: make another invite")

    async def _serve(self, raw: trio.SocketStream, context: ssl.SSLContext) -> PairedDevice | None:
        """Pairs with one device; None: it may not join, and was told why."""
        try:
            who = host_port(*raw.socket.getpeername()[:2])
        except OSError:
            who = "a device"
        try:
            stream = await open_tls(raw, who, context, server=True)
        except NetError as error:
            await trio.aclose_forcefully(raw)
            self.log(str(error))
            return None
        line = _Line(stream, who)
        try:
            return await self._pair(line)
        except ShoalError as error:
            self.log(f"{who} has not joined: {error}")
            with suppress(NodeLostError):
                await line.send(Refused(to_wire(error)[1]))
                await line.finish()
        finally:
            await trio.aclose_forcefully(stream)
        return None

    async def _pair(self, line: _Line) -> PairedDevice:
        self.state.check_open(trio.current_time())
        join, challenge = await line.receive(Join), Challenge(new_nonce())
        await line.send(challenge)
        proof = await line.receive(Proof)
        said = self.state.admit(join, challenge, proof, trio.current_time())
        try:
            devices, device = _add(join)
        except ShoalError:
            self.state.reopen()
            raise
        homes = self.homes or _homes(self.invite.addresses[:MOST_ADDRESSES])
        mac = proof_of(self.invite.secret, "head", said, devices, homes)
        await line.send(Welcome(devices, mac, homes))
        await line.finish()
        return device


def _homes(addresses: Sequence[tuple[str, int]]) -> tuple[Address, ...]:
    port = house.head_port()
    return tuple(Address(host, port) for host, _ in addresses)


def _add(join: Join) -> tuple[tuple[PairedDevice, ...], PairedDevice]:
    """Adds a device that has proved the secret. ShoalError: it cannot be a device of the house."""
    new = PairedDevice(join.name, "device", join.certificate)
    try:
        house.check_device(new)
    except ValueError as error:
        raise UntrustedError(f"its certificate cannot be used: {error}") from error
    devices = house.change(lambda devices: house.added(devices, new))
    return devices, next(device for device in devices if device.certificate == new.certificate)


# --- the device


async def join_house(invite: Invite, name: str, *, mdns: bool = False) -> tuple[PairedDevice, ...]:
    """Joins the house of an invite, and keeps its list. The head is tried at each of its addresses, and then,
    with `mdns`, where it is announced. UntrustedError: it refuses, or another device answers. NodeLostError:
    it cannot be reached."""
    certificate = b64encode(house.own_certificate()).decode()
    lost: NetError | None = None
    for where in invite.addresses:
        try:
            return await _join(await _reached(*where, invite), invite, name, certificate)
        except NodeLostError as error:
            lost = error
    found = await _found(invite) if mdns else None
    if found is not None:
        return await _join(found, invite, name, certificate)
    late = " The invite may have expired." if time.time() > invite.expires else ""
    raise NodeLostError(
        f"{lost}: check that `shoal invite` still waits, and that both devices are in one network.{late}"
    )


async def _found(invite: Invite) -> _Line | None:
    """The head where it is announced in the local network; None: it is not, or mDNS cannot be used."""
    if not nearby.installed():
        return None
    found: _Line | None = None
    with suppress(OSError), trio.move_on_after(LOOK_SECONDS):
        async with nearby.announced("join", invite.head) as places:
            async for where in places:
                with suppress(NetError):  # somebody else announces the same
                    found = await _reached(*where, invite)
                    break
    return found


async def _reached(host: str, port: int, invite: Invite) -> _Line:
    """TLS with the head of an invite. NodeLostError: it cannot be reached there. UntrustedError: another
    device answers."""
    who = host_port(host, port)
    try:
        with trio.fail_after(REACH_SECONDS):
            raw = await open_tcp(host, port)
    except (OSError, trio.TooSlowError) as error:
        raise NodeLostError(
            f"{who} cannot be reached ({printable(str(error) or 'no answer', 200)})"
        ) from error
    with _in_time(who):
        stream = await open_tls(raw, who, pairing_client(), server=False)
    if not same(stream.key, invite.head):
        await trio.aclose_forcefully(stream)
        raise UntrustedError(
            f"another device than the head answers at {who}: somebody may be in between, or the token is "
            "an old one. Make another invite"
        )
    return _Line(stream, who)


async def _join(line: _Line, invite: Invite, name: str, certificate: str) -> tuple[PairedDevice, ...]:
    try:
        with _in_time(line.who):
            join = Join(name, certificate, new_nonce())
            await line.send(join)
            challenge = await line.receive(Challenge)
            try:
                said = transcript(invite.head, join, challenge)
            except ValueError as error:
                raise RemoteProtocolError(f"{line.who} sent an invalid message: {error}") from error
            await line.send(Proof(proof_of(invite.secret, "device", said)))
            welcome = await line.receive(Welcome)
            check_welcome(invite, join, challenge, welcome)
    finally:
        await line.close()
    house.save_joined(welcome.devices, welcome.addresses)
    return welcome.devices


@contextmanager
def _in_time(who: str) -> Iterator[None]:
    try:
        with trio.fail_after(CONNECTION_SECONDS):
            yield
    except trio.TooSlowError:
        raise NodeLostError(f"{who} did not answer within {CONNECTION_SECONDS:g} s") from None
