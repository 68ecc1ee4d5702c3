"""Messages that a person types: with line editing and history where Python has readline, a paste as one.

History is kept from chat to chat in `$XDG_STATE_HOME/shoal/history` (`~/.local/state/shoal/history`), a JSON
string a line, readable by its owner only.
"""

from __future__ import annotations

import json
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

_LINES = 1000
"""Messages of the history that are offered; a file of twice as many is cut down to these."""
_WAIT_SECONDS = 0.05
"""Lines of a paste follow each other closer than this."""


class Terminal:
    """Asks for messages on standard input."""

    def __init__(self) -> None:
        self._readline = _readline()
        # GNU readline takes a bracketed paste as one line; others get what a terminal sends after the first.
        self._whole = (
            self._readline is not None
            and "libedit" not in (self._readline.__doc__ or "")
            and os.environ.get("TERM", "dumb") != "dumb"
        )
        self._last = ""
        if self._readline is not None:
            if self._whole:
                self._readline.parse_and_bind("set enable-bracketed-paste on")
            for line in _read_history():
                self._readline.add_history(line)

    def ask(self, prompt: str) -> str:
        """The next message; one that was pasted may have several lines. EOFError: there is none.
        UnicodeDecodeError: bytes that are no text in the terminal's encoding."""
        lines = [input(prompt)]
        while not self._whole and _more_waits():
            try:
                lines.append(input())
            except EOFError:
                break
        message = "\n".join(lines)
        if self._readline is not None and message.strip() and message != self._last:
            _add_to_history(message)
            self._last = message
        return message


def _readline() -> ModuleType | None:
    """The readline module: imported here, since that alone makes input() use it."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _more_waits() -> bool:
    """Whether input is there that nobody has read."""
    try:
        return bool(select.select([sys.stdin], [], [], _WAIT_SECONDS)[0])
    except (OSError, ValueError):  # no file
        return False


def _history() -> Path:
    """RuntimeError: there is no home directory."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "shoal" / "history"


def _read_history() -> list[str]:
    """The latest messages; none where they cannot be read: history is a convenience."""
    try:
        lines = _history().read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 2 * _LINES:
            _write_history("".join(f"{line}\n" for line in lines[-_LINES:]), os.O_TRUNC)
    except (OSError, RuntimeError):
        return []
    found = []
    for line in lines[-_LINES:]:
        with suppress(ValueError, RecursionError):  # a line that somebody else wrote
            message = json.loads(line)
            if isinstance(message, str) and "\0" not in message:
                found.append(message)
    return found


def _add_to_history(message: str) -> None:
    with suppress(OSError, RuntimeError):  # a full or read-only disk does not end a chat
        _write_history(json.dumps(message) + "\n", os.O_APPEND)


def _write_history(text: str, how: int) -> None:
    path = _history()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # one that was there may have been open to others
        file.write(text)
