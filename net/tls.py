"""TLS 1.3 between the devices of a house, each known by the SHA-256 of its own certificate.

`Trust` is what a process knows of its house: its key, and the certificates of all devices. It opens a
`TlsStream` over the socket of either side. A device whose certificate is not in the list cannot finish the
handshake, and a connection ends when its device is taken off the list. There are no tickets for resumption,
so every connection is checked.

A Connection reads and writes through `TlsStream.channel` in whichever thread has the bytes, as it does with a
plain socket: the SSL object works on buffers in memory.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import trio

from ..engine.errors import ShoalError
from .errors import NetError, NodeLostError, UntrustedError
from .messages import MOST_DEVICES, Address, PairedDevice, Role

HANDSHAKE_BYTES = 64 * 1024
"""The most bytes that a peer may send before its handshake has ended."""
PIECE_BYTES = 64 * 1024
"""What is encrypted at a time."""
WAKE_BYTES = 32 * 1024
"""A task that reads a file is not woken for less. Every system lets more wait in a socket."""
LINGER_SECONDS = 1.0
_READ_BYTES, _RECORD_BYTES, _MOST_READS = 16 * 1024, 16 * 1024, 16
_HEADER_BYTES, _TAIL_BYTES = 5, 17
"""Bytes of a record before what it seals, and the fewest after that."""
_MOST_UNSENT = 16 * 1024
"""The most bytes that reading may leave to send: answers to a peer that asks for new keys."""
_PROTOCOL = "shoal"  # the name for ALPN: a connection that was led to another TLS server ends
_PLAIN = b"SHOL"  # how shoal's frames begin
_PAIR = "pair them with `shoal invite` on the head of the house and `shoal join` on the other device"
_REFUSALS = ("UNKNOWN_CA", "CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "ACCESS_DENIED")


class PlainTextError(UntrustedError):
    """A peer that should have begun with TLS speaks shoal's protocol in plain text."""


def key_of(certificate: bytes) -> str:
    """The SHA-256 of a certificate in DER, by which a device is known."""
    return hashlib.sha256(certificate).hexdigest()


def der_of(device: PairedDevice) -> bytes:
    """The certificate of a device in DER. ValueError: it is not in base64."""
    return base64.b64decode(device.certificate, validate=True)


def prefix_of(key: str) -> int:
    """The upper half of the incarnations of a device's processes. It differs between the devices of a house,
    so that no device can pass for another."""
    return int(key[:8], 16)


def check_devices(devices: Sequence[PairedDevice]) -> dict[str, PairedDevice]:
    """The devices of a house by key. ValueError: there are too many, two have the same name or could pass for
    each other, none is the head, or a certificate cannot be read."""
    found = {key_of(der_of(device)): device for device in devices}
    if not 1 <= len(found) <= MOST_DEVICES:
        raise ValueError(f"a house has 1 to {MOST_DEVICES} devices, not {len(found)}")
    if len({prefix_of(key) for key in found}) < len(devices) or len({m.name for m in devices}) < len(devices):
        raise ValueError("two devices of the house have the same name or key")
    if all(device.role != "head" for device in devices):
        raise ValueError("no device is the head of the house")
    return found


def certificate_in(path: Path) -> bytes:
    """The certificate, in DER, of a PEM file that also holds its private key. ValueError: there is none."""
    text = path.read_text(encoding="ascii")
    begin = text.find(ssl.PEM_HEADER)
    if begin < 0:
        raise ValueError(f"{path} holds no certificate")
    return ssl.PEM_cert_to_DER_cert(text[begin:])


