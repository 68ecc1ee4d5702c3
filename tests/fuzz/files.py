"""Targets that read what devices of a house send of a model, and files that are fetched from them."""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from zlib import crc32

from shoal.engine.convert import convert
from shoal.engine.index import CONFIG, INDEX, parse_index
from shoal.engine.model_directory import Model
from shoal.net import requests
from shoal.net.errors import NetError
from shoal.net.fetch_plan import FetchPlan, GetAllSums, GetPiece
from shoal.net.files import PIECE, SUM_BYTES
from shoal.net.message_table import BY_KIND
from shoal.net.messages import Sums
from shoal.net.packed import decode, encode
from shoal.net.relay import RequestStream
from shoal.part_file import read_record, record_line
from shoal.skeletons import receive_skeleton, skeleton_of

from .checkpoints import TINY, WRONG
from .target import Target, mostly

_NAME, _SIZE = "unit-001.safetensors", 2 * PIECE + 5


def file_targets(place: Path) -> dict[str, Target]:
    """All of them, by name. `place` is for files."""
    convert(TINY, place / "model", dtype="int4")
    model = Model.open(place / "model")
    index = (model.path / INDEX).read_bytes()
    return {
        "index.json": Target(lambda data: parse_index(data, INDEX), (index,), WRONG),
        "model of the head": Target(_model, (skeleton_of(model),), (NetError,), slow=2),
        "sums of a file": Target(_sums, _told(), (ValueError,)),
        "record of a fetched file": Target(_record, _records(), ()),
    }


# --- from other devices


class _Sent:
    """What a head has sent, as a TlsStream gives it."""

    refused = False

    def __init__(self, data: bytes) -> None:
        self._data, self._step = data, 1 + crc32(data) % 30_000
        self.channel = self

    async def receive_some(self) -> bytes:
        some, self._data = self._data[: self._step], self._data[self._step :]
        return some

    def unread(self, data: bytes) -> None:
        self._data = data + self._data


def _model(data: bytes) -> None:
    """The answer to GetModel, as HouseNode hears it."""

    async def hear() -> None:
        line = RequestStream(cast("Any", _Sent(fitted(data))), "the head of the house")
        if await line.is_next():
            await line.receive(requests.Alive)
        await receive_skeleton(line.release(), line.who)

    with suppress(StopIteration):  # nothing of it waits
        hear().send(None)


def fitted(data: bytes) -> bytes:
    """Three times of four, with the length and the hash of config.json in the index."""
    if not mostly(data) or len(data) < 4:
        return data
    size = int.from_bytes(data[:4], "little")
    try:
        index = json.loads(data[4 : 4 + size])
        rest = data[4 + size :]
        config = index["files"][CONFIG]
        config["sha256"] = hashlib.sha256(rest[: config["size"]]).hexdigest()
        changed = json.dumps(index).encode()
    except (ValueError, TypeError, LookupError, RecursionError):
        return data
    return struct.pack("<I", len(changed)) + changed + rest


def _sums(data: bytes) -> None:
    """Sums that a source tells, before all pieces of the file arrive from another one."""
    entry = BY_KIND[Sums]
    if len(data) > entry.limit:
        return
    sums, plan = cast("Sums", decode(entry, bytearray(data))), FetchPlan()
    plan.begin(_NAME, _SIZE, {0: (bytes(SUM_BYTES), "earlier")})
    plan.offered({1: [_NAME], 2: [_NAME]})
    assert plan.next(1, 0.0) == GetAllSums(_NAME)
    plan.told(1, sums.name, sums.sums)
    while isinstance(job := plan.next(2, 0.0), GetPiece):
        plan.arrived(2, _NAME, job, bytes(SUM_BYTES), "other")
    if plan.complete(_NAME):
        plan.finished(_NAME, right=False)
        assert plan.liars


def _told() -> tuple[bytes, ...]:
    sums = (b"", bytes(3 * SUM_BYTES), b"".join(bytes([i]) * SUM_BYTES for i in range(3)))
    return tuple(b"".join(map(bytes, encode(Sums(_NAME, some)))) for some in sums[1:])


def _record(data: bytes) -> None:
    found = read_record(data.decode("utf-8", "replace"), _SIZE)
    assert all(piece in range(3) and len(digest) == SUM_BYTES for piece, (digest, _) in found.items())


def _records() -> tuple[bytes, ...]:
    lines = [record_line(piece, bytes([piece]) * SUM_BYTES, "laptop") for piece in range(3)]
    return ("".join([*lines, record_line(1, None, "")]).encode(),)
