"""Mapped files that become shorter while they are used.

Reading a page behind the new end of a mapped file raises SIGBUS, and no check before the access can prevent
it. The C library has a handler for that (csrc/mapped.c): the page reads as zeros. Whoever computes with a
mapped file asks afterwards whether it has shrunk. Without the C library such an access ends the process.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MissingDependencyError, ModelFileError

_WITHOUT_FILE: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class MappedFile:
    """A file of `size` bytes that is mapped for reading, from its descriptor. It stays mapped as long as its
    memory is used. ValueError, OSError: it cannot be mapped."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, **_WITHOUT_FILE)
        self.path, self.size, self.file = path, size, os.dup(descriptor)
        self.memory, self.watch = memoryview(memory), -1
        library = _library()
        if library is not None:
            from .backends._abi import ffi

            address = ffi.cast("void *", np.frombuffer(memory, np.uint8).ctypes.data)
            self.watch = library.shoal_watch(address, size, mmap.PAGESIZE, self.file)
        weakref.finalize(memory, _release, library, self.watch, self.file).atexit = False


class WholeFiles:
    """Mapped files that should still be as long as they were."""

    def __init__(self, files: Iterable[MappedFile]) -> None:
        self._files, self._library = tuple(files), _library()
        if self._library is not None:
            from .backends._abi import ffi

            self._watches = ffi.new("int32_t[]", [file.watch for file in self._files])

    def check(self) -> None:
        """ModelFileError: a file has become shorter, and what was read of it may be zeros."""
        if self._library is not None:
            found: int = self._library.shoal_shrunk(self._watches, len(self._files))
        else:
            short = (i for i, f in enumerate(self._files) if os.lseek(f.file, 0, os.SEEK_END) < f.size)
            found = next(short, -1)
        if found >= 0:
            path = self._files[found].path
            raise ModelFileError(f"{path} was truncated while it was in use: pull or convert the model again")


def _release(library: Any, watch: int, file: int) -> None:
    if library is not None:
        library.shoal_unwatch(watch)
    os.close(file)


@cache
def _library() -> Any:
    """The C library; None: it cannot be used."""
    try:
        from .backends.native import library

        return library()
    except MissingDependencyError:
        return None
