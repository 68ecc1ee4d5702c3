"""Copies of weights that a node holds beside those of its stage: which to load next, and what to report.
Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Copies:
    """The copies that a coordinator wants, in the order of their use, as far as there has been room for them.
    What keys and values have displaced is not loaded again before the next order."""

    def __init__(self) -> None:
        self._wanted: tuple[int, ...] = ()
        self._known: frozenset[int] = frozenset()
        """The copies that the stage held when it was last asked."""
        self._told: frozenset[int] = frozenset()

    def order(self, units: Sequence[int]) -> None:
        """Replaces what is wanted."""
        self._wanted = tuple(dict.fromkeys(units))

    def renew(self) -> None:
        """Notes that there is another stage, which holds no copies yet."""
        self._known = frozenset()

    def next(self, held: frozenset[int], own: Collection[int]) -> tuple[int, ...] | None:
        """What to hold next, if `held` is held now and the stage has the units `own`: one more, or fewer;
        None: nothing is to be done."""
        if self._known - held - set(own):
            self._wanted = tuple(u for u in self._wanted if u in held or u in own)
        self._known = held
        useful = [u for u in self._wanted if u not in own]
        missing = next((u for u in useful if u not in held), None)
        if missing is None and held <= set(useful):
            return None
        return tuple(u for u in useful if u in held or u == missing)

    def held(self, asked: Collection[int], held: frozenset[int]) -> None:
        """Notes what is held after it was `asked`: for the others there is no room."""
        lacking = set(asked) - held
        self._wanted = tuple(u for u in self._wanted if u not in lacking)
        self._known = held

    def news(self, held: frozenset[int]) -> tuple[int, ...] | None:
        """What to report; None: nothing has changed since the last report."""
        if held == self._told:
            return None
        self._told = held
        return tuple(sorted(held))
