"""What a device says on the port of its house's head, without I/O.

A device of the house connects with TLS and says in one frame what it wants:

    Announce    "I wait on this connection": the head keeps it, and uses it as if it had dialled the node
    Relay       a connection to another node of the house, for which the head passes bytes in both directions
    GetModel    what the head's model consists of

On a connection that waits, the head sends Alive every second, and the node sends it back. Take ends the
wait: the node answers Ready, and what follows are messages (net/wire.py), of which the head says Hello first.
Take names the device from which they come: the head itself, or the one that has asked for a Relay. Ready
names the device that answers.

A frame is a header (magic, kind, length of the body; little-endian) and a body in JSON. The magic is not that
of messages, so neither is mistaken for the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

from ..engine import strict
from ..engine.errors import ShoalError
from ..engine.strict import Between, Printable
from .errors import RemoteProtocolError, error_of, to_wire
from .messages import U64, Address, Name, Text

MAGIC = b"SHOR"
HEADER = struct.Struct("<4sBI")
LIMIT = 8 * 1024
"""The most bytes of a body."""
SILENT_SECONDS = 3.0
"""After which silence a connection that waits is given up, by both sides."""
INWARD = ".shoal"
"""How the host names of nodes end that listen nowhere: they are known to the head, and to no name server."""


def inward(device: int) -> str:
    """The host name of the nodes of a device (members.device_of), for a Relay."""
    return f"{device:08x}{INWARD}"


Key = Annotated[str, Printable(64, 64)]
"""The SHA-256 of a device's certificate, in hex."""


@dataclass(frozen=True, slots=True)
class Announce:
    """A node waits on this connection. `incarnation` is its process, and `model` the hash of its model. It
    also listens on `port`; 0: nowhere. `anew`: its older connections may be dead, since it was asleep or its
    network has changed."""

    name: Name
    incarnation: U64
    port: Annotated[int, Between(0, 65535)]
    model: Key
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Relay:
    """Connect me to the node at this address, as the coordinator has told it."""

    address: Address


@dataclass(frozen=True, slots=True)
class GetModel:
    """Tell me the model."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The other side should answer with the same."""


@dataclass(frozen=True, slots=True)
class Take:
    """The connection is used from now on, by this device."""

    device: Key


@dataclass(frozen=True, slots=True)
class Ready:
    """Messages may follow, for this device."""

    device: Key


@dataclass(frozen=True, slots=True)
class Refused:
    """The reason why the connection ends: the exit code of an error, and its text."""

    code: Annotated[int, Between(0, 255)]
    text: Text

    @classmethod
    def of(cls, error: Exception) -> Refused:
        """The refusal for an error."""
        return cls(*to_wire(error))

    def error(self, who: str) -> ShoalError:
        """The error to raise for it."""
        return error_of(self.code, f"{who}: {self.text}")


Frame = Announce | Relay | GetModel | Alive | Take | Ready | Refused
KINDS: tuple[type[Frame], ...] = (Announce, Relay, GetModel, Alive, Take, Ready, Refused)


def encode(frame: Frame) -> bytes:
    """The bytes of a frame."""
    body = strict.encode(frame)
    return HEADER.pack(MAGIC, KINDS.index(type(frame)), len(body)) + body


def decode(data: bytes) -> tuple[Frame, int] | None:
    """The first frame of the data and the number of its bytes; None: it has not arrived completely.
    RemoteProtocolError: it is none."""
    if not data.startswith(MAGIC[: len(data)]):
        raise RemoteProtocolError("it does not speak the protocol of the port for devices of a house")
    if len(data) < HEADER.size:
        return None
    _, code, size = HEADER.unpack_from(data)
    if code >= len(KINDS) or size > LIMIT:
        raise RemoteProtocolError(f"it announced a frame of kind {code} with {size} bytes")
    if len(data) < HEADER.size + size:
        return None
    try:
        return strict.decode(KINDS[code], data[HEADER.size : HEADER.size + size]), HEADER.size + size
    except ValueError as error:
        raise RemoteProtocolError(f"it sent an invalid {KINDS[code].__name__}: {error}") from error
