"""Memory for weights: arenas of huge pages, and advice to the system about freed memory and file caches.

Decoding reads every weight once per token, and reading a file mapping of 4 KiB pages is 10-35 % slower than
reading huge pages. A mapping, however, costs nothing to load, and the system can drop its pages when memory
runs short, which suits a device with little RAM."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .host import on_linux, ram
from .layout import round_up

HUGE_PAGE = 2 << 20
_ALIGNMENT = 64
_CHUNK = 4 << 20


def affordable() -> int:
    """Bytes that copies of files may take: half of the available RAM; 0 if the system does not report it."""
    return (ram().available or 0) // 2


def trim_heap() -> None:
    """Returns freed heap memory to the system. The C library would keep it: several MB after weights and
    workspaces have been freed. Does nothing where the C library has no malloc_trim (glibc has)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def return_large_frees() -> None:
    """Lowers the C library's mmap threshold to 1 MiB for the whole process, so that freed workspaces (tens of
    MB) are returned to the system at once instead of staying in the heap. Does nothing where the C library
    has no mallopt (glibc has)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(ctypes.c_int(-3), ctypes.c_int(1 << 20))  # M_MMAP_THRESHOLD


def fetch_ahead(path: Path) -> None:
    """Asks the system to read a file into its page cache, without waiting. Only advice: does nothing if the
    system does not support it or the file is missing."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def room(sizes: Iterable[int]) -> int:
    """Bytes that blocks of these sizes need in an arena, alignment included."""
    return sum(round_up(size, _ALIGNMENT) for size in sizes)


def _in_huge_pages(memory: mmap.mmap, first: int, huge: int) -> None:
    """Requests huge pages for the full huge pages in the `huge` bytes from offset `first` on, and small pages
    after them, where a huge page would be partly wasted."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole = huge // HUGE_PAGE * HUGE_PAGE
        with suppress(OSError):  # a kernel built without them
            if whole:
                memory.madvise(mmap.MADV_HUGEPAGE, first, whole)
            memory.madvise(mmap.MADV_NOHUGEPAGE, first + whole)


def forget(memory: NDArray[np.uint8]) -> int:
    """Returns the whole pages of private memory to the system; the number of bytes returned, 0 where the
    system does not support it. On the next write the system provides small pages."""
    done = _forget_at(memory.ctypes.data, memory.nbytes, memory)
    if done and hasattr(mmap, "MADV_NOHUGEPAGE"):
        _advise(memory.ctypes.data, memory.nbytes, mmap.MADV_NOHUGEPAGE)
    return done


def _forget_at(address: int, nbytes: int, holder: object) -> int:
    """Returns the whole pages of `nbytes` at `address` to the system; the number of bytes returned. `holder`
    keeps the mapping alive until then."""
    if not on_linux():  # elsewhere MADV_DONTNEED means something else
        return 0
    ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    return _advise(address, nbytes, mmap.MADV_DONTNEED)


def _advise(address: int, nbytes: int, advice: int) -> int:
    """Calls madvise for the whole pages of a block; their number of bytes, 0 if the system refuses."""
    first, last = round_up(address, mmap.PAGESIZE), (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    at, size = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
    return last - first if last > first and not ctypes.CDLL(None).madvise(at, size, advice) else 0


class Arena:
    """A bump allocator over private memory, in huge pages where the system has them."""

    def __init__(self, nbytes: int, *, pinned: bool = False, huge: bool = True) -> None:
        """Reserves address space; the system provides memory as blocks are written. MemoryError: not enough.

        `huge` is False for small pages, so that only the pages that are written take memory. `pinned` is for
        a device with a memory cap: files read into the arena are locked in memory, as far as the system
        allows (Linux: RLIMIT_MEMLOCK), and dropped from the page cache, which would count towards the cap."""
        self._pinned = pinned
        try:
            memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as e:
            raise MemoryError(f"the system has no {nbytes / 1e6:.0f} MB of memory left") from e
        addresses: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        first = -addresses.ctypes.data % HUGE_PAGE
        _in_huge_pages(memory, first, nbytes if huge else 0)
        self._bytes = addresses[first : first + nbytes]
        self._huge = nbytes // HUGE_PAGE * HUGE_PAGE if huge else 0
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that are not allocated yet."""
        return len(self._bytes) - self._at

    def growth(self, nbytes: int) -> int:
        """Bytes of memory that allocating `nbytes` may take from the system, counting whole huge pages."""
        return self._held(self._at + nbytes) - self._held(self._at)

    def _held(self, at: int) -> int:
        return round_up(at, HUGE_PAGE) if at <= self._huge else at

    def go_on_small(self) -> None:
        """Switches the arena to small pages, from the next huge page on."""
        first = round_up(self._at, HUGE_PAGE)
        if first < self._huge and hasattr(mmap, "MADV_NOHUGEPAGE"):
            _advise(self._bytes.ctypes.data + first, self._huge - first, mmap.MADV_NOHUGEPAGE)
        self._huge = min(self._huge, first)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """The next block of `nbytes` bytes, aligned to 64 bytes. MemoryError: the arena is used up."""
        piece = self._bytes[self._at : self._at + nbytes]
        if len(piece) < nbytes:
            raise MemoryError(f"an arena of {len(self._bytes)} bytes has no {nbytes} left")
        self._at += round_up(nbytes, _ALIGNMENT)
        return piece

    def read(self, file: BufferedReader, size: int) -> memoryview:
        """Reads a newly opened file of `size` bytes into the arena; returns a read-only view of it. OSError:
        it cannot be read, or has become shorter. MemoryError: the arena is used up."""
        place = self.take(size)
        # Other files may keep the arena alive; the memory of this file is returned once nothing refers to
        # it.
        weakref.finalize(place, _forget_at, place.ctypes.data, size, self._bytes).atexit = False
        for begin in range(0, size, _CHUNK):
            part = place[begin : begin + _CHUNK]
            if file.readinto(part.data) != len(part):
                raise OSError(errno.EIO, "the file became shorter while it was read")
            if self._pinned and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), begin, len(part), os.POSIX_FADV_DONTNEED)
        if self._pinned:
            ctypes.CDLL(None).mlock(ctypes.c_void_p(place.ctypes.data), ctypes.c_size_t(size))
        return place.data.toreadonly()
