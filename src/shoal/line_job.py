"""A long job over lines of text: its output, one line of JSON for each, in a file that a job which was killed
continues.

Beside FILE there is FILE.job, a state: what the job is (command, model, options), how many lines are done,
and the hashes of these lines and of what was written for them. It is replaced as a whole, after FILE is on
the disk. What FILE has beyond its state, such as half a line, is cut off when the job continues, and these
lines are computed again. So FILE is in the end what it is without interruptions, byte for byte."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from .engine.errors import ShoalError
from .engine.files import write_whole
from .engine.os_errors import translated
from .engine.strict import Between, convert, parse
from .lines import Lines

_SUFFIX = ".job"
_SAVE_S = 1.0
"""Seconds between two states. More are computed again after a kill, fewer are disk writes for nothing."""
_CHUNK = 1 << 20
Count = Annotated[int, Between(0, 1 << 62)]
Job = Mapping[str, Any]
"""What a job is, as JSON values: everything that the output depends on, except for the lines."""


@dataclass(frozen=True, slots=True)
class State:
    """Lines that are done: how many, how many of them have an error, their SHA-256, and the size and the
    SHA-256 of what was written for them."""

    version: Annotated[int, Between(1, 1)]
    lines: Count
    errors: Count
    input_sha256: str
    output_bytes: Count
    output_sha256: str


EMPTY = State(1, 0, 0, hashlib.sha256().hexdigest(), 0, hashlib.sha256().hexdigest())


class Sink(Protocol):
    """Where results go, in the order of the lines."""

    state: State

    def write(self, results: Sequence[Mapping[str, Any]], lines: Lines) -> None:
        """Writes the results of all lines that were taken since the last call. OSError or a ShoalError: they
        cannot be written."""


class StreamSink:
    """Results on a stream, such as standard output, that cannot be continued."""

    def __init__(self, write: Callable[[str], object], flush: Callable[[], object]) -> None:
        self.state = EMPTY
        self._write, self._flush = write, flush

    def write(self, results: Sequence[Mapping[str, Any]], lines: Lines) -> None:
        """See Sink."""
        self._write(_text(results))
        self._flush()
        self.state = _after(self.state, results)


class FileSink:
    """Results in a file, with its state beside it. Made by `open_sink`, which holds the lock on the file."""

    def __init__(self, path: Path, file: io.FileIO, job: Job, state: State, output: Any) -> None:
        self.state = state
        self._path, self._file, self._job, self._hash = path, file, job, output
        self._saved, self._saved_at = state, time.monotonic()

    def write(self, results: Sequence[Mapping[str, Any]], lines: Lines) -> None:
        """See Sink."""
        data = _text(results).encode()
        _write(self._path, self._file, data)
        self._hash.update(data)
        self.state = replace(
            _after(self.state, results),
            input_sha256=lines.digest,
            output_bytes=self.state.output_bytes + len(data),
            output_sha256=self._hash.hexdigest(),
        )
        if time.monotonic() - self._saved_at >= _SAVE_S:
            self.save()

    def save(self) -> None:
        """Puts the results on the disk, and then their state."""
        if self.state != self._saved:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise translated(error, self._path, "cannot be written") or error from error
            _save(self._path, self._job, self.state)
            self._saved = self.state
        self._saved_at = time.monotonic()


@contextmanager
def open_sink(path: Path | None, job: Job, lines: Lines, *, resume: bool) -> Iterator[Sink]:
    """Where the results of a job go: standard output, or the file `path`. With `resume`, what the file has is
    kept, and those lines are taken. ShoalError: the file has results of another job or of other lines, is in
    use, or exists and must not be continued. OperatingSystemError: it cannot be used."""
    if path is None:
        if resume:
            raise ShoalError("--resume continues a file: give its name with -o FILE")
        yield StreamSink(sys.stdout.write, sys.stdout.flush)
        return
    with ExitStack() as stack:
        file = stack.enter_context(_opened(path))
        if not path.is_file():  # a device or a pipe
            if resume:
                raise ShoalError(f"{path} is not a file, so --resume cannot continue it")
            yield StreamSink(lambda text: _write(path, file, text.encode()), file.flush)
            return
        _lock(path, file)
        _remove_leavings(path)
        output = hashlib.sha256()
        state = _found(path, file, job, resume)
        if state is None:
            state = EMPTY
            _save(path, job, state)
        else:
            _check_output(path, file, state, output)
            _take(lines, state, path)
        file.truncate(state.output_bytes)
        file.seek(state.output_bytes)
        sink = FileSink(path, file, job, state, output)
        try:
            yield sink
        except BaseException:
            with suppress(OSError, ShoalError):  # the first error counts
                sink.save()
            print(f"shoal: {path} has {sink.state.lines} lines; --resume continues it", file=sys.stderr)
            raise
        sink.save()


def _opened(path: Path) -> io.FileIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return io.FileIO(descriptor, "r+" if path.is_file() else "w")
    except OSError as error:
        raise translated(error, path) or error from error


def _write(path: Path, file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise translated(error, path, "cannot be written") or error from error


def _lock(path: Path, file: io.FileIO) -> None:
    """A lock that ends with the process, however it ends."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ShoalError(f"{path} is being written by another process: wait for it, or end it") from None
    except OSError:
        pass  # a file system without locks


