"""What reads bytes of strangers: targets that read files are in files.py, those of `shoal serve` in
http.py, and all others here."""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from tests.net.test_wire import EXAMPLES

from shoal import house, last_start
from shoal.engine import strict
from shoal.engine.batch import Logprobs, Sampling
from shoal.engine.errors import ShoalError
from shoal.local import frames
from shoal.net import pairing, requests
from shoal.net.errors import MismatchError, NetError, RemoteProtocolError, UntrustedError
from shoal.net.identity import Identity, check_hello
from shoal.net.known import HEAD
from shoal.net.message_table import BY_CODE, BY_KIND
from shoal.net.messages import PROTOCOL, Address, Hello, PairedDevice, Purpose
from shoal.net.packed import decode, encode
from shoal.net.tls import check_devices, key_of
from shoal.net.wire import HEADER, MAGIC, Signal, WireProtocol
from shoal.planner import LinkSpeed

from .checkpoints import checkpoint_targets
from .files import file_targets
from .http import http_targets
from .target import Target, fitting, mostly

KEY = "ab" * 32
CERTIFICATE = Path(__file__).with_name("certificate.der")


def targets(place: Path) -> dict[str, Target]:
    """All targets, by name. `place` is for files."""
    return {
        "hello": Target(_hello, _hellos(), (NetError,)),
        "frames of a connection": Target(_body, _bodies(), (ValueError,)),
        "a whole connection": Target(_connection, _connections(), (NetError,), slow=4),
        "frames of the head's port": Target(_request, _requests(), (RemoteProtocolError,)),
        "frames of the head's socket": Target(
            _local, _locals(), (RemoteProtocolError, MismatchError, ValueError)
        ),
        "frames of pairing": Target(_pairing, _pairings(), (RemoteProtocolError,)),
        "token of an invite": Target(_token, (_token_body(),), (UntrustedError,)),
        "certificate": Target(house.check_certificate, (_certificate(),), (ValueError,)),
        "a pairing": Target(_said, _saids(), (ValueError, ShoalError)),
        "house.json": Target(_list, _lists(), (ValueError,)),
        "last.json": Target(partial(strict.decode, last_start._Last), _lasts(), (ValueError,)),
        **checkpoint_targets(place),
        **file_targets(place),
        **http_targets(),
    }


# --- connections


def _hello(data: bytes) -> None:
    """The first bytes of a connection, of whoever has reached the port."""
    wire = WireProtocol(dialled=False)
    wire.receive_data(fitting(data, HEADER.size))
    message = wire.next_message()
    if isinstance(message, Hello):
        check_hello(Identity("laptop", 9, "0.1.0", message.numerics, message.model), message, "somebody")


def _hellos() -> tuple[bytes, ...]:
    hellos = [message for message in EXAMPLES if isinstance(message, Hello)]
    return tuple(b"".join(WireProtocol(dialled=True).send(hello)) for hello in hellos)


def _connection(data: bytes) -> None:
    """What comes after the Hello of this side, in pieces. The first bytes: which side it is, the purpose of
    the connection, and the size of the pieces."""
    if len(data) < 3:
        return
    purposes = get_args(Purpose)
    side, purpose, step = data[0] % 2, purposes[data[1] % len(purposes)], 1 + data[2] * data[2]
    wire = WireProtocol(dialled=bool(side))
    wire.send(_hello_for(purpose))
    data = _framed(data[3:]) if mostly(data) else data[3:]
    for at in range(0, len(data) + 1, step):
        wire.receive_data(data[at : at + step])  # at last nothing: the end
        while not isinstance(wire.next_message(), Signal):
            pass
        assert wire.missing <= max(entry.limit for entry in BY_CODE.values()) + HEADER.size


def _framed(data: bytes) -> bytes:
    """Frames that are changed so that their headers are right; the last one has what is left."""
    made, at = b"", 0
    while at + HEADER.size <= len(data):
        *_, code, size = HEADER.unpack_from(data, at)
        at += HEADER.size
        body = data[at : at + size]
        made += HEADER.pack(MAGIC, PROTOCOL, code, len(body)) + body
        at += size
    return made


def _hello_for(purpose: Purpose) -> Hello:
    return Hello(purpose, "laptop", 9, "0.1.0", 1, KEY, None)


def _connections() -> tuple[bytes, ...]:
    """For each purpose and side all messages that may be received."""
    found = []
    for i, purpose in enumerate(get_args(Purpose)):
        for dialled in (False, True):
            frames_ = list(WireProtocol(dialled=not dialled).send(_hello_for(purpose)))
            for body in _bodies():
                (code,) = struct.unpack_from("<H", body)
                entry = BY_CODE[code]
                if (
                    entry.kind is not Hello
                    and len(body) < 512
                    and purpose in (entry.up if dialled else entry.down)
                ):
                    frames_.append(HEADER.pack(MAGIC, PROTOCOL, code, len(body) - 2) + body[2:])
            found.append(bytes([dialled, i, 60]) + b"".join(frames_))
    return tuple(found)


def _body(data: bytes) -> None:
    """A code and a body: the header before it was right."""
    entry = BY_CODE.get(int.from_bytes(data[:2], "little"))
    if entry is not None and len(data) - 2 <= entry.limit:
        decode(entry, bytearray(data[2:]))


def _bodies() -> tuple[bytes, ...]:
    def body(message: object) -> bytes:
        return struct.pack("<H", BY_KIND[type(message)].code) + b"".join(map(bytes, encode(message)))

    return tuple(body(message) for message in EXAMPLES)


def _request(data: bytes) -> None:
    requests.decode(fitting(data, requests.HEADER.size))


