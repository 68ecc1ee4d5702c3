"""Directories that appear under their name only when complete, and are removed if they never are."""

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
    """A temporary directory that is renamed to `target` when the context ends without an error, and removed
    otherwise. `replace`: an existing `target` is removed once the new one is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        part = _locked(target, stack)
        yield part
        part.chmod(0o755)
        if replace:
            _put_aside(target, stack)
        part.rename(target)


def remove_directory(path: Path) -> None:
    """Removes a directory: renames it first, so that its name disappears in one step. OSError: it cannot be
    removed."""
    with ExitStack() as stack:
        _put_aside(path, stack)


def _put_aside(path: Path, stack: ExitStack) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.rename(_made(path, stack))


def remove_leavings(directory: Path, name: str | None = None) -> None:
    """Removes the temporary directories of killed processes: those for `name`, or all in `directory`."""
    for part in directory.glob(f".*{SUFFIX}"):
        if name is not None and part.name.removesuffix(SUFFIX).rpartition(".")[0] != f".{name}":
            continue
        with suppress(OSError):  # the lock is held, or the directory belongs to another user
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part, ignore_errors=True)
            finally:
                os.close(descriptor)


def _locked(target: Path, stack: ExitStack) -> Path:
    """A new directory with a file lock on it, which the system releases even if the process is killed."""
    while True:
        part = _made(target, stack)
        descriptor = os.open(part, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if part.exists():  # else remove_leavings removed it before it was locked
            return part


def _made(target: Path, stack: ExitStack) -> Path:
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent))
    stack.callback(shutil.rmtree, part, ignore_errors=True)
    return part
