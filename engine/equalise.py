"""Channel equalisation: moves scale between weights that meet, so that int8 rounds them more finely."""

from __future__ import annotations

from .checkpoint import F32
from .program import Unit


def equalise(unit: Unit, weights: dict[str, F32]) -> None:
    """Rescales the unit's weights in place; in exact arithmetic the unit computes the same."""
