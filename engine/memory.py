"""RAM that weights are read into.

Decoding reads every weight once a token, and a mapping of 4 KiB pages is read 10-35 % slower than huge
pages are. A mapping in its turn costs nothing to load and can be dropped when memory runs short: that is
what a device with little of it wants."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .host import ram
from .layout import round_up

HUGE_PAGE = 2 << 20
_ALIGNMENT = 64
_CHUNK = 4 << 20


def affordable() -> int:
    """Bytes that copies of files may take: half of the RAM that is available; none where the system does
    not say how much that is."""
    return (ram().available or 0) // 2


def trim_heap() -> None:
    """Returns freed memory to the system, which the C library keeps for later: several MB after weights
    and workspaces of another size were held. Nothing happens where the C library cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def return_large_frees() -> None:
    """From now on what is freed of large pieces (a workspace has tens of MB) goes back to the system at
    once, from any thread: the C library would keep it for later, beside what comes next. Nothing happens
    where the C library has no such setting (glibc has)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(ctypes.c_int(-3), ctypes.c_int(1 << 20))  # M_MMAP_THRESHOLD


def fetch_ahead(path: Path) -> None:
    """Asks the system to read a file into its page cache while something else is done; returns at once,
    more or less. It is advice: nothing happens where the system takes none, or the file is not there."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def room(sizes: Iterable[int]) -> int:
    """Bytes that pieces of these sizes take in an arena."""
    return sum(round_up(size, _ALIGNMENT) for size in sizes)


def _in_huge_pages(memory: mmap.mmap, first: int, huge: int) -> None:
    """Asks for huge pages as far as `huge` bytes from `first` on fill them, and for none beyond: the rest
    would be wasted."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole = huge // HUGE_PAGE * HUGE_PAGE
        with suppress(OSError):  # a kernel built without them
            if whole:
                memory.madvise(mmap.MADV_HUGEPAGE, first, whole)
            memory.madvise(mmap.MADV_NOHUGEPAGE, first + whole)


def forget(memory: NDArray[np.uint8]) -> int:
    """Returns private memory to the system, as far as it is whole pages, and says how many bytes those
    are. Written to again, it comes back in small pages. 0 where the system cannot."""
    done = _forget_at(memory.ctypes.data, memory.nbytes, memory)
    if done and hasattr(mmap, "MADV_NOHUGEPAGE"):
        _advise(memory.ctypes.data, memory.nbytes, mmap.MADV_NOHUGEPAGE)
    return done


def _forget_at(address: int, nbytes: int, holder: object) -> int:
    """As `forget`; `holder` keeps the addresses in this process."""
    if not sys.platform.startswith("linux"):  # elsewhere the advice means something else
        return 0
    ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    return _advise(address, nbytes, mmap.MADV_DONTNEED)


def _advise(address: int, nbytes: int, advice: int) -> int:
    """madvise for the whole pages of a piece of memory; their bytes, 0 where the system refuses."""
    first, last = round_up(address, mmap.PAGESIZE), (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    at, size = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
    return last - first if last > first and not ctypes.CDLL(None).madvise(at, size, advice) else 0


class Arena:
    """Private memory that is given out piece by piece, in huge pages where the system has them."""

    def __init__(self, nbytes: int, *, pinned: bool = False, huge: bool = True) -> None:
        """Takes the addresses; memory comes as pieces are written. MemoryError: there is not so much.

        Not `huge`: in small pages, of which only those are taken that are written to. `pinned` is for a
        device that keeps to a cap: files in it are not swapped, if the system lets us (Linux:
        RLIMIT_MEMLOCK), and the page cache forgets what was read, which a cap would count as well."""
        self._pinned = pinned
        try:
            memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as e:
            raise MemoryError(f"no {nbytes / 1e6:.0f} MB of memory") from e
        addresses: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        first = -addresses.ctypes.data % HUGE_PAGE
        _in_huge_pages(memory, first, nbytes if huge else 0)
        self._bytes = addresses[first : first + nbytes]
        self._huge = nbytes // HUGE_PAGE * HUGE_PAGE if huge else 0
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that can still be taken."""
        return len(self._bytes) - self._at

    def growth(self, nbytes: int) -> int:
        """How many bytes of memory the next piece of that size may add, where huge pages come whole."""
        return self._held(self._at + nbytes) - self._held(self._at)

    def _held(self, at: int) -> int:
        return round_up(at, HUGE_PAGE) if at <= self._huge else at

    def go_on_small(self) -> None:
        """Takes the rest of the arena in small pages, from the next huge page on."""
        first = round_up(self._at, HUGE_PAGE)
        if first < self._huge and hasattr(mmap, "MADV_NOHUGEPAGE"):
            _advise(self._bytes.ctypes.data + first, self._huge - first, mmap.MADV_NOHUGEPAGE)
        self._huge = min(self._huge, first)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """The next piece of that size, at a multiple of 64 bytes. MemoryError: the arena is used up."""
        piece = self._bytes[self._at : self._at + nbytes]
        if len(piece) < nbytes:
            raise MemoryError(f"an arena of {len(self._bytes)} bytes has no {nbytes} left")
        self._at += round_up(nbytes, _ALIGNMENT)
        return piece

    def read(self, file: BufferedReader, size: int) -> memoryview:
        """A file that was just opened, as bytes that cannot be written to. OSError: it cannot be read, or
        has become shorter. MemoryError: as for `take`."""
        place = self.take(size)
        # The arena stays for the sake of other files; this file's memory goes as soon as nothing refers
        # to it.
        weakref.finalize(place, _forget_at, place.ctypes.data, size, self._bytes).atexit = False
        for begin in range(0, size, _CHUNK):
            part = place[begin : begin + _CHUNK]
            if file.readinto(part.data) != len(part):
                raise OSError(errno.EIO, "it became shorter while it was read")
            if self._pinned and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), begin, len(part), os.POSIX_FADV_DONTNEED)
        if self._pinned:
            ctypes.CDLL(None).mlock(ctypes.c_void_p(place.ctypes.data), ctypes.c_size_t(size))
        return place.data.toreadonly()
