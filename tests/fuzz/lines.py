"""Which lines of shoal the inputs of a target reach. An input that reaches another one is worth changing
further, and those that none reaches show what the inputs lack."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, Self

import shoal

_PACKAGE = str(Path(shoal.__file__).parent)


class Lines:
    """Notes, within its `with` blocks, the lines that are run in functions of shoal. A function of which all
    lines have been run costs no more than its calls."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[CodeType, set[int], int]] = {}
        """Functions that were called, their lines that were not run yet, and how many lines they have."""
        self.new = False
        """Whether a line was run for the first time; to be cleared by the reader."""

    def __enter__(self) -> Self:
        sys.settrace(self._call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(None)

    def share(self) -> tuple[int, int]:
        """How many lines were run, and of how many, in the functions that were called."""
        lines = sum(count for _, _, count in self._known.values())
        return lines - sum(len(left) for _, left, _ in self._known.values()), lines

    def left(self) -> dict[str, list[int]]:
        """The lines that were not run, by file."""
        found = defaultdict[str, list[int]](list)
        for code, left, _ in self._known.values():
            if left:
                found[code.co_filename.removeprefix(f"{_PACKAGE}/")] += left
        return {name: sorted(set(lines)) for name, lines in sorted(found.items())}

    def words(self) -> list[str | int | float]:
        """Texts and numbers in the functions that were called: they may compare inputs with them."""
        waiting = [constant for code, *_ in self._known.values() for constant in code.co_consts]
        found = dict[str | int | float, None]()
        while waiting:
            constant = waiting.pop()
            if isinstance(constant, tuple | frozenset):
                waiting += sorted(constant, key=repr)
            elif isinstance(constant, str | int | float) and len(str(constant)) <= 40:
                found[constant] = None
        return [*found]

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        known = self._known.get(id(code))
        if known is None:
            if not code.co_filename.startswith(_PACKAGE):
                return None
            lines = {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
            known = self._known[id(code)] = code, lines, len(lines)
        return self._line if known[1] else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        left = self._known[id(frame.f_code)][1]
        if event == "line" and frame.f_lineno in left:
            left.remove(frame.f_lineno)
            self.new = True
        return self._line
