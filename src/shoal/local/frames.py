"""What is said on the head's socket: a frozen dataclass for each message, and their frames.

A frame is a header of 12 bytes (magic, version, type, length of the body; little-endian) and a body of JSON,
decoded strictly. Token ids and rows are base64 of little-endian u32 and f32 in it, since a list of a hundred
thousand numbers takes as long to decode as some tokens to compute. The length is checked against the limit of
the type before the body is read.

The server says Welcome first. Then the client asks, each request under a number of its own, and what comes of
it has the same number; it ends with an End, also after a Stop. A Fault ends the connection.
"""

from __future__ import annotations

import socket
import struct
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np

from ..engine import strict
from ..engine.arrays import F32
from ..engine.batch import MOST_REPORTED, Logprobs, Sampling, Want
from ..engine.batch import Result as Read
from ..engine.errors import OperatingSystemError, ShoalError
from ..engine.strict import Between, Printable
from ..grammars import MOST_BYTES
from ..net.errors import TEXT_LIMIT, MismatchError, RemoteProtocolError, error_of, printable
from ..status import Status

MAGIC, VERSION = b"SHLC", 2
HEADER = struct.Struct("<4sHHI")
SMALL, LARGE = 64 * 1024, 16 * 1024 * 1024
ROWS_BYTES = 4 * 1024 * 1024
"""Rows of one Part take at most so many bytes, unless one alone is larger."""
MOST_REQUESTS = 4096
"""The most requests of a connection that have not ended."""
_PIECE = 64 * 1024

Number = Annotated[int, Between(0, (1 << 53) - 1)]
Count = Annotated[int, Between(0, (1 << 31) - 1)]
Positive = Annotated[int, Between(1, (1 << 31) - 1)]
Ids = Annotated[str, Printable(0, LARGE)]
"""u32 in base64."""
Reported = Annotated[int, Between(0, MOST_REPORTED)]
Wanted = Literal["tokens", "scores", "rows"]
WANTS: dict[Wanted, Want] = {"tokens": Want.TOKENS, "scores": Want.SCORES, "rows": Want.ROWS}


@dataclass(frozen=True, slots=True)
class Welcome:
    """The head: its process id and its version of shoal, the port on which it waits for devices (0: it does
    not), the directory and the hash of its model, and the context length of its plan; 0: it has none yet."""

    pid: Count
    shoal: Annotated[str, Printable(1, 64)]
    port: Annotated[int, Between(0, 65535)]
    model: Annotated[str, Printable(1, 4096)]
    hash: Annotated[str, Printable(1, 128)]
    context: Count


@dataclass(frozen=True, slots=True)
class Fault:
    """Why the server ends the connection: as End."""

    code: Annotated[int, Between(0, 255)]
    text: Annotated[str, Printable(0, TEXT_LIMIT)]


@dataclass(frozen=True, slots=True)
class Begin:
    """A request for an answer, as answering.Engine.begin, or of an open session. `grammar`: what the answer
    must be (shoal.grammars), in base64 of UTF-8; sessions have none."""

    request: Number
    prompt: Ids = field(repr=False)
    sampling: Sampling
    context: Positive
    max_tokens: Count | None
    end: Ids
    report: Reported | None
    session: Number | None
    grammar: Annotated[str, Printable(0, 2 * MOST_BYTES)] | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reading:
    """A request to read a text, as answering.Engine.read."""

    request: Number
    tokens: Ids = field(repr=False)
    first: Count
    want: Wanted
    context: Positive
    report: Reported | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends a request early; `keep` as in answering.Stop. One that has ended is none any more."""

    request: Number
    keep: bool


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Opens a session, as answering.Engine.session."""

    session: Number
    sampling: Sampling
    context: Positive


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Ends a session and frees its state."""

    session: Number


@dataclass(frozen=True, slots=True)
class GetStatus:
    """A request for the Status, which ends with it."""

    request: Number


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of an answer, what is reported of it, and the positions of the prompt that were not
    computed, where that is known."""

    request: Number
    token: Count
    logprobs: tuple[Logprobs, ...]
    cached: Count | None


