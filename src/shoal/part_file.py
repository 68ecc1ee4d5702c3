"""A file that is being fetched: NAME.part with its bytes, and NAME.have with a line for each piece that is
right. What the lines say is checked by reading the pieces again, so that neither a crash nor a loss of power
can make a wrong piece count as right."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

from .engine.hash_cache import HashCache, file_sha256
from .engine.index import FileEntry
from .net.files import piece_range, pieces

PART, HAVE = ".part", ".have"
RESTS = 3


def record_line(piece: int, digest: bytes | None, source: str) -> str:
    """A line of NAME.have: a piece is here with that SHA-256 (None: not any more)."""
    return json.dumps([piece, None if digest is None else digest.hex(), source]) + "\n"


def read_record(text: str, size: int) -> dict[int, tuple[bytes, str]]:
    """The pieces that the lines of NAME.have name. Lines that were not written whole, or are not such lines,
    say nothing."""
    found = dict[int, tuple[bytes, str]]()
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                continue
            piece, digest, source = json.loads(line)
            if type(piece) is not int or not 0 <= piece < pieces(size) or type(source) is not str:
                continue
            if digest is None:
                found.pop(piece, None)
            elif len(known := bytes.fromhex(digest)) == hashlib.sha256().digest_size:
                found[piece] = known, source
        except (ValueError, TypeError, RecursionError):
            continue
    return found


class PartFile:
    """See net/files.Part. It takes a lock, and reads again what an earlier process has left. `ended` is told
    whether the file is whole when it is closed. BlockingIOError: another process fetches it."""

    def __init__(
        self, path: Path, entry: FileEntry, hashes: HashCache, ended: Callable[[bool], None]
    ) -> None:
        self.size = entry.size
        self._path, self._entry, self._hashes, self._ended = path, entry, hashes, ended
        self._whole = False
        self._part = path.with_name(path.name + PART)
        self.have: dict[int, tuple[bytes, str]] = {}
        with ExitStack() as stack:
            self._record_path = path.with_name(path.name + HAVE)
            # Without a buffer, of which a full disk would leave lines to be written once it is closed.
            self._record = stack.enter_context(self._record_path.open("ab+", buffering=0))
            fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, self._data)
            self._record.seek(0)
            lines = self._record.read().decode(errors="replace")
            for piece, (digest, source) in read_record(lines, self.size).items():
                if hashlib.sha256(self._read(*piece_range(piece, self.size))).digest() == digest:
                    self.have[piece] = digest, source
            os.ftruncate(self._data, self.size)
            self._opened = stack.pop_all()

    def write(self, at: int, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._data, view, at)
            view, at = view[done:], at + done

    def keep(self, piece: int, digest: bytes, source: str) -> None:
        self.have[piece] = digest, source
        self._note(record_line(piece, digest, source))

    def forget(self, pieces: Collection[int]) -> None:
        for piece in pieces:
            self.have.pop(piece, None)
            self._note(record_line(piece, None, ""))

    def finish(self, busy: Callable[[], bool]) -> bool:
        if file_sha256(self._part, _Rests(busy)) != self._entry.sha256:
            self.forget(list(self.have))
            return False
        os.fsync(self._data)
        self._part.replace(self._path)
        self._hashes.trust({self._path.name: self._entry})
        self._record_path.unlink(missing_ok=True)
        self._whole = True
        return True

    def close(self) -> None:
        try:
            self._opened.close()
        finally:
            self._ended(self._whole)

    def _read(self, first: int, last: int) -> bytes:
        return os.pread(self._data, last - first, first)

    def _note(self, line: str) -> None:
        data = line.encode()
        if self._record.write(data) != len(data):
            self._record.write(b"\n")  # the disk is full: half a line says nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Rests:
    """Rests for RESTS times as long as each piece of work took, while it is busy."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy, self._since = busy, time.monotonic()

    def __call__(self, _: int) -> None:
        if self._busy():
            time.sleep(RESTS * (time.monotonic() - self._since))
        self._since = time.monotonic()
