"""Lines of text from a file or a pipe, read one by one: any bytes, any length, in bounded memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO

from .engine.errors import ShoalError
from .engine.os_errors import STANDARD_INPUT, translated

LONGEST = 1 << 22
"""Bytes of the longest line that is read. No context holds the tokens of more."""
_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One line, numbered from 1, without its end. `error` says why it has no text."""

    number: int
    text: str
    error: str | None = None


class Lines:
    """The lines of a stream of bytes, UTF-8, that end with LF or CR LF; a byte order mark before the first
    is not part of it. `taken` of them were taken, and `digest` is their SHA-256, whatever they end with."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name, self.taken = name, 0
        self._stream = stream
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of the lines that were taken, in hexadecimal."""
        return self._hash.hexdigest()

    def take(self, count: int) -> list[Line]:
        """The next lines, `count` at most; none: there are no more. OperatingSystemError: they cannot be
        read."""
        return list(islice(self._each(), count))

    def _each(self) -> Iterator[Line]:
        while raw := self._read():
            self.taken += 1
            ended = raw.endswith(b"\n")
            too_long = len(raw) > LONGEST and not ended
            raw = raw.removesuffix(b"\n") if too_long else raw.removesuffix(b"\n").removesuffix(b"\r")
            raw = raw.removeprefix(_MARK) if self.taken == 1 else raw
            self._hash.update(raw)
            while too_long and not ended and (part := self._read()):
                ended = part.endswith(b"\n")
                self._hash.update(part.removesuffix(b"\n"))
            self._hash.update(b"\n")
            yield Line(self.taken, "", _TOO_LONG) if too_long else _decoded(self.taken, raw)

    def left(self) -> int | None:
        """How many lines are left, if that can be known without taking them: the stream is a file. Errors as
        for `take`."""
        with self._errors():
            if not self._stream.seekable():
                return None
            at, count, last = self._stream.tell(), 0, b"\n"
            while part := self._stream.read(_CHUNK):
                count, last = count + part.count(b"\n"), part[-1:]
            self._stream.seek(at)
            return count + (last != b"\n")

    def _read(self) -> bytes:
        with self._errors():
            return self._stream.readline(LONGEST + 1)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translated(error, self.name, "cannot be read") or error from error


_TOO_LONG = f"the line is longer than {LONGEST >> 20} MiB"


def _decoded(number: int, raw: bytes) -> Line:
    try:
        return Line(number, raw.decode("utf-8"), None if raw else "the line is empty")
    except UnicodeDecodeError as error:
        return Line(number, "", f"the line is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}")


@contextmanager
def open_lines(path: str | None) -> Iterator[Lines]:
    """The lines of a file; None or "-": of standard input. OperatingSystemError: the file cannot be opened.
    ShoalError: standard input is a terminal."""
    if path is None or path == "-":
        if sys.stdin.isatty():
            raise ShoalError("there are no lines: give a FILE of them, or send them to standard input")
        yield Lines(sys.stdin.buffer, STANDARD_INPUT)
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise translated(error) or error from error
    with stream:
        yield Lines(stream, path)
