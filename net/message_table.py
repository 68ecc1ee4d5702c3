"""The table MESSAGES: the type of each message in a frame, its limit, and on which connections which side may
send it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from .messages import (
    BULK_LIMIT,
    CONTROL_LIMIT,
    FILES_LIMIT,
    PAGES_LIMIT,
    STEP_LIMIT,
    SUMS_LIMIT,
    Abort,
    Assign,
    Broken,
    Carried,
    Close,
    Commit,
    Complete,
    Data,
    Error,
    Failed,
    Fetch,
    FileBytes,
    GetBytes,
    GetStats,
    GetSums,
    Held,
    Hello,
    House,
    Loaded,
    Mask,
    Measure,
    Measured,
    Message,
    Open,
    Pages,
    Ping,
    Pong,
    Prepared,
    Purpose,
    Refill,
    Release,
    Result,
    Rows,
    SetSampling,
    Shared,
    Spare,
    Spares,
    Stats,
    Step,
    Sums,
    Tokens,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the message table. `limit` is the largest body in bytes. The side that dialled may send the
    message on connections with a purpose in `down`, and the side that was dialled on those with a purpose in
    `up`."""

    code: int
    kind: type[Message]
    limit: int
    down: frozenset[Purpose]
    up: frozenset[Purpose]


def _entry(code: int, kind: type[Message], down: str, up: str, limit: int = CONTROL_LIMIT) -> Entry:
    known: dict[str, Purpose] = {purpose: purpose for purpose in get_args(Purpose)}
    return Entry(
        code, kind, limit, frozenset(known[p] for p in down.split()), frozenset(known[p] for p in up.split())
    )


_ALL = "control step probe bulk files"
MESSAGES: tuple[Entry, ...] = (
    _entry(1, Hello, _ALL, _ALL),
    _entry(2, Error, _ALL, _ALL),
    _entry(3, Ping, "control step probe", ""),
    _entry(4, Pong, "", "control step probe"),
    _entry(5, Assign, "control", ""),
    _entry(6, Release, "control", ""),
    _entry(7, Loaded, "", "control"),
    _entry(8, Broken, "", "control"),
    _entry(9, Measure, "control", ""),
    _entry(10, Measured, "", "control"),
    _entry(11, GetStats, "control", ""),
    _entry(12, Stats, "", "control"),
    _entry(13, Open, "step", ""),
    _entry(14, Close, "control step", ""),
    _entry(15, Failed, "", "control"),
    _entry(16, Prepared, "", "control"),
    _entry(17, Commit, "control", ""),
    _entry(18, Abort, "control", ""),
    _entry(19, Spare, "control", ""),
    _entry(20, Spares, "", "control"),
    _entry(21, Refill, "control", ""),
    _entry(22, Carried, "bulk", ""),
    _entry(23, Complete, "bulk", ""),
    _entry(24, Shared, "bulk", ""),
    _entry(25, House, "control", ""),
    _entry(26, Fetch, "control", ""),
    _entry(27, Held, "", "control"),
    _entry(28, GetBytes, "files", ""),
    _entry(29, GetSums, "files", ""),
    _entry(30, SetSampling, "control", ""),
    _entry(32, Step, "step", "", STEP_LIMIT),
    _entry(33, Result, "", "control"),
    _entry(34, Data, "probe", "", BULK_LIMIT),
    _entry(35, Pages, "bulk", "", PAGES_LIMIT),
    _entry(36, Rows, "", "control", STEP_LIMIT),
    _entry(37, Mask, "control", ""),
    _entry(38, FileBytes, "", "files", FILES_LIMIT),
    _entry(39, Sums, "", "files", SUMS_LIMIT),
    _entry(40, Tokens, "control", ""),
)
BY_CODE = {entry.code: entry for entry in MESSAGES}
BY_KIND = {entry.kind: entry for entry in MESSAGES}
