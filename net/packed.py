"""The bodies of frames: packed for rows, results, token ids, masks, bulk data and files, JSON for all others
(engine/strict.py). docs/protocol.md has the layouts. What arrives is checked before it is used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine import strict
from ..engine.batch import MOST_REPORTED, Logprobs, Want
from .message_table import Entry
from .messages import (
    FILE_BYTES,
    MOST_TOKENS,
    MOST_WANTED,
    STEP_LIMIT,
    Data,
    Epoch,
    FileBytes,
    Mask,
    Message,
    Pages,
    Result,
    Rows,
    Step,
    Sums,
    Tokens,
)
from .tags import counted

MAX_ROWS = 4096
MAX_COLS = 1 << 16
MAX_POSITION = 1 << 31
MAX_UNITS = 1 << 16

_STEP = struct.Struct("<QQIIIBBBBIHHI")
"""session, epoch (coordinator, counter), first, rows, want, more, report (0: none, else 1 + the number of
likeliest), masked, cols (0: token ids), part (enter, until; 0, 0: none), told"""
_RESULT = struct.Struct("<QQIIIiBB")
"""session, epoch (coordinator, counter), first, rows, token or -1, what, report as in a Step"""
_ROWS = struct.Struct("<QQIIII")  # session, epoch (coordinator, counter), first, rows, cols
_MASK = struct.Struct("<QQII")  # session, epoch (coordinator, counter), number
_TOKENS = struct.Struct("<QQIIII")  # session, epoch (coordinator, counter), number, first, count
_PAGES = struct.Struct("<QQIIII")  # session, epoch (coordinator, counter), unit, first, last
_FILE = struct.Struct("<QB")  # first, busy
_SUM = 32  # bytes of a SHA-256
_NO_TOKEN = -1


def max_step_rows(cols: int) -> int:
    """The most rows with that many f32 columns that fit into one Step."""
    # 64 rows have a tag of 8 bytes, and a Step may have one more.
    return min(MAX_ROWS, (STEP_LIMIT - _STEP.size - 8) * 8 // (32 * max(1, cols) + 1))


Buffer = bytes | memoryview


def encode(message: Message) -> list[Buffer]:
    """The body of a message, in parts, which may share the message's memory. ValueError or struct.error: its
    values are invalid."""
    match message:
        case Step():
            return _encode_step(message)
        case Result():
            return _encode_result(message)
        case Rows():
            rows, cols = message.output.shape
            _check_run(message.first, rows, cols)
            fixed = _ROWS.pack(*_where(message), message.first, rows, cols)
            return [fixed, _floats(message.output)]
        case Mask():
            return [_MASK.pack(*_where(message), message.number), message.bits]
        case Tokens():
            return _encode_tokens(message)
        case Data():
            return [bytes(message.size)]
        case Pages():
            _check_pages(message.unit, message.first, message.last)
            fixed = _PAGES.pack(*_where(message), message.unit, message.first, message.last)
            return [fixed, bytes(message.data)]
        case FileBytes():
            return [_FILE.pack(message.first, message.busy), bytes(message.data)]
        case Sums():
            name = message.name.encode()
            return [bytes([len(name)]), name, message.sums]
        case _:
            return [strict.encode(message)]


def decode(entry: Entry, body: bytearray) -> Message:
    """Decodes the body of a frame. ValueError: it is invalid."""
    packed = _DECODERS.get(entry.kind)
    return strict.decode(entry.kind, body) if packed is None else packed(body)


def _where(message: Step | Result | Rows | Mask | Tokens | Pages) -> tuple[int, int, int]:
    return message.session, message.epoch.coordinator, message.epoch.counter


# Steps


def _encode_step(step: Step) -> list[Buffer]:
    rows, cols = step.rows, 0 if step.hidden is None else step.hidden.shape[1]
    if step.hidden is not None and (step.tokens or not cols):
        raise ValueError(f"a Step has {len(step.tokens)} token ids beside hidden rows of {cols} columns")
    _check_run(step.first, rows, cols)
    _check_part(step.part)
    report = 0 if step.report is None else 1 + step.report
    _check_want(step.want, rows, report, step.masked, step.told, step.part)
    count = counted(step.first, step.first + rows)
    if len(step.tags) != count:
        raise ValueError(f"a Step of {rows} rows from {step.first} has {len(step.tags)} tags, not {count}")
    fixed = _STEP.pack(
        *(*_where(step), step.first, rows, step.want, step.more, report, step.masked),
        *(cols, *(step.part or (0, 0)), step.told),
    )
    fixed += struct.pack(f"<{count}Q", *step.tags)
    if step.hidden is None:
        return [fixed + struct.pack(f"<{rows}i", *step.tokens)]
    return [fixed, _floats(step.hidden)]


def _floats(rows: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(rows, "<f4").data.cast("B")


def _decode_step(body: bytearray) -> Step:
    _check_fixed("a Step", body, _STEP)
    session, coordinator, counter, first, rows, want, more, report, masked, cols, *rest = _STEP.unpack_from(
        body
    )
    enter, until, told = rest
    _check_run(first, rows, cols)
    if more > 1 or masked > 1:
        raise ValueError(f"more = {more} and masked = {masked} are not both 0 or 1")
    units = (enter, until) if enter or until else None
    _check_part(units)
    _check_want(want, rows, report, masked, told, units)
    count = counted(first, first + rows)
    at = _STEP.size + 8 * count
    size = at + 4 * rows * (cols or 1)
    if len(body) != size:
        raise ValueError(f"a Step of {rows} rows and {cols} columns has {len(body)} bytes, not {size}")
    tokens: tuple[int, ...] = ()
    hidden = None
    if cols:
        # The C library requires aligned rows. They usually are, and the body is of this message alone.
        hidden = np.require(np.frombuffer(body, "<f4", rows * cols, at).reshape(rows, cols), np.float32, "A")
    else:
        tokens = tuple(_ids("a Step", body, rows, at))
    return Step(
        session,
        Epoch(coordinator, counter),
        first,
        tokens,
        Want(want),
        hidden,
        bool(more),
        units,
        report - 1 if report else None,
        told,
        bool(masked),
        struct.unpack_from(f"<{count}Q", body, _STEP.size),
    )


def _check_want(
    want: int, rows: int, report: int, masked: int, told: int, part: tuple[int, int] | None
) -> None:
    if want in (Want.NOTHING, Want.TOKEN) and not report and not masked and not told:
        return
    if want not in set(Want) or want == Want.LOGITS:
        raise ValueError(f"want = {want} is not wanted over a network")
    if Want(want).every_row and (rows > MOST_WANTED or part is not None):
        raise ValueError(f"{rows} rows want something each, more than {MOST_WANTED}, or rows of a part do")
    if report > 1 + MOST_REPORTED or (report and want in (Want.NOTHING, Want.ROWS)):
        raise ValueError(f"want = {want} with log-probabilities of {report - 1} tokens")
    if told and want in (Want.NOTHING, Want.ROWS):
        raise ValueError(f"want = {want}, and the last node was told {told} things")
    if masked and (want != Want.TOKEN or not told):
        raise ValueError(f"want = {want} with a mask, which is number {told} of what the last node was told")


# Results


def _encode_result(result: Result) -> list[Buffer]:
    rows, what = result.rows, Want.NOTHING
    if result.tokens:
        what = Want.TOKENS
    elif result.scores:
        what = Want.SCORES
    elif result.token is not None:
        what = Want.TOKEN
    token = _NO_TOKEN if result.token is None else result.token
    report = 1 + len(result.logprobs[0].likeliest) if result.logprobs else 0
    fixed = _RESULT.pack(*_where(result), result.first, rows, token, what, report)
    if what in (Want.NOTHING, Want.TOKEN) and not report:
        return [fixed]
    tokens = struct.pack(f"<{len(result.tokens)}i", *result.tokens)
    scores = struct.pack(f"<{len(result.scores)}f", *result.scores)
    likeliest = [pair for told in result.logprobs for pair in told.likeliest]
    return [
        fixed + tokens + scores,
        struct.pack(f"<{len(result.logprobs)}f", *(told.drawn for told in result.logprobs)),
        struct.pack(f"<{len(likeliest)}i", *(token for token, _ in likeliest)),
        struct.pack(f"<{len(likeliest)}f", *(value for _, value in likeliest)),
    ]


def _decode_result(body: bytearray) -> Result:
    _check_fixed("a Result", body, _RESULT)
    session, coordinator, counter, first, rows, token, what, report = _RESULT.unpack_from(body)
    _check_run(first, rows, 0)
    if token < _NO_TOKEN or (token != _NO_TOKEN) != (what == Want.TOKEN):
        raise ValueError(f"a Result holds the token id {token}, and what = {what}")
    if what not in (Want.NOTHING, Want.TOKEN, Want.TOKENS, Want.SCORES):
        raise ValueError(f"a Result with what = {what}")
    if report > 1 + MOST_REPORTED or (report and what == Want.NOTHING):
        raise ValueError(f"a Result of what = {what} has log-probabilities of {report - 1} tokens")
    many = rows if what in (Want.TOKENS, Want.SCORES) else 0
    told = (many or 1) if report else 0
    size = _RESULT.size + 4 * (many + told + 2 * told * (report - 1 if report else 0))
    if len(body) != size:
        raise ValueError(f"a Result has {len(body)} bytes, not {size}")
    where = session, Epoch(coordinator, counter), first, rows, None if token == _NO_TOKEN else token
    if size == _RESULT.size:
        return Result(*where)
    ids = _ids("a Result", body, many, _RESULT.size) if what == Want.TOKENS else []
    scores = _values(body, many, _RESULT.size) if what == Want.SCORES else []
    logprobs = _decode_logprobs(body, _RESULT.size + 4 * many, told, report - 1) if report else ()
    return Result(*where, tuple(ids), tuple(scores), logprobs)


def _decode_logprobs(body: bytearray, at: int, told: int, count: int) -> tuple[Logprobs, ...]:
    own = _values(body, told, at)
    ids = _ids("a Result", body, told * count, at + 4 * told)
    values = _values(body, told * count, at + 4 * told + 4 * told * count)
    pairs = list(zip(ids, values, strict=True))
    return tuple(Logprobs(own[i], tuple(pairs[i * count : (i + 1) * count])) for i in range(told))


def _ids(what: str, body: bytearray, count: int, at: int) -> list[int]:
    ids: NDArray[np.int32] = np.frombuffer(body, "<i4", count, at)
    if count and ids.min() < 0:
        raise ValueError(f"{what} holds the token id {ids.min()}")
    found: list[int] = ids.tolist()
    return found


def _values(body: bytearray, count: int, at: int) -> list[float]:
    values: NDArray[np.float32] = np.frombuffer(body, "<f4", count, at)
    if not np.isfinite(values).all():
        raise ValueError("a Result holds NaN or infinity")
    found: list[float] = values.tolist()
    return found


def _decode_rows(body: bytearray) -> Rows:
    _check_fixed("Rows", body, _ROWS)
    session, coordinator, counter, first, rows, cols = _ROWS.unpack_from(body)
    _check_run(first, rows, cols)
    size = _ROWS.size + 4 * rows * cols
    if rows > MOST_WANTED or not cols or len(body) != size:
        raise ValueError(f"Rows of {rows} rows and {cols} columns have {len(body)} bytes, not {size}")
    output = np.frombuffer(body, "<f4", rows * cols, _ROWS.size).astype(np.float32).reshape(rows, cols)
    if not np.isfinite(output).all():
        raise ValueError("Rows hold NaN or infinity")
    return Rows(session, Epoch(coordinator, counter), first, output)


# What the last node is told, bulk data


def _encode_tokens(tokens: Tokens) -> list[Buffer]:
    count = len(tokens.tokens)
    _check_told(tokens.number, tokens.first, count)
    fixed = _TOKENS.pack(*_where(tokens), tokens.number, tokens.first, count)
    return [fixed, struct.pack(f"<{count}i", *tokens.tokens)]


def _decode_tokens(body: bytearray) -> Tokens:
    _check_fixed("Tokens", body, _TOKENS)
    session, coordinator, counter, number, first, count = _TOKENS.unpack_from(body)
    _check_told(number, first, count)
    if len(body) != _TOKENS.size + 4 * count:
        raise ValueError(f"{count} Tokens have {len(body)} bytes, not {_TOKENS.size + 4 * count}")
    ids = tuple(_ids("Tokens", body, count, _TOKENS.size))
    return Tokens(session, Epoch(coordinator, counter), number, first, ids)


def _check_told(number: int, first: int, count: int) -> None:
    if not number or not 1 <= count <= MOST_TOKENS or first > MAX_POSITION - count:
        raise ValueError(f"Tokens with the number {number}: {count} from position {first}")


def _decode_mask(body: bytearray) -> Mask:
    _check_fixed("a Mask", body, _MASK)
    session, coordinator, counter, number = _MASK.unpack_from(body)
    if not number or len(body) == _MASK.size:
        raise ValueError(f"a Mask with the number {number} has {len(body) - _MASK.size} bytes of bits")
    return Mask(session, Epoch(coordinator, counter), number, bytes(body[_MASK.size :]))


def _decode_data(body: bytearray) -> Data:
    return Data(len(body))


def _decode_pages(body: bytearray) -> Pages:
    _check_fixed("Pages", body, _PAGES)
    session, coordinator, counter, unit, first, last = _PAGES.unpack_from(body)
    _check_pages(unit, first, last)
    data = memoryview(body).toreadonly()[_PAGES.size :]  # the body belongs to this message
    return Pages(session, Epoch(coordinator, counter), unit, first, last, data)


def _decode_file(body: bytearray) -> FileBytes:
    _check_fixed("FileBytes", body, _FILE)
    first, busy = _FILE.unpack_from(body)
    if busy > 1 or not 0 < len(body) - _FILE.size <= FILE_BYTES:
        raise ValueError(f"FileBytes with busy = {busy} have {len(body) - _FILE.size} bytes of a file")
    return FileBytes(first, bool(busy), memoryview(body).toreadonly()[_FILE.size :])


def _decode_sums(body: bytearray) -> Sums:
    at = 1 + body[0] if body else 1
    if len(body) < at or (len(body) - at) % _SUM:
        raise ValueError(f"Sums of {len(body)} bytes have not a name and {_SUM} for each piece")
    name = body[1:at].decode()
    if not 0 < len(name) <= 100 or not name.isprintable():
        raise ValueError("Sums have a name that is no file's")
    return Sums(name, bytes(body[at:]))


_DECODERS: dict[type[Any], Callable[[bytearray], Message]] = {
    Step: _decode_step,
    Result: _decode_result,
    Rows: _decode_rows,
    Mask: _decode_mask,
    Tokens: _decode_tokens,
    Data: _decode_data,
    Pages: _decode_pages,
    FileBytes: _decode_file,
    Sums: _decode_sums,
}


def _check_fixed(what: str, body: bytearray, fixed: struct.Struct) -> None:
    if len(body) < fixed.size:
        raise ValueError(f"{what} of {len(body)} bytes: the fixed part alone has {fixed.size}")


def _check_pages(unit: int, first: int, last: int) -> None:
    if not 0 <= first < last <= MAX_POSITION or unit > MAX_UNITS:
        raise ValueError(f"positions [{first}, {last}) of unit {unit} are out of range")


def _check_part(part: tuple[int, int] | None) -> None:
    if part is not None and not 0 <= part[0] < part[1] < MAX_UNITS:
        raise ValueError(f"units [{part[0]}, {part[1]}) are no part of a chain")


def _check_run(first: int, rows: int, cols: int) -> None:
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{rows} rows are out of range: 1 to {MAX_ROWS}")
    if not 0 <= first <= MAX_POSITION - rows:
        raise ValueError(f"position {first} is out of range")
    if not 0 <= cols <= MAX_COLS:
        raise ValueError(f"{cols} columns are more than {MAX_COLS}")
