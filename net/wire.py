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

import numpy as np

from ..engine import strict
from ..engine.batch import Want
from .errors import LocalProtocolError, MismatchError, NetError, RemoteProtocolError
from .messages import (
    BY_CODE,
    BY_KIND,
    PROTOCOL,
    STEP_LIMIT,
    Data,
    Entry,
    Epoch,
    Hello,
    Message,
    Pages,
    Purpose,
    Result,
    Step,
)

MAGIC = b"SHOL"
HEADER = struct.Struct("<4sHHI")
MAX_ROWS = 4096
MAX_COLS = 1 << 16
MAX_POSITION = 1 << 31
MAX_UNITS = 1 << 16

_STEP = struct.Struct("<QQIIIBBHIHH")
"""session, epoch (coordinator, counter), first, rows, want, more, 0, cols, part (enter, until; 0, 0: none)"""
_RESULT = struct.Struct("<QQIIIi")  # session, epoch (coordinator, counter), first, rows, token or -1
_PAGES = struct.Struct("<QQIIII")  # session, epoch (coordinator, counter), unit, first, last
_NO_TOKEN = -1


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

    def send(self, message: Message) -> list[bytes]:
        """Returns the frame of a message as buffers. LocalProtocolError: the message is not allowed here, or
        its values are invalid."""
        entry = BY_KIND[type(message)]
        name = type(message).__name__
        if isinstance(message, Hello) == self._greeted["here"] and name != "Error":
            raise LocalProtocolError(f"{name} out of turn: Hello comes first, and once")
        if isinstance(message, Hello):
            self._agree(message)
        elif self._purpose is not None and self._purpose not in _allowed(entry, self._dialled):
            raise LocalProtocolError(f"this side may not send {name} on a {self._purpose} connection")
        try:
            body = _encode(message)
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
        message = _decode(entry, body)
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
            raise MismatchError(
                f"it speaks protocol version {version} and this process {PROTOCOL}: "
                "install the same shoal on both"
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


def max_step_rows(cols: int) -> int:
    """The most rows with that many f32 columns that fit into one Step."""
    return min(MAX_ROWS, (STEP_LIMIT - _STEP.size) // (4 + 4 * cols))


def _encode(message: Message) -> list[bytes]:
    match message:
        case Step():
            return _encode_step(message)
        case Result():
            token = _NO_TOKEN if message.token is None else message.token
            epoch = message.epoch
            body = (message.session, epoch.coordinator, epoch.counter, message.first, message.rows, token)
            return [_RESULT.pack(*body)]
        case Data():
            return [bytes(message.size)]
        case Pages():
            _check_pages(message.unit, message.first, message.last)
            epoch = message.epoch
            where = message.session, epoch.coordinator, epoch.counter, message.unit
            return [_PAGES.pack(*where, message.first, message.last), bytes(message.data)]
        case _:
            return [strict.encode(message)]


def _encode_step(step: Step) -> list[bytes]:
    rows, cols = len(step.tokens), 0 if step.hidden is None else step.hidden.shape[1]
    if step.hidden is not None and step.hidden.shape != (rows, cols):
        raise ValueError(f"a Step with {rows} tokens has hidden rows of shape {step.hidden.shape}")
    _check_run(step.first, rows, int(step.want), cols)
    epoch = step.epoch
    where = step.session, epoch.coordinator, epoch.counter, step.first, rows
    _check_part(step.part)
    fixed = _STEP.pack(*where, int(step.want), int(step.more), 0, cols, *(step.part or (0, 0)))
    tokens = struct.pack(f"<{rows}i", *step.tokens)
    # tobytes copies, since the stage may reuse its buffer before this is written.
    hidden = b"" if step.hidden is None else step.hidden.astype("<f4", copy=False).tobytes()
    return [fixed + tokens, hidden]


def _decode(entry: Entry, body: bytearray) -> Message:
    """Decodes the body of a frame. ValueError: it is invalid."""
    if entry.kind is Step:
        return _decode_step(body)
    if entry.kind is Result:
        return _decode_result(body)
    if entry.kind is Data:
        return Data(len(body))
    if entry.kind is Pages:
        return _decode_pages(body)
    return strict.decode(entry.kind, body)


def _decode_step(body: bytearray) -> Step:
    if len(body) < _STEP.size:
        raise ValueError(f"a Step has {len(body)} bytes, fewer than the {_STEP.size} of its fixed part")
    session, coordinator, counter, first, rows, want, more, zero, cols, *part = _STEP.unpack_from(body)
    _check_run(first, rows, want, cols)
    if more > 1 or zero:
        raise ValueError(f"more = {more} is neither 0 nor 1" if more > 1 else f"a field is {zero}, not 0")
    units = (part[0], part[1]) if any(part) else None
    _check_part(units)
    size = _STEP.size + 4 * rows + 4 * rows * cols
    if len(body) != size:
        raise ValueError(f"a Step of {rows} rows and {cols} columns has {len(body)} bytes, not {size}")
    tokens = np.frombuffer(body, "<i4", rows, _STEP.size)
    if tokens.min() < 0:
        raise ValueError(f"a Step holds the token id {tokens.min()}")
    # The copy is aligned and writable, as the C library requires.
    hidden = np.frombuffer(body, "<f4", rows * cols, _STEP.size + 4 * rows).astype(np.float32)
    return Step(
        session,
        Epoch(coordinator, counter),
        first,
        tuple(tokens.tolist()),
        Want(want),
        hidden.reshape(rows, cols) if cols else None,
        bool(more),
        units,
    )


def _decode_result(body: bytearray) -> Result:
    if len(body) != _RESULT.size:
        raise ValueError(f"a Result has {len(body)} bytes, not {_RESULT.size}")
    session, coordinator, counter, first, rows, token = _RESULT.unpack(body)
    _check_run(first, rows, 0, 0)
    if token < _NO_TOKEN:
        raise ValueError(f"a Result holds the token id {token}")
    return Result(session, Epoch(coordinator, counter), first, rows, None if token == _NO_TOKEN else token)


def _decode_pages(body: bytearray) -> Pages:
    if len(body) < _PAGES.size:
        raise ValueError(f"Pages have {len(body)} bytes, fewer than the {_PAGES.size} of their fixed part")
    session, coordinator, counter, unit, first, last = _PAGES.unpack_from(body)
    _check_pages(unit, first, last)
    data = memoryview(body).toreadonly()[_PAGES.size :]  # the body belongs to this message
    return Pages(session, Epoch(coordinator, counter), unit, first, last, data)


def _check_pages(unit: int, first: int, last: int) -> None:
    if not 0 <= first < last <= MAX_POSITION or unit > MAX_UNITS:
        raise ValueError(f"positions [{first}, {last}) of unit {unit} are out of range")


def _check_part(part: tuple[int, int] | None) -> None:
    if part is not None and not 0 <= part[0] < part[1] < MAX_UNITS:
        raise ValueError(f"units [{part[0]}, {part[1]}) are no part of a chain")


def _check_run(first: int, rows: int, want: int, cols: int) -> None:
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{rows} rows are out of range: 1 to {MAX_ROWS}")
    if not 0 <= first <= MAX_POSITION - rows:
        raise ValueError(f"position {first} is out of range")
    if want not in (Want.NOTHING, Want.TOKEN):
        raise ValueError(f"want = {want} is neither {int(Want.NOTHING)} nor {int(Want.TOKEN)}")
    if not 0 <= cols <= MAX_COLS:
        raise ValueError(f"{cols} columns are more than {MAX_COLS}")
