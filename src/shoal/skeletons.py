"""The skeleton of a model on its way from the head to a node: the files that every device needs, without the
weights of any unit. On the stream are

    u32             bytes of index.json, little-endian
    index.json
    the other files, as long as the index says, in the order of `names_of`
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from .engine.errors import ModelFileError, ShoalError
from .engine.files import read_bytes
from .engine.index import CONFIG, INDEX, Index, parse_index
from .engine.model_directory import Model
from .net.errors import NodeLostError, RemoteProtocolError

MOST_BYTES = 16 << 20
_SIZE = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """index.json, and the other files by name, which have the hashes that the index says; none of a model
    that is here."""

    index: bytes
    files: dict[str, bytes]

    @property
    def hash(self) -> str:
        """The model hash."""
        return hashlib.sha256(self.index).hexdigest()


def names_of(index: Index) -> tuple[str, ...]:
    """The files of a skeleton besides index.json."""
    return (CONFIG, *index.common)


def skeleton_of(model: Model) -> bytes:
    """The skeleton of a model as it is sent. ModelFileError: its files have changed, or are too large."""
    index = read_bytes(model.path / INDEX)
    if hashlib.sha256(index).hexdigest() != model.hash:
        raise ModelFileError(f"{model.path / INDEX} has changed: start `shoal up` again")
    body = b"".join(read_bytes(model.path / name) for name in names_of(model.index))
    if len(index) + len(body) > MOST_BYTES:
        raise ModelFileError(f"{model.path}: the files that every device needs are larger than 16 MiB")
    return _SIZE.pack(len(index)) + index + body


class SkeletonSource:
    """The skeleton of a model for several devices at a time. It is read once for all that ask while it is
    sent, and not kept for longer: it may have 16 MiB."""

    def __init__(self, model: Model) -> None:
        self._model, self._lock = model, trio.Lock()
        self._body: bytes | None = None
        self._users = 0

    @asynccontextmanager
    async def body(self) -> AsyncIterator[bytes]:
        """The skeleton as it is sent. Errors as for `skeleton_of`."""
        self._users += 1
        try:
            async with self._lock:
                if self._body is None:
                    self._body = await trio.to_thread.run_sync(skeleton_of, self._model)
                body = self._body
            yield body
        finally:
            self._users -= 1
            if not self._users:
                self._body = None


async def receive_skeleton(
    stream: trio.abc.ReceiveStream, who: str, is_here: Callable[[str], bool] | None = None
) -> Skeleton:
    """The skeleton that `who` sends. Of a model whose hash `is_here`, which a thread finds out, only the
    index is read: a tokenizer may have as many bytes as a layer, and a slow link at each start the time for
    them. RemoteProtocolError: it is none. NodeLostError: the stream ends."""
    reader = _Reader(stream, who)
    (size,) = _SIZE.unpack(await reader.exactly(_SIZE.size))
    if size > MOST_BYTES:
        raise RemoteProtocolError(f"{who} announced an index of {size} bytes, more than are allowed")
    data = await reader.exactly(size)
    try:
        index = parse_index(data, f"the index that {who} sent")
    except ShoalError as error:
        raise RemoteProtocolError(f"{error}") from error
    model = hashlib.sha256(data).hexdigest()
    if is_here is not None and await trio.to_thread.run_sync(is_here, model):
        return Skeleton(data, {})
    left, files = MOST_BYTES - size, dict[str, bytes]()
    for name in names_of(index):
        entry = index.files[name]
        left -= entry.size
        if left < 0:
            raise RemoteProtocolError(f"{who} announced files of more than {MOST_BYTES} bytes")
        files[name] = await reader.exactly(entry.size)
        if hashlib.sha256(files[name]).hexdigest() != entry.sha256:
            raise RemoteProtocolError(f"{who} sent another {name} than its index says")
    return Skeleton(data, files)


class _Reader:
    """Reads a number of bytes from a stream, which may give more at a time than it was asked for."""

    def __init__(self, stream: trio.abc.ReceiveStream, who: str) -> None:
        self._stream, self._who = stream, who
        self._data = bytearray()

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes. NodeLostError: the stream ends before."""
        while len(self._data) < size:
            try:
                more = await self._stream.receive_some()
            except trio.BrokenResourceError as error:
                raise NodeLostError(f"{self._who} is lost: the connection broke") from error
            if not more:
                raise NodeLostError(f"{self._who} closed the connection before its model was sent")
            self._data += more
        found = bytes(self._data[:size])
        del self._data[:size]
        return found
