"""Results in a JSON file: what is there is not measured again, so a command that was ended goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.engine.errors import ShoalError


class Results:
    """Records by key."""

    def __init__(self, path: Path) -> None:
        """ShoalError: there is a file that is no JSON object."""
        self._path = path
        try:
            self.rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise ShoalError(f"{path} holds no results: {error}; name another file") from error
        if not isinstance(self.rows, dict):
            raise ShoalError(f"{path} holds no results, but a {type(self.rows).__name__}; name another file")

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The record of a key, made and saved if it is not there."""
        if key not in self.rows:
            self.put(key, make())
        return self.rows[key]

    def put(self, key: str, record: Any) -> None:
        """Adds or replaces a record; the file is whole at any time."""
        self.rows[key] = record
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)
