"""RAM: how much there is, and weights copied into it.

Decoding reads every weight once a token, and a mapping of 4 KiB pages is read 10-35 % slower than huge pages
are. A mapping in its turn costs nothing to load and can be dropped when memory runs short: that is what a
device with little of it wants."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import round_up

_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64


def ram() -> tuple[int, int]:
    """(total, available) bytes of RAM; available is what the kernel would give without swapping, 0 where
    unknown."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return total, int(line.split()[1]) * 1024
    except OSError:  # not every Android allows it
        pass
    return total, 0


def affordable(nbytes: int) -> bool:
    """Whether copies of so many bytes take no more than half of the RAM that is available."""
    return nbytes <= ram()[1] // 2


class Arena:
    """Private memory for copies of arrays, in huge pages where the system has them."""

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        """Room for copies of `arrays`; takes no memory before they come."""
        nbytes = sum(round_up(a.nbytes, _ALIGNMENT) for a in arrays)
        memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel built without them
                pass
        self._bytes: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self._at = -self._bytes.ctypes.data % _HUGE_PAGE

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array's copy in the arena, read-only."""
        place = self._bytes[self._at : self._at + array.nbytes].view(array.dtype).reshape(array.shape)
        self._at += round_up(array.nbytes, _ALIGNMENT)
        place[...] = array
        place.flags.writeable = False
        return place
