"""A cache of verified hashes: the files of a model directory whose SHA-256 was found equal to the index's.

A stamp is (size, modification time, inode, SHA-256). While it is unchanged, loading does not hash the file;
otherwise the file is hashed again, and refused if the hash differs. If the directory is not writable, no
stamps are saved, and each process hashes the files once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .errors import ModelFileError
from .files import write_whole
from .index import FileEntry

HASHES = "stamps.json"
_PIECE = 1 << 20


class HashCache:
    """The stamps of one model directory, read from `stamps.json` on first use."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / HASHES
        self._known: dict[str, list[object]] | None = None

    def check(
        self, path: Path, entry: FileEntry, *, trust: bool = True, also: Callable[[Path], None] | None = None
    ) -> None:
        """Compares a file with its index entry. Hashes it, and calls `also` with its path for further
        checks, unless `trust` is set and the stamp is unchanged. ModelFileError: missing, truncated or
        altered."""
        try:
            stat = path.stat()
        except OSError as e:
            raise ModelFileError(
                f"{path} is missing ({e.strerror}): pull or convert the model again"
            ) from None
        if stat.st_size != entry.size:
            how = "is truncated" if stat.st_size < entry.size else "has grown"
            raise ModelFileError(
                f"{path} {how}: it has {stat.st_size} bytes, and {entry.size} by the index: "
                "pull or convert the model again"
            )
        stamp = _stamp(stat, entry)
        if trust and stamp in (self._load().get(path.name), _read(self._path).get(path.name)):
            return  # known from the start, or stored by another part of the program since
        if file_sha256(path) != entry.sha256:
            raise ModelFileError(
                f"{path} was altered: its SHA-256 differs from the index's: pull or convert the model again"
            )
        if also is not None:
            also(path)
        self._remember({path.name: stamp})

    def trust(self, files: Mapping[str, FileEntry]) -> None:
        """Stores stamps for files whose hash was computed while they were written."""
        self._remember({name: _stamp((self._path.parent / name).stat(), e) for name, e in files.items()})

    def _load(self) -> dict[str, list[object]]:
        if self._known is None:
            self._known = _read(self._path)
        return self._known

    def _remember(self, stamps: Mapping[str, list[object]]) -> None:
        # Another process may have added stamps since: read the file again, so that few are lost.
        self._known = {**self._load(), **_read(self._path), **stamps}
        with suppress(OSError):  # a read-only or full disk: only this process knows the stamps
            write_whole(self._path, json.dumps(self._known))


def _stamp(stat: os.stat_result, entry: FileEntry) -> list[object]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, entry.sha256]


def _read(path: Path) -> dict[str, list[object]]:
    """The stamps on disk by file name; empty if unreadable, since files can always be hashed again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal. `progress` is called with the number of bytes of each piece read.
    ModelFileError: unreadable."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                if progress is not None:
                    progress(len(piece))
            return digest.hexdigest()
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror}") from e
