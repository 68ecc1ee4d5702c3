"""Files of models and checkpoints, read whole, where errors name the file; names that others gave files;
and the directory of everything that can be fetched or made again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import ModelFileError

_POINTER = b"version https://git-lfs.github.com/spec/"


def is_inside(name: object) -> bool:
    """Whether `name`, which a file or a server gave, names a file inside a directory: a relative path
    without `..`, that no shell or terminal reads as anything else."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def refuse_pointer(path: Path) -> None:
    """ModelFileError: in the file's place there is what Git keeps of it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # said by whoever reads it
    if start == _POINTER:
        raise ModelFileError(
            f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` there"
        )


def read_bytes(path: Path) -> bytes:
    """ModelFileError: unreadable."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror or e}") from e


def read_text(path: Path) -> str:
    """ModelFileError: unreadable, or no UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ModelFileError(f"{path} is no UTF-8 text: {e}") from e


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name first, so that nobody reads half of it. OSError: it cannot be written,
    and nothing is left."""
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
    # The XDG rules say that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "shoal"
