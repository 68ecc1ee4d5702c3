"""The models on this device, by name.

They are kept in `$XDG_CACHE_HOME/shoal` or `~/.cache/shoal`, as XDG says: models in `models/NAME`, downloaded
checkpoints in `downloads/`."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .engine import files
from .engine.errors import ModelFileError, OperatingSystemError, ShoalError
from .engine.index import INDEX
from .engine.temporary import remove_directory

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def cache_directory() -> Path:
    """The directory of files that can be made again. OperatingSystemError: there is no home directory."""
    try:
        return files.cache_directory()
    except RuntimeError:
        raise OperatingSystemError(
            "this user has no home directory to keep models in: set XDG_CACHE_HOME to a directory for them"
        ) from None


def models_directory() -> Path:
    """The directory of all models."""
    return cache_directory() / "models"


def downloads_directory() -> Path:
    """The directory of downloaded checkpoints, complete and partial."""
    return cache_directory() / "downloads"


def model_path(name: str) -> Path:
    """The path of the model of that name, whether it exists or not. ShoalError: the name is invalid."""
    if not _NAME.fullmatch(name):
        raise ShoalError(f"{name!r} is not a valid name for a model: use letters, digits, dots, - and _")
    return models_directory() / name


def names() -> list[str]:
    """Names of the models on this device, sorted. OSError: the directory cannot be read."""
    directory = models_directory()
    try:
        with os.scandir(directory) as entries:
            found = [entry.name for entry in entries if entry.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in found if _listed(directory / name))


def _listed(path: Path) -> bool:
    try:
        return is_model(path)
    except OSError:  # a model without read permission is listed, too
        return True


def is_model(path: Path) -> bool:
    """Whether this is a model directory, damaged or not. OSError: permission was denied."""
    try:
        return stat.S_ISREG((path / INDEX).stat().st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


def expanded(path: str) -> Path:
    """The path, with `~` and `~USER` replaced if there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve(name_or_path: str) -> Path:
    """The model directory of a name or a path. ModelFileError: there is none."""
    refused: OSError | OperatingSystemError | None = None
    if _NAME.fullmatch(name_or_path):
        try:
            if is_model(models_directory() / name_or_path):
                return models_directory() / name_or_path
        except (OSError, OperatingSystemError) as error:  # it may be a path nevertheless
            refused = error
    path = expanded(name_or_path)
    if is_model(path):
        return path
    if refused is not None:
        raise refused
    try:
        here = f"there are: {', '.join(names())}" if names() else "there are none yet"
    except (OSError, OperatingSystemError):
        here = "models cannot be kept on this device"
    exists = os.path.exists(path)
    what = f"{path} is not a model directory" if exists else f"there is no model {name_or_path!r}"
    raise ModelFileError(f"{what}; {here}; `shoal pull smollm2-135m` downloads a small one")


def remove(name: str) -> None:
    """Deletes the model of that name, damaged or not. ModelFileError: there is none."""
    path = model_path(name)
    if not path.is_dir():
        raise ModelFileError(f"there is no model {name!r} to delete: `shoal ls` lists the models")
    with locked(name):
        remove_directory(path)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """A lock for making or deleting a model. A second pull of a model waits, and then finds the work done."""
    directory = models_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another shoal process that is making {name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
