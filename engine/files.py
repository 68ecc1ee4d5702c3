"""Files of models and checkpoints, read whole: what goes wrong names the file."""

from __future__ import annotations

from pathlib import Path

from .errors import ModelFileError


def read_bytes(path: Path) -> bytes:
    """ModelFileError: unreadable."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror or e}") from e


def read_text(path: Path) -> str:
    """ModelFileError: unreadable, or no UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ModelFileError(f"{path} is no UTF-8 text: {e}") from e
