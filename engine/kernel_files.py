"""Small files in which the kernel reports something (/proc, /sys). Each may be missing, unreadable, or hold
something else than expected: then there is no value, and no error."""

from __future__ import annotations

from pathlib import Path


def read_fields(path: Path, unit: int = 1) -> dict[str, int]:
    """Integers by name, in a file such as meminfo or memory.stat; empty if unreadable. `unit` multiplies
    them."""
    rows = [line.replace(":", " ").split() for line in read_lines(path)]
    return {row[0]: int(row[1]) * unit for row in rows if len(row) > 1 and row[1].isdecimal()}


def read_number(path: Path) -> int | None:
    """The integer in a file; None: not an integer, such as "max", or unreadable, as on many phones."""
    return integer(read_text(path) or "")


def integer(text: str) -> int | None:
    """The integer that a text is, if the kernel could have written it: of 64 bits at most."""
    try:
        value = int(text)
    except ValueError:
        return None
    return value if -(1 << 63) <= value < 1 << 64 else None


def read_lines(path: Path) -> list[str]:
    """The lines of a file; none if unreadable."""
    return (read_text(path) or "").splitlines()


def read_text(path: Path) -> str | None:
    """The text of a file. None: unreadable."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
