"""How many threads to run with where nobody says: as many as `shoal profile` found fastest, else one a big
core.

What was found is kept in the cache directory under what it depends on: the backend with its build and
instruction set, and the CPUs that this process may use."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from . import __version__
from .engine.cores import default_threads, usable_cores
from .store import cache_directory


def chosen(given: int | None, backend: str, isa: str) -> tuple[int, str]:
    """The number of threads, and in words where it comes from ("" if it was given)."""
    if given is not None:
        return given, ""
    kept = _read().get(_key(backend, isa))
    if type(kept) is int and 1 <= kept <= len(usable_cores()):
        return kept, "the fastest by shoal profile"
    return default_threads(), "by the number of cores"


def keep(threads: int, backend: str, isa: str) -> bool:
    """Remembers the number that is fastest here; False if the cache directory cannot be written."""
    path = _path()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**_read(), _key(backend, isa): threads}, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError:  # profiles are worth printing on a full or read-only disk too
        with suppress(OSError):
            part.unlink()
        return False
    return True


def _path() -> Path:
    return cache_directory() / "threads.json"


def _key(backend: str, isa: str) -> str:
    build = __version__
    if backend == "native":
        from .engine.backends.native import build_hash

        build = build_hash()
    return f"{backend} {isa} {build} on {','.join(map(str, sorted(usable_cores())))}"


def _read() -> dict[str, object]:
    """What was kept; nothing where it cannot be read, since it only saves time."""
    try:
        values = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
