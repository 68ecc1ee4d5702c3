"""Waiting for sockets in a thread of its own: looking again and again for a while, then sleeping."""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Sequence

from .errors import MissingDependencyError

Wait = Callable[[Sequence[int], float, float | None], None]


def waiter() -> Wait:
    """A function `wait(handles, spin_s, wait_s)`, which returns when one of the sockets or pipes (file
    descriptors, at most 64) can be read, and after `wait_s` seconds (never for None) otherwise.

    For the first `spin_s` seconds the thread looks again and again without holding the interpreter's lock,
    since a thread that sleeps wakes tens of microseconds late on a core that has cooled down. Without the C
    library it sleeps at once."""
    try:
        from .backends._abi import ffi
        from .backends.native import library

        call = library().shoal_wait
    except MissingDependencyError:
        return _sleeping

    def wait(handles: Sequence[int], spin_s: float, wait_s: float | None) -> None:
        call(
            ffi.new("int32_t[]", handles),
            len(handles),
            int(spin_s * 1e9),
            -1 if wait_s is None else math.ceil(max(0.0, wait_s) * 1e9),
        )

    return wait


def _sleeping(handles: Sequence[int], spin_s: float, wait_s: float | None) -> None:
    watch = select.poll()
    for handle in handles:
        watch.register(handle, select.POLLIN)
    watch.poll(None if wait_s is None else math.ceil(max(0.0, wait_s) * 1000))