class Trust:
    """The house as this process knows it. `own` is the PEM file of this device's key and certificate. `keep`
    is called with a new list that came from the head, `look` returns a list that was changed on this device,
    or None. Only for the event loop's thread.

    ValueError: the list is not one of a house, or this device is not in it."""

    def __init__(
        self,
        own: Path,
        devices: Sequence[PairedDevice],
        *,
        keep: Callable[[Sequence[PairedDevice], Sequence[Address]], object] = lambda devices, addresses: None,
        look: Callable[[], Sequence[PairedDevice] | None] = lambda: None,
    ) -> None:
        self._own, self._keep, self._look = own, keep, look
        self.key = key_of(certificate_in(own))
        self._streams = WeakSet[TlsStream]()
        self._devices: dict[str, PairedDevice] = {}
        self.addresses: tuple[Address, ...] = ()
        """Where the head waits for devices, as far as it has said."""
        self._moved = False
        self._trouble: Exception | None = None
        self._set(devices)

    @property
    def devices(self) -> tuple[PairedDevice, ...]:
        """All devices of the house."""
        return tuple(self._devices.values())

    @property
    def own(self) -> PairedDevice:
        """This device."""
        return self._devices[self.key]

    def incarnation(self) -> int:
        """A new incarnation for a process of this device."""
        return prefix_of(self.key) << 32 | secrets.randbits(32)

    def may_coordinate(self, device: PairedDevice) -> bool:
        """Whether a device may give orders to this one: the head of the house, and this device itself."""
        return device.role == "head" or self.is_own(device)

    def is_own(self, device: PairedDevice) -> bool:
        """Whether a device is this one, under whatever name."""
        return key_of(der_of(device)) == self.key

    def device(self, key: str) -> PairedDevice:
        """The device with that key. UntrustedError: it is not of the house."""
        if key not in self._devices:
            raise UntrustedError(f"the device {key[:16]} is not of this house: {_PAIR}")
        return self._devices[key]

    def has(self, incarnation: int) -> bool:
        """Whether a process is of a device of the house."""
        return incarnation >> 32 in self.prefixes

    @property
    def prefixes(self) -> frozenset[int]:
        """The upper halves of the incarnations of all processes of the house."""
        return frozenset(map(prefix_of, self._devices))

    def check_incarnation(self, device: PairedDevice, incarnation: int, who: str) -> None:
        """Checks that a Hello comes from a process of the device that has connected. UntrustedError: it says
        that it is another one's."""
        if incarnation >> 32 != prefix_of(key_of(der_of(device))):
            raise UntrustedError(f"{who} is {device.name} and claims to be another device of the house")

    def refresh(self) -> bool:
        """Takes a list that was changed on this device; returns whether it was, or this device has moved.
        ValueError: as for Trust. ShoalError: the list cannot be read."""
        trouble, self._trouble = self._trouble, None
        devices = self._look()
        if devices is not None:
            self.update(devices)
            self._moved = False
            return True
        if trouble is not None:
            raise trouble
        moved, self._moved = self._moved, False
        return moved

    def _catch_up(self) -> None:
        """Takes a changed list before a device is judged by it: one that has just paired connects at once.
        `refresh` then says that something changed, or why the list cannot be used."""
        try:
            self._moved = self.refresh()
        except (ShoalError, ValueError, OSError) as error:
            self._trouble = error

    def hear(self, devices: Sequence[PairedDevice], addresses: Sequence[Address] = ()) -> None:
        """Takes the list that the head has sent, and keeps it, with where the head waits for devices.
        ValueError: as for Trust. OSError: it is in force, and could not be kept."""
        if self._set(devices) or tuple(addresses) != self.addresses:
            self.addresses = tuple(addresses)
            self._keep(self.devices, self.addresses)

    def moved(self, addresses: Sequence[Address]) -> None:
        """Notes, on the head, where it waits for devices now; `refresh` then says that something changed."""
        self._moved |= tuple(addresses) != self.addresses
        self.addresses = tuple(addresses)

    def update(self, devices: Sequence[PairedDevice]) -> None:
        """Replaces the list, and ends the connections of devices that are no longer on it. ValueError: as for
        Trust."""
        self._set(devices)

    def _set(self, devices: Sequence[PairedDevice]) -> bool:
        found = check_devices(devices)
        if self.key not in found:
            raise ValueError("this device is not in the list of its house")
        if found == self._devices:
            return False
        anchors = b"".join(der_of(device) for device in devices)
        try:
            server = _context(ssl.PROTOCOL_TLS_SERVER, self._own, anchors)
            client = _context(ssl.PROTOCOL_TLS_CLIENT, self._own, anchors)
        except OSError as error:  # an SSLError is one, too
            why = getattr(error, "reason", None) or error
            raise ValueError(f"a certificate or the key cannot be read ({why})") from error
        self._server, self._client, self._devices = server, client, found
        for stream in list(self._streams):
            if any(key not in found or found[key].role != role for key, role in stream.ends.items()):
                stream.channel.cut(f"{stream.device.name} is no longer a device of the house")
        return True

    async def dialled(self, stream: trio.abc.Stream, who: str) -> TlsStream:
        """TLS on the side that has connected. UntrustedError: the peer is not of this house, or speaks plain
        text. NodeLostError: it ends the connection. NetError: TLS fails for another reason. The stream is
        closed then, or when this is cancelled."""
        return await self._opened(stream, who, self._client, server=False)

    async def accepted(self, stream: trio.abc.Stream, who: str) -> TlsStream:
        """TLS on the side that was connected to. PlainTextError: the peer speaks plain text, and the stream
        is still open, to answer; else as for `dialled`."""
        self._catch_up()
        return await self._opened(stream, who, self._server, server=True)

    async def _opened(
        self, stream: trio.abc.Stream, who: str, context: ssl.SSLContext, *, server: bool
    ) -> TlsStream:
        opened = await open_tls(stream, who, context, server=server)
        device = self._devices.get(opened.key)  # the exact certificate: not one that a device has signed
        if device is None:
            await trio.aclose_forcefully(opened)
            raise UntrustedError(f"{who} is not a device of this house: {_PAIR}")
        opened.stands_for(device)
        self._streams.add(opened)
        return opened


