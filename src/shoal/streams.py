"""Output of a command: the standard streams, made safe before it runs, and files that the user names.

A standard stream may be closed, full, or in an encoding that lacks a character. Output never fails because of
a character, an error on standard error never stops the work, and an error of standard output names it.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from .engine.os_errors import STANDARD_INPUT, STANDARD_OUTPUT, translated

_ENCODING_ERRORS = "shoal.encoding"
_SAFE = {
    "r": ("surrogateescape", "ignore", "replace", "backslashreplace"),
    "w": (_ENCODING_ERRORS, "ignore", "replace", "backslashreplace", "namereplace", "xmlcharrefreplace"),
}
"""Error handlers that never raise, by direction. The first one replaces any that can raise."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """Gives the process three usable streams. At the end they are flushed and the old ones restored."""
    codecs.register_error(_ENCODING_ERRORS, _encode)
    _occupy_descriptors()
    unblocked = [fd for fd in range(3) if not os.get_blocking(fd)]
    _set_blocking(unblocked, True)
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = _safe(sys.stdin if sys.stdin is not None else open(0, closefd=False), "r")  # noqa: SIM115
    out = _safe(sys.stdout if sys.stdout is not None else cast("TextIO", _Closed()), "w")
    messages = sys.stderr if sys.stderr is not None else open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout = cast("TextIO", _Guarded(out, STANDARD_OUTPUT, stops=True))
    sys.stderr = cast("TextIO", _Guarded(_safe(messages, "w"), "standard error", stops=False))
    try:
        yield
    finally:
        for stream in (out, messages):
            _empty(stream)
        _set_blocking(unblocked, False)  # another process may share them, and expects it
        sys.stdin, sys.stdout, sys.stderr = before


class _Guarded:
    """A text stream whose errors name it, or are ignored unless `stops`. A reader that has gone away always
    stops the writer."""

    def __init__(self, stream: TextIO, name: str, *, stops: bool) -> None:
        self._stream, self._name, self._stops = stream, name, stops
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Flushes. An error of an earlier write is raised again, since its writer may have ignored it, as
        argparse does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)
        if self._error is not None:
            raise self._error

    def _failed(self, error: OSError) -> None:
        error.filename = error.filename or self._name
        if self._stops or isinstance(error, BrokenPipeError):
            self._error = error
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Closed(io.TextIOBase):
    """Standard output of a process that was started without one."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed", STANDARD_OUTPUT)

    def fileno(self) -> int:
        return 1


def _occupy_descriptors() -> None:
    """Opens those of descriptors 0 to 2 that are closed. Otherwise the next file that is opened would get
    such a number, and output for a standard stream would be written to it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _set_blocking(descriptors: Sequence[int], blocking: bool) -> None:
    """A stream that does not block reads less than all, and loses what is written faster than it is read."""
    for fd in descriptors:
        with suppress(OSError):  # closed by now
            os.set_blocking(fd, blocking)


def _safe(stream: TextIO, direction: str) -> TextIO:
    """The stream, with an error handler that never raises. One that was chosen with PYTHONIOENCODING is
    kept."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors not in _SAFE[direction]:
        stream.reconfigure(errors=_SAFE[direction][0])
    return stream


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encodes a byte of a file name that is not text as that byte, and a character that the encoding lacks as
    "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    code = ord(error.object[error.start])
    return bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else "?", error.start + 1


def _empty(stream: TextIO) -> None:
    """Flushes the stream. Output that it rejects is dropped, or the interpreter would try again and
    complain."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


def read_text(stream: TextIO) -> str:
    """All of standard input: UTF-8, or else text in the locale's encoding. Bytes that are neither become
    surrogates. OSError: it cannot be read."""
    try:
        data = stream.buffer.read()
    except OSError as error:  # such as EBADF if it was opened for writing
        error.filename = STANDARD_INPUT
        raise
    for encoding in ("utf-8", stream.encoding):
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("utf-8", "surrogateescape")


def write_output(path: Path, text: str) -> None:
    """Writes a file that the command line names. OperatingSystemError: it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise translated(error, path, "cannot be written") or error from error