@dataclass(frozen=True, slots=True)
class Part:
    """The next rows of a reading, as engine.batch.Result."""

    request: Number
    first: Count
    rows: Positive
    tokens: Ids = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    output: Ids | None = field(repr=False)
    logprobs: tuple[Logprobs, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class StatusReply:
    """The answer to GetStatus, which ends the request."""

    request: Number
    status: Status


@dataclass(frozen=True, slots=True)
class End:
    """The end of a request. `code` None: it is complete, or was stopped; 0: a value was wrong (ValueError);
    else the exit code of the error that has ended it."""

    request: Number
    code: Annotated[int, Between(0, 255)] | None
    text: Annotated[str, Printable(0, TEXT_LIMIT)]


Request = Begin | Reading | Stop | OpenSession | CloseSession | GetStatus
Reply = Welcome | Fault | Token | Part | StatusReply | End
Message = Request | Reply
_KINDS: dict[int, tuple[type[Message], int]] = {
    1: (Begin, LARGE), 2: (Reading, LARGE), 3: (Stop, SMALL), 4: (OpenSession, SMALL),
    5: (CloseSession, SMALL), 6: (GetStatus, SMALL),
    32: (Welcome, SMALL), 33: (Fault, SMALL), 34: (Token, SMALL), 35: (Part, LARGE), 36: (StatusReply, LARGE),
    37: (End, SMALL),
}  # fmt: skip
_CODES = {kind: (code, limit) for code, (kind, limit) in _KINDS.items()}


def frame(message: Message) -> bytes:
    """The frame of a message. ValueError: a value is out of range, or there is too much of it."""
    code, limit = _CODES[type(message)]
    if isinstance(message, Token) and not message.logprobs:  # of which there are many
        cached = "null" if message.cached is None else message.cached
        text = f'{{"request":{message.request},"token":{message.token},"logprobs":[],"cached":{cached}}}'
        body = text.encode("ascii")
    else:
        body = strict.encode(message)
    if len(body) > limit:
        raise ValueError(f"{type(message).__name__} has {len(body)} bytes; the limit is {limit}")
    return HEADER.pack(MAGIC, VERSION, code, len(body)) + body


def receive(stream: socket.socket, *, requests: bool) -> Message | None:
    """The next message, which is a request or a reply; None where the stream ends. RemoteProtocolError: what
    arrives is none. MismatchError: the other process speaks another version."""
    head = _exactly(stream, HEADER.size)
    if head is None:
        return None
    kind, size = announced(head, requests=requests)
    body = _exactly(stream, size)
    return None if body is None else decoded(kind, body)


def announced(head: bytes | bytearray, *, requests: bool) -> tuple[type[Message], int]:
    """The type of a message and the size of its body, by its header. Errors as for `receive`."""
    magic, version, code, size = HEADER.unpack(head)
    if magic != MAGIC:
        raise RemoteProtocolError("the process at the head's socket does not speak shoal's protocol")
    if version != VERSION:
        raise MismatchError(
            f"the processes at the head's socket speak its versions {version} and {VERSION}: restart `shoal "
            "up` after an update"
        )
    kind, limit = _KINDS.get(code, (None, 0))
    if kind is None or (code < 32) != requests or size > limit:
        raise RemoteProtocolError(f"a frame of type {code} with {size} bytes is not expected there")
    return kind, size


def decoded(kind: type[Message], body: bytes | bytearray) -> Message:
    """The message of a body. RemoteProtocolError: it is not of that kind."""
    try:
        return strict.decode(kind, body)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from error


def _exactly(stream: socket.socket, size: int) -> bytearray | None:
    """So many bytes; None if the stream ends before."""
    data = bytearray()
    while len(data) < size:
        piece = stream.recv(min(size - len(data), _PIECE))
        if not piece:
            return None
        data += piece
    return data


def packed(tokens: Sequence[int]) -> str:
    """Token ids as they are sent. ValueError: one is no u32."""
    try:
        return b64encode(np.array(tokens, "<u4").tobytes()).decode("ascii")
    except (OverflowError, TypeError) as error:
        raise ValueError(f"a token id is not between 0 and {(1 << 32) - 1}") from error


def unpacked(ids: str) -> list[int]:
    """The token ids that `packed` was given. ValueError: this is not base64 of u32."""
    found: list[int] = np.frombuffer(b64decode(ids, validate=True), "<u4").tolist()
    return found


def packed_text(text: str) -> str:
    """A text as it is sent."""
    return b64encode(text.encode()).decode("ascii")


def unpacked_text(text: str) -> str:
    """The text that `packed_text` was given. ValueError: this is not base64 of UTF-8."""
    return b64decode(text, validate=True).decode()


def parts_of(request: int, result: Read) -> list[Part]:
    """A result of a reading, in messages of a limited size."""
    output = result.output
    rows = result.rows if output is None else max(1, ROWS_BYTES // max(1, output[0].nbytes))
    return [_part(request, result, at, min(at + rows, result.rows)) for at in range(0, result.rows, rows)]


def _part(request: int, result: Read, at: int, until: int) -> Part:
    output = result.output
    rows = None if output is None else b64encode(output[at:until].astype("<f4").tobytes()).decode("ascii")
    return Part(
        request,
        result.first + at,
        until - at,
        packed(result.tokens[at:until]),
        result.scores[at:until],
        rows,
        result.logprobs[at:until],
    )


def result_of(part: Part) -> Read:
    """The result of a reading that a Part has. ValueError: its rows are not those that it announces."""
    output: F32 | None = None
    if part.output is not None:
        values = np.frombuffer(b64decode(part.output, validate=True), "<f4").astype(np.float32)
        output = values.reshape(part.rows, -1)
    tokens = tuple(unpacked(part.tokens))
    for found in (tokens, part.scores, part.logprobs):
        if len(found) not in (0, part.rows):
            raise ValueError(f"a part of {part.rows} rows has results of {len(found)}")
    return Read(
        0, part.first, part.rows, output=output, tokens=tokens, scores=part.scores, logprobs=part.logprobs
    )


def end_of(request: int, error: Exception | None) -> End:
    """The end of a request, with its error."""
    return End(request, *((None, "") if error is None else told(error)))


def told(error: Exception) -> tuple[int, str]:
    """The code and the text of an error."""
    if isinstance(error, ShoalError):
        return error.exit_code, printable(str(error), TEXT_LIMIT)
    if isinstance(error, ValueError):
        return 0, printable(str(error), TEXT_LIMIT)
    if isinstance(error, MemoryError):
        return OperatingSystemError.exit_code, "the head has no memory for this: end other requests"
    return ShoalError.exit_code, printable(f"the head failed: {type(error).__name__}: {error}", TEXT_LIMIT)


def raised_by(end: End | Fault) -> Exception | None:
    """The error that has ended a request or a connection, as in the other process."""
    if end.code is None:
        return None
    return ValueError(end.text) if end.code == 0 else error_of(end.code, end.text)
