"""The files of a model on a device that gets them from other devices, unit by unit.

They are kept in `$XDG_CACHE_HOME/shoal/fetched/HASH`, HASH being the hash of the model: a model directory in
which files of units may be missing. A file that is being fetched is NAME.part, and NAME.have lists the pieces
of it that are right, so that they are not fetched again after a restart. It gets its name once its SHA-256 is
that of the index.

A process that uses such a directory holds a shared lock on it, and nothing is removed from a directory that
another process uses.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .engine.errors import ModelFileError, ShoalError
from .engine.hash_cache import HashCache
from .engine.index import CONFIG, INDEX, parse_index, read_index
from .engine.temporary import new_directory, remove_directory, remove_leavings
from .net.files import Part, Room, piece_of, piece_range, pieces
from .part_file import HAVE, PART, PartFile
from .store import cache_directory, is_model, models_directory, names

MB = 1_000_000
MARGIN = 64 * MB
"""Bytes of a disk that are left free."""
FEWEST = 6
"""The fewest characters of a hash that name a model."""
FREE_SHARE = 0.5
"""The share of the free disk that fetched files may take by default."""


def fetched_directory() -> Path:
    """The directory of all models that are fetched from other devices."""
    return cache_directory() / "fetched"


def make_skeleton(model_hash: str, index_bytes: bytes, small_files: Mapping[str, bytes]) -> Path:
    """The directory of a model without its units; it is made if it is missing, of the bytes of index.json and
    of the files that every device needs. ModelFileError: they are not those of the model. OSError: it cannot
    be written."""
    if hashlib.sha256(index_bytes).hexdigest() != model_hash:
        raise ModelFileError(f"the index that arrived is not that of the model {model_hash[:16]}: try again")
    index = parse_index(index_bytes, INDEX)
    for name in (CONFIG, *index.common):
        data, entry = small_files.get(name, b""), index.files[name]
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ModelFileError(f"the file {name} that arrived is not that of the index: try again")
    path = fetched_directory() / model_hash
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path.parent):
        remove_leavings(path.parent, path.name)
        if is_model(path):
            return path
        with new_directory(path, replace=True) as new:
            for name in (CONFIG, *index.common):
                (new / name).write_bytes(small_files[name])
            (new / INDEX).write_bytes(index_bytes)
            HashCache(new).trust({name: index.files[name] for name in (CONFIG, *index.common)})
    return path


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Waits for other processes that make something in a directory, as far as the file system has locks."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def local_model(model_hash: str) -> Path | None:
    """The directory of the model of that hash among those that were pulled or converted here, or that were
    fetched before."""
    directory = models_directory()
    for path in (*(directory / name for name in names()), fetched_directory() / model_hash):
        with suppress(OSError):
            if hashlib.sha256((path / INDEX).read_bytes()).hexdigest() == model_hash:
                return path
    return None


def fetched_models() -> list[Path]:
    """The directories of fetched models."""
    return sorted(_models(fetched_directory()))


def remove_fetched(start: str) -> Path | None:
    """Removes the fetched model whose hash begins so; returns its directory, or None if there is not one.
    ShoalError: another process uses it. OSError: it cannot be removed."""
    found = [path for path in fetched_models() if len(start) >= FEWEST and path.name.startswith(start)]
    if len(found) != 1:
        return None
    with _alone(_opened(found[0]), own=False) as alone:
        if not alone:
            raise ShoalError(f"a shoal process uses the model {start}: stop it, and remove the model then")
        remove_directory(found[0])
    return found[0]


# The decision what to remove


@dataclass(frozen=True, slots=True)
class Stored:
    """Files on the disk that can be fetched again: the bytes of a file of the own model or of all of another
    one (`name` is empty), and when it was used."""

    model: str
    name: str
    bytes: int
    used: float


def to_remove(stored: Collection[Stored], own: str, over: int) -> tuple[tuple[Stored, ...], int]:
    """What to remove so that `over` bytes become free, and how many of them are missing then: other models
    first, those before that were not used for longest; and no more than needed."""
    order = sorted(stored, key=lambda one: (one.model == own, one.used, -one.bytes, one.name))
    chosen = list[Stored]()
    for one in order:
        if over <= 0:
            break
        chosen.append(one)
        over -= one.bytes
    return tuple(chosen), max(0, over)


class HeldFiles:
    """See net/files.Files: the files of the model at `path`. Where that is a directory of a fetched model,
    files can be fetched, up to `cap` bytes of all fetched models (None: FREE_SHARE of the free disk)."""

    def __init__(self, path: Path, cap: int | None = None) -> None:
        self._path, self._cap = path, cap
        self._index, _ = read_index(path / INDEX)
        self._hashes = HashCache(path)
        self._fetched = path.parent == fetched_directory()
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, int], bytes] = {}
        self._checked: set[str] = set()
        self._parts: dict[str, PartFile] = {}
        self._use = _opened(path)
        with suppress(OSError):  # a file system without locks, or that may only be read
            fcntl.flock(self._use, fcntl.LOCK_SH)
        if self._fetched:
            with suppress(OSError):
                os.utime(path)
        self._whole = {name for name in self._index.files if self._is_whole(name)}

    def close(self) -> None:
        """Lets others remove files. Nothing else may be called any more."""
        os.close(self._use)

    @property
    def complete(self) -> bool:
        """Whether no file of a unit is missing."""
        return len(self.held()) == len(self._index.units)

    def held(self) -> frozenset[int]:
        return frozenset(u for u, unit in enumerate(self._index.units) if self._whole.issuperset(unit.files))

    def progress(self, units: Collection[int]) -> tuple[int, int]:
        wanted = got = 0
        for name in self.names(sorted(units)):
            size = self._index.files[name].size
            wanted += size
            if name in self._whole:
                got += size
            elif (part := self._parts.get(name)) is not None:
                got += sum(last - first for first, last in (piece_range(p, size) for p in list(part.have)))
        return wanted, got

    def names(self, units: Sequence[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for u in units for name in self._index.units[u].files))

    def read(self, name: str, first: int, last: int, ahead: int = 0) -> bytes:
        size = self._ready(name)
        if not 0 <= first < last <= size:
            raise ValueError(f"bytes [{first}, {last}) of {name}, which has {size}")
        _, end = piece_range(piece_of(last - 1), size)
        return self._bytes(name, first, min(last + ahead, end))

    def sum(self, name: str, piece: int) -> bytes | None:
        size = self._ready(name)
        if piece >= pieces(size):
            return None
        if (name, piece) not in self._sums:
            data = self._bytes(name, *piece_range(piece, size))
            self._sums[name, piece] = hashlib.sha256(data).digest()
        return self._sums[name, piece]

    def part(self, name: str) -> Part | None:
        with self._lock:
            if self._is_whole(name):  # another process has fetched it
                self._whole.add(name)
            if name in self._whole or name in self._parts:
                return None
            try:
                entry, ended = self._index.files[name], partial(self._ended, name)
                self._parts[name] = PartFile(self._path / name, entry, self._hashes, ended)
            except BlockingIOError:
                return None
            return self._parts[name]

    def make_room(self, units: Sequence[int], in_use: Collection[int]) -> Room:
        with self._lock:
            return self._make_room(units, in_use)

    def _make_room(self, units: Sequence[int], in_use: Collection[int]) -> Room:
        missing = [name for name in self.names(units) if name not in self._whole]
        if not missing:
            return Room(())
        if not self._fetched:
            return Room((), f"{self._path} lacks {missing[0]}: pull or convert the model again")
        needed = {name: self._index.files[name].size - self._stored(name + PART) for name in missing}
        root = fetched_directory()
        free = max(0, shutil.disk_usage(root).free - MARGIN)
        used = sum(_stored_bytes(path) for path in _models(root))
        cap = int((free + used) * FREE_SHARE) if self._cap is None else self._cap
        left = min(free, cap - used)
        over = sum(needed.values()) - left
        if over > 0:
            keep = {*missing, *self.names(units), *self.names(sorted(in_use))}
            left += self._removed([*self._others(root), *self._unwanted(keep)], over)
        fitting = list[str]()
        for name in missing:
            if needed[name] > left:
                break
            fitting.append(name)
            left -= needed[name]
        short = sum(needed[name] for name in missing[len(fitting) :]) - left
        said = "" if len(fitting) == len(missing) else _no_room(short, self._cap, cap, free, root)
        return Room(tuple(fitting), said)

    def _removed(self, stored: Collection[Stored], over: int) -> int:
        """Removes files so that `over` bytes become free, if there are so many; returns how many do.
        Instead of those that another process uses, the next ones go."""
        freed = 0
        while freed < over and stored:
            chosen, _ = to_remove(stored, self._path.name, over - freed)
            freed += sum(self._remove(one) for one in chosen)
            stored = [one for one in stored if one not in chosen]
        return freed

    def _others(self, root: Path) -> Iterator[Stored]:
        for path in _models(root):
            if path != self._path:
                yield Stored(path.name, "", _stored_bytes(path), path.stat().st_mtime)

    def _unwanted(self, keep: Collection[str]) -> Iterator[Stored]:
        """Files of units of this model that nothing needs, and what is left of fetching such."""
        small = {CONFIG, *self._index.common}
        for path in self._path.iterdir():
            name = path.name.removesuffix(PART).removesuffix(HAVE)
            known = name in self._index.files and name not in small
            if known and name not in keep and name not in self._parts:
                yield Stored(self._path.name, path.name, self._stored(path.name), 0.0)

    def _remove(self, one: Stored) -> int:
        """Removes files; returns the bytes that this makes free: 0 if another process uses them."""
        path = self._path.parent / one.model
        own = path == self._path
        try:
            with _alone(self._use if own else _opened(path), own=own) as alone:
                if not alone:
                    return 0
                if own:
                    (path / one.name).unlink()
                    self._whole.discard(one.name)
                else:
                    remove_directory(path)
        except OSError:
            return 0
        return one.bytes

    def _is_whole(self, name: str) -> bool:
        """Whether a file is here. One of a fetched model is hashed, unless it has a stamp."""
        entry = self._index.files[name]
        if _size(self._path / name) != entry.size:
            return False
        if not self._fetched:
            return True  # hashed before it is given to others, as before it is used
        try:
            self._hashes.check(self._path / name, entry)
        except ModelFileError:
            return False
        return True

    def _ready(self, name: str) -> int:
        """The size of a whole file, whose hash is right. Errors as for `read`."""
        entry = self._index.files.get(name)
        if entry is None:
            raise ValueError(f"the file {name}, which the model has not")
        if name not in self._whole:
            raise ModelFileError(f"{name} is not on this device")
        if name not in self._checked:
            self._hashes.check(self._path / name, entry)
            self._checked.add(name)
        return entry.size

    def _bytes(self, name: str, first: int, last: int) -> bytes:
        try:
            with (self._path / name).open("rb") as file:
                file.seek(first)
                data = file.read(last - first)
        except OSError as error:
            raise ModelFileError(f"{name} cannot be read: {error.strerror}") from error
        if len(data) < last - first:
            raise ModelFileError(f"{name} is truncated on this device")
        return data

    def _stored(self, name: str) -> int:
        return _stored_file(self._path / name)

    def _ended(self, name: str, whole: bool) -> None:
        """A file is not fetched any more."""
        with self._lock:
            self._parts.pop(name, None)
            if whole:
                self._whole.add(name)


def _opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


@contextmanager
def _alone(use: int, *, own: bool) -> Iterator[bool]:
    """Whether no other process uses a directory, and none begins to meanwhile."""
    try:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        if own:
            fcntl.flock(use, fcntl.LOCK_SH)
        else:
            os.close(use)


def _no_room(short: int, given: int | None, cap: int, free: int, root: Path) -> str:
    """What to tell of so many bytes that are missing; `given` is the cap that the user has set."""
    remedy = "free space there"
    if free <= cap:
        why = f"{free / MB:.0f} MB are free"
    elif given is not None:
        why = f"--disk allows {cap / MB:.0f} MB"
    else:
        why = f"{cap / MB:.0f} MB may be used, half of what is free"
        remedy += ", or set another limit with --disk MB"
    return f"{short / MB + 1:.0f} MB are missing on the disk of {root}, where {why}: {remedy}"


def _models(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.name[0] != "." and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stored_bytes(directory: Path) -> int:
    """Bytes that the files of a directory take on the disk."""
    return sum(_stored_file(path) for path in directory.iterdir())


def _stored_file(path: Path) -> int:
    """Bytes that a file takes on the disk: one that is being fetched has holes."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
