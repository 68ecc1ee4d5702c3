"""The default number of compute threads: what `shoal profile` found fastest on this device, else one per
big core.

The profiled number is saved in the cache directory. Its key has everything that it depends on: the backend,
the instruction set and build of the C library, the CPUs that this process may use and its CPU quota."""

from __future__ import annotations

import json
from pathlib import Path

from .files import cache_directory, write_whole
from .host import cpu_quota, default_threads, most_threads, usable_cpus


def chosen(given: int | None, backend: str, isa: str) -> tuple[int, str]:
    """The number of threads, and how it was chosen, in words; "" if it was `given`."""
    if given is not None:
        return given, ""
    kept = _read().get(device_key(backend, isa))
    if type(kept) is int and 1 <= kept <= most_threads():
        return kept, "the fastest by shoal profile"
    threads, quota = default_threads(), cpu_quota()
    limited = quota is not None and quota < threads + 1
    return threads, f"by the CPU quota of {quota:g}" if limited else "by the number of cores"


def keep(threads: int, backend: str, isa: str) -> bool:
    """Saves the fastest number of threads on this device; False if the cache directory is not writable."""
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**_read(), device_key(backend, isa): threads}, indent=1))
    except (OSError, RuntimeError):  # a full disk, or no home directory: the profile is still printed
        return False
    return True


def _path() -> Path:
    return cache_directory() / "threads.json"


def device_key(backend: str, isa: str) -> str:
    """What the speed of this device depends on, as far as it is known."""
    parts = [backend, isa]
    if backend == "native":
        from .backends.native import build_hash

        parts.append(build_hash())
    parts += ["on", ",".join(map(str, sorted(usable_cpus())))]
    quota = cpu_quota()
    if quota is not None:
        parts.append(f"with a quota of {quota:g}")
    return " ".join(parts)


def _read() -> dict[str, object]:
    """The saved numbers by key; empty if unreadable, since they only save time."""
    try:
        values = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: no home directory
        return {}
    return values if isinstance(values, dict) else {}
