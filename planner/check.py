"""Checks of single values, for rows and profiles: a ValueError names the value's owner and what it must
be."""

import math


def check_whole(what: str, value: object, least: int = 0) -> None:
    """A whole number (no bool) of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be a whole number >= {least}, not {value!r}")


def check_real(what: str, value: object, *, above: float | None = None, endless: bool = False) -> None:
    """A number (no bool) >= 0, or > `above` where that is given; finite unless `endless`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{what} must be a number, not {value!r}")
    if math.isnan(value) or (math.isinf(value) and not endless):
        raise ValueError(f"{what} must be finite, not {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{what} must be > {above:g}, not {value!r}")
    if above is None and value < 0:
        raise ValueError(f"{what} must be >= 0, not {value!r}")


def check_name(what: str, value: object) -> None:
    """A string that is not empty and can be printed."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} needs a name that is not empty, not {value!r}")
    if not value.isprintable():
        raise ValueError(f"{what} has a name that cannot be printed: {value!r}")


def check_row_rates(owner: str, rates: object) -> None:
    """A tuple of (rows of a call, MAC/s) pairs, rows ascending."""
    if not isinstance(rates, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in rates):
        raise ValueError(f"{owner}: row_rates must be a tuple of (rows, MAC/s) pairs, not {rates!r}")
    before = 0
    for rows, rate in rates:
        check_whole(f"{owner}: rows of row_rates", rows, before + 1)
        check_real(f"{owner}: MAC/s at {rows} rows", rate, above=0)
        before = rows
