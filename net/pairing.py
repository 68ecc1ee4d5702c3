"""Pairing without I/O: the token of an invite, and how two devices prove that they know its secret.

A token has the addresses and the key of the head, and a secret that is used once. The device that joins
connects with TLS, and ends the connection unless the head's certificate has the token's key. Then

    Join        device to head: its certificate, its name, and a random number
    Challenge   head to device: a random number
    Proof       device to head: an HMAC with the secret over all of that, and the role "device"
    Welcome     head to device: an HMAC over the same, the role "head" and the devices of the house, with them

or Refused instead of the head's answer. The secret is never sent. An HMAC of one side is none of the other's,
and none of another connection, since it covers both certificates and both random numbers.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ..engine import strict
from ..engine.strict import AtMost, Printable
from .errors import NetError, RemoteProtocolError, UntrustedError
from .messages import MOST_ADDRESSES, MOST_DEVICES, Address, Name, PairedDevice, Role, Text
from .tls import check_devices, key_of

PREFIX = "SHOAL1-"
MOST_ATTEMPTS = 5
"""Wrong proofs after which an invite ends."""
SECRET_BYTES, KEY_BYTES, CHECK_BYTES = 16, 32, 4
LIMIT, WELCOME_LIMIT = 8 * 1024, 64 * 1024
_HEADER = struct.Struct("<BI")
_LABEL = b"shoal pairing 1"

Hex = Annotated[str, Printable(64, 64)]


@dataclass(frozen=True, slots=True)
class Invite:
    """What a token says. `head` is the key of the head's certificate, `expires` a time in Unix seconds."""

    addresses: tuple[tuple[str, int], ...]
    head: str
    secret: bytes
    expires: int

    def __repr__(self) -> str:
        return f"Invite({self.addresses}, {self.head[:16]}, secret hidden)"

    def token(self) -> str:
        """The invite as a word of capital letters and digits, which a QR code holds best."""
        parts = [struct.pack("<I", self.expires), bytes.fromhex(self.head), self.secret]
        for host, port in self.addresses[:MOST_ADDRESSES]:
            packed = ipaddress.ip_address(host).packed
            parts.append(struct.pack("<BH", len(packed), port) + packed)
        body = b"".join(parts)
        body += hashlib.sha256(body).digest()[:CHECK_BYTES]
        return PREFIX + base64.b32encode(body).decode().rstrip("=")


def read_token(text: str) -> Invite:
    """The invite of a token. UntrustedError: it is none, or a part of it is missing."""
    wrong = UntrustedError("this is no token of `shoal invite`, or a part of it is missing: copy all of it")
    word = "".join(text.split()).upper()
    if not word.startswith(PREFIX) or len(word) > 400:
        raise wrong
    word = word.removeprefix(PREFIX)
    try:
        body = base64.b32decode(word + "=" * (-len(word) % 8))
    except ValueError:
        raise wrong from None
    body, check = body[:-CHECK_BYTES], body[-CHECK_BYTES:]
    if hashlib.sha256(body).digest()[:CHECK_BYTES] != check or len(body) < 4 + KEY_BYTES + SECRET_BYTES:
        raise wrong
    (expires,) = struct.unpack_from("<I", body)
    head, body = body[4 : 4 + KEY_BYTES].hex(), body[4 + KEY_BYTES :]
    secret, body = body[:SECRET_BYTES], body[SECRET_BYTES:]
    addresses = []
    while body:
        size, port = struct.unpack_from("<BH", body) if len(body) >= 3 else (0, 0)
        if size not in (4, 16) or len(body) < 3 + size or port == 0:
            raise wrong
        addresses.append((str(ipaddress.ip_address(body[3 : 3 + size])), port))
        body = body[3 + size :]
    if not 1 <= len(addresses) <= MOST_ADDRESSES:
        raise wrong
    return Invite(tuple(addresses), head, secret, expires)


@dataclass(frozen=True, slots=True)
class Join:
    """The device that joins: its name, its certificate (DER in base64), and a random number in hex."""

    name: Name
    certificate: Annotated[str, Printable(1, 2048)]
    nonce: Hex


@dataclass(frozen=True, slots=True)
class Challenge:
    """The head's random number, in hex."""

    nonce: Hex


@dataclass(frozen=True, slots=True)
class Proof:
    """The device's HMAC, in hex."""

    mac: Hex


