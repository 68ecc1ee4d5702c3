"""What a device has measured with a model, kept in the cache directory so that a node starts at once next
time.

The key has everything that rates depend on. What it cannot have, such as heat or another program, shows while
the node works (net/pace.py)."""

from __future__ import annotations

import hashlib
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .engine.backends import choose
from .engine.files import cache_directory, write_whole
from .engine.host import resident_bytes
from .engine.measure import METHOD, DeviceMeasurements, Watch, layers_for, measure, stopwatch
from .engine.model_directory import Model
from .engine.stage import StageOptions
from .engine.strict import decode, encode
from .engine.threads import device_key

MOST_SECONDS = 7 * 86400
"""How long a measurement is used."""
KEPT_SECONDS = 0.5
MOST_LAYERS = 1.5
"""How many times as many layers a measurement may have been made with."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates of this device, and the bytes of RAM that the process used after it had measured them."""

    key: str
    layers: int
    """The number of layers that they were measured with."""
    rates: DeviceMeasurements
    resident: int


def measured(
    model: Model,
    options: StageOptions,
    *,
    seconds: float,
    room: int,
    watch: Watch = stopwatch,
    slow: float | None = 1.0,
) -> Measured:
    """Measures as engine.measure does, or returns what was measured before on this device in the same
    conditions. What is measured in less than KEPT_SECONDS is not kept, nor what a `watch` says that imitates
    a device of changing speed; that of one which is always `slow` times as slow is."""
    keep = seconds >= KEPT_SECONDS and slow is not None
    first, layers = layers_for(model, room)
    key = _key(model, options, first, slow)
    if keep:
        with suppress(OSError, ValueError, RuntimeError):
            path = _path(key)
            kept = decode(Measured, path.read_bytes())
            age = time.time() - path.stat().st_mtime
            if kept.key == key and _alike(kept.layers, layers) and 0 <= age < MOST_SECONDS:
                return kept
    rates = measure(model, options, seconds=seconds, room=room, watch=watch)
    found = Measured(key, layers, rates, resident_bytes())
    if keep:
        with suppress(OSError, RuntimeError):  # a full disk, or no home directory: it is measured again
            path = _path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, encode(found).decode())
    return found


def _path(key: str) -> Path:
    return cache_directory() / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _alike(one: int, other: int) -> bool:
    """Whether rates do not depend on which of two numbers of layers they were measured with. The room for
    layers differs from start to start by the memory that the process has taken until then."""
    return max(one, other) <= MOST_LAYERS * min(one, other)


def _key(model: Model, options: StageOptions, first: int, slow: float | None) -> str:
    backend = choose(options.backend)[0]
    parts = (platform.node(), device_key(backend, options.isa), options.threads, options.max_rows)
    return " ".join(map(str, (__version__, METHOD, model.hash, *parts, options.resident, first, slow)))
