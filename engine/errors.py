"""Exceptions for users of the engine, each with its exit code on the command line.

    ShoalError                    1   base: anything this project raises on purpose
    ├── ModelFileError            3   a model file is missing, truncated, altered or inconsistent
    ├── UnsupportedModelError     4   the model is valid, but its family, type or format is not supported
    ├── ContextError              5   the prompt does not fit the context
    ├── NoPlanError               6   no assignment of layers meets the devices' limits
    ├── DownloadError            11   a model could not be fetched
    ├── MissingDependencyError   12   an optional package is not installed
    ├── CancelledRunError        15   a run was ended by Stage.cancel
    ├── NetError                 13   see net/errors.py
    └── OperatingSystemError     16   a full disk, a permission, no memory: see engine/os_errors.py

A message is one sentence for the person at the terminal: it names the culprit (the file, the device, the
option) and the remedy. Exceptions of libraries are translated once, where the library is called.
"""

from collections.abc import Callable
from typing import ClassVar

Warn = Callable[[str], None]
"""A callback for warnings. A warning is one sentence about something odd that does not stop the work; the
command line prints it as `shoal: warning: …`."""


def ignore(message: str) -> None:
    """A `Warn` that discards warnings."""


class ShoalError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 1


class ModelFileError(ShoalError):
    """A model file is missing, truncated, altered, or its header contradicts its contents."""

    exit_code = 3


class UnsupportedModelError(ShoalError):
    """The model is valid, but its family, a tensor type or its format version is not supported."""

    exit_code = 4


class ContextError(ShoalError):
    """The prompt, or the prompt with the requested tokens, does not fit the context."""

    exit_code = 5


class CancelledRunError(ShoalError):
    """A run was ended by `Stage.cancel`. Its positions are empty; earlier ones are kept."""

    exit_code = 15


class NoPlanError(ShoalError):
    """No assignment of layers fits the devices' RAM; the message says how many MB are missing."""

    exit_code = 6


class DownloadError(ShoalError):
    """A model could not be fetched: no network, no such model, or a hash that does not match."""

    exit_code = 11


class MissingDependencyError(ShoalError):
    """An optional package is needed and not installed; the message has the command that installs it."""

    exit_code = 12


class OperatingSystemError(ShoalError):
    """The operating system refused something: disk space, access to a file, memory. `place` is the file or
    directory, where choosing another one can help."""

    exit_code = 16

    def __init__(self, message: str, *, place: object = None) -> None:
        super().__init__(message)
        self.place = place