@dataclass(frozen=True, slots=True)
class Welcome:
    """The devices of the house, the new one among them; the head's HMAC; and where `shoal up` listens on the
    head."""

    devices: Annotated[tuple[PairedDevice, ...], AtMost(MOST_DEVICES)]
    mac: Hex
    addresses: Annotated[tuple[Address, ...], AtMost(MOST_ADDRESSES)] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The reason why the device does not join."""

    text: Text


Pairing = Join | Challenge | Proof | Welcome | Refused
_KINDS: tuple[type[Pairing], ...] = (Join, Challenge, Proof, Welcome, Refused)
HEADER_BYTES = _HEADER.size


def encode(message: Pairing) -> bytes:
    """The frame of a message."""
    body = strict.encode(message)
    return _HEADER.pack(_KINDS.index(type(message)), len(body)) + body


def body_size(header: bytes, expected: type[Pairing]) -> int:
    """The bytes of the body that follow a header. RemoteProtocolError: another message than this one, or
    Refused, or one that is too long."""
    code, size = _HEADER.unpack(header)
    if code not in (_KINDS.index(expected), _KINDS.index(Refused)):
        raise RemoteProtocolError("it does not speak shoal's pairing protocol: check the token")
    if size > (WELCOME_LIMIT if expected is Welcome else LIMIT):
        raise RemoteProtocolError(f"it announced {size} bytes, more than are allowed")
    return int(size)


def decode(header: bytes, body: bytes) -> Pairing:
    """The message of a header that `body_size` has checked. RemoteProtocolError: it is invalid."""
    try:
        message: Pairing = strict.decode(_KINDS[_HEADER.unpack(header)[0]], body)
    except ValueError as error:
        raise RemoteProtocolError(f"it sent an invalid message: {error}") from error
    return message


def new_nonce() -> str:
    """A random number for one connection."""
    return secrets.token_hex(32)


def transcript(head: str, join: Join, challenge: Challenge) -> bytes:
    """A hash of all that the two sides have said, with the keys of both. ValueError: not base64 or hex."""
    device = key_of(base64.b64decode(join.certificate, validate=True))
    keys = bytes.fromhex(head) + bytes.fromhex(device)
    nonces = bytes.fromhex(join.nonce) + bytes.fromhex(challenge.nonce)
    return hashlib.sha256(_LABEL + keys + nonces + join.name.encode()).digest()


def proof_of(
    secret: bytes,
    role: Role,
    said: bytes,
    devices: Sequence[PairedDevice] = (),
    addresses: Sequence[Address] = (),
) -> str:
    """The HMAC of one side, in hex."""
    lines = [f"{device.role} {device.certificate} {device.name}" for device in devices]
    lines += [f"{address.host} {address.port}" for address in addresses]
    listed = b"".join(hashlib.sha256(line.encode()).digest() for line in lines)
    content = _LABEL + b" " + role.encode() + b"\0" + said + hashlib.sha256(listed).digest()
    return hmac.new(secret, content, hashlib.sha256).hexdigest()


def same(one: str, other: str) -> bool:
    """Whether two hexadecimal words are equal, in a time that says nothing about where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())


class InviteState:
    """The head's side of one invite: who may still join. `expires` is by the caller's clock."""

    def __init__(self, secret: bytes, head: str, expires: float) -> None:
        self._secret, self._head, self._expires = secret, head, expires
        self._wrong = 0
        self._used = False

    @property
    def over(self) -> bool:
        """Whether somebody has joined, or has guessed too often."""
        return self._used or self._wrong >= MOST_ATTEMPTS

    def check_open(self, now: float) -> None:
        """UntrustedError: the invite is used, has expired, or was guessed at too often."""
        if self._used:
            raise UntrustedError("this invite has been used: `shoal invite` on the head makes another")
        if self._wrong >= MOST_ATTEMPTS:
            raise UntrustedError("this invite has ended, since wrong secrets were tried: make another")
        if now >= self._expires:
            raise UntrustedError("this invite has expired: `shoal invite` on the head makes another")

    def admit(self, join: Join, challenge: Challenge, proof: Proof, now: float) -> bytes:
        """Checks a device's proof, and uses the invite up; returns the transcript. UntrustedError: it may not
        join."""
        self.check_open(now)
        try:
            said = transcript(self._head, join, challenge)
        except ValueError as error:
            raise RemoteProtocolError(f"it sent an invalid message: {error}") from error
        if not same(proof_of(self._secret, "device", said), proof.mac):
            self._wrong += 1
            raise UntrustedError("the secret is wrong: copy the whole token of the latest `shoal invite`")
        self._used = True
        return said

    def reopen(self) -> None:
        """Makes the invite usable again, since the device that has proved the secret could not be added."""
        self._used = False


def check_welcome(invite: Invite, join: Join, challenge: Challenge, welcome: Welcome) -> None:
    """Checks the head's answer. UntrustedError: it does not know the secret. NetError: its list is not one of
    a house with both devices."""
    said = transcript(invite.head, join, challenge)
    if not same(proof_of(invite.secret, "head", said, welcome.devices, welcome.addresses), welcome.mac):
        raise UntrustedError("the head does not know the secret of the token: make another invite")
    try:
        by_key = check_devices(welcome.devices)
    except ValueError as error:
        raise NetError(f"the head sent a list of devices that is none of a house: {error}") from error
    head = by_key.get(invite.head)
    own = key_of(base64.b64decode(join.certificate))
    if head is None or head.role != "head" or own not in by_key:
        raise NetError("the head sent a list of devices without itself or this one: update shoal on both")
