"""Helpers for files: reading whole files with errors that name them, checking untrusted JSON and file names,
atomic writes, and the cache directory."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import ModelFileError

_POINTER = b"version https://git-lfs.github.com/spec/"
_DEPTH = 100


def parse_json(text: str) -> Any:
    """The value of a JSON text. ValueError: it is none, or is nested too deeply to be shown in an error."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_DEPTH):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def is_inside(name: object) -> bool:
    """Whether an untrusted `name` is safe as the path of a file inside a directory: relative, without `..`,
    backslashes or unprintable characters, and of at most 255 bytes, which file systems take."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and len(name.encode()) <= 255
        and "\\" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def refuse_pointer(path: Path) -> None:
    """ModelFileError: the file is a Git LFS pointer instead of its contents."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # reported by the code that reads the file
    if start == _POINTER:
        raise ModelFileError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory"
        )


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. ModelFileError: unreadable."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror or e}") from e


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. ModelFileError: unreadable, or not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ModelFileError(f"{path} is not UTF-8 text: {e}") from e


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: under a temporary name first, so that nobody reads half of it. OSError: it
    cannot be written; no partial file is left."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/shoal`, or `~/.cache/shoal`. RuntimeError: there is no home directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "shoal"
