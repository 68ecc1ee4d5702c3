"""Directories that get their name when they are whole, and leave nothing behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

SUFFIX = ".part"


@contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory that becomes `target` when the context ends without an error, and is removed when it
    does not. `replace`: what has the name until then is removed afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        part = _locked(target, stack)
        yield part
        part.chmod(0o755)
        if replace:
            _put_aside(target, stack)
        part.rename(target)


def remove_directory(path: Path) -> None:
    """Removes a directory, in one step as far as its name is concerned. OSError: it cannot be removed."""
    with ExitStack() as stack:
        _put_aside(path, stack)


def _put_aside(path: Path, stack: ExitStack) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.rename(_made(path, stack))


def remove_leavings(directory: Path, name: str | None = None) -> None:
    """Removes what processes that were killed left of directories of that name, or of any name."""
    for part in directory.glob(f".*{SUFFIX}"):
        if name is not None and part.name.removesuffix(SUFFIX).rpartition(".")[0] != f".{name}":
            continue
        with suppress(OSError):  # a lock that is held, or somebody else's directory
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part, ignore_errors=True)
            finally:
                os.close(descriptor)


def _locked(target: Path, stack: ExitStack) -> Path:
    """A new directory under a lock, which ends with the process however that ends."""
    while True:
        part = _made(target, stack)
        descriptor = os.open(part, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        with suppress(OSError):  # a file system that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if part.exists():  # else remove_leavings found it before the lock was there
            return part


def _made(target: Path, stack: ExitStack) -> Path:
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent))
    stack.callback(shutil.rmtree, part, ignore_errors=True)
    return part