def _context(side: int, own: Path, anchors: bytes | None) -> ssl.SSLContext:
    """TLS 1.3 with this device's certificate. The peer's must be among the anchors; None: it shows none."""
    context = ssl.SSLContext(side)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # devices are known by key, wherever they are
    context.verify_mode = ssl.CERT_NONE if anchors is None else ssl.CERT_REQUIRED
    context.load_cert_chain(own)
    if anchors is not None:
        context.load_verify_locations(cadata=anchors)
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.set_alpn_protocols([_PROTOCOL])
    return context


def pairing_server(own: Path) -> ssl.SSLContext:
    """The context of the head while it pairs, with devices whose certificates it does not know yet."""
    return _context(ssl.PROTOCOL_TLS_SERVER, own, None)


def pairing_client() -> ssl.SSLContext:
    """The context of a device that pairs. The caller compares the head's key with that of the invite."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([_PROTOCOL])
    return context


async def open_tls(stream: trio.abc.Stream, who: str, context: ssl.SSLContext, *, server: bool) -> TlsStream:
    """A TLS stream after its handshake. Errors as for Trust.accepted."""
    if not isinstance(stream, trio.SocketStream):
        raise TypeError("TLS needs a socket")
    opened = TlsStream(stream, context, server=server)
    try:
        await opened.handshake(who)
    except PlainTextError:
        opened.channel.detach()
        raise
    except BaseException:
        await trio.aclose_forcefully(opened)
        raise
    return opened


class TlsStream(trio.abc.HalfCloseableStream):
    """A trio stream over TLS. `key` is the hash of the peer's certificate, empty if it has shown none, and
    `device` the device that speaks, once Trust has found it: the peer, or one for which the peer, the head,
    passes bytes (net/relay.py)."""

    device: PairedDevice

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext, *, server: bool) -> None:
        self._stream, self._server = stream, server
        self._first = b""
        self.channel = TlsChannel(socket.socket(fileno=stream.socket.fileno()), context, server=server)
        self.key = ""
        self.wanted: int | None = None
        """Bytes that have to arrive before anything can be done, where only this stream waits for them."""
        self.ends: dict[str, Role] = {}
        """The keys of the devices that this connection depends on, and their roles at its beginning."""

    def stands_for(self, device: PairedDevice) -> None:
        """Notes the device whose messages arrive here."""
        self.device = device
        self.ends[key_of(der_of(device))] = device.role

    @property
    def addresses(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """The addresses of this end and of the peer. OSError: the connection has ended."""
        raw = self._stream.socket
        return raw.getsockname()[:2], raw.getpeername()[:2]

    @property
    def refused(self) -> bool:
        """Whether the peer has refused this device's certificate. In TLS 1.3 the dialling side ends its part
        of the handshake before it is checked, so it hears this when it reads."""
        return any(word in self.channel.alert for word in _REFUSALS)

    async def handshake(self, who: str) -> None:
        """Agrees on keys with the peer. Errors as for open_tls."""
        try:
            await self._shake()
        except (ssl.SSLError, trio.BrokenResourceError) as error:
            raise await self._failure(error, who) from error
        certificate = self.channel.peer_certificate()
        self.key = "" if certificate is None else key_of(certificate)
        if self.channel.protocol != _PROTOCOL:
            raise NetError(f"{who} speaks TLS and is no shoal node: check the port")

    async def _shake(self) -> None:
        received = 0
        while not self.channel.shake():
            await self._stream.send_all(self.channel.waiting())
            data = await self._stream.receive_some(_READ_BYTES)
            received += len(data)
            self._first = (self._first + data)[: len(_PLAIN)]
            if not data:
                raise trio.BrokenResourceError("it ended the handshake")
            if received > HANDSHAKE_BYTES:
                raise ssl.SSLError(0, "its handshake is too long")
            self.channel.feed(data)
        await self._stream.send_all(self.channel.waiting())

    async def _failure(self, error: Exception, who: str) -> NetError:
        """The error to raise for a handshake that failed; the peer gets an alert."""
        if self._first == _PLAIN and self._server:
            return PlainTextError(f"only devices of the house may connect here, with TLS: {_PAIR}")
        if self._first == _PLAIN:
            return UntrustedError(
                f"{who} speaks plain text, since it has no house or was started with --insecure: {_PAIR}"
            )
        if not isinstance(error, ssl.SSLError):
            return NodeLostError(f"{who} is lost: {error.__cause__ or error or 'the connection broke'}")
        with trio.move_on_after(LINGER_SECONDS), suppress(trio.BrokenResourceError):
            await self._stream.send_all(self.channel.waiting())
            # A socket that is closed with unread bytes takes back what was written last: the alert.
            await self._stream.send_eof()
            while self._server and await self._stream.receive_some(_READ_BYTES):
                pass
        reason = error.reason or error.strerror or str(error)
        if reason == "CERTIFICATE_VERIFY_FAILED":
            return UntrustedError(f"{who} is not a device of this house: {_PAIR}")
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return UntrustedError(f"{who} has shown no certificate: {_PAIR}")
        return NetError(f"{who} cannot be used, since TLS 1.3 failed ({reason.lower().replace('_', ' ')})")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.wanted:  # what has come of it meanwhile is not worth a look
            await self._wait(self.wanted)
        while True:
            try:
                data = self.channel.recv(_READ_BYTES if max_bytes is None else max_bytes)
            except BlockingIOError:
                await self._wait(self.wanted)
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data

    async def _wait(self, wanted: int | None) -> None:
        if wanted is not None:
            self.channel.wake_at(wanted)
        await trio.lowlevel.wait_readable(self._stream.socket)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio.abc.SendStream."""
        await trio.lowlevel.checkpoint()
        left = memoryview(data)
        while left:
            try:
                left = left[self.channel.send(left) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._stream.socket)
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See trio.abc.HalfCloseableStream."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """See trio.abc.AsyncResource."""
        self.channel.detach()
        await self._stream.aclose()


class TlsChannel:
    """The encrypted side of a non-blocking socket, with the methods of a socket that a Connection uses, from
    any thread. What `send` has encrypted and the socket did not take counts as not sent: the next call gets
    the same bytes again and goes on."""

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        self._socket = raw
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._in, self._out, server_side=server)
        self._lock = threading.Lock()
        """Guards the SSL object, which two threads must not use at once, and the order of what is written."""
        self._sealed, self._covers = memoryview(b""), 0
        """Encrypted bytes that the socket has not taken, and the number of plain bytes in them."""
        self._early = b""
        self._begun = b""
        """The header of a record, as far as it has arrived."""
        self._rest = self._seals = 0
        """Bytes that the last record lacks, and the most plain bytes that it seals."""
        self._wakes_at = 1
        self._ended = False
        self._cut: str | None = None
        self.alert = ""
        """OpenSSL's name for the error that has ended reading."""

    # --- the handshake

    def shake(self) -> bool:
        """Goes on with the handshake, and returns whether it has ended. SSLError: it failed."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def waiting(self) -> bytes:
        """Takes the bytes to send to the peer."""
        return self._out.read()

    def feed(self, data: bytes | bytearray) -> None:
        """Adds bytes of the peer."""
        self._in.write(data)
        self._follow(data)

    def _follow(self, data: bytes | bytearray) -> None:
        """Notes what the last record in the peer's bytes lacks."""
        at, end = self._rest, len(data)
        while at < end:
            header = data[at : at + _HEADER_BYTES - len(self._begun)]
            self._begun += header
            at += len(header)
            if len(self._begun) == _HEADER_BYTES:
                size = int.from_bytes(self._begun[3:], "big")
                self._seals, self._begun = max(0, size - _TAIL_BYTES), b""
                at += size
        self._rest = at - end

    def peer_certificate(self) -> bytes | None:
        """The peer's certificate in DER; None: it has shown none."""
        return self._object.getpeercert(binary_form=True)

    @property
    def protocol(self) -> str | None:
        """The protocol that both sides have named."""
        return self._object.selected_alpn_protocol()

    # --- a socket's methods

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._socket.fileno()

    def detach(self) -> int:
        """Forgets the socket, which its owner closes."""
        return self._socket.detach()

    def recv(self, most: int) -> bytes:
        """Plain bytes that have arrived; b"" when the peer has ended. All that was read from the socket is
        decrypted, so nothing waits here while the socket looks empty. BlockingIOError: nothing has arrived.
        OSError: the connection broke, or `cut` was called."""
        if self._early:
            early, self._early = self._early, b""
            return early
        for _ in range(_MOST_READS):  # a peer could send records without content for ever
            self._check()
            if self._in.pending and (data := self._opened()):
                return data
            if self._ended:
                return b""
            data = self._socket.recv(most)
            self._check()
            if not data:
                return b""
            self.feed(data)
        if (data := self._opened()) or self._ended:
            return data
        raise BlockingIOError

    def wake_at(self, count: int) -> None:
        """Lets the system call the socket readable once all has arrived that `recv` needs for `count` more
        bytes, or WAKE_BYTES of it."""
        needed = self._rest + max(0, count - self._seals) if self._rest else count - len(self._begun)
        needed = max(1, min(WAKE_BYTES, needed))
        if needed != self._wakes_at:
            self._wakes_at = needed
            with suppress(OSError):  # it has ended, or the system cannot do that
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, needed)

    def unread(self, data: bytes) -> None:
        """Puts bytes back that `recv` has returned; it returns them next."""
        self._early = data + self._early

    def _opened(self) -> bytes:
        """Decrypts what there is of whole records."""
        parts = []
        try:
            with self._lock:
                if self._out.pending > _MOST_UNSENT:
                    raise ConnectionAbortedError("it asks for new keys again and again")
                while not self._ended:
                    part = self._object.read(_RECORD_BYTES)
                    parts.append(part)
                    self._ended = not part
                    if not self._in.pending and not self._object.pending():
                        break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.alert = error.reason or ""
            if not any(parts):
                raise
        return b"".join(parts)

    def send(self, data: bytes | memoryview) -> int:
        """Encrypts and writes what the socket accepts; returns the number of plain bytes that are written
        whole. BlockingIOError: none. OSError: the connection broke, or `cut` was called."""
        plain, done = memoryview(data), 0
        with self._lock:
            while True:
                self._check()
                while self._sealed:
                    try:
                        self._sealed = self._sealed[self._socket.send(self._sealed) :]
                    except BlockingIOError:
                        if done:
                            return done
                        raise
                done, self._covers = done + self._covers, 0
                if done == len(plain):
                    return done
                self._seal(plain[done : done + PIECE_BYTES])

    def _seal(self, piece: memoryview) -> None:
        left = piece
        while left:
            left = left[self._object.write(left) :]
        self._sealed, self._covers = memoryview(self._out.read()), len(piece)

    def cut(self, why: str) -> None:
        """Ends the connection, in both directions and for both sides. Its users get an OSError."""
        self._cut = why
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _check(self) -> None:
        if self._cut is not None:
            raise ConnectionAbortedError(self._cut)