def _remove_leavings(path: Path) -> None:
    """Removes the states that a killed process has not finished. The lock says that no other is at it."""
    for part in path.parent.glob(f"{glob.escape(_beside(path).name)}.*.part"):
        with suppress(OSError):
            part.unlink()


def _found(path: Path, file: io.FileIO, job: Job, resume: bool) -> State | None:
    """The state of the file that a job continues. None: a new one begins."""
    beside = _beside(path)
    size = os.fstat(file.fileno()).st_size
    if not resume:
        if size:
            raise ShoalError(
                f"{path} exists: give --resume to continue it, remove it, or name another -o FILE"
            )
        return None
    try:
        body = beside.read_bytes()
    except FileNotFoundError:
        if size:
            raise ShoalError(
                f"{path} has no {beside.name} beside it, so nothing says what it is: remove it, or name "
                "another -o FILE"
            ) from None
        return None
    except OSError as error:
        raise translated(error, beside, "cannot be read") or error from error
    try:
        saved = parse(body)
        if not isinstance(saved, dict) or set(saved) != {"job", "state"}:
            raise ValueError("it is not the state of a job")
        state = convert(State, saved["state"], "state")
    except ValueError as error:
        raise ShoalError(f"{beside} is damaged ({error}): remove it and {path} to begin anew") from None
    _check_job(path, saved["job"], job)
    return state


def _check_job(path: Path, before: Any, now: Job) -> None:
    """ShoalError: the file is from another job; names the first thing that differs."""
    before = before if isinstance(before, dict) else {}
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) != now.get(key):
            was, wanted = (json.dumps(one.get(key), ensure_ascii=False)[:200] for one in (before, now))
            raise ShoalError(
                f"{path} was begun with {key} {was}, and this is {wanted}: use the same {key}, or name "
                "another -o FILE"
            )


def _check_output(path: Path, file: io.FileIO, state: State, output: Any) -> None:
    left = state.output_bytes
    try:
        while left and (part := file.read(min(left, _CHUNK))):
            output.update(part)
            left -= len(part)
    except OSError as error:
        raise translated(error, path, "cannot be read") or error from error
    if left or output.hexdigest() != state.output_sha256:
        raise ShoalError(
            f"{path} was changed since the job wrote it: remove it and {_beside(path).name} to begin anew"
        )


def _take(lines: Lines, state: State, path: Path) -> None:
    while lines.taken < state.lines and lines.take(min(1000, state.lines - lines.taken)):
        pass
    if lines.taken < state.lines or lines.digest != state.input_sha256:
        raise ShoalError(
            f"{lines.name} is not what {path} was made from: its first {state.lines} lines differ. Give the "
            "same lines, or name another -o FILE"
        )


def _save(path: Path, job: Job, state: State) -> None:
    text = json.dumps({"job": job, "state": asdict(state)}, indent=1) + "\n"
    try:
        write_whole(_beside(path), text)
    except OSError as error:
        raise translated(error, _beside(path), "cannot be written") or error from error


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _SUFFIX)


def _text(results: Sequence[Mapping[str, Any]]) -> str:
    """A line of JSON for each, in ASCII, so that every encoding can hold it."""
    return "".join(json.dumps(result, allow_nan=False) + "\n" for result in results)


def _after(state: State, results: Sequence[Mapping[str, Any]]) -> State:
    errors = sum("error" in result for result in results)
    return replace(state, lines=state.lines + len(results), errors=state.errors + errors)