def _requests() -> tuple[bytes, ...]:
    examples: list[requests.Frame] = [
        requests.Announce("phone", 1 << 63, 7001, KEY),
        requests.Relay(Address("192.168.1.20", 7001)),
        requests.GetModel(),
        requests.Alive(),
        requests.Take(KEY),
        requests.Ready(KEY),
        requests.Refused(12, "no"),
    ]
    assert {type(example) for example in examples} == set(requests.KINDS)
    return tuple(map(requests.encode, examples))


def _local(data: bytes) -> None:
    """A frame of another program of this user, in either direction."""
    size = frames.HEADER.size
    data = fitting(data, size)
    if len(data) < size:
        return
    kind, announced = frames.announced(data[:size], requests=data[6] < 32)
    if announced == len(data) - size:
        message = frames.decoded(kind, data[size:])
        if isinstance(message, frames.Begin):
            frames.unpacked(message.prompt)
        if isinstance(message, frames.Part):
            frames.result_of(message)


def _locals() -> tuple[bytes, ...]:
    ids, reported = frames.packed([1, 2, 3]), (Logprobs(-0.5, ((1, -0.5), (2, -1.5))),)
    return tuple(
        frames.frame(message)
        for message in (
            frames.Begin(1, ids, Sampling(), 64, 5, ids, 2, None, "e30="),
            frames.Reading(1, ids, 0, "scores", 64, None),
            frames.OpenSession(1, Sampling(0.7), 64),
            frames.Welcome(7, "0.1.0", 7077, "/models/tiny", KEY, 64),
            frames.Token(1, 5, reported, 3),
            frames.Part(1, 0, 3, ids, (0.5, 0.25, 0.125), None, ()),
            frames.Part(1, 0, 3, "", (), ids, ()),
            frames.End(1, 12, "no"),
        )
    )


# --- pairing


def _pairing(data: bytes) -> None:
    data = fitting(data, pairing.HEADER_BYTES)
    header, body = data[: pairing.HEADER_BYTES], data[pairing.HEADER_BYTES :]
    if len(header) == pairing.HEADER_BYTES:
        kind = pairing._KINDS[header[0] % len(pairing._KINDS)]
        if pairing.body_size(header, kind) == len(body):
            pairing.decode(header, body)


def _pairings() -> tuple[bytes, ...]:
    return tuple(
        map(
            pairing.encode,
            (
                pairing.Join("phone", "bm90aGluZw==", KEY),
                pairing.Challenge(KEY),
                pairing.Proof(KEY),
                pairing.Welcome((), KEY, (Address("192.168.1.20", 7077),)),
                pairing.Refused("no"),
            ),
        )
    )


@dataclass(frozen=True, slots=True)
class _Pairing:
    """What the two sides of a pairing say, without their HMACs."""

    join: pairing.Join
    challenge: pairing.Challenge
    welcome: pairing.Welcome


def _said(data: bytes) -> None:
    """A pairing in which both sides know the secret, as each of them reads it."""
    said, head, secret = strict.decode(_Pairing, data), key_of(_certificate()), bytes(16)
    join, challenge, welcome = said.join, said.challenge, said.welcome
    transcript = pairing.transcript(head, join, challenge)
    mac = pairing.proof_of(secret, "device", transcript) if mostly(data) else said.welcome.mac
    pairing.InviteState(secret, head, 1.0).admit(join, challenge, pairing.Proof(mac), 0.0)
    mac = pairing.proof_of(secret, "head", transcript, welcome.devices, welcome.addresses)
    invite = pairing.Invite((("192.168.1.20", 7077),), head, secret, 1)
    pairing.check_welcome(invite, join, challenge, replace(welcome, mac=mac))
    house.added(
        (PairedDevice("laptop", "head", _encoded()),), PairedDevice(join.name, "device", join.certificate)
    )


def _saids() -> tuple[bytes, ...]:
    certificate = base64.b64encode(b"another one").decode()
    devices = (PairedDevice("laptop", "head", _encoded()), PairedDevice("phone", "device", certificate))
    welcome = pairing.Welcome(devices, KEY, (Address("192.168.1.20", 7077),))
    join = pairing.Join("phone", certificate, KEY)
    return (strict.encode(_Pairing(join, pairing.Challenge(KEY), welcome)),)


def _token(data: bytes) -> None:
    """The contents of a token: the check at its end is right."""
    body = data + hashlib.sha256(data).digest()[: pairing.CHECK_BYTES]
    pairing.read_token(pairing.PREFIX + base64.b32encode(body).decode().rstrip("="))


def _token_body() -> bytes:
    invite = pairing.Invite((("192.168.1.20", 7077), ("fe80::1", 7077)), KEY, bytes(16), 1 << 31)
    word = invite.token().removeprefix(pairing.PREFIX)
    return base64.b32decode(word + "=" * (-len(word) % 8))[: -pairing.CHECK_BYTES]


def _certificate() -> bytes:
    """Of a device of shoal's, always the same one."""
    return CERTIFICATE.read_bytes()


def _encoded() -> str:
    return base64.b64encode(_certificate()).decode()


# --- files of a house


def _list(data: bytes) -> None:
    """Also as the head sends it to the other devices."""
    devices = check_devices(strict.decode(house._Listing, data).devices)
    assert all(len(key) == 64 for key in devices)


def _lists() -> tuple[bytes, ...]:
    other = base64.b64encode(b"another one").decode()
    devices = (PairedDevice("laptop", "head", _encoded()), PairedDevice("phone", "device", other))
    return (strict.encode(house._Listing(1, devices)),)


def _lasts() -> tuple[bytes, ...]:
    links = tuple(last_start._Link(*ends, LinkSpeed(1e-3, 1e7)) for ends in ((HEAD, 7), (7, HEAD)))
    return (strict.encode(last_start._Last(1, KEY, (7, 9), links)),)
