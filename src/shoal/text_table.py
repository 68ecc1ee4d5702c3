"""Plain-text tables: columns as wide as they must be, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without frames; a column whose cells are all numbers (or empty) is set to the right."""
    right = [all(not row[i] or row[i][0].isdigit() for row in rows) for i in range(len(header))]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(columns([header, ["-" * width for width in widths], *rows], right))


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Lines whose cells are two spaces apart, flush right in the columns where `right` says so (default:
    none)."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    to_right = right or [False] * len(widths)

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, to_right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(cells) for cells in rows]
