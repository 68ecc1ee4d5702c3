"""Where models are kept on this device, and how a name finds one.

The directory follows the XDG rules: `$XDG_CACHE_HOME/shoal`, or `~/.cache/shoal`. In it: `models/NAME`, and
`downloads/` for what was fetched."""

from __future__ import annotations

import fcntl
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .engine.errors import ModelFileError, ShoalError
from .engine.files import cache_directory as cache_directory
from .engine.index import INDEX

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def models_directory() -> Path:
    """The directory with one model directory for each name."""
    return cache_directory() / "models"


def downloads_directory() -> Path:
    """The directory of fetched checkpoints, whole and in part."""
    return cache_directory() / "downloads"


def model_path(name: str) -> Path:
    """Where the model of that name is, or would be. ShoalError: no good name."""
    if not _NAME.fullmatch(name):
        raise ShoalError(f"{name!r} is no good name for a model: use letters, digits, dots, - and _")
    return models_directory() / name


def names() -> list[str]:
    """Names of the models that are here, sorted."""
    directory = models_directory()
    if not directory.is_dir():
        return []
    return sorted(
        path.name for path in directory.iterdir() if (path / INDEX).is_file() and path.name[0] != "."
    )


def resolve(name_or_path: str) -> Path:
    """The model directory of a name that `shoal ls` shows, or of a path. ModelFileError: there is none."""
    if _NAME.fullmatch(name_or_path) and (models_directory() / name_or_path / INDEX).is_file():
        return models_directory() / name_or_path
    path = Path(name_or_path).expanduser()
    if (path / INDEX).is_file():
        return path
    here = f"here are: {', '.join(names())}" if names() else "there are none yet"
    what = f"{path} is no model directory" if path.exists() else f"there is no model {name_or_path!r}"
    raise ModelFileError(f"{what}; {here}; `shoal pull smollm2-135m` fetches a small one")


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Held by one process at a time: a second pull of a model waits, and then finds the work done."""
    directory = models_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another shoal that is fetching {name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
