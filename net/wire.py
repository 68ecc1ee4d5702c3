"""The wire protocol without I/O: bytes in, messages out. A `WireProtocol` is the state of one end of a
connection.

    receive_data(data)   adds bytes that the transport read; b"" when the peer has closed its side
    next_message()       returns the next message, NEED_DATA, or CLOSED; raises errors of the peer
    send(message)        returns the buffers to write, in order; raises LocalProtocolError for errors of ours

A frame is a header of 12 bytes (magic, protocol version, type, length of the body; little-endian) and a body:
JSON for control messages, packed binary for rows, results and bulk data. The length is checked against the
limit of the type before the body is buffered, so a peer can make this process hold at most one frame.
"""

from __future__ import annotations

import struct
from enum import Enum, auto

from .errors import LocalProtocolError, MismatchError, NetError, RemoteProtocolError
from .message_table import BY_CODE, BY_KIND, Entry
from .messages import PROTOCOL, Hello, Message, Purpose
from .packed import Buffer, decode, encode

MAGIC = b"SHOL"
HEADER = struct.Struct("<4sHHI")


class Signal(Enum):
    """Returned by `next_message` when there is no message."""

    NEED_DATA = auto()
    CLOSED = auto()


NEED_DATA = Signal.NEED_DATA
CLOSED = Signal.CLOSED


class WireProtocol:
    """One end of a connection. `dialled` is True on the side that opened it, which says Hello first."""

    def __init__(self, dialled: bool) -> None:
        self._dialled = dialled
        self._buffer = bytearray()
        self._closed = False
        self._failure: NetError | None = None
        self._purpose: Purpose | None = None
        self._greeted = {"here": False, "there": False}

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Adds bytes that the transport read; b"" means that the peer will send no more."""
        if self._closed and data:
            raise LocalProtocolError("data was received after the end of the connection")
        if data:
            self._buffer += data
        else:
            self._closed = True

    @property
    def purpose(self) -> Purpose | None:
        """The purpose of the connection; None before a Hello has stated it."""
        return self._purpose

    @property
    def missing(self) -> int:
        """The bytes that the next frame lacks, after `next_message` has returned NEED_DATA; 0: not known."""
        if len(self._buffer) < HEADER.size:
            return 0
        size: int = HEADER.unpack_from(self._buffer)[3]
        return max(0, HEADER.size + size - len(self._buffer))

    def next_message(self) -> Message | Signal:
        """Returns the next message, or a Signal. MismatchError: the peer has another protocol version.
        RemoteProtocolError: anything else is wrong. After an error every call raises the same error."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._next()
        except NetError as error:
            self._failure = error
            self._buffer.clear()
            raise
        except ValueError as error:
            self._failure = RemoteProtocolError(str(error))
            self._buffer.clear()
            raise self._failure from error

    def send(self, message: Message) -> list[Buffer]:
        """Returns the frame of a message as buffers, which may share its memory. LocalProtocolError: the
        message is not allowed here, or its values are invalid."""
        entry = BY_KIND[type(message)]
        name = type(message).__name__
        if isinstance(message, Hello) == self._greeted["here"] and name != "Error":
            raise LocalProtocolError(f"{name} out of turn: Hello comes first, and once")
        if isinstance(message, Hello):
            self._agree(message)
        elif self._purpose is not None and self._purpose not in _allowed(entry, self._dialled):
            raise LocalProtocolError(f"this side may not send {name} on a {self._purpose} connection")
        try:
            body = encode(message)
        except (ValueError, struct.error) as error:
            raise LocalProtocolError(f"{name}: {error}") from error
        size = sum(len(part) for part in body)
        if size > entry.limit:
            raise LocalProtocolError(f"{name} has {size} bytes; the limit is {entry.limit}")
        if isinstance(message, Hello):
            self._greeted["here"] = True
        return [HEADER.pack(MAGIC, PROTOCOL, entry.code, size), *body]

    def _agree(self, hello: Hello) -> None:
        if self._purpose not in (None, hello.purpose):
            raise LocalProtocolError(f"Hello for {hello.purpose} answers one for {self._purpose}")
        self._purpose = hello.purpose

    def _next(self) -> Message | Signal:
        if len(self._buffer) < HEADER.size:
            if self._buffer and not MAGIC.startswith(bytes(self._buffer[: len(MAGIC)])):
                raise RemoteProtocolError("it does not speak shoal's protocol: check the port")
            return self._wait("a header")
        entry, size = self._header()
        if len(self._buffer) < HEADER.size + size:
            return self._wait(f"a frame of {HEADER.size + size} bytes ({entry.kind.__name__})")
        body = self._buffer[HEADER.size : HEADER.size + size]
        del self._buffer[: HEADER.size + size]
        message = decode(entry, body)
        if isinstance(message, Hello):
            if self._purpose not in (None, message.purpose):
                raise RemoteProtocolError(f"Hello for {message.purpose} answers one for {self._purpose}")
            self._purpose = message.purpose
            self._greeted["there"] = True
        return message

    def _wait(self, what: str) -> Signal:
        if not self._closed:
            return NEED_DATA
        if not self._buffer:
            return CLOSED
        raise RemoteProtocolError(f"the connection ended after {len(self._buffer)} bytes of {what}")

    def _header(self) -> tuple[Entry, int]:
        """Type and length of the next frame, checked before its body arrives."""
        magic, version, code, size = HEADER.unpack_from(self._buffer)
        if magic != MAGIC:
            raise RemoteProtocolError("it does not speak shoal's protocol: check the port")
        if version != PROTOCOL:
            older = "that device" if version < PROTOCOL else "this one"
            raise MismatchError(
                f"it speaks version {version} of shoal's protocol and this device {PROTOCOL}: upgrade shoal "
                f"on {older}"
            )
        entry = BY_CODE.get(code)
        if entry is None:
            raise RemoteProtocolError(f"it sent a frame of unknown type {code}")
        name = entry.kind.__name__
        if size > entry.limit:
            raise RemoteProtocolError(
                f"it announced a {name} of {size} bytes; the limit is {entry.limit}, so none of it was read"
            )
        if (entry.kind is Hello) == self._greeted["there"] and name != "Error":
            raise RemoteProtocolError(f"it sent {name} out of turn: Hello comes first, and once")
        if (
            self._purpose is not None
            and entry.kind is not Hello
            and self._purpose not in _allowed(entry, not self._dialled)
        ):
            raise RemoteProtocolError(f"it sent {name} on a {self._purpose} connection")
        return entry, size


def _allowed(entry: Entry, from_dialler: bool) -> frozenset[Purpose]:
    return entry.down if from_dialler else entry.up
